"""A handful of scalars and the policy that they mean at a budget: what trials choose between."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from avlprof.allocators import Evidence, make_allocator
from avlprof.analysis.derive import leading_layers
from avlprof.bisection import largest
from avlprof.budgets import ReadBudget, meet_both, meet_budget, vision_share
from avlprof.errors import UserError
from avlprof.files import write_text
from avlprof.policy import (
    FULL,
    MARGIN,
    RANKING,
    CoreScore,
    Heads,
    PicturePolicy,
    Policy,
    PromptShape,
    Refresh,
    ScorerSpec,
    TextPolicy,
    live_share,
    refresh_reads,
    refreshes,
)
from avlprof.policy.parts import PictureKind

WHOLE = "whole"
"""Pictures as they are."""


@dataclass(frozen=True)
class Budget:
    """What every trial must meet: memory, optionally reads, counted on these prompts.

    `refreshed_steps` is the share of steps, layer by layer, that refresh where these are triggered, as
    measured; None: as many as there can be.
    """

    memory: float
    read: float | None
    prompts: tuple[PromptShape, ...]
    answer_tokens: int
    refreshed_steps: tuple[float, ...] | None = None

    def shrunk(self, pictures: PicturePolicy | None) -> Budget:
        """The same budget, of the same bytes, counted on the prompts that smaller pictures leave."""
        return replace(self, prompts=tuple(prompt.shrunk(pictures) for prompt in self.prompts))

    @cached_property
    def text_room(self) -> int:
        """A text window, in tokens, from which on no text is ever evicted."""
        return max((prompt.text for prompt in self.prompts), default=0) + max(self.answer_tokens, 1)

    def affords(self, text: TextPolicy, layers: int, refreshed: float) -> bool:
        """Whether system and text fit, if what they leave of the memory is read at a share `refreshed`.

        Careful on reads: text that generated tokens push out of a window counts as if it stayed.
        """
        always = live_share(Policy(vision_keep=0.0, text=text), self.prompts, layers)
        if always > self.memory:
            return False
        return self.read is None or always + refreshed * (self.memory - always) <= self.read

    def refreshed(self, interval: int, kind: Refresh) -> float:
        """Share of the kept but not computed vision KV that refreshes read, per step on average."""
        steps = max(self.answer_tokens, 1)
        return refreshes(steps, interval, kind) / steps * refresh_reads(kind)


def spread(
    policy: Policy,
    shares: Sequence[float],
    budget: Budget,
    floor: float = 0.0,
    follow: Callable[[tuple[float, ...]], Sequence[float]] = tuple,
) -> Policy:
    """The policy with `vision_keep` in proportion to `shares`, and with a read budget a core, at the budgets.

    Its text, refreshes, bits and pictures stay; but where some layers lead others, refreshes that this
    spread cannot pay come half as often, and so on. `follow` gives relative computed shares by the kept
    ones; see `meet_both`.

    Raises:
        UserError: system, text and refreshes alone take more; `Space.within` keeps such policies out.
    """
    if policy.pictures is not None:
        inner = spread(policy.of_cache, shares, budget.shrunk(policy.pictures), floor, follow)
        return inner.model_copy(update={"pictures": policy.pictures})
    prompts, text, bits = budget.prompts, policy.text, policy.vision_bits
    if budget.read is None:
        keep = meet_budget(shares, prompts, budget.memory, text, floor, bits)
        return policy.model_copy(update={"vision_keep": keep, "vision_compute": None})
    while True:
        reads = ReadBudget.of(policy, budget.read, budget.answer_tokens, budget.refreshed_steps)
        try:
            keep, compute = meet_both(shares, prompts, budget.memory, reads, text, floor, bits, follow)
        except UserError:
            if policy.refresh_layers is None or not policy.refresh_interval:
                raise
            longer = 2 * policy.refresh_interval
            longer = longer if longer <= budget.answer_tokens else 0
            policy = policy.model_copy(update={"refresh_interval": longer})
            continue
        return policy.model_copy(update={"vision_keep": keep, "vision_compute": compute})


def scorer_spec(name: str) -> ScorerSpec:
    """The scorer of a name, as `ScorerSpec.of`."""
    return ScorerSpec.of(name)


@dataclass(frozen=True)
class Candidate:
    """A handful of scalars that spread a budget over layers.

    `mix` parts of the allocator and the rest uniform; `temperature` sharpens (> 1) or flattens
    (< 1) what the allocator says; `floor` is the least kept share of a layer; `midpoint` is the depth
    at which allocator `sigmoid` falls, the one shape that `temperature` cannot give. With a read budget,
    `refresh_interval` is K, `refresh` what a refresh reads, `refresh_margin` what triggers it, `leading` how
    many layers lead the others at refreshes (0: each refreshes for itself; None: it is not searched;
    `leading_layers` says who leads) and `leading_interval` the K of these, `core_prompt` and `core_memory`
    what a refresh ranks by (`core_score`; None: the step's row alone, and they are not searched), and
    `compute_temperature` sharpens how reads follow the kept shares. Where text may go, `text_share` of the
    text that a budget without limits would hold is the window, and `text_sink` first tokens stay beside it.
    `vision_bits` are those of what is stored, in every layer; None: 16, and they are not searched. So are
    `text_bits` of system and prompt text; with fewer than 16 all text stays. `pictures` are `WHOLE` or
    made smaller in one of the ways of a `PicturePolicy`, to `picture_share` of their tokens; None: whole, and
    it is not searched. What an allocator knows is of whole ones.
    """

    allocator: str = "uniform"
    mix: float = 1.0
    temperature: float = 1.0
    floor: float = 0.0
    midpoint: float = 0.5
    scorer: str = RANKING
    heads: str = "shared"
    refresh_interval: int = 8
    refresh: Refresh = "full"
    refresh_margin: float = MARGIN
    leading: int | None = None
    leading_interval: int = 1
    compute_temperature: float = 1.0
    text_share: float | None = None
    text_sink: int = 0
    vision_bits: int | None = None
    core_prompt: float | None = None
    core_memory: float | None = None
    text_bits: int | None = None
    pictures: str | None = None
    picture_share: float = 1.0

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> Candidate:
        """The candidate of an Optuna trial's parameters."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in params.items() if name in known})

    def policy(self, evidence: Evidence, budget: Budget, name: str = "tuned") -> Policy:
        """The policy at the budget: never above it, at most one token a layer below."""
        if self.shown is not None:
            plain = replace(self, pictures=None)
            own = plain.policy(evidence, budget.shrunk(self.shown), name)
            return own.model_copy(update={"pictures": self.shown})
        prompts, layers = budget.prompts, evidence.layers
        text = self.text(budget, layers)
        bits = self.vision_bits or FULL
        target = vision_share(prompts, layers, budget.memory, text, bits)
        shape = {"midpoint": self.midpoint} if self.allocator == "sigmoid" else {}
        allocator = make_allocator(self.allocator, self.mix, self.temperature, **shape)
        shares = allocator.shares(evidence, target)
        kept = Policy(
            name=name,
            vision_bits=bits,
            scorer=scorer_spec(self.scorer),
            heads=cast(Heads, self.heads),
            text=text,
        )
        if budget.read is not None:
            kept = kept.model_copy(update=self._refreshes(evidence))

        def follow(keep: tuple[float, ...]) -> list[float]:
            return [share**self.compute_temperature for share in keep]

        return spread(kept, shares.tolist(), budget, self.floor, follow)

    @property
    def shown(self) -> PicturePolicy | None:
        """What of its pictures the language model gets; None: all."""
        if self.pictures in (None, WHOLE):
            return None
        return PicturePolicy(kind=cast(PictureKind, self.pictures), share=self.picture_share)

    def _refreshes(self, evidence: Evidence) -> dict[str, Any]:
        """The fields of a policy that say how its core is picked anew; plain ones where it never is."""
        interval, kind, leads = self.refresh_interval, self.refresh, None
        if self.leading:
            interval, leads = self.leading_interval, leading_layers(evidence, self.leading)
            kind = "score_only" if kind == "full" else kind
        if not interval:
            return {"refresh_interval": 0}
        said: dict[str, Any] = {"refresh_margin": self.refresh_margin} if kind == "triggered" else {}
        return said | {
            "refresh_interval": interval,
            "refresh": kind,
            "refresh_layers": leads,
            "core_score": CoreScore(prompt=self.core_prompt or 0.0, memory=self.core_memory or 0.0),
        }

    def text(self, budget: Budget, layers: int) -> TextPolicy:
        """What stays of text: all in few bits, else as much as `text_share` says and as the budgets afford.

        Raises:
            UserError: system and the newest token of text alone need more than a budget.
        """
        if self.packs_text:
            return TextPolicy(bits=self.text_bits or FULL)
        if self.text_share is None:
            return TextPolicy()
        refreshed = 0.0 if self.leading else budget.refreshed(self.refresh_interval, self.refresh)
        most = max(round(self.text_share * budget.text_room), 1)
        for sink in range(self.text_sink, -1, -1):
            if most + sink >= budget.text_room and budget.affords(TextPolicy(), layers, refreshed):
                return TextPolicy()

            def fits(window: int, sink: int = sink) -> bool:
                return budget.affords(TextPolicy(window=window, sink=sink), layers, refreshed)

            if window := largest(fits, most):
                return TextPolicy(window=window, sink=sink)
        raise UserError(
            f"budget {budget.memory:g} is below what system and one token of text need; raise the budget"
        )

    @property
    def packs_text(self) -> bool:
        """Whether text is stored in few bits; then all of it stays."""
        return self.text_bits not in (None, FULL)

    def params(self, budget: Budget) -> dict[str, Any]:
        """The values as Optuna parameters; those that the budget does not feel are left out."""
        values = asdict(self)
        if self.allocator != "sigmoid":
            del values["midpoint"]
        if budget.read is None:
            del values["refresh_interval"], values["refresh"], values["compute_temperature"]
        if budget.read is None or self.refresh != "triggered":
            del values["refresh_margin"]
        if budget.read is None or self.leading is None:
            del values["leading"], values["leading_interval"]
        elif self.leading:
            del values["refresh_interval"]
        else:
            del values["leading_interval"]
        if budget.read is None or self.core_prompt is None:
            del values["core_prompt"], values["core_memory"]
        if self.text_share is None or self.packs_text:
            del values["text_share"], values["text_sink"]
        if self.shown is None:
            del values["picture_share"]
        unsearched = [name for name in ("text_bits", "vision_bits", "pictures") if values[name] is None]
        return {name: value for name, value in values.items() if name not in unsearched}


STARTS = "starts.json"


def noted_starts(folder: Path, starts: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """The starts that the study in a folder was begun with; a new study notes these `starts`.

    A study that is resumed goes on with its own, whatever its neighbour has found since.

    Raises:
        UserError: the note cannot be read.
    """
    path = folder / STARTS
    if not path.exists():
        if starts:
            write_text(path, json.dumps([asdict(start) for start in starts], indent=1) + "\n")
        return tuple(starts)
    try:
        return tuple(Candidate(**start) for start in json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete that study") from None
