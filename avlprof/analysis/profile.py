"""One row a layer: the summary of a profile."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict

from avlprof.allocators import Evidence
from avlprof.analysis.coverage import coverage
from avlprof.analysis.derive import Use, derive, evidence
from avlprof.analysis.diff import diff
from avlprof.analysis.heads import HeadMoments
from avlprof.analysis.horizon import horizon
from avlprof.analysis.scan import Progress, scan_scores
from avlprof.analysis.tables import drift, entropy, head_mean, mass, sinks
from avlprof.analysis.window import by_sample, reach, window, window_curve
from avlprof.errors import UserError
from avlprof.files import replacing, write_text
from avlprof.policy import Policy, PromptShape
from avlprof.runs import RunDirectory, RunMeta


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

    found = pd.DataFrame(
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
    return found.reset_index()


def answered(frames: Mapping[str, pd.DataFrame]) -> str:
    """The query rows that stand for the answer: `generated`, or `last` in a run without decoding."""
    return "generated" if (frames["entropy"]["query"] == "generated").any() else "last"


FRAMES = (
    "samples",
    "mass",
    "entropy",
    "coverage",
    "coverage_curve",
    "overlap",
    "drift",
    "window",
    "window_curve",
    "sinks",
    "concentration",
    "heads",
    "head_overlap",
    "by_sample",
)


class ProfileMeta(BaseModel):
    """The `meta.json` of a profile: the run it was made from and that run's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_: Literal["avlprof.profile/1"] = "avlprof.profile/1"
    run: str
    run_hash: str
    samples: int
    settings: RunMeta


@dataclass(frozen=True)
class Profile:
    """Per-layer statistics of a run as tidy frames.

    Every frame but `samples` and `by_sample` has the columns `mean, low, high` (95% t-interval
    over samples, NaN with fewer than two) and `n`, the samples counted. `layer` counts from 0;
    `phase` and `query` name the query rows as in the run directory. Curves, overlaps and
    concentration come from the vision scores and have the queries `last`, `instruction`, `step`
    (one decoding step, mean over steps) and `answer` (all steps together).
    """

    meta: ProfileMeta
    frames: Mapping[str, pd.DataFrame]

    @classmethod
    def from_run(cls, run: RunDirectory, progress: Progress | None = None) -> Profile:
        """Compute the profile of a run; `progress` is called with samples done and their total.

        Raises:
            UserError: the run holds no finished sample.
        """
        samples, settings = run.samples(), run.meta
        vision = samples.set_index("sample")["vision"]
        heads, means = HeadMoments(settings.layers, settings.heads, settings.coverages, settings.lags), []
        for part in run.parts():
            stats = pd.read_parquet(run.path / f"stats-{part}.parquet")
            heads.add(stats, vision)
            means.append(head_mean(stats))
        rows = pd.concat(means, ignore_index=True)
        levels = settings.coverages
        reached = reach(rows, settings.distances, int((samples["text"] + samples["generated"]).max()))
        scanned = scan_scores(run, list(vision.index[vision > 0]), int(vision.max()), progress)
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
        meta = ProfileMeta(run=str(run.path), run_hash=run.hash, samples=len(samples), settings=settings)
        return cls(meta, frames)

    @classmethod
    def of(cls, run: RunDirectory, progress: Progress | None = None) -> Profile:
        """The profile saved in a run directory if it is of all its samples, else a new one, saved."""
        with contextlib.suppress(UserError):
            known = cls.load(run.path / "profile")
            if known.meta.run_hash == run.hash:
                return known
        made = cls.from_run(run, progress)
        made.save(run.path / "profile")
        return made

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

    def derive(self, **options: Any) -> Policy:
        """A policy at a budget or at a coverage; options as in `avlprof.analysis.derive`."""
        return derive(self, **options)

    @property
    def layers(self) -> int:
        """Decoder layers of the model."""
        return self.meta.settings.layers

    @property
    def answer_tokens(self) -> int:
        """Decoding steps of the mean answer: its tokens less the first, which prefill gives; at least 1."""
        return max(round(float(self.frames["samples"]["generated"].mean())) - 1, 1)

    def prompts(self) -> list[PromptShape]:
        """Token counts of every traced prompt."""
        counts = self.frames["samples"][["system", "vision", "text"]].to_numpy()
        return [PromptShape(*(int(count) for count in row)) for row in counts]

    def mass(self) -> pd.DataFrame:
        """`layer, phase, query, modality`: share of attention; the means of a row sum to 1."""
        return self.frames["mass"].copy()

    def entropy(self) -> pd.DataFrame:
        """`layer, phase, query`: row entropy in nat."""
        return self.frames["entropy"].copy()

    def coverage(self) -> pd.DataFrame:
        """`layer, phase, query, level`: share of vision tokens that hold `level` percent; and `tokens`."""
        return self.frames["coverage"].copy()

    def coverage_curve(self) -> pd.DataFrame:
        """`layer, query, share_kept`: share of vision attention that the best tokens hold."""
        return self.frames["coverage_curve"].copy()

    def overlap(self) -> pd.DataFrame:
        """`layer_a, layer_b, query`: PPCI of two layers' top sets, for `last` and `step`."""
        return self.frames["overlap"].copy()

    def drift(self) -> pd.DataFrame:
        """`layer, lag`: overlap of a layer's top set with the one `lag` decoding steps before."""
        return self.frames["drift"].copy()

    def window(self) -> pd.DataFrame:
        """`layer, phase, query, level`: tokens of the smallest text window holding `level` percent."""
        return self.frames["window"].copy()

    def window_curve(self) -> pd.DataFrame:
        """`layer, phase, query, distance`: share of text mass, sinks aside, below a distance."""
        return self.frames["window_curve"].copy()

    def sinks(self) -> pd.DataFrame:
        """`layer, phase, query, sink`: share of attention on the `first` token and the `text` sink."""
        return self.frames["sinks"].copy()

    def concentration(self) -> pd.DataFrame:
        """`layer, query, statistic`: `sparsity`, `entropy` (nat) and `skewness` of the vision scores."""
        return self.frames["concentration"].copy()

    def heads(self) -> pd.DataFrame:
        """`layer, head, phase, query, statistic`: masses, `entropy`, coverage and drift by head.

        Statistics as in `HeadMoments.table`; `UserError` in a run of head averages.
        """
        return self._of_heads("heads")

    def head_overlap(self) -> pd.DataFrame:
        """`layer_a, head_a, layer_b, head_b, query`: PPCI of single heads' top sets.

        Heads of one layer against each other, and with `head_b` -1 every head against the set of
        `layer_b`'s head mean; for `last` and `step`. `UserError` in a run of head averages.
        """
        return self._of_heads("head_overlap")

    def by_sample(self) -> pd.DataFrame:
        """`sample, layer, phase, query` and a column a statistic: what the means are made of."""
        return self.frames["by_sample"].copy()

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
        """What allocators may look at, as in `avlprof.analysis.derive`."""
        return evidence(self, use)

    def per_layer(self) -> pd.DataFrame:
        """One row a layer, means over samples, as in `avlprof.analysis.profile`."""
        return per_layer(self.frames, self.layers)

    def _of_heads(self, name: str) -> pd.DataFrame:
        if not self.meta.settings.per_head and self.frames[name].empty:
            raise UserError(f"run {self.meta.run} holds averages over heads only; trace with --per-head")
        return self.frames[name].copy()
