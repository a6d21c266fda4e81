"""How small a teacher may be before the lists computed from it suffer, and what every start is worth unsearched.

For each bundled model, each size of the teacher and each number of steps: the list of OptimalSteps, its distance to the
reference on the 256 images of the search, and the network evaluations that a study of that number of steps spends
on it, teacher included. Beside them the distance of GITS, and of every list that the noise schedule alone gives.
Writes ``results/starts.json`` after each teacher and goes on from there: about an hour on one core.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from common import RESULTS, record

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.evaluation.optimal_steps import gits, optimal_steps
from autodiffusion_optuna.evaluation.teacher import run_teacher
from autodiffusion_optuna.search.timesteps import baseline_timesteps
from autodiffusion_optuna.study.components import StudyComponents, build

STUDIES: dict[str, tuple[tuple[int, ...], ...]] = {
    "digits-4": ((4, 6, 10), (17, 21, 25, 33, 41), (8, 16, 32)),
    "faces-4": ((4, 6), (17, 25, 33), (8, 16)),
}
"""Study that a model is taken from -> numbers of steps, and points and images of its teachers."""
IMAGES = 256


def main() -> None:
    torch.set_num_threads(1)
    file = RESULTS / "starts.json"
    found: dict[str, Any] = json.loads(file.read_text())["result"] if file.exists() else {}
    for name, (steps, grids, counts) in STUDIES.items():
        study = build(load_preset(name))
        kept = found.setdefault(study.model.name, {"lists": {}, "teachers": {}})
        for many in steps:
            for baseline, timesteps in baseline_timesteps(study.model.schedule, many).items():
                _score(study, kept, f"{baseline}, {many} steps", timesteps)
        record("starts", found)
        for images in counts:
            for points in grids:
                _with_teacher(study, kept, points, images, steps)
                record("starts", found)


def _with_teacher(
    study: StudyComponents, kept: dict[str, Any], points: int, images: int, steps: tuple[int, ...]
) -> None:
    """Lists of a teacher of so many points and images."""
    key = f"{points} points, {images} images"
    if key in kept["teachers"]:
        return
    teacher = run_teacher(study.images, images, points)
    found = optimal_steps(study.images, teacher, min(steps), max(steps))
    straight = gits(study.images, teacher, min(steps), max(steps))
    kept["teachers"][key] = {
        f"{many} steps": {
            # Of a study of this number of steps alone.
            "evaluations": teacher.evaluations + images * many * (points - many + 1),
            "oss": _score(study, kept, f"oss, {many} steps, {key}", found.lists[many]),
            "gits": _score(study, kept, f"gits, {many} steps, {key}", straight[many]),
        }
        for many in steps
    }
    print(key, kept["teachers"][key], flush=True)


def _score(study: StudyComponents, kept: dict[str, Any], label: str, timesteps: tuple[int, ...]) -> float:
    """Distance of a list, measured once."""
    same = (row["value"] for row in kept["lists"].values() if tuple(row["timesteps"]) == timesteps)
    value = next(same, None)
    if value is None:
        value = round(study.evaluator.score(Candidate(timesteps), [IMAGES]).value, 4)
    kept["lists"][label] = {"timesteps": list(timesteps), "value": value}
    return float(value)


if __name__ == "__main__":
    main()
