"""Seconds that the dashboard takes for a study of 5,000 trials with ten steps and 58 layers.

    python benchmarks/dashboard.py

The study is synthetic: 30 parameters a trial and the user attributes that a search writes. It is served over HTTP as
``adopt dashboard`` does and polled as its page does. Optuna-dashboard keeps trials for ten seconds, so a poll that
shall see a new trial waits longer than that; the wait is not counted.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from common import record
from optuna.distributions import IntDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial
from optuna_dashboard import wsgi

from autodiffusion_optuna import noise
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.report import dashboard
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.storage.attrs import (
    CANDIDATE,
    CODEC,
    CONFIG,
    COST,
    GENERATION,
    IMAGES,
    METRIC,
    NOISE,
    OPERATOR,
    OWNER,
    PARENTS,
    READY,
    SCORE,
    SKIP_RATIO,
    STAGE,
)
from autodiffusion_optuna.storage.database import open_storage

TRIALS, STEPS, LAYERS, POPULATION, POLLS = 5000, 10, 58, 50, 3
LONGER_THAN_KEPT = 10.5
"""Seconds after which optuna-dashboard reads trials again."""


def search_space() -> SearchSpace:
    """Ten steps and 58 layers: three parameters a step."""
    units = tuple(f"{part}.{i}" for part in ("down", "up") for i in range(LAYERS // 2))
    return SearchSpace(
        T=1000, min_steps=STEPS, max_steps=STEPS, units=units, unit_costs=(1 / LAYERS,) * LAYERS, max_skip=0.3
    )


def synthetic(space: SearchSpace, number: int) -> FrozenTrial:
    """A finished trial as a search of layers leaves it."""
    rng = random.Random(number)
    drawn = {
        name: rng.randint(0, d.high) for name, d in space.distributions().items() if isinstance(d, IntDistribution)
    }
    candidate = space.decode(drawn)
    generation = number // POPULATION
    attrs = {
        CANDIDATE: candidate.key,
        GENERATION: generation,
        STAGE: 1 + (generation > 4),
        OPERATOR: rng.choice(["mutation", "crossover", "random"]),
        PARENTS: [max(number - 60, 0), max(number - 55, 0)],
        SKIP_RATIO: 0.3,
        COST: space.cost(candidate) / STEPS,
        IMAGES: 256,
        OWNER: f"host/{number}/123456",
    }
    started = datetime(2026, 1, 1) + timedelta(seconds=number)
    trial = create_trial(
        state=TrialState.COMPLETE,
        params=space.encode(candidate),
        distributions=space.distributions(),
        user_attrs=attrs,
        system_attrs={
            SCORE: {"rungs": {"256": 1.0}, "run": 2560, "saved": 900, "seconds_network": 1.0, "trace_ratio": -0.1}
        },
        values=[5 + 20 * rng.random()],
    )
    trial.datetime_start, trial.datetime_complete = started, started + timedelta(seconds=1)
    return trial


def insert_trials(storage: RDBStorage, study_id: int, trials: list[FrozenTrial]) -> None:
    """Finished trials in bulk: one by one, as Optuna writes them, five thousand take many minutes."""
    rows: dict[Any, list[dict[str, Any]]] = {
        model: []
        for model in (
            models.TrialModel, models.TrialValueModel, models.TrialParamModel, models.TrialUserAttributeModel
        )
    }  # fmt: skip
    for number, trial in enumerate(trials):
        own = {"trial_id": number + 1}
        finite = models.TrialValueModel.TrialValueType.FINITE
        rows[models.TrialModel].append(
            {
                **own, "number": number, "study_id": study_id, "state": trial.state,
                "datetime_start": trial.datetime_start, "datetime_complete": trial.datetime_complete,
            }
        )  # fmt: skip
        rows[models.TrialValueModel].append({**own, "objective": 0, "value": trial.value, "value_type": finite})
        rows[models.TrialParamModel] += [
            {
                **own,
                "param_name": name,
                "param_value": value,
                "distribution_json": distribution_to_json(trial.distributions[name]),
            }
            for name, value in trial.params.items()
        ]
        rows[models.TrialUserAttributeModel] += [
            {**own, "key": key, "value_json": json.dumps(value)} for key, value in trial.user_attrs.items()
        ]
    with storage.engine.begin() as connection:
        for model, values in rows.items():
            connection.execute(model.__table__.insert(), values)
    read = storage.get_all_trials(study_id)[-1]
    assert (read.params, read.distributions, read.user_attrs, read.values) == (
        trials[-1].params, trials[-1].distributions, trials[-1].user_attrs, trials[-1].values
    )  # fmt: skip


def make_study(storage: RDBStorage, space: SearchSpace) -> int:
    """Id of a finished study of ``TRIALS`` trials."""
    study = optuna.create_study(study_name="large", storage=storage, direction="minimize")
    study_id = storage.get_study_id_from_name("large")
    config = load_preset("digits-10-layers", ["name=large", f"search.trials={TRIALS}"])
    study.set_user_attr(CONFIG, config.model_dump(mode="json"))
    study.set_user_attr(METRIC, "FD(digits)")
    study.set_user_attr(CODEC, space.codec())
    study.set_user_attr(NOISE, noise.linear(space.T).pack())
    insert_trials(storage, study_id, [synthetic(space, number) for number in range(TRIALS)])
    study.set_user_attr(READY, True)
    return study_id


def fetch(url: str) -> tuple[float, int]:
    """Seconds and bytes of one answer."""
    started = time.perf_counter()
    with urllib.request.urlopen(url) as answer:
        size = len(answer.read())
    return time.perf_counter() - started, size


@contextmanager
def serving(storage: BaseStorage) -> Iterator[str]:
    """Address of the dashboard of a database while it is served."""
    server = dashboard.make_server(wsgi(storage), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield dashboard.address(server)
    finally:
        server.shutdown()
        server.server_close()


def measure(storage: BaseStorage, study_id: int, add_trial: Callable[[], int]) -> dict[str, Any]:
    """Seconds and bytes of the first load, and of polls with and without a new trial; medians of ``POLLS`` each."""
    with serving(storage) as address:
        url = f"{address}/api/studies/{study_id}?after="
        first, size = fetch(url + "0")
        count = TRIALS
        idle = [fetch(url + str(count)) for _ in range(POLLS)]
        news = []
        for _ in range(POLLS):
            add_trial()
            time.sleep(LONGER_THAN_KEPT)
            news.append(fetch(url + str(count)))
            count += 1
        assert all(more > least for (_, more), (_, least) in zip(news, idle, strict=True))
    return {
        "trials": count,
        "first load, seconds": first,
        "first load, bytes": size,
        "poll, seconds": statistics.median(seconds for seconds, _ in idle),
        "poll, bytes": idle[-1][1],
        "poll with a new trial, seconds": statistics.median(seconds for seconds, _ in news),
        "poll with a new trial, bytes": news[-1][1],
        "slowest poll, seconds": max(seconds for seconds, _ in idle + news),
        "polls of each kind": POLLS,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{Path(folder) / 'large.db'}"
        storage = open_storage(url)
        space = search_space()
        study_id = make_study(storage, space)
        added = iter(range(TRIALS, 2 * TRIALS))

        def add_trial() -> int:
            return storage.create_new_trial(study_id, synthetic(space, next(added)))

        study = optuna.load_study(study_name="large", storage=open_storage(url))
        started = time.perf_counter()
        dashboard.publish(study, url)
        publishing = time.perf_counter() - started
        measured = measure(open_storage(url), study_id, add_trial)
    result = {"parameters": 3 * STEPS, "note and figures, seconds": publishing, **measured}
    print(json.dumps(result, indent=2), record("dashboard", result))


if __name__ == "__main__":
    main()
