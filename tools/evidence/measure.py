"""Trace, tune and compare one model; what lies in its folder already is not done again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

import avlprof
from avlprof import Policy, Run, TraceSettings, UserError
from avlprof.evaluation.lineup import equal_bytes, seeded, shipped_baselines
from avlprof.files import replacing
from avlprof.models import LoadedModel
from avlprof.policy import FULL, RANKING, ScorerSpec, live_share
from avlprof.runtime.forced import ForcedSet
from avlprof.tasks import Task
from avlprof.tracing import RecordOptions
from avlprof.tuning import Budget
from avlprof.tuning.candidate import spread
from avlprof.tuning.rivals import ROW, rivals, shipped_rivals
from avlprof.watch import Watch
from tools.evidence.plan import Plan, memory_budget
from tools.evidence.search import best_known, search

COLUMNS = ("method", "kind", "split", "sample", "kl", "agreement", "live_share", "policy")
LAYER_COLUMNS = ("layer", "sample", "kl", "agreement")
NO_LAYER = -1
"""Stands in the column `layer` where every layer is without vision KV."""

OTHER_RANKING, BY_CHANCE, OTHER_HEADS = "tuned, A-VL's ranking", "tuned, random tokens", "tuned, other heads"
FLAT_BY_CHANCE = "flat, random tokens"
"""The same bytes and bits in every layer, tokens by chance."""
VISION_FULL, TEXT_FULL = "tuned, vision in 16 bits", "tuned, text in 16 bits"
DERIVED = "derived from attention"


@dataclass(frozen=True)
class Bench:
    """A model at work: what is loaded and prefilled is kept for all that follows."""

    plan: Plan
    folder: Path
    shares: Sequence[float]
    watch: Watch

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model."""
        return avlprof.load_model(self.plan.model)

    @cached_property
    def task(self) -> Task:
        """Its task."""
        return avlprof.load_task(self.plan.task)

    @cached_property
    def run(self) -> Run:
        """The traced run; what it lacks is traced."""
        return avlprof.trace(
            self.loaded, self.task, self.plan.traced, out=self.folder / "run", watch=self.watch
        )

    def by_head(self) -> Run:
        """A run of fewer samples that keeps every head apart."""
        settings = TraceSettings(record=RecordOptions(per_head=True))
        out, count = self.folder / "heads", self.plan.heads
        return avlprof.trace(self.loaded, self.task, count, settings, out=out, watch=self.watch)

    @property
    def studies(self) -> Path:
        """The folder of the searches."""
        return self.folder / "studies"

    def budget(self, share: float) -> float:
        """The budget of prompt KV that leaves a share of the vision KV."""
        return memory_budget(self.run.profile(), share)

    def winner(self, share: float) -> Policy | None:
        """The tuned policy at a share of the vision KV, if it is found."""
        return best_known(self.studies / f"b{self.budget(share):g}")

    def forced(self, split: str, count: int) -> ForcedSet:
        """Samples of a split with dense answers, prefilled."""
        return ForcedSet.prepare(
            self.loaded,
            self.task.samples(split, count),
            max_new_tokens=self.task.max_new_tokens,
            batch_size=self.plan.batch,
            scorers=self.scorers,
            watch=self.watch,
        )

    @property
    def scorers(self) -> list[ScorerSpec]:
        """Rankings that a compared policy may ask for: any other would cost a run of the prompts."""
        known = [ScorerSpec.of(name) for name in self.plan.space.scorers]
        known += [ScorerSpec.of(name) for name in (RANKING, ROW, "random")]
        known += [policy.scorer for policy in shipped_baselines() if policy.joint is None]
        return [spec for number, spec in enumerate(known) if spec not in known[:number]]

    @cached_property
    def searched(self) -> ForcedSet:
        """The samples of the search, on which the strongest rival is picked."""
        return self.forced("search", self.plan.samples)

    @cached_property
    def held_out(self) -> ForcedSet:
        """The samples that no search saw."""
        return self.forced("held-out", self.plan.held_out)


def find(bench: Bench) -> None:
    """The trials at every budget."""
    budgets = [bench.budget(share) for share in bench.shares]
    search(
        bench.loaded, bench.task, bench.run.profile(), bench.studies, budgets,
        bench.plan.settings(), bench.watch,
    )  # fmt: skip


def prove(bench: Bench) -> None:
    """Prove the winner of every budget on generated answers, unless all are proved."""
    budgets = [bench.budget(share) for share in bench.shares]
    if all((bench.studies / f"b{budget:g}" / "policy.yaml").exists() for budget in budgets):
        return
    avlprof.sweep(
        bench.loaded, bench.task, budgets, bench.plan.settings(),
        run=bench.run, out=bench.studies, watch=bench.watch,
    )  # fmt: skip


def compare(bench: Bench) -> None:
    """Score every method on held-out samples against dense, and what each layer is worth there."""
    path = bench.folder / "layers.csv"
    if not is_whole(path, bench.plan.held_out, ()):
        write(path, layer_damage(bench.held_out, bench.loaded.adapter.layers, bench.watch))
    for number, share in enumerate(bench.shares):
        winner, path = bench.winner(share), bench.folder / f"compared-{share:g}.csv"
        if winner and not is_whole(path, bench.plan.held_out, (winner.hash,)):
            write(path, at_equal_bytes(bench, winner))
        bench.watch.phase("budgets", number + 1, len(bench.shares))


def layer_damage(forced: ForcedSet, layers: int, watch: Watch) -> pd.DataFrame:
    """KL to dense of each sample when one layer alone keeps no vision KV, and when none does."""
    rows = []
    for layer in (*range(layers), NO_LAYER):
        keep = tuple(0.0 if layer in (each, NO_LAYER) else 1.0 for each in range(layers))
        for score, sample in zip(forced.score(Policy(vision_keep=keep)), forced.samples, strict=True):
            rows.append((layer, sample, score.kl, score.agreement))
        watch.phase("layers", layer + 1 if layer >= 0 else layers + 1, layers + 1)
    return pd.DataFrame(rows, columns=list(LAYER_COLUMNS))


def at_equal_bytes(bench: Bench, winner: Policy) -> pd.DataFrame:
    """Tuned, its rivals and its knobs at the winner's bytes, sample by sample; columns `COLUMNS`.

    All rivals are scored on the samples of the search, where the strongest is picked; it and the named
    ones are scored on held-out samples as well.
    """
    winner = winner.model_copy(update={"name": "tuned", "provenance": None})
    named, shipped = everyone(bench, winner, bench.searched)
    parts = [
        scored(bench.searched, policies, kind, "search", bench.watch)
        for kind, policies in (("rival", named), ("shipped", shipped), ("tuned", [winner]))
    ]
    best = strongest(pd.concat(parts))
    named, shipped = everyone(bench, winner, bench.held_out)
    groups = {
        "tuned": [winner],
        "rival": named,
        "shipped": [policy for policy in shipped if policy.name == best],
        "derived": [derived(bench, winner)],
        "knob": knobs(winner, at_bytes(bench, winner, bench.held_out)),
    }
    for kind, policies in groups.items():
        parts.append(scored(bench.held_out, policies, kind, "held-out", bench.watch))
    return pd.concat(parts, ignore_index=True)


def strongest(table: pd.DataFrame) -> str:
    """The rival with the least KL on the samples of the search."""
    of_rivals = table[(table["split"] == "search") & table["kind"].isin(["rival", "shipped"])]
    return str(of_rivals.groupby("method")["kl"].mean().idxmin())


def at_bytes(bench: Bench, winner: Policy, forced: ForcedSet) -> Budget:
    """The winner's bytes on these samples."""
    memory = live_share(winner, forced.shapes, bench.loaded.adapter.layers)
    return Budget(memory, None, tuple(forced.shapes), max(round(forced.answer_tokens), 1))


def everyone(bench: Bench, winner: Policy, forced: ForcedSet) -> tuple[list[Policy], list[Policy]]:
    """Rivals by name and those that ship, at the winner's bytes, in one set of samples."""
    evidence, budget = bench.run.profile().evidence(), at_bytes(bench, winner, forced)
    named = rivals(winner, budget, evidence.layers)
    shipped, _ = shipped_rivals(winner, budget, evidence, named)
    # a prefill filter needs a prefill of its own for each policy, and is no part of what is searched
    return named, [policy for policy in shipped if not policy.prefill_filter]


def derived(bench: Bench, winner: Policy) -> Policy:
    """What the profile alone suggests at the winner's bytes."""
    memory = live_share(winner, bench.held_out.shapes, bench.loaded.adapter.layers)
    return bench.run.profile().derive(memory, name=DERIVED)


def knobs(winner: Policy, budget: Budget) -> list[Policy]:
    """The winner with one thing changed: ranking, tokens by chance, one set a layer or many, or bits.

    Those that differ in bits are scaled to the budget, with the winner's proportions between layers. Where
    everything is kept nothing is ranked, and bits alone can be changed.
    """
    layers = winner.layers or 1
    policies = []
    if min(winner.keep(layers)) < 1:
        other = "shared" if winner.heads == "kv_head" else "kv_head"
        changed: Mapping[str, dict[str, object]] = {
            OTHER_RANKING: {"scorer": ScorerSpec.of(ROW)},
            BY_CHANCE: {"scorer": ScorerSpec(name="random")},
            OTHER_HEADS: {"heads": other},
        }
        policies += [winner.model_copy(update={**update, "name": name}) for name, update in changed.items()]
        flat = equal_bytes(winner, budget.prompts, layers, budget.answer_tokens)
        by_chance = (policy for policy in flat if policy.scorer.name == "random")
        policies += [policy.model_copy(update={"name": FLAT_BY_CHANCE}) for policy in by_chance]
    texts = {VISION_FULL: winner.text, TEXT_FULL: winner.text.model_copy(update={"bits": FULL})}
    for name, text in texts.items():
        bits = FULL if name == VISION_FULL else winner.vision_bits
        policy = winner.model_copy(update={"name": name, "vision_bits": bits, "text": text})
        if policy.hash != winner.hash and budget.affords(text, layers, refreshed=0.0):
            policies.append(spread(policy, winner.keep(layers), budget))
    return [policy for policy in policies if policy.hash != winner.hash]


def scored(
    forced: ForcedSet, policies: Iterable[Policy], kind: str, split: str, watch: Watch
) -> pd.DataFrame:
    """A row a policy and sample, mean over the seeds of a random one; columns `COLUMNS`."""
    policies, rows = list(policies), []
    for number, policy in enumerate(policies):
        layers = policy.layers or 1
        live = live_share(policy, forced.shapes, layers)
        try:
            runs = [forced.score(run) for run in seeded(policy)]
        except UserError as error:  # what cannot be scored in one forward takes no part
            watch.say(f"{policy.name} is left out: {error}")
            continue
        for seeds, sample in zip(zip(*runs, strict=True), forced.samples, strict=True):
            kl, agreement = (
                sum(getattr(score, name) for score in seeds) / len(seeds) for name in ("kl", "agreement")
            )
            rows.append((policy.name, kind, split, sample, kl, agreement, live, policy.hash))
        watch.phase(f"{split}: {kind}", number + 1, len(policies))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def is_whole(path: Path, samples: int, hashes: Sequence[str]) -> bool:
    """Whether a table is there, of so many held-out samples and of these policies."""
    if not path.exists():
        return False
    table = pd.read_csv(path)
    own = table[table["split"] == "held-out"] if "split" in table else table
    return own["sample"].nunique() == samples and (not hashes or set(hashes) <= set(table["policy"]))


def write(path: Path, table: pd.DataFrame) -> None:
    """A table as CSV, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        table.to_csv(partial, index=False)
