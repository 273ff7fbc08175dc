"""Every scorer: its conformance, and its formula on plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from avlprof.attention.modality import Modality
from avlprof.errors import UserError
from avlprof.policy import ScorerSpec
from avlprof.scorers import SCORERS, make_scorer
from avlprof.testing.scorers import ScorerConformance, random_prefill
from tests.interpreted import DEVICE, passes, runs_elsewhere, runs_here


@pytest.mark.parametrize("name", SCORERS.names())
class TestConformance(ScorerConformance):
    @pytest.fixture(autouse=True)
    def _named(self, name):
        self.name = name

    def make(self):
        return make_scorer(ScorerSpec(name=self.name))


def plain_weights(prefill, row, head, position):
    """Causal softmax of one query over the real keys, in double precision."""
    group = head // (prefill.query.shape[1] // prefill.key.shape[1])
    valid = [j for j in range(position + 1) if prefill.modality[row, j] != Modality.PAD]
    logits = torch.stack(
        [(prefill.query[row, head, position].double() @ prefill.key[row, group, j].double()) for j in valid]
    )
    found = torch.zeros(prefill.modality.shape[1], dtype=torch.double)
    logits = logits * prefill.scaling
    if prefill.sinks is not None:
        logits = torch.cat([logits, prefill.sinks[head, None].double()])
    found[valid] = logits.softmax(0)[: len(valid)]
    return found


@pytest.mark.parametrize("sinks", [None, torch.linspace(-1.0, 5.0, 6)], ids=["plain", "sinks"])
@pytest.mark.parametrize("name", ["last_query", "accumulated", "instruction"])
def test_attention_scorers_sum_the_right_rows(name, sinks):
    prefill = replace(random_prefill((13, 9), seed=4), sinks=sinks)
    scores = make_scorer(ScorerSpec(name=name)).score(prefill)
    width = prefill.modality.shape[1]
    for row in range(2):
        real = (prefill.modality[row] != Modality.PAD).nonzero()[:, 0].tolist()
        text = (prefill.modality[row] == Modality.TEXT).nonzero()[:, 0].tolist()
        rows = {"last_query": [width - 1], "accumulated": real, "instruction": text}[name]
        for head in (0, 5):
            wanted = sum(plain_weights(prefill, row, head, p) for p in rows)
            wanted = wanted / len(rows) if name == "instruction" else wanted
            torch.testing.assert_close(scores[row, head].double()[real], wanted[real], atol=1e-5, rtol=1e-5)


def test_accumulated_does_not_depend_on_its_blocks():
    prefill = random_prefill((31, 20))
    whole = make_scorer(ScorerSpec(name="accumulated")).score(prefill)
    for block in (1, 7, 31):
        parts = make_scorer(ScorerSpec(name="accumulated", options={"block": block})).score(prefill)
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_key_diversity_is_the_negative_cosine_with_the_mean_direction():
    prefill = random_prefill((15,), seed=2)
    scores = make_scorer(ScorerSpec(name="key_diversity")).score(prefill)
    vision = (prefill.modality[0] == Modality.VISION).nonzero()[:, 0].tolist()
    for head in (0, 4):
        keys = prefill.key[0, head // 3]
        unit = [k / k.norm() for k in keys]
        mean = sum(unit[j] for j in vision) / len(vision)
        for j in vision:
            assert scores[0, head, j] == pytest.approx(-float(unit[j] @ mean / mean.norm()), abs=1e-5)


def made(name, **options):
    return make_scorer(ScorerSpec(name=name, options=options))


def real_positions(prefill, row):
    return (prefill.modality[row] != Modality.PAD).nonzero()[:, 0].tolist()


def test_window_is_the_mean_of_the_newest_rows():
    prefill = random_prefill((21, 9), seed=5)
    scores = made("window", rows=12).score(prefill)
    for row in range(2):
        real = real_positions(prefill, row)
        rows = real[-12:]
        for head in (1, 3):
            wanted = sum(plain_weights(prefill, row, head, p) for p in rows) / len(rows)
            torch.testing.assert_close(scores[row, head].double()[real], wanted[real], atol=1e-5, rtol=1e-5)


def test_text_rows_are_weighted_by_what_text_gives_them():
    prefill = random_prefill((18, 11), seed=6)
    scores = made("text_weighted").score(prefill)
    for row in range(2):
        text = (prefill.modality[row] == Modality.TEXT).nonzero()[:, 0].tolist()
        for head in (0, 5):
            rows = {p: plain_weights(prefill, row, head, p) for p in text}
            received = {j: float(sum(rows[p][j] for p in text)) for j in text}
            wanted = sum(rows[p] * received[p] for p in text) / sum(received.values())
            real = real_positions(prefill, row)
            torch.testing.assert_close(scores[row, head].double()[real], wanted[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_pooling_looks_at_neighbours(mode):
    prefill = random_prefill((14, 8), seed=7)
    plain = made("window").score(prefill)
    pooled = made("pooled", of="window", kernel=3, mode=mode).score(prefill)
    for row in range(2):
        real = real_positions(prefill, row)
        for j in real:
            near = [float(plain[row, 2, i]) if i in real else 0.0 for i in (j - 1, j, j + 1)]
            wanted = sum(near) / 3 if mode == "mean" else max(near)
            assert float(pooled[row, 2, j]) == pytest.approx(wanted, abs=1e-6)


def test_norms_of_keys_and_values():
    prefill = random_prefill((12,), seed=8)
    keys, valued = made("key_norm").score(prefill), made("valued", of="accumulated").score(prefill)
    accumulated = made("accumulated").score(prefill)
    for head in (0, 2, 5):
        for j in range(12):
            assert keys[0, head, j] == pytest.approx(-float(prefill.key[0, head // 3, j].norm()), abs=1e-5)
            norm = float(prefill.value[0, head // 3, j].norm())
            assert valued[0, head, j] == pytest.approx(float(accumulated[0, head, j]) * norm, abs=1e-4)


def test_distinct_keys_count_more():
    prefill = random_prefill((15, 9), seed=9)
    plain, scores = (
        made("valued", of="instruction").score(prefill),
        made("distinct", power=3.0).score(prefill),
    )
    for row in range(2):
        vision = (prefill.modality[row] == Modality.VISION).nonzero()[:, 0].tolist()
        for head in (0, 4):
            keys = prefill.key[row, head // 3].double()
            units = [key / key.norm() for key in keys]
            mean = sum(units[j] for j in vision) / len(vision)
            for j in vision:
                wanted = float(plain[row, head, j]) * (1 - float(units[j] @ mean / mean.norm())) ** 3
                assert float(scores[row, head, j]) == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_scorers_build_on_each_other():
    prefill = random_prefill((17, 10), seed=10)
    nested = make_scorer(ScorerSpec.of("distinct:valued:pooled:instruction")).score(prefill)
    norm = prefill.value.norm(dim=-1).repeat_interleave(3, dim=1)
    unlike = 1 + made("key_diversity").score(prefill)
    by_hand = made("pooled", of="instruction").score(prefill) * norm * unlike**2
    real = prefill.valid[:, None].expand_as(nested)
    torch.testing.assert_close(nested[real], by_hand[real])


def test_knobs_out_of_range_are_refused():
    for name, options in (
        ("pooled", {"of": "pooled"}),
        ("pooled", {"of": "valued:pooled:window"}),
        ("distinct", {"of": "pooled:distinct"}),
        ("distinct", {"of": "pooled:key_norm"}),
        ("distinct", {"power": -1.0}),
        ("pooled", {"kernel": 4}),
        ("pooled", {"mode": "median"}),
        ("valued", {"of": "valued"}),
        ("valued", {"of": 3}),
        ("window", {"rows": "many"}),
    ):
        with pytest.raises(UserError, match=name):
            made(name, **options)


def test_no_rows_are_refused():
    for name in ("window", "instruction", "text_weighted"):
        with pytest.raises(UserError, match="rows of a scorer must be at least 1, got 0"):
            made(name, rows=0)


def test_random_draws_are_even_and_differ_between_seeds_and_layers():
    prefill = random_prefill((4000,), heads=2, kv_heads=1)
    first = make_scorer(ScorerSpec(name="random")).score(prefill)[0, 0]
    other = make_scorer(ScorerSpec(name="random", options={"seed": 1})).score(prefill)[0, 0]
    assert first.min() >= 0
    assert first.max() < 1
    assert first.mean() == pytest.approx(0.5, abs=0.03)
    assert torch.corrcoef(torch.stack([first, other]))[0, 1].abs() < 0.06
    assert torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1].abs() < 0.06


def test_unknown_inner_scorers_are_refused():
    for name in ("pooled", "valued", "distinct"):
        with pytest.raises(UserError, match="unknown scorer 'instructon'; did you mean instruction"):
            made(name, of="valued:instructon" if name == "pooled" else "instructon")


def test_unknown_options_are_refused():
    with pytest.raises(UserError, match="takes no options, got 'seed'"):
        make_scorer(ScorerSpec(name="last_query", options={"seed": 1}))
    with pytest.raises(UserError, match="did you mean seed"):
        make_scorer(ScorerSpec(name="random", options={"sed": 1}))


BY_KERNELS = ("last_query", "instruction", "window")


@pytest.mark.full
@runs_elsewhere
def test_scores_by_kernels_in_the_interpreter():
    passes(__file__, len(BY_KERNELS), "-k", "scores_by_kernels_are")


@runs_here
@pytest.mark.parametrize("name", BY_KERNELS)
def test_scores_by_kernels_are_those_without_them(name, monkeypatch):
    """Padded rows, learned sinks, a soft cap; where a row is padding it has no score either way."""
    here = replace(random_prefill(seed=4, pad=3), sinks=torch.linspace(-2, 3, 6), softcap=2.0)
    scorer = make_scorer(ScorerSpec(name=name))
    wanted = scorer.score(here)
    tensors = {part: getattr(here, part) for part in ("query", "key", "value", "modality", "sinks")}
    there = replace(here, **{part: tensor.to(DEVICE) for part, tensor in tensors.items()})
    for module in ("attention.column_sums", "scorers._base"):
        monkeypatch.setattr(f"avlprof.{module}.kernels_run", lambda tensor: True)
    calls = []
    monkeypatch.setattr(type(there), "weights", lambda *arguments: calls.append(arguments))
    torch.testing.assert_close(scorer.score(there).cpu(), wanted, atol=1e-5, rtol=1e-5)
    assert not calls
