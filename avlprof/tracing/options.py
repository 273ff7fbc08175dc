"""What a recorder measures, the settings of a run, and what it will take on disk."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field, replace
from pathlib import Path

from avlprof.errors import UserError
from avlprof.models import LoadedModel
from avlprof.policy import Policy, find_policy
from avlprof.registry import unknown
from avlprof.runs import RunMeta
from avlprof.runs.meta import COVERAGES, DISTANCES, LAGS, TEXT_SINK
from avlprof.tasks import Task
from avlprof.tasks.splits import SEARCH
from avlprof.versions import versions

ROWS = ("default", "all")


@dataclass(frozen=True)
class RecordOptions:
    """What a recorder measures.

    `rows` is `default` (all text and system rows, `vision_rows` evenly spaced vision rows) or
    `all`; of each kind of prompt row at most `coverage_rows`, evenly spaced, are measured for
    coverage. Statistics are averaged over query heads unless `per_head`, which also keeps the
    scores of single tokens head by head, beside their mean. With `history`, the kept share of
    text in (0, 1], A-VL's history scores of text tokens are recorded for that share; with `text_rows`
    what each text row of a prompt gave the vision tokens, beside their mean.
    `block` and `step_logits` bound memory and change no result.

    Raises:
        UserError: a value is out of its range.
    """

    rows: str = "default"
    vision_rows: int = 64
    coverage_rows: int = 16
    per_head: bool = False
    history: float | None = None
    text_rows: bool = False
    top_share: float = 0.1
    text_sink: int = TEXT_SINK
    coverages: tuple[int, ...] = COVERAGES
    distances: tuple[int, ...] = DISTANCES
    lags: tuple[int, ...] = LAGS
    block: int | None = None  # weights of a prompt that exist at a time; None: what suits the device
    step_logits: int | None = None  # of decoding steps that a layer measures together; None: as suits

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


@dataclass(frozen=True)
class TraceSettings:
    """How samples are traced: over which answers, how long, under what, and what is recorded.

    Attributes:
        split: `search` or `held-out`, or what the task has; None is `search`, or its only split.
        max_new_tokens: longest answer; by default the task's, and with `forced` the whole reference.
        batch_size: samples that run together. The numbers are those of each alone.
        forced: trace over each sample's first reference answer in place of the model's own.
        policy: trace the model under a policy: a `Policy`, a YAML file or the name of a shipped one.
        record: what is recorded of every sample.

    Raises:
        UserError: a value is out of its range.
    """

    split: str | None = None
    max_new_tokens: int | None = None
    batch_size: int = 1
    forced: bool = False
    policy: Policy | str | Path | None = None
    record: RecordOptions = field(default_factory=RecordOptions)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")

    def answer_limit(self, task: Task) -> int:
        """Most tokens of an answer; 0 leaves reference answers whole."""
        return self.max_new_tokens or (0 if self.forced else task.max_new_tokens)

    def split_of(self, task: Task) -> str:
        """The split that samples are taken from."""
        if self.split is not None:
            return self.split
        return task.splits[0] if len(task.splits) == 1 else SEARCH

    def resolved(self) -> TraceSettings:
        """These settings with the policy itself in place of its name; `UserError` when it is not known."""
        if self.policy is None or isinstance(self.policy, Policy):
            return self
        return replace(self, policy=find_policy(str(self.policy)))


def run_meta(loaded: LoadedModel, task: Task, settings: TraceSettings) -> RunMeta:
    """The settings of a run, as its `meta.json` records them; a policy is given by itself, not by name."""
    adapter, options, policy = loaded.adapter, settings.record, settings.policy
    named = policy if isinstance(policy, Policy) else None
    return RunMeta(
        model=loaded.source,
        revision=loaded.revision or "",
        model_hash=loaded.revision or "",
        checkpoint=loaded.settings,
        family=adapter.family,
        layers=adapter.layers,
        heads=adapter.heads,
        kv_heads=adapter.kv_heads,
        head_dim=adapter.head_dim,
        governed=adapter.governed,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        device=str(loaded.model.device),
        task=task.name,
        dataset=dict(task.provenance),
        metric=task.metric,
        split=settings.split_of(task),
        max_new_tokens=settings.answer_limit(task),
        forced=settings.forced,
        policy="" if named is None else named.name,
        policy_hash="" if named is None else named.hash,
        rows=options.rows,
        vision_rows=options.vision_rows,
        coverage_rows=options.coverage_rows,
        per_head=options.per_head,
        history=options.history,
        text_rows=options.text_rows,
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
        text: text tokens of a prompt, of which a run with `history` or `text_rows` stores scores.
    """
    tokens = meta.max_new_tokens if answer_tokens is None else answer_tokens
    scores = vision * (2 + tokens + (meta.rows == "all"))
    if meta.text_rows:
        scores += vision * text
    if meta.history is not None:
        scores += text + tokens
    row = 8 * (13 + len(meta.coverages) + len(meta.lags)) + 4 * (len(meta.distances) + 1)
    heads = meta.heads if meta.per_head else 0
    return samples * meta.layers * (4 * scores * (1 + heads) + 5 * row * max(heads, 1))
