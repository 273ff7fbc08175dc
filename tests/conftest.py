"""What all tests share: the embedded model, loaded once, and one thread."""

from __future__ import annotations

import pytest
import torch

from avlprof.models import load_model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models here are tiny: a second thread costs more than it does, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def state(loaded):
    """What a test might leave changed: settings, hooks, and every weight."""
    model = loaded.model
    weights = [
        (name, str(value.dtype), value.double().sum().item()) for name, value in model.named_parameters()
    ]
    hooks = [
        hook
        for part in model.modules()
        for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
        if not hook.__module__.startswith("transformers.")  # which keeps hooks once outputs were asked for
    ]
    return model.training, model.config.to_dict(), model.generation_config.to_dict(), weights, hooks


@pytest.fixture(scope="session")
def tiny(one_thread):
    """The embedded model on the CPU, for tests that leave it as it is; who changes it takes `tiny_copy`."""
    loaded = load_model("tiny", device="cpu")
    before = state(loaded)
    yield loaded
    assert state(loaded) == before, "a test changed the model that all share"


@pytest.fixture
def tiny_copy():
    """The embedded model, for a test that changes it."""
    return load_model("tiny", device="cpu")
