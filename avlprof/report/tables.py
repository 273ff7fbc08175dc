"""Numbers of a report as cells of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from avlprof.analysis import Profile
from avlprof.analysis.profile import answered
from avlprof.policy import said_governed
from avlprof.runs import RunMeta


@dataclass(frozen=True)
class Cell:
    """A mean as text, and its 95% interval (empty where it is not known)."""

    mean: str
    interval: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the table of layers: its name, what is counted, a cell a layer."""

    name: str
    unit: str
    cells: tuple[Cell, ...]


def layer_columns(profile: Profile) -> tuple[Column, ...]:
    """The columns of `Profile.per_layer`, with intervals; those without any number are left out."""
    frames, query = profile.frames, answered(profile.frames)
    vision = frames["mass"][frames["mass"]["modality"] == "vision"]
    coverage, drift, window = frames["coverage"], frames["drift"], frames["window"]
    plans = (
        ("Vision, last prompt token", "of attention", vision[vision["query"] == "last"], percent),
        ("Vision, while decoding", "of attention", vision[vision["query"] == "generated"], percent),
        ("Tokens for 90%", "of vision tokens", _of(coverage, query, 90), percent),
        ("Same 8 steps before", "of top vision tokens", drift[drift["lag"] == 8], percent),
        ("Text window for 95%", "tokens", _of(window, query, 95), lambda value: f"{value:.1f}"),
        ("Entropy of a row", "nat", _of(frames["entropy"], query), lambda value: f"{value:.2f}"),
    )
    return tuple(
        Column(name, unit, tuple(_cells(table, profile.layers, text)))
        for name, unit, table, text in plans
        if not table.empty
    )


def settings_rows(meta: RunMeta, samples: pd.DataFrame) -> list[tuple[str, str]]:
    """What was traced and with what, as names and texts."""
    answers = "reference answers, forced" if meta.forced else "the model's own, greedy"
    limit = f", at most {meta.max_new_tokens} tokens" if meta.max_new_tokens else ""
    recorded = "every row" if meta.rows == "all" else f"all text rows and {meta.vision_rows} vision rows"
    heads = "of every head" if meta.per_head else "mean over heads"
    rows = [
        ("Model", _joined(meta.model, meta.revision and f"revision {meta.revision}", meta.family)),
        (
            "Shape",
            f"{meta.layers} layers, {meta.heads} query heads, {meta.kv_heads} KV heads of {meta.head_dim}",
        ),
        ("Layers", said_governed(meta.governed, meta.layers)),
        ("Task", _joined(meta.task, meta.split and f"split {meta.split}")),
        ("Samples", f"{len(samples):,}"),
        (
            "Prompts",
            _joined(_counts(samples, "vision"), _counts(samples, "text"), _counts(samples, "system")),
        ),
        ("Answers", f"{answers}{limit}; {_counts(samples, 'generated')}"),
        ("Attention", f"under policy {meta.policy_label}" if meta.policy else "dense"),
        ("Recorded", f"{recorded} of each prompt, {heads}"),
        ("Number format", f"{meta.dtype} on {meta.device}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(meta.versions.items()))),
        ("Traced", meta.created),
    ]
    return [(name, text) for name, text in rows if text]


def traced_line(meta: RunMeta, samples: pd.DataFrame) -> str:
    """What was traced, in a sentence."""
    count = "1 sample" if len(samples) == 1 else f"{len(samples):,} samples"
    split = f" of split {meta.split}" if meta.split else ""
    when = f" on {meta.created[:10]}" if meta.created else ""
    version = f", avlprof {meta.versions['avlprof']}" if "avlprof" in meta.versions else ""
    return f"Traced: model {meta.model}, task {meta.task}, {count}{split}, {meta.dtype}{when}{version}."


def percent(share: float) -> str:
    """A share as a percentage of about two digits."""
    if 0.0 < abs(share) < 0.0005:
        return "<0.1%"
    return f"{100 * share:.1f}%" if abs(share) < 0.095 else f"{100 * share:.0f}%"


def _of(table: pd.DataFrame, query: str, level: int | None = None) -> pd.DataFrame:
    table = table[table["query"] == query]
    return table if level is None else table[table["level"] == level]


def _cells(table: pd.DataFrame, layers: int, text: Callable[[float], str]) -> list[Cell]:
    by_layer = {int(row["layer"]): row for row in table.to_dict("records")}
    cells = []
    for layer in range(layers):
        row = by_layer.get(layer)
        if row is None or pd.isna(row["mean"]):
            cells.append(Cell("-"))
        else:
            known = not (pd.isna(row["low"]) or pd.isna(row["high"]))
            cells.append(
                Cell(text(row["mean"]), f"{text(row['low'])} to {text(row['high'])}" if known else "")
            )
    return cells


def _counts(samples: pd.DataFrame, name: str) -> str:
    low, high = int(samples[name].min()), int(samples[name].max())
    what = "answer" if name == "generated" else name
    return f"{low:,} {what} tokens" if low == high else f"{low:,} to {high:,} {what} tokens"


def _joined(*texts: str) -> str:
    return ", ".join(text for text in texts if text)
