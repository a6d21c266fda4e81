"""Who runs which trial: workers take trials from the study, show that they live, and take over from those that do not.

The database is the only thing that workers share. A trial is taken under a lock (``StudyStorage.claiming``), written
with all of its parameters in one transaction, and belongs to the worker whose name it carries for as long as that
worker's heart beats. What a dead worker leaves goes back into the queue under its own number, so that nothing shifts.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.storage.attrs import CANDIDATE
from autodiffusion_optuna.storage.database import StudyStorage
from autodiffusion_optuna.storage.trials import FINISHED

_log = logging.getLogger("autodiffusion_optuna")

OWNER = "worker"
"""Trial user attr: who runs the trial, as ``owner()`` writes it."""
RETRIES = "retries"
"""Trial user attr: how often the trial was taken back from a worker that died or fell silent."""
FAILURE = "failure"
"""Trial user attr: why the trial failed, one line."""
MAX_RETRIES = 10

Template = Callable[[Sequence[FrozenTrial]], FrozenTrial]
"""All trials of the study -> the next one, with everything that is known when it begins."""
Completion = Callable[[FrozenTrial, Sequence[FrozenTrial]], FrozenTrial | None]
"""(A waiting trial, all trials of the study) -> parameters and user attributes that it gets as it is taken, if any."""


@dataclass(frozen=True)
class Claim:
    """A trial that this worker runs. ``id``: the database's, which is not the number. ``begun``: as it was taken."""

    study: optuna.Study
    id: int
    begun: FrozenTrial

    @property
    def number(self) -> int:
        """Number of the trial."""
        return self.begun.number

    @cached_property
    def trial(self) -> optuna.Trial:
        """For Optuna's calls; made when it is asked for, since that reads the whole trial once more."""
        return optuna.Trial(self.study, self.id)


def claim(
    study: optuna.Study,
    storage: StudyStorage,
    budget: int,
    template: Template,
    *,
    grace: float,
    ready: Callable[[Sequence[FrozenTrial]], bool] = lambda trials: True,
    complete: Completion = lambda trial, trials: None,
) -> Claim | Literal["wait", "done"]:
    """Take the next trial: one left behind or enqueued, else a new one, as long as the budget has places.

    Exactly ``budget`` trials are finished in the end, whatever the number of workers: a trial is begun only while
    finished and running ones together are fewer. "wait": all places are taken but not all are finished, and one may
    become free; "done": the budget is met. ``grace``: seconds of silence after which a worker counts as dead.
    ``ready``: whether a new trial may be proposed from the trials as they are. ``complete``: what a waiting trial says
    of itself; it is written as it is taken, so that no reader finds a part of it.
    """
    study_id = study._study_id
    with storage.claiming(study_id):
        trials = study.get_trials(deepcopy=False)
        others = [t for t in trials if t.state not in FINISHED]
        if _take_back_all(storage, study_id, others, grace):
            trials = study.get_trials(deepcopy=False)
            others = [t for t in trials if t.state not in FINISHED]
        places = budget - (len(trials) - len(others))
        running = sum(t.state == TrialState.RUNNING for t in others)
        if places <= 0:
            return "done"
        if running >= places:
            return "wait"
        waiting = next((t for t in others if t.state == TrialState.WAITING), None)
        if waiting is not None:
            return _take_up(study, storage, waiting, budget, complete(waiting, trials))
        if not ready(trials):
            return "wait"
        return _create(study, storage, study_id, trials, template, budget)


def _take_up(
    study: optuna.Study, storage: StudyStorage, trial: FrozenTrial, budget: int, whole: FrozenTrial | None = None
) -> Claim | Literal["wait"]:
    """Take a waiting trial, unless another worker was faster or, without the lock, has taken the last place."""
    trial_id = trial._trial_id
    attrs = {**(whole.user_attrs if whole else {}), OWNER: owner()}
    if not storage.take_trial(trial_id, attrs, whole) and not is_mine(storage.get_trial(trial_id)):
        return "wait"
    if _is_surplus(study, trial.number, budget):
        put_back(storage, trial_id)
        return "wait"
    return Claim(study, trial_id, storage.get_trial(trial_id))


def _create(
    study: optuna.Study,
    storage: StudyStorage,
    study_id: int,
    known: Sequence[FrozenTrial],
    template: Template,
    budget: int,
) -> Claim | Literal["wait"]:
    """Begin a new trial. Where that was done without the lock, it is failed if its place or candidate was taken."""
    planned = template(known)
    begun = storage.begin_trial(study_id, planned)  # with its first heartbeat
    trial_id = begun._trial_id
    claimed = Claim(study, trial_id, begun)
    if claimed.number == len(known):
        return claimed
    between = [t for t in study.get_trials(deepcopy=False) if len(known) <= t.number < claimed.number]
    twin = next((t for t in between if t.user_attrs.get(CANDIDATE) == planned.user_attrs.get(CANDIDATE)), None)
    if twin is None and not _is_surplus(study, claimed.number, budget):
        return claimed
    reason = "another worker took the last place" if twin is None else f"trial {twin.number} tries the same"
    storage.finish_trial(trial_id, TrialState.FAIL, None, {FAILURE: f"given up at once: {reason}"}, (OWNER, owner()))
    # Where the call was cut off after it was carried out, and made again, the first of the two is this worker's too.
    return Claim(study, twin._trial_id, twin) if twin is not None and is_mine(twin) else "wait"


def _is_surplus(study: optuna.Study, number: int, budget: int) -> bool:
    """Whether trials before this one take all places that are left; each worker judges alike."""
    trials = study.get_trials(deepcopy=False)
    places = budget - sum(t.state in FINISHED for t in trials)
    return sum(t.state == TrialState.RUNNING and t.number < number for t in trials) >= places


def reclaim(storage: StudyStorage, study_name: str, grace: float) -> list[int]:
    """Put trials of dead workers back in the queue under their own numbers, so that nothing shifts.

    A worker is dead where it ran on this host and runs no more, or where its trial had no heartbeat for ``grace``
    seconds and this process saw none for half of them: a database that was away, or the clock that was set, silences
    no one. Returns the numbers taken back. A trial that was taken back ``MAX_RETRIES`` times is failed, with the
    reason in its user attrs, since it may be what kills its worker.
    """
    study_id = storage.get_study_id_from_name(study_name)
    running = storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
    return _take_back_all(storage, study_id, running, grace)


def _take_back_all(storage: StudyStorage, study_id: int, trials: Sequence[FrozenTrial], grace: float) -> list[int]:
    """``reclaim`` for trials just read."""
    running = [t for t in trials if t.state == TrialState.RUNNING]
    beats = storage.beats(study_id) if running else {}
    taken = []
    for trial in running:
        trial_id = trial._trial_id
        name = trial.user_attrs.get(OWNER)
        beat = beats.get(trial_id)
        if name is not None and is_dead(name):
            reason = "died"
        elif name is not None and beat is not None and ran_here_before(name) and beat.silence > grace / 2:
            reason = "died"  # with the boot that it ran in, or it would have beaten twice since
        elif beat is not None and beat.silence > grace and beat.watched > grace / 2:
            reason = f"was silent for {grace:g} s"
        else:
            if beat is None:
                storage.record_heartbeat(trial_id)  # died before its first beat, or about to beat: its time starts now
            continue
        if _take_back(storage, trial_id, trial, reason):
            taken.append(trial.number)
    return taken


def _take_back(storage: StudyStorage, trial_id: int, trial: FrozenTrial, reason: str) -> bool:
    """Whether the trial waits again; not where it was finished or taken back by another at this very moment."""
    retries = int(trial.user_attrs.get(RETRIES, 0)) + 1
    holder = OWNER, trial.user_attrs.get(OWNER)
    if retries > MAX_RETRIES:
        attrs = {RETRIES: retries, FAILURE: f"its worker {reason}, {retries} times in all"}
        storage.finish_trial(trial_id, TrialState.FAIL, None, attrs, holder)
        return False
    return storage.finish_trial(trial_id, TrialState.WAITING, None, {RETRIES: retries}, holder)


def put_back(storage: StudyStorage, trial_id: int) -> None:
    """RUNNING -> WAITING for a trial of this worker, keeping its number and the parameters it has."""
    storage.finish_trial(trial_id, TrialState.WAITING, None, {}, (OWNER, owner()))


def is_mine(trial: FrozenTrial) -> bool:
    """Whether this worker still runs the trial; not after a silence in which another one took it."""
    return trial.state == TrialState.RUNNING and trial.user_attrs.get(OWNER) == owner()


def owner() -> str:
    """This process's name on its trials: host, process id and the process's start time."""
    return f"{host()}/{os.getpid()}/{_started(os.getpid())}"


@functools.cache
def host() -> str:
    """Name of this host, told apart from others of the same name and from containers on it."""
    try:
        machine = hashlib.sha256(Path("/etc/machine-id").read_bytes()).hexdigest()[:6]
    except OSError:
        machine = ""
    try:
        namespace = os.readlink("/proc/self/ns/pid").strip("pid:[]")
    except OSError:
        namespace = ""
    try:  # machines made from one image share even their id; a boot is one machine's
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        boot = "boot"
    return "-".join(part for part in (os.uname().nodename, machine, namespace, boot) if part)


UNSEEN = "0"
"""Start time of a process of which only this is known: that it runs."""


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot ('' where it does not run): pids are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _running_without_proc(pid)
    return "" if fields[0] == "Z" else fields[19]  # a zombie has ended


def _running_without_proc(pid: int) -> str:
    """For systems without /proc, and where it hides the processes of other users."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return UNSEEN


def is_dead(name: str) -> bool:
    """Whether the worker of that name ran on this host and runs no more; not known of a name that others gave."""
    where, pid, started = _parts(name)
    return where == host() and pid.isdecimal() and _started(int(pid)) not in (started, UNSEEN)


def _parts(name: object) -> tuple[str, str, str]:
    """Host, process id and start time of a worker's name; all empty for a name that is no worker's of ours."""
    parts = str(name).rsplit("/", 2)
    return (parts[0], parts[1], parts[2]) if len(parts) == 3 else ("", "", "")


def ran_here_before(name: str) -> bool:
    """Whether the worker of that name ran on this machine before it was started anew, or on a copy of this machine."""
    where, here = _parts(name)[0], host()
    return where != here and where.rpartition("-")[0] == here.rpartition("-")[0]


@dataclass(frozen=True)
class Worker:
    """A worker that runs a trial. ``silence``: seconds since its last heartbeat, None before the first."""

    name: str
    trial: int
    silence: float | None
    alive: bool


def workers(study: optuna.Study, storage: StudyStorage, grace: float) -> list[Worker]:
    """Who runs the study's running trials, and whether they live."""
    study_id = storage.get_study_id_from_name(study.study_name)
    beats = storage.beats(study_id)
    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        beat = beats.get(trial._trial_id)
        silence = None if beat is None else beat.silence
        name = trial.user_attrs.get(OWNER, "unknown")
        alive = (silence is None or silence <= grace) and not is_dead(name)
        found.append(Worker(str(name), trial.number, silence, alive))
    return found


class Heart:
    """Beats for the trial that its worker runs, from a thread of its own: a long evaluation is no silence.

    ``interval``: seconds between beats, well below the grace that other workers give.
    """

    def __init__(self, storage: StudyStorage, interval: float) -> None:
        self._storage, self._interval = storage, interval
        self._trial: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def __enter__(self) -> Heart:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join(timeout=self._interval)

    @contextmanager
    def beating_for(self, trial_id: int) -> Iterator[None]:
        """Beat for this trial meanwhile; its first beat is its claim's."""
        self._trial = trial_id
        try:
            yield
        finally:
            self._trial = None

    def _run(self) -> None:
        while not self._ended.wait(self._interval):
            trial = self._trial
            if trial is not None:
                try:
                    self._storage.record_heartbeat(trial)
                except Exception as error:  # whatever it was, the worker lives, and the next beat may say so
                    _log.debug("a heartbeat failed: %s", error)
        self._storage.remove_session()
