"""What a model attends to, layer by layer: the tables of a run, stored and read again."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from pydantic import BaseModel, ConfigDict

from avlprof.allocators import Evidence
from avlprof.analysis.coverage import coverage
from avlprof.analysis.derive import (
    Spread,
    Use,
    at_budget,
    at_coverage,
    check_scorer,
    derived_name,
    evidence,
    provenance,
    text_windows,
)
from avlprof.analysis.diff import diff
from avlprof.analysis.heads import HeadMoments, head_shares
from avlprof.analysis.horizon import horizon
from avlprof.analysis.scan import scan_scores
from avlprof.analysis.statistics import FRAMES, PER_HEAD, SUMMARIES
from avlprof.analysis.tables import drift, entropy, head_mean, mass, not_finite, refresh_from_drift, sinks
from avlprof.analysis.window import by_sample, reach, window, window_curve
from avlprof.errors import UserError, cut
from avlprof.files import replacing, write_text
from avlprof.policy import RANKING, Heads, Policy, PromptShape, ScorerSpec, TextPolicy, scale_group
from avlprof.registry import unknown
from avlprof.runs import RunDirectory, RunMeta
from avlprof.runtime.support import unsupported
from avlprof.watch import SILENT, Watch


def per_layer(frames: Mapping[str, pd.DataFrame], layers: int) -> pd.DataFrame:
    """One row a layer; means over samples, NaN where nothing was recorded.

    `vision_last` and `vision_decode` are attention on vision by the last prompt row and while
    decoding. The others are of decoding steps, or of the last prompt row in a run without:
    `coverage_90` (share of vision tokens), `overlap_8` (drift), `window_95` (text tokens),
    `entropy` (nat).
    """
    vision = frames["mass"].query("modality == 'vision'")
    query = answered(frames)

    def column(name: str, **where: Any) -> pd.Series[float]:
        table = vision if name == "vision" else frames[name]
        for key, value in where.items():
            table = table[table[key] == value]
        return table.set_index("layer")["mean"]

    table = pd.DataFrame(
        {
            "vision_last": column("vision", query="last"),
            "vision_decode": column("vision", query="generated"),
            "coverage_90": column("coverage", query=query, level=90),
            "overlap_8": column("drift", lag=8),
            "window_95": column("window", query=query, level=95),
            "entropy": column("entropy", query=query),
        },
        index=pd.RangeIndex(layers, name="layer"),
    )
    return table.reset_index()


def answered(frames: Mapping[str, pd.DataFrame]) -> str:
    """The query rows that stand for the answer: `generated`, or `last` in a run without decoding."""
    return "generated" if (frames["entropy"]["query"] == "generated").any() else "last"


class ProfileMeta(BaseModel):
    """The `meta.json` of a profile: the run it was made from and that run's settings.

    `samples` counts those that the profile is of. `not_finite` more were left out, whose attention
    holds numbers that are not finite; None in a profile of version 0.1.0, which did not look.

    Those of 0.1.0 were `avlprof.profile/1`: the query `answer` added shares of steps. They are made anew.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["avlprof.profile/2"] = "avlprof.profile/2"
    run: str
    run_hash: str
    samples: int
    not_finite: int | None = None
    settings: RunMeta


@dataclass(frozen=True)
class Profile:
    """Per-layer statistics of a run as tidy frames; `profile["drift"]` gives one.

    `avlprof.analysis.statistics` lists them. Every frame but `samples` and `by_sample` has the
    columns `mean, low, high` (95% t-interval over samples, NaN with fewer than two) and `n`, the
    samples counted. `layer` counts from 0;
    `phase` and `query` name the query rows as in the run directory. Curves, overlaps and
    concentration come from the vision scores and have the queries `last`, `instruction`, `step`
    (one decoding step, mean over steps) and `answer` (all steps together).
    """

    meta: ProfileMeta
    frames: Mapping[str, pd.DataFrame]

    @classmethod
    def from_run(cls, run: RunDirectory, watch: Watch = SILENT) -> Profile:
        """Compute the profile of a run; `watch` is told the samples done.

        Samples whose attention holds a number that is not finite are left out and counted.

        Raises:
            UserError: the run holds no finished sample, or none whose attention is finite.
        """
        run.check()
        samples, settings = run.samples(), run.meta
        broken = not_finite(run)
        samples = samples[~samples["sample"].isin(broken)]
        if samples.empty:
            raise UserError(
                f"the attention of none of the {len(broken)} samples of run {run.path} is finite; "
                "trace again with dtype bfloat16 or float32"
            )
        vision = samples.set_index("sample")["vision"]
        heads, means = HeadMoments(settings.layers, settings.heads, settings.coverages, settings.lags), []
        for stats in run.stats_by_part():
            stats = stats[~stats["sample"].isin(broken)]
            if stats.empty:
                continue
            heads.add(stats, vision)
            means.append(head_mean(stats))
        rows = pd.concat(means, ignore_index=True)
        levels = settings.coverages
        reached = reach(rows, settings.distances, int((samples["text"] + samples["generated"]).max()))
        scanned = scan_scores(run, list(vision.index[vision > 0]), int(vision.max()), watch)
        frames = {
            "samples": samples[["sample", "system", "vision", "text", "generated"]],
            "mass": mass(rows),
            "entropy": entropy(rows),
            "coverage": coverage(rows, vision, levels),
            "coverage_curve": scanned.curves,
            "overlap": scanned.overlap,
            "drift": drift(rows, settings.lags),
            "window": window(reached, levels),
            "window_curve": window_curve(reached),
            "sinks": sinks(rows),
            "concentration": scanned.concentration,
            "heads": heads.table(),
            "head_overlap": scanned.heads,
            "by_sample": by_sample(rows, vision, reached, levels, settings.lags),
        }
        meta = ProfileMeta(
            run=str(run.path),
            run_hash=run.hash,
            samples=len(samples),
            not_finite=len(broken),
            settings=settings,
        )
        return cls(meta, frames)

    @classmethod
    def of(cls, run: RunDirectory, watch: Watch = SILENT) -> Profile:
        """The profile saved in a run directory if it is of all its samples, else a new one, saved."""
        run.check()
        with contextlib.suppress(UserError):
            known = cls.load(run.path / "profile")
            if known.meta.run_hash == run.hash and known.meta.not_finite is not None:
                return known
        profile = cls.from_run(run, watch)
        try:
            profile.save(run.path / "profile")
        except (UserError, OSError) as error:
            watch.say(f"the profile is worked out and not kept: {cut(str(error))}")
        return profile

    @classmethod
    def load(cls, path: Path | str) -> Profile:
        """A saved profile; `UserError` when the folder holds none."""
        path = Path(path)
        try:
            meta = ProfileMeta.model_validate_json((path / "meta.json").read_text(encoding="utf-8"))
            frames = {name: pd.read_parquet(path / f"{name}.parquet") for name in FRAMES}
        except FileNotFoundError:
            raise UserError(f"{path} is not a profile; make one with 'avlprof analyze RUN'") from None
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"profile {path} cannot be read, delete it and analyze again: {reason}") from None
        return cls(meta, frames)

    def save(self, path: Path | str) -> Path:
        """Write the profile to a folder, `meta.json` last; returns the folder."""
        path = Path(path)
        (path / "meta.json").unlink(missing_ok=True)
        for name, frame in self.frames.items():
            with replacing(path / f"{name}.parquet") as partial:
                frame.to_parquet(partial, index=False)
        write_text(path / "meta.json", self.meta.model_dump_json(indent=2) + "\n")
        return path

    def __getitem__(self, name: str) -> pd.DataFrame:
        """A copy of a table: one of `avlprof.analysis.statistics.FRAMES`, `per_layer` or `horizon`.

        Raises:
            UserError: the name is unknown, or the table is of single heads and the run of head means.
        """
        if name in SUMMARIES:
            return self.per_layer() if name == "per_layer" else self.horizon()
        if name not in FRAMES:
            raise unknown("table", name, [*SUMMARIES, *FRAMES])
        if name in PER_HEAD and not self.meta.settings.per_head and self.frames[name].empty:
            raise UserError(f"run {self.meta.run} holds averages over heads only; trace with per_head")
        return self.frames[name].copy()

    def derive(
        self,
        budget: float | None = None,
        *,
        read_budget: float | None = None,
        coverage: float | None = None,
        allocator: str | Spread = "coverage",
        refresh_interval: int | None = None,
        scorer: str = RANKING,
        text: TextPolicy | float | None = None,
        name: str | None = None,
    ) -> Policy:
        """The policy that the profile suggests, either at a `budget` or at a `coverage`.

        Args:
            budget: prompt KV live after prefill over dense; gives `vision_keep`.
            read_budget: mean prompt KV read per decoding step over dense, beside `budget`; gives
                `vision_compute` and the refresh interval.
            coverage: share of attention to hold, without any budget. Each layer keeps the share of
                vision tokens that holds it for the last prompt row and for the whole answer,
                computes with what holds it for a single step, and has the text window that holds it
                beside the first text tokens.
            allocator: how a budget is spread over layers: a name of `avlprof.allocators`, or a
                `Spread`, which sets its knobs, its weight against uniform and the floor as well.
            refresh_interval: steps between refreshes of the core; by default `refresh_from_drift`.
            scorer: how the runtime ranks vision tokens; `valued:instruction` is `valued` over `instruction`.
            text: what stays of text at a budget, by default all of it; a share gives each layer the
                smallest recorded text window that holds so much of its text attention beside the
                first text tokens.
            name: of the policy; by default it says how it was derived.

        Raises:
            UserError: not exactly one of budget and coverage, a value out of range, or a budget below
                what system and text alone need.
        """
        if (budget is None) == (coverage is None):
            count = "neither" if budget is None else "both"
            raise UserError(f"give either budget or coverage to derive a policy, got {count}")
        spread = Spread(allocator) if isinstance(allocator, str) else allocator
        every = refresh_from_drift(self.frames["drift"]) if refresh_interval is None else refresh_interval
        if every < 0:
            raise UserError(f"refresh_interval must be 0 or more steps, got {every}")
        check_scorer(scorer)
        if budget is not None:
            kept = text_windows(self, text) if isinstance(text, float | int) else text or TextPolicy()
            policy = at_budget(self, budget, read_budget, spread, every, kept)
            label = derived_name(
                spread.allocator, spread, scorer, budget, read_budget, refresh_interval, text
            )
        else:
            if read_budget is not None or text is not None:
                raise UserError(
                    "coverage sets reads and text by itself; leave read_budget and text out, or give budget"
                )
            assert coverage is not None
            policy = at_coverage(self, coverage, spread.floor, every)
            label = derived_name("holding", spread, scorer, coverage, None, refresh_interval)
        origin = provenance(self, policy, budget, read_budget)
        ranked = ScorerSpec.of(scorer)
        return policy.model_copy(update={"name": name or label, "scorer": ranked, "provenance": origin})

    def with_heads(self, policy: Policy, heads: Heads) -> Policy:
        """The policy with one set a layer, one for each KV head, or counts that differ by KV head.

        `adaptive` counts are fixed: as the heads of the profile need them (`avlprof.analysis.heads`), so
        that its run has to be of single heads.

        Raises:
            UserError: the kind is unknown, the run is of averages over heads, or the policy has a core,
                which does not go with `adaptive`.
        """
        if heads not in get_args(Heads):
            raise unknown("kind of heads", heads, get_args(Heads))
        update: dict[str, Any] = {"heads": heads}
        if heads == "adaptive":
            shares = head_shares(self["heads"], self.layers, self.meta.settings.kv_heads)
            update |= {"head_floor": 1.0, "head_shares": shares}
        changed = Policy(**policy.model_dump(by_alias=True) | update)
        if what := unsupported(changed):
            raise UserError(f"heads: {heads} does not serve policy '{policy.name}': it would set {what}")
        return changed

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return self.meta.settings.layers

    @property
    def governed(self) -> tuple[int, ...] | None:
        """The layers that policies act on, and budgets are of; None means all."""
        return self.meta.settings.governed

    @property
    def answer_tokens(self) -> int:
        """Decoding steps of the mean answer: its tokens less the first, which prefill gives; at least 1."""
        return max(round(float(self.frames["samples"]["generated"].mean())) - 1, 1)

    def prompts(self) -> list[PromptShape]:
        """Token counts of every traced prompt."""
        counts = self.frames["samples"][["system", "vision", "text"]].to_numpy()
        group = scale_group(self.meta.settings.head_dim)
        return [PromptShape(int(a), int(b), int(c), self.governed, group) for a, b, c in counts]

    def horizon(self, threshold: float = 0.01) -> pd.DataFrame:
        """`query`: first layer from which on vision gets less than `threshold` of the attention.

        Columns and rule as in `avlprof.analysis.horizon`; samples without vision do not count.
        """
        samples, rows = self.frames["samples"], self.frames["by_sample"]
        seeing = samples.loc[samples["vision"] > 0, "sample"]
        return horizon(rows[rows["sample"].isin(seeing)], self.layers, threshold)

    def diff(self, other: Profile) -> pd.DataFrame:
        """`layer, phase, query, statistic`: this profile less another, as in `avlprof.analysis.diff`."""
        return diff(self, other)

    def evidence(self, use: Use = "store") -> Evidence:
        """What allocators may look at, as in `avlprof.analysis.derive.evidence`."""
        return evidence(self, use)

    def per_layer(self) -> pd.DataFrame:
        """One row a layer, means over samples, as in `avlprof.analysis.profile`."""
        return per_layer(self.frames, self.layers)
