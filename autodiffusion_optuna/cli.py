"""The command line. Typer and rich live here only, and only here errors are caught and printed."""

from __future__ import annotations

import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from autodiffusion_optuna import __version__
from autodiffusion_optuna.cli_reference import reference_app
from autodiffusion_optuna.errors import AdoptError, ConfigError, choose_from

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage

    from autodiffusion_optuna.candidate import Candidate
    from autodiffusion_optuna.config import StudyConfig
    from autodiffusion_optuna.records import Fresh
    from autodiffusion_optuna.report import StudyReport
    from autodiffusion_optuna.study import Parts, Progress

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Search the timesteps and skipped layers of a frozen diffusion model.\n\n"
    "\b\nadopt run --study digits-4             search, resume, or say that it is finished\n"
    "adopt show --study digits-4            the best schedule beside the known ones\n"
    "adopt sample --study digits-4 --out grid.png",
)
app.add_typer(reference_app, name="reference")
PIPE_WIDTH = 160  # of tables that go to a file or another program
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
err = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)

StudyName = Annotated[str, typer.Option("--study", help="A study in the database.")]
StudyOption = Annotated[str | None, typer.Option("--study", help="A study in the database.")]
ScheduleOption = Annotated[
    Path | None, typer.Option("--schedule", help="A schedule that adopt export --format json wrote.")
]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="key=value, as in the study file.")]
StorageUrl = Annotated[
    str | None,
    typer.Option("--storage", help="Database URL or SQLite file; default $ADOPT_STORAGE, else sqlite:///adopt.db."),
]
Trust = Annotated[bool, typer.Option("--trust", help="Allow files that contain code (TorchScript weights).")]

EXIT_INTERRUPTED = 130


def _say(text: str) -> None:
    """Print a line that is never broken: commands must stay whole when copied."""
    out.print(text, soft_wrap=True)


@app.command()
def run(
    study: Annotated[str, typer.Option("--study", help="A study file, a preset's name, or a study in the database.")],
    overrides: Overrides = None,
    storage: StorageUrl = None,
    trust: Trust = False,
) -> None:
    """Search; the same command again goes on where it stood, or says that the study is finished."""
    from autodiffusion_optuna import records
    from autodiffusion_optuna.report import peek, require_same
    from autodiffusion_optuna.storage import storage_url

    url = storage_url(storage)
    config = _resolve(study, overrides or [], url)
    begun = peek(url, config.name)
    if begun is not None:
        require_same(begun, config)
        if _complete(begun, config):
            done = records.finished(begun)
            _say(f"study {config.name} is finished: {done} candidates for a budget of {config.search.trials}.")
            _print_result(begun, url)
            return
    _search(config, url, begun, trust)


def _resolve(name: str, overrides: list[str], url: str) -> StudyConfig:
    """The config that ``--study`` means: a file, what a study in the database was last run with, or a preset."""
    from autodiffusion_optuna.config import load_config, load_preset, parse_config, presets
    from autodiffusion_optuna.report import existing_names, peek, stored_config

    if name.endswith(".toml") or "/" in name or Path(name).is_file():
        return load_config(Path(name), overrides)
    begun = peek(url, name)
    if begun is not None:
        return parse_config(stored_config(begun).model_dump(mode="json"), overrides)
    if name in presets():
        return load_preset(name, overrides)
    raise ConfigError(choose_from("study", name, [*presets(), *existing_names(url)]) + "; or give a study file.toml")


def _complete(study: optuna.Study, config: StudyConfig) -> bool:
    """Whether the budget is met and the winner has its fresh score."""
    from autodiffusion_optuna import records
    from autodiffusion_optuna.report import read_report

    best = read_report(study).best
    if best is None or records.finished(study) < config.search.trials:
        return False
    size = config.score.fresh_images, config.score.fresh_banks
    return records.fresh(study.user_attrs, best.candidate.key, *size) is not None


def _search(config: StudyConfig, url: str, begun: optuna.Study | None, trust: bool) -> None:
    from autodiffusion_optuna import records
    from autodiffusion_optuna import study as studies
    from autodiffusion_optuna.evaluation.allocator import keep_freed_memory
    from autodiffusion_optuna.report import stored_unit_costs
    from autodiffusion_optuna.storage import open_storage

    keep_freed_memory()
    parts = studies.build(config, trust=trust, unit_costs=stored_unit_costs(begun))
    database = open_storage(url)
    study = studies.open_study(parts, database)
    done = records.finished(study)
    verb = "going on" if done else "starting"
    _say(f"study {config.name}: {done} of {config.search.trials} candidates finished, {verb}. Ctrl-C stops it safely.")
    _warn(studies.warnings(parts, config.score.images))
    try:
        with _progress(config, study) as on_trial:
            studies.work(parts, study, database, on_trial)
        _score_finalists(parts, study)
    except KeyboardInterrupt:
        err.print(f"stopped; {records.finished(study)} candidates are kept. Go on with: {_resume_command()}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    _print_result(study, url)


def _resume_command() -> str:
    """What the user typed: the same command resumes."""
    return shlex.join(["adopt", *sys.argv[1:]])


def _score_finalists(parts: Parts, study: optuna.Study) -> None:
    from autodiffusion_optuna import study as studies

    images, banks = parts.config.score.fresh_images, parts.config.score.fresh_banks
    candidates = studies.finalists(parts, study)
    _say(f"scoring {', '.join(candidates)} on {banks} fresh banks of {images} images …")
    for candidate in candidates.values():
        studies.score_fresh(parts, study, candidate, images, banks)


@contextmanager
def _progress(config: StudyConfig, study: optuna.Study) -> Iterator[Any]:
    """A callback for every trial: a live table on a terminal, plain lines elsewhere."""
    board = _Board(config, study)
    if not out.is_terminal:
        yield board.plain
        return
    with Live(board.table(), console=out, refresh_per_second=4, transient=True) as live:

        def on_trial(progress: Progress) -> None:
            board.update(progress)
            live.update(board.table())

        yield on_trial


class _Board:
    """What the progress view shows."""

    EVERY = 20  # plain output: a line every so many trials, and for every new best

    def __init__(self, config: StudyConfig, study: optuna.Study) -> None:
        from autodiffusion_optuna.report import read_report

        report = read_report(study)
        self.config, self.metric = config, report.metric
        self.first = self.finished = len(report.finished)
        self.best = report.best.value if report.best else float("inf")
        self.run, self.saved = report.total("run"), report.total("saved")
        self.origin: dict[str, Any] = report.last_origin
        self.started = time.monotonic()

    def update(self, progress: Progress) -> bool:
        """Take in one trial; whether it is a new best."""
        attrs, values = progress.trial.user_attrs, progress.trial.values
        self.finished = progress.finished
        self.origin = attrs.get("origin", self.origin)
        self.run += attrs.get("score", {}).get("run", 0)
        self.saved += attrs.get("score", {}).get("saved", 0)
        better = progress.trial.state.name == "COMPLETE" and bool(values) and values[0] < self.best
        if better:
            self.best = values[0]
        return better

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of everything shown."""
        made = max(self.finished - self.first, 1)
        pace = (time.monotonic() - self.started) / made
        left = pace * max(self.config.search.trials - self.finished, 0)
        share = self.saved / max(self.run + self.saved, 1)
        return [
            ("candidates", f"{self.finished} of {self.config.search.trials}"),
            ("generation", str(self.origin["generation"])),
            ("stage", "layers and timesteps" if self.origin["stage"] == 2 else "timesteps"),
            (f"best {self.metric}", f"{self.best:.4g}"),
            ("seconds a trial", f"{pace:.2f}"),
            ("evaluations saved", f"{share:.0%}"),
            ("time left", _clock(left)),
        ]

    def table(self) -> Group:
        """The live view."""
        grid = Table.grid(padding=(0, 2))
        for name, value in self.facts():
            grid.add_row(name, value)
        return Group(grid, ProgressBar(total=self.config.search.trials, completed=self.finished, width=50))

    def plain(self, progress: Progress) -> None:
        """One line for a new best, and one every so often."""
        better = self.update(progress)
        if better or self.finished % self.EVERY == 0 or self.finished == self.config.search.trials:
            line = ", ".join(f"{name} {value}" for name, value in self.facts())
            print(line + (f"  <- {attrs_key(progress)}" if better else ""), flush=True)


def attrs_key(progress: Progress) -> str:
    """Canonical key of a trial's candidate."""
    return str(progress.trial.user_attrs.get("candidate", ""))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@app.command()
def studies(storage: StorageUrl = None) -> None:
    """List the presets that ship with adopt and the studies in the database."""
    from autodiffusion_optuna.report import list_studies, peek_storage
    from autodiffusion_optuna.storage import storage_url

    table = Table(box=None, pad_edge=False)
    for column in ("study", "preset", "finished", "best", "what it is"):
        table.add_column(column, overflow="fold")
    for line in list_studies(peek_storage(storage_url(storage))):
        finished = "-" if line.finished is None else f"{line.finished} of {line.budget}"
        best = "-" if line.best is None else f"{line.best:.4g}"
        table.add_row(line.name, "yes" if line.preset else "", finished, best, line.description)
    out.print(table)


@app.command()
def show(
    study: StudyName,
    storage: StorageUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """The best schedule, the known ones beside it, evaluations run and saved, and the history."""
    from autodiffusion_optuna.report import read_report
    from autodiffusion_optuna.storage import storage_url

    report = read_report(_existing(study, storage_url(storage))[1])
    if as_json:
        print(json.dumps(report.to_json(), indent=2))
        return
    _print_table(report)
    _print_facts(report)


@app.command()
def score(
    study: StudyOption = None,
    schedule: ScheduleOption = None,
    model: Annotated[str | None, typer.Option("--model", help="With --schedule: another model to try it on.")] = None,
    images: Annotated[int | None, typer.Option("--images", help="Images a bank; default the study's.")] = None,
    banks: Annotated[int | None, typer.Option("--banks", help="Banks of fresh noise; default the study's.")] = None,
    overrides: Overrides = None,
    storage: StorageUrl = None,
    trust: Trust = False,
) -> None:
    """Score the winner and the known schedules, or a schedule from a file, on fresh noise, with 95 % intervals."""
    settings = _fresh_overrides(images, banks)
    if _wants_schedule(study, schedule, model=model, overrides=overrides):
        assert schedule is not None
        given = [] if model is None else [f"model.source={json.dumps(model)}"]
        _score_schedule(schedule, [*given, *(overrides or []), *settings], trust)
    else:
        assert study is not None
        _score_study(study, settings, storage, trust)


def _score_study(study: str, overrides: list[str], storage: str | None, trust: bool) -> None:
    from autodiffusion_optuna import study as runner
    from autodiffusion_optuna.candidate import Candidate
    from autodiffusion_optuna.report import read_report
    from autodiffusion_optuna.storage import storage_url

    found, parts = _load(study, storage_url(storage), trust, overrides)
    best = runner.winner(found).user_attrs["candidate"]
    keys = dict.fromkeys([best, *(candidate.key for candidate in parts.known.values())])
    fresh = parts.config.score
    for position, key in enumerate(keys, 1):
        err.print(f"scoring {position} of {len(keys)}: {key}")
        runner.score_fresh(parts, found, Candidate.from_key(key), fresh.fresh_images, fresh.fresh_banks)
    _print_table(read_report(found))
    _warn(runner.warnings(parts, fresh.fresh_images))


def _score_schedule(path: Path, overrides: list[str], trust: bool) -> None:
    from autodiffusion_optuna import study as runner
    from autodiffusion_optuna import transfer
    from autodiffusion_optuna.evaluation.allocator import keep_freed_memory
    from autodiffusion_optuna.schedule import Schedule

    keep_freed_memory()
    opened = transfer.open_schedule(Schedule.read(path), overrides, trust=trust)
    settings = opened.parts.config.score
    err.print(f"scoring {', '.join(opened.rivals)} on {settings.fresh_banks} banks of {settings.fresh_images} images …")
    scored = transfer.score_rivals(opened)
    table = Table(box=None, pad_edge=False)
    noise = f"fresh noise, {settings.fresh_banks} x {settings.fresh_images}, 95 %"
    for column in ("schedule", f"{runner.metric_name(opened.parts)}, {noise}", "timesteps"):
        table.add_column(column, overflow="fold")
    for name, fresh in scored.items():
        timesteps = " ".join(map(str, opened.rivals[name].timesteps))
        table.add_row(name, f"{fresh.mean:.4g} ± {fresh.half_width:.2g}", timesteps)
    _say(f"model {opened.parts.model.name}, solver {opened.parts.evaluator.sampling.solver}")
    out.print(table)
    _warn(runner.warnings(opened.parts, settings.fresh_images))


def _warn(warnings: list[str]) -> None:
    for warning in warnings:
        err.print(f"warning: {warning}")


def _wants_schedule(study: str | None, schedule: Path | None, **others: object) -> bool:
    """Whether a schedule file is meant rather than a study; ConfigError where neither is given, or both are."""
    if (study is None) == (schedule is None):
        given = "both --study and --schedule" if study else "neither --study nor --schedule"
        raise ConfigError(f"{given} given; name a study of the database, or a file of adopt export --format json")
    if schedule is not None:
        return True
    for name, value in others.items():
        if value:
            option = "--set" if name == "overrides" else f"--{name}"
            raise ConfigError(f"{option} goes with --schedule; a study keeps its own settings")
    return False


def _fresh_overrides(images: int | None, banks: int | None) -> list[str]:
    given = {"score.fresh_images": images, "score.fresh_banks": banks}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


@app.command()
def sample(
    path: Annotated[Path, typer.Option("--out", help="Picture to write (PNG).")],
    study: StudyOption = None,
    schedule: ScheduleOption = None,
    images: Annotated[int, typer.Option("--images", min=1, max=1024, help="Different noises.")] = 12,
    steps: Annotated[int, typer.Option("--many-steps", min=1, help="With --study: steps of the last row.")] = 100,
    overrides: Overrides = None,
    storage: StorageUrl = None,
    trust: Trust = False,
) -> None:
    """Draw the same noises with uniform steps and with the best schedule; of a study also with many steps."""
    from autodiffusion_optuna import study as runner
    from autodiffusion_optuna import transfer
    from autodiffusion_optuna.evaluation.allocator import keep_freed_memory
    from autodiffusion_optuna.plots import draw_grid
    from autodiffusion_optuna.schedule import Schedule
    from autodiffusion_optuna.storage import storage_url

    from_file = _wants_schedule(study, schedule, overrides=overrides)
    if not path.parent.is_dir():
        raise ConfigError(
            f"folder {str(path.parent)!r} for the picture does not exist; create it or give another --out"
        )
    if from_file:
        assert schedule is not None
        keep_freed_memory()
        rows = transfer.sample_rivals(
            transfer.open_schedule(Schedule.read(schedule), overrides or [], trust=trust), images
        )
    else:
        assert study is not None
        found, parts = _load(study, storage_url(storage), trust)
        rows = runner.sample_rows(parts, found, images, steps)
    draw_grid(rows, path)
    _say(f"wrote {path}")


FORMS = {"json": "{}.json", "diffusers": "{}.py", "comfyui": "{}-sigmas.txt"}
"""Form of an export -> name of its file."""


@app.command()
def export(
    study: StudyName,
    form: Annotated[
        str, typer.Option("--format", help="json, diffusers, comfyui, or both for the first two.")
    ] = "both",
    folder: Annotated[Path | None, typer.Option("--out", help="Folder to write to; default: print.")] = None,
    storage: StorageUrl = None,
) -> None:
    """The best schedule as JSON, as Python that applies it with diffusers, or as sigmas for ComfyUI."""
    from autodiffusion_optuna.export import export_text
    from autodiffusion_optuna.storage import storage_url

    wanted = {"both": ["json", "diffusers"], "python": ["diffusers"]}.get(form, [form])
    if not set(wanted) <= FORMS.keys():
        raise ConfigError(choose_from("format", form, [*FORMS, "both"]))
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"folder {str(folder)!r} does not exist; create it or give another --out")
    found = _existing(study, storage_url(storage))[1]
    texts: dict[str, str] = {}
    for one in wanted:
        try:
            texts[FORMS[one].format(study)] = export_text(found, one)
        except ConfigError as error:
            if form != "both" or not texts:
                raise
            err.print(f"no script: {error}")
    if folder is None:
        print("\n".join(texts.values()), end="")
        return
    for name, text in texts.items():
        try:
            (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {str(folder / name)!r}: {error.strerror}; give another --out") from None
        _say(f"wrote {folder / name}")


def _existing(name: str, url: str) -> tuple[RDBStorage, optuna.Study]:
    from autodiffusion_optuna.report import load_study
    from autodiffusion_optuna.storage import open_storage

    database = open_storage(url, create=False)
    return database, load_study(database, name)


def _load(name: str, url: str, trust: bool, overrides: list[str] | None = None) -> tuple[optuna.Study, Parts]:
    """A study of the database with its parts built from the config it was run with."""
    from autodiffusion_optuna import study as runner
    from autodiffusion_optuna.config import parse_config
    from autodiffusion_optuna.evaluation.allocator import keep_freed_memory
    from autodiffusion_optuna.report import stored_config, stored_unit_costs

    keep_freed_memory()
    found = _existing(name, url)[1]
    config = parse_config(stored_config(found).model_dump(mode="json"), overrides or [])
    parts = runner.build(config, trust=trust, unit_costs=stored_unit_costs(found))
    runner.check_same(parts, found)
    return found, parts


def _print_result(study: optuna.Study, url: str) -> None:
    from autodiffusion_optuna.report import read_report
    from autodiffusion_optuna.storage import hide_password, storage_url

    report = read_report(study)
    _print_table(report)
    _warn(_variety(report))
    shown = hide_password(url)
    tail = "" if url == storage_url(None) else f" --storage {shlex.quote(shown)}"
    name, more = report.config.name, report.config.search.trials * 2
    _say("\nnext:")
    for command, why in (
        (f"adopt show --study {name}{tail}", "history, evaluations saved, seconds by phase"),
        (f"adopt sample --study {name} --out {name}.png{tail}", "see the difference"),
        (f"adopt export --study {name}{tail}", "apply it to the model with diffusers"),
        (f"adopt run --study {name} --set search.trials={more}{tail}", "search on"),
    ):
        _say(f"  {command}    # {why}")


LOST_VARIETY = -0.2
"""log of the variance of features over the reference's below which the best schedule is worth a look."""


def _variety(report: StudyReport) -> list[str]:
    """A warning where the best schedule may owe its value to images that are too much alike."""
    ratio = report.best.trace_ratio if report.best else None
    if ratio is None or ratio > LOST_VARIETY:
        return []
    share = math.exp(ratio)
    return [f"the features of the best schedule's images have {share:.0%} of the reference's variance; look at samples"]


def _print_table(report: StudyReport) -> None:
    """Schedules from best to worst: timesteps, value on the search's noise, value on fresh noise."""
    if report.best is None:
        _say(f"study {report.config.name}: no candidate is finished yet")
        return
    fresh = report.best.fresh
    noise = f"fresh noise, {fresh.banks} x {fresh.images}, 95 %" if fresh else "fresh noise"
    table = Table(box=None, pad_edge=False, title_justify="left")
    for column, justify in (("schedule", "left"), (report.metric, "right"), (noise, "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("cost", justify="right")
    best = report.best
    searched = bool(best.candidate.settings)
    if searched:
        table.add_column("settings", overflow="fold")
    table.add_column("timesteps", overflow="fold")
    rows: list[tuple[str, float | None, Fresh | None, float, Candidate]]
    rows = [("best found", best.value, best.fresh, best.cost, best.candidate)]
    known = sorted(report.known, key=lambda k: float("inf") if k.value is None else k.value)
    rows += [(k.name, k.value, k.fresh, k.cost, k.candidate) for k in known]
    for name, value, fresh, cost, candidate in rows:
        shown = "-" if value is None else f"{value:.4g}"
        interval = "-" if fresh is None else f"{fresh.mean:.4g} ± {fresh.half_width:.2g}"
        timesteps = " ".join(str(t) for t in candidate.timesteps)
        chosen = [", ".join(f"{setting} {value}" for setting, value in candidate.settings)] if searched else []
        table.add_row(name, shown, interval, f"{cost:.2f}", *chosen, timesteps)
    out.print(table)
    if any(best.candidate.skips):
        _print_skips(report)


def _print_skips(report: StudyReport) -> None:
    assert report.best is not None
    _say("\nlayers skipped by the best schedule:")
    names = report.best.candidate.skip_names(report.units)
    for timestep, skipped in zip(report.best.candidate.timesteps, names, strict=True):
        _say(f"  {timestep:>5}  {', '.join(skipped) or '-'}")


def _print_facts(report: StudyReport) -> None:
    data = report.to_json()
    run_count, saved = data["evaluations"]["run"], data["evaluations"]["saved"]
    share = saved / max(run_count + saved, 1)
    seconds = data["seconds"]
    _say(
        f"\n{data['finished']} of {data['budget']} candidates finished, generation {data['generation']}, "
        f"stage {data['stage']}, solver {data['solver']}, {data['images']} images a candidate",
    )
    _say(f"network evaluations (an image each): {run_count:,} run, {saved:,} saved ({share:.0%})")
    phases = ", ".join(f"{phase} {seconds[phase]:.1f}" for phase in ("network", "features", "distance", "storage"))
    _say(f"seconds: {phases}, total {seconds['total']:.1f}")
    _say("\ngeneration  stage  best so far")
    for generation, stage, value in report.best_by_generation():
        _say(f"{generation:>10}  {stage:>5}  {value:.4g}")


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"adopt {__version__}")
        raise typer.Exit


# Typer carries its own copy of click: its usage errors are found through the one class it exports.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command line: errors of the user's are one line on stderr and exit code 1, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except AdoptError as error:
        _fail(str(error))
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            sys.exit(1)
        _fail(f"{error.format_message()} Try adopt --help")  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        err.print("stopped")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        if not _is_database_error(error):
            raise
        _fail(f"the database failed: {str(error).splitlines()[0]} What is finished is kept; run the command again")
    sys.exit(code if isinstance(code, int) else 0)


def _is_database_error(error: Exception) -> bool:
    """Whether a running study's database went away, is full or locked."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, (StorageInternalError, SQLAlchemyError))


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)
