"""What the folders of a model hold, as numbers with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from avlprof import Policy, Run, Study
from avlprof.analysis import Profile, findings
from avlprof.evaluation import PairedDifference, mean_interval, paired_difference
from avlprof.policy import Score
from avlprof.policy.provenance import Proof
from avlprof.tuning.rivals import SAME, UNIFORM
from tools.evidence.measure import (
    BY_CHANCE,
    FLAT_BY_CHANCE,
    NO_LAYER,
    OTHER_HEADS,
    OTHER_RANKING,
    TEXT_FULL,
    VISION_FULL,
    strongest,
)
from tools.evidence.plan import Plan, memory_budget
from tools.evidence.search import best_known

NOTHING, HALF = 0.01, 0.5
"""Below the first a layer keeps next to no vision KV; from the second on it keeps half or more."""
RESAMPLES = 2000


@dataclass(frozen=True)
class Knob:
    """What one thing that the search can turn is worth: KL saved by it, above 0 when it helps."""

    short: str
    name: str
    gap: PairedDifference


@dataclass(frozen=True)
class Origin:
    """Where a tuned policy comes from: the best scalar trial, and whether its layers were moved after it.

    `start`: the trial is one of the fixed first ones, which no sampler proposed. `split`: the probe split its
    bytes over layers, in tokens and bits, before they were moved.
    """

    trial: int
    allocator: str
    start: bool
    refined: bool
    split: bool = False

    @classmethod
    def of(cls, study: Study, policy: Policy, starts: int) -> Origin:
        """That of a study's policy; `starts` fixed trials come first."""
        trials, proved = study.trials(), policy.provenance
        number = int(trials["trial"].iloc[0])  # what was refined is the best
        if proved is not None and proved.trial is not None:
            refined = proved.refined
            number = number if refined else proved.trial
        else:
            refined = study.export(trial=number).hash != policy.hash
        best = trials[trials["trial"] == number].iloc[0]
        split = refined and isinstance(policy.vision_bits, tuple)
        return cls(number, str(best["allocator"]), number < starts, refined, split)

    @property
    def sentence(self) -> str:
        """Who found it, in words."""
        who = "one of the fixed starts, which needs no sampler" if self.start else "proposed by the sampler"
        moved = "; then its layers were moved one by one" if self.refined else ""
        if self.split:
            return f"ranking and heads are trial {self.trial}'s: {who}; the probe split its bytes{moved}"
        return f"its shares are allocator `{self.allocator}`'s, trial {self.trial}: {who}{moved}"


@dataclass(frozen=True)
class AtShare:
    """One budget: the tuned policy, methods at its bytes on held-out samples, and its proof.

    `table` is what was compared and `proof` what was generated; None where that is not done.
    """

    share: float
    policy: Policy
    proof: pd.DataFrame | None
    table: pd.DataFrame | None
    origin: Origin

    @property
    def proved(self) -> Proof | None:
        """What the proof of the study says of answers that were generated; None before it is done."""
        return self.policy.provenance.proof if self.policy.provenance else None

    def scores(self) -> dict[str, Score]:
        """The task's metric of each policy of the proof."""
        assert self.proof is not None
        columns = self.proof[["policy", "score", "low", "high", "samples"]].itertuples(index=False)
        return {str(n): Score(mean=m, low=a, high=b, samples=int(c)) for n, m, a, b, c in columns}

    @cached_property
    def strongest(self) -> str:
        """The rival that was closest to dense on the samples of the search."""
        assert self.table is not None
        return strongest(self.table)

    @property
    def methods(self) -> list[str]:
        """Methods that were scored on held-out samples."""
        return list(dict.fromkeys(self._held_out["method"]))

    @property
    def live_share(self) -> float:
        """Prompt KV of the winner on held-out samples, over dense."""
        rows = self._held_out
        return float(rows.loc[rows["method"] == "tuned", "live_share"].iloc[0])

    @property
    def flat(self) -> str:
        """The method that differs from the winner in its layers alone; the winner itself if it is flat."""
        if SAME in self.methods:
            return SAME
        return "tuned" if self.policy.packs or self.policy.text.packs else UNIFORM

    def of(self, method: str, column: str = "kl") -> Score:
        """Mean of a method over held-out samples, with its interval."""
        return mean_interval(self.values(method, column))

    def saved(self, method: str, than: str = "tuned") -> PairedDifference:
        """KL of a method less that of another, paired by sample: above 0 when the other is closer."""
        return paired_difference(self.values(method), self.values(than))

    def values(self, method: str, column: str = "kl") -> np.ndarray:
        """One number a held-out sample, in the order of their ids."""
        rows = self._held_out[self._held_out["method"] == method]
        return rows.sort_values("sample")[column].to_numpy(dtype=float)

    def knobs(self) -> list[Knob]:
        """What layers, ranking and heads are worth in the winner."""
        here = set(self.methods)
        ranking = self.policy.scorer
        name = ":".join([ranking.name, *map(str, ranking.options.values())])
        kind = {"kv_head": "a set of tokens for each KV head", "shared": "one set of tokens a layer"}
        wanted = [
            ("layers", "layers: its shares, not the same in every layer", self.flat, "tuned"),
            (
                "layers under chance",
                "layers under chance: the same, tokens by chance",
                FLAT_BY_CHANCE,
                BY_CHANCE,
            ),
            ("bits of vision", "bits of vision: its own, not 16", VISION_FULL, "tuned"),
            ("bits of text", "bits of text: its own, not 16", TEXT_FULL, "tuned"),
            ("ranking over chance", "ranking over chance: its own, not by chance", BY_CHANCE, "tuned"),
            (
                "ranking over A-VL's",
                f"ranking over A-VL's: `{name}`, not `last_query`",
                OTHER_RANKING,
                "tuned",
            ),
            ("heads", f"heads: {kind[self.policy.heads]}, not the other way", OTHER_HEADS, "tuned"),
        ]
        return [
            Knob(short, text, self.saved(a, b)) for short, text, a, b in wanted if {a, b} <= here and a != b
        ]

    @property
    def _held_out(self) -> pd.DataFrame:
        assert self.table is not None
        return self.table[self.table["split"] == "held-out"]


@dataclass(frozen=True)
class Measured:
    """Everything that is known of a model; what is None is not measured yet."""

    plan: Plan
    profile: Profile
    heads: Profile | None
    damage: pd.DataFrame | None
    budgets: tuple[AtShare, ...]
    missing: tuple[float, ...]

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.profile.layers

    @property
    def vision(self) -> int:
        """Vision tokens of a prompt, mean over those traced."""
        return round(float(self.profile["samples"]["vision"].mean()))

    @property
    def proved(self) -> list[AtShare]:
        """Budgets at which answers were generated."""
        return [at for at in self.budgets if at.proof is not None and at.proved is not None]

    @property
    def compared(self) -> list[AtShare]:
        """Budgets at which methods were scored on held-out samples."""
        return [at for at in self.budgets if at.table is not None]

    def sentences(self) -> list[str]:
        """What the profile says in words."""
        return findings(self.profile)

    def head_shares(self) -> pd.DataFrame:
        """Attention on vision of each head while decoding, `layer, head, mean, low, high, n`, most first."""
        assert self.heads is not None
        rows = self.heads["heads"].query("query == 'generated' and statistic == 'vision'")
        return rows.sort_values("mean", ascending=False, ignore_index=True)

    def head_overlap(self) -> pd.DataFrame:
        """Overlap of each head's top tokens with its layer's own set, by layer: `mean, low, high, n`."""
        assert self.heads is not None
        table = self.heads["head_overlap"].query("query == 'step' and layer_a == layer_b and head_b < 0")
        return table.sort_values("mean", ignore_index=True)

    def attention(self) -> pd.DataFrame:
        """Attention on vision by layer while decoding: `layer, mean, low, high, n`."""
        mass = self.profile["mass"]
        rows = mass[(mass["modality"] == "vision") & (mass["query"] == "generated")]
        return rows.sort_values("layer")[["layer", "mean", "low", "high", "n"]]

    def layer_damage(self) -> list[Score]:
        """KL to dense when one layer alone has no vision KV, layer by layer; the last is of all layers."""
        assert self.damage is not None
        order = [*range(self.layers), NO_LAYER]
        return [mean_interval(self.damage.loc[self.damage["layer"] == layer, "kl"]) for layer in order]

    def agreement(self) -> tuple[float, float, float, int]:
        """Rank correlation of layers' attention on vision with what they lose, its 95%, and how many."""
        looks = self.attention()["mean"].to_numpy(dtype=float)
        loses = np.array([score.mean for score in self.layer_damage()[:-1]])
        rng, again = np.random.default_rng(0), []
        for _ in range(RESAMPLES):
            pick = rng.integers(len(looks), size=len(looks))
            if np.ptp(looks[pick]) > 0 and np.ptp(loses[pick]) > 0:
                again.append(float(spearmanr(looks[pick], loses[pick]).statistic))
        low, high = np.percentile(again, (2.5, 97.5))
        return float(spearmanr(looks, loses).statistic), float(low), float(high), len(looks)


def read(plan: Plan, folder: Path, shares: Sequence[float]) -> Measured | None:
    """What a folder holds of a plan, with the samples that are there; None where not even a run is."""
    if not (folder / "run" / "meta.json").exists():
        return None
    profile = Run.open(folder / "run").profile()
    budgets, missing = [], []
    for share in shares:
        study = folder / "studies" / f"b{memory_budget(profile, share):g}"
        policy = best_known(study)
        if policy is None:
            missing.append(share)
            continue
        proof = _table(study / "proof.csv") if (study / "policy.yaml").exists() else None
        starts = len(plan.space.starts()) + (study / "starts.json").exists()
        origin = Origin.of(Study.open(study), policy, starts)
        budgets.append(AtShare(share, policy, proof, _table(folder / f"compared-{share:g}.csv"), origin))
    heads = Run.open(folder / "heads").profile() if (folder / "heads" / "meta.json").exists() else None
    damage = _table(folder / "layers.csv")
    counted = {"traced": profile.meta.samples, "heads": heads.meta.samples if heads else None}
    counted["held_out"] = None if damage is None else int(damage["sample"].nunique())
    return Measured(plan.sized(counted), profile, heads, damage, tuple(budgets), tuple(missing))


def _table(path: Path) -> pd.DataFrame | None:
    return pd.read_csv(path) if path.exists() else None
