"""The tables and the figure of docs/prediction.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from avlprof.evaluation.damage import rank_correlation
from avlprof.plots.style import INK, MARKERS, OKABE_ITO, new_figure, theme
from tools.predict.measure import MAPS, OF_LAYERS

Tables = Mapping[str, Mapping[str, pd.DataFrame]]
"""By model, then by name: `layers`, `rankings`, `policies`."""
DROPPED = {**MAPS, "hindsight": "the same, had the best tokens stayed"}
PROBE = "probe: damage of single layers, summed"
OF_POLICIES = {**DROPPED, "probe": PROBE, "least": "the smallest share of a layer"}


def correlation(frame: pd.DataFrame, column: str, units: Sequence[str]) -> str:
    """Rank correlation over units of a column with `kl`, both means over samples, as a table says it.

    Bold where the 95% interval over samples leaves out 0; empty where nothing differs.
    """

    def wide(name: str) -> pd.DataFrame:
        return frame.pivot_table(index="sample", columns=list(units), values=name, dropna=False)

    found = rank_correlation(wide("kl"), wide(column)) if frame[column].notna().any() else None
    if found is None:
        return ""
    low, high = found["low"], found["high"]
    text = f"{found['rank_correlation']:+.2f} [{low:+.2f}, {high:+.2f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def layers_table(tables: Tables, level: float) -> str:
    """Statistics of layers against the damage of keeping a level in that layer alone."""
    columns = OF_LAYERS | {name: f"dropped {text}" for name, text in DROPPED.items()}

    found = {model: frames["layers"] for model, frames in tables.items()}
    frames = {model: frame[np.isclose(frame["level"], level)] for model, frame in found.items()}
    return _table("of the dense model", columns, frames, ["layer"])


def heads_table(tables: Tables) -> str:
    """Statistics of query heads against the damage of closing each one's way to the picture."""
    frames = {model: found["heads"] for model, found in tables.items() if "heads" in found}
    return _table("of a head", OF_LAYERS, frames, ["layer", "head"])


def shares_table(tables: Tables, name: str, unit: str, columns: Mapping[str, str]) -> str:
    """What is dropped of each map against the damage of whole policies, a column a model and share."""
    frames = {
        f"{model}, {share:.0%}": frame[frame["share"] == share]
        for model, found in tables.items()
        if name in found
        for frame in [found[name]]
        for share in sorted(frame["share"].unique())
    }
    return _table("dropped", columns, frames, [unit])


def best_table(tables: Tables, name: str, unit: str) -> str:
    """Mean KL by ranking or allocator, a column a model and share, the best on average first."""
    columns = {}
    for model, found in tables.items():
        for share, rows in found[name].groupby("share"):
            columns[f"{model}, {share:.0%}"] = rows.groupby(unit)["kl"].mean()
    frame = pd.DataFrame(columns)
    frame = frame.loc[frame.rank().mean(axis=1).sort_values(kind="stable").index]
    lines = ["| " + " | ".join([unit, *frame.columns]) + " |", "|---" * (len(frame.columns) + 1) + "|"]
    least = frame.min()
    for label, row in frame.iterrows():
        cells = [f"**{v:.3f}**" if v == least[c] else f"{v:.3f}" for c, v in row.items()]
        lines.append(f"| `{label}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _table(
    head: str, columns: Mapping[str, str], frames: Mapping[str, pd.DataFrame], units: Sequence[str]
) -> str:
    """A row a column that is named, and a column a frame."""
    lines = ["| " + " | ".join([head, *frames]) + " |", "|---" * (len(frames) + 1) + "|"]
    for column, text in columns.items():
        cells = [correlation(frame, column, units) if column in frame else "" for frame in frames.values()]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(policies: pd.DataFrame, rankings: pd.DataFrame, model: str, share: float) -> Figure:
    """Two panels at one share: KL of rankings and of spreads over the attention that they drop."""
    with theme():
        samples = rankings["sample"].nunique()
        note = f"{model}, {share:.0%} of the vision KV, n = {samples} samples; a mark is a policy"
        drawn = new_figure("What is dropped of the answer's attention, and what it costs", note, (14.0, 6.2))
        left, right = drawn.subplots(1, 2)
        of_rankings = rankings[rankings["share"] == share].groupby("ranking")[["answer", "kl"]].mean()
        left.scatter(of_rankings["answer"], of_rankings["kl"], color=OKABE_ITO[0], s=60)
        _named(left, of_rankings)
        left.set_title(f"{len(of_rankings)} rankings, flat over layers")
        spread = (
            policies[policies["share"] == share].groupby(["policy", "allocator"])[["answer", "kl"]].mean()
        )
        for place, name in enumerate(sorted(spread.index.unique("allocator"))):
            rows = spread.xs(name, level="allocator")
            right.scatter(
                rows["answer"], rows["kl"], label=name, s=46, alpha=0.85,
                color=OKABE_ITO[place % len(OKABE_ITO)], marker=MARKERS[place % len(MARKERS)],
            )  # fmt: skip
        right.set_title("one ranking, spread over layers by")
        right.legend(fontsize=11, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        for ax in (left, right):
            ax.set_xlabel("dropped attention of the answer")
            ax.set_yscale("log")
            for axis in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
                axis(FuncFormatter(lambda value, _: f"{value:.2g}"))
        left.set_ylabel("KL to dense (nat a token)")
        return drawn


def _named(ax: Axes, points: pd.DataFrame) -> None:
    """Write each point's name beside it, on the side where there is room, no two on each other."""
    heights = np.log(points["kl"])
    least, middle = 0.045 * np.ptp(heights), points["answer"].mean()
    taken: dict[bool, float] = {}
    for name in heights.sort_values().index:
        x, right = points.loc[name, "answer"], bool(points.loc[name, "answer"] < middle)
        place = max(heights[name], taken.get(right, -np.inf) + least)
        taken[right] = place
        ax.annotate(
            str(name), (x, np.exp(place)), (8 if right else -8, -4), textcoords="offset points",
            fontsize=11, color=INK, ha="left" if right else "right",
        )  # fmt: skip
    ax.set_xlim(points["answer"].min() - 0.15 * np.ptp(points["answer"]), None)
