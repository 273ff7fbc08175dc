"""Accuracy, fidelity, bytes and seconds of policies; comparison at equal bytes."""

from avlprof.evaluation.answers import generate_answers
from avlprof.evaluation.answers_store import AnswerStore
from avlprof.evaluation.contenders import equal_bytes
from avlprof.evaluation.evaluate import evaluate
from avlprof.evaluation.evaluation import Evaluation
from avlprof.evaluation.intervals import PairedDifference, detectable_drop, mean_interval, paired_difference
from avlprof.evaluation.latency import Latency, measure_latency
from avlprof.evaluation.record import Answer

__all__ = [
    "Answer",
    "AnswerStore",
    "Evaluation",
    "Latency",
    "PairedDifference",
    "detectable_drop",
    "equal_bytes",
    "evaluate",
    "generate_answers",
    "mean_interval",
    "measure_latency",
    "paired_difference",
]
