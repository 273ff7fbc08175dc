"""Who proposes the next trial, by name."""

from __future__ import annotations

import importlib.util
import warnings

import optuna
from optuna.exceptions import ExperimentalWarning

from avlprof.errors import UserError
from avlprof.registry import unknown

SAMPLERS = ("tpe", "gp", "cmaes", "random")
STARTUP = {"tpe": 10, "gp": 6, "cmaes": 10}
"""Finished trials, starts included, after which a sampler learns from them."""


def check_sampler(name: str) -> None:
    """`UserError` unless the sampler is known and what it needs is installed."""
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    if name == "cmaes" and importlib.util.find_spec("cmaes") is None:
        raise UserError("sampler 'cmaes' needs the package cmaes; pip install cmaes, or use --sampler tpe")


def make_sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """A new sampler; what it learnt is in the study alone, so one is made for every trial.

    `tpe` is Optuna's tree-structured Parzen estimator, `gp` its Gaussian process, `cmaes` CMA-ES
    (which leaves names and choices to chance), `random` no model at all.

    Raises:
        UserError: as `check_sampler`.
    """
    check_sampler(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        if name == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP[name])
        if name == "cmaes":
            return optuna.samplers.CmaEsSampler(
                seed=seed, n_startup_trials=STARTUP[name], warn_independent_sampling=False
            )
        if name == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP[name])
