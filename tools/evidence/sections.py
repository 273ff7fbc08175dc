"""The sections of a model on the page, as lines of Markdown."""

from __future__ import annotations

from avlprof.errors import counted
from avlprof.evaluation.doubts import FEWEST
from avlprof.policy import Score
from avlprof.tuning.rivals import RANDOM, UNIFORM
from tools.evidence.figures import methods_of
from tools.evidence.measure import DERIVED
from tools.evidence.results import HALF, NOTHING, AtShare, Measured
from tools.evidence.words import (
    KINDS,
    Shown,
    gap_text,
    heading,
    listed,
    noted_text,
    row,
    score_text,
    share_text,
    shown,
    side,
    told,
)

FAIR = 0.3
"""A rank correlation that is shown to be above this is a guide, if no certain one."""
LISTED = 10
"""Layers that the table of layers has at most."""


def looks(measured: Measured) -> list[str]:
    """What layers and heads look at."""
    count = int(measured.attention()["n"].max())
    lines = [f"From {counted(count, 'traced sample')}, layers counted from 0:", ""]
    lines += [f"- {sentence}" for sentence in measured.sentences()]
    return [*lines, *(f"- {sentence}" for sentence in _heads(measured)), ""]


def _heads(measured: Measured) -> list[str]:
    """How far heads differ, from the run that keeps them apart."""
    if measured.heads is None:
        return []
    shares, overlap = measured.head_shares(), measured.head_overlap()
    first, last = (shares.iloc[place] for place in (0, -1))
    many, count = len(shares), int(shares["n"].max())
    few = count < FEWEST
    mainly = int((shares["mean" if few else "low"] > HALF).sum())
    sure, samples = (
        ("", f"{count} samples, too few to be sure") if few else ("are shown to ", f"{count} samples")
    )
    within = shares.groupby("layer")["mean"].agg(lambda values: values.max() - values.min()).mean()

    def named(head: object) -> str:
        h = dict(head)  # type: ignore[call-overload]
        score = Score(mean=h["mean"], low=max(h["low"], 0.0), high=min(h["high"], 1.0), samples=count)
        return f"head {h['head']} of layer {h['layer']} with {share_text(score)}"

    sentences = [
        f"Heads differ within a layer: by {within:.0%} of their attention, mean over layers, between the one "
        f"that looks at vision most and the one that does least; {mainly} of {many} heads {sure}spend "
        f"more than half of it there. Most is {named(first)}, least {named(last)} (n = {samples})."
    ]
    if len(overlap):
        low, high = overlap["mean"].min(), overlap["mean"].max()
        sentences.append(
            f"The set of tokens that a layer's heads share holds {low:.0%} to {high:.0%} of a head's own "
            f"top tokens at a step ({overlap['mean'].mean():.0%} on average, n = {samples})."
        )
    return sentences


def needs(measured: Measured) -> list[str]:
    """Where vision KV is needed, whether attention tells, and where the search puts it."""
    spread = [f"- {_spread(at, measured.layers)}" for at in measured.budgets]
    if measured.damage is None:
        return [*spread, ""]
    *single, whole = measured.layer_damage()
    order = sorted(range(measured.layers), key=lambda layer: -single[layer].mean)
    free = sum(score.high < NOTHING for score in single)
    rho, low, high, count = measured.agreement()
    sure = f"[{low:+.2f}, {high:+.2f}], " if count >= FEWEST else "too few for an interval, "
    guide = "a fair" if low > FAIR and count >= FEWEST else "no sure"
    lines = [
        f"Held-out samples, n = {whole.samples}. Without any vision KV the KL is {score_text(whole)}. With "
        f"none in one layer alone it is shown to stay below {NOTHING:g} for {free} of {measured.layers}. "
        f"Attention is {guide} guide to which: over layers, the rank correlation of attention on vision with "
        f"this loss is {rho:+.2f} ({sure}n = {count} layers).",
        "",
        *heading(
            "layer", "KL without its vision KV", "attention on vision", *_kept_columns(measured.budgets)
        ),
    ]
    attention = {int(of["layer"]): of for of in measured.attention().to_dict("records")}
    for layer in order[:LISTED]:
        of = attention[layer]
        seen = Score(
            mean=of["mean"], low=max(of["low"], 0.0), high=min(of["high"], 1.0), samples=int(of["n"])
        )
        kept = [_kept(at, layer, measured.layers) for at in measured.budgets]
        lines.append(row(str(layer), score_text(single[layer]), share_text(seen), *kept))
    if measured.layers > LISTED:
        lines += ["", f"The other {measured.layers - LISTED} layers lose less than these."]
    return [*lines, "", *spread, ""]


def _kept(at: AtShare, layer: int, layers: int) -> str:
    """Share of the vision tokens that a layer keeps, and the bits of a number."""
    return f"{at.policy.keep(layers)[layer]:.0%}, {at.policy.bits(layers)[layer]} bits"


def _kept_columns(budgets: tuple[AtShare, ...]) -> list[str]:
    return [f"kept at {at.share:.0%}" for at in budgets]


def _spread(at: AtShare, layers: int) -> str:
    """Where the search puts the vision KV."""
    keep = at.policy.keep(layers)
    half = [layer for layer, share in enumerate(keep) if share >= HALF]
    none = sum(share < NOTHING for share in keep)
    held = sum(keep[layer] for layer in half) / max(sum(keep), 1e-9)
    named = f"layer{'s' if len(half) > 1 else ''} {listed(map(str, half))}"
    where = f"{named} ({held:.0%} of what stays)" if half else "no layer"
    return (
        f"At {at.share:.0%} the search keeps half or more of the vision tokens in {where}; it leaves {none} "
        f"of {layers} layers with less than {NOTHING:.0%}. Text is in {at.policy.text_bits(layers)[0]} bits. "
        f"Of the winner, {at.origin.sentence}."
    )


def knobs(measured: Measured) -> list[str]:
    """KL saved by each thing that the winner turned, a row a knob and a column a budget."""
    columns = {at.share: {knob.short: knob for knob in at.knobs()} for at in measured.compared}
    names = dict.fromkeys(name for known in columns.values() for name in known)
    lines = [
        "KL saved in the tuned policy by one thing alone, at the same bytes "
        f"(n = {measured.plan.held_out} held-out samples). Bold: shown, up or down.",
        "",
        *heading("the winner's", *(f"{share:.0%}" for share in columns)),
    ]
    for name in names:
        cells = [gap_text(known[name].gap) if name in known else "" for known in columns.values()]
        lines.append(row(name, *cells))
    lines += ["", *_legend(measured), ""]
    return [*lines, *(f"- {_worth(at)}" for at in measured.compared), ""]


def _legend(measured: Measured) -> list[str]:
    """What each knob is, as far as it differs between budgets."""
    texts: dict[str, list[str]] = {}
    for at in measured.compared:
        for knob in at.knobs():
            known = texts.setdefault(knob.short, [])
            text = knob.name.partition(": ")[2]
            if text not in known:
                known.append(text)
    return ["; ".join(f"*{short}*: {', or '.join(known)}" for short, known in texts.items()) + "."]


def _worth(at: AtShare) -> str:
    """Which knobs help, which do harm, and which are worth nothing that these samples show."""
    found: dict[Shown, list[str]] = {kind: [] for kind in KINDS}
    for knob in at.knobs():
        found[shown(knob.gap)].append(f"*{knob.short}*")
    texts = {"better": "worth something", "worse": "doing harm", "same": "not shown to be worth anything"}
    parts = [f"{texts[kind]}: {listed(names)}" for kind, names in found.items() if names]
    return f"At {at.share:.0%}, {'; '.join(parts)}."


def table(measured: Measured) -> list[str]:
    """A row a budget and method."""
    lines = [
        f"Held-out samples, n = {measured.plan.held_out}. In brackets after the budget: the share of the "
        "dense prompt's bytes that all of them hold.",
        "",
        *heading(
            "vision KV (prompt KV)", "method", "KL to dense", "tokens that are dense's", "KL saved by tuned"
        ),
    ]
    for at in measured.compared:
        for number, (name, text) in enumerate(methods_of(at)):
            first = f"{at.share:.0%} ({at.live_share:.1%})" if number == 0 else ""
            saved = "" if name == "tuned" else gap_text(at.saved(name))
            tokens = share_text(at.of(name, "agreement"), digits=1)
            lines.append(row(first, text, score_text(at.of(name)), tokens, saved))
    return [*lines, "", *(f"- {_winner(at)}" for at in measured.compared), ""]


def _winner(at: AtShare) -> str:
    words = {
        "better": "closer to dense than",
        "worse": "farther from dense than",
        "same": "not told apart from",
    }
    rivals = {UNIFORM: "uniform", RANDOM: "random", at.strongest: f"the strongest rival (`{at.strongest}`)"}
    rivals |= {DERIVED: "what attention alone suggests"}
    groups: dict[Shown, list[str]] = {}
    for name, text in rivals.items():
        if name in at.methods:
            groups.setdefault(shown(at.saved(name)), []).append(text)
    parts = [f"{words[kind]} {listed(groups[kind])}" for kind in KINDS if kind in groups]
    return f"At {at.share:.0%} tuned is {'; '.join(parts)}."


def against(at: AtShare, method: str) -> Shown:
    """What is shown of tuned against a method; one that is the tuned policy itself has no row."""
    return shown(at.saved(method)) if method in at.methods else "same"


def saved(at: AtShare, method: str) -> str:
    """KL saved against a method, in words."""
    same = method == "tuned" or method not in at.methods
    return "the same policy" if same else gap_text(at.saved(method))


def in_short(measured: Measured) -> str:
    """Whether uneven layers and the ranking pay, and whether the strongest rival is beaten."""
    here = measured.compared
    uneven = {at.share: against(at, at.flat) for at in here if at.flat != "tuned"}
    even = [f"{at.share:.0%}" for at in here if at.share not in uneven]
    layers = told(
        f"On `{measured.plan.model}` uneven layers",
        uneven,
        {"better": "pay", "worse": "do harm", "same": "are not shown to pay"},
    )
    layers += f"{',' if uneven else ''} are not kept at {listed(even)}" if even else ""
    best = told(
        "the tuned policy",
        {at.share: against(at, at.strongest) for at in here},
        {
            "better": "beats the strongest rival",
            "worse": "loses to the strongest rival",
            "same": "is not told apart from the strongest rival",
        },
    )
    chance = told(
        "and",
        {at.share: against(at, RANDOM) for at in here},
        {
            "better": "beats random tokens",
            "worse": "loses to random tokens",
            "same": "ties with random tokens",
        },
    )
    return f"{layers}; {best}, {chance} (KL, n = {measured.plan.held_out}).{_generated(measured)}"


def _generated(measured: Measured) -> str:
    """Whether generated answers tell the tuned policy from its strongest rival."""
    gaps = {at.share: at.proved.differences[at.proved.strongest] for at in measured.proved if at.proved}
    if not gaps:
        return ""
    found = {share: side(gap.low, gap.high) for share, gap in gaps.items()}
    texts: dict[Shown, str] = {
        "better": "better than the strongest rival's",
        "worse": "worse than the strongest rival's",
        "same": "not told apart from the strongest rival's",
    }
    return f" {told('Its generated answers are', found, texts)} (n = {measured.plan.generated})."


def answers(measured: Measured) -> list[str]:
    """What the proofs of the studies say: the task's metric on answers that were generated."""
    proved = measured.proved
    origin = proved[0].policy.provenance
    count = proved[0].scores()["dense"].samples
    lines = [
        f"The proof of each study: `{origin.metric if origin else 'score'}` of greedy answers to n = {count} "
        "held-out samples, the policy really running. Its strongest rival is the best by this metric on "
        "answers generated for the samples of the search, shipped baselines with a prefill filter included.",
        "",
        *heading(
            "vision KV", "dense", "tuned", "strongest rival", "tuned less it", "less random", "less dense"
        ),
    ]
    for at in proved:
        scores, proof = at.scores(), at.proved
        assert proof is not None
        ours = next(name for name in scores if name.startswith("tuned"))
        best = f"{score_text(scores[proof.strongest])} `{proof.strongest}`"
        random = next((name for name in proof.differences if name.startswith(RANDOM)), "")
        gaps = [noted_text(proof.differences.get(name)) for name in (proof.strongest, random, "dense")]
        cells = [score_text(scores["dense"]), score_text(scores[ours]), best]
        lines.append(row(f"{at.share:.0%}", *cells, *gaps))
    return [*lines, "", *(f"- {_verdict(at)}" for at in proved), ""]


def _verdict(at: AtShare) -> str:
    proof = at.proved
    assert proof is not None
    why = "; ".join(proof.doubts) or "the interval reaches below"
    answer = "yes" if proof.non_inferior else f"not shown ({why})"
    margin = f"by more than {proof.margin:g}"
    return f"At {at.share:.0%}: not inferior to the strongest rival {margin} of the metric: {answer}."
