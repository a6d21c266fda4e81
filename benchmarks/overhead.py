"""Wall time of a search over the bare network and extractor time of the same evaluations.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 taskset -c 1 python benchmarks/overhead.py

Runs the first trials of ``digits-4`` (ask to tell, SQLite on disk), once starts and the screen's teacher are computed.
After each trial the network alone is called on the batches that the trial called it on, and so is the extractor, so
that both halves meet the same machine. On one that others use too, seconds of the clock say how busy it was; the ratio
of the seconds of the processor is steadier, and leaves out waiting for the disk, which is in the shares of the clock.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from common import record
from torch import Tensor

from autodiffusion_optuna.config import SEARCH_BANK, load_preset
from autodiffusion_optuna.evaluation.denoiser import UNCONDITIONAL, Denoiser
from autodiffusion_optuna.evaluation.seeds import Bank
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.study import components, lifecycle, loop

TRIALS, SEEDS = 30, (0, 1, 2)
NOT_OF_TRIALS = ("total", "starts", "screen")
"""Of the phases of a study's seconds."""
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


class Recorder:
    """A function of batches, and the sizes of those that it was called on since it was last asked."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function, self._sizes = function, list[int]()

    def __call__(self, batch: Tensor, *others: Any) -> Tensor:
        self._sizes.append(len(batch))
        return self.function(batch, *others)

    def sizes(self) -> list[int]:
        """Of the calls, which are then forgotten."""
        found, self._sizes = self._sizes, []
        return found


def measure(seed: int, watch: Stopwatch) -> dict[str, float]:
    """One search, and after each of its trials the bare calls; the search's own seconds by phase."""
    config = load_preset("digits-4", [f"search.trials={TRIALS}", f"search.seed={seed}"])
    parts = components.build(config)
    denoiser, batch = parts.model.denoiser, parts.evaluator.fitting_batch
    assert isinstance(denoiser, Denoiser)
    network, extractor = Recorder(denoiser.network), Recorder(parts.evaluator.extractor.network)
    model = replace(parts.model, denoiser=replace(denoiser, network=network))
    embedding = replace(parts.evaluator.extractor, network=extractor)
    parts = replace(parts, model=model, evaluator=replace(parts.evaluator, model=model, extractor=embedding))
    x = Bank(config.score.seed, SEARCH_BANK, model.shape).noise(0, batch)
    images = model.to_images(x)
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(f"sqlite:///{folder}/a.db")
        study = lifecycle.open_study(parts, storage)

        def bare() -> None:
            watch.lap("search")
            called, embedded = network.sizes(), extractor.sizes()
            times = torch.linspace(model.schedule.T - 1, 0, len(called))
            watch.lap("not counted")
            with torch.inference_mode():
                for t, size in zip(times, called, strict=True):
                    network.function(x[:size], t.expand(size), UNCONDITIONAL)
            watch.lap("network")
            with torch.no_grad():
                for size in embedded:
                    extractor.function(images[:size])
            watch.lap("extractor")

        loop.make_screen(parts, study, storage)
        network.sizes(), extractor.sizes()
        watch.lap("not counted")
        loop.work(parts, study, storage, on_trial=bare)
        phases: dict[str, float] = read_summary(study).to_json()["seconds"]
        storage.engine.dispose()
    return phases


def main() -> None:
    watch, phases = Stopwatch(), Counter[str]()
    for seed in SEEDS:
        phases.update(measure(seed, watch))
    shares = {"distance": phases["distance"], "proposal and storage": phases["storage"]}
    inside = sum(seconds for phase, seconds in phases.items() if phase not in NOT_OF_TRIALS)
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
