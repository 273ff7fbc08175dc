"""Accuracy, fidelity, bytes and seconds of policies; comparison at equal bytes; closed routes.

Names are imported when first asked for, since most need torch. The verbs are
`evaluate.evaluate`, `compare.compare` and `knockout.knockout`, below `avlprof.evaluation`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avlprof._lazy import exports

if TYPE_CHECKING:
    from avlprof.evaluation.answers import AnswerSettings, answers_under, generate_answers
    from avlprof.evaluation.compare import Comparison, ComparisonSettings, Strongest, strongest
    from avlprof.evaluation.damage import Knockout
    from avlprof.evaluation.evaluate import Evaluation, EvaluationSettings
    from avlprof.evaluation.intervals import (
        PairedDifference,
        detectable_drop,
        mean_interval,
        paired_difference,
    )
    from avlprof.evaluation.knockout import KnockoutSettings
    from avlprof.evaluation.latency import Latency, measure_latency
    from avlprof.evaluation.lineup import LineUp, equal_bytes, line_up
    from avlprof.evaluation.store import Answer, AnswerStore, LossStore

__all__ = [
    "Answer",
    "AnswerSettings",
    "AnswerStore",
    "Comparison",
    "ComparisonSettings",
    "Evaluation",
    "EvaluationSettings",
    "Knockout",
    "KnockoutSettings",
    "Latency",
    "LineUp",
    "LossStore",
    "PairedDifference",
    "Strongest",
    "answers_under",
    "detectable_drop",
    "equal_bytes",
    "generate_answers",
    "line_up",
    "mean_interval",
    "measure_latency",
    "paired_difference",
    "strongest",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Answer": "avlprof.evaluation.store",
        "AnswerSettings": "avlprof.evaluation.answers",
        "AnswerStore": "avlprof.evaluation.store",
        "Comparison": "avlprof.evaluation.compare",
        "ComparisonSettings": "avlprof.evaluation.compare",
        "Evaluation": "avlprof.evaluation.evaluate",
        "EvaluationSettings": "avlprof.evaluation.evaluate",
        "Knockout": "avlprof.evaluation.damage",
        "KnockoutSettings": "avlprof.evaluation.knockout",
        "Latency": "avlprof.evaluation.latency",
        "LineUp": "avlprof.evaluation.lineup",
        "LossStore": "avlprof.evaluation.store",
        "PairedDifference": "avlprof.evaluation.intervals",
        "Strongest": "avlprof.evaluation.compare",
        "answers_under": "avlprof.evaluation.answers",
        "detectable_drop": "avlprof.evaluation.intervals",
        "equal_bytes": "avlprof.evaluation.lineup",
        "generate_answers": "avlprof.evaluation.answers",
        "line_up": "avlprof.evaluation.lineup",
        "mean_interval": "avlprof.evaluation.intervals",
        "measure_latency": "avlprof.evaluation.latency",
        "paired_difference": "avlprof.evaluation.intervals",
        "strongest": "avlprof.evaluation.compare",
    },
)
