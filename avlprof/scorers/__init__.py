"""How tokens are ranked; one idea a file."""

from __future__ import annotations

from dataclasses import fields

from avlprof.errors import UserError
from avlprof.policy import ScorerSpec
from avlprof.registry import Registry, unknown
from avlprof.scorers.scorer import Prefill, Scorer

SCORERS: Registry[type[Scorer]] = Registry(
    "scorer",
    {
        "last_query": "avlprof.scorers.last_query:LastQuery",
        "accumulated": "avlprof.scorers.accumulated:Accumulated",
        "instruction": "avlprof.scorers.instruction:Instruction",
        "key_diversity": "avlprof.scorers.key_diversity:KeyDiversity",
        "value_norm": "avlprof.scorers.value_norm:ValueNorm",
        "position": "avlprof.scorers.position:Position",
        "random": "avlprof.scorers.random:Random",
    },
)


def make_scorer(spec: ScorerSpec) -> Scorer:
    """The scorer of a policy; `UserError` names an unknown scorer or option."""
    made = SCORERS.get(spec.name)
    known = [f.name for f in fields(made)]  # type: ignore[arg-type]
    for option in spec.options:
        if option not in known:
            if not known:
                raise UserError(f"scorer '{spec.name}' takes no options, got '{option}'")
            raise unknown(f"option of scorer '{spec.name}'", option, known)
    return made(**spec.options)


__all__ = ["SCORERS", "Prefill", "Scorer", "make_scorer"]
