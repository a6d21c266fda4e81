"""What a search costs, said before it starts; ``adopt run --dry-run`` says it and stops there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autodiffusion_optuna.cli.output import say, warn
from autodiffusion_optuna.results.cost import Pace, Work, cost_line
from autodiffusion_optuna.storage.attrs import COST_AHEAD

if TYPE_CHECKING:
    import optuna

    from autodiffusion_optuna.study.components import StudyComponents
    from autodiffusion_optuna.workers.worker import Job


def say_cost(components: StudyComponents, done: int, workers: int = 1, *, begun: bool = True) -> None:
    """Time one batch, and print what is left of a study with ``done`` finished candidates."""
    from autodiffusion_optuna.study import forecast

    work = forecast.work_left(components, done, begun=begun)
    if work.candidates:
        parallel = forecast.parallel_workers(workers, components.model.device)
        say(cost_line(work, forecast.measure_pace(components), parallel))


def dry_run(job: Job, engine: str, done: int) -> None:
    """Check and load all that a search needs, and say what it will cost; nothing is written."""
    from autodiffusion_optuna.storage.url import storage_url
    from autodiffusion_optuna.study.components import warnings
    from autodiffusion_optuna.study.lifecycle import prepare_run
    from autodiffusion_optuna.workers.launch import check_engine
    from autodiffusion_optuna.workers.worker import limit_threads

    check_engine(engine)
    if engine == "local":
        limit_threads(job.workers)  # as many as each of the workers will have
    prepared = prepare_run(job.config, storage_url(job.url), trust=job.trust, artifacts=job.artifacts)
    components = prepared.components
    warn(warnings(components, job.config.score.images))
    say(f"study {job.config.name}: {done} of {job.config.search.trials} candidates finished, all checks passed")
    say_cost(components, done, job.workers, begun=prepared.begun is not None)
    say("dry run: nothing was written; the same command without --dry-run starts")


class CostOnce:
    """Prints once what a search by ``workers`` workers costs, as soon as the first of them has timed a batch.

    ``begun``: the study before they were started, which may hold what earlier ones found. ``here``: whether they
    share this host.
    """

    def __init__(self, begun: optuna.Study | None, workers: int, here: bool) -> None:
        self.before = None if begun is None else begun.user_attrs.get(COST_AHEAD)
        self.workers, self.here = workers, here

    def look(self, study: optuna.Study) -> None:
        """Print it if it is there."""
        found = study.user_attrs.get(COST_AHEAD)
        if found is None or found == self.before:
            return
        self.before = found
        parallel = min(self.workers, found["parallel"]) if self.here else self.workers
        say(cost_line(Work(**found["work"]), Pace(**found["pace"]), parallel))
