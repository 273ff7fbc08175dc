"""Every verb answers greedily, whatever the checkpoint's generation config asks for."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from transformers import GenerationConfig

from avlprof.evaluation.answers import AnswerSettings, generate_answers
from avlprof.models import load_model
from avlprof.models.generation import Greedy, greedy, set_aside
from avlprof.policy import Policy
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import load_task
from avlprof.tracing import trace_samples
from avlprof.tracing.options import TraceSettings
from tests.helpers import few

LIMIT = 6
FIELDS = {
    "use_cache": [False],
    "return_dict_in_generate": [True],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "output_scores": [True],
    "output_logits": [True],
    "stop_strings": [["."], "a"],
    "num_return_sequences": [2],
    "do_sample": [True],
    "num_beams": [3],
    "num_beam_groups": [3],
    "diversity_penalty": [0.5],
    "prompt_lookup_num_tokens": [4],
    "num_assistant_tokens": [3],
    "assistant_early_exit": [1],
    "assistant_confidence_threshold": [0.9],
    "is_assistant": [True],
    "guidance_scale": [1.5],
    "prefill_chunk_size": [16],
    "cache_implementation": ["static", "offloaded", "quantized", "sliding_window", "paged"],
    "cache_config": [{"backend": "quanto", "nbits": 4}],
    "max_cache_len": [8],
    "repetition_penalty": [3.0, 0.2],
    "encoder_repetition_penalty": [2.0],
    "no_repeat_ngram_size": [1],
    "encoder_no_repeat_ngram_size": [2],
    "bad_words_ids": [[[5], [6, 7]]],
    "sequence_bias": [[[[5], -10.0]]],
    "exponential_decay_length_penalty": [[1, 2.0]],
    "forced_bos_token_id": [5],
    "forced_eos_token_id": [2],
    "min_length": [200],
    "max_length": [3, 4096],
    "min_new_tokens": [5],
    "max_new_tokens": [2],
    "max_time": [1e-9],
    "early_stopping": [True, "never"],
    "length_penalty": [2.0],
    "temperature": [0.0, 0.01],
    "top_k": [1],
    "top_p": [0.01],
    "min_p": [0.5],
    "typical_p": [0.5],
    "top_h": [0.5],
    "epsilon_cutoff": [0.1],
    "eta_cutoff": [0.1],
    "penalty_alpha": [0.6],
    "dola_layers": ["high"],
    "low_memory": [True],
    "constraints": [["x"]],
    "force_words_ids": [[[5]]],
    "watermarking_config": [{"bias": 5.0}],
    "token_healing": [True],
    "compile_config": [{"mode": "reduce-overhead"}],
    "remove_invalid_values": [True],
    "renormalize_logits": [True],
    "return_legacy_cache": [True],
    "custom_thing": ["x"],
    "use_mtp": [True],
    "continuous_batching_config": [{}],
}
CASES = [(name, value) for name, values in FIELDS.items() for value in values]


def mixtures(count, seed=0):
    """Several fields at once, at random."""
    draw = random.Random(seed)
    return [dict(draw.sample(CASES, draw.randint(2, 6))) for _ in range(count)]


def ask(model, fields):
    """Put fields into a model's generation config as a file would."""
    config = GenerationConfig(pad_token_id=3, bos_token_id=1, eos_token_id=2)
    for name, value in fields.items():
        setattr(config, name, value)
    model.generation_config = config


def verbs(loaded, samples, out):
    """What the verbs answer: traced, traced in a batch, evaluated dense and under a policy, forced."""
    task = load_task("shapes:describe")
    answers = {}
    for size in (1, 2):
        settings = TraceSettings(max_new_tokens=LIMIT, batch_size=size)
        run = trace_samples(loaded, task, samples, out / f"run-{size}", settings)
        table = run.samples().set_index("sample")
        answers[f"trace {size}"] = [table.answer[sample.id] for sample in samples]
        stats = run.stats()
        assert (stats[stats.phase == "decode"].groupby("sample").rows.max() == LIMIT - 1).all()
    for policy in (None, Policy(name="all")):
        made = generate_answers(loaded, samples, policy, AnswerSettings(LIMIT, 2))
        answers["policy" if policy else "stock"] = [answer.prediction for answer in made]
    forced = ForcedSet.prepare(loaded, samples, max_new_tokens=LIMIT)
    answers["forced"] = loaded.adapter.decode(forced.answers)
    assert all(score.agreement == 1.0 for score in forced.score(Policy(name="all")))
    return answers


@pytest.fixture(scope="module")
def changed():
    """A copy of the embedded model whose generation config is changed from test to test."""
    return load_model("tiny", device="cpu")


@pytest.fixture(scope="module")
def samples():
    return load_task("shapes:describe").samples("search", 2)


@pytest.fixture(scope="module")
def plain(changed, samples, tmp_path_factory):
    """What the verbs answer under a plain generation config."""
    ask(changed.model, {})
    return verbs(changed, samples, tmp_path_factory.mktemp("plain"))


def test_plain_answers_are_stock_greedy_ones(changed, samples, plain):
    ask(changed.model, {})
    batch = changed.adapter.encode_samples(samples)
    ids = changed.model.generate(**batch, max_new_tokens=LIMIT, do_sample=False)
    texts = changed.adapter.decode(ids[:, batch["input_ids"].shape[1] :])
    assert all(answers == texts for answers in plain.values())


@pytest.mark.parametrize(
    "name", few(["use_cache", "return_dict_in_generate", "stop_strings", "num_beams"], ["num_beams"])
)
def test_every_verb_answers_the_same(changed, samples, plain, name, tmp_path):
    ask(changed.model, {name: FIELDS[name][0]})
    assert verbs(changed, samples, tmp_path) == plain


@pytest.mark.slow  # 100 generation configs through five verbs
@pytest.mark.parametrize("fields", [{name: value} for name, value in CASES] + mixtures(40), ids=str)
def test_every_verb_answers_the_same_under_any_field(changed, samples, plain, fields, tmp_path):
    ask(changed.model, fields)
    assert verbs(changed, samples, tmp_path) == plain


@pytest.mark.parametrize(
    "fields", few([{name: value} for name, value in CASES] + mixtures(20, seed=1), 6), ids=str
)
def test_greedy_answers_take_nothing_over(changed, fields):
    batch = changed.adapter.encode_samples(load_task("shapes:describe").samples("search", 1))
    ask(changed.model, {})
    expected = changed.model.generate(**batch, max_new_tokens=3, do_sample=False)
    ask(changed.model, fields)
    before = changed.model.generation_config.to_dict()
    assert torch.equal(greedy(changed.model, batch, max_new_tokens=3), expected)
    assert changed.model.generation_config.to_dict() == before


def test_ends_and_tokens_never_said_are_kept(changed):
    batch = changed.adapter.encode_samples(load_task("shapes:describe").samples("search", 1))
    prompt = batch["input_ids"].shape[1]
    ask(changed.model, {})
    first = int(greedy(changed.model, batch, max_new_tokens=1)[0, prompt])
    ask(changed.model, {"eos_token_id": [first]})
    assert greedy(changed.model, batch, max_new_tokens=4)[0, prompt:].tolist() == [first]
    ask(changed.model, {"suppress_tokens": [first]})
    assert first not in greedy(changed.model, batch, max_new_tokens=4)[0, prompt:].tolist()


def test_what_is_set_aside_is_said_once(tiny_copy, caplog):
    batch = tiny_copy.adapter.encode_samples(load_task("shapes:describe").samples("search", 1))
    ask(tiny_copy.model, {"repetition_penalty": 3.0, "stop_strings": ["x" * 500], "temperature": 0.1})
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            greedy(tiny_copy.model, batch, max_new_tokens=2)
    said = [record.getMessage() for record in caplog.records if "set aside" in record.getMessage()]
    assert len(said) == 1 and "repetition_penalty 3.0" in said[0] and len(said[0]) < 300
    assert "temperature" not in said[0]
    assert set(set_aside(tiny_copy.model)) == {"repetition_penalty", "stop_strings"}


def test_a_plain_checkpoint_sets_nothing_aside(tiny):
    assert set_aside(tiny.model) == {}


def test_a_config_of_ours_is_filled_up_by_nothing():
    config = Greedy(max_new_tokens=2)
    assert config.update(stop_strings=["x"], defaults_only=True, allow_custom_entries=True) == {}
    assert config.stop_strings is None
    assert config.update(num_beams=2, unknown=1) == {"unknown": 1} and config.num_beams == 2
