"""Regret of the search against an enumerated optimum: K = 3 on a 40-point grid of the analytic mixture.

    python benchmarks/mixture.py

All 9,880 candidates are scored once on the same noise. Each search then looks its values up, so regret is exact:
the best value found after n trials minus the best there is, over 10 seeds.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from typing import Any

import optuna
from common import record

from autodiffusion_optuna import AutoDiffusionSampler, Candidate, SearchSpace
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.models.mixture import mixture_model
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.search.timesteps import baseline_timesteps

GRID, STEPS, IMAGES, SEEDS, BUDGETS = 40, 3, 256, 10, (100, 300)


def enumerate_values() -> dict[tuple[int, ...], float]:
    model = mixture_model(GRID, clip=True)
    extractor = load_extractor("pixels", model.device)
    assert model.reference is not None
    evaluator = Evaluator(model, Sampling(), extractor, model.reference(extractor), batch=IMAGES)
    lists = (tuple(reversed(c)) for c in itertools.combinations(range(GRID), STEPS))
    return {timesteps: evaluator.score(Candidate(timesteps), [IMAGES]).value for timesteps in lists}


def search(values: dict[tuple[int, ...], float], preset: str, seed: int, warm: bool) -> list[float]:
    """Best value after each trial."""
    space = SearchSpace(T=GRID, min_steps=STEPS, max_steps=STEPS)
    study = optuna.create_study(sampler=AutoDiffusionSampler(space, preset=preset, seed=seed))
    baselines = baseline_timesteps(mixture_model(GRID).schedule, STEPS)
    for timesteps in dict.fromkeys(baselines.values()) if warm else [baselines["uniform"]]:
        study.enqueue_trial(space.encode(Candidate(timesteps)))
    study.optimize(lambda trial: values[space.suggest(trial).timesteps], n_trials=max(BUDGETS))
    best = itertools.accumulate((trial.value for trial in study.trials), min)
    return list(best)


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    started = time.perf_counter()
    values = enumerate_values()
    optimum = min(values, key=values.__getitem__)
    ranked = sorted(values.values())
    result: dict[str, Any] = {
        "candidates": len(values),
        "images": IMAGES,
        "optimum": {"timesteps": optimum, "value": values[optimum]},
        "median value": statistics.median(ranked),
        "enumeration_seconds": time.perf_counter() - started,
    }
    for preset in ("adopt", "paper"):
        runs = [search(values, preset, seed, warm=preset == "adopt") for seed in range(SEEDS)]
        for budget in BUDGETS:
            regrets = [run[budget - 1] - values[optimum] for run in runs]
            ranks = [ranked.index(run[budget - 1]) for run in runs]
            result[f"{preset}, {budget} trials"] = {
                "regret mean": statistics.fmean(regrets),
                "regret max": max(regrets),
                "regret, share of the median's": statistics.fmean(regrets) / (result["median value"] - values[optimum]),
                "rank mean": statistics.fmean(ranks),
                "optimum found": sum(r == 0 for r in ranks),
                "seeds": SEEDS,
            }
    print(json.dumps(result, indent=2), record("mixture", result))


if __name__ == "__main__":
    main()
