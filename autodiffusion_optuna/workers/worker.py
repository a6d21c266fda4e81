"""One worker of a study: what each process of ``adopt run --workers`` and of the engines does.

``python -m autodiffusion_optuna.workers.worker`` reads its job, a line of JSON, from standard input: a database URL
with a password must not show in a list of processes. It ends when that input does, so that no worker outlives its
launcher.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback

from pydantic import Field

from autodiffusion_optuna.config import Section, StudyConfig
from autodiffusion_optuna.errors import AdoptError, Marked
from autodiffusion_optuna.storage.database import failure
from autodiffusion_optuna.storage.url import storage_url

USER_ERROR, CRASHED, INTERRUPTED = 1, 70, 130
"""Exit codes: something that the user must fix, an error that another try may not meet, stopped by its launcher."""

STOP_AGAIN_SECONDS = 10.0
"""Time for a worker that is stopped to release its trial, before it is stopped again."""

NOTE = "note: "
"""Beginning of a line that the launcher passes on, as it does those that begin with ``WARNING``."""

_log = logging.getLogger("autodiffusion_optuna")


class Job(Section):
    """What a worker needs to know; it travels as a line of JSON."""

    config: StudyConfig
    url: str | None
    """Of the database; None where the environment says it."""
    folder: str = Field(default_factory=os.getcwd)
    """Where Python plug-ins and pictures are looked for, as in the launcher."""
    trust: bool = False
    artifacts: str | None = None
    index: int = 0
    """Number among the workers that were started together."""
    workers: int = 1
    """That share this host's cores."""
    scores: bool = False
    """Whether the first worker also scores the winner; else whoever launched it does."""
    known: bool = False
    """Whether the database has answered from hosts like this one before; it is then waited for."""
    command: str = ""
    """What the user typed, but for the database."""


def share_of_cores(workers: int) -> int:
    """Cores of this host for each of ``workers`` processes, one at least."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // workers)


def limit_threads(workers: int) -> None:
    """Have PyTorch use no more cores than each of ``workers`` processes has."""
    import torch

    torch.set_num_threads(min(torch.get_num_threads(), share_of_cores(workers)))


def run_job(job: Job) -> None:
    """Evaluate candidates beside the other workers until the budget is met (AdoptError children)."""
    import torch

    from autodiffusion_optuna.study import forecast, lifecycle, loop, pictures, validation

    if os.path.isdir(job.folder):
        os.chdir(job.folder)
    limit_threads(job.workers)
    opened = lifecycle.open_run(
        job.config,
        storage_url(job.url),
        trust=job.trust,
        artifacts=job.artifacts,
        device=own_device(job, torch.cuda.device_count()),
        known=job.known,
        say=_log.info,
    )
    if job.index == 0:
        forecast.note_cost(opened.components, opened.study)
    loop.work(opened.components, opened.study, opened.storage, store=opened.store)
    if job.scores and job.index == 0:
        validation.validate(opened.components, opened.study)
        pictures.keep(opened.components, opened.study, opened.storage, opened.store)


def own_device(job: Job, gpus: int) -> str | None:
    """A GPU of its own for each worker of a host with several; None: the config's device."""
    free = job.config.model.device in ("auto", "cuda")
    return f"cuda:{job.index % gpus}" if free and gpus > 1 else None


def run_for_engine(text: str) -> str | None:
    """``run_job`` of a job as JSON; an error that the user must fix is returned, for engines wrap what is raised."""
    try:
        run_job(Job.model_validate_json(text))
    except Exception as error:
        reason = str(error) if isinstance(error, AdoptError) else failure(error)
        if reason is None:
            raise
        return reason
    return None


def main() -> None:
    """Run the job on standard input; one line on stderr and exit code 1 where the user must fix something."""
    # A shell that puts its launcher in the background has it ignore Ctrl-C, and with it this process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    mark_warnings()
    job = sys.stdin.readline()
    try:
        threading.Thread(target=stop_with_input, daemon=True).start()
        reason = run_for_engine(job)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # stopped twice, it still ends in order
        sys.exit(INTERRUPTED)
    except Exception:
        traceback.print_exc()
        sys.exit(CRASHED)
    if reason is not None:
        print("error: " + " ".join(reason.split()), file=sys.stderr)
        sys.exit(USER_ERROR)


def mark_warnings() -> None:
    """Tell warnings and notes apart from what libraries write to stderr: the launcher passes them on."""
    handler = logging.StreamHandler()
    handler.setFormatter(Marked(NOTE))
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    _log.propagate = False


def stop_with_input() -> None:
    """Interrupt this process once its standard input ends."""
    sys.stdin.read()
    while True:  # Python drops one that comes in a finaliser
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(STOP_AGAIN_SECONDS)


if __name__ == "__main__":
    main()
