"""Search for the best policy at a budget, and prove it."""

from avlprof.tuning.candidate import Budget, Candidate
from avlprof.tuning.export import export_policy
from avlprof.tuning.settings import Settings
from avlprof.tuning.smallest import Smallest, smallest
from avlprof.tuning.space import Space
from avlprof.tuning.storage import StudyMeta, read_meta, read_study
from avlprof.tuning.sweep import Sweep, sweep
from avlprof.tuning.tune import Tuned, tune

__all__ = [
    "Budget",
    "Candidate",
    "Settings",
    "Smallest",
    "Space",
    "StudyMeta",
    "Sweep",
    "Tuned",
    "export_policy",
    "read_meta",
    "read_study",
    "smallest",
    "sweep",
    "tune",
]
