"""Searches of the bundled models as they are, network and all.

``adopt`` and ``paper`` are studies of the package itself, begun, run and chosen from by its own road, with their
preset's defaults; their evaluations are those that the network ran: what the prefix cache saved is not paid, what
computing the first lists and validating the finalists took is. The winner along the way is the best by the search's own
values; the last one is the study's result. The other samplers drive Optuna with the plain objective: every candidate on
the same images in full. The published EA scores each candidate on fresh noise. Evaluations are the network's,
times images.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from common import cpu_model
from optuna.trial import TrialState
from published_ea import CANDIDATES as EA_CANDIDATES
from published_ea import timesteps_of
from rival_curves import changes, thinned
from rival_samplers import ADOPT, EA, FOREIGN, PAPER, SAMPLERS, first_lists
from rival_store import Key, Scored, Store

from autodiffusion_optuna import Candidate
from autodiffusion_optuna.config import SEARCH_BANK, load_preset
from autodiffusion_optuna.evaluation.timing import time_batch
from autodiffusion_optuna.results.summary import read_summary
from autodiffusion_optuna.storage.attrs import BASELINE_KEYS, CANDIDATE, START_COSTS
from autodiffusion_optuna.storage.trials import stored_score
from autodiffusion_optuna.study import components, lifecycle, loop, validation
from autodiffusion_optuna.study.components import StudyComponents

LISTS = "lists"
"""Stands for all baselines among the methods of a problem: they need no search."""
FRESH_BANKS = 2_000_000
"""The published EA's noise begins at this bank, a thousand banks a seed."""
BANKS = 5
"""Of held-out noise, numbered from 1."""
FINER, DOUBLED = 1.25, 2.0
"""Winners along the way, ours and all others', are scored on held-out noise once in so large a factor.

Ours more often, to say when it was as good as the published search; the picture shows all as the others."""


@dataclass(frozen=True)
class Live:
    """A problem. ``study``: the shipped study that it is, whose number of candidates ours takes.

    ``images``: that a candidate is scored on. ``held_out``: images in each held-out bank. ``seeds``, ``ea_seeds``: of
    each method, and of the published EA. ``candidates``: of Optuna's samplers, more evaluations than ours spends.
    ``paper``, ``ea``: candidates of our preset of the published search, and of the search itself. ``ours``: of ours,
    None for the study's own.
    """

    name: str
    study: str
    images: int
    held_out: int
    seeds: int
    ea_seeds: int
    candidates: int = 60
    paper: int = 200
    ea: int = EA_CANDIDATES
    ours: int | None = None

    @property
    def solvers(self) -> tuple[str, ...]:
        """Solvers that are searched; one, where the solver is fixed."""
        given = load_preset(self.study).sampling.solver
        return tuple(given) if isinstance(given, list) else (given,)

    @property
    def methods(self) -> tuple[str, ...]:
        """Of a searched solver: ours, and ours with each solver alone."""
        if len(self.solvers) > 1:
            return (ADOPT, *(f"{ADOPT}, {solver}" for solver in self.solvers))
        return (ADOPT, LISTS, EA, PAPER, *FOREIGN)

    def seeds_of(self, method: str) -> range:
        """Seeds of a method."""
        return range({EA: self.ea_seeds, LISTS: 1}.get(method, self.seeds))


PROBLEMS = {
    live.name: live
    for live in (
        Live("digits-4", "digits-4", images=256, held_out=400, seeds=5, ea_seeds=5),
        Live("digits-6", "digits-6", images=256, held_out=400, seeds=3, ea_seeds=3),
        Live("digits-10", "digits-10", images=256, held_out=400, seeds=3, ea_seeds=3),
        # The study's own budget is that of a demonstration.
        Live("faces-4", "faces-4", images=128, held_out=250, seeds=3, ea_seeds=2, ours=100),
        Live("faces-6", "faces-6", images=128, held_out=250, seeds=3, ea_seeds=2),
        Live("faces-6, solvers", "faces-solvers-6", images=128, held_out=250, seeds=3, ea_seeds=0),
    )
}
FEW = {"seeds": 1, "ea_seeds": 1, "candidates": 20, "paper": 20, "ea": 60, "ours": 20}
QUICK = {"digits-4": Live("digits-4", "digits-4", images=64, held_out=64, **FEW)}


@dataclass(frozen=True, eq=False)
class Bench:
    """One process's hold on a problem: its parts, and the disk cache of scores.

    ``folder``: where the package's studies are kept.
    """

    problem: Live
    method: str
    store: Store
    folder: Path
    parts: StudyComponents

    def score(self, candidate: Candidate, bank: int, images: int) -> Scored:
        """A candidate's distance on the first images of a bank, from the disk where it is known."""
        sampling = self.parts.evaluator.sampling.of(candidate)
        measured = f"{sampling.solver} {sampling.final} {measures(self.parts)}"
        plain = Candidate(candidate.timesteps)
        return self.store.score(Key(measured, plain.key, bank, images), lambda: self._sampled(candidate, bank, images))

    def _sampled(self, candidate: Candidate, bank: int, images: int) -> Scored:
        started = time.perf_counter()
        score = self.parts.evaluator.score(candidate, [images], bank=bank, cached=False)
        return Scored(score.value, score.run, time.perf_counter() - started)


def measures(parts: StudyComponents) -> str:
    """What decides a value besides solver, schedule, bank and images, in a few letters."""
    evaluator, model = parts.evaluator, parts.model
    said = [model.fingerprint, evaluator.extractor.fingerprint, evaluator.reference.digest, evaluator.seed]
    digest = hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]
    return f"{parts.config.model.source} {parts.config.model.precision} {model.device.type} {digest}"


def opened(problem: Live, method: str, seed: int, store: Store, folder: Path) -> Bench:
    """The problem as a method's seed needs it."""
    chosen = keep_precision(problem, store)
    settings = [
        f"score.images={problem.images}", f"search.seed={seed}", f"model.precision={chosen}", "model.check=false"
    ]  # fmt: skip
    if method == PAPER:
        settings += ["search.preset=paper", f"search.trials={problem.paper}"]
    elif problem.ours is not None:
        settings.append(f"search.trials={problem.ours}")
    if method.startswith(f"{ADOPT}, "):
        settings.append(f"sampling.solver={method.removeprefix(f'{ADOPT}, ')}")
    parts = components.build(load_preset(problem.study, settings))
    return Bench(problem, method, store, folder, parts)


def keep_precision(problem: Live, store: Store, wanted: str | None = None) -> str:
    """The precision of all runs of a problem's model: what was taken first, else ``wanted``, else the faster one."""
    source = load_preset(problem.study).model.source
    return store.chosen(f"precision of {source}", lambda: wanted or faster_precision(problem.study))


def faster_precision(study: str) -> str:
    """bfloat16 where an evaluation takes a tenth less time in it than in float32, as on processors with AMX."""
    full, half = (
        components.build(load_preset(study, [f"model.precision={precision}", "model.check=false"])).evaluator
        for precision in ("float32", "bfloat16")
    )
    # In turns: what else runs on the machine is then not taken for a difference.
    ratios = [time_batch(half, 64).evaluation / time_batch(full, 64).evaluation for _ in range(7)]
    return "bfloat16" if statistics.median(ratios) < 0.9 else "float32"


# Runs


def run(problem: Live, method: str, seed: int, store: Store, folder: Path) -> dict[str, Any]:
    """A method's run with the held-out values of its winners, from the disk where it is finished.

    ``winners``: (evaluations so far, best candidate so far) whenever that changed and at the end; only those that were
    scored on held-out noise. ``held_out``: their values bank by bank.
    """
    found = store.run(problem.name, method, seed)
    if found is not None and "held_out" in found:
        return found
    bench = opened(problem, method, seed, store, folder)
    if found is None:
        found = search(bench, seed)
        store.keep(problem.name, method, seed, found)
    if method == LISTS:
        keys = list(found["lists"].values())
    else:
        factor = FINER if method.startswith(ADOPT) else DOUBLED
        found = {**found, "winners": thinned(found["winners"], factor)}
        keys = [key for _, key in found["winners"]]
    found["held_out"] = {key: held_out(bench, Candidate.from_key(key)) for key in dict.fromkeys(keys)}
    store.keep(problem.name, method, seed, found)
    return store.run(problem.name, method, seed) or found


def held_out(bench: Bench, candidate: Candidate) -> list[float]:
    """Values on each held-out bank."""
    return [bench.score(candidate, bank, bench.problem.held_out).value for bank in range(1, BANKS + 1)]


def search(bench: Bench, seed: int) -> dict[str, Any]:
    """One run, without held-out values."""
    if bench.method == LISTS:
        return lists(bench)
    if bench.method == PAPER or bench.method.startswith(ADOPT):
        return packaged(bench, seed)
    return driven(bench, seed)


def database(problem: Live, method: str, seed: int, folder: Path) -> Path:
    """Folder of a study of the package."""
    return folder / f"{problem.name} {method} {seed}".replace(",", "").replace(" ", "-")


def begun(bench: Bench, seed: int) -> lifecycle.Run:
    """The package's study of a method and seed, begun or gone on with."""
    folder = database(bench.problem, bench.method, seed, bench.folder)
    folder.mkdir(parents=True, exist_ok=True)
    return lifecycle.open_run(bench.parts.config, f"sqlite:///{folder}/adopt.db")


def packaged(bench: Bench, seed: int) -> dict[str, Any]:
    """A study run through the package; which candidate is its result at the end is the package's to say."""
    opened_run = begun(bench, seed)
    study = opened_run.study
    loop.work(opened_run.components, study, opened_run.storage)
    curve = list(study_curve(study, start_evaluations(study)))
    searched = read_summary(study)
    seconds = searched.wall_seconds + sum(searched.start_seconds.values())
    started = time.perf_counter()
    validated = choose_winner(opened_run.components, study)
    best = read_summary(study).best
    assert best is not None
    curve.append((curve[-1][0] + validated, best.candidate.key))
    opened_run.storage.engine.dispose()
    return {"winners": changes(curve), "seconds": seconds + time.perf_counter() - started, **settings_of(bench)}


def choose_winner(parts: StudyComponents, study: optuna.Study) -> int:
    """Score the finalists on the validation bank; the evaluations that took."""
    validation.score_finalists(parts, study)
    return int(read_summary(study).validation_total("run"))


def start_evaluations(study: optuna.Study) -> int:
    """What computing the first lists took, teacher included."""
    return int(sum(study.user_attrs.get(START_COSTS, {}).values()))


def study_curve(study: optuna.Study, spent: int) -> Iterator[tuple[int, str]]:
    """Evaluations so far and best candidate so far after each trial that was scored, from the first complete one."""
    best: tuple[float, str] = (math.inf, "")
    for trial in study.get_trials(deepcopy=False):
        spent += int(stored_score(trial).get("run", 0))
        if trial.state == TrialState.COMPLETE and trial.values[0] < best[0]:
            best = trial.values[0], trial.user_attrs[CANDIDATE]
        if trial.state.is_finished() and best[1]:
            yield spent, best[1]


def driven(bench: Bench, seed: int) -> dict[str, Any]:
    """Optuna's own loop with another's sampler. What is on the disk already is asked for again in no time."""
    problem, parts = bench.problem, bench.parts
    sampler = SAMPLERS[bench.method](parts.space, seed)
    study = optuna.create_study(sampler=sampler)
    for timesteps in first_lists(bench.method, parts.model.schedule, parts.space.max_steps):
        study.enqueue_trial(parts.space.encode(Candidate(timesteps)))
    spent, seconds, best, curve = 0, 0.0, (math.inf, ""), []
    for _ in range(problem.ea if bench.method == EA else problem.candidates):
        started = time.perf_counter()
        trial = study.ask()
        candidate, bank = parts.space.suggest(trial), SEARCH_BANK
        seconds += time.perf_counter() - started
        if bench.method == EA:
            candidate, bank = Candidate(timesteps_of(trial.params)), FRESH_BANKS + 1000 * seed + trial.number
        scored = bench.score(candidate, bank, problem.images)
        study.tell(trial, scored.value)
        spent, seconds = spent + scored.evaluations, seconds + scored.seconds
        best = min(best, (scored.value, candidate.key), key=lambda found: found[0])
        curve.append((spent, best[1]))
    return {"winners": changes(curve), "seconds": seconds, **settings_of(bench)}


def lists(bench: Bench) -> dict[str, Any]:
    """Every baseline of the package's study, and what computing it took."""
    study = begun(bench, 0).study
    costs: Mapping[str, int] = study.user_attrs.get(START_COSTS, {})
    teacher = costs.get("teacher", 0)
    keys = dict(study.user_attrs[BASELINE_KEYS])
    spent = {name: int(costs[name] + teacher) if name in costs else 0 for name in keys}
    return {"lists": keys, "evaluations": spent, **settings_of(bench)}


def settings_of(bench: Bench) -> dict[str, Any]:
    """How the values of a run were measured."""
    config = bench.parts.config
    device = bench.parts.model.device.type
    metric = components.metric_name(bench.parts)
    return {"precision": config.model.precision, "device": device, "processor": cpu_model(), "metric": metric}


def forget(problem: Live, method: str, seed: int, folder: Path) -> None:
    """Remove the package's study of a run."""
    shutil.rmtree(database(problem, method, seed, folder), ignore_errors=True)


def final_values(runs: Mapping[int, Mapping[str, Any]]) -> list[float]:
    """Held-out mean of each seed's last winner."""
    return [statistics.fmean(run["held_out"][run["winners"][-1][1]]) for run in runs.values()]
