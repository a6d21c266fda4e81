"""Starts the workers of a study: processes on this host, or the same workers through Ray or Slurm.

Engines only start ``worker.run_job`` and start it again where it died: the study's database does the rest.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import IO, Any

from autodiffusion_optuna.errors import ConfigError, StudyError, choose_from
from autodiffusion_optuna.report import peek
from autodiffusion_optuna.storage import ENVIRONMENT, storage_url
from autodiffusion_optuna.worker import USER_ERROR, Job, run_for_engine

MAX_RESTARTS = 5
"""Times that one worker is started again after it died."""
LOOK_SECONDS = 0.25
STOP_SECONDS = 20.0
"""Time for a worker to put its trial back before it is killed."""

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


class Process:
    """A worker as a child process, started again where it dies."""

    def __init__(self, job: Job) -> None:
        self.job, self.restarts, self.finished = job, 0, False
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by ``join``)
        self.start()

    def start(self) -> None:
        """Start the process and hand it its job."""
        command = [sys.executable, "-m", "autodiffusion_optuna.worker"]
        # In a session of its own Ctrl-C reaches the launcher alone, which then stops its workers one way.
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=self.errors, start_new_session=True)
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(self.job.dumps().encode() + b"\n")
            self.process.stdin.flush()

    def look(self) -> None:
        """Take note of an end: done, or died and started again (StudyError where that makes no sense)."""
        code = self.process.poll()
        if code is None or self.finished:
            return
        if code == 0:
            self.finished = True
        elif code == USER_ERROR or self.restarts == MAX_RESTARTS:
            raise StudyError(self._last_words(code))
        else:
            self.restarts += 1
            self.start()

    def _last_words(self, code: int) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        if code == USER_ERROR and lines[-1].startswith("error: "):
            return lines[-1].removeprefix("error: ")
        ended = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        again = f" {self.restarts + 1} times" if self.restarts else ""
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


def run_local(job: Job, workers: int, options: Options, on_look: OnLook) -> None:
    """Workers as processes of this host; each takes the next of its GPUs, or a share of its cores."""
    _refuse(options, "local", ())
    processes: list[Process] = []
    try:
        while not processes or not all(process.finished for process in processes):
            if len(processes) < workers and (not processes or _has_begun(job) or processes[0].finished):
                processes.append(Process(replace(job, index=len(processes))))
                continue
            for process in processes:
                process.look()
            on_look()
            time.sleep(LOOK_SECONDS)
    finally:
        for process in processes:
            process.stop()
        deadline = time.monotonic() + STOP_SECONDS
        for process in processes:
            process.join(deadline)


def run_ray(job: Job, workers: int, options: Options, on_look: OnLook) -> None:
    """Workers as Ray tasks, one GPU each where the cluster has any; Ray runs a killed one again.

    Options: ``address`` (of a running cluster; default this host), ``gpus`` and ``cpus`` of each worker.
    """
    ray: Any = _extra("ray", "ray")
    _refuse(options, "ray", ("address", "gpus", "cpus"))
    started = not ray.is_initialized()
    if started:
        ray.init(address=options.get("address"), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        gpus = float(options.get("gpus", 1 if ray.cluster_resources().get("GPU") else 0))
        # A worker that asked for a whole core would never start where there are fewer cores than workers.
        cpus = float(options.get("cpus", 0))
        task = ray.remote(num_gpus=gpus, num_cpus=cpus, max_retries=MAX_RESTARTS)(run_for_engine)
        running = [task.remote(job.dumps())]
        while running:
            if len(running) == 1 and job.index + 1 < workers and _has_begun(job):
                running += [task.remote(replace(job, index=i).dumps()) for i in range(1, workers)]
                workers = 1
            done, running = ray.wait(running, timeout=LOOK_SECONDS)
            on_look()
            for answer in done:
                _check_answer(_ray_answer(ray, answer))
    finally:
        if started:
            ray.shutdown()


def _ray_answer(ray: Any, answer: Any) -> str | None:
    try:
        result: str | None = ray.get(answer)
    except ray.exceptions.RayError as error:
        return f"a Ray worker gave up: {str(error).strip().splitlines()[-1]}"
    return result


def run_slurm(job: Job, workers: int, options: Options, on_look: OnLook) -> None:
    """Workers as Slurm jobs through submitit, submitted again where they die.

    Options are those of ``sbatch`` by submitit's names (``partition``, ``gpus_per_node``, ``time`` in minutes,
    ``account`` …), ``folder`` for the logs, and ``cluster=local`` to run the jobs on this host without Slurm.
    """
    submitit: Any = _extra("submitit", "slurm")
    given = dict(options)
    folder, cluster = given.pop("folder", "adopt-slurm"), given.pop("cluster", None)
    if cluster is None and not submitit.SlurmExecutor.affinity() > 0:
        raise ConfigError(
            "engine 'slurm' finds no sbatch on this host; run it on a login node, or try --engine-option cluster=local"
        )
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    try:
        executor.update_parameters(**_slurm_parameters(given, local=cluster == "local"))
    except (TypeError, ValueError, NameError) as error:
        raise ConfigError(f"--engine-option: {error}") from None
    # submitit writes jobs to files, where a password has no place: Slurm hands on the environment.
    os.environ[ENVIRONMENT] = storage_url(job.url)
    shared = replace(job, url=None)
    jobs = {0: executor.submit(run_for_engine, shared.dumps())}
    restarts = dict.fromkeys(range(workers), 0)
    try:
        while jobs:
            if workers > 1 and _has_begun(job):
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
                elif restarts[index] == MAX_RESTARTS:
                    raise StudyError(
                        f"Slurm job {submitted.job_id} died {MAX_RESTARTS + 1} times: see {folder!r}"
                    ) from died
                else:
                    restarts[index] += 1
                    jobs[index] = executor.submit(run_for_engine, replace(shared, index=index).dumps())
            on_look()
            time.sleep(LOOK_SECONDS)
    finally:
        for submitted in jobs.values():
            submitted.cancel()


def _slurm_parameters(given: Options, *, local: bool) -> dict[str, Any]:
    """submitit's names: those that only Slurm knows carry a prefix; numbers are numbers."""
    shared = {"name", "timeout_min", "gpus_per_node", "cpus_per_task", "mem_gb", "nodes", "tasks_per_node"}
    read = {key: int(value) if value.isdecimal() else value for key, value in given.items()}
    if local:
        return {"timeout_min": 24 * 60, **{key: value for key, value in read.items() if key in shared}}
    return {(key if key in shared else f"slurm_{key}"): value for key, value in read.items()}


ENGINES: dict[str, Callable[[Job, int, Options, OnLook], None]] = {
    "local": run_local,
    "ray": run_ray,
    "slurm": run_slurm,
}
"""Name -> how the workers are started."""


def _has_begun(job: Job) -> bool:
    """Whether the first worker has written down what the study is, so that the others find it."""
    return peek(storage_url(job.url), job.name) is not None


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
