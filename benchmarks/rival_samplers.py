"""The samplers that are compared, each through Optuna's public API on the same space."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from optuna.pruners import BasePruner, NopPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from published_ea import PublishedEA

from autodiffusion_optuna import AutoDiffusionSampler, RacePruner, SearchSpace
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.search.timesteps import baseline_timesteps

ADOPT, IN_FULL, PAPER, EA = "adopt", "adopt, in full", "paper", "published EA"
"""Ours; ours without the race, where both are run; our preset of the published search; the published search itself."""

SAMPLERS: dict[str, Callable[[SearchSpace, int], BaseSampler]] = {
    ADOPT: lambda space, seed: AutoDiffusionSampler(space, thrifty=True, seed=seed),
    IN_FULL: lambda space, seed: AutoDiffusionSampler(space, thrifty=True, seed=seed),
    PAPER: lambda space, seed: AutoDiffusionSampler(space, preset="paper", seed=seed),
    EA: PublishedEA,
    "random": lambda space, seed: RandomSampler(seed),
    "TPE": lambda space, seed: TPESampler(multivariate=True, seed=seed),
    "CMA-ES": lambda space, seed: CmaEsSampler(seed=seed),
    # Its own 50 would be one generation of what there is to spend.
    "NSGA-II": lambda space, seed: NSGAIISampler(population_size=20, seed=seed),
    "GP": lambda space, seed: GPSampler(seed=seed, deterministic_objective=True),
}
FOREIGN = tuple(name for name in SAMPLERS if name not in (ADOPT, IN_FULL, PAPER, EA))
"""Those of Optuna."""


def missing(name: str) -> str | None:
    """What a sampler lacks here, None where it can run."""
    if name == "CMA-ES" and importlib.util.find_spec("cmaes") is None:
        return "CMA-ES needs the package cmaes: pip install cmaes"
    return None


def first_lists(name: str, schedule: NoiseSchedule, steps: int) -> list[tuple[int, ...]]:
    """What a sampler is given to try first: the baselines, the published searches uniform alone.

    The published EA has its uniform list from itself.
    """
    lists = baseline_timesteps(schedule, steps)
    if name in (PAPER, EA):
        return [lists["uniform"]] if name == PAPER else []
    return list(dict.fromkeys(lists.values()))


def pruner_of(name: str) -> BasePruner:
    """The race for ours, and for the others none."""
    return RacePruner() if name == ADOPT else NopPruner()
