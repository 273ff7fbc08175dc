"""What a prompt costs under policies: dense, evicting, and with vision tokens dropped on the way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from avlprof.attention.session import cache_of, with_cache
from avlprof.bench.memory import peak_above
from avlprof.bench.shapes import DecoderShape, prompt, random_model
from avlprof.bench.trace import median_interval
from avlprof.errors import UserError
from avlprof.evaluation.footprint import cache_bytes
from avlprof.policy import DENSE, Policy, PrefillFilter
from avlprof.policy.sizes import vision_left
from avlprof.runtime.apply import apply
from avlprof.watch import SILENT, Watch

STOCK, OURS = "stock", "dense"
LEAST_LAYERS = 3  # with fewer there is no place for two filters


@dataclass(frozen=True)
class PrefillCost:
    """One way to run one prompt.

    `seconds` is the median over rounds. `speedup` is the stock model's time over this one's in the same
    round, with its 95% interval (the extremes with fewer than 6 rounds); `cap` is the stock
    prefill's multiplications over this one's. `peak_bytes` is how far tensors rose above what was there
    before, KV and activations together (None where memory cannot be counted), `kv_bytes` what the
    cache holds afterwards.
    """

    shape: str
    layers: int
    device: str
    dtype: str
    tokens: int
    method: str
    seconds: float
    speedup: float
    speedup_low: float
    speedup_high: float
    cap: float
    peak_bytes: int | None
    kv_bytes: int
    rounds: int


def run_prefill_bench(
    shape: DecoderShape,
    visions: Sequence[int],
    *,
    keep: float = 0.25,
    layers: int | None = None,
    rounds: int = 5,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    watch: Watch = SILENT,
) -> list[PrefillCost]:
    """Time prompts of `visions` vision tokens and the shape's text on a random model of `shape`.

    Compared are the stock model, the dense policy, eviction after each layer's attention to `keep` of
    the vision KV, one filter to `keep` behind the second layer (FastV), and two filters, to the root
    of `keep` behind a quarter of the layers and to `keep` behind half of them (as PyramidDrop drops in
    stages). The ways take turns; a first round warms up, and a second counts memory.

    Args:
        keep: share of the vision tokens that stays, in (0, 1].
        layers: decoder layers of the model; None: the shape's.
        watch: its phase `bench prefill` counts prefills.

    Raises:
        UserError: a number is out of its range.
    """
    count = shape.layers if layers is None else layers
    if rounds < 1 or not visions or min(visions) < 1 or not 0.0 < keep <= 1.0 or count < LEAST_LAYERS:
        raise UserError(
            f"a prefill bench needs a round, vision tokens, a share in (0, 1] and {LEAST_LAYERS} layers, got "
            f"{rounds} rounds, {', '.join(map(str, visions)) or 'no'} vision tokens, keep {keep:g}, "
            f"{count} layers"
        )
    model = random_model(shape, layers=layers, dtype=dtype, device=device)
    methods = _methods(keep, count)
    names, costs = list(methods), []
    done, total = 0, len(visions) * len(names) * (rounds + 2)
    for vision in visions:
        inputs = prompt(model, shape, vision=vision)
        seconds: dict[str, list[float]] = {name: [] for name in names}
        peaks: dict[str, int | None] = {}
        bytes_of: dict[str, int] = {}
        for number in range(-2, rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                work = partial(_prefill, model, inputs, methods[name])
                if number == -2:
                    bytes_of[name] = work()
                elif number == -1:
                    peaks[name] = peak_above(model.device, work)
                else:
                    seconds[name].append(_seconds(model.device, work))
                done += 1
                watch.phase("bench prefill", done, total)
        stock = np.array(seconds[STOCK])
        tokens = inputs["input_ids"].shape[1]
        for name in names:
            speedup, low, high = median_interval(stock / np.array(seconds[name]))
            costs.append(
                PrefillCost(
                    shape=shape.name,
                    layers=count,
                    device=str(model.device),
                    dtype=str(model.dtype).removeprefix("torch."),
                    tokens=tokens,
                    method=name,
                    seconds=float(np.median(seconds[name])),
                    speedup=speedup,
                    speedup_low=low,
                    speedup_high=high,
                    cap=_work(shape, DENSE, vision, tokens, count)
                    / _work(shape, methods[name] or DENSE, vision, tokens, count),
                    peak_bytes=peaks[name],
                    kv_bytes=bytes_of[name],
                    rounds=rounds,
                )
            )
    return costs


def _methods(keep: float, layers: int) -> dict[str, Policy | None]:
    early, half = max(1, layers // 4), max(2, layers // 2)
    one = (PrefillFilter(after_layer=2, keep=keep),)
    two = (PrefillFilter(after_layer=early, keep=keep**0.5), PrefillFilter(after_layer=half, keep=keep))
    return {
        STOCK: None,
        OURS: DENSE,
        f"keep {keep:g}": Policy(vision_keep=keep),
        f"fastv {keep:g}": Policy(prefill_filter=one),
        f"two filters {keep:g}": Policy(prefill_filter=two),
    }


@torch.inference_mode()
def _prefill(model: PreTrainedModel, inputs: dict[str, Tensor], policy: Policy | None) -> int:
    """Run the prompt; the bytes that its cache holds afterwards."""
    cache = None if policy else DynamicCache(config=model.config.get_text_config(decoder=True))
    with apply(model, policy) if policy else contextlib.nullcontext():
        out = model(**inputs, **with_cache(model, cache), logits_to_keep=1)
    return cache_bytes(cache_of(out))


def _seconds(device: torch.device, work: Callable[[], int]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _work(shape: DecoderShape, policy: Policy, vision: int, tokens: int, layers: int) -> float:
    """Multiplications of the decoder layers: their weights once a token, and attention's pairs."""
    each, head = shape.hidden, shape.head_dim
    weights = each * head * 2 * (shape.heads + shape.kv_heads) + 3 * each * shape.intermediate
    entering = [tokens - vision + left for left in vision_left(policy, vision, layers)]
    return float(sum(n * weights + n * n * shape.heads * head for n in entering))
