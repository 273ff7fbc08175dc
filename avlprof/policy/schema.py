"""The policy: what each layer stores, attends to, and forgets. This model *is* the YAML."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from avlprof.errors import UserError
from avlprof.policy.parts import (
    EVICTING,
    FULL,
    MARGIN,
    AllocatorSpec,
    Bits,
    CoreScore,
    Count,
    Heads,
    JointPool,
    Part,
    PicturePolicy,
    PrefillFilter,
    Ratio,
    Refresh,
    ScorerSpec,
    Shares,
    TextPolicy,
    broadcast,
    check_bits,
    check_ratio,
    check_shares,
    each,
    of_layer,
)
from avlprof.policy.provenance import Provenance

SCHEMA = "avlprof.policy/1"
HEAD_FLOOR = 0.2
"""Part of the mean count that an adaptive head is sure of. Source: AdaKV's safeguard, arXiv 2407.11550."""


class Policy(Part):
    """A KV policy; scalars hold for every layer, lists have one entry a layer.

    All ratios are *kept* shares of the prompt's original number of vision tokens; windows
    are in tokens. The words are those of `docs/design.md`.

    A refresh step attends to all kept vision tokens (`full`), or reads their keys alone to pick the
    core anew and attends to that (`score_only`). What is best then is what `core_score` says: by default the
    step's own attention. A `triggered` refresh is one that scores only, at the first step, and then
    `refresh_interval` steps or more after the last one, once the share of a step's vision attention that the
    core is estimated to hold has fallen by `refresh_margin` (see `avlprof.runtime.trigger`). With
    `refresh_layers` these layers alone read at a refresh; each layer behind one of them, up to the next,
    picks its core by the row of that one, and those before the first never do. Kept vision KV outside the
    core is stored in `vision_bits` bits a number (see `avlprof.attention.codec`); without `vision_compute`
    there is no core, and all that is kept is stored so; system and prompt text in `text.bits`. With an
    `allocator`, `vision_keep` (or `joint.keep`) is the mean over layers, and `avlprof.budgets.resolve` turns
    it into one share a layer.

    The vision tokens of a layer are one set, one for each KV head, or, `adaptive`, one for each KV head with
    counts that differ, `vision_keep` being their mean. A head is then sure of its best tokens, `head_floor`
    of its part (of the mean, times its share of `head_shares`), and for the rest all pairs of head and token
    compete by score.

    With `pictures` the prompt has fewer vision tokens to begin with; all shares are of those.
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
    refresh_margin: Annotated[float, Field(gt=0.0, le=1.0)] = MARGIN
    refresh_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    core_score: CoreScore = CoreScore()
    vision_bits: Bits = FULL
    allocator: AllocatorSpec | None = None
    scorer: ScorerSpec = ScorerSpec()
    heads: Heads = "shared"
    head_floor: Annotated[float, Field(ge=0.0, le=1.0)] = HEAD_FLOOR
    head_shares: Shares | None = None
    text: TextPolicy = TextPolicy()
    joint: JointPool | None = None
    prefill_filter: tuple[PrefillFilter, ...] = ()
    pictures: PicturePolicy | None = None
    provenance: Provenance | None = None

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @field_validator("scorer", "allocator", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _valid(self) -> Policy:
        check_ratio("vision_keep", self.vision_keep)
        check_ratio("vision_compute", self.vision_compute)
        check_bits("vision_bits", self.vision_bits)
        self._check_pool()
        self._check_refresh()
        self._check_lists()
        self._check_allocator()
        self._check_filter()
        self._check_heads()
        return self

    def _check_heads(self) -> None:
        if self.heads != "adaptive" and (self.head_floor != HEAD_FLOOR or self.head_shares is not None):
            raise ValueError("head_floor and head_shares go with heads: adaptive; leave them out")
        if self.head_shares is not None:
            check_shares("head_shares", self.head_shares)

    def _check_pool(self) -> None:
        if (self.pool == "joint") != (self.joint is not None):
            raise ValueError("pool: joint needs the field joint, and only then")
        if self.joint is None:
            return
        if self.vision_keep != 1.0 or self.vision_compute is not None or not self.text.keeps_all:
            raise ValueError("pool: joint sets joint.keep; leave vision_keep, vision_compute and text out")
        for name in ("core_score", "refresh_layers"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"pool: joint has no core; leave {name} out")
        if self.packs or self.text.packs:
            field = "vision_bits" if self.packs else "text.bits"
            raise ValueError(f"pool: joint stores all tokens in full precision; leave {field} out")
        if self.joint.decoding == "evict" and self.scorer.name not in EVICTING:
            raise ValueError(
                f"joint.decoding: evict needs a scorer among {', '.join(EVICTING)}, "
                f"got {self.scorer.name}; use joint.decoding: grow"
            )

    def _check_refresh(self) -> None:
        leads = self.refresh_layers
        if self.refresh != "triggered" and self.refresh_margin != MARGIN:
            raise ValueError("refresh_margin goes with refresh: triggered; leave it out")
        if leads is not None and self.refresh == "full":
            raise ValueError("refresh_layers goes with refresh: score_only or refresh: triggered")
        if leads is not None and (not leads or any(b <= a for a, b in pairwise(leads))):
            raise ValueError("refresh_layers must name at least one layer, in ascending order, each once")
        if (leads is not None or self.refresh == "triggered") and self.text.scored:
            field = "refresh: triggered" if leads is None else "refresh_layers"
            raise ValueError(f"{field} does not go with text that stays by score; use text.scorer: position")

    def _check_lists(self) -> None:
        lengths = {
            name: len(value) for name, value in self._per_layer_fields().items() if isinstance(value, tuple)
        }
        for name, length in lengths.items():
            if length == 0:
                raise ValueError(f"{name} is an empty list; give one number, or one a layer")
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

    def _per_layer_fields(self) -> dict[str, Ratio | Count | Shares | None]:
        return {
            "vision_keep": self.vision_keep,
            "vision_compute": self.vision_compute,
            "vision_bits": self.vision_bits,
            "head_shares": self.head_shares,
            "text.window": self.text.window,
            "text.sink": self.text.sink,
            "text.heavy": self.text.heavy,
            "text.keep": self.text.keep,
            "text.bits": self.text.bits,
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

    def bits(self, layers: int) -> tuple[int, ...]:
        """`vision_bits` of each layer."""
        return broadcast(self.vision_bits, layers)

    def text_bits(self, layers: int) -> tuple[int, ...]:
        """`text.bits` of each layer."""
        return broadcast(self.text.bits, layers)

    def head_parts(self, layer: int, heads: int) -> tuple[float, ...] | None:
        """What each of a layer's KV heads is sure of, over the mean count; None where all have that count.

        Raises:
            UserError: `head_shares` are of another number of KV heads.
        """
        if self.heads != "adaptive":
            return None
        shares = self.head_shares[layer] if self.head_shares is not None else (1.0,) * heads
        if len(shares) != heads:
            raise UserError(
                f"policy '{self.name}' has head_shares of {len(shares)} KV heads, layer {layer} has {heads}; "
                "derive them for this model"
            )
        return tuple(self.head_floor * share for share in shares)

    @property
    def packs(self) -> bool:
        """Whether some layer stores vision in few bits."""
        return any(bits != FULL for _, bits in each(self.vision_bits))

    @property
    def shrinks(self) -> bool:
        """Whether prompts have fewer vision tokens than their pictures as they are."""
        return self.pictures is not None and self.pictures.share < 1.0

    @property
    def of_cache(self) -> Policy:
        """The policy without `pictures`: what it does with the prompts that these leave."""
        return self if self.pictures is None else self.model_copy(update={"pictures": None})

    @property
    def picks(self) -> bool:
        """Whether a core is picked anew while decoding, in the layers that have one."""
        return self.vision_compute is not None and self.refresh_interval > 0

    @property
    def scores_core(self) -> bool:
        """Whether a core is picked anew by more than the row of its step: scores run while decoding."""
        return self.picks and self.core_score != CoreScore()

    @property
    def triggered(self) -> bool:
        """Whether steps themselves say when a core is picked anew."""
        return self.picks and self.refresh == "triggered"

    def leader(self, layer: int) -> int | None:
        """The layer by whose rows a layer picks its core anew, mostly itself; None where none does."""
        if self.refresh_layers is None:
            return layer
        return max((lead for lead in self.refresh_layers if lead <= layer), default=None)

    def leads(self, layer: int) -> bool:
        """Whether layers behind this one pick their cores by its rows."""
        own = self.picks and self.refresh_layers is not None and layer in self.refresh_layers
        return own and layer + 1 not in (self.refresh_layers or ())

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
        if self.refresh_layers is not None and self.refresh_layers[-1] >= layers:
            raise UserError(
                f"refresh_layers must be below the model's {layers} layers, got {self.refresh_layers[-1]} "
                f"(policy '{self.name}')"
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
        said: dict[str, Any] = dict.fromkeys(("name", "description", "source", "provenance"), True)
        if not self.packs:
            said["vision_bits"] = True  # which policies of before have not: theirs hash as they did
        if self.core_score == CoreScore():
            said["core_score"] = True  # the same
        if not self.triggered:
            said["refresh_margin"] = True  # the same
        if self.refresh_layers is None or not self.picks:
            said["refresh_layers"] = True  # the same
        if not self.text.packs:
            said["text"] = {"bits"}  # the same
        if self.heads != "adaptive":
            said |= {"head_floor": True, "head_shares": True}  # the same
        if not self.shrinks:
            said["pictures"] = True  # the same
        acting = self.model_dump(mode="json", by_alias=True, exclude=said)
        return hashlib.sha256(json.dumps(acting, sort_keys=True).encode()).hexdigest()[:16]


DENSE = Policy(name="dense", description="Everything stays and is attended to: the stock model.")
