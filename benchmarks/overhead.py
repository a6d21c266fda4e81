"""Wall time of a search over the bare network time of the same evaluations.

    python benchmarks/overhead.py

Runs the first forty trials of ``digits-4`` (ask to tell, SQLite on disk), then calls the network alone as often and
with the same batches. Both halves are repeated in turn and the ratio of the totals is reported: machines are noisy.
"""

from __future__ import annotations

import json
import tempfile
import time

from common import record

from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.evaluation.seeds import Bank
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.study import components, lifecycle, loop

TRIALS, ROUNDS = 40, 2


def search_seconds(seed: int) -> tuple[float, int, dict[str, float]]:
    """Wall seconds from the first ask to the last tell, network evaluations by image, and seconds by phase."""
    config = load_preset("digits-4", [f"search.trials={TRIALS}", f"search.seed={seed}"])
    parts = components.build(config)
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(f"sqlite:///{folder}/a.db")
        study = lifecycle.open_study(parts, storage)
        started = time.perf_counter()
        loop.work(parts, study, storage)
        wall = time.perf_counter() - started
        data = read_summary(study).to_json()
    return wall, data["evaluations"]["run"], data["seconds"]


def bare_seconds(evaluations: int) -> float:
    """Seconds of the denoiser alone for as many image evaluations, in batches of the study's size."""
    config = load_preset("digits-4")
    model = components.build(config).model
    x = Bank(0, 0, model.shape).noise(0, config.model.batch)
    model.denoiser(x, 500, 0)
    started = time.perf_counter()
    for i in range(evaluations // config.model.batch):
        model.denoiser(x, float(i % model.schedule.T), 0)
    return time.perf_counter() - started


def main() -> None:
    walls, bares, phases = 0.0, 0.0, {}
    for seed in range(ROUNDS):
        wall, evaluations, seconds = search_seconds(seed)
        walls += wall
        bares += bare_seconds(evaluations)
        phases = {phase: phases.get(phase, 0.0) + value for phase, value in seconds.items()}
    result = {
        "rounds": ROUNDS,
        "trials": TRIALS,
        "wall": walls,
        "bare": bares,
        "ratio": walls / bares,
        "phases": phases,
    }
    print(json.dumps(result, indent=2), record("overhead", result))


if __name__ == "__main__":
    main()
