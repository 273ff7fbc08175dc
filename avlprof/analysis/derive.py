"""From a profile to a policy: what allocators may look at, and the shares that they give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.allocators import Allocator, Evidence, make_allocator
from avlprof.allocators.coverage import covering_shares
from avlprof.analysis.heads import head_shares
from avlprof.analysis.window import windows_for
from avlprof.budgets import ReadBudget, meet_budget, meet_read_budget, vision_share
from avlprof.budgets.fit import check_unit, floor_count, ratio_of
from avlprof.budgets.meet import in_place
from avlprof.errors import UserError
from avlprof.policy import RANKING, Policy, Provenance, ScorerSpec, TextPolicy, live_share, read_share
from avlprof.versions import __version__

if TYPE_CHECKING:
    from avlprof.analysis.profile import Profile


Use = Literal["store", "compute"]
Array = NDArray[np.float64]

# first choice first: a prompt may have no text behind its pictures, a run no decoding
_SCORED = {"store": ("instruction", "last"), "compute": ("step", "instruction", "last")}
_TRACED = {"store": ("text", "last"), "compute": ("generated", "text", "last")}


def evidence(profile: Profile, use: Use = "store") -> Evidence:
    """What allocators may look at.

    To `store`, a layer must serve the prompt's last row and the whole answer, so its coverage
    curve is the lower of `last` and `answer`; the other statistics are of the prompt's text rows
    (behind the first picture), as in the papers that use them. To `compute`, it must serve a
    single decoding step, and all are of those. What a run lacks is taken from the last prompt row.

    Raises:
        UserError: no sample has vision tokens.
    """
    curves = profile.frames["coverage_curve"]
    if curves.empty:
        raise UserError(
            f"run {profile.meta.run} has no vision tokens to spread a budget over; trace with images"
        )
    tokens = int(profile.frames["samples"]["vision"].max())
    spread = _of(profile.frames["concentration"], _SCORED[use]).pivot(
        index="layer", columns="statistic", values="mean"
    )
    mass = _of(profile.frames["mass"].query("modality == 'vision'"), _TRACED[use])

    def of_layers(column: pd.Series[float]) -> Array:
        """`[layers]`; 0 of a layer without attention, which nothing was recorded of."""
        whole = column.reindex(range(profile.layers), fill_value=0.0)
        return np.asarray(whole, dtype=np.float64)

    return Evidence(
        layers=profile.layers,
        tokens=tokens,
        coverage=_coverage(curves, use, tokens),
        vision_mass=of_layers(mass.set_index("layer")["mean"]),
        entropy=of_layers(spread["entropy"]),
        sparsity=of_layers(spread["sparsity"]),
        skewness=of_layers(spread["skewness"]),
        head_shares=_head_shares(profile),
        overlap=_overlap(profile.frames["overlap"], profile.layers),
        governed=profile.governed,
    )


def _head_shares(profile: Profile) -> Array | None:
    """`[layers, kv_heads]`, as `head_shares` gives them; None of a run of averages over heads."""
    table = profile.frames["heads"]
    if table.empty:
        return None
    return np.array(head_shares(table, profile.layers, profile.meta.settings.kv_heads))


def _overlap(table: pd.DataFrame, layers: int) -> Array | None:
    """Overlap of two layers' top sets at one decoding step; None where a run recorded no step."""
    steps = table[table["query"] == "step"]
    if steps.empty:
        return None
    known = steps.pivot(index="layer_a", columns="layer_b", values="mean").reindex(
        index=range(layers), columns=range(layers)
    )
    found = known.to_numpy(dtype=float)
    found = np.where(np.isnan(found), found.T, found)
    return np.where(np.isnan(found), np.eye(layers), found)


def leading_layers(evidence: Evidence, count: int) -> tuple[int, ...]:
    """The layers that should lead the others at a refresh: `count` of those that policies act on.

    Each layer follows the nearest one that leads before it, or itself. Of all choices it is the one in which
    layers share most, in the mean, of their best tokens of a step with the layer that they follow (`overlap`;
    those before the first share nothing). Exact, by dynamic programming; ties go to earlier layers. The idea
    of choosing so is that of Kascade, arXiv 2512.16391.

    Raises:
        UserError: the evidence has no overlap, or there are not so many layers.
    """
    if evidence.overlap is None:
        raise UserError("the run recorded no decoding step, so that nothing says which layers could lead")
    own = tuple(range(evidence.layers)) if evidence.governed is None else evidence.governed
    if not 1 <= count <= len(own):
        raise UserError(f"from 1 to {len(own)} layers can lead, got {count}")
    shared = evidence.overlap[np.ix_(own, own)]
    # by the first layer that leads: the most that the layers from it on share, and who leads then
    best: dict[int, tuple[float, tuple[int, ...]]]
    best = {first: (float(shared[first, first:].sum()), (first,)) for first in range(len(own))}
    for _ in range(count - 1):
        best = {
            first: _better(
                (float(shared[first, first:then].sum()) + value, (first, *leads))
                for then, (value, leads) in best.items()
                if then > first
            )
            for first in range(len(own) - 1)
            if any(then > first for then in best)
        }
    return tuple(own[index] for index in _better(best.values())[1])


def _better(choices: Iterable[tuple[float, tuple[int, ...]]]) -> tuple[float, tuple[int, ...]]:
    """The choice of the highest value; of equal ones that of the earliest layers."""
    return max(choices, key=lambda choice: (choice[0], [-layer for layer in choice[1]]))


def _of(table: pd.DataFrame, queries: tuple[str, ...]) -> pd.DataFrame:
    """The rows of the first of the queries that the table has."""
    query = next(query for query in queries if (table["query"] == query).any())
    return table[table["query"] == query]


def _coverage(curves: pd.DataFrame, use: Use, tokens: int) -> Array:
    """`[layers, tokens]` as in `Evidence`."""
    first = {"store": ("last", "answer"), "compute": ("step",)}[use]
    queries = [query for query in first if (curves["query"] == query).any()] or ["last"]
    tables = [
        curves[curves["query"] == query].pivot(index="layer", columns="share_kept", values="mean")
        for query in queries
    ]
    counts = np.arange(1, tokens + 1) / tokens
    lower = np.minimum.reduce([table.to_numpy() for table in tables])
    shares = np.concatenate([[0.0], tables[0].columns.to_numpy(dtype=np.float64)])
    return np.stack([np.interp(counts, shares, np.concatenate([[0.0], row])) for row in lower])


@dataclass(frozen=True)
class Spread:
    """How a budget is spread over layers: an allocator, its knobs, and what holds it back.

    Attributes:
        allocator: a name of `avlprof.allocators`.
        options: knobs of the allocator, such as `steepness` of `sigmoid`.
        mix: weight of the allocator against uniform, in [0, 1].
        floor: smallest kept and computed share of a layer, as far as the budget allows.

    Raises:
        UserError: the allocator or an option is unknown, or a number is out of range.
    """

    allocator: str = "coverage"
    options: Mapping[str, float] = field(default_factory=dict)
    mix: float = 0.2
    floor: float = 0.01

    def __post_init__(self) -> None:
        check_unit("floor", self.floor)
        self.make()

    def make(self) -> Allocator:
        """The allocator with its options, mixed with uniform."""
        return make_allocator(self.allocator, self.mix, **self.options)


def at_budget(
    profile: Profile,
    budget: float,
    read_budget: float | None,
    spread: Spread,
    interval: int,
    text: TextPolicy,
) -> Policy:
    """The policy that a profile suggests at a budget; arguments as in `Profile.derive`."""
    prompts, layers, allocator = profile.prompts(), profile.layers, spread.make()
    target = vision_share(prompts, layers, budget, text)
    shares = allocator.shares(profile.evidence("store"), target)
    keep = meet_budget(tuple(shares), prompts, budget, text, spread.floor)
    if read_budget is None:
        return Policy(vision_keep=keep, text=text)
    reads = ReadBudget(read_budget, profile.answer_tokens, interval)
    level = meet_read_budget(keep, prompts, reads, text)
    follow = allocator.shares(profile.evidence("compute"), float(np.mean(level)))
    compute = meet_read_budget(keep, prompts, reads, text, tuple(follow), spread.floor)
    return _two_level(keep, compute, interval, text)


def at_coverage(profile: Profile, coverage: float, floor: float, interval: int) -> Policy:
    """The policy whose layers each hold a share of the attention; arguments as in `Profile.derive`."""
    check_unit("coverage", coverage)
    store, single = profile.evidence("store"), profile.evidence("compute")
    tokens = store.tokens
    if store.coverage is None or single.coverage is None:
        raise UserError("coverage needs the coverage curves of a profile; trace with images")
    least = floor_count(floor, tokens)

    def counts(curves: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> list[int]:
        whole = np.ceil(covering_shares(curves, coverage) * tokens - 1e-9).astype(int)
        return [max(int(count), least) for count in whole]

    kept = counts(store.coverage)
    core = [min(few, count) for few, count in zip(counts(single.coverage), kept, strict=True)]
    text = text_windows(profile, coverage)
    own = range(profile.layers) if profile.governed is None else profile.governed
    keep, compute = (
        in_place([ratio_of(each[layer], tokens) for layer in own], own, (1.0,) * profile.layers)
        for each in (kept, core)
    )
    return _two_level(keep, compute, interval, text)


def _two_level(
    keep: tuple[float, ...], compute: tuple[float, ...], interval: int, text: TextPolicy
) -> Policy:
    """The policy of a core within the kept tokens; without a difference there is no core."""
    if compute == keep:
        return Policy(vision_keep=keep, text=text)
    return Policy(vision_keep=keep, vision_compute=compute, refresh_interval=interval, text=text)


def text_windows(profile: Profile, share: float) -> TextPolicy:
    """Windows of every layer that hold a share of its text attention."""
    check_unit("text", share)
    windows = windows_for(profile["window_curve"], share, profile.layers)
    return TextPolicy(window=windows, sink=profile.meta.settings.text_sink)


def derived_name(
    how: str,
    spread: Spread,
    scorer: str,
    share: float,
    read_budget: float | None,
    interval: int | None,
    text: TextPolicy | float | None = None,
) -> str:
    """How a policy was derived, in a file's name: what two derivations differ in is in it.

    `how` (an allocator, or `holding` a coverage), scorer and share always, the rest where it is not the
    default.
    """
    plain = Spread(spread.allocator)
    parts = [how, scorer.replace(":", "-"), f"{share:g}"]
    parts += [f"{name}{value:g}" for name, value in sorted(spread.options.items())]
    parts += [
        f"{name}{getattr(spread, name):g}"
        for name in ("mix", "floor")
        if getattr(spread, name) != getattr(plain, name)
    ]
    if read_budget is not None:
        parts.append(f"read{read_budget:g}")
    if interval is not None:
        parts.append(f"every{interval}")
    if isinstance(text, float | int):
        parts.append(f"text{text:g}")
    return "-".join(parts)


def check_scorer(name: str) -> None:
    """`UserError` for an unknown scorer; the default needs no look-up, which would import torch."""
    if name != RANKING:
        from avlprof.scorers import make_scorer

        make_scorer(ScorerSpec.of(name))


def provenance(
    profile: Profile, policy: Policy, budget: float | None, read_budget: float | None
) -> Provenance:
    """Where a derived policy comes from, and what it costs on the prompts of the run."""
    prompts, layers, steps = profile.prompts(), profile.layers, profile.answer_tokens
    settings = profile.meta.settings
    return Provenance(
        made_by=f"avlprof derive {__version__}",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=settings.model,
        model_revision=settings.revision,
        model_hash=settings.model_hash,
        versions=settings.versions | {"avlprof": __version__},
        task=settings.task,
        samples=profile.meta.samples,
        seed=settings.seed,
        run=profile.meta.run,
        run_hash=profile.meta.run_hash,
        budget=budget,
        read_budget=read_budget,
        measured_budget=round(live_share(policy, prompts, layers), 6),
        measured_read_budget=round(read_share(policy, prompts, layers, steps), 6),
        governed=profile.governed,
        answer_tokens=steps,
    )
