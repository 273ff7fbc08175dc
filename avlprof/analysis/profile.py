"""The profile: what a model attends to, layer by layer, with intervals over samples."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from avlprof.allocators import Evidence
from avlprof.analysis.coverage import coverage
from avlprof.analysis.derive import derive
from avlprof.analysis.drift import drift
from avlprof.analysis.head_mean import head_mean
from avlprof.analysis.mass import entropy, mass
from avlprof.analysis.scan import Progress, scan_scores
from avlprof.analysis.window import reach, window, window_curve
from avlprof.errors import UserError
from avlprof.files import replacing, write_text
from avlprof.policy import Policy, PromptShape
from avlprof.runs import RunDirectory, RunMeta

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

    Every frame but `samples` has the columns `mean, low, high` (95% t-interval over samples, NaN
    with fewer than two) and `n`, the samples counted. `layer` counts from 0; `phase` and `query`
    name the query rows as in the run directory. Curves and overlaps come from the vision scores
    and have the queries `last`, `instruction`, `step` (one decoding step, mean over steps) and
    `answer` (all steps together).
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
        parts = (pd.read_parquet(run.path / f"stats-{part}.parquet") for part in run.parts())
        rows = pd.concat([head_mean(part) for part in parts], ignore_index=True)
        reached = reach(rows, settings.distances, int((samples["text"] + samples["generated"]).max()))
        curves, overlap = scan_scores(run, list(vision.index[vision > 0]), int(vision.max()), progress)
        frames = {
            "samples": samples[["sample", "system", "vision", "text", "generated"]],
            "mass": mass(rows),
            "entropy": entropy(rows),
            "coverage": coverage(rows, vision, settings.coverages),
            "coverage_curve": curves,
            "overlap": overlap,
            "drift": drift(rows, settings.lags),
            "window": window(reached, settings.coverages),
            "window_curve": window_curve(reached),
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

    def evidence(self, use: Literal["store", "compute"] = "store") -> Evidence:
        """What allocators may look at.

        To `store`, a layer must serve the prompt's last row and the whole answer, so its curve is
        the lower of `last` and `answer`; to `compute`, it must serve a single `step`. A run
        without decoding has `last` alone.

        Raises:
            UserError: no sample has vision tokens.
        """
        curves = self.frames["coverage_curve"]
        if curves.empty:
            raise UserError(
                f"run {self.meta.run} has no vision tokens to spread a budget over; trace with images"
            )
        wanted = {"store": ("last", "answer"), "compute": ("step",)}[use]
        found = [query for query in wanted if (curves["query"] == query).any()] or ["last"]
        tokens = int(self.frames["samples"]["vision"].max())
        tables = [
            curves[curves["query"] == query].pivot(index="layer", columns="share_kept", values="mean")
            for query in found
        ]
        counts = np.arange(1, tokens + 1) / tokens
        lower = np.minimum.reduce([table.to_numpy() for table in tables])
        shares = np.concatenate([[0.0], tables[0].columns.to_numpy(dtype=np.float64)])
        held = [np.interp(counts, shares, np.concatenate([[0.0], row])) for row in lower]
        per_layer = self.per_layer()
        decoded = per_layer["vision_decode"].notna().all()
        return Evidence(
            layers=self.layers,
            tokens=tokens,
            coverage=np.stack(held),
            vision_mass=per_layer["vision_decode" if decoded else "vision_last"].to_numpy(),
            entropy=per_layer["entropy"].to_numpy(),
        )

    def per_layer(self) -> pd.DataFrame:
        """One row a layer for the terminal; means over samples, NaN where nothing was recorded.

        `vision_last` and `vision_decode` are attention on vision by the last prompt row and
        while decoding. The others are of decoding steps, or of the last prompt row in a run
        without: `coverage_90` (share of vision tokens), `overlap_8` (drift), `window_95` (text
        tokens), `entropy` (nat).
        """
        vision = self.frames["mass"].query("modality == 'vision'")
        decoded = (self.frames["entropy"]["query"] == "generated").any()
        query = "generated" if decoded else "last"

        def column(name: str, **where: Any) -> pd.Series[float]:
            table = vision if name == "vision" else self.frames[name]
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
            index=pd.RangeIndex(self.layers, name="layer"),
        )
        return found.reset_index()
