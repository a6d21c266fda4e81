"""Run shipped studies from nothing, as a user would, and record what they found.

    python benchmarks/studies.py digits-4 digits-6 digits-10 digits-4-paper digits-10-layers

Each study gets a new database in ``benchmarks/work`` and writes ``benchmarks/results/STUDY.json``: wall seconds of
the whole command, evaluations run and saved, and the held-out scores of the winner, uniform and the best baseline.
Of a study that skips layers, also those of uniform with every layer on at cost 1, and of the best candidate that
skips nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import record

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.search.timesteps import BASELINES
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study
from autodiffusion_optuna.storage.trials import values_by_key
from autodiffusion_optuna.study import components, validation

WORK = Path(__file__).parent / "work"
ADOPT = [sys.executable, "-m", "autodiffusion_optuna"]


def database(name: str) -> Path:
    return WORK / f"{name}.db"


def run_from_nothing(name: str) -> float:
    """Wall seconds of ``adopt run --study NAME`` with a new database."""
    WORK.mkdir(exist_ok=True)
    for file in WORK.glob(f"{name}.db*"):
        file.unlink()
    started = time.perf_counter()
    subprocess.run([*ADOPT, "run", "--study", name, "--storage", str(database(name))], check=True)
    return time.perf_counter() - started


def shown(name: str) -> dict[str, Any]:
    """What ``adopt show --json`` prints."""
    command = [*ADOPT, "show", "--study", name, "--storage", str(database(name)), "--json"]
    data: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return data


def layer_comparison(name: str) -> dict[str, Any]:
    """Held-out scores of candidates that skip no layer, to compare the winner with."""
    storage = open_storage(f"sqlite:///{database(name)}", create=False)
    study = load_study(storage, name)
    config = load_preset(name)
    parts = components.build(config)
    images, banks = config.score.held_out_images, config.score.held_out_banks
    full = Candidate(BASELINES["uniform"](parts.model.schedule, config.search.cost_steps or parts.space.max_steps))
    values = values_by_key(study)
    steps_only = min((key for key in values if ":" not in key), key=lambda key: values[key])
    compared = {"uniform, every layer on": full, "best without skips": Candidate.from_key(steps_only)}
    return {
        what: {
            "timesteps": list(candidate.timesteps),
            "cost": components.relative_cost(parts, candidate),
            "held_out": validation.score_held_out(parts, study, candidate, images, banks).summary(),
        }
        for what, candidate in compared.items()
    }


def main() -> None:
    for name in sys.argv[1:] or ["digits-4"]:
        seconds = run_from_nothing(name)
        data = shown(name)
        config = load_preset(name)
        baselines = {baseline["name"]: baseline for baseline in data["baselines"]}
        best_baseline = min((b for b in data["baselines"] if b["value"] is not None), key=lambda b: b["value"])
        best = data["best"]["held_out"]
        ratios = {
            "best / uniform": best["mean"] / baselines["uniform"]["held_out"]["mean"],
            "best / best baseline": best["mean"] / best_baseline["held_out"]["mean"],
        }
        result = {
            "wall_seconds": seconds,
            "seed": config.search.seed,
            "noise_seed": config.score.seed,
            "best_baseline": best_baseline["name"],
            "ratios_on_held_out_noise": ratios,
            "show": data,
        }
        if config.search.max_skip:
            result["without_skips"] = layer_comparison(name)
        path = record(name, result)
        print(json.dumps({key: value for key, value in result.items() if key != "show"}, indent=2), path)


if __name__ == "__main__":
    main()
