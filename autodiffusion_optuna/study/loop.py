"""One worker's loop: ask, suggest, score, tell, until the budget is met."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
import torch
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import AdoptError, ConfigError, StatisticsError, StudyError
from autodiffusion_optuna.evaluation.evaluator import OnRung, OnScreen, Score
from autodiffusion_optuna.evaluation.runtime import describe_runtime
from autodiffusion_optuna.results.summary import runtime_warnings
from autodiffusion_optuna.storage.artifacts import ArtifactStore, attach_picture, notable
from autodiffusion_optuna.storage.attrs import (
    BASELINE,
    CANDIDATE,
    COST,
    FAILURE,
    IMAGES,
    RUNTIME,
    SCORE,
    SCREEN,
    SCREEN_TEACHER,
    START_COSTS,
    START_SECONDS,
    rung_key,
    runtime_key,
    screen_key,
)
from autodiffusion_optuna.storage.lease import Heartbeat, Lease, acquire, is_mine, release_all
from autodiffusion_optuna.storage.study_storage import StudyStorage
from autodiffusion_optuna.storage.trials import count_finished
from autodiffusion_optuna.study.components import StudyComponents, relative_cost
from autodiffusion_optuna.study.starts import screen_costs

_log = logging.getLogger("autodiffusion_optuna")

MAX_FAILURES = 10
"""Trials that may fail in a row before the run gives up."""
BEATS = 4
"""Heartbeats in the time after which a silent worker counts as dead."""
FIRST_WAIT, LONGEST_WAIT = 0.05, 1.0
"""Seconds between looks for a place while other workers hold them all."""
PICTURES = 16
"""Images kept of a notable trial."""
DIGITS = 6
"""Significant digits that are kept of an image's distance to the teacher."""


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: its state, its score where it has one, and the reason where it failed."""

    state: TrialState
    score: Score | None = None
    reason: str | None = None


def work(
    components: StudyComponents,
    study: optuna.Study,
    storage: StudyStorage,
    on_trial: Callable[[], None] | None = None,
    store: ArtifactStore | None = None,
) -> None:
    """Evaluate candidates until the budget is met, beside any other workers of the study.

    ``on_trial``: called after each. ``store``: where pictures of notable trials go. Ctrl-C puts the running trial back
    in the queue and is re-raised.
    """
    search = components.config.search
    failures, idle, tell_seconds = 0, FIRST_WAIT, 0.0
    publish, ready = partial(propose, components, study), partial(_ready, components)
    make_screen(components, study, storage)
    components.sampler.read(study)  # a long study is read before others have to wait for it
    with Heartbeat(storage, search.grace / BEATS) as heartbeat, _leaving(study, storage):
        while True:
            started = time.perf_counter()
            try:
                lease = acquire(study, storage, search.trials, publish, grace=search.grace, ready=ready)
                if lease == "done":
                    return
                if lease == "wait":
                    time.sleep(idle)
                    idle = min(2 * idle, LONGEST_WAIT)
                    continue
                idle = FIRST_WAIT
                with heartbeat.of(lease), _failed_if_broken(study, lease):
                    candidate = describe(components, study, lease.trial)
                    storage_seconds = time.perf_counter() - started + tell_seconds
                    outcome = evaluate(components, study, lease, candidate, store)
                note_runtime(components, study)
                telling = time.perf_counter()
                finish(study, lease, outcome, storage_seconds)
                tell_seconds = time.perf_counter() - telling
            except UpdateFinishedTrialError:
                continue  # it was silent too long, and another worker has taken the trial: it counts once
            failures = failures + 1 if outcome.state == TrialState.FAIL else 0
            if failures >= MAX_FAILURES:
                raise StudyError(f"the last {failures} trials failed ({outcome.reason}); fix the cause and run again")
            if on_trial is not None:
                on_trial()


def make_screen(components: StudyComponents, study: optuna.Study, storage: StudyStorage) -> None:
    """Have the screen's teacher run before the first trial, whose seconds are none of its own.

    Every worker does, and adds what it took to what is counted; the first one's evaluations are there already.
    """
    if not components.evaluator.screen_images or "screen" in vars(components.evaluator):
        return  # none, or it has run
    started = time.perf_counter()
    _ = components.evaluator.screen
    took = time.perf_counter() - started
    with storage.locked(study):
        seconds, costs = (dict(study.user_attrs.get(name, {})) for name in (START_SECONDS, START_COSTS))
        if SCREEN_TEACHER in seconds:
            costs[SCREEN_TEACHER] = costs.get(SCREEN_TEACHER, 0) + screen_costs(components)[SCREEN_TEACHER]
            study.set_user_attr(START_COSTS, costs)
        study.set_user_attr(START_SECONDS, {**seconds, SCREEN_TEACHER: seconds.get(SCREEN_TEACHER, 0.0) + took})


def propose(components: StudyComponents, study: optuna.Study, trial: optuna.Trial) -> None:
    """Have the sampler propose, and publish the candidate's key, so that no other worker tries the same.

    What is no candidate is not published: the trial fails when its parameters are asked for. Nor is one that was
    enqueued in part, before it has all its parameters: they tell more than its key.
    """
    if not trial.relative_params:  # asked for here, the sampler proposes while the others wait
        return
    try:
        given = study.get_trials(deepcopy=False)[trial.number].system_attrs.get("fixed_params")
        if given is not None:
            components.space.decode(given)
        candidate = components.sampler.proposal(study, trial.number).candidate
    except (ConfigError, TypeError, ValueError, OverflowError):
        return
    trial.set_user_attr(CANDIDATE, candidate.key)


def describe(components: StudyComponents, study: optuna.Study, trial: optuna.Trial) -> Candidate | str:
    """Suggest a trial's parameters, and note where its candidate came from and what it costs.

    The candidate, or the line that says why the trial's enqueued parameters are none.
    """
    try:
        candidate = components.space.suggest(trial)
        origin = components.sampler.proposal(study, trial.number).origin
    except (ConfigError, TypeError, ValueError, OverflowError) as error:
        return f"the enqueued parameters are no candidate: {error}"
    attrs = {CANDIDATE: candidate.key, COST: relative_cost(components, candidate), **origin}
    said = trial.user_attrs
    starts = zip(components.offered, components.sampler.starts, strict=True)
    names = [name for name, start in starts if start == candidate]
    if names and BASELINE not in said:
        attrs[BASELINE] = names[0]
    for name, value in attrs.items():
        if name not in said or said[name] != value:
            trial.set_user_attr(name, value)
    return candidate


def note_runtime(components: StudyComponents, study: optuna.Study) -> None:
    """Keep what a trial was computed with, where it is not what the study's first one was: bits may differ."""
    now, attrs = describe_runtime(components.evaluator), study.user_attrs
    first, key = attrs.get(RUNTIME), runtime_key(now)
    if now == first or key in attrs:
        return
    memory_ran_out = first and {**first, "batch": now["batch"]} == now and not count_finished(study)
    if not first or memory_ran_out:  # lost, or in the very first trial
        study.set_user_attr(RUNTIME, now)
        return
    study.set_user_attr(key, now)
    for line in runtime_warnings({RUNTIME: first, key: now}):
        _log.warning(line)


@contextmanager
def _leaving(study: optuna.Study, storage: StudyStorage) -> Iterator[None]:
    """A worker that is stopped puts its trial back in the queue, also one that it was about to begin or to end."""
    try:
        yield
    except Exception:
        raise
    except BaseException:
        release_all(study, storage)
        raise


@contextmanager
def _failed_if_broken(study: optuna.Study, lease: Lease) -> Iterator[None]:
    """A trial that breaks its worker is failed with the reason."""
    try:
        yield
    except (OptunaError, SQLAlchemyError):
        raise  # the database's fault: the trial is taken back later
    except Exception as error:
        with suppress(UpdateFinishedTrialError):
            finish(study, lease, Outcome(TrialState.FAIL, reason=f"{type(error).__name__}: {error}"))
        raise


def _ready(components: StudyComponents, trials: Sequence[FrozenTrial]) -> bool:
    """With ``search.barrier``: whether all generations before that of the next trial are finished."""
    if not components.config.search.barrier:
        return True
    alive = [t for t in trials if t.state != TrialState.FAIL]
    size = components.sampler.settings.population_size
    return all(t.state.is_finished() for t in alive[: len(alive) // size * size])


def evaluate(
    components: StudyComponents,
    study: optuna.Study,
    lease: Lease,
    candidate: Candidate | str,
    store: ArtifactStore | None = None,
) -> Outcome:
    """Score one trial; a candidate that cannot be scored is a failed trial, not the end of the run.

    ``candidate``: as ``describe`` gives it.
    """
    if isinstance(candidate, str):
        return Outcome(TrialState.FAIL, reason=candidate)
    try:
        config, evaluator = components.config, components.evaluator
        on_rung, on_screen = (None, None) if config.pruner == "none" else _reporters(study, lease)
        score = evaluator.score(
            candidate,
            [*config.rungs, config.score.images],
            on_rung=on_rung,
            preview=PICTURES if store else 0,
            screen=evaluator.screen,
            on_screen=on_screen,
        )
        if not math.isfinite(score.value):
            raise StatisticsError(f"the distance is {score.value}")
    except (AdoptError, torch.OutOfMemoryError, MemoryError) as error:
        return Outcome(TrialState.FAIL, reason=str(error) or "out of memory")
    if store is not None and score.complete:
        _keep_picture(study, lease, score, store)
    return Outcome(TrialState.COMPLETE if score.complete else TrialState.PRUNED, score)


def _keep_picture(study: optuna.Study, lease: Lease, score: Score, store: ArtifactStore) -> None:
    """Attach a picture of a notable trial's images, as long as it runs here: a finished one takes no artifacts."""
    assert score.preview is not None
    trials = study.get_trials(deepcopy=False)
    now = trials[lease.number]
    why = notable(trials, lease.number, score.value, now.user_attrs)
    if why is not None and is_mine(now):
        attach_picture(lease.trial, store, score.preview.numpy(), why)


def finish(study: optuna.Study, lease: Lease, outcome: Outcome, storage_seconds: float = 0.0) -> None:
    """Tell how a trial ended (UpdateFinishedTrialError where another worker has taken it over).

    ``storage_seconds``: what taking it and ending the one before it took.
    """
    score, attrs = outcome.score, dict[str, Any]()
    if outcome.reason is not None:
        attrs[FAILURE] = " ".join(outcome.reason.split())[:500]
    if score is not None:
        if score.screen:
            attrs[screen_key(len(score.screen))] = statistics.fmean(score.screen)
        passed = score.rungs[:-1] if score.complete else score.rungs
        attrs |= {rung_key(images): value for images, value in passed}
        attrs[IMAGES] = score.images
        said = {**score.to_json(), "seconds_storage": round(storage_seconds, 4)}
        lease.set_system_attr(SCORE, said)
    for name, value in attrs.items():
        lease.trial.set_user_attr(name, value)
    complete = outcome.state == TrialState.COMPLETE
    try:
        study.tell(lease.trial, score.value if score is not None and complete else None, state=outcome.state)
    except ValueError:  # Optuna's word for a trial that waits again, or is finished
        if is_mine(study.get_trials(deepcopy=False)[lease.number]):
            raise
        raise UpdateFinishedTrialError(f"trial {lease.number} is another worker's by now") from None


def _reporters(study: optuna.Study, lease: Lease) -> tuple[OnRung, OnScreen]:
    """Report what the screen and each rung say to Optuna, and ask its pruner whether to go on."""
    # A trial that was cut short and is run again has passed all below the last one it reported.
    reported = study.get_trials(deepcopy=False)[lease.number].intermediate_values
    passed = max(reported, default=0)

    def on_rung(images: int, value: float) -> bool:
        if images not in reported:
            lease.trial.report(value, step=images)
        return images < passed or not lease.trial.should_prune()

    def on_screen(by_image: Sequence[float]) -> bool:
        lease.set_system_attr(SCREEN, [float(f"{value:.{DIGITS}g}") for value in by_image])
        return on_rung(len(by_image), statistics.fmean(by_image))

    return on_rung, on_screen
