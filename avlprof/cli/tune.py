"""`avlprof tune`: search for the best policy at a budget, and prove it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from avlprof.cli._live import board
from avlprof.cli._options import launch_options, model_options, parse_shares, task_options
from avlprof.cli._output import FigureFormat, FigureFormatOption, Format, FormatOption, finished, note
from avlprof.errors import UserError, shortened
from avlprof.files import check_output
from avlprof.models.spec import ModelSpec
from avlprof.tuning.settings import BUDGET, Settings

if TYPE_CHECKING:
    from avlprof.launchers import Launch
    from avlprof.tasks.spec import TaskSpec
    from avlprof.tuning import Certified, Sweep, Tuned

app = typer.Typer(add_completion=False)

_SEVERAL, _MEMORY = "Several budgets", "Memory"


@app.command()
@model_options
@task_options
@launch_options
def tune(
    spec: ModelSpec,
    source: TaskSpec,
    launch: Launch,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget",
            "-b",
            help=f"Prompt KV in memory after prefill, as a share of dense; {BUDGET:g} unless told.",
            show_default=False,
        ),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option("--budgets", help="Several, as in 0.1,0.2,0.4: a front.", rich_help_panel=_SEVERAL),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            help="Look for the smallest budget that loses at most this much of the task's metric.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            "--confidence",
            help="With --max-drop: certify it at this confidence, at the --budgets; see docs/tuning.md.",
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    certify_samples: Annotated[
        int | None,
        typer.Option(
            "--certify-samples",
            help="Held-out samples behind those of the proof of a certificate, 500 unless told.",
            show_default=False,
            rich_help_panel=_SEVERAL,
        ),
    ] = None,
    read_budget: Annotated[
        float | None,
        typer.Option("--read-budget", help="Prompt KV read per step; tunes compute shares and K as well."),
    ] = Settings.read_budget,
    objective: Annotated[
        str, typer.Option("--objective", help="What trials are scored by: fidelity, likelihood or accuracy.")
    ] = Settings.objective,
    text: Annotated[
        str,
        typer.Option("--text", help="all stays, trade it for vision, or auto: only below what it needs."),
    ] = "auto",
    bits: Annotated[
        str, typer.Option("--bits", help="Bits that stored vision may have; 16 alone: they are not searched.")
    ] = "16,8,4,3,2",
    text_bits: Annotated[
        str, typer.Option("--text-bits", help="The same of system and prompt text.")
    ] = "16,8,4,3",
    heads: Annotated[
        str,
        typer.Option("--heads", help="Kinds of heads to try, of shared, kv_head and adaptive."),
    ] = "shared,kv_head",
    pictures: Annotated[
        str,
        typer.Option(
            "--pictures",
            help="How the model may get pictures, of whole, pooled and resized; whole alone is not searched.",
        ),
    ] = "whole",
    sampler: Annotated[
        str, typer.Option("--sampler", help="Who proposes trials: tpe, gp, cmaes or random.")
    ] = Settings.sampler,
    trials: Annotated[int, typer.Option("--trials", help="Trials of each study in all.")] = Settings.trials,
    refine: Annotated[
        int | None,
        typer.Option(
            "--refine",
            help="How many of the trials refine layer by layer; a third unless told.",
            show_default=False,
        ),
    ] = Settings.refine,
    refine_heads: Annotated[
        int,
        typer.Option(
            "--refine-heads",
            help="How many of the trials, the last, move the share of every KV head; not with --read-budget.",
        ),
    ] = Settings.refine_heads,
    samples: Annotated[
        int, typer.Option("--samples", "-n", help="Samples a trial is scored on.")
    ] = Settings.samples,
    proof_samples: Annotated[
        int, typer.Option("--proof-samples", help="Held-out samples of the proof.")
    ] = Settings.proof_samples,
    margin: Annotated[
        float,
        typer.Option("--margin", help="Loss of the metric that still counts as not inferior."),
    ] = Settings.margin,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampler.")] = Settings.seed,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Traced run; by default the newest that fits, or one is made."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the study; by default below studies/.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", help="Samples that run together.", rich_help_panel=_MEMORY)
    ] = Settings.batch_size,
    prompt_bytes: Annotated[
        int | None,
        typer.Option(
            "--prompt-bytes",
            help="Prefilled prompts that stay on the device; by default half of what is free.",
            rich_help_panel=_MEMORY,
        ),
    ] = Settings.prompt_bytes,
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Stop clearly worse trials early.")
    ] = Settings.prune,
    halving: Annotated[
        int,
        typer.Option(
            "--halving",
            help="Trials scored together, the better half of which goes on twice; 1: one by one.",
        ),
    ] = Settings.halving,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage", help="PostgreSQL URL for the trials, to share them.", rich_help_panel="Workers"
        ),
    ] = None,
    form: FormatOption = Format.table,
    figure_format: FigureFormatOption = FigureFormat.png,
) -> None:
    """Find the best policy at a budget of prompt KV, and compare it on held-out samples.

    The study is a folder; the same command resumes it.
    """
    from avlprof.api import tune as verbs
    from avlprof.evaluation.certificate import Claim
    from avlprof.tuning import Workers
    from avlprof.tuning.space import Space

    certifying = confidence is not None
    if sum(value is not None for value in (budget, budgets, max_drop)) - certifying > 1:
        raise UserError("give one of --budget, --budgets and --max-drop (two with --confidence)")
    if certifying and (max_drop is None or budget is not None):
        raise UserError("--confidence certifies a --max-drop at --budgets; give --max-drop, and no --budget")
    if certify_samples is not None and not certifying:
        raise UserError("--certify-samples are those of a certificate; give --confidence and --max-drop")
    space = Space(
        text=text,
        bits=bits_of(bits),
        text_bits=bits_of(text_bits, "--text-bits"),
        heads=tuple(part.strip() for part in heads.split(",")),
        pictures=tuple(part.strip() for part in pictures.split(",")),
    )
    settings = Settings(
        read_budget=read_budget, trials=trials, refine=refine, refine_heads=refine_heads, samples=samples,
        proof_samples=proof_samples, seed=seed, prune=prune, halving=halving, objective=objective,
        sampler=sampler, margin=margin, max_new_tokens=source.max_new_tokens, space=space,
        batch_size=batch_size, prompt_bytes=prompt_bytes,
    )  # fmt: skip
    check_output(out, folder=True)
    by = Workers(launch.workers, storage, launcher=launch.launcher, launcher_args=launch.arguments)
    with board() as watch:
        shares = parse_shares("--budgets", "0.1,0.2,0.4" if budgets is None else budgets)
        if confidence is not None and max_drop is not None:
            fresh = Claim.samples if certify_samples is None else certify_samples
            claim = Claim(max_drop, confidence, tuple(shares), fresh)
            certified = verbs.certified(
                spec, source, claim, settings, run=run, out=out, workers=by, watch=watch
            )
        elif budgets is not None:
            swept = verbs.sweep(spec, source, shares, settings, run=run, out=out, workers=by, watch=watch)
        elif max_drop is not None:
            least = verbs.smallest(
                spec, source, max_drop, settings, run=run, out=out, workers=by, watch=watch
            )
        else:
            share = BUDGET if budget is None else budget
            watch.budget(share)
            tuned = verbs.tune(spec, source, share, settings, run=run, out=out, workers=by, watch=watch)
    if confidence is not None:
        _show_sweep(certified.sweep, form, (spec, source), figure_format, certified)
    elif budgets is not None:
        _show_sweep(swept, form, (spec, source), figure_format)
    elif max_drop is not None:
        _show(least.tuned, form, (spec, source), figure_format, least.sentence())
    else:
        _show(tuned, form, (spec, source), figure_format)


def _evaluate(spec: ModelSpec, source: TaskSpec, policies: list[Path]) -> str:
    """The command that evaluates policies on the same model and task."""
    words = [*spec.words(), *source.words()]
    if spec == ModelSpec():
        words = source.words()
    return shlex.join(
        ["avlprof", "evaluate", *(word for path in policies for word in ("--policy", str(path))), *words]
    )


def _show(
    tuned: Tuned, form: Format, on: tuple[ModelSpec, TaskSpec], suffix: str, sentence: str = ""
) -> None:
    """The figures and the closing table of a study, a last sentence, and what to run next."""
    from avlprof.cli import _tuned

    wrote = _tuned.draw(tuned, suffix)
    _tuned.print_proof(tuned, form)
    if sentence:
        note(sentence)
    policy = tuned.folder / "policy.yaml"
    finished([*wrote, tuned.folder / "proof.csv", policy], _evaluate(*on, [policy]))


def bits_of(text: str, option: str = "--bits") -> tuple[int, ...]:
    """Bits with commas between."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"{option} must be whole numbers with commas, as in 16,4, got {shortened(text)}"
        ) from None


def _show_sweep(
    swept: Sweep,
    form: Format,
    on: tuple[ModelSpec, TaskSpec],
    suffix: str,
    certified: Certified | None = None,
) -> None:
    """The figures and the closing table of a sweep, what is certified of it, and what to run next."""
    from avlprof.cli import _tuned

    wrote = [*_tuned.draw_sweep(swept, suffix), swept.folder / "front.csv"]
    _tuned.print_sweep(swept, form)
    policies = [one.folder / "policy.yaml" for one in swept.studies]
    if certified is not None:
        note(certified.certificate.sentence())
        wrote.append(swept.folder / "certificate.json")
        if certified.policy is not None:
            policies = [swept.folder / "policy.yaml"]
    finished(wrote, _evaluate(*on, policies))
