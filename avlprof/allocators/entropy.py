"""Layers whose attention is spread over many vision tokens keep many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avlprof.allocators._base import Allocator, Array, Evidence
from avlprof.errors import UserError


@dataclass(frozen=True)
class Entropy(Allocator):
    """Shares by softmax over layers of the entropy of the attention on vision.

    The exponential of an entropy is an effective number of tokens, so a layer's share is in
    proportion to the tokens that it effectively looks at.

    Source: MEDA, arXiv 2502.17599. Its layer l gets `exp(E_l) / sum(exp(E))` of the cache, `E` the
    mean entropy of text rows over vision keys plus that of vision rows over text keys, each a
    softmax over those keys alone, measured on every prompt. Here text to vision alone (before a
    first picture there is little text that vision rows could see), on scores averaged over heads
    (and over the text rows of a prompt), as a mean over samples. Checked against the paper's
    equations as public notes quote them; the authors' repository was searched for them in vain.
    """

    def shares(self, evidence: Evidence, target: float) -> Array:
        if evidence.entropy is None:
            raise UserError(
                "allocator 'entropy' needs the attention entropy of a profile; "
                "analyze a run first or use allocator 'uniform'"
            )
        shares: Array = np.exp(evidence.entropy - evidence.entropy.max())
        return shares
