"""The page: what was traced and found, and the commands that repeat it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from avlprof.analysis import Profile, findings
from avlprof.errors import UserError
from avlprof.files import write_text
from avlprof.plots import diff_info, layer_diff, run_names
from avlprof.policy import Policy
from avlprof.report.examples import examples
from avlprof.report.figures import Captioned, as_svg, sections
from avlprof.report.policies import policy_part
from avlprof.report.tables import layer_columns, settings_rows, traced_line
from avlprof.run import NAME as PICTURE_TASK
from avlprof.run import Run
from avlprof.runs import RunMeta
from avlprof.tasks import Task
from avlprof.versions import __version__

VISION_ROWS = RunMeta.model_fields["vision_rows"].default
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FINGERPRINT = re.compile(r"[0-9a-f]{12}")


def trace_command(meta: RunMeta, samples: int, out: Path) -> str:
    """The `avlprof trace` that gives such a run; what has its default value is left out."""
    words = ["avlprof", "trace", "--model", meta.model]
    words += ["--revision", meta.revision] if _is_of_hub(meta) else []
    if meta.task == PICTURE_TASK:
        words += ["--image", "PICTURE", "--prompt", "PROMPT"]
    else:
        words += ["--task", meta.task, "--samples", str(samples)]
        words += ["--split", meta.split] if meta.split not in ("", "search") else []
    words += ["--max-new-tokens", str(meta.max_new_tokens)] if meta.max_new_tokens else []
    words += ["--forced"] if meta.forced else []
    words += ["--policy", meta.policy] if meta.policy else []
    words += ["--rows", meta.rows] if meta.rows != "default" else []
    words += ["--vision-rows", str(meta.vision_rows)] if meta.vision_rows != VISION_ROWS else []
    words += ["--per-head"] if meta.per_head else []
    words += ["--text-rows"] if meta.text_rows else []
    words += ["--history", f"{meta.history:g}"] if meta.history is not None else []
    words += ["--dtype", meta.dtype, "--out", str(out)]
    return shlex.join(words)


def _is_of_hub(meta: RunMeta) -> bool:
    """Whether the revision is one of the hub; the embedded model has none, a folder a fingerprint."""
    return bool(meta.revision and _HUB_ID.fullmatch(meta.model) and not _FINGERPRINT.fullmatch(meta.revision))


def report_command(out: Path, policy: str, against: Path | None) -> str:
    """The `avlprof report` that gives such a page."""
    words = ["avlprof", "report", str(out)]
    words += ["--policy", policy] if policy else []
    words += ["--against", str(against)] if against else []
    return shlex.join([*words, "-o", "report.html"])


PICTURES = 3


@dataclass(frozen=True)
class Difference:
    """This run less another: both by name, a figure, and in words what of it is sure."""

    here: str
    other: str
    run: str
    figure: Captioned
    summary: str


def write_report(
    run: Run,
    out: Path | str,
    *,
    policy: Policy | None = None,
    against: Run | None = None,
    pictures: int = PICTURES,
    task: Task | None = None,
    created: str | None = None,
) -> Path:
    """Write one self-contained HTML file about a run; the file appears whole or not at all.

    Args:
        run: what was traced, such as `avlprof.Run.open(...)`.
        out: path of the file.
        policy: shown with what it costs on the prompts of the run.
        against: another run, to show what differs.
        pictures: samples whose heatmaps are shown.
        task: where the pictures are, if the run cannot tell.
        created: date and time to print; by default now. All else is the same for the same input.

    Raises:
        UserError: policy or other run have another number of layers, or the file cannot be written.
    """
    path = Path(out)
    page = report_html(run, policy=policy, against=against, pictures=pictures, task=task, created=created)
    write_text(path, page)
    return path


def report_html(
    run: Run,
    *,
    policy: Policy | None = None,
    against: Run | None = None,
    pictures: int = PICTURES,
    task: Task | None = None,
    created: str | None = None,
) -> str:
    """The page as text; arguments as in `write_report`."""
    if pictures < 0:
        raise UserError(f"pictures must be 0 or more, got {pictures}")
    profile, meta = run.profile(), run.meta
    part = None if policy is None else policy_part(policy, profile)
    difference = None if against is None else _difference(profile, against.profile())
    pictured, note = examples(run, pictures, task)
    samples = run.samples()
    named = "" if policy is None else f"{policy.name}.yaml"
    page = _template().get_template("report.html.j2")
    return page.render(
        title=f"{meta.model} on {meta.task}",
        findings=findings(profile),
        traced=traced_line(meta, samples),
        settings=settings_rows(meta, samples),
        run=str(run.path),
        run_hash=profile.meta.run_hash,
        tiles=_tiles(profile),
        sections=list(sections(profile)),
        columns=layer_columns(profile),
        layers=profile.layers,
        examples=pictured,
        examples_note=note,
        policy=part,
        difference=difference,
        commands=(
            trace_command(meta, len(samples), run.path),
            report_command(run.path, named, None if against is None else against.path),
        ),
        under=meta.policy_label,
        own_pictures=meta.task == PICTURE_TASK,
        created=created or datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
    )


def _tiles(profile: Profile) -> list[tuple[str, str]]:
    """The few numbers that a reader wants first."""
    samples, settings = profile.frames["samples"], profile.meta.settings
    seeing = samples.loc[samples["vision"] > 0, "vision"]
    return [
        (f"{profile.meta.samples:,}", "sample" if profile.meta.samples == 1 else "samples"),
        (f"{settings.layers} x {settings.heads}", "layers x query heads"),
        (f"{seeing.mean():,.0f}" if len(seeing) else "0", "vision tokens a prompt"),
        (f"{samples['generated'].mean():,.1f}", "tokens an answer"),
    ]


def _difference(here: Profile, other: Profile) -> Difference:
    names = run_names(here, other)
    info = diff_info(here.diff(other), names)
    sure = sum(int(panel.sure.sum()) for panel in info.panels)
    total = sum(len(panel.layers) for panel in info.panels)
    expected = round(total / 20)
    summary = (
        f"Of the {total} differences shown, {sure} have an interval that excludes zero; without any true "
        f"difference about {expected} would. Compared: {info.how}."
    )
    caption = (
        "Each panel is one statistic, each dot a layer: this run less the other, with its 95% interval. "
        "Filled dots are differences whose interval excludes zero; the line at zero is no difference."
    )
    figure = Captioned(as_svg(layer_diff(info)), "Figure: differences by layer", caption)
    return Difference(*names, other.meta.run, figure, summary)


def _template() -> Environment:
    return Environment(
        loader=PackageLoader("avlprof.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
