"""Routes between tokens that a model is run without: who may no longer look at whom, in some layers.

Attention knockout as in Geva et al. (arXiv 2304.14767), between the tokens of a picture, a question
and an answer as in Zhang et al. (arXiv 2411.18620). A cut hides keys from rows before the softmax, so
the rest of a row's attention grows to 1; a token always sees itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from avlprof.attention.call import AttentionCall, Forward
from avlprof.attention.modality import Modality
from avlprof.attention.session import switched
from avlprof.attention.weights import row_weights
from avlprof.errors import UserError, shortened
from avlprof.registry import unknown

LAST: Final = 4
"""Code of a prompt's last row beside those of `Modality`: the first token of the answer is read off it."""

ENDS: Final[Mapping[str, tuple[int, ...]]] = MappingProxyType(
    {
        "system": (Modality.SYSTEM,),
        "vision": (Modality.VISION,),
        "question": (Modality.TEXT,),
        "answer": (LAST, Modality.GENERATED),
        "last": (LAST,),
        "generated": (Modality.GENERATED,),
    }
)
"""What a route may begin and end at, and the codes of its tokens.

`question` is the text of the prompt behind the first vision token, but for the prompt's last row, which
with the generated tokens makes up `answer`: the rows that the answer's tokens are read off.
"""
_JOIN = "-to-"
_WEIGHTS = 1 << 20  # attention weights that exist at a time


@dataclass(frozen=True, order=True)
class Route:
    """Rows of `source` looking at columns of `target`, both of `ENDS`; `question-to-vision` in short.

    Raises:
        UserError: an end is not known.
    """

    source: str
    target: str

    def __post_init__(self) -> None:
        for end in (self.source, self.target):
            if end not in ENDS:
                raise unknown("end of a route", end, ENDS)

    @classmethod
    def of(cls, name: str) -> Route:
        """The route of a name; `UserError` where it is none."""
        source, join, target = name.partition(_JOIN)
        if not join:
            raise UserError(
                f"route must be SOURCE-to-TARGET of {', '.join(ENDS)}, as in question-to-vision, "
                f"got {shortened(name)}"
            )
        return cls(source.strip(), target.strip())

    @property
    def name(self) -> str:
        """As it is asked for."""
        return f"{self.source}{_JOIN}{self.target}"

    def sources(self, codes: Tensor) -> Tensor:
        """bool, of the shape of a map of `coded`: which tokens look."""
        return _among(codes, ENDS[self.source])

    def targets(self, codes: Tensor) -> Tensor:
        """bool, of the shape of a map of `coded`: which tokens are looked at."""
        return _among(codes, ENDS[self.target])


@dataclass(frozen=True)
class Cut:
    """A route that is closed in some layers, for some of their query heads or (None) for all.

    Raises:
        UserError: no layer, or no head.
    """

    route: Route
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.layers or self.heads == ():
            raise UserError(f"a cut of {self.route.name} needs at least one layer and one head")

    @property
    def name(self) -> str:
        """For messages and as a key: `question-to-vision@3,4` or `answer-to-vision@2#0`."""
        heads = "" if self.heads is None else f"#{','.join(map(str, self.heads))}"
        return f"{self.route.name}@{','.join(map(str, self.layers))}{heads}"

    def closed(self, heads: int) -> Tensor:
        """bool `[heads]`: for which query heads of a layer of its own the route is closed.

        Raises:
            UserError: the layer has no such head.
        """
        marks = torch.full((heads,), self.heads is None)
        for head in self.heads or ():
            if not 0 <= head < heads:
                raise UserError(f"head of a cut must be in 0 to {heads - 1}, got {head} ({self.name})")
            marks[head] = True
        return marks


def coded(modality: Tensor, prompt: int) -> Tensor:
    """A map `[B, n]` of `Modality` codes with `LAST` at the last of the `prompt` columns."""
    codes = modality.clone()
    codes[:, prompt - 1] = LAST
    return codes


def _among(codes: Tensor, wanted: Collection[int]) -> Tensor:
    found = torch.zeros_like(codes, dtype=torch.bool)
    for code in wanted:
        found |= codes == code
    return found


class CutRuntime:
    """Runs a model without a route: stock attention, and the route's rows once more without its columns.

    Weights exist for some of the route's rows at a time. The cache stays the model's own.
    """

    def __init__(self, cut: Cut, text_config: Any) -> None:
        self.cut, self._config = cut, text_config
        self.heard: set[int] = set()

    def new_cache(self) -> Any:
        """The cache that `generate` would have made."""
        return DynamicCache(config=self._config)

    def owns(self, cache: Any) -> bool:
        """Any cache is fine: nothing in it changes."""
        return True

    def governs(self, cache: Any, layer: int) -> bool:
        """The layers of the cut."""
        return layer in self.cut.layers

    def attend(self, forward: Forward, cache: Any, call: AttentionCall) -> tuple[Tensor, AttentionCall]:
        """Output `[B, q, H, E]` of a layer."""
        out = call.stock()
        self.heard.add(call.layer)
        if call.layer not in self.cut.layers:
            return out, call
        modality = forward.modality
        codes = coded(modality, int((modality[0] != Modality.GENERATED).sum()))
        count, length = call.query.shape[2], call.key.shape[2]
        rows, columns = codes[:, -count:], codes[:, -length:]
        looking, hidden = self.cut.route.sources(rows), self.cut.route.targets(columns)
        wanted = looking.any(dim=0).nonzero()[:, 0]
        if len(wanted) == 0 or not bool(hidden.any()):
            return out, call
        size = max(_WEIGHTS // (call.query.shape[0] * call.query.shape[1] * length), 1)
        heads = self.cut.closed(out.shape[2]).to(out.device)
        for block in torch.split(wanted, size):
            cut = looking[:, block, None] & hidden[:, None]
            cut &= torch.arange(length, device=block.device) != (block + length - count)[:, None]
            seen = self._seen(call, block, columns != Modality.PAD)
            lost = (seen & cut[:, None]).any(dim=-1).any(dim=1)  # other rows stay as they are, bit by bit
            weights = row_weights(
                call.query[:, :, block],
                call.key,
                call.scaling,
                seen & ~cut[:, None],
                call.softcap,
                call.sinks,
            )
            batch, groups = call.value.shape[:2]
            mixed = weights.reshape(batch, groups, -1, length) @ call.value.float()
            mixed = mixed.view(*weights.shape[:3], -1).transpose(1, 2).to(out.dtype)
            out[:, block] = torch.where(lost[:, :, None, None] & heads[:, None], mixed, out[:, block])
        return out, call

    def _seen(self, call: AttentionCall, rows: Tensor, valid: Tensor) -> Tensor:
        """bool `[B, 1, R, n]`: what the rows at `rows [R]` see where nothing is cut."""
        count, length = call.query.shape[2], call.key.shape[2]
        if call.mask is not None:
            return call.mask[:, :, rows]
        if count > 1 and getattr(call.module, "is_causal", True):
            later = torch.arange(length, device=rows.device) > (rows + length - count)[:, None]
            return (valid[:, None] & ~later)[:, None]
        return valid[:, None, None].expand(-1, -1, len(rows), -1)


@contextlib.contextmanager
def cutting(model: Any, cut: Cut) -> Iterator[None]:
    """A model that is run without a route, for the length of the context.

    Raises:
        UserError: the model's attention, or that of a layer of the cut, cannot be followed, or the model
            runs under a policy.
    """
    runtime = CutRuntime(cut, model.config.get_text_config(decoder=True))
    with switched(model, runtime=runtime):
        yield
    deaf = [layer for layer in cut.layers if layer not in runtime.heard]
    if deaf and runtime.heard:
        raise UserError(
            f"layer {deaf[0]} does not ask transformers' attention interface, so no route can be closed in it"
        )
