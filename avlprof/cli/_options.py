"""Options that several commands share.

A command that needs a model takes one parameter `spec: ModelSpec` and is decorated with
`model_options`; one that needs a task takes `source: TaskSpec` and `task_options`. The decorators
add the options to what typer reads, so that they are written down once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from avlprof.cli._output import note
from avlprof.models.spec import ModelSpec

if TYPE_CHECKING:
    from avlprof.run import Run

_LOADING, _DATASET = "Model", "Hugging Face datasets"

Command = Callable[..., Any]
Options = dict[str, tuple[Any, Any]]
"""By parameter: its annotation for typer, and its default."""

ImageOption = Annotated[
    list[Path] | None,
    typer.Option("--image", "-i", help="Your own picture; repeat for several in one prompt."),
]
PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", help="The question about --image.")]
MaxNewTokensOption = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Longest answer; by default the task's.")
]
RunArgument = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RUN]", help="Run directory; by default the newest below runs/.", show_default=False
    ),
]


def _model_option(flags: Sequence[str], text: str, kind: Any) -> Any:
    return Annotated[kind, typer.Option(*flags, help=text, rich_help_panel=_LOADING)]


_MODEL = {
    "name": _model_option(("--model", "-m"), "Short name, hub id or local folder.", str),
    "device": _model_option(("--device",), "auto, cpu, cuda, cuda:N or mps.", str),
    "dtype": _model_option(("--dtype",), "auto, float32, bfloat16 or float16.", str),
    "revision": _model_option(("--revision",), "Branch, tag or commit on the hub.", str | None),
    "trust_remote_code": _model_option(("--trust-remote-code",), "Run code that comes with the model.", bool),
    "device_map": _model_option(
        ("--device-map",),
        "Spread a large model over GPUs: auto, balanced, balanced_low_0 or sequential.",
        str | None,
    ),
}
"""Options of `ModelSpec`, by its fields, which hold their defaults."""


ModelOption, DeviceOption, DtypeOption, RevisionOption, TrustOption, DeviceMapOption = _MODEL.values()


def _dataset_option(flag: str, text: str) -> tuple[Any, None]:
    return Annotated[str | None, typer.Option(flag, help=text, rich_help_panel=_DATASET)], None


_TASK: Options = {
    "name": (
        Annotated[str, typer.Option("--task", "-t", help="Task name, FILE.jsonl, folder or dataset.")],
        "shapes",
    ),
    "metric": (Annotated[str | None, typer.Option("--metric", help="By default the task's.")], None),
    "max_new_tokens": (MaxNewTokensOption, None),
    "columns": _dataset_option("--columns", "Such as prompt=question,answers=label."),
    "dataset_split": _dataset_option("--dataset-split", "Split to draw from."),
    "dataset_config": _dataset_option("--dataset-config", "Configuration."),
    "dataset_revision": _dataset_option("--dataset-revision", "Branch, tag or commit on the hub."),
}
"""Options of `TaskSpec`, by its fields."""


def model_options(command: Command) -> Command:
    """Gives a command the options that say which model and how to load it, as one `spec`."""
    standard = defaults(ModelSpec)
    options = {field: (annotation, standard[field]) for field, annotation in _MODEL.items()}
    return _with_options(command, "spec", "model", options, lambda values: ModelSpec(**values))


def task_options(command: Command) -> Command:
    """Gives a command the options that say which task and how to read it, as one `source`."""

    def source(values: dict[str, Any]) -> Any:
        from avlprof.tasks.spec import TaskSpec

        return TaskSpec(**values)

    return _with_options(command, "source", "task", _TASK, source)


def _with_options(
    command: Command, parcel: str, prefix: str, options: Options, make: Callable[[dict[str, Any]], Any]
) -> Command:
    """`command` with `options` in place of its parameter `parcel`, which `make` builds from their values."""
    signature = inspect.signature(command)
    names = {field: f"{prefix}_{field}" for field in options}
    keyword = inspect.Parameter.KEYWORD_ONLY
    kept = [
        parameter.replace(annotation=_evaluated(parameter.annotation, command), kind=keyword)
        for name, parameter in signature.parameters.items()
        if name != parcel
    ]
    added = [
        inspect.Parameter(names[field], keyword, default=default, annotation=annotation)
        for field, (annotation, default) in options.items()
    ]

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        values[parcel] = make({field: values.pop(name) for field, name in names.items()})
        return command(**values)

    parameters = [*kept, *added]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # typer would read the undecorated command
    return run


def _evaluated(annotation: Any, command: Command) -> Any:
    """What an annotation stands for, if the command's module knows it; another parcel's is left as it is."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, command.__globals__)
    except NameError:
        return annotation


def defaults(parcel: type) -> dict[str, Any]:
    """Defaults of the fields of a dataclass: what a command's options take theirs from."""
    return {field.name: field.default for field in fields(parcel) if field.default is not MISSING}


def run_or_newest(path: Path | None) -> Run:
    """The run at `path`; else the newest one below `runs/`; else one of the embedded model, made now."""
    from avlprof.cli._progress import bars
    from avlprof.run import RUNS, Run, latest_run

    if path is not None:
        return Run.open(path)
    newest = latest_run()
    if newest is not None:
        note(f"run {newest.path} (the newest below {RUNS}/)")
        return newest
    from avlprof.api.trace import trace

    note(f"no run below {RUNS}/; tracing the embedded model first")
    with bars(resumes=True) as watch:
        return trace(watch=watch)


def parse_shares(option: str, text: str) -> list[float]:
    """Shares in (0, 1] with commas between, as in `0.1,0.2`; `UserError` for anything else."""
    from avlprof.errors import UserError

    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0.0 < share <= 1.0 for share in shares):
        raise UserError(f"{option} must be shares in (0, 1] with commas, as in 0.1,0.2,0.4, got '{text}'")
    return shares
