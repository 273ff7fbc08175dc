"""Prompts that come in several passes, and further turns with pictures: against one pass, and eager loops."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from transformers.cache_utils import DynamicCache

import avlprof
from avlprof.attention.session import with_cache
from avlprof.policy import Policy, TextPolicy
from avlprof.testing import families
from avlprof.testing.models import random_llava
from avlprof.tracing import record
from avlprof.tracing.options import RecordOptions
from tests import eager_rows as plain
from tests import oracle
from tests.eager_rows import EDGES, GENERATED, LAGS, LEVELS, TEXT, VISION
from tests.helpers import generate_words

WHOLE = RecordOptions(
    rows="all",
    coverage_rows=1000,
    per_head=True,
    history=0.4,
    text_rows=True,
    lags=LAGS,
    coverages=LEVELS,
    distances=EDGES,
)
CASES = {
    "llava": random_llava,
    "sinks": lambda: random_llava(2, sinks=True),
    "aya_vision": families.random_aya_vision,
    "gemma3": families.random_gemma3,
}
FIRST = ("pixel_values", "image_grid_thw")  # what the pass with the pictures takes
LATER = (7, 12, 30, 9)


def passes(case, inputs, cuts, cache):
    """Run a prompt in several passes, the pictures in the first that has image tokens, then single tokens."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    pictures = {name: inputs[name] for name in FIRST if name in inputs}
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    by_token = {name for name in inputs if inputs[name].shape == ids.shape} - {"input_ids", "attention_mask"}
    for start, stop in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        part = ids[:, start:stop]
        now = pictures if torch.isin(part, torch.tensor(case.vision_token_ids)).any() else {}
        pictures = {} if now else pictures
        more = {name: inputs[name][:, start:stop] for name in by_token if now}
        case.model(
            input_ids=part, attention_mask=mask[:, :stop], position_ids=places[:, start:stop],
            **now, **more, **with_cache(case.model, cache),
        )  # fmt: skip
    for token in LATER:
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
        place = mask.sum(dim=1, keepdim=True) - 1
        new = torch.full((len(mask), 1), token)
        case.model(input_ids=new, attention_mask=mask, position_ids=place, **with_cache(case.model, cache))


def recorded(case, inputs, cuts, options=WHOLE, policy=None):
    context = avlprof.apply(case.model, policy) if policy else None
    with torch.no_grad():
        if context is None:
            with record(case.model, options) as recorder:
                passes(case, inputs, cuts, DynamicCache(config=case.model.config.get_text_config()))
        else:
            with context as runtime, record(case.model, options) as recorder:
                passes(case, inputs, cuts, runtime.new_cache())
    return recorder.records


def agree(ours, theirs):
    for one, two in zip(ours, theirs, strict=True):
        assert one.modality.tolist() == two.modality.tolist()
        a, b = (pd.DataFrame(found.frame()) for found in (one, two))
        distances = [np.stack(frame.pop("distance")) for frame in (a, b)]
        np.testing.assert_allclose(*distances, atol=1e-5)
        pd.testing.assert_frame_equal(a, b, rtol=0, atol=2e-5)
        scores, wanted = one.scores(), two.scores()
        assert scores.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_allclose(scores[name], values, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_a_prompt_in_parts_is_recorded_as_a_whole(name):
    """Padded rows, one of them with nothing but padding in the first part."""
    case = CASES[name]()
    inputs = case.inputs(2, seed=3, pad=True, text=15)
    length = inputs["input_ids"].shape[1]
    behind = int((inputs["input_ids"] == case.vision_token_ids[0]).nonzero()[:, 1].max()) + 1
    whole = recorded(case, inputs, [])
    assert length - behind > 4
    for cuts in ([behind], [behind + 2, behind + 4], [2, behind + 1] if name == "llava" else [length - 2]):
        agree(recorded(case, inputs, cuts), whole)


def test_parts_of_some_rows_are_measured_as_they_come():
    """Vision rows are spaced within each part; whatever is of text rows is as in one pass."""
    case = random_llava()
    inputs = case.inputs(1, seed=3, text=15, images_per_row=1)
    behind = int((inputs["input_ids"] == case.vision_token_ids[0]).nonzero()[:, 1].max()) + 1
    options = RecordOptions(vision_rows=4, lags=LAGS)
    ours, theirs = (recorded(case, inputs, cuts, options)[0] for cuts in ([behind + 2], []))
    frames = [pd.DataFrame(found.frame()).set_index(["layer", "query"]) for found in (ours, theirs)]
    for query in ("system", "text", "last", "vision", "generated"):
        a, b = (frame.xs(query, level="query") for frame in frames)
        assert list(a["rows"]) == list(b["rows"])
        for column in ("mass_vision", "mass_text", "entropy"):
            np.testing.assert_allclose(a[column], b[column], atol=1e-5)


def conversation(case, seed=5):
    """A picture and words, three tokens of an answer, a further turn with a picture of its own, two more."""
    first, second = (case.inputs(1, seed=seed + i, text=9 + i) for i in range(2))
    generator = torch.Generator().manual_seed(seed)
    answers = [torch.randint(4, 90, (1, count), generator=generator) for count in (3, 2)]
    return [first, second], answers


def converse(case, turns, answers, cache):
    for turn, answer in zip(turns, answers, strict=True):
        case.model(
            input_ids=turn["input_ids"], pixel_values=turn["pixel_values"], **with_cache(case.model, cache)
        )
        for token in answer.T:
            case.model(input_ids=token[:, None], **with_cache(case.model, cache))


def seen_whole(case, turns, answers):
    """Eager weights of the conversation in one forward pass."""
    ids = torch.cat(
        [part for pair in zip([t["input_ids"] for t in turns], answers, strict=True) for part in pair], 1
    )
    pixels = torch.cat([turn["pixel_values"] for turn in turns])
    model = case.model
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            out = model(input_ids=ids, pixel_values=pixels, output_attentions=True)
    finally:
        model.set_attn_implementation({"text_config": before})
    codes = plain.codes(ids[0].tolist(), case.vision_token_ids)
    at = turns[0]["input_ids"].shape[1]
    spans = [(at, at + answers[0].shape[1])]
    spans.append((spans[0][1] + turns[1]["input_ids"].shape[1], len(codes)))
    for start, stop in spans:
        codes[start:stop] = [GENERATED] * (stop - start)
    return plain.Seen(codes, spans[1][0], [weights[0].numpy() for weights in out.attentions]), spans


@pytest.mark.parametrize("name", ["llava", "sinks"])
def test_a_further_turn_with_a_picture_equals_eager_weights(name):
    case = CASES[name]()
    turns, answers = conversation(case)
    seen, spans = seen_whole(case, turns, answers)
    with record(case.model, WHOLE) as recorder, torch.no_grad():
        cache = DynamicCache(config=case.model.config.get_text_config())
        converse(case, turns, answers, cache)
    (found,) = recorder.records
    table = {(r["layer"], r["query"], r["head"]): r for r in found.frame()}
    generated = [i for i, code in enumerate(seen.codes) if code == GENERATED]
    kinds = {
        "system": [i for i, code in enumerate(seen.codes) if code == 0],
        "vision": [i for i, code in enumerate(seen.codes) if code == VISION],
        "text": [i for i, code in enumerate(seen.codes) if code == TEXT],
        "last": [spans[1][0] - 1],
        "generated": generated,
    }
    vision = kinds["vision"]
    assert [int(code) for code in found.modality] == [code for code in seen.codes if code != GENERATED]
    scores = found.scores()
    for layer, weights in enumerate(seen.weights):
        for query, rows in kinds.items():
            for head in range(len(weights)):
                got = table[layer, query, head]
                assert got["rows"] == len(rows)
                expected = [plain.row_statistics(weights[head, at], at, seen, WHOLE) for at in rows]
                for column in expected[0][0]:
                    want = np.mean([values[column] for values, _ in expected])
                    assert got[column] == pytest.approx(want, abs=1e-5), (layer, query, head, column)
                want = np.mean([distance for _, distance in expected], axis=0)
                np.testing.assert_allclose(got["distance"], want, atol=1e-5)
                looking = [weights[head, at, vision] for at in rows if weights[head, at, vision].sum() > 0]
                for level in LEVELS if looking else ():
                    bounds = [plain.coverage_range(row.tolist(), level) for row in looking]
                    low, high = np.mean(bounds, axis=0)
                    assert low - 1e-9 <= got[f"coverage_{level}"] <= high + 1e-9
        mean = weights.mean(axis=0)[:, vision]
        np.testing.assert_allclose(scores["last"][layer], mean[spans[1][0] - 1], atol=1e-5)
        np.testing.assert_allclose(scores["instruction"][layer], mean[kinds["text"]].mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(scores["decode"][:, layer], mean[generated], atol=1e-5)
        np.testing.assert_allclose(scores["text"][:, layer], mean[kinds["text"]], atol=1e-5)
        prompts = [i for i in range(len(seen.codes)) if i not in generated]
        np.testing.assert_allclose(scores["all"][layer], mean[prompts].sum(axis=0), atol=1e-5)


def test_overlaps_compare_steps_that_see_the_same_pictures():
    """Two sets of the first answer's three steps at a lag of 1, one of the second's two."""
    case = random_llava()
    turns, answers = conversation(case)
    with record(case.model, RecordOptions(lags=(1, 2))) as recorder, torch.no_grad():
        converse(case, turns, answers, DynamicCache(config=case.model.config.get_text_config()))
    steps = recorder.records[0]._steps
    recorder.records[0].frame()
    assert [layer.sums.pairs for layer in steps] == [[3, 1]] * 3


def test_a_picture_may_come_with_the_second_turn():
    case = random_llava()
    turns, answers = conversation(case)
    words = case.inputs(1, seed=9, images_per_row=0)["input_ids"]
    with record(case.model) as recorder, torch.no_grad():
        cache = DynamicCache(config=case.model.config.get_text_config())
        case.model(input_ids=words, **with_cache(case.model, cache))
        for token in answers[0].T:
            case.model(input_ids=token[:, None], **with_cache(case.model, cache))
        converse(case, turns[1:], answers[1:], cache)
    scores = recorder.records[0].scores()
    count = int((turns[1]["input_ids"] == case.vision_token_ids[0]).sum())
    assert scores["decode"].shape == (5, 3, count)
    assert not scores["decode"][:3].any() and (scores["decode"][3:].sum(axis=-1) > 0).all()


KEPT = {
    "all, packed": Policy(text=TextPolicy(window=500)),
    "all, dense layers": Policy(vision_keep=1.0),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_policy_that_keeps_all_is_recorded_as_dense(name):
    case = random_llava()
    turns, answers = conversation(case)
    found = []
    for policy in (None, KEPT[name]):
        with torch.no_grad():
            if policy is None:
                with record(case.model, WHOLE) as recorder:
                    converse(case, turns, answers, DynamicCache(config=case.model.config.get_text_config()))
            else:
                with avlprof.apply(case.model, policy) as runtime, record(case.model, WHOLE) as recorder:
                    converse(case, turns, answers, runtime.new_cache())
        found.append(recorder.records)
    agree(*found)


@pytest.mark.parametrize("heads", ["shared", "kv_head", "adaptive"])
def test_under_a_policy_a_further_turn_is_what_the_policy_attends_to(monkeypatch, heads):
    """Against the oracle of the policy, row by row."""
    monkeypatch.setattr(oracle, "Scan", plain.Watched)
    monkeypatch.setattr(plain.Watched, "rows", {})
    case = random_llava()
    turns, answers = conversation(case, seed=7)
    policy = Policy(vision_keep=(0.6, 0.3, 1.0), heads=heads)
    if heads != "adaptive":
        policy = policy.model_copy(update={"vision_compute": (0.3, 0.2, 1.0), "refresh_interval": 2})
    with avlprof.apply(case.model, policy) as runtime, record(case.model, WHOLE) as recorder, torch.no_grad():
        converse(case, turns, answers, runtime.new_cache())
    pairs = [(turn, answer[0].tolist()) for turn, answer in zip(turns, answers, strict=True)]
    _, trace = oracle.Oracle(case.model, policy, case.vision_token_ids).converse(pairs)
    assert trace.gap > 1e-5, "near-ties decide the sets; choose another seed"
    scores = recorder.records[0].scores()
    ids = torch.cat([turns[0]["input_ids"], answers[0], turns[1]["input_ids"], answers[1]], dim=1)[0]
    vision = torch.isin(ids, torch.tensor(case.vision_token_ids)).nonzero()[:, 0].tolist()
    end = len(ids) - answers[1].shape[1]
    start = end - turns[1]["input_ids"].shape[1]
    for layer, rows in plain.Watched.rows.items():
        np.testing.assert_allclose(scores["last_heads"][layer], rows[end - 1][:, vision], atol=1e-5)
        steps = [*range(start - answers[0].shape[1], start), *range(end, len(ids))]
        for step, t in enumerate(steps):
            np.testing.assert_allclose(scores["decode_heads"][step, layer], rows[t][:, vision], atol=1e-5)
        turn = torch.stack([rows[t] for t in range(start, end)]).sum(dim=0)[:, vision]
        own = [i for i, position in enumerate(vision) if position >= start]  # which the first turn never saw
        np.testing.assert_allclose(scores["all_heads"][layer][:, own], turn[:, own], atol=1e-5)
    assert len(plain.Watched.rows) == 3


def test_generate_in_chunks_is_recorded_as_a_whole():
    case = random_llava()
    inputs = case.inputs(2, seed=4, text=19, images_per_row=0, pad=True)
    found = []
    for options in ({}, {"prefill_chunk_size": 6}):
        with record(case.model, WHOLE) as recorder:
            generate_words(case, inputs, 4, **options)
        found.append(recorder.records)
    agree(*found)
