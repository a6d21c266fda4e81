"""Run shipped studies from nothing, as a user would, and record what they found.

    python benchmarks/studies.py digits-4 digits-4-paper digits-10-layers --seeds 0 1 2 --images 2000 --banks 5

Each seed of a study searches in a folder of its own, ``benchmarks/work/STUDY-SEED``, by ``adopt run``, which scores
the winner on held-out banks and beside it, on the very same noises, the uniform list of the winner's own solver and
settings, the best other baseline, and many steps; of a study that skips layers, uniform with every layer on at cost 1
and the best candidate that skips nothing are scored too. ``benchmarks/results/STUDY.json`` holds the value of each on
every bank, so that differences can be taken bank by bank, and what ``adopt run`` printed for the first seed; beside it
lies the picture that ``adopt sample`` draws. It is written again after each seed.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
from common import RESULTS, record

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import StudyConfig
from autodiffusion_optuna.results.finalists import best_candidate
from autodiffusion_optuna.results.held_out import HeldOut
from autodiffusion_optuna.results.summary import Row, read_summary
from autodiffusion_optuna.search.timesteps import uniform_timesteps
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study, stored_config
from autodiffusion_optuna.storage.trials import values_by_key
from autodiffusion_optuna.study import components, validation

WORK = Path(__file__).parent / "work"
ADOPT = [str(Path(sys.executable).parent / "adopt")]


def database(name: str, seed: int = 0) -> Path:
    return WORK / f"{name}-{seed}" / "adopt.db"


def opened(name: str, seed: int) -> optuna.Study:
    return load_study(open_storage(f"sqlite:///{database(name, seed)}", create=False), name)


def search(name: str, seed: int, settings: list[str]) -> tuple[float, list[str]]:
    """Wall seconds and printed lines of ``adopt run --study NAME`` in a new folder."""
    folder = database(name, seed).parent
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    given = [word for setting in (f"search.seed={seed}", *settings) for word in ("--set", setting)]
    command = [*ADOPT, "run", "--study", name, *given]
    started, lines = time.perf_counter(), []
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=folder, text=True, **streams) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip().replace(ADOPT[0], ".venv/bin/adopt"))  # as make demo calls it
    if process.returncode:
        sys.exit(process.returncode)
    return time.perf_counter() - started, lines


def scored(name: str, seed: int) -> dict[str, Any]:
    """One seed's search: what it cost, and the held-out values of the winner and what it is compared with."""
    study = opened(name, seed)
    config = stored_config(study)
    summary = read_summary(study, (config.score.held_out_images, config.score.held_out_banks))
    assert summary.headline is not None
    found, uniform = summary.headline.found, summary.headline.baseline
    others = [row for row in summary.baselines if row.held_out and row.candidate.key != uniform.candidate.key]
    rows = {"found": found, "uniform": uniform, "best baseline": min(others, key=by_value, default=None)}
    rows["many steps"] = summary.many_steps
    return {
        "seed": seed,
        "finished": len(summary.finished),
        "evaluations": summary.evaluations,
        "real": summary.real_floor and summary.real_floor.to_json(),
        "candidates": {
            **{label: entry(row.candidate, row.cost, row.held_out) for label, row in rows.items() if row},
            **(without_skips(study, config) if config.search.max_skip else {}),
        },
    }


def by_value(row: Row) -> float:
    """Its value in the search; infinite where the race stopped it."""
    return math.inf if row.value is None else row.value


def entry(candidate: Candidate, cost: float, held_out: HeldOut | None) -> dict[str, Any]:
    """A candidate as it is recorded."""
    assert held_out is not None
    return {
        "timesteps": list(candidate.timesteps),
        "settings": candidate.settings_dict,
        "skipped": sum(modes.bit_count() for modes in candidate.modes),
        "cost": cost,
        "values": list(held_out.values),
    }


def without_skips(study: optuna.Study, config: StudyConfig) -> dict[str, Any]:
    """Uniform with every layer on at cost 1, and the best candidate that skips nothing."""
    parts = components.build(config)
    best = best_candidate(study)
    steps = config.search.cost_steps or parts.space.max_steps
    values = values_by_key(study)
    plain = [candidate for candidate in map(Candidate.from_key, values) if not any(candidate.modes)]
    chosen = {
        "uniform, every layer on": Candidate(uniform_timesteps(parts.space.T, steps), settings=best.settings),
        "best without skips": min(plain, key=lambda candidate: values[candidate.key]),
    }
    size = config.score.held_out_images, config.score.held_out_banks
    return {
        label: entry(
            candidate,
            components.relative_cost(parts, candidate),
            validation.score_held_out(parts, study, candidate, *size),
        )
        for label, candidate in chosen.items()
    }


def picture(name: str, seed: int) -> None:
    """``results/NAME.png``: uniform, found and many steps, the same noise in each column."""
    command = [*ADOPT, "sample", "--study", name, "--out", str(RESULTS / f"{name}.png")]
    subprocess.run(command, cwd=database(name, seed).parent, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="+", help="names of presets")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the search")
    parser.add_argument("--images", type=int, default=2000, help="in a held-out bank")
    parser.add_argument("--banks", type=int, default=5, help="of held-out noise")
    given = parser.parse_args()
    settings = [f"score.held_out_images={given.images}", f"score.held_out_banks={given.banks}"]
    for name in given.studies:
        runs: list[dict[str, Any]] = []
        for seed in given.seeds:
            seconds, printed = search(name, seed, settings)
            runs.append({"seconds": seconds, **scored(name, seed)})
            if seed == given.seeds[0]:
                first = printed
                picture(name, seed)
            print(record(name, study_result(name, seed, runs, first)), flush=True)


def study_result(name: str, seed: int, runs: list[dict[str, Any]], printed: list[str]) -> dict[str, Any]:
    """What ``tables.py`` reads: the study's facts, and one entry a seed in ``runs``."""
    summary = read_summary(opened(name, seed))
    score = summary.config.score
    return {
        "description": summary.config.description,
        "metric": summary.metric,
        "solver": summary.solver_names,
        "images": score.images,
        "held_out_images": score.held_out_images,
        "held_out_banks": score.held_out_banks,
        "runs": runs,
        "printed": printed,
    }


if __name__ == "__main__":
    main()
