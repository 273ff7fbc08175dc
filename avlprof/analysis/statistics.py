"""The tables of a profile, by name; `Profile.from_run` fills them.

Every table but `samples` and `by_sample` has the columns `mean, low, high` (95% t-interval over
samples, NaN with fewer than two) and `n`, the samples counted, beside those named here.
"""

from __future__ import annotations

from typing import Final

FRAMES: Final[dict[str, str]] = {
    "samples": "`sample, system, vision, text, generated`: tokens of each traced sample",
    "mass": "`layer, phase, query, modality`: share of attention; the means of a row sum to 1",
    "entropy": "`layer, phase, query`: row entropy in nat",
    "coverage": "`layer, phase, query, level`: share of vision tokens holding `level` percent; `tokens`",
    "coverage_curve": "`layer, query, share_kept`: share of vision attention that the best tokens hold",
    "concentration": "`layer, query, statistic`: `sparsity`, `entropy` (nat), `skewness` of vision scores",
    "overlap": "`layer_a, layer_b, query`: PPCI of two layers' top sets, for `last` and `step`",
    "drift": "`layer, lag`: overlap of a layer's top set with the one `lag` decoding steps before",
    "window": "`layer, phase, query, level`: tokens of the smallest text window holding `level` percent",
    "window_curve": "`layer, phase, query, distance`: share of text mass, sinks aside, below a distance",
    "sinks": "`layer, phase, query, sink`: share of attention on the `first` token and the `text` sink",
    "heads": "`layer, head, phase, query, statistic`: masses, `entropy`, coverage and drift by head",
    "head_overlap": "`layer_a, head_a, layer_b, head_b, query`: PPCI of single heads' top sets; with "
    "`head_b` -1 against the set of `layer_b`'s head mean",
    "by_sample": "`sample, layer, phase, query` and a column a statistic: what the means are made of",
}
"""Tables that are stored: the name of each, its columns, and what they hold."""

PER_HEAD: Final = ("heads", "head_overlap")
"""Tables of single heads, which a run of head means does not have."""

SUMMARIES: Final[dict[str, str]] = {
    "per_layer": "`layer` and a column a statistic: the overview",
    "horizon": "`query`: first layer from which on vision gets less than 1% of the attention",
}
"""Tables that are computed from those."""

VIEWS: Final = ("per_layer", *(name for name in FRAMES if name != "samples"), "horizon")
"""What a reader may ask for, the overview first."""
