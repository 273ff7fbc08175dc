"""From a run directory to a profile, and from a profile to a policy."""

from avlprof.analysis.derive import derive
from avlprof.analysis.drift import refresh_from_drift
from avlprof.analysis.profile import Profile, ProfileMeta

__all__ = ["Profile", "ProfileMeta", "derive", "refresh_from_drift"]
