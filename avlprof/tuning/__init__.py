"""Search for the best policy at a budget, and prove it.

Names are imported when first asked for: who lists studies, or shows one, needs no model and no
torch. The verbs are `tune.tune`, `sweep.sweep`, `smallest.smallest` and `certify.certified`, below
`avlprof.tuning`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avlprof._lazy import exports

if TYPE_CHECKING:
    from avlprof.tuning.candidate import Budget, Candidate
    from avlprof.tuning.certify import Certified
    from avlprof.tuning.reading import Study, export_policy
    from avlprof.tuning.settings import Settings
    from avlprof.tuning.smallest import Smallest
    from avlprof.tuning.space import Space
    from avlprof.tuning.study import StudyMeta, read_meta, read_study
    from avlprof.tuning.sweep import Sweep
    from avlprof.tuning.tune import Tuned
    from avlprof.tuning.workers import Workers

__all__ = [
    "Budget",
    "Candidate",
    "Certified",
    "Settings",
    "Smallest",
    "Space",
    "Study",
    "StudyMeta",
    "Sweep",
    "Tuned",
    "Workers",
    "export_policy",
    "read_meta",
    "read_study",
]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Budget": "avlprof.tuning.candidate",
        "Candidate": "avlprof.tuning.candidate",
        "Certified": "avlprof.tuning.certify",
        "Settings": "avlprof.tuning.settings",
        "Smallest": "avlprof.tuning.smallest",
        "Space": "avlprof.tuning.space",
        "Study": "avlprof.tuning.reading",
        "StudyMeta": "avlprof.tuning.study",
        "Sweep": "avlprof.tuning.sweep",
        "Tuned": "avlprof.tuning.tune",
        "Workers": "avlprof.tuning.workers",
        "export_policy": "avlprof.tuning.reading",
        "read_meta": "avlprof.tuning.study",
        "read_study": "avlprof.tuning.study",
    },
)
