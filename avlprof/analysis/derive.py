"""What a profile tells allocators."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from avlprof.allocators import Allocator, Evidence, make_allocator
from avlprof.allocators.coverage import covering_shares
from avlprof.analysis.tables import refresh_from_drift
from avlprof.analysis.window import windows_for
from avlprof.budgets import meet_budget, meet_read_budget, vision_share
from avlprof.budgets.fit import check_unit, floor_count, ratio_of
from avlprof.errors import UserError
from avlprof.policy import Policy, Provenance, ScorerSpec, TextPolicy, live_share, read_share
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
    return Evidence(
        layers=profile.layers,
        tokens=tokens,
        coverage=_coverage(curves, use, tokens),
        vision_mass=mass.set_index("layer")["mean"].to_numpy(np.float64),
        entropy=spread["entropy"].to_numpy(np.float64),
        sparsity=spread["sparsity"].to_numpy(np.float64),
        skewness=spread["skewness"].to_numpy(np.float64),
    )


def _of(table: pd.DataFrame, queries: tuple[str, ...]) -> pd.DataFrame:
    """The rows of the first of the queries that the table has."""
    query = next(query for query in queries if (table["query"] == query).any())
    return table[table["query"] == query]


def _coverage(curves: pd.DataFrame, use: Use, tokens: int) -> Array:
    """`[layers, tokens]` as in `Evidence`."""
    wanted = {"store": ("last", "answer"), "compute": ("step",)}[use]
    found = [query for query in wanted if (curves["query"] == query).any()] or ["last"]
    tables = [
        curves[curves["query"] == query].pivot(index="layer", columns="share_kept", values="mean")
        for query in found
    ]
    counts = np.arange(1, tokens + 1) / tokens
    lower = np.minimum.reduce([table.to_numpy() for table in tables])
    shares = np.concatenate([[0.0], tables[0].columns.to_numpy(dtype=np.float64)])
    return np.stack([np.interp(counts, shares, np.concatenate([[0.0], row])) for row in lower])


def derive(
    profile: Profile,
    *,
    budget: float | None = None,
    read_budget: float | None = None,
    coverage: float | None = None,
    allocator: str = "coverage",
    allocator_options: Mapping[str, float] | None = None,
    mix: float = 0.2,
    floor: float = 0.01,
    refresh_interval: int | None = None,
    scorer: str = "last_query",
    text: TextPolicy | None = None,
    text_share: float | None = None,
    name: str | None = None,
) -> Policy:
    """The policy that a profile suggests, either at a `budget` or at a `coverage`.

    Args:
        profile: what the model attends to.
        budget: prompt KV live after prefill over dense; gives `vision_keep`.
        read_budget: mean prompt KV read per decoding step over dense, beside `budget`; gives
            `vision_compute` and the refresh interval.
        coverage: share of attention to hold, without any budget. Each layer keeps the share of
            vision tokens that holds it for the last prompt row and for the whole answer,
            computes with what holds it for a single step, and has the text window that holds it
            beside the first text tokens.
        allocator: how a budget is spread over layers (`avlprof.allocators`).
        allocator_options: knobs of the allocator, such as `steepness` of `sigmoid`.
        mix: weight of the allocator against uniform, in [0, 1].
        floor: smallest kept and computed share of a layer, as far as the budget allows.
        refresh_interval: steps between refreshes of the core; by default `refresh_from_drift`.
        scorer: how the runtime ranks vision tokens.
        text: what stays of text at a budget; by default all of it.
        text_share: in place of `text`: each layer has the smallest recorded text window that
            holds this share of its text attention beside the first text tokens.
        name: of the policy; by default it says how it was derived.

    Raises:
        UserError: not exactly one of budget and coverage, a value out of range, or a budget below
            what system and text alone need.
    """
    if (budget is None) == (coverage is None):
        given = "neither" if budget is None else "both"
        raise UserError(f"give either budget or coverage to derive a policy, got {given}")
    check_unit("floor", floor)
    interval = refresh_from_drift(profile.drift()) if refresh_interval is None else refresh_interval
    if interval < 0:
        raise UserError(f"refresh_interval must be 0 or more steps, got {interval}")
    _check_scorer(scorer)
    if budget is not None:
        if text_share is not None:
            text = _text(profile, text_share, text)
        spread = make_allocator(allocator, mix, **(allocator_options or {}))
        policy = _at_budget(profile, budget, read_budget, spread, floor, interval, text or TextPolicy())
    else:
        assert coverage is not None
        if not (read_budget is None and text is None and text_share is None):
            raise UserError(
                "coverage sets reads and text by itself; leave read_budget, text and text_share out, "
                "or give budget"
            )
        check_unit("coverage", coverage)
        policy = _at_coverage(profile, coverage, floor, interval)
    named = name or (f"coverage-{coverage:g}" if budget is None else f"{allocator}-{budget:g}")
    provenance = _provenance(profile, policy, budget, read_budget)
    ranked = ScorerSpec(name=scorer)
    return policy.model_copy(update={"name": named, "scorer": ranked, "provenance": provenance})


def _check_scorer(name: str) -> None:
    """`UserError` for an unknown scorer; the default needs no look-up, which would import torch."""
    if name != ScorerSpec().name:
        from avlprof.scorers import SCORERS

        SCORERS.get(name)


def _at_budget(
    profile: Profile,
    budget: float,
    read_budget: float | None,
    spread: Allocator,
    floor: float,
    interval: int,
    text: TextPolicy,
) -> Policy:
    prompts, layers = profile.prompts(), profile.layers
    target = vision_share(prompts, layers, budget, text)
    shares = spread.shares(profile.evidence("store"), target)
    keep = meet_budget(tuple(shares), prompts, budget, text, floor)
    if read_budget is None:
        return Policy(vision_keep=keep, text=text)
    steps = profile.answer_tokens
    level = meet_read_budget(keep, prompts, interval, read_budget, steps, text)
    wanted = spread.shares(profile.evidence("compute"), float(np.mean(level)))
    compute = meet_read_budget(keep, prompts, interval, read_budget, steps, text, tuple(wanted), floor)
    return _two_level(keep, compute, interval, text)


def _at_coverage(profile: Profile, coverage: float, floor: float, interval: int) -> Policy:
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
    text = _text(profile, coverage, None)
    keep, compute = (tuple(ratio_of(count, tokens) for count in each) for each in (kept, core))
    return _two_level(keep, compute, interval, text)


def _two_level(
    keep: tuple[float, ...], compute: tuple[float, ...], interval: int, text: TextPolicy
) -> Policy:
    """The policy of a core within the kept tokens; without a difference there is no core."""
    if compute == keep:
        return Policy(vision_keep=keep, text=text)
    return Policy(vision_keep=keep, vision_compute=compute, refresh_interval=interval, text=text)


def _text(profile: Profile, share: float, text: TextPolicy | None) -> TextPolicy:
    """Windows of every layer that hold a share of its text attention."""
    if text is not None:
        raise UserError("give either text or text_share, got both")
    check_unit("text_share", share)
    windows = windows_for(profile.window_curve(), share, profile.layers)
    return TextPolicy(window=windows, sink=profile.meta.settings.text_sink)


def _provenance(
    profile: Profile, policy: Policy, budget: float | None, read_budget: float | None
) -> Provenance:
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
        answer_tokens=steps,
    )
