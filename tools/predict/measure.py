"""Measure damage, and beside it what the attention of the dense model says of the same samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import torch
from numpy.typing import NDArray

import avlprof
from avlprof import Policy, Run, Space, TraceSettings, UserError
from avlprof.attention.session import switched
from avlprof.evaluation.knockout import KnockoutSettings, knockout
from avlprof.files import replacing
from avlprof.models import LoadedModel
from avlprof.models.generation import greedy
from avlprof.policy import RANKING, ScorerSpec
from avlprof.runtime.forced import ForcedSet
from avlprof.runtime.forced.prompt import Capture
from avlprof.tasks import Sample, Task
from avlprof.tracing import RecordOptions
from avlprof.tuning import Budget
from avlprof.tuning.evidence import LEVELS
from avlprof.watch import Watch

Array = NDArray[np.float64]

RANKINGS = (
    *("valued:instruction", "pooled:instruction", "instruction", "accumulated", "last_query", "window"),
    *("valued:last_query", "text_weighted", "key_norm", "key_diversity", "value_norm", "position", "random"),
)
"""Rankings that are compared with each other."""
OF_LAYERS = {
    "mass_vision": "attention on vision",
    "coverage_90": "tokens that hold 90% of it",
    "entropy": "entropy of a step's attention",
    "overlap_1": "tokens shared with the step before",
    "mass_sink": "attention on the first token",
    "window_95": "text window",
}
"""Statistics of layers while decoding: columns of a profile's `by_sample`, and what they are called."""


@dataclass(frozen=True)
class Plan:
    """A model, its task and how much is measured on it; layers and policies rank by `ranking`."""

    model: str
    task: str
    samples: int
    policies: int
    ranking: str = RANKING
    rankings: tuple[str, ...] = RANKINGS
    shares: tuple[float, ...] = (0.1, 0.2, 0.4)
    batch: int = 32


MAPS = {
    "answer": "attention of the answer",
    "answer_valued": "attention of the answer, times the value's norm",
    "question": "attention of the question",
    "question_valued": "attention of the question, times the value's norm",
}
"""Attention that vision tokens draw: what a policy drops of it may predict what the policy costs."""


@dataclass(frozen=True)
class Seen:
    """A sample as the dense model saw it.

    `maps[name] [L, V]` is what each vision token drew, mean over heads and over the answer's steps or the
    question's rows; `ranks[name] [L, V]` is each token's place by a ranking, best 0, one set a layer.
    """

    maps: dict[str, Array]
    ranks: dict[str, NDArray[np.int64]]

    def lost(self, ranking: str, keep: Array) -> dict[str, Array]:
        """Of each map, what lies `[L]` on the vision tokens that go if layers keep the shares `keep [L]`.

        `hindsight` is that of the answer if the tokens that it attended to most had stayed.
        """
        answer, ranks = self.maps["answer"], self.ranks[ranking]
        counts = np.floor(keep[:, None] * answer.shape[1] + 1e-9)
        lost: dict[str, Array] = {
            name: (drawn * (ranks >= counts)).sum(axis=1) for name, drawn in self.maps.items()
        }
        best = -np.sort(-answer, axis=1)
        lost["hindsight"] = (best * (np.arange(best.shape[1]) >= counts)).sum(axis=1)
        return lost


@dataclass(frozen=True)
class Bench:
    """A model at work; tables that lie in `folder` are not measured again."""

    plan: Plan
    folder: Path
    watch: Watch

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model."""
        return avlprof.load_model(self.plan.model)

    @cached_property
    def task(self) -> Task:
        """Its task."""
        return avlprof.load_task(self.plan.task)

    @property
    def rankings(self) -> list[str]:
        """All that is ranked by."""
        return list(dict.fromkeys((self.plan.ranking, *self.plan.rankings)))

    @cached_property
    def run(self) -> Run:
        """The search split, traced head by head."""
        settings = TraceSettings(record=RecordOptions(per_head=True))
        return avlprof.trace(
            self.loaded, self.task, self.plan.samples, settings, out=self.folder / "run", watch=self.watch
        )

    @cached_property
    def forced(self) -> ForcedSet:
        """The same samples with their dense answers."""
        return ForcedSet.prepare(
            self.loaded,
            self.task.samples("search", self.plan.samples),
            max_new_tokens=self.task.max_new_tokens,
            batch_size=self.plan.batch,
            scorers=[ScorerSpec.of(name) for name in self.rankings],
            watch=self.watch,
        )

    @cached_property
    def seen(self) -> list[Seen]:
        """What the dense model attended to, and how every ranking orders its tokens."""
        samples = self.task.samples("search", self.plan.samples)
        found = []
        for done, sample in enumerate(samples, start=1):
            found.append(self._seen(sample))
            self.watch.phase("rankings", done, len(samples))
        return found

    def _seen(self, sample: Sample) -> Seen:
        specs = [ScorerSpec.of(name) for name in (*self.rankings, "instruction", "value_norm")]
        observer = Capture(specs, keep_kv=False)
        inputs = self.loaded.adapter.encode_samples([sample])
        vision = self.loaded.adapter.vision_mask(inputs["input_ids"])[0]
        with torch.inference_mode(), switched(self.loaded.model, observers=(observer,)):
            greedy(self.loaded.model, inputs, [sample.id], max_new_tokens=1)
        drawn = {
            key: torch.stack([layer[0].mean(dim=0)[vision] for layer in layers])
            for key, layers in observer.scores.items()
        }
        question, norm = (
            drawn[ScorerSpec.of(name).key].numpy().astype(np.float64)
            for name in ("instruction", "value_norm")
        )
        decode = self.run.scores(sample.id, ["decode"])["decode"].astype(np.float64)
        answer = decode.mean(axis=0) if len(decode) else np.zeros_like(question)
        maps = {"answer": answer, "answer_valued": answer * norm}
        maps |= {"question": question, "question_valued": question * norm}
        ranks = {}
        for name in self.rankings:
            order = drawn[ScorerSpec.of(name).key].argsort(dim=-1, descending=True, stable=True)
            ranks[name] = order.argsort(dim=-1).numpy()
        return Seen(maps, ranks)

    def lost(self, sample: int, keep: Array) -> dict[str, Array]:
        """`Seen.lost` of a sample by number, under the plan's ranking."""
        return self.seen[sample].lost(self.plan.ranking, keep)

    def score(self, policies: Sequence[Policy], phase: str) -> Array:
        """KL to dense of every policy and sample, `[P, S]` in nat a token."""
        found = []
        for start in range(0, len(policies), 16):
            found += self.forced.score_many(policies[start : start + 16])
            self.watch.phase(phase, len(found), len(policies))
        return np.array([[score.kl for score in scores] for scores in found])

    def table(self, name: str) -> pd.DataFrame:
        """A table by name, measured unless the folder holds it."""
        path = self.folder / f"{name}.csv"
        if not path.exists():
            frame = MEASURES[name](self)
            with replacing(path) as temporary:
                frame.to_csv(temporary, index=False)
        return pd.read_csv(path)


def layers(bench: Bench) -> pd.DataFrame:
    """A row a sample, layer and level: `kl` if that layer alone keeps `level`, statistics, what it drops."""
    count, levels = bench.loaded.adapter.layers, [level for level in LEVELS if level < 1]
    cases = [(layer, level) for layer in range(count) for level in levels]
    alone = [
        Policy(
            vision_keep=tuple(level if other == layer else 1.0 for other in range(count)),
            scorer=ScorerSpec.of(bench.plan.ranking),
        )
        for layer, level in cases
    ]
    kl = bench.score(alone, "layers")
    statistics = bench.run.profile()["by_sample"].query("query == 'generated'")
    statistics = statistics.set_index(["sample", "layer"])[list(OF_LAYERS)]
    rows = []
    for case, (layer, level) in enumerate(cases):
        keep = np.full(count, level)
        for number, sample in enumerate(bench.forced.samples):
            lost = {name: one[layer] for name, one in bench.lost(number, keep).items()}
            told = statistics.loc[(sample, layer)].to_dict() if (sample, layer) in statistics.index else {}
            rows.append(
                {"sample": sample, "layer": layer, "level": level, "kl": kl[case, number]} | told | lost
            )
    return pd.DataFrame(rows)


def rankings(bench: Bench) -> pd.DataFrame:
    """A row a sample, ranking and share: `kl` of the flat policy, and what it drops of every map."""
    cases = [(name, share) for name in bench.plan.rankings for share in bench.plan.shares]
    flat = [Policy(vision_keep=share, scorer=ScorerSpec.of(name)) for name, share in cases]
    kl, count = bench.score(flat, "rankings"), bench.loaded.adapter.layers
    return pd.DataFrame(
        {"sample": sample, "ranking": name, "share": share, "kl": kl[case, number]}
        | {key: lost.sum() for key, lost in bench.seen[number].lost(name, np.full(count, share)).items()}
        for case, (name, share) in enumerate(cases)
        for number, sample in enumerate(bench.forced.samples)
    )


def policies(bench: Bench) -> pd.DataFrame:
    """A row a sample, share and random policy: `kl` and what predicts it.

    Policies are drawn from the search space by chance, in 16 bits and one set of tokens a layer. A map's
    column is what they drop of it, summed over layers; `probe` the damage of each layer alone at what it
    keeps, summed, between the levels by straight lines; `least` the smallest kept share of a layer, negated.
    """
    rows = []
    curves = damage_curves(bench)
    for share in bench.plan.shares:
        drawn = list(_drawn(bench, share))
        kl = bench.score([policy for _, policy in drawn], f"policies at {share:.0%}")
        for number, sample in enumerate(bench.forced.samples):
            for case, (allocator, policy) in enumerate(drawn):
                keep = np.array(policy.keep(bench.loaded.adapter.layers))
                probe = sum(
                    np.interp(k, LEVELS, curve) for k, curve in zip(keep, curves[number], strict=True)
                )
                rows.append(
                    {
                        "sample": sample,
                        "share": share,
                        "policy": case,
                        "allocator": allocator,
                        "kl": kl[case, number],
                        "probe": probe,
                        "least": -keep.min(),
                    }
                    | {key: lost.sum() for key, lost in bench.lost(number, keep).items()}
                )
    return pd.DataFrame(rows)


def damage_curves(bench: Bench) -> Array:
    """Damage of each sample and layer at `LEVELS`, `[S, L, levels]`; nothing where all is kept."""
    table = bench.table("layers").pivot_table(index="sample", columns=["layer", "level"], values="kl")
    known = table.loc[bench.forced.samples].to_numpy().reshape(len(table), -1, len(LEVELS) - 1)
    return np.concatenate([known, np.zeros((*known.shape[:2], 1))], axis=2)


def _drawn(bench: Bench, share: float) -> Iterator[tuple[str, Policy]]:
    """Policies by chance that keep a share of the vision KV, each with its allocator's name."""
    profile = bench.run.profile()
    damage = damage_curves(bench).mean(axis=0)
    evidence = replace(profile.evidence(), damage=damage, damage_levels=np.array(LEVELS))
    counts = profile["samples"][["system", "vision", "text"]].sum()
    fixed = float((counts["system"] + counts["text"]) / counts.sum())
    budget = Budget(
        fixed + share * (1 - fixed), None, tuple(bench.forced.shapes), round(bench.forced.answer_tokens)
    )
    space = Space(scorers=(bench.plan.ranking,), heads=("shared",), bits=(16,), text="all")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=round(1000 * share)))
    space = space.within(budget, evidence.layers).supported(evidence)
    for _ in range(bench.plan.policies):
        candidate = space.suggest(study.ask(), budget)
        try:
            yield candidate.allocator, candidate.policy(evidence, budget)
        except UserError:
            continue


def heads(bench: Bench) -> pd.DataFrame:
    """A row a sample and query head: `kl` when its answer rows may not look at vision, its statistics."""
    settings = KnockoutSettings(
        samples=bench.plan.samples,
        routes=("answer-to-vision",),
        heads=True,
        answers=False,
        batch_size=bench.plan.batch,
    )
    losses = knockout(bench.loaded, bench.task, settings, watch=bench.watch).losses
    losses = losses[losses["head"] >= 0][["sample", "layer", "head", "kl"]]
    stats = bench.run.stats().query("head >= 0 and query == 'generated'")
    stats = stats[["sample", "layer", "head", *(name for name in OF_LAYERS if name in stats)]]
    return losses.merge(stats, on=["sample", "layer", "head"], how="left")


MEASURES = {"layers": layers, "rankings": rankings, "policies": policies, "heads": heads}
