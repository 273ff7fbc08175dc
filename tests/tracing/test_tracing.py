"""The recorder against eager attention weights, summed in plain loops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
)

import avlprof
from avlprof.analysis.tables import head_mean
from avlprof.attention.modality import MODALITIES
from avlprof.attention.session import cache_of, with_cache
from avlprof.errors import UserError
from avlprof.policy import Policy, TextPolicy
from avlprof.testing.models import BOS, IMAGE, PAD, TinyCase, cases, random_llava
from avlprof.tracing import Recorder, RecordOptions, prompt, record, statistics
from tests import oracle
from tests.eager_rows import (
    EDGES,
    GENERATED,
    LAGS,
    LEVELS,
    MASSES,
    TEXT,
    VISION,
    Seen,
    Watched,
    codes,
    coverage_range,
    row_statistics,
)
from tests.helpers import Largest, few, generate_words, one_row

MODELS = dict(cases())
STEPS = 20
FEW = RecordOptions(
    vision_rows=6,
    coverage_rows=4,
    top_share=0.2,
    text_sink=2,
    coverages=LEVELS,
    distances=EDGES,
    lags=LAGS,
    block=2000,
    step_logits=1500,
    per_head=True,
    history=0.6,
    text_rows=True,
)
ALL = RecordOptions(
    rows="all",
    coverage_rows=9,
    top_share=0.3,
    text_sink=0,
    coverages=LEVELS,
    distances=EDGES,
    lags=LAGS,
    block=700,
    per_head=True,
)


@pytest.fixture(scope="module", params=few(MODELS, ("llava-4q2kv-sinks",)))
def case(request):
    return MODELS[request.param]()


def rearranged(inputs, order):
    """The one row of `inputs` with its words and image tokens in another order.

    `order` is a string of `w` (the next word) and `i` (all tokens of the next image).
    """
    ids = inputs["input_ids"][0].tolist()
    words = [i for i in ids if i != IMAGE]
    image = [IMAGE] * (ids.count(IMAGE) // order.count("i"))
    row = []
    for mark in order:
        row += image if mark == "i" else [words.pop(0)]
    out = dict(
        inputs, input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=torch.long)
    )
    if "mm_token_type_ids" in out:
        out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).long()
    return out


# --- the reference: eager weights, plain loops


def eager(case, inputs, steps=STEPS):
    """Tokens and weights of eager attention; its logits must be those of the model as loaded."""
    stock = generate_words(case, inputs, steps)
    before = case.model.config.text_config._attn_implementation
    case.model.set_attn_implementation({"text_config": "eager"})
    try:
        out = generate_words(case, inputs, steps, output_attentions=True)
    finally:
        case.model.set_attn_implementation({"text_config": before})
    assert torch.equal(out.sequences, stock.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(stock.logits), atol=1e-4, rtol=1e-4)
    return out


def seen_by_eager(case, inputs, steps=STEPS):
    out = eager(case, inputs, steps)
    ids = inputs["input_ids"][0].tolist()
    total = len(ids) + steps - 1
    weights = []
    for layer in range(len(out.attentions[0])):
        full = np.zeros((out.attentions[0][layer].shape[1], total, total))
        at = 0
        for step in out.attentions:
            rows = step[layer][0].numpy()
            full[:, at : at + rows.shape[1], : rows.shape[2]] = rows
            at += rows.shape[1]
        weights.append(full)
    return Seen(codes(ids, case.vision_token_ids) + [GENERATED] * (steps - 1), len(ids), weights)


def evenly(items, count):
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def query_rows(seen, options):
    """Positions of the query rows of each (phase, query)."""
    prompt = range(seen.prompt)
    kinds = {
        ("prefill", name): [i for i in prompt if seen.codes[i] == c] for c, name in enumerate(MODALITIES[:3])
    }
    if options.rows == "default":
        kinds["prefill", "vision"] = evenly(kinds["prefill", "vision"], options.vision_rows)
    kinds["prefill", "last"] = [seen.prompt - 1]
    kinds["decode", "generated"] = list(range(seen.prompt, len(seen.codes)))
    return {key: rows for key, rows in kinds.items() if rows}


def top_set(vision, share):
    """The best `share` of a row, and the gap in score to the first left out."""
    count = max(int(share * len(vision) + 1e-6), 1)
    order = sorted(range(len(vision)), key=lambda i: (-vision[i], i))
    return set(order[:count]), vision[order[count - 1]] - vision[order[count]]


def check(recorded, seen, options):
    """Every statistic and score of a record against the plain loops."""
    table = {(r["layer"], r["phase"], r["query"], r["head"]): r for r in recorded.frame()}
    kinds = query_rows(seen, options)
    vision = [i for i, code in enumerate(seen.codes) if code == VISION]
    heads = seen.weights[0].shape[0]
    assert len(table) == len(kinds) * heads * len(seen.weights)
    clear = 0
    for layer, weights in enumerate(seen.weights):
        for (phase, query), rows in kinds.items():
            for head in range(heads):
                got = table[layer, phase, query, head]
                found = [row_statistics(weights[head, at], at, seen, options) for at in rows]
                assert got["rows"] == len(rows)
                for name in found[0][0]:
                    want = sum(values[name] for values, _ in found) / len(found)
                    assert abs(got[name] - want) < 1e-5, (layer, phase, query, head, name)
                np.testing.assert_allclose(got["distance"], np.mean([d for _, d in found], axis=0), atol=1e-5)
                assert sum(got[f"mass_{name}"] for name in MASSES) == pytest.approx(1, abs=1e-5)
                of_text = got["mass_text"] + got["mass_generated"]
                assert got["text_sink"] + sum(got["distance"]) == pytest.approx(of_text, abs=1e-5)
                if not vision:
                    assert all(np.isnan(got[f"coverage_{level}"]) for level in LEVELS)
                    continue
                sorted_rows = rows if phase == "decode" else evenly(rows, options.coverage_rows)
                seeing = [
                    weights[head, at, vision] for at in sorted_rows if weights[head, at, vision].sum() > 0
                ]
                for level in LEVELS:
                    name = f"coverage_{level}"
                    if not seeing:
                        assert np.isnan(got[name])
                        continue
                    low, high = np.mean([coverage_range(row.tolist(), level) for row in seeing], axis=0)
                    assert low - 1e-9 <= got[name] <= high + 1e-9, (layer, phase, query, head, name)
                if phase == "prefill":
                    assert all(np.isnan(got[f"overlap_{lag}"]) for lag in LAGS)
                    continue
                tops = [top_set(weights[head, at, vision].tolist(), options.top_share) for at in rows]
                if min(gap for _, gap in tops) < 1e-6:
                    continue
                clear += 1
                for lag in LAGS:
                    pairs = [(tops[i][0], tops[i - lag][0]) for i in range(lag, len(tops))]
                    want = sum(len(a & b) / len(a) for a, b in pairs) / len(pairs) if pairs else np.nan
                    assert got[f"overlap_{lag}"] == pytest.approx(want, abs=1e-6, nan_ok=True)
    if vision:
        assert clear > heads * len(seen.weights) / 2, "near-ties hid most of the overlaps"
    check_scores(recorded.scores(), seen, vision, options)


def history(weights, seen, kept):
    """A-VL's score of each text token, one head's weights `[N, N]`, row by row."""
    text = [i for i, code in enumerate(seen.codes) if code in (TEXT, GENERATED)]
    score = {}
    for t in text:
        older = [j for j in text if j < t]
        over = older if t < seen.prompt else [*older, t]
        below = np.quantile(weights[t, over], 1 - kept) if over else 0.0
        for j in older:
            score[j] += weights[t, j] - below
        score[t] = weights[t, t]
    return [score[j] for j in text]


def check_scores(scores, seen, vision, options):
    text = [i for i in range(seen.prompt) if seen.codes[i] == TEXT]
    for layer, weights in enumerate(seen.weights):
        mean = weights.mean(axis=0)[:, vision]
        np.testing.assert_allclose(scores["last"][layer], mean[seen.prompt - 1], atol=1e-5)
        want = mean[text].mean(axis=0) if text else np.zeros(len(vision))
        np.testing.assert_allclose(scores["instruction"][layer], want, atol=1e-5)
        if vision:
            np.testing.assert_allclose(scores["decode"][:, layer], mean[seen.prompt :], atol=1e-5)
        if options.rows == "all":
            np.testing.assert_allclose(scores["all"][layer], mean[: seen.prompt].sum(axis=0), atol=1e-5)
        if options.history is not None:
            want = np.mean([history(head, seen, options.history) for head in weights], axis=0)
            np.testing.assert_allclose(scores["history"][layer], want, atol=1e-5)
        if options.text_rows:
            np.testing.assert_allclose(scores["text"][:, layer], mean[text], atol=1e-5)
    assert ("all" in scores) == (options.rows == "all")
    assert ("text" in scores) == options.text_rows
    assert ("history" in scores) == (options.history is not None)
    assert scores["decode"].shape[1:] == scores["last"].shape == scores["instruction"].shape
    assert all(array.dtype == np.float32 for array in scores.values())
    check_head_scores(scores, seen, vision, text, options)


def check_head_scores(scores, seen, vision, text, options):
    """The scores of each query head, one at a time; no head's but with `per_head`."""
    means = [name for name in scores if not name.endswith("_heads")]
    if not options.per_head:
        assert len(means) == len(scores)
        return
    assert set(scores) == {*means, *(f"{name}_heads" for name in means)}
    heads, prompt = seen.weights[0].shape[0], seen.prompt
    for name in means:
        shape = scores[name].shape
        assert scores[f"{name}_heads"].shape == (*shape[:-1], heads, shape[-1]), name
    for layer, weights in enumerate(seen.weights):
        for head in range(heads):
            rows = weights[head][:, vision]
            want = {"last": rows[prompt - 1]}
            want["instruction"] = sum(rows[t] for t in text) / len(text) if text else np.zeros(len(vision))
            if options.rows == "all":
                want["all"] = sum(rows[:prompt])
            if options.history is not None:
                want["history"] = history(weights[head], seen, options.history)
            for name, values in want.items():
                found = scores[f"{name}_heads"][layer, head]
                np.testing.assert_allclose(found, values, atol=1e-5, err_msg=f"{name} {layer} {head}")
            for step, found in enumerate(scores["decode_heads"][:, layer, head]):
                np.testing.assert_allclose(found, rows[prompt + step], atol=1e-5)
            if options.text_rows:
                np.testing.assert_allclose(scores["text_heads"][:, layer, head], rows[text], atol=1e-5)
    if vision:
        assert len(scores["decode_heads"]) == len(seen.codes) - prompt


# --- the tests


@pytest.mark.parametrize("options", [FEW, ALL], ids=["default rows", "all rows"])
@pytest.mark.parametrize("images", few([0, 1, 2], [1]))
def test_equals_eager_weights(case, images, options):
    inputs = case.inputs(1, seed=4 + images, text=11, images_per_row=images)
    seen = seen_by_eager(case, inputs)
    with record(case.model, options) as recorder:
        generate_words(case, inputs, STEPS)
    (found,) = recorder.records
    assert found.steps == STEPS - 1
    check(found, seen, options)


@pytest.mark.parametrize(
    "order",
    few(["iwwwww", "wwwwwi", "wwiwww", "wiwwiw"], ["wiwwiw"]),
    ids=["first", "last", "middle", "apart"],
)
def test_pictures_anywhere_in_the_text(case, order):
    inputs = rearranged(case.inputs(1, seed=8, text=11, images_per_row=order.count("i")), order)
    seen = seen_by_eager(case, inputs, 6)
    with record(case.model, FEW) as recorder:
        generate_words(case, inputs, 6)
    check(recorder.records[0], seen, FEW)


@pytest.mark.full  # each row once more, in eager attention
def test_rows_of_a_padded_batch_are_the_rows_alone(case):
    counts = [1, 0, 2, 1]
    batch = case.inputs(4, seed=6, pad=True, text=13, images_per_row=counts)
    with record(case.model, FEW) as together:
        sequences = generate_words(case, batch, STEPS).sequences
    width = batch["input_ids"].shape[1]
    assert len(together.records) == 4
    for row, found in enumerate(together.records):
        single = one_row(case, batch, row, counts)
        seen = seen_by_eager(case, single)
        with record(case.model, FEW) as alone:
            answer = generate_words(case, single, STEPS).sequences[0, single["input_ids"].shape[1] :]
        assert torch.equal(answer, sequences[row, width:])
        check(found, seen, FEW)
        ours, theirs = (pd.DataFrame(r.frame()).drop(columns="distance") for r in (found, alone.records[0]))
        pd.testing.assert_frame_equal(ours, theirs, rtol=0, atol=1e-5)
        for name, scores in alone.records[0].scores().items():
            np.testing.assert_allclose(found.scores()[name], scores, atol=1e-5, err_msg=name)


def test_by_default_heads_are_averaged(case):
    """One row a layer and kind: what the analysis makes of the rows of all heads; and no head's scores."""
    inputs = case.inputs(1, seed=5, text=11)
    frames, scores = [], []
    for per_head in (True, False):
        with record(case.model, replace(FEW, rows="all", per_head=per_head)) as recorder:
            generate_words(case, inputs, 6)
        frames.append(pd.DataFrame(recorder.records[0].frame()).assign(sample="s"))
        scores.append(recorder.records[0].scores())
    assert set(scores[1]) == {"last", "instruction", "decode", "all", "history", "text"}
    for name, means in scores[1].items():
        np.testing.assert_allclose(scores[0][name], means, atol=1e-6)
    heads, mean = frames
    assert set(heads["head"]) == set(range(case.model.config.text_config.num_attention_heads))
    assert set(mean["head"]) == {-1}
    keys = ["layer", "phase", "query"]
    assert not mean.duplicated(keys).any()
    ours, theirs = (head_mean(frame).sort_values(keys, ignore_index=True) for frame in (mean, heads))
    pd.testing.assert_frame_equal(ours, theirs, check_like=True, rtol=0, atol=1e-7)


def sliding_case():
    """Layers whose cache forgets old keys: a Mistral under LLaVA, window far below the prompt."""
    text = MistralConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=13,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=20,
        patch_size=4,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=25)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layers" in name and weight.ndim == 2:
                weight.mul_(8)
    return TinyCase("sliding", model, (IMAGE,), random_llava(grid=5).pixels)


def test_padding_is_read_off_a_static_cache_of_windows():
    """Its mask's last row sees the newest tokens alone; the others are no padding."""
    sliding = sliding_case()
    inputs = sliding.inputs(2, seed=1, pad=True, text=9)
    frames = []
    for kind in (None, "static"):
        with record(sliding.model) as recorder:
            generate_words(sliding, inputs, steps=3, cache_implementation=kind)
        frames += [[pd.DataFrame(one.frame()) for one in recorder.records]]
    for one, other in zip(*frames, strict=True):
        pd.testing.assert_frame_equal(one, other, atol=1e-5)


def test_sliding_windows():
    sliding = sliding_case()
    inputs = sliding.inputs(2, seed=1, pad=True, text=9)
    stock = generate_words(sliding, inputs, STEPS)
    with record(sliding.model, FEW) as recorder:
        traced = generate_words(sliding, inputs, STEPS)
    assert torch.equal(torch.stack(stock.logits), torch.stack(traced.logits))
    for row, found in enumerate(recorder.records):
        single = one_row(sliding, inputs, row, [1, 1])
        out = eager(sliding, single)
        prompt = single["input_ids"].shape[1]
        vision_at = [i for i, t in enumerate(single["input_ids"][0].tolist()) if t == IMAGE]
        for step, layers in enumerate(out.attentions[1:]):
            for layer, weights in enumerate(layers):
                full = np.zeros(prompt + step + 1)
                rows = weights[0, :, 0].mean(dim=0).numpy()
                full[len(full) - min(len(rows), len(full)) :] = rows[-len(full) :]
                np.testing.assert_allclose(found.scores()["decode"][step, layer], full[vision_at], atol=1e-5)
                for head, row in enumerate(weights[0, :, 0].numpy()):
                    full = np.zeros(prompt + step + 1)
                    full[len(full) - min(len(row), len(full)) :] = row[-len(full) :]
                    of_head = found.scores()["decode_heads"][step, layer, head]
                    np.testing.assert_allclose(of_head, full[vision_at], atol=1e-5)
        for layer, weights in enumerate(out.attentions[0]):
            for head, row in enumerate(weights[0, :, -1].numpy()):
                of_head = found.scores()["last_heads"][layer, head]
                np.testing.assert_allclose(of_head, row[vision_at], atol=1e-5)
        masses = pd.DataFrame(found.frame())[[f"mass_{name}" for name in MODALITIES]]
        np.testing.assert_allclose(masses.sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], 1))
def test_the_traced_forward_is_the_real_one(case, dtype):
    counts = [1, 2, 0]
    inputs = case.inputs(3, seed=9, pad=True, images_per_row=counts)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    model = case.model.to(dtype)
    try:
        stock = generate_words(case, inputs, STEPS)
        with record(model):
            traced = generate_words(case, inputs, STEPS)
    finally:
        model.to(torch.float32)
    assert torch.equal(stock.sequences, traced.sequences)
    assert torch.equal(torch.stack(stock.logits), torch.stack(traced.logits))


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_is_restored(error, before):
    case = random_llava()
    inputs = case.inputs(1)
    case.model.set_attn_implementation({"text_config": before})
    stock = case.model(**inputs).logits
    vision_before = case.model.config.vision_config._attn_implementation
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.modules()]
    attributes = [set(vars(module)) for module in case.model.modules()]

    def interrupt(*args):
        raise error

    handle = case.model.get_decoder().layers[1].mlp.register_forward_hook(interrupt) if error else None
    if error is None:
        with record(case.model):
            case.model(**inputs)
    else:
        with pytest.raises(error), record(case.model):
            case.model(**inputs)
        handle.remove()
    assert case.model.config.text_config._attn_implementation == before
    assert case.model.config.vision_config._attn_implementation == vision_before
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in case.model.modules()]
    assert attributes == [set(vars(module)) for module in case.model.modules()]
    assert torch.equal(case.model(**inputs).logits, stock)


@pytest.mark.parametrize("heads", few(["shared", "kv_head"], ["kv_head"]))
@pytest.mark.parametrize("outer", few(["policy", "recorder"], 1))
@pytest.mark.parametrize("bits", few([16, (3, 8, 2)], [(3, 8, 2)]))
def test_under_a_policy_it_records_what_the_policy_attends_to(monkeypatch, case, outer, heads, bits):
    monkeypatch.setattr(oracle, "Scan", Watched)
    policy = Policy(
        vision_keep=(0.7, 0.5, 1.0),
        vision_compute=(0.3, 0.2, 1.0),
        refresh_interval=3,
        text=TextPolicy(window=(6, 100, 100), sink=1),
        heads=heads,
        vision_bits=bits,
    )
    contexts = [lambda: avlprof.apply(case.model, policy), lambda: record(case.model, FEW)]
    if outer == "recorder":
        contexts.reverse()
    for seed in range(12, 24):
        monkeypatch.setattr(Watched, "rows", {})
        inputs = case.inputs(1, seed=seed, text=13)
        with contexts[0]() as first, contexts[1]() as second:
            ids = generate_words(case, inputs, STEPS).sequences[0].tolist()
        recorder = second if outer == "policy" else first
        prompt = inputs["input_ids"].shape[1]
        _, trace = oracle.Oracle(case.model, policy, case.vision_token_ids).run(inputs, ids[prompt:-1])
        if trace.gap > 1e-5:
            break
    assert trace.gap > 1e-5, "near-ties decide the sets of every seed"
    modality = codes(ids[:prompt], case.vision_token_ids) + [GENERATED] * (len(ids) - 1 - prompt)
    frame = pd.DataFrame(recorder.records[0].frame())
    frame = frame[frame["phase"] == "decode"].set_index(["layer", "head"])
    scores = recorder.records[0].scores()["decode"]
    of_heads = recorder.records[0].scores()["decode_heads"]
    vision = [i for i, code in enumerate(modality) if code == VISION]
    assert len(Watched.rows) == 3
    for layer, steps in Watched.rows.items():
        rows = torch.stack([steps[t] for t in sorted(steps)], dim=1)
        np.testing.assert_allclose(scores[:, layer], rows.mean(dim=0)[:, vision], atol=1e-5)
        np.testing.assert_allclose(of_heads[:, layer].swapaxes(0, 1), rows[:, :, vision], atol=1e-5)
        for head, weights in enumerate(rows.mean(dim=1).tolist()):
            for code, name in enumerate(MODALITIES):
                want = sum(w for w, c in zip(weights, modality, strict=True) if c == code)
                assert frame.loc[(layer, head), f"mass_{name}"] == pytest.approx(want, abs=1e-5)
        evicted = sorted(set(vision) - set().union(*trace.kept[layer]))
        assert len(evicted) or oracle.per_layer(policy.vision_keep, layer) == 1 or heads == "kv_head"
        assert not scores[:, layer][:, [vision.index(i) for i in evicted]].any()
        size = rows.shape[0] // len(trace.kept[layer])
        for head in range(rows.shape[0]):
            gone = sorted(set(vision) - trace.kept[layer][head // size])
            assert not of_heads[:, layer, head][:, [vision.index(i) for i in gone]].any(), (
                "evicted for this head"
            )


@pytest.mark.slow  # a trace for each size of a block
@pytest.mark.parametrize("per_head", [False, True])
def test_blocks_and_holding_back_change_nothing(case, per_head):
    inputs = case.inputs(2, seed=3, pad=True, text=13, images_per_row=2)
    found = []
    for block, most in ((1, 0), (700, 3000), (100_000, 1 << 20)):
        options = RecordOptions(
            rows="all", block=block, step_logits=most, lags=LAGS, history=0.4, per_head=per_head
        )
        with record(case.model, options) as recorder:
            generate_words(case, inputs, 36)
        frames = [pd.DataFrame(r.frame()) for r in recorder.records]
        found.append((frames, [r.scores() for r in recorder.records]))
    for frames, scores in found[1:]:
        for ours, theirs in zip(frames, found[0][0], strict=True):
            distances = [np.stack(frame.pop("distance")) for frame in (ours, theirs.copy())]
            np.testing.assert_allclose(*distances, atol=1e-6)
            near = 1e-5 if per_head else 1e-6  # the mean of the heads' rounding is smaller than theirs
            pd.testing.assert_frame_equal(ours, theirs.drop(columns="distance"), rtol=0, atol=near)
        for ours, theirs in zip(scores, found[0][1], strict=True):
            for name in ours:
                np.testing.assert_allclose(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def test_looking_in_while_generating_changes_nothing(case):
    """Reading a record between two steps settles it early and no more."""
    inputs = case.inputs(1, seed=3)

    class Reader:
        def __call__(self, ids, scores, **kwargs):
            peeked.records[0].frame()
            return torch.zeros(len(ids), dtype=torch.bool)

    with record(case.model, FEW) as quiet:
        generate_words(case, inputs, STEPS)
    with record(case.model, FEW) as peeked:
        generate_words(case, inputs, STEPS, stopping_criteria=[Reader()])
    ours, theirs = (pd.DataFrame(r.records[0].frame()).drop(columns="distance") for r in (peeked, quiet))
    pd.testing.assert_frame_equal(ours, theirs, rtol=0, atol=1e-6)


def test_prompts_follow_one_another(case):
    """One context, two prompts and a second turn of the last: a record each, in order."""
    first, second = case.inputs(1, seed=1), case.inputs(2, seed=2, pad=True)
    with record(case.model, FEW) as recorder:
        generate_words(case, first, 5)
        cache = cache_of(generate_words(case, second, 5))
        length = cache.get_seq_length()
        for new in (3, 1):
            length += new
            mask = torch.cat(
                [second["attention_mask"], torch.ones(2, length - second["attention_mask"].shape[1])], 1
            )
            ids = torch.full((2, new), 7)
            place = torch.arange(length - new, length).expand(2, -1)
            case.model(
                input_ids=ids,
                attention_mask=mask.long(),
                **with_cache(case.model, cache),
                position_ids=place,
            )
    assert [r.steps for r in recorder.records] == [4, 6, 6]
    decoded = [pd.DataFrame(r.frame()).query("phase == 'decode'") for r in recorder.records]
    assert [set(frame["rows"]) for frame in decoded] == [{4}, {5}, {5}], (
        "turns of several tokens are not rows"
    )
    for frame in decoded:
        np.testing.assert_allclose(frame[[f"mass_{name}" for name in MASSES]].sum(axis=1), 1, atol=1e-5)
    assert (decoded[1]["mass_text"] > 0).all()


@pytest.mark.parametrize("rows", few(["default", "all"], 1))
@pytest.mark.parametrize("per_head", few([False, True], 1))
def test_memory_stays_linear(monkeypatch, rows, per_head):
    """No tensor that the recorder makes comes near N x N, whatever the rows and the padding."""
    case = random_llava(grid=12)
    inputs = case.inputs(2, pad=True, text=12, images_per_row=3)
    tokens, heads = inputs["input_ids"].shape[1], 4
    options = RecordOptions(
        rows=rows, block=tokens * heads * 8, step_logits=4096, lags=(1, 4), per_head=per_head, history=0.5
    )
    largest, blocks = Largest(), []

    def watched(method):
        def run(self, *args):
            with largest:
                return method(self, *args)

        return run

    real = prompt.row_values
    monkeypatch.setattr(Recorder, "attended", watched(Recorder.attended))
    monkeypatch.setattr(prompt, "row_values", lambda w, *args: blocks.append(w.numel()) or real(w, *args))
    with record(case.model, options) as recorder:
        generate_words(case, inputs, 24)
    assert recorder.records[0].frame()
    assert options.block / 2 < max(blocks) <= options.block
    linear = tokens * heads * 16  # a layer's queries
    assert largest.elements <= linear
    assert linear < tokens**2 / 4


def test_statistics_of_rows_that_can_be_worked_out():
    weights = torch.tensor([[[0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 0.0, 1.0]]])
    logits = weights.log().clamp(min=-1e30) + 7.0
    found = statistics.entropy(logits, weights)
    torch.testing.assert_close(found, torch.tensor([[1.5 * np.log(2.0), 0.0]]).float())
    ordered = statistics.descending(weights[..., :3])
    assert ordered.tolist() == [[[0.5, 0.25, 0.25], [0.0, 0.0, 0.0]]]
    found = statistics.coverage(ordered, torch.tensor([0.5, 0.51, 0.75, 0.76, 1.0], dtype=torch.float64))
    assert found[0, 0].tolist() == [1, 2, 2, 3, 3]
    assert found[0, 1].isnan().all(), "a row that gives vision nothing has no coverage"
    tied = torch.tensor([0.1, 0.3, 0.3, 0.3, 0.0])
    assert statistics.top_sets(tied, 0.4).tolist() == [False, True, True, False, False]
    assert statistics.top_sets(tied, 1.0).all()
    assert statistics.top_sets(tied, 0.01).sum() == 1
    sets = torch.tensor([[[True, True, False], [False, True, True], [True, True, False]]])
    assert statistics.set_overlaps(sets).tolist() == [[[1, 0.5, 1], [0.5, 1, 0.5], [1, 0.5, 1]]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rows", "al"),
        ("vision_rows", -1),
        ("coverage_rows", -1),
        ("top_share", 0.0),
        ("top_share", 1.1),
        ("text_sink", -1),
        ("coverages", (0,)),
        ("distances", (4, 2)),
        ("lags", (0,)),
        ("block", 0),
        ("history", 0.0),
        ("history", 1.5),
    ],
)
def test_bad_options_are_refused(field, value):
    with pytest.raises(UserError, match=field.removesuffix("s")):
        RecordOptions(**{field: value})
