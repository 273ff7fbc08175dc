"""Figures: each is an information object and a thin drawing of it; none is ever shown.

Names are loaded when used, since what draws takes seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from avlprof.plots.beside import BesideInfo, beside_info, damage_beside_attention
    from avlprof.plots.budgets import BudgetsInfo, budgets_info, quality_by_budget
    from avlprof.plots.coverage import CoverageInfo, coverage_curves, coverage_info
    from avlprof.plots.diff import DiffInfo, diff_info, layer_diff, run_names
    from avlprof.plots.drift import DriftInfo, drift_info, step_drift
    from avlprof.plots.front import FrontInfo, budget_front, budget_front_info
    from avlprof.plots.head_panels import head_heatmaps, head_heatmaps_info
    from avlprof.plots.heads import HeadInfo, head_info, head_maps, head_overlap, head_overlap_info
    from avlprof.plots.heatmap import vision_heatmap, vision_heatmap_info
    from avlprof.plots.horizon import HorizonInfo, horizon_info, vision_horizon
    from avlprof.plots.importances import (
        ImportanceInfo,
        parameter_importances,
        parameter_importances_info,
    )
    from avlprof.plots.knobs import KnobInfo, knob_effects, knob_effects_info
    from avlprof.plots.knockout import KnockoutInfo, knockout_heads, knockout_info, knockout_map
    from avlprof.plots.layers import PolicyInfo, policy_layers, policy_layers_info
    from avlprof.plots.lens import (
        LensLayersInfo,
        LensWordsInfo,
        lens_layers,
        lens_layers_info,
        lens_words,
        lens_words_info,
    )
    from avlprof.plots.mass import MassInfo, mass_info, modality_mass
    from avlprof.plots.overlap import OverlapInfo, layer_overlap, overlap_info
    from avlprof.plots.pareto import ParetoInfo, pareto_front, pareto_info
    from avlprof.plots.pictures import Caption, HeatInfo
    from avlprof.plots.save import figure_path, save_figure
    from avlprof.plots.sinks import SinkInfo, sink_info, sink_mass
    from avlprof.plots.trials import TrialInfo, trial_history, trial_history_info
    from avlprof.plots.window import WindowInfo, text_window, window_info
    from avlprof.plots.words import group_words, word_heatmaps, word_heatmaps_info

_LAZY = {
    "BesideInfo": "beside",
    "beside_info": "beside",
    "damage_beside_attention": "beside",
    "BudgetsInfo": "budgets",
    "budgets_info": "budgets",
    "quality_by_budget": "budgets",
    "CoverageInfo": "coverage",
    "coverage_curves": "coverage",
    "coverage_info": "coverage",
    "DiffInfo": "diff",
    "diff_info": "diff",
    "layer_diff": "diff",
    "run_names": "diff",
    "DriftInfo": "drift",
    "drift_info": "drift",
    "step_drift": "drift",
    "FrontInfo": "front",
    "budget_front": "front",
    "budget_front_info": "front",
    "head_heatmaps": "head_panels",
    "head_heatmaps_info": "head_panels",
    "HeadInfo": "heads",
    "head_info": "heads",
    "head_maps": "heads",
    "head_overlap": "heads",
    "head_overlap_info": "heads",
    "Caption": "pictures",
    "HeatInfo": "pictures",
    "vision_heatmap": "heatmap",
    "vision_heatmap_info": "heatmap",
    "HorizonInfo": "horizon",
    "horizon_info": "horizon",
    "vision_horizon": "horizon",
    "ImportanceInfo": "importances",
    "parameter_importances": "importances",
    "parameter_importances_info": "importances",
    "KnobInfo": "knobs",
    "knob_effects": "knobs",
    "knob_effects_info": "knobs",
    "KnockoutInfo": "knockout",
    "knockout_heads": "knockout",
    "knockout_info": "knockout",
    "knockout_map": "knockout",
    "PolicyInfo": "layers",
    "policy_layers": "layers",
    "policy_layers_info": "layers",
    "LensLayersInfo": "lens",
    "LensWordsInfo": "lens",
    "lens_layers": "lens",
    "lens_layers_info": "lens",
    "lens_words": "lens",
    "lens_words_info": "lens",
    "MassInfo": "mass",
    "mass_info": "mass",
    "modality_mass": "mass",
    "OverlapInfo": "overlap",
    "layer_overlap": "overlap",
    "overlap_info": "overlap",
    "ParetoInfo": "pareto",
    "pareto_front": "pareto",
    "pareto_info": "pareto",
    "figure_path": "save",
    "save_figure": "save",
    "SinkInfo": "sinks",
    "sink_info": "sinks",
    "sink_mass": "sinks",
    "TrialInfo": "trials",
    "trial_history": "trials",
    "trial_history_info": "trials",
    "WindowInfo": "window",
    "text_window": "window",
    "window_info": "window",
    "group_words": "words",
    "word_heatmaps": "words",
    "word_heatmaps_info": "words",
}
"""The module of each public name."""

__all__ = [
    "BesideInfo",
    "BudgetsInfo",
    "Caption",
    "CoverageInfo",
    "DiffInfo",
    "DriftInfo",
    "FrontInfo",
    "HeadInfo",
    "HeatInfo",
    "HorizonInfo",
    "ImportanceInfo",
    "KnobInfo",
    "KnockoutInfo",
    "LensLayersInfo",
    "LensWordsInfo",
    "MassInfo",
    "OverlapInfo",
    "ParetoInfo",
    "PolicyInfo",
    "SinkInfo",
    "TrialInfo",
    "WindowInfo",
    "beside_info",
    "budget_front",
    "budget_front_info",
    "budgets_info",
    "coverage_curves",
    "coverage_info",
    "damage_beside_attention",
    "diff_info",
    "drift_info",
    "figure_path",
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
    "knockout_heads",
    "knockout_info",
    "knockout_map",
    "layer_diff",
    "layer_overlap",
    "lens_layers",
    "lens_layers_info",
    "lens_words",
    "lens_words_info",
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


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"avlprof.plots.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'avlprof.plots' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
