"""The sections of a policy and the kinds of its values; `schema` puts them together."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from avlprof.errors import UserError

EVICTING = ("position", "last_query", "accumulated")  # scorers that rank new tokens while decoding
RANKING = "distinct:valued:instruction"
"""The scorer of what is derived, searched first, or shipped as `uniform`; it was measured to win
(`docs/policies.md`). A policy file without a scorer means `last_query`."""
MOST = 10**9
"""No number of a policy is larger: tokens, steps, layers."""
FULL = 16
"""Bits of a number of the dense cache that everything is measured against, whatever a model runs in."""
MARGIN = 0.1
"""By how much the share that a core holds must fall before a triggered refresh picks it anew."""
BITS = (FULL, 8, 4, 3, 2)
REFRESHES = ("refresh_interval", "refresh", "refresh_margin", "refresh_layers", "core_score")
"""Fields of a policy that say when and how its core is picked anew."""
N = TypeVar("N", int, float)

Refresh = Literal["full", "score_only", "triggered"]
Heads = Literal["shared", "kv_head", "adaptive"]
PictureKind = Literal["pooled", "resized"]
Bit = Annotated[int, Field(json_schema_extra={"enum": list(BITS)})]
Bits = Bit | tuple[Bit, ...]
Ratio = float | tuple[float, ...]
Shares = tuple[tuple[Annotated[float, Field(ge=0.0)], ...], ...]
Count = int | tuple[int, ...]


class Part(BaseModel):
    """A section: frozen, without keys that are not known, every number of a size that means something."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        """No field is a switch, which pydantic would take for 0 or 1; and no number is beyond all tokens."""
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, bool):
                raise PydanticCustomError("no_switch", "Input should not be yes or no")
            if isinstance(one, int) and abs(one) > MOST:
                raise PydanticCustomError("too_large", "Input should be a number of at most 10^9")
        return value


def each(value: Any) -> list[tuple[str, Any]]:
    """The entries of a list by their index as errors name it, or the one value there is."""
    return [(f"[{i}]", v) for i, v in enumerate(value)] if isinstance(value, tuple) else [("", value)]


def check_ratio(name: str, value: Ratio | None) -> None:
    """`ValueError` unless all shares are in [0, 1]."""
    for index, ratio in each(value) if value is not None else []:
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"{name}{index} must be in [0, 1], got {ratio}")


def check_count(name: str, value: Count | None) -> None:
    """`ValueError` unless all counts are 0 or more."""
    for index, count in each(value) if value is not None else []:
        if count < 0:
            raise ValueError(f"{name}{index} must be 0 or more tokens, got {count}")


def check_bits(name: str, value: Bits) -> None:
    """`ValueError` unless all are among `BITS`."""
    for index, bits in each(value):
        if bits not in BITS:
            raise ValueError(
                f"{name}{index} must be {', '.join(map(str, BITS[:-1]))} or {BITS[-1]}, got {bits}"
            )


def check_shares(name: str, shares: Shares) -> None:
    """`ValueError` unless there is one list a layer over one number of KV heads, with a mean of 1 each."""
    for layer, own in enumerate(shares):
        if len(own) != len(shares[0]) or not own:
            raise ValueError(
                f"{name} must have one share for each KV head in every layer, got {len(own)} in layer {layer}"
            )
        mean = sum(own) / len(own)
        if abs(mean - 1.0) > 1e-3:
            raise ValueError(f"{name}[{layer}] must have the mean 1, got {mean:g}")


def broadcast(value: N | tuple[N, ...], layers: int) -> tuple[N, ...]:
    """A scalar repeated for every layer, or the list as it is."""
    if isinstance(value, tuple):
        if len(value) != layers:
            raise UserError(f"a per-layer list has {len(value)} entries, the model has {layers} layers")
        return value
    return (value,) * layers


def of_layer(value: N | tuple[N, ...], layer: int) -> N:
    """What a scalar or a per-layer list says of one layer."""
    return value[layer] if isinstance(value, tuple) else value


class ScorerSpec(Part):
    """Which scorer ranks tokens, and its knobs (see `avlprof.scorers`)."""

    name: str = "last_query"
    options: dict[str, float | int | str | bool] = Field(default_factory=dict)

    @classmethod
    def of(cls, name: str) -> ScorerSpec:
        """The scorer of a name; `valued:instruction` is `valued` over `instruction`, and so on."""
        outer, _, inner = name.partition(":")
        return cls(name=outer, options={"of": inner} if inner else {})

    @property
    def key(self) -> str:
        """Name and options as one string: equal specs have equal keys."""
        return self.model_dump_json()


class AllocatorSpec(Part):
    """Which allocator spreads a policy's kept share over the layers (see `avlprof.allocators`).

    `mix` parts of it and the rest uniform, sharpened (> 1) or flattened (< 1) by `temperature`; no
    layer keeps less than `floor`.
    """

    name: str
    options: dict[str, float | int | str | bool] = Field(default_factory=dict)
    mix: float = Field(default=1.0, ge=0.0, le=1.0)
    temperature: float = Field(default=1.0, gt=0.0)
    floor: float = Field(default=0.0, ge=0.0, le=1.0)


class CoreScore(Part):
    """What a refresh ranks the kept vision tokens by, each part made to sum to 1 over them.

    `prompt` parts of the score of the prompt's scorer, and the rest of what rows of attention gave: of the
    refresh step alone, or, with `memory`, of each row that saw a token, a row counting `memory` times as
    much as the next one that does. A token that a step does not see keeps what it has.
    """

    prompt: float = Field(default=0.0, ge=0.0, le=1.0)
    memory: float = Field(default=0.0, ge=0.0, lt=1.0)


class TextPolicy(Part):
    """What stays of text and generated tokens; system text is protected and not counted.

    Either `window` (the newest tokens, beside `sink` first ones and `heavy` heavy hitters)
    or `keep` (a share of the growing text, at least `minimum` tokens, as A-VL's authors do:
    `recent` of that budget are the newest tokens, the rest the best by `scorer`; by `position`
    all of it is the newest). Neither means that all text stays.

    `history` is A-VL's score, `accumulated` H2O's; both choose a set per KV head. `heavy` tokens
    are ranked by `accumulated`.

    Where all text stays, system and prompt text may be stored in `bits` bits a number (see
    `avlprof.attention.codec`), quantised once after the prompt and read so at every step; generated
    tokens stay as they are.
    """

    window: Count | None = None
    sink: Count = 0
    heavy: Count = 0
    keep: Ratio | None = None
    minimum: int = Field(default=20, ge=1)
    recent: float = Field(default=0.5, ge=0.0, le=1.0)
    scorer: Literal["position", "history", "accumulated"] = "position"
    bits: Bits = FULL

    @model_validator(mode="after")
    def _valid(self) -> TextPolicy:
        for name in ("window", "sink", "heavy"):
            check_count(f"text.{name}", getattr(self, name))
        check_ratio("text.keep", self.keep)
        check_bits("text.bits", self.bits)
        if self.packs and not self.keeps_all:
            raise ValueError("text.bits stores all text; leave text.window and text.keep out beside it")
        if self.window is not None and self.keep is not None:
            raise ValueError("text.window and text.keep exclude each other; give one of them")
        for index, window in each(self.window) if self.window is not None else []:
            if window < 1:
                raise ValueError(f"text.window{index} must be 1 or more tokens, got {window}")
        if self.keep is not None and (self.sink or self.heavy):
            raise ValueError("text.sink and text.heavy go with text.window; leave them out beside text.keep")
        has_heavy = any(heavy for _, heavy in each(self.heavy))
        if has_heavy and (self.window is None or self.scorer != "accumulated"):
            raise ValueError("text.heavy needs text.window and text.scorer: accumulated")
        if self.keep is None and not has_heavy and self.scorer != "position":
            raise ValueError(f"text.scorer: {self.scorer} needs text.keep or text.heavy to rank for")
        if self.keep is None and self.scorer == "history":
            raise ValueError("text.scorer: history needs text.keep, whose deleted share is its quantile")
        return self

    @property
    def scored(self) -> bool:
        """Whether some text stays for its score, so that sets differ by KV head."""
        return self.scorer != "position"

    @property
    def keeps_all(self) -> bool:
        """Whether no text token is ever evicted."""
        return self.window is None and self.keep is None

    @property
    def packs(self) -> bool:
        """Whether some layer stores system and prompt text in few bits."""
        return any(bits != FULL for _, bits in each(self.bits))


class JointPool(Part):
    """All prompt tokens compete for `keep` of the prompt; `sink` first and the newest are safe.

    The newest are `recent` tokens, or `recent_share` of the pool. While decoding the pool either
    keeps its size (`evict`: after each step the token with the lowest score goes) or grows by the
    generated tokens (`grow`).
    """

    keep: Ratio
    sink: int = Field(default=4, ge=0)
    recent: int = Field(default=0, ge=0)
    recent_share: float = Field(default=0.0, ge=0.0, le=1.0)
    decoding: Literal["evict", "grow"] = "evict"

    @model_validator(mode="after")
    def _valid(self) -> JointPool:
        check_ratio("joint.keep", self.keep)
        if self.recent and self.recent_share:
            raise ValueError("joint.recent and joint.recent_share exclude each other; give one of them")
        return self

    def newest(self, size: int) -> int:
        """Newest tokens that are safe in a pool of `size` tokens, its sinks aside."""
        recent = self.recent or int(self.recent_share * size + 1e-6)
        return min(recent, max(size - self.sink, 0))


class PicturePolicy(Part):
    """What the language model gets of each picture: at most `share` of its vision tokens.

    `pooled`: means of neighbouring features behind the vision tower; `resized`: the picture made smaller
    before the processor (see `avlprof.models.smaller`). All else of a policy is of the prompt that this
    leaves, but bytes are counted against the dense cache of the pictures as they are.
    """

    kind: PictureKind
    share: float = Field(default=1.0, gt=0.0, le=1.0)


class PrefillFilter(Part):
    """After decoder layer `after_layer` (counted from 1) only `keep` of the vision tokens go on."""

    after_layer: int = Field(ge=1)
    keep: float = Field(ge=0.0, le=1.0)
