"""Accuracy, fidelity, bytes and seconds of policies; comparison at equal bytes."""

from avlprof.evaluation.answers import generate_answers
from avlprof.evaluation.answers_store import AnswerStore
from avlprof.evaluation.at_budget import OverBudgetError, at_budget
from avlprof.evaluation.compare import compare
from avlprof.evaluation.comparison import Comparison
from avlprof.evaluation.contenders import equal_bytes
from avlprof.evaluation.evaluate import evaluate
from avlprof.evaluation.evaluation import Evaluation
from avlprof.evaluation.intervals import PairedDifference, detectable_drop, mean_interval, paired_difference
from avlprof.evaluation.latency import Latency, measure_latency
from avlprof.evaluation.lineup import LineUp, line_up
from avlprof.evaluation.record import Answer
from avlprof.evaluation.strongest import Strongest, strongest

__all__ = [
    "Answer",
    "AnswerStore",
    "Comparison",
    "Evaluation",
    "Latency",
    "LineUp",
    "OverBudgetError",
    "PairedDifference",
    "Strongest",
    "at_budget",
    "compare",
    "detectable_drop",
    "equal_bytes",
    "evaluate",
    "generate_answers",
    "line_up",
    "mean_interval",
    "measure_latency",
    "paired_difference",
    "strongest",
]
