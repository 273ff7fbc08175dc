"""Layers that look at many vision tokens keep many."""

from __future__ import annotations

from dataclasses import dataclass

from avlprof.allocators._base import Allocator, Array, Evidence
from avlprof.errors import UserError


@dataclass(frozen=True)
class Sparsity(Allocator):
    """Shares in proportion to one minus the sparsity of the attention on vision.

    Source: VL-Cache, arXiv 2410.23317: sparsity `s` is the share of entries below 1% of their
    row's largest, in the rows of the text behind the vision tokens ("post-vision attention"), and
    layer l of L keeps `(1 - s_l) / sum(1 - s) * budget * L`, clipped to [0.01, 1]. Checked against
    the reimplementation in EffiVLM-Bench (2506.00479). There it is measured on every prompt, for
    each row and head, over text and vision keys; here over vision tokens alone, on scores averaged
    over heads (and over the text rows of a prompt), as a mean over samples. Averaged scores are
    less sparse than single rows. The lower clip is the `floor` of the budget; what a clip takes
    or gives, other layers make up for here, so the budget is met.
    """

    def shares(self, evidence: Evidence, target: float) -> Array:
        if evidence.sparsity is None:
            raise UserError(
                "allocator 'sparsity' needs the attention sparsity of a profile; "
                "analyze a run first or use allocator 'uniform'"
            )
        return 1.0 - evidence.sparsity
