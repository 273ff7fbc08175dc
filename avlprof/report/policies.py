"""The policy of a report: what it does, what it costs on this run's prompts, how it was judged."""

from __future__ import annotations

from dataclasses import dataclass

from avlprof.analysis import Profile
from avlprof.budgets.resolve import resolve
from avlprof.plots import policy_layers
from avlprof.policy import Policy, Provenance, Score, dump_policy, live_share, read_share, said_governed
from avlprof.report.figures import Embedded, as_svg
from avlprof.report.tables import percent


@dataclass(frozen=True)
class ScoreRow:
    """A score of one policy on held-out samples."""

    name: str
    mean: str
    interval: str
    samples: int


@dataclass(frozen=True)
class PolicyPart:
    """What the page says about a policy; `yaml` is without its provenance, `whole` with it."""

    name: str
    description: str
    facts: tuple[tuple[str, str], ...]
    figure: Embedded
    metric: str
    scores: tuple[ScoreRow, ...]
    proof: str
    yaml: str
    whole: str


def policy_part(policy: Policy, profile: Profile) -> PolicyPart:
    """A policy beside a profile; one with an allocator is worked out for it.

    Raises:
        UserError: the policy is written for another number of layers, or its allocator needs evidence
            that the profile lacks.
    """
    clear = resolve(policy, profile.evidence())
    clear.check_layers(profile.layers)
    origin = policy.provenance or Provenance()
    return PolicyPart(
        name=policy.name,
        description=policy.description,
        facts=tuple(_facts(clear, profile, origin)),
        figure=as_svg(policy_layers(clear, profile.layers, profile.governed)),
        metric=origin.metric,
        scores=tuple(_score_row(name, score) for name, score in origin.scores.items()),
        proof=_proof(origin),
        yaml=dump_policy(policy.model_copy(update={"provenance": None})),
        whole=dump_policy(policy) if policy.provenance else "",
    )


def _facts(policy: Policy, profile: Profile, origin: Provenance) -> list[tuple[str, str]]:
    prompts, layers, steps = profile.prompts(), profile.layers, profile.answer_tokens
    live, read = live_share(policy, prompts, layers), read_share(policy, prompts, layers, steps)
    settings = profile.meta.settings
    here = "this run" if origin.run_hash == profile.meta.run_hash else origin.run
    mine = (origin.model, origin.model_hash) == (settings.model, settings.model_hash)
    model = f"{origin.model}{'' if mine else ', not the model of this run'}" if origin.model else ""
    budget = [f"{percent(origin.budget)} live"] if origin.budget is not None else []
    budget += [f"{percent(origin.read_budget)} read"] if origin.read_budget is not None else []
    rows = [
        ("Live prompt KV", f"{percent(live)} of dense after prefill, on this run's {len(prompts):,} prompts"),
        ("Read prompt KV", f"{percent(read)} of dense per step, mean over {steps} decoding steps"),
        ("Layers", said_governed(profile.governed, layers)),
        ("Asked for", " and ".join(budget)),
        ("Made by", ", ".join(text for text in (origin.made_by, origin.created) if text)),
        ("Made for", ", ".join(text for text in (model, origin.task) if text)),
        ("Made from", here),
        ("Source", policy.source),
        ("Notes", origin.notes),
    ]
    return [(name, text) for name, text in rows if text]


def _score_row(name: str, score: Score) -> ScoreRow:
    return ScoreRow(name, f"{score.mean:.3f}", f"{score.low:.3f} to {score.high:.3f}", score.samples)


def _proof(origin: Provenance) -> str:
    proof = origin.proof
    if proof is None:
        return ""
    against = proof.differences.get(proof.strongest)
    by = (
        f" The difference is {against.mean:+.3f} (95% interval {against.low:+.3f} to {against.high:+.3f})."
        if against
        else ""
    )
    verdict = "was shown to be" if proof.holds else "was not shown to be"
    why = f" Why not: {'; '.join(proof.doubts)}." if proof.doubts else ""
    return (
        f"On {proof.samples} {proof.split} samples it {verdict} as good, within {proof.margin:g}, as "
        f"“{proof.strongest}”, the hand-set policy that was best on the search split.{by}{why}"
    )
