"""Wall time of a search over the bare network and extractor time of the same evaluations.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 taskset -c 1 python benchmarks/overhead.py

Runs the first trials of ``digits-4`` (ask to tell, SQLite on disk). After each trial the network alone is called on
as many batches as the trial evaluated, and the extractor alone on as many as it embedded, so that both halves meet the
same machine. On one that others use too, seconds of the clock say how busy it was; the ratio of the seconds of the
processor is steadier, and leaves out waiting for the disk, which is in the shares of the clock.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable

import torch
from common import record

from autodiffusion_optuna.config import SEARCH_BANK, load_preset
from autodiffusion_optuna.evaluation.denoiser import UNCONDITIONAL, Denoiser
from autodiffusion_optuna.evaluation.seeds import Bank
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.study import components, lifecycle, loop

TRIALS, SEEDS = 30, (0,)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


class Stopwatch:
    """Seconds by clock and name; each lap adds those since the one before it to its name."""

    def __init__(self) -> None:
        self.seconds = {
            clock: dict.fromkeys(("search", "network", "extractor", "not counted"), 0.0) for clock in CLOCKS
        }
        self._last = {clock: read() for clock, read in CLOCKS.items()}

    def lap(self, name: str) -> None:
        for clock, read in CLOCKS.items():
            now = read()
            self.seconds[clock][name] += now - self._last[clock]
            self._last[clock] = now


def measure(seed: int, watch: Stopwatch) -> dict[str, float]:
    """One search, and after each of its trials the bare calls; the search's own seconds by phase."""
    config = load_preset("digits-4", [f"search.trials={TRIALS}", f"search.seed={seed}"])
    parts = components.build(config)
    model, extractor, batch = parts.model, parts.evaluator.extractor, parts.evaluator.fitting_batch
    assert isinstance(model.denoiser, Denoiser)
    x = Bank(config.score.seed, SEARCH_BANK, model.shape).noise(0, batch)
    images = model.to_images(x)
    evaluated = 0
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(f"sqlite:///{folder}/a.db")
        study = lifecycle.open_study(parts, storage)

        def bare() -> None:
            nonlocal evaluated
            watch.lap("search")
            before, evaluated = evaluated, int(read_summary(study).total("run"))
            times = torch.linspace(model.schedule.T - 1, 0, (evaluated - before) // batch)
            watch.lap("not counted")
            with torch.inference_mode():
                for t in times:
                    model.denoiser.network(x, t.expand(batch), UNCONDITIONAL)
            watch.lap("network")
            for _ in range(config.score.images // batch):
                extractor(images)
            watch.lap("extractor")

        watch.lap("not counted")
        loop.work(parts, study, storage, on_trial=bare)
        phases: dict[str, float] = read_summary(study).to_json()["seconds"]
    return phases


def main() -> None:
    watch, phases = Stopwatch(), Counter[str]()
    for seed in SEEDS:
        phases.update(measure(seed, watch))
    shares = {"distance": phases["distance"], "proposal and storage": phases["storage"]}
    inside = sum(seconds for phase, seconds in phases.items() if phase not in ("total", "starts"))
    shares["between phases"] = watch.seconds["wall"]["search"] - inside
    result = {
        "trials": TRIALS,
        "seeds": SEEDS,
        **{
            clock: {**seconds, "ratio": seconds["search"] / (seconds["network"] + seconds["extractor"])}
            for clock, seconds in watch.seconds.items()
        },
        "phases": phases,
        "share of wall": {name: seconds / watch.seconds["wall"]["search"] for name, seconds in shares.items()},
    }
    print(json.dumps(result, indent=2), record("overhead", result))


if __name__ == "__main__":
    main()
