"""The page: tables, figures and sentences that follow from the numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from avlprof.errors import counted
from avlprof.evaluation import PairedDifference
from avlprof.evaluation.doubts import FEWEST
from avlprof.files import write_text
from avlprof.plots.save import save_figure
from avlprof.policy import Score
from avlprof.tuning.rivals import RANDOM, UNIFORM
from tools.evidence.figures import budgets_figure, layers_figure, methods_of
from tools.evidence.measure import DERIVED
from tools.evidence.plan import Plan
from tools.evidence.results import HALF, NOTHING, AtShare, Measured, read

TEXTS = Path(__file__).parent
"""Where `head.md` and `tail.md` lie, the parts of the page that no number changes."""
FAIR = 0.3
"""A rank correlation that is shown to be above this is a guide, if no certain one."""


def write_page(folders: Sequence[tuple[Plan, Path]], shares: Sequence[float], path: Path) -> Path:
    """Write the page and its figures from what the folders of the models hold."""
    known = [found for plan, folder in folders if (found := read(plan, folder, shares))]
    images = path.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    parts = [_text("head"), *_summary(known)]
    for measured in known:
        parts += _model(measured, images)
    commands, rows = "\n".join(map(_command, known)), "\n".join(map(_plan, known))
    parts.append(_text("tail").format(commands=commands, plans=rows))
    write_text(path, "\n".join(parts))
    return path


def _text(name: str) -> str:
    return (TEXTS / f"{name}.md").read_text(encoding="utf-8")


def _command(measured: Measured) -> str:
    command = f"python -m tools.evidence --models {measured.plan.model}"
    return f"{command:<56} # one model"


def _plan(measured: Measured) -> str:
    p = measured.plan
    sizes = (p.traced, p.samples, p.held_out, p.generated, f"{p.trials}, {p.refine}")
    return f"| `{p.model}` | `{p.task}` | " + " | ".join(map(str, sizes)) + " |"


def _summary(known: Iterable[Measured]) -> list[str]:
    """Who wins, in one table and a sentence a model."""
    rows = [
        "| model | vision KV | tuned, KL | saved against uniform | against random | against the strongest |"
    ]
    rows.append("|---" * 6 + "|")
    sentences = []
    for measured in known:
        for at in measured.compared:
            cells = [f"`{measured.plan.model}`", f"{at.share:.0%}", _score(at.of("tuned"))]
            cells += [_saved(at, name) for name in (UNIFORM, RANDOM)]
            cells += [f"{_saved(at, at.strongest)} `{at.strongest}`"]
            rows.append("| " + " | ".join(cells) + " |")
        if measured.compared:
            sentences.append(f"- {_layers_pay(measured)}")
    return ["## In short", "", *sentences, "", *rows, ""] if sentences else []


def _layers_pay(measured: Measured) -> str:
    """Whether uneven layers pay, and whether the strongest rival is beaten."""
    name = f"On `{measured.plan.model}`"
    flat = {at.share: _against(at, at.flat) for at in measured.compared}
    rival = {at.share: _against(at, at.strongest) for at in measured.compared}
    layers = _told(
        flat, "uneven layers are worth something", "cost something", "are not shown to be worth anything"
    )
    best = _told(
        rival, "the tuned policy beats the strongest rival", "loses to it", "is not told apart from it"
    )
    return f"{name} {layers}; {best} (n = {measured.plan.held_out})."


def _told(words: dict[float, str], better: str, worse: str, same: str) -> str:
    """`better at 10% and 20%, same at 40%`; the subject of the sentence is in `better`."""
    subject = {"better": better, "worse": worse, "same": same}
    groups = {kind: [share for share, word in words.items() if word == kind] for kind in subject}
    first = [kind for kind in ("better", "worse", "same") if groups[kind]]
    parts = []
    for kind in first:
        text = subject[kind]
        if kind == first[0] and kind != "better":  # the subject is still to be named
            verb = " are " if " are " in better else " beats "
            text = f"{better.split(verb)[0]} {text}"
        parts.append(f"{text} at {_list([f'{share:.0%}' for share in groups[kind]])}")
    return ", ".join(parts)


def _model(measured: Measured, images: Path) -> list[str]:
    """The section of a model."""
    plan = measured.plan
    lines = [f"## The model `{plan.model}`", ""]
    lines.append(
        f"{measured.layers} layers, {measured.vision} vision tokens a prompt; task `{plan.task}`. "
        f"{counted(plan.traced, 'sample')} traced, {plan.samples} searched on, {plan.held_out} held out for "
        f"KL and {plan.generated} for generated answers. {plan.few}".rstrip()
    )
    lines += ["", *_unfinished(measured), f"### What the layers and heads of `{plan.model}` look at", ""]
    lines += [f"- {sentence}" for sentence in measured.sentences()]
    lines += ["", *_needs(measured)]
    figure = save_figure(layers_figure(measured), images / f"evidence-{plan.model}-layers.png")
    lines += ["", f"![Attention, need and kept vision KV by layer](images/{figure.name})", ""]
    if measured.compared:
        lines += [f"### What the knobs are worth on `{plan.model}`", "", *_knobs(measured), ""]
        lines += [f"### Who wins at equal bytes on `{plan.model}`", "", *_table(measured), ""]
        figure = save_figure(budgets_figure(measured), images / f"evidence-{plan.model}-budgets.png")
        lines += [f"![KL to dense and agreement by budget](images/{figure.name})", ""]
    if measured.budgets:
        lines += [f"### Generated answers of `{plan.model}`", "", *_answers(measured), ""]
    return lines


def _unfinished(measured: Measured) -> list[str]:
    """What is not measured yet."""
    waiting = [f"{share:.0%} is not tuned" for share in measured.missing]
    waiting += [f"{at.share:.0%} is not compared" for at in measured.budgets if at.table is None]
    waiting += ["what each layer needs is not measured"] if measured.damage is None else []
    return [f"**Not finished:** {_list(waiting)}; the same command goes on.", ""] if waiting else []


def _needs(measured: Measured) -> list[str]:
    """Where vision KV is needed, whether attention tells, and where the search puts it."""
    lines = []
    if measured.damage is not None:
        *single, whole = measured.layer_damage()
        order = sorted(range(measured.layers), key=lambda layer: -single[layer].mean)
        free = [layer for layer in order if single[layer].high < NOTHING]
        most = ", ".join(f"layer {layer} {_score(single[layer])}" for layer in order[:3])
        lines.append(
            f"**What they need.** Without any vision KV the KL is {_score(whole)} (n = {whole.samples}). "
            f"Where one layer alone has none it is most for {most}; for {len(free)} of {measured.layers} "
            f"layers it is shown to stay below {NOTHING:g}."
        )
        rho, low, high, count = measured.agreement()
        sure = f"[{low:+.2f}, {high:+.2f}], " if count >= FEWEST else "too few for an interval, "
        guide = "a fair" if low > FAIR and count >= FEWEST else "no sure"
        lines.append(
            f"Attention is {guide} guide to that: over layers, the rank correlation of attention on vision "
            f"with this loss is {rho:+.2f} ({sure}n = {count} layers)."
        )
    for at in measured.budgets:
        keep = at.policy.keep(measured.layers)
        half = [layer for layer, share in enumerate(keep) if share >= HALF]
        none = sum(share < NOTHING for share in keep)
        held = sum(keep[layer] for layer in half) / max(sum(keep), 1e-9)
        whole_layers = (
            f"layers {_list(map(str, half))}, with {held:.0%} of what stays" if half else "no layer"
        )
        lines.append(
            f"At {at.share:.0%} the winner keeps half or more of the vision KV in {whole_layers}; "
            f"{counted(none, 'layer')} of {measured.layers} keep less than {NOTHING:.0%}."
        )
    return (
        [" ".join(lines[:2]), "", *(f"- {line}" for line in lines[2:])]
        if measured.damage is not None
        else lines
    )


def _knobs(measured: Measured) -> list[str]:
    """KL saved by each thing that the winner turned, a row a knob and a column a budget."""
    columns = {at.share: {knob.name: knob for knob in at.knobs()} for at in measured.compared}
    names = dict.fromkeys(name for knobs in columns.values() for name in knobs)
    lines = [
        "KL saved in the tuned policy by one thing alone, at the same bytes "
        f"(n = {measured.plan.held_out} held-out samples). Where the interval holds 0, it is not shown to be "
        "worth anything.",
        "",
        "| the winner's | " + " | ".join(f"{share:.0%}" for share in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in names:
        cells = [_gap(knobs[name].gap) if name in knobs else "" for knobs in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- {_knob_sentence(at)}" for at in measured.compared)]
    return lines


def _knob_sentence(at: AtShare) -> str:
    """Which knobs help, which do harm, and which are worth nothing that these samples show."""
    words: dict[str, list[str]] = {"better": [], "worse": [], "same": []}
    for knob in at.knobs():
        words[_word(knob.gap)].append(knob.name.split(":")[0] if ":" in knob.name else knob.name)
    texts = {"better": "worth something", "worse": "do harm", "same": "not shown to be worth anything"}
    parts = [f"{texts[kind]}: {_list(dict.fromkeys(names))}" for kind, names in words.items() if names]
    return f"At {at.share:.0%}, {'; '.join(parts)}."


def _table(measured: Measured) -> list[str]:
    """A row a budget and method."""
    lines = [
        f"Held-out samples, n = {measured.plan.held_out}. In brackets after the budget: the share of the "
        "dense prompt's bytes that all of them hold.",
        "",
        "| vision KV (prompt KV) | method | KL to dense | tokens that are dense's | KL saved by tuned |",
        "|---|---|---|---|---|",
    ]
    for at in measured.compared:
        for number, (name, text) in enumerate(methods_of(at)):
            first = f"{at.share:.0%} ({at.live_share:.1%})" if number == 0 else ""
            saved = "" if name == "tuned" else _gap(at.saved(name))
            agreement = at.of(name, "agreement")
            tokens = f"{agreement.mean:.1%} [{agreement.low:.1%}, {agreement.high:.1%}]"
            lines.append(f"| {first} | {text} | {_score(at.of(name))} | {tokens} | {saved} |")
    lines.append("")
    for at in measured.compared:
        lines.append(f"- {_winner_sentence(at)}")
    return lines


def _winner_sentence(at: AtShare) -> str:
    words = {
        "better": "closer to dense than",
        "worse": "farther from dense than",
        "same": "not told apart from",
    }
    rivals = {UNIFORM: "uniform", RANDOM: "random", at.strongest: f"the strongest rival, `{at.strongest}`"}
    rivals |= {DERIVED: "what is derived from attention without a search"}
    groups: dict[str, list[str]] = {}
    for name, text in rivals.items():
        if name in at.methods:
            groups.setdefault(_word(at.saved(name)), []).append(text)
    parts = [f"{words[kind]} {_list(texts)}" for kind, texts in groups.items()]
    return f"At {at.share:.0%} tuned is {'; '.join(parts)}."


def _answers(measured: Measured) -> list[str]:
    """What the proofs of the studies say: the task's metric on answers that were generated."""
    first = measured.budgets[0]
    metric = first.policy.provenance.metric if first.policy.provenance else "score"
    lines = [
        f"The proof of each study: `{metric}` of greedy answers to n = {first.proved.samples} held-out "
        "samples, the policy really running. Its strongest rival is the best by this metric on answers "
        "generated for the samples of the search, shipped baselines with a prefill filter included.",
        "",
        "| vision KV | dense | tuned | strongest rival | tuned less strongest | less random | less dense |",
        "|---" * 7 + "|",
    ]
    for at in measured.budgets:
        scores = {str(row["policy"]): row for row in at.proof.to_dict("records")}
        proof, ours = at.proved, next(name for name in scores if name.startswith("tuned"))
        cells = [f"{at.share:.0%}"]
        for name in ("dense", ours, proof.strongest):
            row = scores[name]
            text = f"{row['score']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
            cells.append(f"{text} `{name}`" if name == proof.strongest else text)
        random = next((name for name in proof.differences if name.startswith(RANDOM)), "")
        for name in (proof.strongest, random, "dense"):
            gap = proof.differences.get(name)
            cells.append(f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]" if gap else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for at in measured.budgets:
        answer = (
            "yes"
            if at.proved.non_inferior
            else f"not shown ({'; '.join(at.proved.doubts) or 'the interval reaches below'})"
        )
        lines.append(
            f"- At {at.share:.0%}: not inferior to the strongest rival by more than "
            f"{at.proved.margin:g}: {answer}."
        )
    return lines


def _word(gap: PairedDifference) -> str:
    """What a saving shows: `better`, `worse`, or `same` where its interval holds 0."""
    if gap.difference.low > 0:
        return "better"
    return "worse" if gap.difference.high < 0 else "same"


def _against(at: AtShare, method: str) -> str:
    """As `_word`, of tuned against a method; one that is the tuned policy itself has no row."""
    return _word(at.saved(method)) if method in at.methods else "same"


def _saved(at: AtShare, method: str) -> str:
    return _gap(at.saved(method)) if method in at.methods else "the same policy"


def _score(score: Score) -> str:
    digits = 3 if score.mean >= 0.01 else 4
    return f"{score.mean:.{digits}f} [{score.low:.{digits}f}, {score.high:.{digits}f}]"


def _gap(gap: PairedDifference) -> str:
    """A difference with its interval, in bold where the interval leaves out 0."""
    text = f"{gap.difference.mean:+.3f} [{gap.difference.low:+.3f}, {gap.difference.high:+.3f}]"
    return f"**{text}**" if _word(gap) != "same" else text


def _list(words: Iterable[str]) -> str:
    """`a, b and c`."""
    known = list(words)
    return " and ".join([", ".join(known[:-1]), known[-1]] if len(known) > 1 else known)
