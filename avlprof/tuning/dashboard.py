"""A study in optuna-dashboard, with what it is about, its winner and its figures attached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact

from avlprof.errors import UserError
from avlprof.tuning.importance import importance_rows
from avlprof.tuning.reading import POLICY, Overview, knob_sentences, overview
from avlprof.tuning.storages._base import quiet
from avlprof.tuning.study import find_storage, read_study

ARTIFACTS = "artifacts"
FIGURES = "figures"


def attach(folder: Path) -> optuna.Study:
    """Attach note and figures to a study; again replaces the note, and adds figures that changed.

    Figures are copied into the study's folder `artifacts`, which `optuna-dashboard` is told by
    `--artifact-dir`.

    Raises:
        UserError: optuna-dashboard is not installed, or the study has no trial yet.
    """
    dashboard = _dashboard()
    study = read_study(folder)
    (folder / ARTIFACTS).mkdir(exist_ok=True)
    store = FileSystemArtifactStore(folder / ARTIFACTS)
    with quiet():
        pictures = [
            (path.stem, f"/artifacts/{study._study_id}/{_uploaded(study, store, folder, path)}")
            for path in sorted((folder / FIGURES).glob("*.png"))
        ]
        text = note(overview(folder), knob_sentences(folder), pictures, importance_rows(folder, study))
        if dashboard.get_note(study) != text:
            dashboard.save_note(study, text)
    return study


def note(
    summary: Overview,
    knobs: list[str],
    pictures: list[tuple[str, str]],
    importances: Sequence[Mapping[str, str]] = (),
) -> str:
    """What a study is about and what it found, as Markdown. `pictures` are titles and addresses."""
    row = {name: value for name, value in summary.row().items() if value is not None}
    lines = ["| | |", "|---|---|", *(f"| {name} | {_short(value)} |" for name, value in row.items()), ""]
    if summary.winner is not None and summary.winner.provenance is not None:
        scores = summary.winner.provenance.scores
        lines += [f"## {summary.winner.provenance.metric} on held-out samples", ""]
        lines += ["| policy | mean | 95% interval |", "|---|---|---|"]
        lines += [f"| {who} | {s.mean:.3f} | {s.low:.3f} to {s.high:.3f} |" for who, s in scores.items()]
        lines += ["", f"The winner is `{summary.folder / POLICY}`.", ""]
    if knobs:
        lines += ["## What its scalars are worth", "", *(f"- {sentence}" for sentence in knobs), ""]
    if importances:
        lines += ["## What the score depends on, over the whole space (fANOVA)", ""]
        lines += [f"| {' | '.join(importances[0])} |", "|---" * len(importances[0]) + "|"]
        lines += [f"| {' | '.join(row.values())} |" for row in importances]
        lines += [""]
    for title, address in pictures:
        lines += [f"## {title}", "", f"![{title}]({address})", ""]
    return "\n".join(lines)


def serve(folder: Path, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Show a study in optuna-dashboard until Ctrl-C; port 0 takes a free one.

    Args:
        ready: called with the address once it can be opened.

    Raises:
        UserError: as `attach`, or the port cannot be taken.
    """
    dashboard = _dashboard()
    study = attach(folder)
    artifacts = FileSystemArtifactStore(folder / ARTIFACTS)
    app = dashboard.wsgi(find_storage(folder).backend(), artifact_store=artifacts)
    try:
        server = make_server(host, port, app, handler_class=_Silent)
    except (OSError, OverflowError) as error:
        raise UserError(f"port {port} of {host} cannot be taken ({error}); choose another port") from None
    with server, contextlib.suppress(KeyboardInterrupt):
        ready(f"http://{host}:{server.server_port}/dashboard/studies/{study._study_id}")
        server.serve_forever()


class _Silent(WSGIRequestHandler):
    """Says nothing about single requests."""

    def log_message(self, *arguments: Any) -> None:
        pass


def _dashboard() -> Any:
    try:
        return import_module("optuna_dashboard")
    except ModuleNotFoundError:
        raise UserError(
            "the dashboard needs the package optuna-dashboard; pip install 'avlprof[dashboard]'"
        ) from None


def _uploaded(study: optuna.Study, store: FileSystemArtifactStore, folder: Path, path: Path) -> str:
    """The id of a figure among the study's artifacts, where it is put unless it is there."""
    written = path.read_bytes()
    for known in get_all_artifact_meta(study):
        copy = folder / ARTIFACTS / known.artifact_id
        if known.filename == path.name and copy.exists() and copy.read_bytes() == written:
            return str(known.artifact_id)
    return str(upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=study))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
