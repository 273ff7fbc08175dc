"""Options that several commands share.

A command that needs a model takes one parameter `spec: ModelSpec` and is decorated with
`model_options`; one that needs a task takes `source: TaskSpec` and `task_options`. The decorators
add the options to what typer reads, so that they are written down once.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, replace
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
    "dtype": _model_option(("--dtype",), "auto, float32, bfloat16 (bf16) or float16 (fp16).", str),
    "quantize": _model_option(("--quantize",), "4bit or 8bit weights, by bitsandbytes.", str | None),
    "attention": _model_option(
        ("--attention",), "sdpa, eager, flash_attention_2, ... or a kernel of the hub.", str | None
    ),
    "revision": _model_option(("--revision",), "Branch, tag or commit on the hub.", str | None),
    "trust_remote_code": _model_option(("--trust-remote-code",), "Run code that comes with the model.", bool),
    "device_map": _model_option(
        ("--device-map",),
        "Spread a large model over GPUs: auto, balanced, balanced_low_0 or sequential.",
        str | None,
    ),
    "model_args": _model_option(
        ("--model-args",), "NAME=VALUE for the model's config or from_pretrained; repeat.", list[str] | None
    ),
}
"""Options of `ModelSpec`, by its fields, which hold their defaults."""


DeviceOption, DtypeOption = _MODEL["device"], _MODEL["dtype"]
"""For commands that load no checkpoint."""


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
    return _model_options(command, {})


def task_options(command: Command) -> Command:
    """Gives a command the options that say which task and how to read it, as one `source`."""
    return _with_options(command, "source", "task", _TASK, _source)


def _worker_option(flag: str, text: str, kind: Any) -> Any:
    return Annotated[kind, typer.Option(flag, help=text, rich_help_panel="Workers")]


_LAUNCH: Options = {
    "workers": (_worker_option("--workers", "Processes that work, this one included.", int), 1),
    "launcher": (
        _worker_option("--launcher", "What starts the others: local, ray or submitit.", str),
        "local",
    ),
    "launcher_args": (
        _worker_option(
            "--launcher-args", "NAME=VALUE for the launcher, such as num_gpus=1; repeat.", list[str] | None
        ),
        None,
    ),
}
"""Options of `Launch`."""


def launch_options(command: Command) -> Command:
    """Gives a command the options that say how many processes work, and what starts them, as one `launch`."""
    return _with_options(command, "launch", "", _LAUNCH, _launch)


def _launch(values: dict[str, Any]) -> Any:
    from avlprof.launchers import WORKER, Launch

    if WORKER in os.environ:  # this is one of those that were started, and starts nobody
        return Launch()
    arguments = parse_arguments(values["launcher_args"], "--launcher-args")
    return Launch(values["workers"], values["launcher"], arguments)


def on_own_device(spec: ModelSpec) -> ModelSpec:
    """For a worker started beside others of its machine: a GPU of its own, where there are several."""
    from avlprof.launchers import NUMBER
    from avlprof.models.placement import own_device

    number = os.environ.get(NUMBER)
    if number is None or spec.device_map is not None:
        return spec
    return replace(spec, device=own_device(spec.device, int(number)))


def noted_options(command: Command) -> Command:
    """`model_options` and `task_options` of a command that knows model and task: their names may be left out.

    A name that is left out is the empty one.
    """
    named = {"name": (_MODEL["name"], ""), "device_map": (_MODEL["device_map"], None)}
    task = _TASK | {"name": (_TASK["name"][0], "")}
    return _model_options(_with_options(command, "source", "task", task, _source), named)


def _model_options(command: Command, other: Options) -> Command:
    standard = defaults(ModelSpec)
    options = {field: (annotation, standard[field]) for field, annotation in _MODEL.items()} | other

    def spec(values: dict[str, Any]) -> ModelSpec:
        return ModelSpec(**values | {"model_args": parse_arguments(values["model_args"])})

    return _with_options(command, "spec", "model", options, spec)


def _source(values: dict[str, Any]) -> Any:
    from avlprof.tasks.spec import TaskSpec

    return TaskSpec(**values)


def parse_arguments(pairs: Sequence[str] | None, option: str = "--model-args") -> dict[str, Any] | None:
    """Values by name of `NAME=VALUE` pairs, each value as YAML reads it.

    Raises:
        UserError: another form, a name given twice, or a value that is a list or a mapping.
    """
    if not pairs:
        return None
    from avlprof.errors import UserError, shortened
    from avlprof.policy.strict_yaml import read_yaml

    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name.isidentifier():
            raise UserError(f"{option} must be NAME=VALUE, got {shortened(pair)}")
        if name in values:
            raise UserError(f"{option} gives '{name}' twice; keep one of them")
        value = read_yaml(text, f"{option} {name}")
        if not isinstance(value, str | int | float | bool | None):
            raise UserError(f"{option} {name} must be one number, word or switch, got {shortened(text)}")
        values[name] = value
    return values


def _with_options(
    command: Command, parcel: str, prefix: str, options: Options, make: Callable[[dict[str, Any]], Any]
) -> Command:
    """`command` with `options` in place of its parameter `parcel`, which `make` builds from their values."""
    signature = inspect.signature(command)
    names = {field: f"{prefix}_{field}" if prefix else field for field in options}
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


_OF_TASKS = ("task", "metric", "columns", "dataset", "samples", "split", "forced")


def refuse_beside_picture(context: typer.Context) -> None:
    """`UserError` for options of tasks beside a picture of one's own, where they would do nothing."""
    from avlprof.errors import UserError

    for parameter in context.command.params:
        name = str(parameter.name).removeprefix("task_")
        of_tasks = (name == "name" and parameter.name == "task_name") or name.split("_")[0] in _OF_TASKS
        source = context.get_parameter_source(str(parameter.name))
        if of_tasks and source is not None and source.name == "COMMANDLINE":
            raise UserError(f"{parameter.opts[0]} does nothing beside --image and --prompt; leave it out")


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
    """Different shares in (0, 1] with commas between, as in `0.1,0.2`; `UserError` for anything else."""
    from avlprof.errors import UserError, shortened

    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if not shares or not all(0.0 < share <= 1.0 for share in shares):
        meant = _as_shares(text)
        remedy = f"; did you mean {meant}?" if meant else ""
        raise UserError(
            f"{option} must be shares in (0, 1] with commas, as in 0.1,0.2,0.4, got {shortened(text)}{remedy}"
        )
    if len(set(shares)) < len(shares):
        raise UserError(f"{option} must differ from each other, got {shortened(text)}")
    return shares


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers of a text such as `0-5,8`, ascending and each once; None where none is given.

    Raises:
        UserError: anything else.
    """
    from avlprof.errors import UserError, shortened

    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = [first, last] if dash else [first, first]
        if not all(end.isdecimal() and len(end) < 6 for end in ends) or int(ends[1]) < int(ends[0]):
            raise UserError(
                f"--layers must be numbers and ranges with commas, as in 0-5,8, got {shortened(text)}"
            )
        layers |= set(range(int(ends[0]), int(ends[1]) + 1))
    return tuple(sorted(layers))


def _as_shares(text: str) -> str:
    """Percentages as the shares that they mean; empty where there are none."""
    if "%" not in text:
        return ""
    try:
        parts = [
            float(part.strip().removesuffix("%")) / (100 if part.strip().endswith("%") else 1)
            for part in text.split(",")
        ]
    except ValueError:
        return ""
    return ",".join(f"{part:g}" for part in parts)
