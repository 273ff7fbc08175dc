"""From shares of bytes to kept ratios of layers: fitting, meeting and scaling to a budget."""

from avlprof.budgets.fit import fit_keep
from avlprof.budgets.meet import ReadBudget, meet_both, meet_budget, meet_read_budget, vision_share
from avlprof.budgets.scale import OverBudgetError, scale_to

__all__ = [
    "OverBudgetError",
    "ReadBudget",
    "fit_keep",
    "meet_both",
    "meet_budget",
    "meet_read_budget",
    "scale_to",
    "vision_share",
]
