"""What tests of several rooms do: let a model answer, feed it an answer, take a batch apart."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import avlprof

STEPS = 24  # of an answer


def generate(model, inputs, steps=STEPS, **options):
    return model.generate(
        **inputs,
        max_new_tokens=steps,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def one_row(case, batch, row):
    """A row of a padded batch without its padding, with its own pictures."""
    real = batch["attention_mask"][row].bool()
    single = {
        "input_ids": batch["input_ids"][row][real][None],
        "attention_mask": batch["attention_mask"][row][real][None],
    }
    if "mm_token_type_ids" in batch:
        single["mm_token_type_ids"] = batch["mm_token_type_ids"][row][real][None]
    counts = images_by_row(case, batch)
    first, last = sum(counts[:row]), sum(counts[: row + 1])
    if first == last:
        return single
    if "image_grid_thw" in batch:
        patches = batch["image_grid_thw"].prod(dim=1).tolist()
        single["image_grid_thw"] = batch["image_grid_thw"][first:last]
        single["pixel_values"] = batch["pixel_values"][sum(patches[:first]) : sum(patches[:last])]
    else:
        single["pixel_values"] = batch["pixel_values"][first:last]
    return single


def images_by_row(case, batch):
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


def answers_of(lengths, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 90, (n,), generator=generator).tolist() for n in lengths]


def stepwise(model, inputs, answers, policy):
    """Logits of the runtime, fed the answers token by token."""
    return steps_and_first(model, inputs, answers, policy)[:, 1:]


def steps_and_first(model, inputs, answers, policy):
    steps = max(len(answer) for answer in answers) - 1
    tokens = torch.tensor([answer + [0] * (steps + 1 - len(answer)) for answer in answers])
    full = torch.cat([inputs["input_ids"], tokens], dim=1)

    def forced(batch, ids):
        return [int(full[batch, len(ids)])] if len(ids) < full.shape[1] else [0]

    with avlprof.apply(model, policy):
        out = model.generate(
            **inputs,
            max_new_tokens=steps + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            prefix_allowed_tokens_fn=forced,
        )
    return torch.stack(out.logits, dim=1)


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
