"""How tokens are ranked; one idea a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from avlprof._lazy import exports
from avlprof.policy import ScorerSpec
from avlprof.registry import Registry

if TYPE_CHECKING:
    from avlprof.scorers._base import Prefill, Scorer

SCORERS: Registry[type[Scorer]] = Registry(
    "scorer",
    {
        "last_query": "avlprof.scorers.last_query:LastQuery",
        "accumulated": "avlprof.scorers.accumulated:Accumulated",
        "instruction": "avlprof.scorers.instruction:Instruction",
        "window": "avlprof.scorers.window:Window",
        "text_weighted": "avlprof.scorers.text_weighted:TextWeighted",
        "pooled": "avlprof.scorers.pooled:Pooled",
        "valued": "avlprof.scorers.valued:Valued",
        "distinct": "avlprof.scorers.distinct:Distinct",
        "key_norm": "avlprof.scorers.key_norm:KeyNorm",
        "key_diversity": "avlprof.scorers.key_diversity:KeyDiversity",
        "value_norm": "avlprof.scorers.value_norm:ValueNorm",
        "position": "avlprof.scorers.position:Position",
        "random": "avlprof.scorers.random:Random",
    },
)


def make_scorer(spec: ScorerSpec) -> Scorer:
    """The scorer of a policy; `UserError` names an unknown scorer or option."""
    scorer: Scorer = SCORERS.make(spec.name, spec.options)
    return scorer


__all__ = ["SCORERS", "Prefill", "Scorer", "make_scorer"]

# who looks at the names, such as a search space, needs no torch
__getattr__, __dir__ = exports(
    __name__, {"Prefill": "avlprof.scorers._base", "Scorer": "avlprof.scorers._base"}
)
