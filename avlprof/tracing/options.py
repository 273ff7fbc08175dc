"""What a recorder measures, the settings of a run, and what it will take on disk."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from avlprof.errors import UserError
from avlprof.models import LoadedModel
from avlprof.registry import unknown
from avlprof.runs import RunMeta
from avlprof.runs.meta import COVERAGES, DISTANCES, LAGS, TEXT_SINK
from avlprof.tasks import Task
from avlprof.versions import versions

ROWS = ("default", "all")


@dataclass(frozen=True)
class RecordOptions:
    """What a recorder measures.

    `rows` is `default` (all text and system rows, `vision_rows` evenly spaced vision rows) or
    `all`; of each kind of prompt row at most `coverage_rows`, evenly spaced, are measured for
    coverage. Statistics are averaged over query heads unless `per_head`, which also keeps the
    scores of single tokens head by head, beside their mean. With `history`, the kept share of
    text in (0, 1], A-VL's history scores of text tokens are recorded for that share.
    `block` and `step_logits` bound memory and change no result.

    Raises:
        UserError: a value is out of its range.
    """

    rows: str = "default"
    vision_rows: int = 64
    coverage_rows: int = 16
    per_head: bool = False
    history: float | None = None
    top_share: float = 0.1
    text_sink: int = TEXT_SINK
    coverages: tuple[int, ...] = COVERAGES
    distances: tuple[int, ...] = DISTANCES
    lags: tuple[int, ...] = LAGS
    block: int | None = None  # weights of a prompt that exist at a time; None: what suits the device
    step_logits: int = 1 << 18  # logits of decoding steps held back a layer, to measure them together

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise unknown("kind of rows", self.rows, ROWS)
        for name, least in (("vision_rows", 0), ("coverage_rows", 0), ("text_sink", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.block is not None and self.block < 1:
            raise UserError(f"block must be at least 1, got {self.block}")
        if not 0.0 < self.top_share <= 1.0:
            raise UserError(f"top_share must be in (0, 1], got {self.top_share}")
        if self.history is not None and not 0.0 < self.history <= 1.0:
            raise UserError(f"history is a kept share of text and must be in (0, 1], got {self.history}")
        if any(lag < 1 for lag in self.lags) or any(not 0 < level <= 100 for level in self.coverages):
            raise UserError(
                f"lags must be at least 1 and coverages in (0, 100], got {self.lags} and {self.coverages}"
            )
        if list(self.distances) != sorted({d for d in self.distances if d > 0}):
            raise UserError(f"distances must be ascending and above 0, got {self.distances}")


def run_meta(
    loaded: LoadedModel,
    task: Task,
    split: str,
    max_new_tokens: int,
    options: RecordOptions,
    *,
    forced: bool = False,
    policy: str = "",
) -> RunMeta:
    """The settings of a run, as its `meta.json` records them."""
    adapter = loaded.adapter
    return RunMeta(
        model=loaded.source,
        revision=loaded.revision or "",
        model_hash=loaded.revision or "",
        family=adapter.family,
        layers=adapter.layers,
        heads=adapter.heads,
        kv_heads=adapter.kv_heads,
        head_dim=adapter.head_dim,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=str(loaded.model.device),
        task=task.name,
        metric=task.metric,
        split=split,
        max_new_tokens=max_new_tokens,
        forced=forced,
        policy=policy,
        rows=options.rows,
        vision_rows=options.vision_rows,
        coverage_rows=options.coverage_rows,
        per_head=options.per_head,
        history=options.history,
        top_share=options.top_share,
        text_sink=options.text_sink,
        coverages=options.coverages,
        distances=options.distances,
        lags=options.lags,
        versions=versions(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def estimate_bytes(
    meta: RunMeta, vision: int, samples: int, answer_tokens: int | None = None, text: int = 0
) -> int:
    """Upper estimate of a run's size on disk: scores of full-length answers and the stats table.

    With `per_head` these are the scores of every head beside their mean, and a row a head.

    Args:
        vision: vision tokens of a prompt.
        answer_tokens: tokens of the longest answer; by default `meta.max_new_tokens`.
        text: text tokens of a prompt, of which a run with `history` stores scores.
    """
    tokens = meta.max_new_tokens if answer_tokens is None else answer_tokens
    scores = vision * (2 + tokens + (meta.rows == "all"))
    if meta.history is not None:
        scores += text + tokens
    row = 8 * (12 + len(meta.coverages) + len(meta.lags)) + 4 * (len(meta.distances) + 1)
    heads = meta.heads if meta.per_head else 0
    return samples * meta.layers * (4 * scores * (1 + heads) + 5 * row * max(heads, 1))
