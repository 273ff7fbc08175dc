"""From a run directory to a profile, and from a profile to a policy or to plain words."""

from avlprof.analysis.derive import derive
from avlprof.analysis.findings import findings
from avlprof.analysis.profile import Profile, ProfileMeta
from avlprof.analysis.tables import refresh_from_drift

__all__ = ["Profile", "ProfileMeta", "derive", "findings", "refresh_from_drift"]
