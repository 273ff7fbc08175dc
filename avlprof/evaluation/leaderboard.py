"""One table out of the results of several people, of what may be compared."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from avlprof.errors import UserError, counted
from avlprof.evaluation.intervals import mean_interval
from avlprof.evaluation.submission import Result, Submission, read_submission
from avlprof.watch import SILENT, Watch

COLUMNS = (
    *("budget", "rank", "method", "kind", "by", "score", "low", "high"),
    *("behind", "behind_low", "behind_high", "vs_dense", "vs_dense_low", "vs_dense_high"),
    *("live_bytes", "live_share", "read_share", "output_tokens", "samples"),
    *("device", "avlprof", "policy_hash", "files"),
)


@dataclass(frozen=True)
class Entry:
    """A method at a budget as one or several people measured it: with the same policy and the same scores."""

    budget: float
    result: Result
    submission: Submission
    by: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Results that may be compared: one model in one precision, asked the same and judged alike."""

    first: Submission
    entries: tuple[Entry, ...]

    @property
    def title(self) -> str:
        """`tiny (float32) on shapes, held-out, 400 samples, exact_match`."""
        model, task = self.first.model, self.first.task
        about = f"{counted(task.samples, 'sample')}, {task.metric}"
        return clean(f"{model.name} ({model.dtype}) on {task.name}, {task.split}, {about}")

    @property
    def name(self) -> str:
        """What the files of this group are called by."""
        model, task = self.first.model, self.first.task
        label = re.sub(r"[^\w.-]+", "-", f"{model.name}-{task.name}-{task.split}", flags=re.ASCII)
        return f"{label[:120]}-{model.key[:4]}{task.key[:4]}"

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a method and budget, dense first, then by budget and score; columns `COLUMNS`.

        `behind` is the score less that of the best of the budget, and `vs_dense` less the dense model's,
        both paired by sample with a 95% interval; NaN for that one itself. `rank` counts methods that are
        no worse, so equal scores share one. All are worked out from the scores of the samples.
        """
        rows = []
        for budget in sorted({entry.budget for entry in self.entries if entry.result.kind != "dense"}):
            own = [each for each in self.entries if each.budget == budget and each.result.kind != "dense"]
            own.sort(key=lambda entry: (-entry.result.score, entry.result.method, entry.by))
            for entry in own:
                rank = 1 + sum(other.result.score > entry.result.score for other in own)
                rows.append(_row(entry, rank, own[0]))
        dense = [entry for entry in self.entries if entry.result.kind == "dense"]
        dense.sort(key=lambda entry: (-entry.result.score, entry.by))
        return pd.DataFrame([*(_row(entry, None, None) for entry in dense), *rows], columns=list(COLUMNS))


@dataclass(frozen=True)
class Leaderboard:
    """Groups of results, and the files that were set aside: name and reason."""

    groups: tuple[Group, ...]
    set_aside: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, folder: Path, watch: Watch = SILENT) -> Leaderboard:
        """All submissions in a folder and the folders below; each is checked, and named if it fails.

        Args:
            watch: its phase `submissions` counts files.

        Raises:
            UserError: the folder is not there, or holds no submission that can be used.
        """
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give one with files of 'avlprof compare --submit'")
        paths = sorted(path for path in folder.rglob("*.json") if not path.name.startswith("."))
        found: dict[str, tuple[str, Submission]] = {}
        aside = []
        for number, path in enumerate(paths):
            watch.phase("submissions", number, len(paths))
            name = clean(path.relative_to(folder).as_posix())
            try:
                submission = read_submission(path)
                if submission.sha256 in found:
                    raise UserError(f"is the same as {found[submission.sha256][0]}")
                found[submission.sha256] = (name, submission)
            except UserError as error:
                aside.append((name, clean(str(error))))
        watch.phase("submissions", len(paths), len(paths))
        if not found:
            why = f"; {aside[0][0]} {aside[0][1]}" if aside else ""
            raise UserError(
                f"{folder} holds no submission that can be used{why}; make some: avlprof compare --submit DIR"
            )
        return cls(tuple(_groups(list(found.values()))), tuple(aside))

    def table(self) -> pd.DataFrame:
        """All groups below each other, with `model`, `dtype`, `task`, `split` and `metric` in front."""
        frames = []
        for group in self.groups:
            frame, model, task = group.table.copy(), group.first.model, group.first.task
            told = (model.name, model.dtype, task.name, task.split, task.metric)
            for at, (name, value) in enumerate(zip(_TOLD, told, strict=True)):
                frame.insert(at, name, clean(value))
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def markdown(self, figures: Sequence[str] = ()) -> str:
        """A page with a table a group; `figures` are its pictures, in the order of the groups."""
        lines = ["# Leaderboard", ""]
        for at, group in enumerate(self.groups):
            lines += [f"## {_escaped(group.title)}", ""]
            lines += [f"![Score over bytes]({figures[at]})", ""] if figures else []
            lines += [*_markdown(group.table), ""]
        lines += [
            "Scores are means over the samples with 95% intervals; *behind* is the difference to the best of "
            "the budget and *vs dense* to the stock model, paired by sample. Intervals are not corrected for "
            "the number of rows.",
            "",
        ]
        if self.set_aside:
            lines += [
                "## Set aside",
                "",
                *(f"- {_escaped(name)}: {_escaped(why)}" for name, why in self.set_aside),
                "",
            ]
        return "\n".join(lines)

    def csv(self) -> str:
        """The whole table; a text that a spreadsheet would take for a formula has an apostrophe in front."""
        table = self.table()
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(table.columns)
        for row in table.itertuples(index=False):
            writer.writerow([_plain(value) for value in row])
        return out.getvalue()


_TOLD = ("model", "dtype", "task", "split", "metric")


def clean(text: str) -> str:
    """A text of others on one line, without what a terminal, or a reader's eye, would obey."""
    return "".join(each if each.isprintable() else "?" for each in " ".join(text.split()))


def _groups(found: Sequence[tuple[str, Submission]]) -> Iterator[Group]:
    keys = sorted({submission.group for _, submission in found}, key=str)
    members = {key: [each for each in found if each[1].group == key] for key in keys}
    for key in sorted(
        keys, key=lambda key: (members[key][0][1].model.name, members[key][0][1].task.name, key)
    ):
        same: dict[tuple[Any, ...], list[tuple[str, Submission, Result]]] = {}
        for name, submission in members[key]:
            for result in submission.results:
                budget = 1.0 if result.kind == "dense" else submission.budget
                same.setdefault(
                    (budget, result.kind == "dense", result.method, result.policy_hash, tuple(result.scores)),
                    [],
                ).append((name, submission, result))
        yield Group(
            members[key][0][1],
            tuple(
                Entry(
                    identity[0],
                    each[0][2],
                    each[0][1],
                    tuple(dict.fromkeys(clean(submission.by) for _, submission, _ in each if submission.by)),
                    tuple(dict.fromkeys(name for name, _, _ in each)),
                )
                for identity, each in same.items()
            ),
        )


def _row(entry: Entry, rank: int | None, best: Entry | None) -> dict[str, Any]:
    result, submission = entry.result, entry.submission
    dense = submission.results[0]
    return {
        "budget": entry.budget,
        "rank": rank,
        "method": clean(result.method),
        "kind": clean(result.kind),
        "by": ", ".join(entry.by),
        "score": result.score,
        "low": result.low,
        "high": result.high,
        **_difference("behind", result, None if best is None or best is entry else best.result),
        **_difference("vs_dense", result, None if result is dense else dense),
        **{
            name: getattr(result, name)
            for name in ("live_bytes", "live_share", "read_share", "output_tokens")
        },
        "samples": submission.task.samples,
        "device": clean(submission.model.device),
        "avlprof": clean(submission.versions.get("avlprof", "")),
        "policy_hash": clean(result.policy_hash),
        "files": ", ".join(entry.files),
    }


def _difference(name: str, own: Result, other: Result | None) -> dict[str, float | None]:
    if other is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    found = mean_interval(np.subtract(own.scores, other.scores))
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}


def _markdown(table: pd.DataFrame) -> list[str]:
    """A table of the columns that fit a page."""
    lines = [
        "| budget | # | method | by | score | behind | vs dense | KV in memory | read per step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table.to_dict("records"):
        rank = "" if pd.isna(row["rank"]) else f"{int(row['rank'])}"
        cells = [
            f"{row['budget']:.0%}" if row["kind"] == "dense" else f"{100 * row['budget']:g}%",
            rank,
            _escaped(row["method"]),
            _escaped(row["by"]),
            f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]",
            said_difference(row, "behind"),
            said_difference(row, "vs_dense"),
            f"{row['live_bytes'] / 1024:,.1f} KiB ({row['live_share']:.1%})",
            f"{row['read_share']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def said_difference(row: Any, name: str) -> str:
    """`-0.150 [-0.300, +0.000]`, or a dash where there is none."""
    if pd.isna(row[name]):
        return "-"
    return f"{row[name]:+.3f} [{row[f'{name}_low']:+.3f}, {row[f'{name}_high']:+.3f}]"


def _escaped(text: str) -> str:
    """A text of others in Markdown, which holds HTML: every mark stands for itself."""
    plain = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#+!|~$^:-])", r"\\\1", plain)


def _plain(value: Any) -> Any:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@"):
        return f"'{value}"
    return value
