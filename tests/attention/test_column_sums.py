"""Column sums of attention against the softmax matrix, written out."""

from __future__ import annotations

import pytest
import torch

from avlprof.attention.column_sums import Seen, column_sums
from tests.helpers import Largest
from tests.interpreted import passes, runs_elsewhere, runs_here

PLAIN = {"heads": 2, "kv_heads": 2, "length": 37, "size": 16}
CASES = {
    "plain": PLAIN,
    "grouped": PLAIN | {"heads": 6, "length": 65},
    "odd sizes": PLAIN | {"heads": 3, "kv_heads": 1, "length": 131, "size": 20},
    "padded": PLAIN | {"batch": 3, "length": 70, "pad": (0, 5, 66)},
    "few rows": PLAIN | {"length": 90, "rows": (3, 4, 64, 65, 89)},
    "rows out of order": PLAIN | {"length": 70, "rows": (69, 0, 33)},
    "newest rows": PLAIN | {"length": 70, "newest": 9},
    "whole": PLAIN | {"causal": False, "batch": 2, "pad": (0, 4)},
    "soft cap": PLAIN | {"softcap": 1.5},
    "sinks": PLAIN | {"heads": 4, "length": 70, "batch": 2, "pad": (0, 5), "sinks": (-3.0, 0.0, 2.0, 90.0)},
    "sinks, some count": PLAIN | {"length": 67, "counted": True, "softcap": 1.5, "sinks": (1.0, 4.0)},
    "some count": PLAIN | {"length": 67, "counted": True},
    "wide heads": PLAIN | {"length": 67, "size": 192},
    "one token": PLAIN | {"length": 1},
    "half": PLAIN | {"length": 67, "dtype": torch.float16},  # the interpreter cannot multiply bf16
    "transposed": PLAIN | {"length": 67, "transposed": True},
}


def random_case(
    heads, kv_heads, length, size, batch=1, pad=None, rows=None, newest=None, counted=False, **options
):
    """Arguments of `column_sums` with random queries and keys."""
    generator = torch.Generator().manual_seed(length + size)
    dtype, flipped = options.pop("dtype", torch.float32), options.pop("transposed", False)

    def drawn(count, tokens):
        shape = (batch, count, size, tokens) if flipped else (batch, count, tokens, size)
        values = 2 * torch.randn(shape, generator=generator)
        return (values.mT if flipped else values).to(dtype)

    count = newest or (length if rows is None else len(rows))
    query, key = drawn(heads, count), drawn(kv_heads, length)
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"])
    if rows is not None:
        options["rows"] = torch.tensor([rows])
    if pad is not None:
        options["valid"] = torch.arange(length) >= torch.tensor(pad)[:, None]
    if counted:
        options["counted"] = torch.rand(batch, count, generator=generator) < 0.4
    return (query, key, size**-0.5), options


def summed(arguments, options, block=None):
    """`column_sums` of such arguments, those that say what rows see put together."""
    seen = {name: options[name] for name in ("rows", "valid", "causal", "mask") if name in options}
    others = {name: value for name, value in options.items() if name not in seen}
    return column_sums(*arguments, Seen(**seen), block=block, **others)


def written_out(
    query, key, scaling, rows=None, counted=None, valid=None, causal=True, mask=None, softcap=None, sinks=None
):
    """The whole matrix in double precision, one head after the other."""
    batch, heads, count, _ = query.shape
    length = key.shape[2]
    out = torch.zeros(batch, heads, length, dtype=torch.double)
    for b in range(batch):
        for h in range(heads):
            k = key[b, h // (heads // key.shape[1])].double()
            for r in range(count):
                logits = query[b, h, r].double() @ k.T * scaling
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                at = length - count + r if rows is None else int(rows[min(b, len(rows) - 1), r])
                seen = [
                    j
                    for j in range(length)
                    if (valid is None or valid[b, j])
                    and (
                        bool(mask[min(b, len(mask) - 1), 0, r, j])
                        if mask is not None
                        else j <= at or not causal
                    )
                ]
                if seen and (counted is None or counted[b, r]):
                    powers = logits[seen].exp()
                    sink = 0.0 if sinks is None else sinks[h].double().exp()
                    out[b, h, seen] += powers / (powers.sum() + sink)
    return out


@pytest.mark.parametrize("name", CASES)
def test_equals_the_matrix(name):
    arguments, options = random_case(**CASES[name])
    wanted = written_out(*arguments, **options)
    for block in (None, 1, 7):
        found = summed(arguments, options, block)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_mask_says_all(padded, shared):
    """Windows and blocks that look both ways come as a mask; some rows see nothing."""
    arguments, options = random_case(
        heads=4, kv_heads=2, length=41, size=8, batch=2, pad=(0, 6) if padded else None
    )
    near = (torch.arange(41)[:, None] - torch.arange(41)).abs() <= 5
    mask = torch.stack([near, near & (torch.arange(41) % 9 > 0)])[:, None]
    mask[1, 0, 20] = False
    options["mask"] = mask[:1] if shared else mask
    torch.testing.assert_close(
        summed(arguments, options).double(), written_out(*arguments, **options), atol=2e-5, rtol=1e-5
    )


def test_memory_is_linear_in_the_keys():
    """No tensor of the pass comes near N x N."""
    length, heads = 700, 4
    arguments, options = random_case(heads=heads, kv_heads=2, length=length, size=8)
    largest = Largest()
    with largest:
        sums = summed(arguments, options, 32)
    assert sums.sum().item() == pytest.approx(heads * length, rel=1e-4)
    assert largest.elements < length**2 / 4


@pytest.mark.slow  # Triton's interpreter, in a process of its own
@runs_elsewhere
def test_the_kernel_in_the_interpreter():
    passes(__file__, len(CASES), "-k", "kernel_equals")


@runs_here
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_the_matrix(name):
    from avlprof.attention.triton_column_sums import triton_column_sums

    arguments, options = random_case(**CASES[name])
    wanted = written_out(*arguments, **options)
    query, key, scaling = arguments
    count, length = query.shape[2], key.shape[2]
    rows = options.get("rows", torch.arange(length - count, length)[None]).expand(len(query), -1)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def there(tensor):
        return None if tensor is None else tensor.to(device)

    found = triton_column_sums(
        there(query),
        there(key),
        scaling,
        there(rows) if options.get("causal", True) else None,
        there(options.get("counted")),
        there(options.get("valid")),
        options.get("softcap"),
        there(options.get("sinks")),
    )
    torch.testing.assert_close(found.double().cpu(), wanted, atol=2e-5, rtol=1e-5)
