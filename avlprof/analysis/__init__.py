"""From a run directory to a profile, and from a profile to a policy or to plain words.

Names are loaded when used, so that a command can list the tables of a profile without pandas.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from avlprof._lazy import exports

if TYPE_CHECKING:
    from avlprof.analysis.derive import Spread
    from avlprof.analysis.profile import Profile, ProfileMeta
    from avlprof.analysis.sentences import findings
    from avlprof.analysis.tables import refresh_from_drift

__all__ = ["Profile", "ProfileMeta", "Spread", "findings", "refresh_from_drift"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "Profile": "avlprof.analysis.profile",
        "ProfileMeta": "avlprof.analysis.profile",
        "Spread": "avlprof.analysis.derive",
        "findings": "avlprof.analysis.sentences",
        "refresh_from_drift": "avlprof.analysis.tables",
    },
)
