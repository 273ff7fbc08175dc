"""Search for the best policy at a budget, and prove it."""

from avlprof.tuning.candidate import Budget, Candidate, Space
from avlprof.tuning.export import export_policy
from avlprof.tuning.storage import StudyMeta, open_study, read_meta
from avlprof.tuning.tune import Settings, Tuned, tune

__all__ = [
    "Budget",
    "Candidate",
    "Settings",
    "Space",
    "StudyMeta",
    "Tuned",
    "export_policy",
    "open_study",
    "read_meta",
    "tune",
]
