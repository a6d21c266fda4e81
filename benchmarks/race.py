"""What the race would stop, and how well each of its rungs ranks, in searches that it did not touch.

    OMP_NUM_THREADS=1 python benchmarks/race.py [NAME ...]

Each study is searched with every candidate scored in full, its values at the screen and at growing numbers of images
noted on the way. Then the race goes through the same candidates in their order, as if it were its study. Written after
each study to ``results/race.json``; studies that are there already are not searched again:

- ``studies``: {name: {"rank correlation": {images: of the value there with the last one, over all candidates};
  "stopped": {images: candidates that the race stops there}; "best stopped": of the best 20 of the search in full, the
  winner among them, how many; "evaluations": what the race runs, its teacher included, in per cent of all in full; …}}.
  ``digits-10-layers`` searches layers too; ``faces-6, 2048 features`` measures with a random network of Inception's
  shape (torchvision's, on faces of 75 pixels), against 1,000 images that the model makes in 20 steps.
- ``teachers``: how a teacher's solver, list and number of steps decide what the screen says. {noise schedule: {teacher:
  {candidates: rank correlation of the mean squared distance to its images with that to the images of 300 steps}}},
  over 40 lists between two baselines, on 32 draws of the built-in mixture.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import optuna
import torch
from common import RESULTS, record
from optuna.trial import FrozenTrial, TrialState, create_trial
from torch import Tensor

from autodiffusion_optuna import Candidate, RacePruner, noise
from autodiffusion_optuna.config import load_preset
from autodiffusion_optuna.evaluation.models.mixture import default_mixture
from autodiffusion_optuna.evaluation.solvers import SOLVERS, times
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.search.ranks import rank_correlation
from autodiffusion_optuna.search.repair import Timesteps, spread
from autodiffusion_optuna.search.timesteps import BASELINES, baseline_timesteps, log_snr
from autodiffusion_optuna.storage.attrs import CANDIDATE, SCREEN, SCREEN_TEACHER
from autodiffusion_optuna.study import lifecycle, loop
from autodiffusion_optuna.study.components import build
from autodiffusion_optuna.study.starts import screen_costs

WIDE = "faces-6, 2048 features"
STUDIES = ("digits-4", "digits-10", "faces-4", "faces-6", "digits-10-layers", WIDE)
RUNGS = (64, 128)
BEST = 20


# Studies


@dataclass(frozen=True)
class Looked:
    """A candidate of a search in full: distances to the teacher by image, values at each rung, and the last one."""

    key: str
    by_image: list[float]
    values: dict[int, float]
    last: float


def search_in_full(name: str, folder: Path, trials: int, *others: str) -> tuple[list[Looked], int, int]:
    """A study whose race stops nobody, the images that it scores on, and the evaluations of the screen's teacher."""
    settings = [f"score.rungs=[{', '.join(map(str, RUNGS))}]", f"search.trials={trials}", "model.check=false"]
    if name == WIDE:
        settings += ["score.extractor=torchscript", f"score.weights={random_inception(folder)}", "score.images=256"]
        settings += [f"score.reference={many_steps(folder)}"]
    config = load_preset(name.partition(",")[0], [*settings, *others])
    run = lifecycle.open_run(config, f"sqlite:///{folder}/{name.replace(' ', '-')}.db", trust=name == WIDE)
    with mock.patch.object(RacePruner, "prune", return_value=False):
        loop.work(run.components, run.study, run.storage)
    complete = [t for t in run.study.get_trials() if t.state == TrialState.COMPLETE]
    found = [looked(trial) for trial in complete]
    run.storage.engine.dispose()
    return found, config.score.images, screen_costs(run.components)[SCREEN_TEACHER]


def looked(trial: FrozenTrial) -> Looked:
    """What was noted of a trial on its way."""
    assert trial.value is not None
    return Looked(trial.user_attrs[CANDIDATE], trial.system_attrs[SCREEN], dict(trial.intermediate_values), trial.value)


def many_steps(folder: Path) -> Path:
    """1,000 images of the faces model, on noise that chooses nothing."""
    parts = build(load_preset("faces-6", ["sampling.solver=dpmpp_2m", "sampling.steps=20", "model.check=false"]))
    images = parts.evaluator.sample(Candidate(log_snr(parts.model.schedule, 20)), 0, 1000, bank=1)
    np.savez(folder / "faces.npz", images.permute(0, 2, 3, 1).numpy())
    return folder / "faces.npz"


def random_inception(folder: Path) -> Path:
    """TorchScript of torchvision's Inception v3 with random weights, uint8 images to 2,048 features."""
    from torchvision.models import inception_v3

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inception = inception_v3(weights=None, aux_logits=False, init_weights=True)
            self.inception.fc = torch.nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            pixels = torch.nn.functional.interpolate(images.float() / 127.5 - 1, size=(75, 75), mode="bilinear")
            return self.inception(pixels)

    path = folder / "inception.pt"
    network = Network().eval()
    torch.jit.trace(network, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), check_trace=False).save(path)
    return path


def replay(candidates: Sequence[Looked], steps: Sequence[int]) -> list[int | None]:
    """Where the race stops each candidate, looking at ``steps`` images; None where it does not."""
    study, pruner, found = optuna.create_study(), RacePruner(), list[int | None]()
    for candidate in candidates:
        stopped = None
        for step in steps:
            seen = {s: candidate.values[s] for s in steps if s <= step}
            trial = create_trial(
                state=TrialState.RUNNING, intermediate_values=seen, system_attrs={SCREEN: candidate.by_image}
            )
            trial.number = len(study.trials)
            if pruner.prune(study, trial):
                stopped = step
                break
        found.append(stopped)
        ended = TrialState.COMPLETE if stopped is None else TrialState.PRUNED
        seen = {s: candidate.values[s] for s in steps if stopped is None or s <= stopped}
        study.add_trial(
            create_trial(
                state=ended,
                value=candidate.last if stopped is None else None,
                intermediate_values=seen,
                system_attrs={SCREEN: candidate.by_image},
            )
        )
    return found


def summary(candidates: Sequence[Looked], images: int, teacher: int) -> dict[str, Any]:
    """A study's part of the result; ``teacher``: evaluations of the screen's."""
    steps = sorted(step for step in candidates[0].values if step < images)
    looks = [step for step in steps if step in (len(candidates[0].by_image), images // 2)]
    stopped = replay(candidates, looks)
    last = [c.last for c in candidates]
    order = np.argsort(last)
    calls = [len(Candidate.from_key(c.key).timesteps) for c in candidates]
    spent = teacher + sum((step or images) * n for step, n in zip(stopped, calls, strict=True))
    return {
        "candidates": len(candidates),
        "images": images,
        "rank correlation": {
            str(s): round(rank_correlation([c.values[s] for c in candidates], last) or 0, 3) for s in steps
        },
        "rank correlation of the better half": {
            str(s): round(
                rank_correlation([candidates[i].values[s] for i in better], [last[i] for i in better]) or 0, 3
            )
            for better in [order[: len(order) // 2]]
            for s in steps
        },
        "stopped": {str(s): stopped.count(s) for s in looks},
        "best": BEST,
        "best stopped": sum(stopped[i] is not None for i in order[:BEST]),
        "evaluations": round(100 * spent / (images * sum(calls)), 1),
    }


# Teachers

SCHEDULES: dict[str, NoiseSchedule] = {
    "linear betas": noise.linear(),
    "cosine betas": noise.cosine(),
    "scaled linear betas": noise.scaled_linear(),
    "scaled linear betas without a signal at the end": noise.zero_terminal_snr(noise.scaled_linear()),
    "flow": noise.flow(),
    "flow shifted by 3": noise.flow(shift=3.0),
    "EDM": noise.edm(np.geomspace(0.002, 80, 1000)),
}
TEACHERS = (
    ("ddim", "uniform-linspace", 25),
    ("ddim", "uniform-linspace", 100),
    *(("dpmpp_2m", name, points) for name in ("log-snr", "karras", "arctan") for points in (12, 16, 20, 25, 40)),
)
CANDIDATES = (("ddim", 4), ("ddim", 20), ("dpmpp_2m", 10), ("dpmpp_2m", 20))


def ends(schedule: NoiseSchedule, timesteps: Timesteps, solver: str) -> Tensor:
    """Where 32 draws of the mixture end, float32 [32, 1, 4, 4]."""
    mixture, generator = default_mixture(), torch.Generator().manual_seed(0)
    x = torch.randn(32, 1, 4, 4, generator=generator) * schedule.sigma(schedule.T - 1)
    denoise = lambda x, t: mixture.x0(x, schedule.alpha(t), schedule.sigma(t))  # noqa: E731
    return SOLVERS[solver](denoise, x, times(schedule, timesteps, "zero"))


def between(schedule: NoiseSchedule, steps: int, count: int = 40) -> list[Timesteps]:
    """Lists between two baselines each, a little shaken."""
    rng, lists = np.random.default_rng(0), list(baseline_timesteps(schedule, steps).values())
    found = []
    for _ in range(count):
        one, other = rng.choice(len(lists), 2, replace=False)
        share = rng.random()
        mixed = share * np.array(lists[one]) + (1 - share) * np.array(lists[other]) + rng.normal(0, 8, steps)
        ordered = np.sort(mixed.clip(0, schedule.T - 1))[::-1]
        found.append(spread(ordered.astype(int).tolist(), schedule.T))
    return found


def teachers(schedule: NoiseSchedule) -> dict[str, dict[str, float]]:
    """A noise schedule's part of the result."""
    away = lambda one, other: float((one - other).square().mean())  # noqa: E731
    finest = ends(schedule, log_snr(schedule, 300), "dpmpp_2m")
    drawn = {
        f"{solver}, {steps} steps": [ends(schedule, timesteps, solver) for timesteps in between(schedule, steps)]
        for solver, steps in CANDIDATES
    }
    found = {}
    for solver, name, points in TEACHERS:
        teacher = ends(schedule, BASELINES[name](schedule, points), solver)
        found[f"{solver}, {name}, {points} steps"] = {
            said: round(rank_correlation([away(x, teacher) for x in images], [away(x, finest) for x in images]) or 0, 3)
            for said, images in drawn.items()
        }
    return found


# The command


def main(names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = RESULTS / "race.json"
    result: dict[str, Any] = json.loads(file.read_text())["result"] if file.exists() else {"studies": {}}
    result["teachers"] = {name: teachers(schedule) for name, schedule in SCHEDULES.items()}
    record("race", result)
    for name in names or STUDIES:
        if name in result["studies"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = search_in_full(name, Path(folder), 100)
        result["studies"][name] = summary(*found)
        record("race", result)
        print(name, result["studies"][name], flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
