"""What a search does and how hard it tries; who proposes its trials."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from avlprof.errors import UserError
from avlprof.registry import unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optuna
    from optuna.trial import FrozenTrial

    from avlprof.tasks import Task
    from avlprof.tuning.space import Space

SAMPLERS = ("tpe", "gp", "cmaes", "random")
STARTUP = {"tpe": 10, "gp": 6, "cmaes": 10}
"""Finished trials, starts included, after which a sampler learns from them."""


def check_sampler(name: str) -> None:
    """`UserError` unless the sampler is known and what it needs is installed."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise UserError("sampler 'cmaes' needs the package cmaes; pip install cmaes, or use sampler 'tpe'")


MOST_BY_GP = 250
"""Trials from which on a Gaussian process, whose cost is cubic in them, hands over to CMA-ES."""


def make_sampler(name: str, seed: int, done: Sequence[FrozenTrial] = ()) -> optuna.samplers.BaseSampler:
    """A new sampler; what it learnt is in the study alone, so one is made for every trial.

    From `MOST_BY_GP` finished trials on `gp` is CMA-ES that begins where those have led (the rule of
    OptunaHub's AutoSampler), if the package cmaes is installed. `done` are a study's finished trials in
    their order.

    `tpe` is Optuna's tree-structured Parzen estimator, `gp` its Gaussian process, `cmaes` CMA-ES
    (which leaves names and choices to chance), `random` no model at all.

    Raises:
        UserError: as `check_sampler`.
    """
    import optuna
    from optuna.exceptions import ExperimentalWarning

    check_sampler(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name == "gp" and len(done) >= MOST_BY_GP and importlib.util.find_spec("cmaes") is not None:
            return _warm_cmaes(seed, done[:MOST_BY_GP])
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP[name])
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(
                seed=seed, n_startup_trials=STARTUP[name], warn_independent_sampling=False
            )
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP[name])


def _warm_cmaes(seed: int, done: Sequence[FrozenTrial]) -> optuna.samplers.BaseSampler:
    """CMA-ES that begins where the best tenth of `done` lies; choices stay as the best has them."""
    import optuna
    from optuna.distributions import CategoricalDistribution

    scored = [trial for trial in done if trial.value is not None]
    best = min(scored, key=lambda trial: trial.value or 0.0)
    common = set.intersection(*(set(trial.params) for trial in scored))
    choices = {
        name
        for name, kind in best.distributions.items()
        if isinstance(kind, CategoricalDistribution) or kind.single()
    }
    sources = [
        optuna.trial.create_trial(
            params={name: value for name, value in trial.params.items() if name in common - choices},
            distributions={
                name: kind for name, kind in trial.distributions.items() if name in common - choices
            },
            value=trial.value,
        )
        for trial in scored
    ]
    numbers = optuna.samplers.CmaEsSampler(seed=seed, source_trials=sources, warn_independent_sampling=False)
    return optuna.samplers.PartialFixedSampler({name: best.params[name] for name in choices}, numbers)


def check_budget(name: str, share: float) -> None:
    """`UserError` unless a budget is a share of the dense prompt KV."""
    if not 0.0 <= share <= 1.0:
        raise UserError(f"{name} must be in [0, 1], a share of the dense prompt KV, got {share}")


BUDGET = 0.2
"""The memory budget where none is given: no setting, since a sweep has several."""

_LEAST = {"trials": 1, "samples": 2, "proof_samples": 2, "finalists": 1, "batch_size": 1, "halving": 1}


def _space() -> Space:
    from avlprof.tuning.space import Space

    return Space()


@dataclass(frozen=True)
class Settings:
    """Everything about a search but its memory budget; defaults stand here alone.

    Attributes:
        read_budget: mean prompt KV read per decoding step over dense, in [0, 1]; with it, compute
            shares and refresh interval are tuned as well.
        trials: all trials of a study, those of earlier calls included.
        refine: how many of them refine the best scalars layer by layer; None is a third of what
            `refine_heads` leaves.
        refine_heads: how many of them, the last ones, move the share of every KV head around the best
            policy so far (`heads: adaptive`); not with a read budget.
        samples: samples of `split` that a trial is scored on.
        proof_samples: samples of `proof_split`, which the search never sees, of the final comparison.
        finalists: best trials that are generated for real before the proof.
        seed: of the sampler.
        prune: stop clearly worse trials early.
        halving: trials that are scored together; 1 is one after the other. With more, pruning keeps the
            better half of them after a quarter, and again after half, of the samples.
        objective: what trials are scored by: `fidelity` (KL to the dense model on its own answers),
            `likelihood` (of the references) or `accuracy` (the task's metric on generated answers).
        sampler: who proposes trials: `tpe`, `gp`, `cmaes` or `random`.
        margin: loss of the task's metric that still counts as not inferior to the strongest rival.
        split, proof_split: of the task; they must differ.
        max_new_tokens: the longest answer; None is the task's.
        space: what the search may choose from.
        batch_size: samples that run together; changes no score beyond rounding.
        prompt_bytes: prefilled prompts that stay on the device, in bytes; None is half of what is free.

    Raises:
        UserError: a value is out of range or a name not known.
    """

    read_budget: float | None = None
    trials: int = 50
    refine: int | None = None
    refine_heads: int = 0
    samples: int = 64
    proof_samples: int = 100
    finalists: int = 3
    seed: int = 0
    prune: bool = True
    halving: int = 1
    objective: str = "fidelity"
    sampler: str = "tpe"
    margin: float = 0.02
    split: str = "search"
    proof_split: str = "held-out"
    max_new_tokens: int | None = None
    space: Space = field(default_factory=_space)
    batch_size: int = 32
    prompt_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.read_budget is not None:
            check_budget("read_budget", self.read_budget)
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} must be {least} or more, got {getattr(self, name)}")
        self._check_stages()
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be in [0, 2^32 - 1], got {self.seed}")
        from avlprof.tuning.objective import check_objective  # and with it numpy

        check_objective(self.objective)
        check_sampler(self.sampler)
        if not 0.0 < self.margin < 1.0:
            raise UserError(f"margin must be above 0 and below 1, in units of the metric, got {self.margin}")
        if self.prompt_bytes is not None and self.prompt_bytes < 0:
            raise UserError(f"prompt_bytes must be 0 or more, got {self.prompt_bytes}")
        self._check_answers()

    def _check_stages(self) -> None:
        """`UserError` unless scalar trials are left that find what to refine, and heads have no core."""
        if not 0 <= self.refine_heads < self.trials:
            raise UserError(
                f"refine_heads must be 0 or more and below trials ({self.trials}), got {self.refine_heads}; "
                "the rest of the trials finds the policy whose heads are moved"
            )
        left = self.trials - self.refine_heads
        if not 0 <= self.refining < left:
            what = "trials less refine_heads" if self.refine_heads else "trials"
            raise UserError(
                f"refine must be 0 or more and below {what} ({left}), got {self.refine}; "
                "the rest of the trials finds what to refine"
            )
        if self.refine_heads and self.read_budget is not None:
            raise UserError(
                "refine_heads does not go with a read budget, which needs a core, and no core goes with "
                "heads: adaptive; leave one of them out"
            )

    def _check_answers(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 2:
            raise UserError(
                f"max_new_tokens must be 2 or more, got {self.max_new_tokens}; "
                "the first token comes from prefill, which no policy changes"
            )
        if self.split == self.proof_split:
            raise UserError(f"split and proof_split must differ, got '{self.split}' for both")

    def answer_limit(self, task: Task) -> int:
        """Longest answer in tokens."""
        return self.max_new_tokens or task.max_new_tokens

    @property
    def halves(self) -> bool:
        """Whether trials stop by their rank among those that they are scored with."""
        return self.prune and self.halving > 1

    @property
    def refining(self) -> int:
        """Trials that refine layer by layer."""
        return (self.trials - self.refine_heads) // 3 if self.refine is None else self.refine

    @property
    def scalar(self) -> int:
        """Trials of the scalars, which come first."""
        return self.trials - self.refining - self.refine_heads

    def missed(self, starts: int) -> str:
        """What so few trials leave out, in a sentence; empty when the sampler proposes some too."""
        scalar = self.scalar
        if scalar > starts:
            return ""
        enough = starts + 1 + self.refining if self.refine is not None else 3 * starts // 2 + 1
        enough += self.refine_heads
        what = "all starts are run" if scalar == starts else f"only {scalar} of {starts} starts are run"
        return f"{what} and the sampler proposes nothing: {enough} trials or more let it"
