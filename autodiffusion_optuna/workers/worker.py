"""One worker of a study: what each process of ``adopt run --workers`` and of the engines does.

``python -m autodiffusion_optuna.workers.worker`` reads its job, a line of JSON, from standard input: a database URL
with a password must not show in a list of processes. It ends when that input
does, so that no worker outlives its launcher.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from autodiffusion_optuna.config import StudyConfig, parse_config
from autodiffusion_optuna.errors import AdoptError
from autodiffusion_optuna.storage.database import failure
from autodiffusion_optuna.storage.url import storage_url

USER_ERROR, CRASHED, INTERRUPTED = 1, 70, 130
"""Exit codes: something that the user must mend, an error that another try may not meet, stopped by its launcher."""


STOP_SECONDS = 10.0
"""Time for a worker that was told to stop to put its trial back, before it is told again."""
WARNING = "warning: "
"""Beginning of a line that the launcher passes on."""


@dataclass(frozen=True)
class Job:
    """What a worker needs to know. ``index``: its number among the workers that were started together."""

    url: str | None
    """Of the database; None where the environment tells it."""
    config: dict[str, Any]
    folder: str
    """Folder that relative paths of the config start from."""
    trust: bool = False
    artifacts: str | None = None
    index: int = 0
    workers: int = 1
    """That share this host's cores."""
    scores: bool = False
    """Whether the first worker also scores the winner; else whoever launched it does."""
    known: bool = False
    """Whether the database has answered other workers on hosts like this one: it is then waited for."""
    command: str = ""
    """What the user typed, but for the database."""

    @classmethod
    def of(
        cls,
        config: StudyConfig,
        url: str,
        *,
        workers: int,
        trust: bool = False,
        artifacts: str | None = None,
        scores: bool = False,
        command: str = "",
    ) -> Job:
        """The job of the first of ``workers`` workers, started from the current folder."""
        settings, here = config.model_dump(mode="json"), str(Path.cwd())
        return cls(url, settings, here, trust, artifacts, 0, workers, scores, command=command)

    def dumps(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> Job:
        """Inverse of ``dumps``."""
        return cls(**json.loads(text))

    @property
    def name(self) -> str:
        """Name of the study."""
        return str(self.config["name"])


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

    from autodiffusion_optuna.study import lifecycle, loop, validation

    if Path(job.folder).is_dir():
        os.chdir(job.folder)
    limit_threads(job.workers)
    opened = lifecycle.open_run(
        parse_config(job.config),
        storage_url(job.url),
        trust=job.trust,
        artifacts=job.artifacts,
        device=_device(job, torch.cuda.device_count()),
        known=job.known,
    )
    loop.work(opened.parts, opened.study, opened.storage, store=opened.store)
    if job.scores and job.index == 0:
        validation.validate(opened.parts, opened.study)


def _device(job: Job, gpus: int) -> str | None:
    """A GPU of its own for each worker of a host with several; None: the config's device."""
    free = job.config["model"]["device"] in ("auto", "cuda")
    return f"cuda:{job.index % gpus}" if free and gpus > 1 else None


def run_for_engine(text: str) -> str | None:
    """``run_job`` of a job as JSON; an error that the user must mend is returned, for engines wrap what is raised."""
    try:
        run_job(Job.loads(text))
    except Exception as error:
        return _for_user(error)
    return None


def _for_user(error: Exception) -> str:
    """What the user must mend; any other error is raised again, and the worker is started anew."""
    reason = str(error) if isinstance(error, AdoptError) else failure(error)
    if reason is None:
        raise error
    return reason


def main() -> None:
    """Run the job on standard input; one line on stderr and exit code 1 where the user must mend something."""
    # A shell that puts its launcher in the background has it ignore Ctrl-C, and with it this process.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _mark_warnings()
    job = Job.loads(sys.stdin.readline())
    try:
        threading.Thread(target=_stop_with_input, daemon=True).start()
        run_job(job)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # told to stop twice, it still ends in order
        sys.exit(INTERRUPTED)
    except Exception as error:
        _give_up(error)


def _give_up(error: Exception) -> NoReturn:
    try:
        line = _for_user(error)
    except Exception:
        traceback.print_exc()
        sys.exit(CRASHED)
    print("error: " + " ".join(line.split()), file=sys.stderr)
    sys.exit(USER_ERROR)


def _mark_warnings() -> None:
    """Tell warnings apart from whatever else libraries write to stderr: the launcher passes them on."""
    handler, log = logging.StreamHandler(), logging.getLogger("autodiffusion_optuna")
    handler.setFormatter(logging.Formatter(WARNING + "%(message)s"))
    log.addHandler(handler)
    log.propagate = False


def _stop_with_input() -> None:
    sys.stdin.read()
    while True:  # Python drops one that comes in a finaliser
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(STOP_SECONDS)


if __name__ == "__main__":
    main()
