"""Who runs which trial: workers lease trials of the study, show that they live, and take over from those that do not.

The database is the only thing that workers share. Trials come from ``study.ask`` and end by ``study.tell``, as Optuna
has it. Beside that road: a trial is asked for under a lock (``StudyStorage.locked``), carries the name of its worker
from its first moment, and is that worker's for as long as it beats. What a dead worker leaves goes back into the queue
under its own number, so that nothing shifts.
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
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.storage.attrs import CANDIDATE, FAILURE, GIVEN_UP, OWNER, RETRIES
from autodiffusion_optuna.storage.study_storage import StudyStorage, id_of_study, id_of_trial
from autodiffusion_optuna.storage.trials import FINISHED

_log = logging.getLogger("autodiffusion_optuna")

MAX_RETRIES = 10
"""Times that a trial is taken back before it counts as failed: it may be what kills its workers."""


@dataclass(frozen=True)
class Lease:
    """A trial that this worker runs. ``id``: the database's, which is not the number."""

    trial: optuna.Trial
    id: int

    @property
    def number(self) -> int:
        """Number of the trial."""
        return self.trial.number

    def set_system_attr(self, key: str, value: Any) -> None:
        """Write a system attr of the trial, for which Optuna's trial has no call."""
        self.trial.storage.set_trial_system_attr(self.id, key, value)


def acquire(
    study: optuna.Study,
    storage: StudyStorage,
    budget: int,
    publish: Callable[[optuna.Trial], None],
    *,
    grace: float,
    ready: Callable[[Sequence[FrozenTrial]], bool] = lambda trials: True,
) -> Lease | Literal["wait", "done"]:
    """Lease the next trial: one left behind or enqueued, else a new one, as long as the budget has places.

    Exactly ``budget`` trials are finished in the end, whatever the number of workers: a trial is begun only while
    finished and running ones together are fewer. "wait": all places are taken but not all are finished, and one may
    become free; "done": the budget is met. ``publish`` has the sampler propose and writes the candidate's key, while
    other workers wait. ``grace``: seconds of silence after which a worker counts as dead. ``ready``: whether a new
    trial may be proposed from the trials as they are.
    """
    storage.worker = owner()
    with storage.locked(study):
        trials = study.get_trials(deepcopy=False)
        if reclaim(study, storage, trials, grace):
            trials = study.get_trials(deepcopy=False)
        unfinished = [t for t in trials if t.state not in FINISHED]
        places = budget - (len(trials) - len(unfinished))
        # A call that was cut off after it was carried out, and made again, leaves a trial of this worker behind.
        mine = [t for t in unfinished if is_mine(t)]
        if places <= 0:
            for trial in mine:
                _give_up(storage, id_of_trial(trial), "the budget is met")
            return "done"
        left = mine[0] if mine else None
        waiting = any(t.state == TrialState.WAITING for t in unfinished)
        if left is None and sum(t.state == TrialState.RUNNING for t in unfinished) >= places:
            return "wait"
        if left is None and not waiting and not ready(trials):
            return "wait"
        asked = study.ask() if left is None else optuna.Trial(study, id_of_trial(left))
        lease = Lease(asked, id_of_trial(asked))
        if left is None and waiting and lease.number >= len(trials):
            # Without the lock another worker took what waited, and Optuna has made a trial that nobody asked for.
            _give_up(storage, lease.id, "another worker took the trial that waited")
            return "wait"
        publish(asked)
    storage.record_heartbeat(lease.id)
    if left is None and not _keeps(study, storage, lease, len(trials), budget):
        return "wait"
    return lease


def _keeps(study: optuna.Study, storage: StudyStorage, lease: Lease, known: int, budget: int) -> bool:
    """Whether the trial stands beside those begun after the first ``known`` were read, by workers without the lock.

    Where its place or its candidate was taken, an enqueued one waits again and a new one is failed.
    """
    if lease.number == known:
        return True
    trials = study.get_trials(deepcopy=False)
    places = budget - sum(t.state in FINISHED for t in trials)
    surplus = sum(t.state == TrialState.RUNNING and t.number < lease.number for t in trials) >= places
    if lease.number < known:
        if surplus:
            release(storage, lease.id)
        return not surplus
    key = trials[lease.number].user_attrs.get(CANDIDATE)
    twins = [t for t in trials[known : lease.number] if is_mine(t) or t.user_attrs.get(CANDIDATE) == key]
    if twins:
        _give_up(storage, lease.id, f"trial {twins[0].number} tries the same")
    elif surplus:
        _give_up(storage, lease.id, "another worker took the last place")
    return not twins and not surplus


def _give_up(storage: StudyStorage, trial_id: int, why: str) -> None:
    storage.end_trial(trial_id, TrialState.FAIL, None, owner(), (FAILURE, f"{GIVEN_UP}: {why}"))


def reclaim(study: optuna.Study, storage: StudyStorage, trials: Sequence[FrozenTrial], grace: float) -> list[int]:
    """Put trials of dead workers back in the queue under their own numbers, so that nothing shifts.

    A worker is dead where it ran on this host and runs no more, or where its trial had no heartbeat for ``grace``
    seconds and this process saw none for half of them: a database that was away, or the clock that was set, silences
    no one. ``trials``: all of the study, just read. Returns the numbers taken back. A trial that was taken back
    ``MAX_RETRIES`` times is failed, with the reason in its user attrs, since it may be what kills its worker.
    """
    running = [t for t in trials if t.state == TrialState.RUNNING and not is_mine(t)]
    beats = storage.beats(id_of_study(study)) if running else {}
    taken = []
    for trial in running:
        name, beat = trial.user_attrs.get(OWNER), beats.get(id_of_trial(trial))
        if name is not None and is_dead(name):
            reason = "died"
        elif name is not None and beat is not None and ran_here_before(name) and beat.silence > grace / 2:
            reason = "died"  # with the boot that it ran in, or it would have beaten twice since
        elif beat is not None and beat.silence > grace and beat.watched > grace / 2:
            reason = f"was silent for {grace:g} s"
        else:
            if beat is None:  # died before its first beat, or about to beat: its time starts now
                storage.record_heartbeat(id_of_trial(trial))
            continue
        if take_back(storage, trial, reason):
            taken.append(trial.number)
    return taken


def take_back(storage: StudyStorage, trial: FrozenTrial, reason: str) -> bool:
    """Whether the trial waits again; not where it was finished or taken back by another at this very moment.

    ``trial``: as it was when its worker seemed dead.
    """
    trial_id, holder = id_of_trial(trial), trial.user_attrs.get(OWNER)
    retries = int(trial.user_attrs.get(RETRIES, 0)) + 1
    if retries > MAX_RETRIES:
        why = f"its worker {reason}, {retries} times in all"
        storage.end_trial(trial_id, TrialState.FAIL, None, holder, (FAILURE, why))
        return False
    return storage.end_trial(trial_id, TrialState.WAITING, None, holder, (RETRIES, retries))


def release(storage: StudyStorage, trial_id: int) -> None:
    """RUNNING -> WAITING for a trial of this worker, keeping its number and the parameters it has."""
    storage.end_trial(trial_id, TrialState.WAITING, None, owner())


def release_all(study: optuna.Study, storage: StudyStorage) -> None:
    """``release`` for whatever this worker runs, also a trial that it was about to begin or to end."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if is_mine(trial):
            release(storage, id_of_trial(trial))


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
    """Whether the worker of that name ran on this machine before it was started again, or on a copy of this machine."""
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
    beats = storage.beats(id_of_study(study))
    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        beat = beats.get(id_of_trial(trial))
        silence = None if beat is None else beat.silence
        name = trial.user_attrs.get(OWNER, "unknown")
        alive = (silence is None or silence <= grace) and not is_dead(name)
        found.append(Worker(str(name), trial.number, silence, alive))
    return found


class Heartbeat:
    """Beats for the trial that its worker runs, from a thread of its own: a long evaluation is no silence.

    ``interval``: seconds between beats, well below the grace that other workers give.
    """

    def __init__(self, storage: StudyStorage, interval: float) -> None:
        self._storage, self._interval = storage, interval
        self._trial: int | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        self._thread.join(timeout=self._interval)

    @contextmanager
    def of(self, lease: Lease) -> Iterator[None]:
        """Beat for this trial meanwhile; its first beat came with the lease."""
        self._trial = lease.id
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
