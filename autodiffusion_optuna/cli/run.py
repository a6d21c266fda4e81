"""``adopt run``: search, resume, or say that the study is finished."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from autodiffusion_optuna.cli.completion import ENGINES, complete_study, one_of
from autodiffusion_optuna.cli.forecast import CostOnce, dry_run, say_cost
from autodiffusion_optuna.cli.output import (
    EXIT_INTERRUPTED,
    Overrides,
    StorageUrl,
    StudyName,
    Trust,
    clock,
    err,
    existing,
    out,
    print_json,
    print_result,
    say,
    warn,
)
from autodiffusion_optuna.cli.scoring import validate
from autodiffusion_optuna.errors import ConfigError, StorageError, StudyError, choose_from, program
from autodiffusion_optuna.results.pace import held_out_seconds, validation_seconds
from autodiffusion_optuna.storage.url import hide_password, storage_option, storage_url

if TYPE_CHECKING:
    import optuna

    from autodiffusion_optuna.config import StudyConfig
    from autodiffusion_optuna.study.lifecycle import Run
    from autodiffusion_optuna.workers.worker import Job


Workers = Annotated[int, typer.Option("--workers", help="Workers to start; on GPUs, one for each GPU.")]
Engine = Annotated[
    str,
    typer.Option(
        "--engine", metavar=f"[{'|'.join(ENGINES)}]", help="What starts them.", autocompletion=one_of(ENGINES)
    ),
]
EngineOptions = Annotated[list[str] | None, typer.Option("--engine-option", help="name=value, as the engine takes it.")]
ArtifactLocation = Annotated[
    str | None,
    typer.Option(
        "--artifacts",
        envvar="ADOPT_ARTIFACTS",
        help="Where pictures go: a folder, s3://… or gs://…; default beside a SQLite file.",
    ),
]


def run(
    study: Annotated[
        str,
        typer.Option(
            "--study",
            help="A study file, a preset's name, or a study in the database.",
            autocompletion=complete_study,
        ),
    ],
    overrides: Overrides = None,
    storage: StorageUrl = None,
    workers: Workers = 1,
    engine: Engine = "local",
    engine_options: EngineOptions = None,
    artifacts: ArtifactLocation = None,
    trust: Trust = False,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what the search will cost; write nothing.")
    ] = False,
) -> None:
    """Search, or go on where a search stood.

    The same command again resumes it, or says that the study is finished.

    Run it on as many hosts as you like on one database: each is one more worker.
    """
    from autodiffusion_optuna.storage.database import check_place
    from autodiffusion_optuna.storage.studies import find_study, require_same, still_there
    from autodiffusion_optuna.storage.trials import count_finished
    from autodiffusion_optuna.workers.worker import Job

    if workers < 1:
        raise ConfigError(f"--workers {workers}: give 1 or more")
    url = storage_url(storage)
    config = _resolve(study, overrides or [], url)
    options = _options(engine_options or [])
    if options and engine == "local" and (workers == 1 or dry):
        raise ConfigError(f"--engine-option {next(iter(options))!r} needs --engine ray or --engine slurm")
    begun = find_study(url, config.name)
    done = 0 if begun is None else count_finished(begun)
    if begun is not None:
        require_same(begun, config)
        if _complete(begun, config):
            say(f"study {config.name} is finished: {done} candidates for a budget of {config.search.trials}.")
            print_result(begun, url, warned=False)
            return
    job = Job(config=config, url=url, trust=trust, artifacts=artifacts, workers=workers)
    if engine == "local" or dry:  # else the engine says first whether its workers could reach it at all
        check_place(url)
    if dry:
        dry_run(job, engine, done)
        return
    try:
        found = _launch(job, engine, options) if workers > 1 or engine != "local" else _search(job)
    except KeyboardInterrupt:
        with suppress(StorageError):  # else as many as before, or more
            stopped = find_study(url, config.name)
            done = done if stopped is None else count_finished(stopped)
        err.print(f"stopped; {done} candidates are kept. Go on with: {resume_command()}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    with still_there(found):
        print_result(found, url)


def _options(given: list[str]) -> dict[str, str]:
    """``name=value`` of each ``--engine-option``."""
    options = {}
    for option in given:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise ConfigError(f"--engine-option {option!r} has no '='; write --engine-option name=value")
        options[name] = value
    return options


def _resolve(name: str, overrides: list[str], url: str) -> StudyConfig:
    """The config that ``--study`` means: a file, what a study in the database was last run with, or a preset."""
    from autodiffusion_optuna.config import load_config, load_preset, parse_config, presets
    from autodiffusion_optuna.storage.studies import find_storage, find_study, stored_config, study_names

    if name.endswith(".toml") or "/" in name or Path(name).is_file():
        return load_config(Path(name), overrides)
    begun = find_study(url, name, ready=False)
    if begun is not None:
        return parse_config(stored_config(begun).model_dump(mode="json"), overrides)
    if name in presets():
        return load_preset(name, overrides)
    database = find_storage(url)
    names = [*presets(), *(study_names(database) if database else [])]
    raise ConfigError(choose_from("study", name, names) + "; or give a study file.toml")


def _complete(study: optuna.Study, config: StudyConfig) -> bool:
    """Whether the budget is met, and all that follows is scored: finalists, the winner on held-out noise, the floor."""
    from autodiffusion_optuna.results.pace import floor_is_due
    from autodiffusion_optuna.results.summary import read_summary

    size = config.score.held_out_images, config.score.held_out_banks
    summary = read_summary(study, size)
    if len(summary.finished) < config.search.trials or summary.best is None or summary.best.held_out is None:
        return False
    then, now = summary.config, config
    if (then.finalists, then.validation_images) != (now.finalists, now.validation_images):
        return False
    if any(not finalist.stored for finalist in summary.finalists.due):  # a failed one is not tried for ever
        return False
    return not floor_is_due(summary, config.score.floor_steps, size)


def _search(job: Job) -> optuna.Study:
    """Work on the study in this process, and score its winner."""
    from autodiffusion_optuna.storage.studies import still_there
    from autodiffusion_optuna.storage.trials import count_finished
    from autodiffusion_optuna.study import loop, pictures

    opened, config = _open(job), job.config
    done = count_finished(opened.study)
    verb = "going on" if done else "starting"
    say(f"study {config.name}: {done} of {config.search.trials} candidates finished, {verb}. Ctrl-C stops it safely.")
    warn(_known_doubts(opened.study))
    say_cost(opened.components, done)
    with still_there(opened.study):
        with _watched(Board(config, opened.study)) as board:
            loop.work(opened.components, opened.study, opened.storage, board.show, opened.store)
        validate(opened.components, opened.study)
        pictures.keep(opened.components, opened.study, opened.storage, opened.store)
    return opened.study


def _launch(job: Job, engine: str, options: dict[str, str]) -> optuna.Study:
    """Start workers and show what they do together, whoever else works on the study, which is returned."""
    from autodiffusion_optuna.storage.studies import current_name, find_study, still_there
    from autodiffusion_optuna.workers.launch import launch
    from autodiffusion_optuna.workers.worker import limit_threads

    config, workers, url = job.config, job.workers, storage_url(job.url)
    here = engine == "local"  # else this host may have no GPU, and a worker scores the winner
    job = job.model_copy(update={"scores": not here, "command": resume_command(storage=False)})
    started = "1 worker" if workers == 1 else f"{workers} workers"
    say(f"study {config.name}: {started} by engine {engine}, starting. Ctrl-C stops them safely.")
    boards: list[Board] = []
    cost = CostOnce(find_study(url, config.name, known=True), workers, here)

    def look() -> None:
        if not boards and (begun := find_study(url, config.name, known=True)) is not None:
            warn(_known_doubts(begun))
            boards.append(watch.enter_context(_watched(Board(config, begun, workers))))
        for board in boards:
            with still_there(board.study):
                cost.look(board.study)
                board.on_look()

    with ExitStack() as watch:
        launch(engine, job, workers, options, look)
        look()
        if not boards:
            raise StudyError(f"study {config.name!r} was deleted or renamed meanwhile; see {program()} studies list")
        study = boards[0].study
        with still_there(study):
            boards[0].end()
    if here:
        limit_threads(workers)  # as many as each of the workers had
        with still_there(study):  # others may have renamed it
            config = config.model_copy(update={"name": current_name(study)})
        from autodiffusion_optuna.study import pictures

        opened = _open(job.model_copy(update={"config": config, "known": True}))
        study = opened.study
        with still_there(study):
            validate(opened.components, study)
            pictures.keep(opened.components, study, opened.storage, opened.store)
    return study


def _open(job: Job) -> Run:
    """The study of a job with all that works on it, in this process."""
    from autodiffusion_optuna.study import lifecycle

    return lifecycle.open_run(
        job.config, storage_url(job.url), trust=job.trust, artifacts=job.artifacts, known=job.known, say=say
    )


def _known_doubts(study: optuna.Study) -> list[str]:
    """What is known to be doubtful as a run begins; what it finds itself is said at its end."""
    from autodiffusion_optuna.results.summary import read_summary

    summary = read_summary(study)
    return [line for line in summary.warnings() if line not in summary.found_doubtful()]


def resume_command(*, storage: bool = True) -> str:
    """What the user typed, without a password: the same command resumes. ``storage``: whether with the database."""

    def shown(word: str) -> str:
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        return option + equals + (hide_password(value) if "://" in value else value)

    words = sys.argv[1:]
    if not storage:
        place = [i for i, word in enumerate(words) if word == "--storage"]
        dropped = {*place, *(i + 1 for i in place)}
        words = [w for i, w in enumerate(words) if i not in dropped and not w.startswith("--storage=")]
    return f"{program()} {shlex.join(map(shown, words))}"


@contextmanager
def _watched(board: Board) -> Iterator[Board]:
    """The board: a live table on a terminal, plain lines elsewhere."""
    if not out.is_terminal:
        yield board
        return
    with Live(board.table(), console=out, refresh_per_second=4, transient=True) as live:
        board.live = live
        yield board


class Board:
    """What the progress view shows: of this process's trials, or of all workers' through the database."""

    EVERY = 20  # plain output: a line every so many trials, and for every new best
    LOOK_SECONDS = 1.0

    def __init__(self, config: StudyConfig, study: optuna.Study, workers: int = 1) -> None:
        from autodiffusion_optuna.results.summary import read_summary

        self.config, self.study, self.workers = config, study, workers
        self.live: Live | None = None
        self.started = self.looked = time.monotonic()
        self.read = partial(read_summary, study)
        self.summary = self.read()
        self.first = self.printed = len(self.summary.finished)
        self.lines = 0

    def on_look(self) -> None:
        """Show where the study stands, about once a second."""
        if time.monotonic() - self.looked >= self.LOOK_SECONDS:
            self.looked = time.monotonic()
            self.show()

    def end(self) -> None:
        """Show where the study stands at last: workers may have been faster than the last look, or than all of them."""
        if not self.lines:
            self.printed = -1
        self.show()

    def show(self) -> None:
        """Read the study; draw the table again, or print a line for a new best and one every so often."""
        before, self.summary = self.summary.lead, self.read()
        if self.live is not None:
            self.live.update(self.table())
            return
        lead, finished = self.summary.lead, len(self.summary.finished)
        better = lead is not None and (before is None or lead[0] < before[0])
        due = finished // self.EVERY > self.printed // self.EVERY
        last = finished >= self.config.search.trials and finished > self.printed
        if better or due or last:
            line = ", ".join(f"{name} {value}" for name, value in self.facts())
            print(line + (f"  <- {lead[1]}" if lead and better else ""), flush=True)
            self.printed, self.lines = finished, self.lines + 1

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of everything shown."""
        from autodiffusion_optuna.results.summary import STAGES, images_of

        summary, budget = self.summary, self.config.search.trials
        best = best_so_far(summary.lead and summary.lead[0], images_of(self.config, validated=False))
        finished, run, saved = len(summary.finished), summary.evaluations["run"], summary.evaluations["saved"]
        pace = (time.monotonic() - self.started) / max(finished - self.first, 1)
        facts = [
            ("candidates", f"{finished} of {budget}"),
            ("generation", str(summary.last_origin["generation"])),
            ("stage", STAGES[summary.last_origin["stage"]]),
            (f"best {summary.metric}", best),
            ("seconds a trial", f"{pace:.2f}"),
            ("network calls reused", f"{saved / max(run + saved, 1):.0%}"),
            ("time left", clock(pace * max(budget - finished, 0))),
            *([("then validation", self.validation())] if self.config.finalists else []),
            ("then held-out scores", self.scores()),
        ]
        return facts if self.workers == 1 else [*facts, ("workers", str(self.workers))]

    def validation(self) -> str:
        """The finalists that are scored after the search, and how long that takes as far as trials tell."""
        what = f"of {self.config.finalists} finalists on {self.config.validation_images:,} images"
        return _about(what, validation_seconds(self.summary))

    def scores(self) -> str:
        """What follows at last, and how long it takes as far as trials tell."""
        score = self.config.score
        what = f"on {score.held_out_banks} x {score.held_out_images:,} images"
        return _about(what, held_out_seconds(self.summary))

    def table(self) -> Group:
        """The live view."""
        grid = Table.grid(padding=(0, 2))
        for name, value in self.facts():
            grid.add_row(name, value)
        return Group(grid, ProgressBar(total=self.config.search.trials, completed=len(self.summary.finished), width=50))


def _about(what: str, seconds: float | None) -> str:
    return what if seconds is None else f"{what}, about {clock(seconds)}"


def best_so_far(value: float | None, images: str) -> str:
    """The best value with the images it is of."""
    from autodiffusion_optuna.results.held_out import significant

    return "none yet" if value is None else f"{significant(value)} of {images}"


def status(
    study: StudyName,
    storage: StorageUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """How far a study is: workers, trials, rate and time left."""
    from autodiffusion_optuna.results.status import read_status
    from autodiffusion_optuna.results.summary import STAGES

    url = storage_url(storage)
    database, found = existing(study, url)
    state = read_status(database, found, storage_option(url))
    if as_json:
        print_json(state.to_json())
        return
    counts = ", ".join(f"{count} {name}" for name, count in state.states.items() if count)
    say(f"study {study}: {state.finished} of {state.budget} candidates finished ({counts or 'none begun'})")
    best = best_so_far(state.best, state.best_images)
    say(f"generation {state.generation}, stage {STAGES[state.stage]}, best {state.metric} {best}")
    if state.finalists:
        say(f"validation: {state.validated} of {state.finalists} finalists are scored")
    alive = [worker for worker in state.workers if worker.alive]
    for worker in state.workers:
        seen = "no heartbeat yet" if worker.silence is None else f"heartbeat {worker.silence:.0f} s ago"
        say(f"  {'alive' if worker.alive else 'dead '}  trial {worker.trial}  {seen}  {worker.name}")
    if alive:
        rate = "too early for a rate" if state.rate is None else f"{60 * state.rate:.3g} candidates a minute"
        left = "" if state.seconds_left is None else f", time left {clock(state.seconds_left)}"
        say(f"{len(alive)} {'worker' if len(alive) == 1 else 'workers'} alive, {rate}{left}")
    elif state.finished >= state.budget:
        say("finished; no worker is needed")
    else:
        say(f"no worker is alive; go on with: {program()} run --study {shlex.quote(study)}{storage_option(url)}")
    warn(state.warnings)
