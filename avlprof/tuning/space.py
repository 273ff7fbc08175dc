"""What the search may choose from, and where it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast, get_args

from avlprof.allocators import ALLOCATORS, Evidence, make_allocator
from avlprof.budgets import vision_share
from avlprof.errors import UserError
from avlprof.policy import BITS, FULL, Heads, Policy, Refresh, TextPolicy, live_share
from avlprof.policy.parts import PictureKind
from avlprof.scorers import make_scorer
from avlprof.tuning.candidate import WHOLE, Budget, Candidate, scorer_spec
from avlprof.tuning.offers import (
    check_bits,
    check_names,
    check_parts,
    check_picture_shares,
    few,
    in_reach,
    nearest,
    precisions,
)

if TYPE_CHECKING:
    from optuna import Trial

HEADS: tuple[str, ...] = get_args(Heads)
REFRESH: tuple[str, ...] = get_args(Refresh)
PICTURES: tuple[str, ...] = (WHOLE, *get_args(PictureKind))
MARGINS = (0.05, 0.1, 0.2, 0.4)
LEADING = (1, 2, 4, 8)
TEXT = ("auto", "all", "trade")
MOST_SINKS = 4
_ASIDE = ("more_starts", "reads")
# fields that spaces of before do not tell of
_NEW = ("bits", "text_bits", "core_prompts", "core_memories", "leaders", "pictures", "picture_shares")


@dataclass(frozen=True)
class Space:
    """What the search may choose from.

    A scorer over another one is written `valued:instruction`. `refreshes` are the refresh intervals
    in steps (0: never) and `refresh` what a refresh reads; they count with a read budget only, and so do
    `core_prompts` and `core_memories`, what a refresh ranks by (0 alone of both are not searched), and
    `leaders`, how many layers lead the others at refreshes (0 alone is not searched). `bits` are
    those that stored vision may have, `text_bits` system and prompt text; 16 alone are not searched.
    `pictures` are the ways in which the language model gets them, `whole` alone is not searched, and
    `picture_shares` how much of their tokens it gets of smaller ones.
    `heads` may offer `adaptive` as well, which was not measured to pay (`docs/tuning.md`), and counts without
    a read budget only, since no core goes with it. `text`
    says whether a text window is searched: `all` never, `trade` always, `auto` only where all text
    needs more than the budgets in whatever bits. `more_starts` are taken over from a study at another
    budget and `reads` says that reads are limited, which `within` finds out; both are no part of what the
    space is.

    Raises:
        UserError: a list is empty or names what is not known.
    """

    allocators: tuple[str, ...] = (
        *("uniform", "pyramid", "sigmoid", "coverage"),
        *("sparsity", "entropy", "strength", "sensitivity"),
    )
    scorers: tuple[str, ...] = (
        *("last_query", "instruction", "accumulated"),
        *("valued:instruction", "pooled:instruction"),
        *("distinct:valued:instruction", "distinct:valued:pooled:instruction"),
    )
    heads: tuple[str, ...] = ("shared", "kv_head")
    refreshes: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32)
    refresh: tuple[Refresh, ...] = ("full", "score_only")  # triggered was measured not to pay
    core_prompts: tuple[float, ...] = (0.0, 0.5, 0.8)
    core_memories: tuple[float, ...] = (0.0, 0.5, 0.9)
    leaders: tuple[int, ...] = (0, 1, 2, 3)
    bits: tuple[int, ...] = BITS
    text_bits: tuple[int, ...] = BITS[:-1]  # two were measured to lose at any budget
    text: str = "auto"
    pictures: tuple[str, ...] = (WHOLE,)
    picture_shares: tuple[float, ...] = (0.75, 0.5, 0.35, 0.25)
    more_starts: tuple[Candidate, ...] = ()
    reads: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name not in _ASIDE and not getattr(self, field.name):
                raise UserError(f"{field.name} of the search space must name at least one, got none")
        for name in self.allocators:
            ALLOCATORS.get(name)
        for name in self.scorers:
            make_scorer(scorer_spec(name))
        check_names("kind of heads", self.heads, HEADS)
        check_names("kind of refresh", self.refresh, REFRESH)
        check_names("text of the search space", (self.text,), TEXT)
        for name in ("bits", "text_bits"):
            check_bits(name, getattr(self, name))
            # in one order and each once, since a study cannot go on with its choices in another
            object.__setattr__(self, name, tuple(bits for bits in BITS if bits in getattr(self, name)))
        check_names("way of showing pictures", self.pictures, PICTURES)
        object.__setattr__(self, "pictures", tuple(one for one in PICTURES if one in self.pictures))
        check_picture_shares(self.picture_shares)
        object.__setattr__(self, "picture_shares", tuple(sorted(set(self.picture_shares), reverse=True)))
        for name in ("core_prompts", "core_memories"):
            check_parts(name, getattr(self, name))
        for name in ("refreshes", "leaders"):
            if min(getattr(self, name)) < 0:
                raise UserError(
                    f"{name} of the search space must be 0 or more, got {min(getattr(self, name))}"
                )

    @classmethod
    def of(cls, description: Mapping[str, Sequence[float | str]]) -> Space:
        """The space that `described` told of; what it says beyond the fields of a space does not count.

        One that tells of no bits is of before they were searched; so with `core_prompts` and `leaders`.
        """
        usual = cls(bits=(FULL,), text_bits=(FULL,), core_prompts=(0.0,), core_memories=(0.0,), leaders=(0,))
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {
            name: value[0] if isinstance(getattr(usual, name), str) else tuple(value)
            for name, value in description.items()
            if name in known
        }
        return cls(**{name: getattr(usual, name) for name in _NEW} | values)

    def within(self, budget: Budget, layers: int) -> Space:
        """The part of the space in which every candidate can meet the budget.

        What a refresh interval reads at least is counted with all the vision KV that the memory
        budget allows, so that it holds for any spread over layers. Bits in which all text needs more than a
        budget are not searched, unless 16 are and a window may be.

        Raises:
            UserError: system and text alone need more than a budget; the message says how much.
        """
        kept = [replace(self, text="all", text_bits=(bits,)) for bits in self.text_bits]
        fitting = tuple(one.text_bits[0] for one in kept if one._refreshes(budget, layers))
        if self.text == "all" or (self.text == "auto" and fitting):
            return replace(self, text="all", text_bits=fitting or self.text_bits)._narrowed(budget, layers)
        traded = tuple(bits for bits in self.text_bits if bits == FULL or bits in fitting)
        return replace(self, text="trade", text_bits=traded or (FULL,))._narrowed(budget, layers)

    def supported(self, evidence: Evidence) -> Space:
        """The space without the allocators, and the layers that lead, that need evidence which is not there.

        Raises:
            UserError: no allocator is left; the message is that of the first.
        """
        names, first = [], None
        for name in self.allocators:
            try:
                make_allocator(name).shares(evidence, 0.5)
                names.append(name)
            except UserError as error:
                first = first or error
        if not names and first:
            raise first
        own = evidence.layers if evidence.governed is None else len(evidence.governed)
        most = 0 if evidence.overlap is None else own - 1
        return replace(
            self, allocators=tuple(names), leaders=tuple(n for n in self.leaders if n <= most) or (0,)
        )

    def suggest(self, trial: Trial, budget: Budget) -> Candidate:
        """Ask a trial for a candidate."""
        candidate = Candidate(
            allocator=trial.suggest_categorical("allocator", self.allocators),
            mix=trial.suggest_float("mix", 0.0, 1.0),
            temperature=trial.suggest_float("temperature", 0.25, 4.0, log=True),
            floor=trial.suggest_float("floor", 0.0, min(0.1, budget.memory)),
            scorer=trial.suggest_categorical("scorer", self.scorers),
            heads=trial.suggest_categorical("heads", self.heads),
        )
        if candidate.allocator == "sigmoid":
            candidate = replace(candidate, midpoint=trial.suggest_float("midpoint", 0.05, 0.95))
        if self.text_bits != (FULL,):
            candidate = replace(candidate, text_bits=trial.suggest_categorical("text_bits", self.text_bits))
        if self.text == "trade" and not candidate.packs_text:
            candidate = replace(
                candidate,
                text_share=trial.suggest_float("text_share", 0.02, 1.0, log=True),
                text_sink=trial.suggest_int("text_sink", 0, MOST_SINKS),
            )
        if self.pictures != (WHOLE,):
            candidate = self._suggest_pictures(trial, candidate)
        if self.bits != (FULL,):
            candidate = replace(candidate, vision_bits=trial.suggest_categorical("vision_bits", self.bits))
        if budget.read is None:
            return candidate
        if self.scores_core:
            candidate = replace(
                candidate,
                core_prompt=trial.suggest_categorical("core_prompt", self.core_prompts),
                core_memory=trial.suggest_categorical("core_memory", self.core_memories),
            )
        return self._suggest_refreshes(trial, candidate)

    def _suggest_pictures(self, trial: Trial, candidate: Candidate) -> Candidate:
        kind = trial.suggest_categorical("pictures", self.pictures)
        share = 1.0 if kind == WHOLE else trial.suggest_categorical("picture_share", self.picture_shares)
        return replace(candidate, pictures=kind, picture_share=share)

    def _suggest_refreshes(self, trial: Trial, candidate: Candidate) -> Candidate:
        if self.leaders != (0,):
            candidate = replace(candidate, leading=trial.suggest_categorical("leading", self.leaders))
        if candidate.leading:
            every = {"leading_interval": trial.suggest_categorical("leading_interval", LEADING)}
        else:
            every = {"refresh_interval": trial.suggest_categorical("refresh_interval", self.refreshes)}
        kind = trial.suggest_categorical("refresh", self.refresh)
        if kind == "triggered":
            candidate = replace(
                candidate, refresh_margin=trial.suggest_categorical("refresh_margin", MARGINS)
            )
        temperature = trial.suggest_float("compute_temperature", 0.25, 4.0, log=True)
        return replace(candidate, refresh=kind, compute_temperature=temperature, **every)

    def starts(self) -> list[Candidate]:
        """The first trials: every allocator as it is, uniform first, then other scorers, then `more_starts`.

        Uniform has 16 bits, and then all others that the space offers; what follows has 4, if it may. Text
        has 16 bits in the first ones, then uniform has all others that text may have, and what follows 4.
        The blend of 20% `coverage` is what `derive` makes of a profile alone. Where text may go,
        a start that keeps a quarter of it comes next to uniform; where reads are limited, every scorer
        also starts with a core that is never re-picked, which short answers can hardly better, and where a
        refresh may rank by more than its row, uniform starts with one that does, of all layers and of each
        number of layers that may lead.
        """
        plain = in_reach(self, Candidate())
        allocators = sorted(self.allocators, key=lambda name: name != "uniform")
        full, *fewer = precisions(self.text_bits)
        both = [(bits, full) for bits in precisions(self.bits)] + [(few(self.bits), bits) for bits in fewer]
        first = replace(plain, allocator=allocators[0])
        starts = [
            in_reach(self, replace(first, vision_bits=bits, text_bits=text_bits)) for bits, text_bits in both
        ]
        plain = in_reach(self, replace(plain, vision_bits=few(self.bits), text_bits=few(self.text_bits)))
        starts += [replace(plain, allocator=name) for name in allocators]
        half = replace(plain, allocator=allocators[0], picture_share=0.5)
        starts += [in_reach(self, replace(half, pictures=kind)) for kind in self.pictures if kind != WHOLE]
        if self.text == "trade":
            starts.insert(1, in_reach(self, replace(starts[0], text_share=0.25, text_sink=1)))
        if "coverage" in allocators:
            starts.append(replace(plain, allocator="coverage", mix=0.2))
        others = [scorer for scorer in self.scorers if scorer != plain.scorer]
        for name in ("uniform", "sensitivity"):
            if name in allocators:
                starts += [replace(plain, allocator=name, scorer=scorer) for scorer in others]
        if self.reads and 0 in self.refreshes:
            starts += [
                replace(plain, allocator=allocators[0], scorer=s, refresh_interval=0) for s in self.scorers
            ]
        if self.reads and self.scores_core and max(self.refreshes):
            scored = replace(
                plain,
                allocator=allocators[0],
                refresh_interval=nearest(4, self.refreshes),
                refresh="score_only" if "score_only" in self.refresh else self.refresh[0],
                core_prompt=min(self.core_prompts, key=lambda share: abs(share - 0.5)),
            )
            starts.append(scored)
            starts += [replace(scored, leading=number) for number in self.leaders if number]
        starts += [in_reach(self, start) for start in self.more_starts if start.allocator in self.allocators]
        return [*dict.fromkeys(starts)]

    def described(self) -> dict[str, tuple[float | str, ...]]:
        """The space as plain values, as a study notes it."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _ASIDE}
        for name in ("bits", "text_bits"):
            if values[name] == (FULL,):
                del values[name]
        if not self.scores_core:
            del values["core_prompts"], values["core_memories"]
        if self.leaders == (0,):
            del values["leaders"]
        if self.pictures == (WHOLE,):
            del values["pictures"], values["picture_shares"]
        return {name: (value,) if isinstance(value, str) else tuple(value) for name, value in values.items()}

    @property
    def picture_kinds(self) -> tuple[PictureKind, ...]:
        """The ways in which pictures may be made smaller."""
        return tuple(cast(PictureKind, kind) for kind in self.pictures if kind != WHOLE)

    def _cored_heads(self) -> tuple[str, ...]:
        """Kinds of heads that a core goes with."""
        heads = tuple(kind for kind in self.heads if kind != "adaptive")
        if not heads:
            raise UserError(
                "heads: adaptive alone does not go with a read budget, which needs a core; offer shared or "
                "kv_head too, or leave the read budget out"
            )
        return heads

    @property
    def scores_core(self) -> bool:
        """Whether it is searched what a refresh ranks by."""
        return (self.core_prompts, self.core_memories) != ((0.0,), (0.0,))

    def _refreshes(self, budget: Budget, layers: int) -> tuple[int, ...]:
        """Refresh intervals with which some policy of any spread meets the budgets; empty when none does."""
        kind = self._dearest
        return tuple(
            k
            for k in self.refreshes
            if all(budget.affords(text, layers, budget.refreshed(k, kind)) for text in self._texts())
        )

    @property
    def _dearest(self) -> Refresh:
        """The kind of refresh on offer that reads the most."""
        return min(self.refresh, key=("full", "triggered", "score_only").index)

    def _texts(self) -> list[TextPolicy]:
        """What has to stay of text, at least, of each kind that is searched; the dearest first."""
        if self.text == "trade":
            few = [TextPolicy(bits=bits) for bits in self.text_bits if bits != FULL]
            return [*few, TextPolicy(window=1)]
        return [TextPolicy(bits=bits) for bits in self.text_bits]

    def _narrowed(self, budget: Budget, layers: int) -> Space:
        refreshes = self._refreshes(budget, layers)
        if refreshes:
            if budget.read is None:
                return self
            return replace(self, refreshes=refreshes, reads=True, heads=self._cored_heads())
        least = self._texts()[-1]
        vision_share(budget.prompts, layers, budget.memory, least)
        always = live_share(Policy(vision_keep=0.0, text=least), budget.prompts, layers)
        kind = self._dearest
        shares = [budget.refreshed(k, kind) for k in self.refreshes]
        enough = math.ceil(min(always + s * (budget.memory - always) for s in shares) * 1000 - 1e-9) / 1000
        raise UserError(
            f"read budget {budget.read:g} is below {enough:g}, what system, text and refreshes read "
            "alone; raise the read budget or lower the budget"
        )
