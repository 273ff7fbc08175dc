"""`avlprof tasks`: the tasks and metrics that have a name."""

from __future__ import annotations

from typing import Any

import typer

from avlprof.cli._output import (
    Format,
    FormatOption,
    note,
    show,
)

app = typer.Typer(add_completion=False)


@app.command()
def tasks(form: FormatOption = Format.table) -> None:
    """List tasks and metrics; JSONL files, dataset folders and hub datasets work as tasks too."""
    from avlprof.tasks import METRICS, TASKS, load_metric, load_preset, load_task, presets

    rows: list[dict[str, Any]] = []
    for name in TASKS.names():
        task = load_task(name)
        about = (
            f"metric {task.metric}, splits {', '.join(task.splits)}, at most {task.max_new_tokens} new tokens"
        )
        rows.append({"kind": "task", "name": name, "about": about})
    for name in presets():
        preset = load_preset(name)
        about = f"{preset.about}; {preset.dataset} ({preset.split}), metric {preset.metric}"
        checked = "" if form is Format.table else f"; checked: {preset.checked}"
        rows.append({"kind": "preset", "name": name, "about": about + checked})
    for name in METRICS.names():
        said = (load_metric(name).__doc__ or "").strip().splitlines()
        rows.append({"kind": "metric", "name": name, "about": said[0] if said else ""})
    show(rows, form)
    if form is Format.table:
        note("presets read datasets of the hub; how far each was checked: avlprof tasks --format json")
    note("next: avlprof trace --task NAME (also FILE.jsonl, a dataset folder, hf:NAME or ORG/NAME)")
