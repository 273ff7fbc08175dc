"""Which of the winner's scalars matter: each is put back to its plain value, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import pandas as pd

from avlprof.evaluation import paired_difference
from avlprof.tuning.candidate import Budget, Candidate
from avlprof.tuning.prepared import Prepared

PLAIN: Mapping[str, Any] = {
    **{"allocator": "uniform", "mix": 1.0, "temperature": 1.0, "floor": 0.0, "midpoint": 0.5},
    **{"scorer": "last_query", "heads": "shared", "refresh_interval": 0, "refresh": "full"},
    **{"compute_temperature": 1.0, "text_share": 1.0, "text_sink": 0},
}


def knob_effects(
    winner: Candidate,
    prepared: Prepared,
    budget: Budget,
    progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """How much worse the cheap score gets when one knob of the winner goes back to plain.

    Unlike importances that are fitted to a study's trials, this does not depend on where the
    sampler chose to look; it says nothing about two knobs at once.

    Returns:
        One row a knob that the winner turned, the largest first: `knob, value, plain`, and `change,
        low, high` (mean over samples with its paired 95% interval; above 0: the knob helps).
    """
    values = asdict(winner)
    turned = [name for name in winner.params(budget) if values[name] != PLAIN[name]]
    ours = prepared.cheap(winner.policy(prepared.evidence, budget))
    rows = []
    for done, name in enumerate(turned, start=1):
        back = replace(winner, **{name: PLAIN[name]}).policy(prepared.evidence, budget)
        gap = paired_difference(prepared.cheap(back), ours).difference
        rows.append(
            {
                "knob": name,
                "value": _text(values[name]),
                "plain": _text(PLAIN[name]),
                "change": gap.mean,
                "low": gap.low,
                "high": gap.high,
            }
        )
        if progress:
            progress(done, len(turned))
    table = pd.DataFrame(rows, columns=["knob", "value", "plain", "change", "low", "high"])
    return table.sort_values("change", ascending=False, kind="stable", ignore_index=True)


def _text(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
