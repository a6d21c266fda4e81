"""The composition root: the only file that sees both the search and the evaluation."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import optuna
import torch
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import StudyConfig
from autodiffusion_optuna.errors import AdoptError, ConfigError, StatisticsError, StudyError
from autodiffusion_optuna.evaluation.evaluator import Score
from autodiffusion_optuna.evaluation.runtime import describe_runtime
from autodiffusion_optuna.results.held_out import runtime_warnings
from autodiffusion_optuna.storage.artifacts import (
    attach_picture,
    notable,
)
from autodiffusion_optuna.storage.attrs import CANDIDATE, COST, IMAGES, RUNTIME, SCORE, STAGE, rung_key, runtime_key
from autodiffusion_optuna.storage.database import StudyStorage
from autodiffusion_optuna.storage.lease import FAILURE, OWNER, Claim, Heart, claim, is_mine, owner, put_back
from autodiffusion_optuna.storage.trials import FINISHED, count_finished
from autodiffusion_optuna.study.components import StudyComponents, relative_cost

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore


_log = logging.getLogger("autodiffusion_optuna")


MAX_FAILURES = 10
"""Trials that may fail in a row before the run gives up."""


BEATS = 4
"""Heartbeats in the time after which a silent worker counts as dead."""


FIRST_WAIT, LONGEST_WAIT = 0.05, 1.0
"""Seconds between looks for a place while other workers hold them all."""


PICTURES = 16
"""Images kept of a notable trial."""


@dataclass(frozen=True)
class Progress:
    """What the screen is told after every trial."""

    trial: FrozenTrial
    finished: int
    seconds: float


OnTrial = Callable[[Progress], None]


def work(
    parts: StudyComponents,
    study: optuna.Study,
    storage: StudyStorage,
    on_trial: OnTrial | None = None,
    store: ArtifactStore | None = None,
) -> None:
    """Evaluate candidates until the budget is met, beside any other workers of the study.

    ``store``: where pictures of notable trials go. Ctrl-C puts the running trial back in the queue and is re-raised.
    """
    search = parts.config.search
    failures, idle, tell_seconds = 0, FIRST_WAIT, 0.0
    take = partial(claim, study, storage, search.trials, partial(_template, parts, study), grace=search.grace)
    take = partial(take, complete=partial(_completed, parts, study))
    parts.sampler.read(study)  # a long study is read before others have to wait for it
    with Heart(storage, search.grace / BEATS) as heart, _leaving(study, storage):
        while True:
            started = time.perf_counter()
            claimed = take(ready=partial(_ready, parts))
            if claimed == "done":
                return
            if claimed == "wait":
                time.sleep(idle)
                idle = min(2 * idle, LONGEST_WAIT)
                continue
            idle = FIRST_WAIT
            storage_seconds = time.perf_counter() - started + tell_seconds
            try:
                with heart.beating_for(claimed.id), _failed_if_broken(storage, claimed.id):
                    outcome = _evaluate(parts, claimed, store)
            except UpdateFinishedTrialError:
                continue  # it was silent too long, and another worker has finished the trial: it counts once
            note_runtime(parts, study)
            telling = time.perf_counter()
            counts = _finish(storage, claimed, outcome, storage_seconds)
            tell_seconds = time.perf_counter() - telling
            if not counts:
                continue
            failures = failures + 1 if outcome.state == TrialState.FAIL else 0
            if failures >= MAX_FAILURES:
                raise StudyError(f"the last {failures} trials failed ({outcome.reason}); mend the cause and run again")
            if on_trial is not None:
                trials = study.get_trials(deepcopy=False)
                finished = sum(trial.state in FINISHED for trial in trials)
                on_trial(Progress(trials[claimed.number], finished, time.perf_counter() - started))


def note_runtime(parts: StudyComponents, study: optuna.Study) -> None:
    """Keep what a trial was computed with, where it is not what the study's first one was: bits may differ."""
    now, attrs = describe_runtime(parts.evaluator), study.user_attrs
    first, key = attrs.get(RUNTIME), runtime_key(now)
    if now == first or key in attrs:
        return
    memory_ran_out = first and {**first, "batch": now["batch"]} == now and not count_finished(study)
    if not first or memory_ran_out:  # of a study begun before this was kept, or in the very first trial
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
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if is_mine(trial):
                put_back(storage, trial._trial_id)
        raise


@contextmanager
def _failed_if_broken(storage: StudyStorage, trial_id: int) -> Iterator[None]:
    """A trial that breaks its worker is failed with the reason."""
    try:
        yield
    except (OptunaError, SQLAlchemyError):
        raise  # the database's fault: the trial is taken back later
    except Exception as error:
        reason = {FAILURE: _one_line(f"{type(error).__name__}: {error}")}
        storage.finish_trial(trial_id, TrialState.FAIL, None, reason, (OWNER, owner()))
        raise


def _template(parts: StudyComponents, study: optuna.Study, trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """The trial after ``trials`` as it begins: what it tries, where that came from, and who runs it."""
    number = len(trials)
    proposal = parts.sampler.proposal(study, number)
    return _begun(parts, proposal.candidate, parts.sampler.describe(study, number))


def _completed(
    parts: StudyComponents, study: optuna.Study, waiting: FrozenTrial, trials: Sequence[FrozenTrial]
) -> FrozenTrial | None:
    """What a waiting trial gets as it is taken: all that a new one says of itself. None where it has said it before."""
    attrs = waiting.user_attrs
    if "fixed_params" not in waiting.system_attrs and {CANDIDATE, COST, STAGE} <= attrs.keys():
        return None
    try:
        candidate = parts.sampler.proposal(study, waiting.number).candidate
    except ConfigError as error:
        return optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={FAILURE: _one_line(str(error))})
    return _begun(parts, candidate, parts.sampler.describe(study, waiting.number))


def _begun(parts: StudyComponents, candidate: Candidate, origin: dict[str, Any]) -> FrozenTrial:
    """A trial of this worker as it begins, all of it."""
    params, distributions = parts.space.encode(candidate), parts.space.distributions()
    return optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params=params,
        distributions={name: distributions[name] for name in params},
        user_attrs={
            OWNER: owner(),
            CANDIDATE: candidate.key,
            COST: relative_cost(parts, candidate),
            **origin,
        },
    )


def _ready(parts: StudyComponents, trials: Sequence[FrozenTrial]) -> bool:
    """With ``search.barrier``: whether all generations before that of the next trial are finished."""
    if not parts.config.search.barrier:
        return True
    alive = [t for t in trials if t.state != TrialState.FAIL]
    size = parts.sampler.settings.population_size
    return all(t.state.is_finished() for t in alive[: len(alive) // size * size])


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: its state, its score where it has one, and the reason where it failed."""

    state: TrialState
    score: Score | None = None
    reason: str | None = None


def _evaluate(parts: StudyComponents, claimed: Claim, store: ArtifactStore | None) -> Outcome:
    """Score one trial; a candidate that cannot be scored is a failed trial, not the end of the run."""
    try:
        candidate = _candidate(claimed)
        on_rung = None if parts.config.score.pruner == "none" else _reporter(claimed)  # nobody asks for its one rung
        score = parts.evaluator.score(candidate, rungs(parts.config), on_rung=on_rung, preview=PICTURES if store else 0)
        if not math.isfinite(score.value):
            raise StatisticsError(f"the distance is {score.value}")
    except (AdoptError, torch.OutOfMemoryError, MemoryError) as error:
        return Outcome(TrialState.FAIL, reason=_one_line(str(error) or "out of memory"))
    if store is not None and score.complete:
        _keep_picture(claimed, score, store)
    return Outcome(TrialState.COMPLETE if score.complete else TrialState.PRUNED, score)


def _candidate(claimed: Claim) -> Candidate:
    """What a trial tries (ConfigError where what it was enqueued with is no candidate)."""
    attrs = claimed.begun.user_attrs
    if FAILURE in attrs:
        raise ConfigError(attrs[FAILURE])
    return Candidate.from_key(attrs[CANDIDATE])


def _keep_picture(claimed: Claim, score: Score, store: ArtifactStore) -> None:
    """Attach a picture of a notable trial's images, as long as it runs here: a finished one takes no artifacts."""
    assert score.preview is not None
    trials = claimed.study.get_trials(deepcopy=False)
    now = trials[claimed.number]
    why = notable(trials, claimed.number, score.value, now.user_attrs)
    if why is not None and is_mine(now):
        attach_picture(claimed.trial, store, score.preview.numpy(), why)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:500]


def _finish(storage: StudyStorage, claimed: Claim, outcome: Outcome, storage_seconds: float) -> bool:
    """Write down how a trial ended; False where another worker has taken it over meanwhile, and it counts once.

    ``storage_seconds``: what taking it and ending the one before it took.
    """
    score = outcome.score
    attrs: dict[str, Any] = {} if outcome.reason is None else {FAILURE: outcome.reason}
    if score is not None:
        attrs |= {rung_key(images): value for images, value in score.rungs[:-1]}
        attrs[IMAGES] = score.images
        attrs[SCORE] = {**score.to_json(), "seconds_storage": round(storage_seconds, 4)}
    values = None if score is None else [score.value]
    return storage.finish_trial(claimed.id, outcome.state, values, attrs, (OWNER, owner()))


def rungs(config: StudyConfig) -> list[int]:
    """Image counts at which a candidate is scored, the last one being its value's."""
    if config.score.pruner == "none":
        return [config.score.images]
    return [*config.score.rungs, config.score.images]


def _reporter(claimed: Claim) -> Callable[[int, float], bool]:
    """Reports each rung's value to Optuna and asks its pruner whether to go on."""
    # A trial that was cut short and is run again has passed every rung below the last one it reported.
    reported = claimed.begun.intermediate_values
    passed = max(reported, default=0)

    def on_rung(images: int, value: float) -> bool:
        if images not in reported:
            claimed.trial.report(value, step=images)
        return images < passed or not claimed.trial.should_prune()

    return on_rung
