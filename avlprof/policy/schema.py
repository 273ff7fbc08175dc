"""The policy: what each layer stores, attends to, and forgets. This model *is* the YAML."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from avlprof.errors import UserError
from avlprof.policy.provenance import Provenance

SCHEMA = "avlprof.policy/1"
EVICTING = ("position", "last_query", "accumulated")  # scorers that rank new tokens while decoding
RANKING = "valued:instruction"
"""The scorer of what is derived, searched first, or shipped as `uniform`; it was measured to win
(`docs/policies.md`). A policy file without a scorer means `last_query`."""
MOST = 10**9
"""No number of a policy is larger: tokens, steps, layers."""
N = TypeVar("N", int, float)

Refresh = Literal["full", "score_only"]
Ratio = float | tuple[float, ...]
Count = int | tuple[int, ...]


class _Part(BaseModel):
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


def _each(value: Any) -> list[tuple[str, Any]]:
    return [(f"[{i}]", v) for i, v in enumerate(value)] if isinstance(value, tuple) else [("", value)]


def _check_ratio(name: str, value: Ratio | None) -> None:
    for index, ratio in _each(value) if value is not None else []:
        if not 0.0 <= ratio <= 1.0:
            raise ValueError(f"{name}{index} must be in [0, 1], got {ratio}")


def _check_count(name: str, value: Count | None) -> None:
    for index, count in _each(value) if value is not None else []:
        if count < 0:
            raise ValueError(f"{name}{index} must be 0 or more tokens, got {count}")


class ScorerSpec(_Part):
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


class AllocatorSpec(_Part):
    """Which allocator spreads a policy's kept share over the layers (see `avlprof.allocators`).

    `mix` parts of it and the rest uniform, sharpened (> 1) or flattened (< 1) by `temperature`; no
    layer keeps less than `floor`.
    """

    name: str
    options: dict[str, float | int | str | bool] = Field(default_factory=dict)
    mix: float = Field(default=1.0, ge=0.0, le=1.0)
    temperature: float = Field(default=1.0, gt=0.0)
    floor: float = Field(default=0.0, ge=0.0, le=1.0)


class TextPolicy(_Part):
    """What stays of text and generated tokens; system text is protected and not counted.

    Either `window` (the newest tokens, beside `sink` first ones and `heavy` heavy hitters)
    or `keep` (a share of the growing text, at least `minimum` tokens, as A-VL's authors do:
    `recent` of that budget are the newest tokens, the rest the best by `scorer`; by `position`
    all of it is the newest). Neither means that all text stays.

    `history` is A-VL's score, `accumulated` H2O's; both choose a set per KV head. `heavy` tokens
    are ranked by `accumulated`.
    """

    window: Count | None = None
    sink: Count = 0
    heavy: Count = 0
    keep: Ratio | None = None
    minimum: int = Field(default=20, ge=1)
    recent: float = Field(default=0.5, ge=0.0, le=1.0)
    scorer: Literal["position", "history", "accumulated"] = "position"

    @model_validator(mode="after")
    def _valid(self) -> TextPolicy:
        for name in ("window", "sink", "heavy"):
            _check_count(f"text.{name}", getattr(self, name))
        _check_ratio("text.keep", self.keep)
        if self.window is not None and self.keep is not None:
            raise ValueError("text.window and text.keep exclude each other; give one of them")
        for index, window in _each(self.window) if self.window is not None else []:
            if window < 1:
                raise ValueError(f"text.window{index} must be 1 or more tokens, got {window}")
        if self.keep is not None and (self.sink or self.heavy):
            raise ValueError("text.sink and text.heavy go with text.window; leave them out beside text.keep")
        has_heavy = any(heavy for _, heavy in _each(self.heavy))
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


class JointPool(_Part):
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
        _check_ratio("joint.keep", self.keep)
        if self.recent and self.recent_share:
            raise ValueError("joint.recent and joint.recent_share exclude each other; give one of them")
        return self

    def newest(self, size: int) -> int:
        """Newest tokens that are safe in a pool of `size` tokens, its sinks aside."""
        recent = self.recent or int(self.recent_share * size + 1e-6)
        return min(recent, max(size - self.sink, 0))


class PrefillFilter(_Part):
    """After decoder layer `after_layer` (counted from 1) only `keep` of the vision tokens go on."""

    after_layer: int = Field(ge=1)
    keep: float = Field(ge=0.0, le=1.0)


class Policy(_Part):
    """A KV policy; scalars hold for every layer, lists have one entry a layer.

    All ratios are *kept* shares of the prompt's original number of vision tokens; windows
    are in tokens. The words are those of `docs/design.md`.

    A refresh step attends to all kept vision tokens (`full`), or reads their keys alone to pick the
    core anew and attends to that (`score_only`). With an `allocator`, `vision_keep` (or `joint.keep`)
    is the mean over layers, and `avlprof.budgets.resolve` turns it into one share a layer.
    """

    schema_: Literal["avlprof.policy/1"] = Field(default="avlprof.policy/1", alias="schema")
    name: str = Field(default="policy", min_length=1, max_length=200)
    description: str = ""
    source: str = ""
    pool: Literal["split", "joint"] = "split"
    vision_keep: Ratio = 1.0
    vision_compute: Ratio | None = None
    refresh_interval: Annotated[int, Field(ge=0)] = 0
    refresh: Refresh = "full"
    allocator: AllocatorSpec | None = None
    scorer: ScorerSpec = ScorerSpec()
    heads: Literal["shared", "kv_head"] = "shared"
    text: TextPolicy = TextPolicy()
    joint: JointPool | None = None
    prefill_filter: tuple[PrefillFilter, ...] = ()
    provenance: Provenance | None = None

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @field_validator("scorer", "allocator", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _valid(self) -> Policy:
        _check_ratio("vision_keep", self.vision_keep)
        _check_ratio("vision_compute", self.vision_compute)
        self._check_pool()
        self._check_lists()
        self._check_allocator()
        self._check_filter()
        return self

    def _check_pool(self) -> None:
        if (self.pool == "joint") != (self.joint is not None):
            raise ValueError("pool: joint needs the field joint, and only then")
        if self.joint is None:
            return
        if self.vision_keep != 1.0 or self.vision_compute is not None or not self.text.keeps_all:
            raise ValueError("pool: joint sets joint.keep; leave vision_keep, vision_compute and text out")
        if self.joint.decoding == "evict" and self.scorer.name not in EVICTING:
            raise ValueError(
                f"joint.decoding: evict needs a scorer among {', '.join(EVICTING)}, "
                f"got {self.scorer.name}; use joint.decoding: grow"
            )

    def _check_lists(self) -> None:
        lengths = {
            name: len(value) for name, value in self._per_layer_fields().items() if isinstance(value, tuple)
        }
        if len(set(lengths.values())) > 1:
            listed = ", ".join(f"{name} has {n}" for name, n in lengths.items())
            raise ValueError(f"per-layer lists must have one length: {listed}")
        layers = next(iter(lengths.values()), 1)
        for layer, (stored, computed) in enumerate(zip(self.keep(layers), self.compute(layers), strict=True)):
            if computed > stored + 1e-9:
                raise ValueError(
                    f"vision_compute[{layer}] must not exceed vision_keep[{layer}], got {computed} > {stored}"
                )

    def _check_allocator(self) -> None:
        spread = self.joint.keep if self.joint else self.vision_keep
        if self.allocator is not None and isinstance(spread, tuple):
            raise ValueError("allocator spreads one kept share over the layers; give no list beside it")

    def _check_filter(self) -> None:
        layers = [0, *(step.after_layer for step in self.prefill_filter)]
        if any(later <= before for before, later in pairwise(layers)):
            raise ValueError("prefill_filter must be ordered by after_layer, each layer once")

    def _per_layer_fields(self) -> dict[str, Ratio | Count | None]:
        return {
            "vision_keep": self.vision_keep,
            "vision_compute": self.vision_compute,
            "text.window": self.text.window,
            "text.sink": self.text.sink,
            "text.heavy": self.text.heavy,
            "text.keep": self.text.keep,
            "joint.keep": self.joint.keep if self.joint else None,
        }

    @property
    def layers(self) -> int | None:
        """Number of layers the policy is written for, or None when all fields are scalars."""
        for value in self._per_layer_fields().values():
            if isinstance(value, tuple):
                return len(value)
        return None

    def keep(self, layers: int) -> tuple[float, ...]:
        """`vision_keep` of each of `layers` layers."""
        return broadcast(self.vision_keep, layers)

    def compute(self, layers: int) -> tuple[float, ...]:
        """`vision_compute` of each layer; without one it is `vision_keep` (no core)."""
        return self.keep(layers) if self.vision_compute is None else broadcast(self.vision_compute, layers)

    @property
    def evicts_by(self) -> str | None:
        """What decides which token goes while decoding; None: none goes.

        `position`: the oldest behind the sinks. Else the kind of running score whose lowest goes:
        `history`, `accumulated` or `last_query` (see `avlprof.attention.ranking`).
        """
        if self.joint is not None:
            return self.scorer.name if self.joint.decoding == "evict" else None
        return None if self.text.keeps_all else self.text.scorer

    @property
    def running(self) -> str | None:
        """The kind of running score by which tokens go; None where age decides, or none goes."""
        return None if self.evicts_by == "position" else self.evicts_by

    def deleted(self, layer: int) -> float:
        """Share of a layer's text that goes: the quantile of the history score."""
        return 0.0 if self.text.keep is None else 1.0 - of_layer(self.text.keep, layer)

    def check_layers(self, layers: int) -> None:
        """`UserError` when the policy is written for another number of layers."""
        if self.layers is not None and self.layers != layers:
            raise UserError(
                f"policy '{self.name}' is written for {self.layers} layers, the model has {layers}; "
                "derive or tune one for this model"
            )
        if self.allocator is not None:
            raise UserError(
                f"policy '{self.name}' leaves the share of each layer to allocator '{self.allocator.name}'; "
                "resolve it for the model first (avlprof.budgets.resolve, or 'avlprof policy resolve')"
            )
        for step in self.prefill_filter:
            if step.after_layer >= layers:
                raise UserError(
                    f"prefill_filter.after_layer must be below the model's {layers} layers, "
                    f"got {step.after_layer} (policy '{self.name}')"
                )

    @property
    def hash(self) -> str:
        """Hash of what the policy does: name, description, source and provenance do not count."""
        acting = self.model_dump(
            mode="json", by_alias=True, exclude={"name", "description", "source", "provenance"}
        )
        return hashlib.sha256(json.dumps(acting, sort_keys=True).encode()).hexdigest()[:16]


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


DENSE = Policy(name="dense", description="Everything stays and is attended to: the stock model.")
