"""Starts the workers of a study: processes on this host, or the same workers through Ray or Slurm.

An engine starts a worker, says how it ended, and stops all that still run as it is left. ``supervise`` does the rest,
alike for all engines, and the study's database does what workers have to agree on.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from autodiffusion_optuna.errors import WARNING, ConfigError, StorageError, StudyError, choose_from, first_line
from autodiffusion_optuna.storage.attrs import ARTIFACTS
from autodiffusion_optuna.storage.studies import find_study
from autodiffusion_optuna.storage.trials import count_finished
from autodiffusion_optuna.storage.url import ENVIRONMENT, is_of_this_host, storage_url
from autodiffusion_optuna.workers.worker import NOTE, USER_ERROR, Job, run_for_engine, share_of_cores

_log = logging.getLogger("autodiffusion_optuna")

MAX_RESTARTS = 5
"""Times that one worker is started again after it died, while no trial of the study is finished in between."""
PAUSE = 2.0
"""Seconds before the second of them, as what killed a worker may need a moment to pass; doubled for each one after it.

The first comes at once.
"""
CONNECT_SECONDS = 10.0
"""Time for a Ray cluster to answer."""
SLURM_MINUTES = 24 * 60
"""Time limit of a Slurm job, where none is given: submitit's own is five minutes."""
LOOK_SECONDS = 0.25
STOP_SECONDS = 20.0
"""Time for a worker to release its trial before it is killed."""

SERVER = "postgresql://USER@HOST/DB"
"""What a database that all hosts reach is given as."""

OnLook = Callable[[], None]
Options = Mapping[str, str]
Look = Callable[[], bool]
"""Whether a worker has done its part. Raises Died, or StudyError with the line that the worker gave up with."""
Start = Callable[[Job], Look]


class Died(Exception):
    """A worker ended as another one may not: how, and the last thing that it said."""


def launch(engine: str, job: Job, workers: int, options: Options, on_look: OnLook) -> None:
    """Run a study to its budget with ``workers`` workers; ``on_look`` is called a few times a second.

    Raises ConfigError for an unknown engine, one that is not installed or an option it does not take, and StudyError
    with the line that a worker gave up with. Ctrl-C stops all workers and is re-raised.
    """
    check_engine(engine)
    with ENGINES[engine](job, workers, options) as start:
        supervise(start, job, workers, on_look)


def check_engine(engine: str) -> None:
    """ConfigError where there is no engine of that name."""
    if engine not in ENGINES:
        raise ConfigError(choose_from("engine", engine, ENGINES))


class Restarts:
    """How often one worker has died since the study last went on. ``finished`` counts the study's finished trials."""

    def __init__(self, finished: Callable[[], int]) -> None:
        self.count, self._finished, self._before = 0, finished, finished()

    def died(self) -> float | None:
        """Note one more death; seconds until the next start, None where the worker is not worth one."""
        finished = self._finished()
        self.count = 1 if finished > self._before else self.count + 1
        self._before = max(finished, self._before)
        if self.count > MAX_RESTARTS:
            return None
        return 0.0 if self.count == 1 else PAUSE * 2.0 ** (self.count - 2)


def supervise(start: Start, job: Job, workers: int, on_look: OnLook) -> None:
    """Keep workers running until all have done their part: the first alone until it has begun the study, then all.

    One that dies is started again, up to ``MAX_RESTARTS`` times. Raises StudyError as ``launch`` does.
    """
    restarts = [Restarts(lambda: finished_trials(job)) for _ in range(workers)]
    due = {0: 0.0}  # worker -> ``time.monotonic`` of its next start
    running: dict[int, Look] = {}
    begun = False
    while due or running:
        for index in [index for index, when in due.items() if when <= time.monotonic()]:
            del due[index]
            running[index] = start(job.model_copy(update={"index": index}))
        if not begun and has_begun(job):
            begun, job = True, job.model_copy(update={"known": True})
            due |= dict.fromkeys(range(1, workers), 0.0)
        for index, is_done in list(running.items()):
            try:
                if is_done():
                    del running[index]
            except Died as died:
                del running[index]
                pause = restarts[index].died()
                if pause is None:
                    how, last_words = died.args
                    raise StudyError(f"worker {index} {how} {restarts[index].count} times: {last_words}") from died
                due[index] = time.monotonic() + pause
        on_look()
        time.sleep(LOOK_SECONDS)


def has_begun(job: Job) -> bool:
    """Whether the first worker has written down what the study is, so that the others find it."""
    return find_study(storage_url(job.url), job.config.name, known=True) is not None


def finished_trials(job: Job) -> int:
    """Candidates that the study has finished; 0 where it cannot be read at this moment."""
    try:
        study = find_study(storage_url(job.url), job.config.name, known=True)
    except StorageError:
        return 0
    return 0 if study is None else count_finished(study)


PASSED_ON: dict[str, Callable[[str], None]] = {WARNING: _log.warning, NOTE: _log.info}
"""Beginning of a worker's line -> what says the rest of it here."""


class Process:
    """A worker as a child process. ``warned``: lines of any of them that were passed on, which each is once."""

    def __init__(self, job: Job, warned: set[str]) -> None:
        self.warned, self.unread = warned, ""
        with tempfile.NamedTemporaryFile() as stderr:  # a pipe would have to be read all the time
            self.said = Path(stderr.name).open(errors="replace")  # noqa: SIM115 (closed by ``join``)
            # In a session of its own Ctrl-C reaches the launcher alone, which then stops its workers one way.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "autodiffusion_optuna.workers.worker"],
                stdin=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                env={**thread_limits(job.workers), **os.environ},
            )
        assert self.process.stdin is not None
        self.input = self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.input.write(job.model_dump_json().encode() + b"\n")
            self.input.flush()

    def is_done(self) -> bool:
        """Whether it ended well; see ``Look``."""
        code = self.process.poll()
        self._pass_warnings_on()
        if not code:
            return code == 0
        self.said.seek(0)
        last_words = self.said.read().strip().rpartition("\n")[2] or "it said nothing"
        if code == USER_ERROR:
            raise StudyError(last_words.removeprefix("error: "))
        raise Died(f"was killed by signal {-code}" if code < 0 else f"ended with code {code}", last_words)

    def _pass_warnings_on(self) -> None:
        *lines, self.unread = (self.unread + self.said.read()).split("\n")
        for line in lines:
            mark = next((mark for mark in PASSED_ON if line.startswith(mark)), None)
            if mark is not None and line not in self.warned:
                self.warned.add(line)
                PASSED_ON[mark](line.removeprefix(mark))

    def stop(self) -> None:
        """Close its input, at which it releases its trial and ends."""
        with contextlib.suppress(BrokenPipeError):
            self.input.close()

    def join(self, deadline: float) -> None:
        """Wait for its end until ``deadline`` (``time.monotonic``), then kill it: its trial is taken back later."""
        try:
            self.process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()


def thread_limits(workers: int) -> dict[str, str]:
    """Environment that gives each of ``workers`` its share of this host's cores."""
    # Libraries of linear algebra start a thread for each core, and then wait for each other. PyTorch's number can be
    # set later, that of NumPy's and SciPy's library only here.
    return dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(share_of_cores(workers)))


@contextmanager
def local_processes(job: Job, workers: int, options: Options) -> Iterator[Start]:
    """Workers as processes of this host; each takes the next of its GPUs, or a share of its cores."""
    _refuse(options, "local", ())
    processes: list[Process] = []
    warned: set[str] = set()

    def start(job: Job) -> Look:
        processes.append(Process(job.model_copy(update={"known": True}), warned))
        return processes[-1].is_done

    try:
        yield start
    finally:
        for process in processes:
            process.stop()
        deadline = time.monotonic() + STOP_SECONDS
        for process in processes:
            process.join(deadline)


@contextmanager
def ray_tasks(job: Job, workers: int, options: Options) -> Iterator[Start]:
    """Workers as Ray tasks, one GPU each where the cluster has any, wherever is room.

    Options: ``address`` (of a running cluster; default this host), ``gpus`` and ``cpus`` of each worker.
    """
    ray: Any = _extra("ray", "ray")
    _refuse(options, "ray", ("address", "gpus", "cpus"))
    gpus, cpus, address = _number(options, "gpus"), _number(options, "cpus"), options.get("address")
    here = is_of_this_host(storage_url(job.url))
    advice = "check --engine-option address"
    if here and address != "local" and (address or os.environ.get("RAY_ADDRESS")):
        with _cluster_at(address, f"{advice}, and give --storage {SERVER}"):
            raise StorageError(_needs_server(job, "ray"))
    changes = {} if here else full_artifacts(job)
    address = "local" if here else address  # without one Ray joins whatever cluster this host was last part of
    with _cluster_at(address, advice):
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        hosts = max(sum(node["Alive"] for node in ray.nodes()), 1)
        changes["workers"] = math.ceil(workers / hosts)
        # A worker that asked for a whole core would never start where there are fewer cores than workers.
        task = ray.remote(num_gpus=gpus, num_cpus=cpus or 0.0, max_retries=0)(run_for_engine)

        def start(job: Job) -> Look:
            return partial(_is_done, task.remote(job.model_copy(update=changes).model_dump_json()).future())

        yield start
    finally:
        ray.shutdown()


@contextmanager
def _cluster_at(address: str | None, advice: str) -> Iterator[None]:
    """ConfigError where nobody listens at a cluster's address: Ray would try for minutes, and then end this process."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if colon:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        yield
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = "on this host" if address in (None, "local") else f"at {address!r}"
        raise ConfigError(f"no Ray cluster {where}: {first_line(error)}; {advice}") from None


@contextmanager
def slurm_jobs(job: Job, workers: int, options: Options) -> Iterator[Start]:
    """Workers as Slurm jobs through submitit.

    Options are those of ``sbatch`` by submitit's names (``partition``, ``gpus_per_node``, ``time`` in minutes,
    ``account`` …), ``folder`` for the logs, and ``cluster=local`` to run the jobs on this host without Slurm.
    """
    submitit: Any = _extra("submitit", "slurm")
    given = dict(options)
    folder, cluster = given.pop("folder", "adopt-slurm"), given.pop("cluster", None)
    if cluster not in (None, "local", "slurm"):
        raise ConfigError(f"--engine-option cluster={cluster}: it is slurm, or local for jobs on this host")
    local = cluster == "local"
    if not local:
        _check_login_node(submitit, job)
    changes: dict[str, Any] = {"workers": workers} if local else {"workers": 1, **full_artifacts(job)}
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**slurm_parameters(given, local=local))
    except (TypeError, ValueError, NameError, OSError) as error:
        raise ConfigError(f"--engine-option: {first_line(error)}") from None
    # submitit writes jobs to files, where a password has no place: Slurm hands on the environment.
    os.environ[ENVIRONMENT] = storage_url(job.url)
    changes["url"] = None
    submitted: list[Any] = []

    def start(job: Job) -> Look:
        submitted.append(executor.submit(run_for_engine, job.model_copy(update=changes).model_dump_json()))
        return partial(_is_done, submitted[-1], f"see {folder!r}, job {submitted[-1].job_id}")

    try:
        yield start
    finally:
        for one in submitted:
            one.cancel()


def _check_login_node(submitit: Any, job: Job) -> None:
    here = is_of_this_host(storage_url(job.url))
    if not submitit.SlurmExecutor.affinity() > 0:
        there = f" with --storage {SERVER}" if here else ""
        raise ConfigError(
            f"engine 'slurm' finds no sbatch on this host; run it on a login node{there}, "
            "or try --engine-option cluster=local"
        )
    if here:
        raise StorageError(_needs_server(job, "slurm") + ", or --engine-option cluster=local for jobs on this host")


def slurm_parameters(given: Options, *, local: bool) -> dict[str, Any]:
    """submitit's names: those that only Slurm knows carry a prefix, and are left out on this host."""
    shared = {"name", "timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb", "nodes", "tasks_per_node"}
    parameters: dict[str, Any] = {} if "time" in given else {"timeout_min": SLURM_MINUTES}
    for key, text in given.items():
        value = int(text) if text.isdecimal() else text
        if key in shared:
            parameters[key] = value
        elif not local:
            parameters[f"slurm_{key}"] = value
    return parameters


ENGINES: dict[str, Callable[[Job, int, Options], AbstractContextManager[Start]]] = {
    "local": local_processes,
    "ray": ray_tasks,
    "slurm": slurm_jobs,
}
"""Name -> what gives the function that starts a worker, with all that it needs open around it."""


def _needs_server(job: Job, engine: str) -> str:
    """One line for workers that would not find the study, and make one of their own that is lost."""
    return (
        f"engine {engine!r} may start workers on other hosts, which do not share {storage_url(job.url)!r}; "
        f"run it with the database of a server: {job.command} --storage {SERVER}"
    )


def full_artifacts(job: Job) -> dict[str, Any]:
    """What changes in a job for other hosts: its folder for pictures, which they must share, gets its full path."""
    study = find_study(storage_url(job.url), job.config.name, known=True)
    stored = None if study is None else study.user_attrs.get(ARTIFACTS)
    folder = job.artifacts or stored
    if folder is None or "://" in folder:
        return {}
    folder = os.path.abspath(folder)
    _log.warning(
        "pictures go to the folder %r of each worker's host; unless all share it, give --artifacts s3://BUCKET/PREFIX",
        folder,
    )
    return {"artifacts": folder}


def _is_done(future: Any, last_words: str = "") -> bool:
    """``Look`` of ``run_for_engine`` on another host; ``last_words``: where they are, if not in what it raises."""
    if not future.done():
        return False
    if (error := future.exception()) is not None:
        raise Died("died", last_words or str(error).strip().rpartition("\n")[2] or type(error).__name__) from error
    if (reason := future.result()) is not None:
        raise StudyError(reason)
    return True


def _number(options: Options, name: str) -> float | None:
    """A number of 0 or more that was given as an option, if it was."""
    given = options.get(name)
    if given is None:
        return None
    try:
        number = float(given)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise ConfigError(f"--engine-option {name}={given}: give a number, 0 or more")
    return number


def _extra(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f'engine {extra!r} needs the package {module}; pip install "autodiffusion-optuna[{extra}]"'
        ) from None


def _refuse(options: Options, engine: str, allowed: tuple[str, ...]) -> None:
    for name in options:
        if name not in allowed:
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            raise ConfigError(f"--engine-option {name!r} is not one of engine {engine!r}; {takes}")
