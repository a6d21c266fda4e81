"""Starts the workers of a study: processes on this host, or the same workers through Ray or Slurm.

Engines only start ``worker.run_job`` and start it again where it died: the study's database does the rest.
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
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import IO, Any

from autodiffusion_optuna.errors import ConfigError, StorageError, StudyError, choose_from
from autodiffusion_optuna.storage.attrs import ARTIFACTS
from autodiffusion_optuna.storage.studies import find_study
from autodiffusion_optuna.storage.trials import count_finished
from autodiffusion_optuna.storage.url import ENVIRONMENT, is_of_this_host, storage_url
from autodiffusion_optuna.workers.worker import USER_ERROR, WARNING, Job, run_for_engine, share_of_cores

_log = logging.getLogger("autodiffusion_optuna")

MAX_RESTARTS = 5
"""Times that one worker is started again after it died, while no trial of the study is finished in between."""
PAUSE = 2.0
"""Seconds before the second of them, doubled for each one after it; the first comes at once."""
CHUNK = 1 << 16
"""Bytes of a worker's words that are looked through at a time."""
CONNECT_SECONDS = 10.0
"""Time for a Ray cluster to answer."""
SLURM_MINUTES = 24 * 60
"""Time limit of a Slurm job, where none is given: submitit's own is five minutes."""
LOOK_SECONDS = 0.25
STOP_SECONDS = 20.0
"""Time for a worker to put its trial back before it is killed."""

SERVER = "postgresql://USER@HOST/DB"
"""What a database that all hosts reach is given as."""

OnLook = Callable[[], None]
Options = Mapping[str, str]


def launch(engine: str, job: Job, workers: int, options: Options, on_look: OnLook) -> None:
    """Run a study to its budget with ``workers`` workers; ``on_look`` is called a few times a second.

    Raises ConfigError for an unknown engine, one that is not installed or an option it does not take, and StudyError
    with the line that a worker gave up with. Ctrl-C stops all workers and is re-raised.
    """
    if engine not in ENGINES:
        raise ConfigError(choose_from("engine", engine, ENGINES))
    ENGINES[engine](job, workers, options, on_look)


class Restarts:
    """How often one worker has died since the study last went on."""

    def __init__(self, job: Job) -> None:
        self.job, self.count, self._finished = job, 0, _finished(job)

    def died(self) -> bool:
        """Note one more death; whether the worker is worth another start."""
        finished = _finished(self.job)
        self.count = 1 if finished > self._finished else self.count + 1
        self._finished = max(finished, self._finished)
        return self.count <= MAX_RESTARTS

    @property
    def pause(self) -> float:
        """Seconds to wait before the next start: what killed a worker may need a moment to pass."""
        return 0.0 if self.count < 2 else PAUSE * 2.0 ** (self.count - 2)


class Process:
    """A worker as a child process, started again where it dies."""

    def __init__(self, job: Job) -> None:
        self.job, self.restarts, self.finished = job, Restarts(job), False
        self.due: float | None = None  # ``time.monotonic`` of the next start, while it is dead
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by ``join``)
        self.read = 0  # bytes of it that ``warnings`` has seen
        self.start()

    def start(self) -> None:
        """Start the process and hand it its job."""
        command = [sys.executable, "-m", "autodiffusion_optuna.workers.worker"]
        # In a session of its own Ctrl-C reaches the launcher alone, which then stops its workers one way.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,
            env={**_thread_limits(self.job.workers), **os.environ},
        )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(self.job.dumps().encode() + b"\n")
            self.process.stdin.flush()

    def look(self) -> None:
        """Take note of an end: done, or died and started again (StudyError where that makes no sense)."""
        if self.due is not None:
            if time.monotonic() >= self.due:
                self.due = None
                self.start()
            return
        code = self.process.poll()
        if code is None or self.finished:
            return
        if code == 0:
            self.finished = True
        elif code == USER_ERROR or not self.restarts.died():
            raise StudyError(self._last_words(code))
        else:
            self.due = time.monotonic() + self.restarts.pause

    def warnings(self) -> list[str]:
        """What it has warned of since the last call."""
        # Without moving the file's position, which is also where the worker writes.
        said = os.pread(self.errors.fileno(), CHUNK, self.read)
        # A progress bar may go on for long without a newline.
        lines = said[: said.rfind(b"\n") + 1] or said * (len(said) == CHUNK)
        self.read += len(lines)
        marked = (line for line in lines.decode(errors="replace").splitlines() if line.startswith(WARNING))
        return [line.removeprefix(WARNING) for line in marked]

    def _last_words(self, code: int) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        if code == USER_ERROR and lines[-1].startswith("error: "):
            return lines[-1].removeprefix("error: ")
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        again = f" {self.restarts.count} times" if self.restarts.count > 1 else ""
        return f"worker {self.job.index} {ended}{again}: {lines[-1]}"

    def stop(self) -> None:
        """Close its input, at which it puts its trial back and ends."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def join(self, deadline: float) -> None:
        """Wait for its end until ``deadline`` (``time.monotonic``), then kill it: its trial is taken back later."""
        try:
            self.process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


def _thread_limits(workers: int) -> dict[str, str]:
    """Environment that gives each of ``workers`` its share of this host's cores.

    Libraries of linear algebra start a thread for each core; where several do, they spend their time waiting for each
    other. PyTorch can be told later, NumPy's and SciPy's library only here.
    """
    return dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(share_of_cores(workers)))


def run_local(job: Job, workers: int, options: Options, on_look: OnLook) -> None:
    """Workers as processes of this host; each takes the next of its GPUs, or a share of its cores."""
    _refuse(options, "local", ())
    processes: list[Process] = []
    told: set[str] = set()
    try:
        while not processes or not all(process.finished for process in processes):
            if len(processes) < workers and (not processes or _has_begun(job) or processes[0].finished):
                processes.append(Process(replace(job, index=len(processes), known=True)))
                continue
            for process in processes:
                process.look()
                for warning in process.warnings():
                    if warning not in told:  # what one meets, all do
                        told.add(warning)
                        _log.warning(warning)
            on_look()
            time.sleep(LOOK_SECONDS)
    finally:
        for process in processes:
            process.stop()
        deadline = time.monotonic() + STOP_SECONDS
        for process in processes:
            process.join(deadline)


def run_ray(job: Job, workers: int, options: Options, on_look: OnLook) -> None:
    """Workers as Ray tasks, one GPU each where the cluster has any; one that dies is started anew, wherever is room.

    Options: ``address`` (of a running cluster; default this host), ``gpus`` and ``cpus`` of each worker.
    """
    ray: Any = _extra("ray", "ray")
    _refuse(options, "ray", ("address", "gpus", "cpus"))
    gpus, cpus = _number(options, "gpus"), _number(options, "cpus")
    started, address = not ray.is_initialized(), options.get("address")
    lone = is_of_this_host(storage_url(job.url))
    if lone and (not started or (address != "local" and (address or os.environ.get("RAY_ADDRESS")))):
        _reach(address, f"check --engine-option address, and give --storage {SERVER}")
        raise StorageError(_needs_server(job, "ray"))
    if not lone:
        job = _for_other_hosts(job)
    if started:
        # Without an address Ray joins whatever cluster this host was last part of.
        _join_ray(ray, "local" if lone else address)
    try:
        if gpus is None:
            gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
        job = replace(job, workers=-(-workers // max(sum(node["Alive"] for node in ray.nodes()), 1)))
        # A worker that asked for a whole core would never start where there are fewer cores than workers.
        task = ray.remote(num_gpus=gpus, num_cpus=cpus or 0.0, max_retries=0)(run_for_engine)
        running = {task.remote(job.dumps()): 0}
        restarts = {index: Restarts(job) for index in range(workers)}
        while running:
            if workers > 1 and _has_begun(job):
                job = replace(job, known=True)
                running |= {task.remote(replace(job, index=i).dumps()): i for i in range(1, workers)}
                workers = 1
            done, _ = ray.wait(list(running), timeout=LOOK_SECONDS)
            on_look()
            for answer in done:
                index = running.pop(answer)
                try:
                    _check_answer(ray.get(answer))
                except ray.exceptions.RayError as error:
                    if not restarts[index].died():
                        raise StudyError(f"Ray worker {index} gave up: {_last_line(error)}") from error
                    running[task.remote(replace(job, index=index).dumps())] = index
    finally:
        if started:
            ray.shutdown()


def _join_ray(ray: Any, address: str | None) -> None:
    _reach(address, "check --engine-option address")
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise _no_cluster(address, error, "check --engine-option address") from None


def _reach(address: str | None, advice: str) -> None:
    """ConfigError where nobody listens at a cluster's address: Ray would try for minutes, and then end this process."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if colon:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (ValueError, OSError) as error:
        raise _no_cluster(address, error, advice) from None


def _no_cluster(address: str | None, error: Exception, advice: str) -> ConfigError:
    where = "on this host" if address in (None, "local") else f"at {address!r}"
    return ConfigError(f"no Ray cluster {where}: {_first_line(error)}; {advice}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


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


def run_slurm(job: Job, workers: int, options: Options, on_look: OnLook) -> None:
    """Workers as Slurm jobs through submitit, submitted again where they die.

    Options are those of ``sbatch`` by submitit's names (``partition``, ``gpus_per_node``, ``time`` in minutes,
    ``account`` …), ``folder`` for the logs, and ``cluster=local`` to run the jobs on this host without Slurm.
    """
    submitit: Any = _extra("submitit", "slurm")
    given = dict(options)
    folder, cluster = given.pop("folder", "adopt-slurm"), given.pop("cluster", None)
    if cluster not in (None, "local", "slurm"):
        raise ConfigError(f"--engine-option cluster={cluster}: it is slurm, or local for jobs on this host")
    if cluster != "local":
        _check_login_node(submitit, job)
        job = _for_other_hosts(job)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**_slurm_parameters(given, local=cluster == "local"))
    except (TypeError, ValueError, NameError, OSError) as error:
        raise ConfigError(f"--engine-option: {_first_line(error)}") from None
    # submitit writes jobs to files, where a password has no place: Slurm hands on the environment.
    os.environ[ENVIRONMENT] = storage_url(job.url)
    shared = replace(job, url=None, workers=workers if cluster == "local" else 1)
    jobs = {0: executor.submit(run_for_engine, shared.dumps())}
    restarts = {index: Restarts(job) for index in range(workers)}
    try:
        while jobs:
            if workers > 1 and _has_begun(job):
                shared = replace(shared, known=True)
                jobs |= {
                    i: executor.submit(run_for_engine, replace(shared, index=i).dumps()) for i in range(1, workers)
                }
                workers = 1
            for index, submitted in list(jobs.items()):
                if not submitted.done():
                    continue
                if (died := submitted.exception()) is None:
                    _check_answer(submitted.result())
                    del jobs[index]
                elif not restarts[index].died():
                    times = restarts[index].count
                    raise StudyError(f"Slurm job {submitted.job_id} died {times} times: see {folder!r}") from died
                else:
                    jobs[index] = executor.submit(run_for_engine, replace(shared, index=index).dumps())
            on_look()
            time.sleep(LOOK_SECONDS)
    finally:
        for submitted in jobs.values():
            submitted.cancel()


def _check_login_node(submitit: Any, job: Job) -> None:
    lone = is_of_this_host(storage_url(job.url))
    if not submitit.SlurmExecutor.affinity() > 0:
        there = f" with --storage {SERVER}" if lone else ""
        raise ConfigError(
            f"engine 'slurm' finds no sbatch on this host; run it on a login node{there}, "
            "or try --engine-option cluster=local"
        )
    if lone:
        raise StorageError(_needs_server(job, "slurm") + ", or --engine-option cluster=local for jobs on this host")


def _needs_server(job: Job, engine: str) -> str:
    """One line for workers that would not find the study, and make one of their own that is lost."""
    return (
        f"engine {engine!r} may start workers on other hosts, which do not share {storage_url(job.url)!r}; "
        f"run it with the database of a server: {job.command} --storage {SERVER}"
    )


def _for_other_hosts(job: Job) -> Job:
    """The job with the full path of its folder for pictures, if it has one; that they must share it is said."""
    study = find_study(storage_url(job.url), job.name, known=True)
    kept = None if study is None else study.user_attrs.get(ARTIFACTS)
    folder = job.artifacts or kept
    if folder is None or "://" in folder:
        return job
    folder = os.path.abspath(folder)
    _log.warning(
        "pictures go to the folder %r of each worker's host; unless all share it, give --artifacts s3://BUCKET/PREFIX",
        folder,
    )
    return replace(job, artifacts=folder)


def _slurm_parameters(given: Options, *, local: bool) -> dict[str, Any]:
    """submitit's names: those that only Slurm knows carry a prefix; numbers are numbers."""
    shared = {"name", "timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb", "nodes", "tasks_per_node"}
    read = {key: int(value) if value.isdecimal() else value for key, value in given.items()}
    limit = {} if "time" in read else {"timeout_min": SLURM_MINUTES}
    if local:
        return {**limit, **{key: value for key, value in read.items() if key in shared}}
    return {**limit, **{(key if key in shared else f"slurm_{key}"): value for key, value in read.items()}}


ENGINES: dict[str, Callable[[Job, int, Options, OnLook], None]] = {
    "local": run_local,
    "ray": run_ray,
    "slurm": run_slurm,
}
"""Name -> how the workers are started."""


def _has_begun(job: Job) -> bool:
    """Whether the first worker has written down what the study is, so that the others find it."""
    return find_study(storage_url(job.url), job.name, known=True) is not None


def _finished(job: Job) -> int:
    """Candidates that the study has finished; 0 where it cannot be read at this moment."""
    try:
        study = find_study(storage_url(job.url), job.name, known=True)
    except StorageError:
        return 0
    return 0 if study is None else count_finished(study)


def _check_answer(error: str | None) -> None:
    if error is not None:
        raise StudyError(error)


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
            known = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            raise ConfigError(f"--engine-option {name!r} is not one of engine {engine!r}; {known}")
