"""`avlprof run`: one prompt under a policy, beside the dense model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli._options import ImageOption, MaxNewTokensOption, PromptOption, model_options
from avlprof.cli._output import (
    Format,
    FormatOption,
    finished,
    note,
    show,
    size,
)
from avlprof.cli._resolved import Resolver
from avlprof.errors import UserError
from avlprof.models.spec import ModelSpec

if TYPE_CHECKING:
    from avlprof.models import LoadedModel
    from avlprof.policy import Policy
    from avlprof.runtime import LayerUse
    from avlprof.tasks import Sample

app = typer.Typer(add_completion=False)


@app.command()
@model_options
def run(
    spec: ModelSpec,
    policy: Annotated[str, typer.Option("--policy", help="A YAML file, or a name from 'policy ls'.")],
    image: ImageOption = None,
    prompt: PromptOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show every layer; with json or csv, only the layers.")
    ] = False,
    traced: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Traced run for a policy with an allocator; by default the newest of this model.",
        ),
    ] = None,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Show times of the two answers.")] = True,
    captured: Annotated[
        int | None,
        typer.Option(
            "--captured",
            help="Capture decoding steps and replay them (CUDA graphs on a GPU), so many by one capture.",
            show_default=False,
        ),
    ] = None,
    form: FormatOption = Format.table,
) -> None:
    """Answer one prompt under a policy and densely; print both answers, speed and KV bytes.

    Without --image and --prompt it takes a held-out sample of the embedded task.
    """
    from avlprof.models import load_model
    from avlprof.models.smaller import check_kind
    from avlprof.policy import DENSE, find_policy
    from avlprof.run import picture_task
    from avlprof.runtime.support import check_supported
    from avlprof.tasks import load_task
    from avlprof.tasks.splits import ALL, HELD_OUT

    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    chosen = find_policy(policy)
    check_supported(chosen)
    own = bool(image) or prompt is not None
    task = picture_task(image or [], prompt) if own else load_task("shapes")
    sample = task.samples(ALL if own else HELD_OUT, 1)[0]
    loaded = load_model(spec)
    chosen = Resolver(loaded, load_task("shapes") if own else task, traced)(chosen)
    chosen.check_layers(loaded.adapter.layers)
    if chosen.pictures is not None and chosen.shrinks:
        check_kind(loaded.adapter, chosen.pictures.kind)
    limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    note(f"prompt: {sample.prompt}" + (f" (reference: {sample.answers[0]})" if sample.answers else ""))
    _generate(loaded, DENSE, sample, 2)
    dense, ours = (_generate(loaded, one, sample, limit, captured) for one in (DENSE, chosen))
    bytes_in = dict.fromkeys(("live_kv", "allocated_kv", "read_kv_per_step"), size)
    if form is Format.table or not explain:
        rows = [_summary("dense", dense), _summary(chosen.name, ours)]
        if not speed:
            rows = [{name: value for name, value in row.items() if name not in _TIMES} for row in rows]
        show(rows, form, cells=bytes_in)
    if explain:
        show(
            _layers(ours, dense),
            form,
            f"layers under {chosen.name}",
            cells=bytes_in | {"dense_live_kv": size},
        )
    finished([], f"avlprof policy diff dense {policy}" if explain else "the same command with --explain")


_TIMES = ("tokens_per_s", "first_token_ms")


@dataclass
class _Generated:
    """One answer and what it took; times in seconds."""

    answer: str = ""
    tokens: int = 0
    first: float = 0.0
    rest: float = 0.0
    prefill: list[LayerUse] = field(default_factory=list)
    whole: list[LayerUse] = field(default_factory=list)


class _Clock:
    """A streamer of `generate`, which hands it the prompt and then each token as it is made."""

    def __init__(self, at_first: Callable[[], None]) -> None:
        self._at_first = at_first
        self.calls = 0
        self.begin = self.first = self.last = time.perf_counter()

    def put(self, value: Any) -> None:
        self.calls += 1
        self.last = time.perf_counter()
        if self.calls == 2:
            self._at_first()
            self.first = self.last

    def end(self) -> None:
        self.last = time.perf_counter()


def _generate(
    loaded: LoadedModel, policy: Policy, sample: Sample, limit: int, captured: int | None = None
) -> _Generated:
    import torch

    from avlprof.models.generation import greedy
    from avlprof.models.smaller import smaller_pictures
    from avlprof.runtime.apply import apply

    generated = _Generated()
    with (
        smaller_pictures(loaded, policy.pictures) as shown,
        apply(shown.model, policy.of_cache, captured, fused=False) as runtime,
        torch.inference_mode(),
    ):
        encoding = shown.adapter.encode_samples([sample])

        def note_prefill() -> None:
            generated.prefill = runtime.cache.use() if runtime.cache is not None else []

        clock = _Clock(note_prefill)
        ids = greedy(loaded.model, encoding, [sample.id], max_new_tokens=limit, streamer=clock)
        generated.whole = runtime.cache.use() if runtime.cache is not None else []
    new = ids[:, encoding["input_ids"].shape[1] :]
    generated.tokens, generated.answer = new.shape[1], loaded.adapter.decode(new)[0]
    generated.first, generated.rest = clock.first - clock.begin, clock.last - clock.first
    return generated


def _summary(name: str, generated: _Generated) -> dict[str, Any]:
    """`live_kv` is the prompt's right after prefill, `read_kv_per_step` of the prompt alone."""
    return {
        "policy": name,
        "tokens": generated.tokens,
        "tokens_per_s": (generated.tokens - 1) / generated.rest if generated.tokens > 1 else float("nan"),
        "first_token_ms": 1000 * generated.first,
        "live_kv": sum(use.prompt for use in generated.prefill),
        "allocated_kv": sum(use.allocated for use in generated.whole),
        "read_kv_per_step": sum(use.read for use in generated.whole)
        if generated.tokens > 1
        else float("nan"),
        "answer": generated.answer,
    }


def _layers(generated: _Generated, dense: _Generated) -> list[dict[str, Any]]:
    """Dense bytes are those of the pictures as they are."""
    return [
        {
            "layer": after.layer,
            "live_kv": before.prompt,
            "dense_live_kv": whole.dense_prompt,
            "allocated_kv": after.allocated,
            "read_kv_per_step": after.read,
            "refreshes": after.refreshes,
            "steps": after.steps,
        }
        for before, after, whole in zip(generated.prefill, generated.whole, dense.prefill, strict=True)
    ]
