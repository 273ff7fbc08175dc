"""Learned attention sinks in what is recorded, where eager weights alone do not tell."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
import transformers as hf

from avlprof.attention.session import switched
from avlprof.testing.models import random_llava
from avlprof.testing.types import tiny_inputs, tiny_model, vision_ids
from avlprof.tracing import RecordOptions, record, statistics
from tests.helpers import generate_words


def internvl_over_gpt_oss():
    """InternVL with a GPT-OSS language model, all sinks 4; a prompt with a picture."""
    torch.manual_seed(0)
    text = {
        "model_type": "gpt_oss",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "eos_token_id": None,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": [24, 24],
        "patch_size": [4, 4],
    }
    config = hf.InternVLConfig(text_config=text, vision_config=vision, image_token_id=100, image_seq_length=9)
    model = hf.InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1:
                value.normal_(std=1.2 * value[0].numel() ** -0.5)
            if name.endswith("sinks"):
                value.fill_(4.0)
    ids = torch.tensor([[1, 5, 7] + [100] * 9 + [8, 9, 10, 11]])
    pixels = torch.randn(1, 3, 24, 24)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def test_the_mass_on_vision_is_what_the_sinks_leave_of_it():
    model, inputs = internvl_over_gpt_oss()
    with record(model) as recorder:
        model(**inputs)
    last = pd.DataFrame(recorder.records[0].frame()).query("query == 'last'").set_index("layer")
    model.set_attn_implementation("eager")
    vision = inputs["input_ids"][0] == 100
    for layer, weights in enumerate(model(**inputs, output_attentions=True).attentions):
        row = weights[0, :, -1].mean(dim=0)
        assert last.mass_vision[layer] == pytest.approx(float(row[vision].sum()), abs=1e-5)
        assert last.mass_learned_sink[layer] == pytest.approx(1.0 - float(row.sum()), abs=1e-5)
        assert last.mass_learned_sink[layer] > 0.5


class Formula:
    """Attention of every row in double precision: its softmax times the share that the sink leaves.

    So does granite_swa's eager attention, whose reported weights are without the second factor.
    """

    def __init__(self):
        self.rows: dict[int, list[torch.Tensor]] = {}

    def begin(self, forward):
        """Nothing to prepare."""

    def attended(self, forward, call):
        size = call.query.shape[1] // call.key.shape[1]
        logits = call.query.double() @ call.key.double().repeat_interleave(size, dim=1).mT * call.scaling
        if call.mask is not None:
            logits = logits.masked_fill(~call.mask, -torch.inf)
        left = (logits.logsumexp(-1) - call.module.sinks.double().view(1, -1, 1)).sigmoid()
        self.rows.setdefault(call.layer, []).append(logits.softmax(-1) * left[..., None])


@torch.no_grad()
def test_granite_swa_is_recorded_behind_its_sinks():
    """Its sliding layers hand over the newest keys alone while decoding."""
    model = tiny_model("llava:granite_swa")
    for layer in model.get_decoder().layers:
        layer.self_attn.scaling = layer.self_attn.head_dim**-0.5  # the default of 1 leaves sinks nothing
    inputs, steps = tiny_inputs(model), 5
    vision = torch.isin(inputs["input_ids"][0], torch.tensor(vision_ids(model))).nonzero()[:, 0]
    formula, options = Formula(), {"max_new_tokens": steps, "suppress_tokens": vision_ids(model)}
    with switched(model, observers=(formula,)), record(model, RecordOptions(per_head=True)) as recorder:
        model.generate(**inputs, **options)
    scores = recorder.records[0].scores()
    frame = pd.DataFrame(recorder.records[0].frame()).query("query == 'generated'")
    for layer, rows in formula.rows.items():
        torch.testing.assert_close(
            torch.from_numpy(scores["last_heads"][layer]).double(),
            rows[0][0, :, -1, vision],
            atol=1e-5,
            rtol=1e-4,
        )
        drawn = 0.0
        for step, weights in enumerate(rows[1:]):
            width = inputs["input_ids"].shape[1] + step + 1
            row = torch.nn.functional.pad(weights[0, :, 0], (width - weights.shape[-1], 0))
            found = torch.from_numpy(scores["decode_heads"][step, layer]).double()
            torch.testing.assert_close(found, row[:, vision], atol=1e-5, rtol=1e-4)
            drawn = drawn + (1.0 - row.sum(-1)) / (steps - 1)
        recorded = torch.tensor(frame[frame.layer == layer].sort_values("head").mass_learned_sink.to_list())
        torch.testing.assert_close(recorded.double(), drawn, atol=1e-5, rtol=1e-4)
        assert (drawn > 0.01).all()


def test_a_sink_that_takes_all_leaves_nothing_and_no_nan():
    case = random_llava(2, sinks=True)
    with torch.no_grad():
        for name, value in case.model.named_parameters():
            if name.endswith("sinks"):
                value.fill_(500.0)
    with record(case.model) as recorder:
        generate_words(case, case.inputs(2, seed=1, pad=True), 5)
    for found in recorder.records:
        frame = pd.DataFrame(found.frame())
        assert (frame.mass_learned_sink == 1.0).all()
        assert (frame[["mass_vision", "mass_text", "entropy"]] == 0.0).all(axis=None)
        assert frame.coverage_90.isna().all()


def test_entropy_leaves_the_sink_out():
    """Weights 1/2 and 1/4 and a sink that has the last quarter."""
    weights = torch.tensor([0.5, 0.25, 0.0])
    logits = torch.tensor([2.0, 1.0, 0.0]) * torch.log(torch.tensor(2.0)) + 3.0
    logits[2] = -1e30
    found = statistics.entropy(logits, weights, weights.sum())
    torch.testing.assert_close(found, torch.tensor(0.5).log() * -0.5 - 0.25 * torch.tensor(0.25).log())


def test_models_without_sinks_have_none():
    case = random_llava()
    with record(case.model) as recorder:
        generate_words(case, case.inputs(2, seed=1, pad=True), 5)
    for found in recorder.records:
        assert (pd.DataFrame(found.frame()).mass_learned_sink == 0.0).all()
