"""What tests of several rooms do: generate, take a row of a batch, feed given answers, watch tensors."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import avlprof

ROOT = Path(__file__).parent.parent
STEPS = 24
FEW_MODELS = ("qwen2_5_vl-6q2kv", "llava-4q2kv-sinks")
"""Two random models for `make quick`: positions in three dimensions; grouped heads and sinks."""
FEW = ("llava_next", "qwen3_vl", "idefics3", "gemma3")
"""Families for a large matrix where time is short: tiles, positions in three dimensions, sliding windows."""


def few(values, quick):
    """All of `values` as parameters; `make quick` runs those of `quick`, or the first so many."""
    values = list(values)
    kept = range(quick) if isinstance(quick, int) else [values.index(value) for value in quick]
    return [
        value if index in kept else pytest.param(value, marks=pytest.mark.full)
        for index, value in enumerate(values)
    ]


def thinned(names, tested, quick=None):
    """All of `names` as parameters of a large matrix.

    `make test` runs those that are `tested`, the others are marked slow; `make quick` runs those of them
    that are `quick`, the others are marked full. Without `quick` it runs all of them.
    """
    quick = tested if quick is None else quick
    assert set(quick) <= set(tested) <= set(names)
    untested = [name for name in names if name not in tested]
    marks = dict.fromkeys(untested, pytest.mark.slow) | {
        name: pytest.mark.full for name in tested if name not in quick
    }
    return [pytest.param(name, marks=marks[name]) if name in marks else name for name in names]


def generate(model, inputs, steps=STEPS, **options):
    """Greedy tokens, and the logits of every step."""
    options = {"max_new_tokens": steps, "do_sample": False} | options
    return model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)


def generate_words(case, inputs, steps=STEPS, **options):
    """Greedy tokens, none of them an image token, and the logits of every step."""
    return generate(case.model, inputs, steps, suppress_tokens=list(case.vision_token_ids), **options)


def answers_of(lengths, seed=5):
    """Random answers of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]


def stepwise(model, inputs, answers, policy):
    """Logits of the runtime, fed the answers token by token."""
    return steps_and_first(model, inputs, answers, policy)[:, 1:]


def steps_and_first(model, inputs, answers, policy):
    """Logits of the runtime, fed the answers token by token, and those of the prompt before them."""
    steps = max(len(answer) for answer in answers) - 1
    tokens = torch.tensor([answer + [0] * (steps + 1 - len(answer)) for answer in answers])
    full = torch.cat([inputs["input_ids"], tokens], dim=1)

    def forced(batch, ids):
        return [int(full[batch, len(ids)])] if len(ids) < full.shape[1] else [0]

    with avlprof.apply(model, policy):
        out = generate(model, inputs, steps + 1, prefix_allowed_tokens_fn=forced)
    return torch.stack(out.logits, dim=1)


def one_row(case, batch, row, counts=None):
    """A row of a padded batch without its padding, with its own pictures; `counts` are those of each row."""
    real = batch["attention_mask"][row].bool()
    names = [n for n in ("input_ids", "attention_mask", "mm_token_type_ids") if n in batch]
    single = {name: batch[name][row][real][None] for name in names}
    counts = images_by_row(case, batch) if counts is None else counts
    first, last = sum(counts[:row]), sum(counts[: row + 1])
    if first == last:
        return single
    if "image_grid_thw" not in batch:
        return single | {"pixel_values": batch["pixel_values"][first:last]}
    patches = batch["image_grid_thw"].prod(dim=1).tolist()
    pixels = batch["pixel_values"][sum(patches[:first]) : sum(patches[:last])]
    return single | {"image_grid_thw": batch["image_grid_thw"][first:last], "pixel_values": pixels}


def images_by_row(case, batch):
    """How many pictures each row of a batch has."""
    vision = torch.isin(batch["input_ids"], torch.tensor(case.vision_token_ids))
    if "image_grid_thw" in batch:
        sizes_of = (batch["image_grid_thw"].prod(dim=1) // 4).tolist()
    else:
        sizes_of = [int(vision.sum()) // len(batch["pixel_values"])] * len(batch["pixel_values"])
    counts, at = [], 0
    for total in vision.sum(dim=1).tolist():
        count = 0
        while total > 0:
            total -= sizes_of[at]
            at, count = at + 1, count + 1
        counts.append(count)
    return counts


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was made (views of others are not)."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for made in out if isinstance(out, tuple | list) else [out]:
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, made.numel())
        return out


class Counted(TorchDispatchMode):
    """Counts the operators that a device would be handed: not views, nor what only takes memory."""

    QUIET = (
        *("empty", "view", "slice", "select", "expand", "transpose", "split", "unsqueeze", "squeeze", "t."),
        *("permute", "alias", "detach", "as_strided", "unbind", "_unsafe_view", "narrow"),
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(self.QUIET):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def waits():
    """Lists the calls that would make the host wait for a device, were the tensors on one."""
    found = []

    def noting(name):
        own = getattr(torch.Tensor, name)

        def waiting(self, *arguments, **options):
            found.append(name)
            return own(self, *arguments, **options)

        return waiting

    with pytest.MonkeyPatch.context() as patch:
        for name in ("tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            patch.setattr(torch.Tensor, name, noting(name))
        yield found


def settle_threads():
    """In a process just forked: torch makes its pool of threads anew at its next use, and it must be one's.

    Two threads that load weights at once may else find none ("Invalid thread pool").
    """
    torch.set_num_threads(torch.get_num_threads())
