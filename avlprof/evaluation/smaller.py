"""Rivals without a cache policy of their own: fewer vision tokens enter the language model at all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

from avlprof.bisection import largest_share
from avlprof.budgets import OverBudgetError
from avlprof.errors import UserError
from avlprof.models.adapter import Adapter
from avlprof.models.smaller import Grid, Kind, check_kind, picture_grids, smaller_grid
from avlprof.policy import DENSE, Policy, PromptShape, TextPolicy, dense_tokens, sizes
from avlprof.tasks import Sample

HALVINGS = 20
"""Of the share of vision tokens that fits: finer than a token of a million."""


@dataclass(frozen=True)
class SmallerPictures:
    """A method that hands the language model at most `share` of each picture's vision tokens.

    `kind` says how (`avlprof.models.smaller`); `policy` runs on the prompts that this leaves, and
    keeps every token of them. Its bytes are counted against the dense cache of the whole prompt.
    """

    name: str
    kind: Kind
    share: float = 1.0
    policy: Policy = DENSE

    @property
    def hash(self) -> str:
        """Hash of what the method does; its name does not count."""
        said = json.dumps([self.kind, self.share, self.policy.hash])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def described(self) -> dict[str, Any]:
        """The method as plain values: how pictures are made smaller, and the policy."""
        policy = self.policy.model_dump(mode="json", by_alias=True)
        return {"name": self.name, "pictures": self.kind, "share": self.share, "policy": policy}

    def live_share(
        self, prompts: Sequence[PromptShape], grids: Sequence[Sequence[Grid]], layers: int
    ) -> float:
        """Prompt KV that it holds after prefill over the dense cache's.

        `grids` are those of each prompt's pictures, as they are.
        """
        live = 0.0
        for prompt, own in zip(prompts, grids, strict=True):
            vision = sum(math.prod(smaller_grid(*grid, self.share)) for grid in own)
            live += sum(size.live for size in sizes(self.policy, replace(prompt, vision=vision), layers))
        return live / dense_tokens(prompts, layers)


Method = Policy | SmallerPictures
"""What can be generated with beside the stock model."""

POOLED, RESIZED = "pooled", "smaller-picture"
FOUR: Final = Policy(vision_bits=4, text=TextPolicy(bits=4))
METHODS: Final[tuple[SmallerPictures, ...]] = (
    SmallerPictures(POOLED, "pooled"),
    SmallerPictures(f"{POOLED}-4", "pooled", policy=FOUR),
    SmallerPictures(RESIZED, "resized"),
    SmallerPictures(f"{RESIZED}-4", "resized", policy=FOUR),
)
"""The methods that every comparison tries, in full precision and with the whole prompt in 4 bits."""


@dataclass(frozen=True)
class Pictures:
    """The pictures of samples as a model's prompts show them."""

    adapter: Adapter
    samples: Sequence[Sample]

    @cached_property
    def grids(self) -> list[list[Grid]]:
        """The grid of vision tokens of each picture of each sample; every picture is opened for it.

        Raises:
            UserError: as `picture_grids`.
        """
        grids: list[list[Grid]] = []
        for sample in self.samples:
            chat = sample.messages()
            grids += picture_grids(self.adapter, self.adapter.encode_chats([chat]), [chat])
        return grids


def fitted(
    method: SmallerPictures, budget: float, prompts: Sequence[PromptShape], pictures: Pictures
) -> SmallerPictures:
    """The method with the largest share of vision tokens that a budget of bytes holds, never above it.

    Args:
        budget: prompt KV live after prefill over the dense cache's, in [0, 1].
        prompts: token counts of the samples of `pictures`, in their order.

    Raises:
        UserError: the family's pictures cannot be made smaller so, or all their tokens fit already.
        OverBudgetError: one token a picture is too much.
    """
    check_kind(pictures.adapter, method.kind)
    layers = pictures.adapter.layers

    def live(share: float) -> float:
        return replace(method, share=share).live_share(prompts, pictures.grids, layers)

    if (least := live(0.0)) > budget:
        raise OverBudgetError(method.policy.model_copy(update={"name": method.name}), budget, least)
    if live(1.0) <= budget:
        raise UserError("all vision tokens fit as they are, so no picture is made smaller")
    share = largest_share(lambda share: live(share) <= budget, 0.0, 1.0, HALVINGS)
    return replace(method, share=max(share, 2.0**-HALVINGS))
