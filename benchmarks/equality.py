"""Whether a refactoring changed what is proposed or computed: compares both, bit for bit, with a recording.

    python benchmarks/equality.py                                            # minutes on one core
    python benchmarks/equality.py --record benchmarks/results/equality.json  # where they were meant to change

The first 200 proposals of four searches, which learn from a made-up value instead of a network's, and the values of 20
candidates with every solver on the digits model. What is recorded are hashes: of each 20 proposals, so that a
difference shows from where on, and of each solver's values. Values are comparable on the machine and with the libraries
that the recording names; proposals need numpy and scipy alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, machine

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.evaluation.evaluator import Evaluator, Score, Seconds
from autodiffusion_optuna.evaluation.solvers import SOLVERS
from autodiffusion_optuna.storage.attrs import CANDIDATE
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.study.components import build
from autodiffusion_optuna.study.lifecycle import open_study
from autodiffusion_optuna.study.loop import work

TRIALS, TOGETHER, CANDIDATES, IMAGES = 200, 20, 20, 64
STUDIES: dict[str, tuple[str, list[str]]] = {
    "digits-4": ("digits-4", []),
    "digits-4-paper": ("digits-4-paper", []),
    "digits-10-layers": ("digits-10-layers", []),
    "digits-6, three solvers": ("digits-6", ['sampling.solver=["ddim", "dpmpp_2m", "heun"]']),
}
"""Preset and overrides, by name."""


class Guess(Evaluator):
    """Guesses a candidate's value from its timesteps, its skips and its settings."""

    def score(self, candidate: Candidate, rungs: Any, **options: Any) -> Score:
        away = np.abs(np.linspace(880, 40, candidate.steps) - np.array(candidate.timesteps)).mean()
        settings = sum(zlib.crc32(str(value).encode()) % 97 for _, value in candidate.settings)
        skipped = sum(modes.bit_count() for modes in candidate.modes)
        value = float(away + skipped + settings + zlib.crc32(candidate.key.encode()) / 2**32)
        return Score(value, rungs[-1], ((rungs[-1], value),), True, rungs[-1] * candidate.steps, 0, Seconds())


def proposals(preset: str, overrides: list[str]) -> list[str]:
    """Keys of a search's candidates, in their order."""
    config = load_preset(preset, [f"search.trials={TRIALS}", "model.check=false", *overrides])
    with tempfile.TemporaryDirectory() as folder:
        components, storage = build(config), open_storage(f"sqlite:///{folder}/a.db")
        study = open_study(components, storage)
        real = components.evaluator
        guess = Guess(**{field.name: getattr(real, field.name) for field in fields(real) if field.init})
        work(replace(components, evaluator=guess), study, storage)
        return [trial.user_attrs[CANDIDATE] for trial in study.get_trials(deepcopy=False)]


def values(solver: str) -> list[str]:
    """Distances of random candidates of five steps, as hexadecimal floats."""
    rng = np.random.default_rng(0)
    evaluator = build(load_preset("digits-4", ["model.check=false", f"sampling.solver={solver}"])).evaluator
    chosen = [sorted(rng.choice(1000, 5, replace=False).tolist(), reverse=True) for _ in range(CANDIDATES)]
    return [evaluator.score(Candidate(tuple(timesteps)), [IMAGES]).value.hex() for timesteps in chosen]


def digest(texts: list[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def recording() -> dict[str, dict[str, list[str]]]:
    """Hashes of everything, by kind and name."""
    found: dict[str, dict[str, list[str]]] = {"proposals": {}, "values": {}}
    for name, given in STUDIES.items():
        keys = proposals(*given)
        found["proposals"][name] = [digest(keys[i : i + TOGETHER]) for i in range(0, len(keys), TOGETHER)]
    for solver in SOLVERS:
        found["values"][solver] = [digest(values(solver))]
    return found


def difference(now: list[str], before: list[str] | None) -> str:
    """One word or a few on how a list of hashes compares with the recorded one."""
    if before is None:
        return "not recorded"
    if now == before:
        return "equal"
    first = next((i for i, (a, b) in enumerate(zip(now, before, strict=False)) if a != b), min(len(now), len(before)))
    return f"DIFFERENT from number {first * TOGETHER} on" if len(before) > 1 else "DIFFERENT"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, metavar="FILE", help="write a recording instead of comparing with one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = recording()
    if arguments.record:
        arguments.record.write_text(json.dumps({"result": found, "machine": machine()}, indent=2) + "\n")
        return
    recorded = json.loads((RESULTS / "equality.json").read_text())["result"]
    lines = {
        f"{kind}, {name}": difference(hashes, recorded[kind].get(name))
        for kind, lists in found.items()
        for name, hashes in lists.items()
    }
    print("\n".join(f"{name:40} {outcome}" for name, outcome in lines.items()))
    sys.exit(any(outcome != "equal" for outcome in lines.values()))


if __name__ == "__main__":
    main()
