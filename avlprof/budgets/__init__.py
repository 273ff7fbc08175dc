"""From shares of bytes to kept ratios of layers: fitting, meeting and scaling to a budget."""

from avlprof.budgets.fit import fit_keep
from avlprof.budgets.meet import meet_budget, meet_read_budget, vision_share

__all__ = ["fit_keep", "meet_budget", "meet_read_budget", "vision_share"]
