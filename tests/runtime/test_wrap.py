"""A wrapped model answers as under `apply`, and is a stock model again afterwards, in files and in copies."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import pickle

import pytest
import torch

import avlprof
from avlprof.errors import UserError
from avlprof.policy import Policy, PrefillFilter, save_policy
from avlprof.testing.models import random_llava
from tests.helpers import generate

POLICY = Policy(name="half", vision_keep=0.5, vision_compute=0.2, refresh_interval=3)


@pytest.fixture
def case():
    return random_llava()


def answer(model, inputs):
    return generate(model, inputs, steps=7).sequences


def test_a_wrapped_model_answers_as_under_apply(case, tmp_path):
    inputs = case.inputs(batch=2, seed=3, pad=True)
    stock = answer(case.model, inputs)
    with avlprof.apply(case.model, POLICY) as runtime:
        wanted = answer(case.model, inputs)
        used = runtime.cache.use()
    save_policy(POLICY, tmp_path / "half.yaml")
    model = avlprof.wrap(case.model, tmp_path / "half.yaml")
    assert model is case.model
    assert answer(model, inputs).equal(wanted)
    assert model.unwrap.runtime.cache.use() == used
    assert model.unwrap() is case.model
    assert answer(case.model, inputs).equal(stock)
    assert not hasattr(case.model, "unwrap")
    assert "forward" not in vars(case.model)


def test_files_and_configs_are_those_of_the_stock_model(case, tmp_path):
    before = case.model.generation_config.to_dict()
    case.model.save_pretrained(tmp_path / "stock")
    avlprof.wrap(case.model, POLICY)
    case.model.save_pretrained(tmp_path / "wrapped")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()
    assert case.model.generation_config.to_dict() == before
    assert "avlprof" not in json.dumps(case.model.config.to_dict())
    case.model.unwrap()


def test_copies_are_stock_models(case):
    inputs = case.inputs(seed=3)
    stock = answer(case.model, inputs)
    avlprof.wrap(case.model, POLICY)
    twin = copy.deepcopy(case.model)
    assert answer(twin, inputs).equal(stock)
    with pytest.raises(UserError, match="a copy of a wrapped model"):
        twin.unwrap()
    case.model.unwrap()


def filtered():
    return Policy(vision_keep=0.5, prefill_filter=(PrefillFilter(after_layer=1, keep=0.5),))


@pytest.mark.parametrize(
    "within",
    [
        lambda model: avlprof.apply(model, POLICY),
        lambda model: avlprof.apply(model, POLICY, captured=4),
        lambda model: avlprof.apply(model, filtered()),
        lambda model: contextlib.closing(Wrapped(model)),
        avlprof.record,
    ],
    ids=["policy", "captured", "filtered", "wrapped", "recorded"],
)
def test_a_model_at_work_is_pickled_by_nobody(case, within):
    """The names of whoever is at work on it would come back with it, and act on nothing."""
    whole = len(pickle.dumps(case.model))
    with within(case.model):
        for write in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
            with pytest.raises(UserError, match=r"cannot be pickled, .* save_pretrained writes it"):
                write(case.model)
        torch.save(case.model.state_dict(), io.BytesIO())
    assert len(pickle.dumps(case.model)) == whole


class Wrapped:
    def __init__(self, model):
        self.close = avlprof.wrap(model, POLICY).unwrap


def test_a_copy_of_a_model_whose_prompts_are_cut_is_a_stock_model(case):
    inputs = case.inputs(seed=3)
    stock = answer(case.model, inputs)
    with avlprof.apply(case.model, filtered()):
        ours = answer(case.model, inputs)
        twin = copy.deepcopy(case.model)
        assert answer(twin, inputs).equal(stock)
        assert answer(case.model, inputs).equal(ours)
    assert answer(twin, inputs).equal(stock)


def test_a_model_is_wrapped_once(case):
    avlprof.wrap(case.model, POLICY)
    with pytest.raises(UserError, match="already runs under a policy"):
        avlprof.wrap(case.model, "uniform")
    inputs = case.inputs(seed=3)
    with avlprof.record(case.model) as recording:
        answer(case.model, inputs)
    assert recording.records
    case.model.unwrap()
    avlprof.wrap(case.model, "uniform").unwrap()


def test_captured_steps_can_be_wrapped(case):
    inputs = case.inputs(seed=3)
    with avlprof.apply(case.model, POLICY):
        wanted = answer(case.model, inputs)
    assert answer(avlprof.wrap(case.model, POLICY, captured=4), inputs).equal(wanted)
    case.model.unwrap()


def test_an_old_unwrap_leaves_a_model_that_was_wrapped_again(case):
    old = avlprof.wrap(case.model, POLICY).unwrap
    old()
    inputs = case.inputs(seed=3)
    stock = answer(case.model, inputs)
    avlprof.wrap(case.model, Policy(vision_keep=0.1))
    wanted = answer(case.model, inputs)
    assert not wanted.equal(stock)
    old()
    assert answer(case.model, inputs).equal(wanted)
    assert case.model.unwrap() is case.model
    assert answer(case.model, inputs).equal(stock)
