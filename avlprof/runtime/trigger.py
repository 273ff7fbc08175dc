"""What a core is estimated to hold of a step's vision attention, without a look at the rest.

Between two picks a layer remembers one vector for each KV head: the mean key of the kept vision tokens
outside the core less that of the core. How far a query leans that way, against how far the query of the last
pick did, moves the odds of rest against core that were read there. So an estimate costs one product a head,
and is there before the step attends. It takes the spread of keys within each of the two parts to be what it
was at the pick, and leaves a soft cap out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Held:
    """What a layer knows since its core was picked, fp32.

    Shapes are those of the runtime, `[B, Hkv, g, ...]` with `g` query heads a group; forced scoring has its
    policies as one more axis, `[B, Hkv, P, g, ...]`. `apart [B, Hkv, D]` is the mean key of the rest less the
    core's, `odds [B, Hkv, g]` the log odds of rest against core at a query that leans neither way, `mass
    [B, Hkv, g]` the attention on vision at the pick, and `share [B]` what the core held of it then.
    """

    apart: Tensor
    odds: Tensor
    mass: Tensor
    share: Tensor

    @classmethod
    def of(cls, core: Tensor, rest: Tensor, apart: Tensor, lean: Tensor) -> Held:
        """After a pick: `core` and `rest [B, Hkv, g]` are the step's attention on each, `lean` their lean."""
        odds = (rest + _NOTHING).log() - (core + _NOTHING).log() - lean
        mass = core + rest
        return cls(apart, odds, mass, core.sum(dim=(1, -1)) / mass.sum(dim=(1, -1)).clamp(min=_NOTHING))

    def estimate(self, lean: Tensor) -> Tensor:
        """The share `[B]` that the core is estimated to hold at a query of this `leaning [B, Hkv, g]`.

        Heads count as much as they looked at vision at the pick.
        """
        held = self.mass * torch.sigmoid(-(self.odds + lean))
        return held.sum(dim=(1, -1)) / self.mass.sum(dim=(1, -1)).clamp(min=_NOTHING)

    def fallen(self, lean: Tensor, margin: float) -> Tensor:
        """Whether the estimate has fallen by `margin` or more since the pick, bool `[B]`."""
        return self.share - self.estimate(lean) >= margin

    def replaced(self, new: Held, due: Tensor) -> Held:
        """With the rows `due`, bool `[B]`, as `new` has them."""

        def chosen(mine: Tensor, theirs: Tensor) -> Tensor:
            where = due[(slice(None), None, *(slice(None),) * (due.ndim - 1))]
            return torch.where(where[(..., *(None,) * (mine.ndim - where.ndim))], theirs, mine)

        share = torch.where(due, new.share, self.share)
        apart, odds = chosen(self.apart, new.apart), chosen(self.odds, new.odds)
        return Held(apart, odds, chosen(self.mass, new.mass), share)

    def select_rows(self, rows: Tensor) -> Held:
        """The batch's rows `rows`, in that order and with repeats."""
        rows = rows.to(self.share.device)
        apart, odds, mass, share = (part.index_select(0, rows) for part in self._parts)
        return Held(apart, odds, mass, share)

    def allocated_bytes(self) -> int:
        """Bytes of the storage behind it."""
        return sum(part.untyped_storage().nbytes() for part in self._parts)

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return self.apart, self.odds, self.mass, self.share


def leaning(query: Tensor, apart: Tensor, scaling: float) -> Tensor:
    """How far queries `[B, Hkv, g, D]` lean from core to rest, `[B, Hkv, g]`, by `apart [B, Hkv, D]`."""
    return scaling * (query.float() @ apart.unsqueeze(-1)).squeeze(-1)


_NOTHING = 1e-9
