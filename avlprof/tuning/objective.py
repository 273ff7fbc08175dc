"""The cheap score of a policy: KL to the dense model's own answers, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import optuna

from avlprof.allocators import Evidence
from avlprof.errors import UserError
from avlprof.policy import dump_policy, live_share, read_share
from avlprof.runtime.forced import ForcedSet
from avlprof.tuning.candidate import Budget
from avlprof.tuning.space import Space


@dataclass
class Objective:
    """Scores trials; lower is better (mean KL to dense in nat per answer token).

    Values are reported per sample (the step is the sample's index), so a pruner can pair trials
    by sample. A trial that is stopped early returns its running mean and is marked incomplete.
    """

    forced: ForcedSet
    evidence: Evidence
    budget: Budget
    space: Space

    def __call__(self, trial: optuna.Trial) -> float:
        candidate = self.space.suggest(trial, self.budget)
        policy = candidate.policy(self.evidence, self.budget)
        trial.set_user_attr("policy", dump_policy(policy))
        layers = policy.layers or 1
        prompts = list(self.budget.prompts)
        trial.set_user_attr("live_share", live_share(policy, prompts, layers))
        trial.set_user_attr("read_share", read_share(policy, prompts, layers, self.budget.answer_tokens))
        seen: list[float] = []
        for part in self.forced.parts(policy):
            for score in part:
                trial.report(score.kl, len(seen))
                seen.append(score.kl)
            if len(seen) < len(self.forced.samples) and trial.should_prune():
                break
        trial.set_user_attr("samples", len(seen))
        trial.set_user_attr("complete", len(seen) == len(self.forced.samples))
        mean = float(np.mean(seen))
        if not np.isfinite(mean):
            raise UserError(f"trial {trial.number} has no finite KL to dense ({mean}); try --dtype float32")
        return mean
