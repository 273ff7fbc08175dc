"""Figures: each is an information object and a thin drawing of it; none is ever shown."""

from avlprof.plots.budgets import BudgetsInfo, budgets_info, quality_by_budget
from avlprof.plots.coverage import CoverageInfo, coverage_curves, coverage_info
from avlprof.plots.diff import DiffInfo, diff_info, layer_diff, run_names
from avlprof.plots.drift import DriftInfo, drift_info, step_drift
from avlprof.plots.front import FrontInfo, budget_front, budget_front_info
from avlprof.plots.head_heatmaps import head_heatmaps, head_heatmaps_info
from avlprof.plots.head_overlap import head_overlap, head_overlap_info
from avlprof.plots.heads import HeadInfo, head_info, head_maps
from avlprof.plots.heatmap import HeatInfo, vision_heatmap, vision_heatmap_info
from avlprof.plots.horizon import HorizonInfo, horizon_info, vision_horizon
from avlprof.plots.importances import ImportanceInfo, parameter_importances, parameter_importances_info
from avlprof.plots.knobs import KnobInfo, knob_effects, knob_effects_info
from avlprof.plots.layers import PolicyInfo, policy_layers, policy_layers_info
from avlprof.plots.mass import MassInfo, mass_info, modality_mass
from avlprof.plots.overlap import OverlapInfo, layer_overlap, overlap_info
from avlprof.plots.pareto import ParetoInfo, pareto_front, pareto_info
from avlprof.plots.save import save_figure
from avlprof.plots.sinks import SinkInfo, sink_info, sink_mass
from avlprof.plots.trials import TrialInfo, trial_history, trial_history_info
from avlprof.plots.window import WindowInfo, text_window, window_info
from avlprof.plots.words import group_words, word_heatmaps, word_heatmaps_info

__all__ = [
    "BudgetsInfo",
    "CoverageInfo",
    "DiffInfo",
    "DriftInfo",
    "FrontInfo",
    "HeadInfo",
    "HeatInfo",
    "HorizonInfo",
    "ImportanceInfo",
    "KnobInfo",
    "MassInfo",
    "OverlapInfo",
    "ParetoInfo",
    "PolicyInfo",
    "SinkInfo",
    "TrialInfo",
    "WindowInfo",
    "budget_front",
    "budget_front_info",
    "budgets_info",
    "coverage_curves",
    "coverage_info",
    "diff_info",
    "drift_info",
    "group_words",
    "head_heatmaps",
    "head_heatmaps_info",
    "head_info",
    "head_maps",
    "head_overlap",
    "head_overlap_info",
    "horizon_info",
    "knob_effects",
    "knob_effects_info",
    "layer_diff",
    "layer_overlap",
    "mass_info",
    "modality_mass",
    "overlap_info",
    "parameter_importances",
    "parameter_importances_info",
    "pareto_front",
    "pareto_info",
    "policy_layers",
    "policy_layers_info",
    "quality_by_budget",
    "run_names",
    "save_figure",
    "sink_info",
    "sink_mass",
    "step_drift",
    "text_window",
    "trial_history",
    "trial_history_info",
    "vision_heatmap",
    "vision_heatmap_info",
    "vision_horizon",
    "window_info",
    "word_heatmaps",
    "word_heatmaps_info",
]
