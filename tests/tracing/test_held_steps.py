"""Decoding steps held back as queries, against the same steps measured one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import DynamicCache

import avlprof
from avlprof.attention import session
from avlprof.testing.models import cases, random_llava
from avlprof.tracing import RecordOptions
from avlprof.tracing.held import HeldSteps
from tests.helpers import Counted, few, generate

MODELS = dict(cases())


def recorded(case, inputs, options, monkeypatch, held, **generation):
    """Frames and scores of all rows of an answer."""
    with monkeypatch.context() as patch:
        if not held:
            patch.setattr(session, "appends", lambda cache, layer: False)
        with avlprof.record(case.model, options) as recorder:
            generate(case.model, inputs, **generation)
            early = [len(record.frame()) for record in recorder.records]  # within the context too
    assert all(early)
    return [(record.frame(), record.scores()) for record in recorder.records]


def agree(found, wanted):
    for (frame, scores), (other, its) in zip(found, wanted, strict=True):
        assert scores["decode"].shape == its["decode"].shape
        for name in its:
            np.testing.assert_allclose(scores[name], its[name], atol=1e-6, rtol=1e-5)
        for ours, row in zip(frame, other, strict=True):
            for name in row:
                if name not in ("phase", "query"):
                    np.testing.assert_allclose(ours[name], row[name], atol=1e-5, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("most", [1, None])
@pytest.mark.parametrize("name", few(MODELS, ("llava-4q2kv",)))
def test_steps_held_back_are_the_same_steps(name, most, monkeypatch):
    case = MODELS[name]()
    options = RecordOptions(history=0.4, lags=(1, 3), step_logits=most)
    inputs = case.inputs(batch=3, seed=4, pad=True, text=15, images_per_row=[1, 0, 2])
    agree(*(recorded(case, inputs, options, monkeypatch, held) for held in (True, False)))


@pytest.mark.parametrize("generation", [{"num_beams": 3}, {"cache_implementation": "static"}])
def test_a_cache_that_moves_its_keys(generation, monkeypatch):
    """Beams choose rows between the steps; a static cache writes in place, so nothing is held back."""
    case = random_llava()
    inputs = case.inputs(batch=2, seed=5)
    agree(
        *(recorded(case, inputs, RecordOptions(), monkeypatch, held, **generation) for held in (True, False))
    )


def test_a_turn_measures_what_was_held_before_it(monkeypatch):
    case = random_llava()
    ids = case.inputs(seed=6)
    further = torch.randint(4, 100, (1, 5), generator=torch.Generator().manual_seed(1))
    found = []
    for held in (True, False):
        with monkeypatch.context() as patch:
            if not held:
                patch.setattr(session, "appends", lambda cache, layer: False)
            with avlprof.record(case.model) as recorder, torch.no_grad():
                cache = DynamicCache(config=case.model.config.get_text_config())
                case.model(**ids, **session.with_cache(case.model, cache))
                for tokens in (further[:, :1], further[:, 1:2], further, further[:, :1]):
                    case.model(input_ids=tokens, **session.with_cache(case.model, cache))
            found.append([(record.frame(), record.scores()) for record in recorder.records])
    agree(*found)


def test_old_keys_are_let_go():
    """A cache makes new keys at each step; those of the steps before would be a cache each."""
    case = random_llava()
    alive = []
    hold = HeldSteps.hold

    def held(self, call, rows):
        alive.append(StorageWeakRef(call.key.untyped_storage()))
        return hold(self, call, rows)

    with pytest.MonkeyPatch.context() as patch, avlprof.record(case.model):
        patch.setattr(HeldSteps, "hold", held)
        generate(case.model, case.inputs(seed=2), 9)
        layers = case.model.config.get_text_config().num_hidden_layers
        assert len(alive) == 8 * layers
        assert sum(not storage.expired() for storage in alive) == layers, "of each layer the newest alone"


def test_a_step_costs_few_operators(monkeypatch):
    """Held back it costs nothing; measured together steps cost at most four a layer and step."""
    case, steps, counts = random_llava(), 32, []
    hold, measure = HeldSteps.hold, HeldSteps.measure

    def held(self, call, rows):
        with Counted() as counted:
            full = hold(self, call, rows)
        assert counted.names == []
        return full

    def measured(self, rows):
        with Counted() as counted:
            measure(self, rows)
        counts.append(len(counted.names))

    monkeypatch.setattr(HeldSteps, "hold", held)
    monkeypatch.setattr(HeldSteps, "measure", measured)
    with avlprof.record(case.model):
        generate(case.model, case.inputs(seed=7), steps)
    layers = case.model.config.get_text_config().num_hidden_layers
    assert len([count for count in counts if count]) == layers
    assert max(counts) <= 4 * (steps - 1), max(counts)
