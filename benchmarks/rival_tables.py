"""Searches where every candidate's value is known, so that regret is exact and a seed takes seconds.

``digits-4 table``: all 5,985 four-step schedules of 21 evenly spread timesteps of the bundled digits model (DDIM, FD
of 256 images on one noise, the network in bfloat16), in ``data/digits4_table.npz``. ``mixture``: all 9,880 three-step
schedules of a grid of 40 of the analytic mixture, scored once. A schedule that a sampler repeats is counted once. The
published EA's lists with repeats, which it would sample with fewer steps, are repaired here as other samplers' are: the
tables hold no shorter ones.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState
from rival_curves import median, ratio_at, reached
from rival_samplers import ADOPT, EA, FOREIGN, IN_FULL, PAPER, SAMPLERS, first_lists, pruner_of

from autodiffusion_optuna import Candidate, SearchSpace
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.evaluation.evaluator import Evaluator
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.models.mixture import mixture_model
from autodiffusion_optuna.evaluation.optimal_steps import gits, optimal_steps
from autodiffusion_optuna.evaluation.sampling import Sampling
from autodiffusion_optuna.evaluation.teacher import run_teacher
from autodiffusion_optuna.noise import NoiseSchedule, linear
from autodiffusion_optuna.study import components

HERE = Path(__file__).parent
IMAGES, SCREEN_IMAGES = 256, 32
TEACHER = 50 * SCREEN_IMAGES
"""Network evaluations, times images, of the run that the table's screen is paired with."""
MIXTURE_GRID, MIXTURE_STEPS = 40, 3
WITHIN = 1.02
"""Of the optimum: found."""
SHOWN = (15, 20, 30, 40, 60, 100, 120, 200, 300, 499)
"""Candidates after which the best is recorded."""
CANDIDATES = dict.fromkeys(FOREIGN, 120) | {ADOPT: 120, IN_FULL: 120, PAPER: 499, EA: 499, "random": 499, "GP": 40}
LONGER = {"mixture": {ADOPT: 300, "TPE": 300}}
"""Candidates of a run by sampler, and where a problem asks for more. GP takes about a second for each."""
REPEATS = 20
"""Trials for each candidate wanted after which a sampler that only repeats itself is stopped."""


@dataclass(frozen=True, eq=False)
class Table:
    """All candidates of a space with their values.

    ``values``, ``screen``: by timesteps; the screen is the cheap score that a race looks at first, where there is one.
    ``schedule``: of the space's own grid. ``starts``: what ours computes from the model to begin with, at a cost of
    ``start_evaluations``.
    """

    name: str
    space: SearchSpace
    schedule: NoiseSchedule
    values: Mapping[tuple[int, ...], float]
    screen: Mapping[tuple[int, ...], float] | None = None
    starts: tuple[tuple[int, ...], ...] = ()
    start_evaluations: int = 0

    @property
    def optimum(self) -> float:
        """The best value there is."""
        return min(self.values.values())

    @property
    def methods(self) -> list[str]:
        """Samplers that are compared here."""
        return [name for name in SAMPLERS if name != IN_FULL or self.screen]

    def candidates(self, method: str) -> int:
        """How many a run of it tries."""
        return LONGER.get(self.name, {}).get(method, CANDIDATES[method])


def digits_table(cache: Path) -> Table:
    """The table of the bundled digits model; what ours starts from is computed once and kept in ``cache``."""
    with np.load(HERE / "data" / "digits4_table.npz") as arrays:
        timesteps = arrays["timesteps"].astype(int)
        values, screen = arrays[f"fd{IMAGES}"].astype(float), arrays[f"paired{SCREEN_IMAGES}"].astype(float)
    grid = np.unique(timesteps)
    lists = [tuple(row) for row in np.searchsorted(grid, timesteps).tolist()]
    levels = linear()
    schedule = NoiseSchedule(levels.alphas[grid], levels.sigmas[grid], levels.model_times[grid])
    space = SearchSpace(T=len(grid), min_steps=4, max_steps=4)
    keyed = [dict(zip(lists, array.tolist(), strict=True)) for array in (values, screen)]
    path = cache / "starts.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".half")
        half.write_text(json.dumps(computed_starts(len(grid))))
        half.replace(path)  # it is there as a whole or not at all
    found, evaluations = json.loads(path.read_text())
    starts = tuple(tuple(np.searchsorted(grid, start).tolist()) for start in found)
    return Table("digits-4 table", space, schedule, *keyed, starts, evaluations)


def computed_starts(points: int) -> tuple[list[tuple[int, ...]], int]:
    """Lists of OptimalSteps and GITS on a grid of so many points, and the evaluations that took, with the teacher."""
    sampler = components.build(load_preset("digits-4", ["model.precision=bfloat16", "model.check=false"])).images
    teacher = run_teacher(sampler, SCREEN_IMAGES, points)
    found = optimal_steps(sampler, teacher, 4, 4)
    return [found.lists[4], gits(sampler, teacher, 4, 4)[4]], teacher.evaluations + found.evaluations


def mixture_table(cache: Path) -> Table:
    """The table of the mixture, enumerated once and then read from the folder ``cache``."""
    path = cache / "mixture.npz"
    lists = [tuple(reversed(c)) for c in itertools.combinations(range(MIXTURE_GRID), MIXTURE_STEPS)]
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name("half.npz")
        np.savez(half, values=enumerated(lists))
        half.replace(path)
    with np.load(path) as arrays:
        values = dict(zip(lists, arrays["values"].tolist(), strict=True))
    space = SearchSpace(T=MIXTURE_GRID, min_steps=MIXTURE_STEPS, max_steps=MIXTURE_STEPS)
    return Table("mixture", space, mixture_model(MIXTURE_GRID).schedule, values)


def enumerated(lists: Sequence[tuple[int, ...]]) -> list[float]:
    """Values of all schedules of the mixture on one noise."""
    model = mixture_model(MIXTURE_GRID, clip=True)
    extractor = load_extractor("pixels", model.device)
    assert model.reference is not None
    evaluator = Evaluator(model, Sampling(), extractor, model.reference(extractor), batch=IMAGES)
    return [evaluator.score(Candidate(timesteps), [IMAGES]).value for timesteps in lists]


def search(table: Table, method: str, seed: int, candidates: int) -> dict[str, Any]:
    """One run: best value over the optimum, and evaluations spent, after each distinct candidate."""
    raced = table.screen is not None and method == ADOPT
    ours = method in (ADOPT, IN_FULL)
    study = optuna.create_study(sampler=SAMPLERS[method](table.space, seed), pruner=pruner_of(method))
    firsts = first_lists(method, table.schedule, table.space.max_steps)
    if ours:
        firsts = offer(table, study.sampler, firsts)
    for timesteps in firsts:
        study.enqueue_trial(table.space.encode(Candidate(timesteps)))
    seen: set[str] = set()
    best, spent = float("inf"), (TEACHER if raced else 0) + (table.start_evaluations if ours else 0)
    ratios, costs = [], []
    for _ in range(REPEATS * candidates):
        trial = study.ask()
        candidate = table.space.suggest(trial)
        stopped = raced and is_stopped(table, trial, candidate)
        value = table.values[candidate.timesteps]
        study.tell(trial, None if stopped else value, state=TrialState.PRUNED if stopped else TrialState.COMPLETE)
        if candidate.key in seen:
            continue
        seen.add(candidate.key)
        best = best if stopped else min(best, value)
        spent += (SCREEN_IMAGES if stopped else IMAGES) * candidate.steps
        ratios.append(best / table.optimum)
        costs.append(spent)
        if len(seen) == candidates:
            break
    return {"ratios": ratios, "evaluations": costs, "candidates": candidates}


def offer(table: Table, sampler: Any, lists: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Offer our sampler the closed forms as a study does; what is left to be tried before anything else."""
    before = list(dict.fromkeys([*table.starts[:1], lists[0], *table.starts[1:]]))  # as ``starts.start_order`` has it
    sampler.offer(Candidate(timesteps) for timesteps in lists[1:] if timesteps not in before)
    return before


def is_stopped(table: Table, trial: optuna.Trial, candidate: Candidate) -> bool:
    """Whether the race ends a candidate after its screen."""
    assert table.screen is not None
    trial.report(table.screen[candidate.timesteps], step=SCREEN_IMAGES)
    return trial.should_prune()


def summary(table: Table, runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """What is recorded of every sampler: see ``rivals.py``."""
    return {method: dict(entries(table, method, list(runs[method].values()))) for method in SAMPLERS if method in runs}


def entries(table: Table, method: str, runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Name and figure of one sampler's runs."""
    tried = max(run["candidates"] for run in runs)
    shown = [n for n in SHOWN if n <= tried]
    firsts = [reached(run["ratios"], WITHIN) for run in runs]
    yield "candidates to 2 %", median(firsts)
    yield "curve", {str(n): statistics.median(ratio_at(run["ratios"], n) for run in runs) for n in shown}
    yield "seeds", len(runs)
    yield "seeds within 2 %", sum(first is not None for first in firsts)
    yield "seeds at the optimum", {str(n): sum(ratio_at(run["ratios"], n) <= 1 for run in runs) for n in shown}
    yield "candidates", tried
    if method == ADOPT and table.screen is not None:
        full = IMAGES * table.space.max_steps
        worths = [None if n is None else run["evaluations"][n - 1] / full for n, run in zip(firsts, runs, strict=True)]
        yield "candidates' worth of evaluations to 2 %", median(worths)
        yield "the same, worst seed", None if None in worths else max(w for w in worths if w is not None)
        yield "race", True
