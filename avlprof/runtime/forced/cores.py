"""Cores that are picked step by step, as what a step picks depends on rows before it or another layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from avlprof.attention.ranking import averaged, core_scores, ranks
from avlprof.runtime.forced.prompt import Prompts
from avlprof.runtime.forced.rows import AnswerRows, Plans, head_mean, with_prompt
from avlprof.runtime.trigger import Held, leaning

Weigh = Callable[[int, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Told:
    """What a layer tells those that follow it, of each step.

    `rows`, fp32 `[B, P, T, N]`, is its attention to the prompt's columns at refreshes, the mean over its
    sets, and below 0 where it holds no vision token; `due`, bool `[B, P, T]`, are the steps that refreshed.
    """

    rows: Tensor
    due: Tensor


@dataclass(frozen=True)
class CoreSteps:
    """What each row sees, bool `[B, G, P, T, N]`: of vision, and of the prompt in full precision.

    `due`, bool `[B, P, T]`, are the steps that refresh; `told` is for layers that follow, if any do.
    """

    seen: Tensor
    whole: Tensor
    due: Tensor
    told: Told | None


class RunningCore:
    """The core of a layer that is picked anew, bool `[B, G, P, N]`, and the scores that run for it.

    `sets` are the kept and the core tokens right after prefill. Scores change as in
    `avlprof.runtime.core_scores`.
    """

    def __init__(self, plans: Plans, prompts: Prompts, layer: int, sets: tuple[Tensor, Tensor]) -> None:
        policy = plans.policies[0]
        self.rule, self.scored = policy.core_score, policy.scores_core
        self.kept, self.core = sets
        self._counts = plans.vision(layer)[1][:, None, :, None]
        self._mean = torch.full(self.kept.shape, -1.0, device=self.kept.device)
        if self.scored:
            specs, groups = [policy.scorer for policy in plans.policies], self.kept.shape[1]
            self._prompt = torch.stack([prompts.group_scores(spec, groups, layer) for spec in specs], dim=2)

    @classmethod
    def of(
        cls, plans: Plans, prompts: Prompts, layer: int, sets: tuple[Tensor, Tensor]
    ) -> RunningCore | None:
        """The core of a layer whose core is picked anew; None where it is not."""
        counts, cores = plans.vision(layer)
        picks = plans.policies[0].refresh_interval > 0 and not bool((counts == cores).all())
        return cls(plans, prompts, layer, sets) if picks else None

    def attended(self, row: Tensor, seen: Tensor) -> None:
        """Count a row of weights `[B, G, P, N]` to the tokens `seen`."""
        if self.scored:
            self._mean = averaged(self._mean, row, seen, self.rule.memory)

    def pick(self, row: Tensor, seen: Tensor, due: Tensor | None = None) -> Tensor:
        """Make the best by a row that sees `seen` the core, where it is `due [B, 1, P, 1]`; the new core."""
        counted = seen if due is None else seen & due
        self.attended(row, counted)
        scores = row.masked_fill(~counted, 0.0)
        if self.scored:
            scores = core_scores(self._prompt, self._mean, self.kept, self.rule.prompt)
        new = ranks(scores.masked_fill(~self.kept, float("-inf"))) < self._counts
        self.core = new if due is None else torch.where(due, new, self.core)
        return self.core


class StepWeights:
    """Weights `[B, Hkv, P, g, N + T]` of one step after the other, from products of many steps at a time."""

    def __init__(self, rows: AnswerRows, always: Tensor, whole: Tensor) -> None:
        """`always`: what rows see anyway; `whole`: of the shape of what they see in full precision."""
        self._rows, self._always = rows, always
        self._none = torch.zeros_like(whole).unsqueeze(3)
        self._block, self._left = range(0), rows.blocks(range(rows.steps))

    def __call__(self, step: int, seen: Tensor, whole: Tensor) -> Tensor:
        """Of a step that sees the vision tokens `seen` and the tokens `whole` in full precision."""
        if step not in self._block:
            while step not in self._block:
                self._block = next(self._left)
            self._logits = self._stored = self._rows.logits(self._block)
            if self._rows.stored is not None:
                self._stored = self._rows.logits(self._block, self._none)
        at = step - self._block.start
        row = self._logits[..., at, :]
        if self._rows.stored is not None:
            near = pad(whole, (0, self._rows.steps), value=True).unsqueeze(3)
            row = torch.where(near, row, self._stored[..., at, :])
        visible = with_prompt(self._always[:, :, step : step + 1], seen.unsqueeze(3))
        return self._rows.weights(row.masked_fill(~visible.squeeze(3).unsqueeze(3), float("-inf")))


class CorePicker:
    """Goes through the steps of a layer, for all policies of a pass at once."""

    def __init__(self, rows: AnswerRows, plans: Plans, running: RunningCore, layer: int, lead: Told | None):
        """`lead`: what the layer that this one follows has told, if it follows one."""
        self._rows, self._running, self._lead = rows, running, lead
        self._policy = plans.policies[0]
        self._leads = self._policy.leads(layer)
        self._triggered = self._policy.triggered and lead is None
        self._full = self._policy.refresh == "full" and lead is None
        self._held: Held | None = None
        self._since = torch.zeros_like(running.kept[:, 0, :, 0], dtype=torch.long)

    def steps(self, weigh: Weigh) -> CoreSteps:
        """All of them."""
        running, kept = self._running, self._running.kept
        whole = running.core | ~kept
        views, wholes, rows, dues = [], [], [], []
        for step in range(self._rows.steps):
            due = self._due(step)
            now, before, some = due[:, None, :, None], whole, bool(due.any())
            if some:
                whole, row = self._refreshed(step, due, whole, weigh)
                rows.append(row)
            elif self._leads:
                rows.append(torch.full_like(kept[:, 0], -1.0, dtype=torch.float32))
            views.append(torch.where(now, kept, running.core) if self._full else running.core)
            wholes.append(torch.where(now, before, whole) if self._full else whole)
            dues.append(due)
            if running.scored and not bool(due.all()):
                row = head_mean(weigh(step, running.core, whole)[..., : self._rows.length], kept.shape[1])
                running.attended(row, running.core & ~now)
        due = torch.stack(dues, dim=2)
        told = Told(self._rows.prompt.by_column(torch.stack(rows, dim=2)), due) if self._leads else None
        return CoreSteps(torch.stack(views, dim=3), torch.stack(wholes, dim=3), due, told)

    def _due(self, step: int) -> Tensor:
        """Which prompts refresh at a step under which policies, bool `[B, P]`."""
        self._since = self._since + 1
        every = self._policy.refresh_interval
        if self._lead is not None:
            return self._lead.due[..., step]
        if not self._triggered:
            return torch.full_like(self._since, (step + 1) % every == 0, dtype=torch.bool)
        if self._held is None:
            return torch.ones_like(self._since, dtype=torch.bool)
        lean = leaning(self._rows.query[..., step, :], self._held.apart, self._rows.call.scaling)
        return (self._since >= every) & self._held.fallen(lean, self._policy.refresh_margin)

    def _refreshed(self, step: int, due: Tensor, whole: Tensor, weigh: Weigh) -> tuple[Tensor, Tensor]:
        """Pick where it is due: what is in full precision from then on, and the row `[B, P, N]` to tell."""
        running, kept, now = self._running, self._running.kept, due[:, None, :, None]
        weights = None
        if self._lead is not None:
            row = self._rows.prompt.at_columns(self._lead.rows[:, :, step])[:, None].expand_as(kept)
            running.pick(row, kept & (row >= 0), now)
        else:
            weights = weigh(step, kept, whole)
            row = head_mean(weights[..., : self._rows.length], kept.shape[1])
            running.pick(row, kept, now)
        after = torch.where(now, whole & (running.core | ~kept), whole)
        if self._triggered and weights is not None:
            self._hold(step, weights, after, due)
        self._since = self._since.masked_fill(due, 0)
        said = (
            row.masked_fill(~kept, 0.0).mean(dim=1).masked_fill(~(kept.any(dim=1) & due.unsqueeze(-1)), -1.0)
        )
        return after, said

    def _hold(self, step: int, weights: Tensor, whole: Tensor, due: Tensor) -> None:
        """Remember what the new core holds of a step's weights."""
        rows, core = self._rows, self._running.core
        rest = self._running.kept & ~core
        own = weights[..., : rows.length]
        on_core, on_rest = ((own * part.unsqueeze(3)).sum(dim=-1) for part in (core, rest))
        apart = rows.mean_key(rest, whole) - rows.mean_key(core, whole)
        lean = leaning(rows.query[..., step, :], apart, rows.call.scaling)
        new = Held.of(on_core, on_rest, apart, lean)
        self._held = new if self._held is None else self._held.replaced(new, due)
