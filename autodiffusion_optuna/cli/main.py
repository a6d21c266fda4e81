"""The command ``adopt``: its subcommands, and the only place where errors are caught and printed."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.cli.dashboard import dashboard
from autodiffusion_optuna.cli.fitted import print_fitted
from autodiffusion_optuna.cli.init import init
from autodiffusion_optuna.cli.output import (
    EXIT_INTERRUPTED,
    Lists,
    Overrides,
    ResultOption,
    StorageUrl,
    StudyName,
    StudyOption,
    Trust,
    err,
    existing,
    load_components,
    load_image_components,
    out,
    print_facts,
    print_json,
    say,
    warn,
)
from autodiffusion_optuna.cli.places import check_out
from autodiffusion_optuna.cli.reference import reference_app
from autodiffusion_optuna.cli.run import run, status
from autodiffusion_optuna.cli.scoring import score_study
from autodiffusion_optuna.cli.studies import storage_app, studies_app
from autodiffusion_optuna.cli.tables import print_tables
from autodiffusion_optuna.cli.views import report
from autodiffusion_optuna.errors import AdoptError, ConfigError, Marked, program
from autodiffusion_optuna.storage.url import storage_option, storage_url

if TYPE_CHECKING:
    from autodiffusion_optuna.export.result import Result
    from autodiffusion_optuna.study.components import StudyComponents
    from autodiffusion_optuna.study.transfer import Opened

Format = Literal["diffusers", "json", "comfyui", "comfyui-workflow", "sdnext"]
"""Names of ``export.formats.FORMATS``."""

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Search the timesteps and skipped layers of a frozen diffusion model.\n\n"
    f"\b\n{program()} run --study digits-4    # search, or go on\n"
    f"{program()} show --study digits-4    # the best found beside the baselines\n"
    f"{program()} sample --study digits-4 --out grid.png",
)
app.command()(init)
app.command()(run)
app.command()(status)
app.command()(report)
app.command()(dashboard)
app.add_typer(studies_app, name="studies")
app.add_typer(storage_app, name="storage")
app.add_typer(reference_app, name="reference")


@app.command()
def show(
    study: StudyName,
    storage: StorageUrl = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for scripts.")] = False,
) -> None:
    """The best candidate beside the baselines, and the history. Also network calls, and seconds by phase."""
    from autodiffusion_optuna.results.summary import read_summary

    url = storage_url(storage)
    summary = read_summary(existing(study, url)[1])
    if as_json:
        print_json(summary.to_json(storage_option(url)))
        return
    print_tables(summary)
    print_facts(summary)
    warn(summary.warnings(storage_option(url)))


@app.command()
def score(
    study: StudyOption = None,
    result: ResultOption = None,
    model: Annotated[str | None, typer.Option("--model", help="With --result: another model to try it on.")] = None,
    images: Annotated[int | None, typer.Option("--images", help="Images a bank; default the study's.")] = None,
    banks: Annotated[int | None, typer.Option("--banks", help="Banks of held-out noise; default the study's.")] = None,
    floor: Annotated[
        int | None, typer.Option("--floor-steps", help="With --study: uniform steps of the floor; 0 for none.")
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="With --study: which single change from uniform earned how much.")
    ] = False,
    lists: Lists = None,
    overrides: Overrides = None,
    storage: StorageUrl = None,
    trust: Trust = False,
) -> None:
    """Score the winner and the baselines on held-out noise. With 95 % intervals; or a result from a file."""
    given = {"held_out_images": images, "held_out_banks": banks, "floor_steps": floor}
    settings = [f"score.{name}={value}" for name, value in given.items() if value is not None]
    if _wants_result(study, result, lists, model=model):
        for option, wanted in (("--floor-steps", floor is not None), ("--ablation", ablation)):
            if wanted:
                raise ConfigError(f"{option} goes with --study; a result is compared with uniform timesteps alone")
        assert result is not None
        source = [] if model is None else [f"model.source={json.dumps(model)}"]
        _score_result(result, [*source, *(overrides or []), *settings], trust)
    else:
        assert study is not None
        _score_study(study, lists or [], overrides, settings, storage, trust, ablation=ablation)


def _score_study(
    study: str,
    lists: list[str],
    places: list[str] | None,
    settings: list[str],
    storage: str | None,
    trust: bool,
    *,
    ablation: bool,
) -> None:
    from autodiffusion_optuna.results.finalists import best_candidate
    from autodiffusion_optuna.results.summary import read_summary
    from autodiffusion_optuna.study import given

    url = storage_url(storage)
    begun = existing(study, url)[1]
    winner = best_candidate(begun)  # or says so, before a model is loaded
    given.check_lists(lists, read_summary(begun))
    found, components = load_components(study, url, trust, places, settings)
    beside, notes = given.beside_winner(lists, components, winner)
    warn(notes)
    score_study(components, found, beside, ablation=ablation)
    size = components.config.score.held_out_images, components.config.score.held_out_banks
    summary = given.with_lists(read_summary(found, size), components, found, beside, size)
    print_tables(summary)
    warn(summary.warnings(storage_option(url)))


def _score_result(path: Path, overrides: list[str], trust: bool) -> None:
    from autodiffusion_optuna.results.held_out import paired
    from autodiffusion_optuna.study import components, transfer

    opened = _open_result(path, overrides, trust)
    settings = opened.components.config.score
    err.print(
        f"scoring {', '.join(opened.compared)} on "
        f"{settings.held_out_banks} banks of {settings.held_out_images} images …"
    )
    scored = transfer.score_compared(opened)
    table = Table(box=None, pad_edge=False)
    noise = f"held-out noise, {settings.held_out_banks} x {settings.held_out_images}, 95 %"
    metric = components.metric_name(opened.components)
    table.add_column("candidate", no_wrap=True)
    for column in (f"{metric}, {noise}", "difference to uniform, 95 %"):
        table.add_column(column, no_wrap=True)
    table.add_column("timesteps", overflow="fold")
    for name, held_out in scored.items():
        timesteps = " ".join(map(str, opened.compared[name].timesteps))
        difference = None if name == "uniform" else paired(held_out, scored["uniform"])
        shown = "-" if difference is None else difference.text
        table.add_row(name, held_out.text, shown, timesteps)
    say(f"model {opened.components.model.name}, solver {opened.components.evaluator.sampling.solver}")
    print_fitted(out, table)
    warn(components.warnings(opened.components, settings.held_out_images))


def _open_result(path: Path, overrides: list[str], trust: bool) -> Opened[StudyComponents]:
    """An exported result on a model, with a warning where that is not the one it was found on."""
    from autodiffusion_optuna.export.result import Result
    from autodiffusion_optuna.study.transfer import open_result

    opened = open_result(Result.read(path), overrides, trust=trust)
    warn([opened.other] if opened.other else [])
    return opened


def _wants_result(study: str | None, result: Path | None, lists: list[str] | None = None, **others: object) -> bool:
    """Whether an exported result is meant rather than a study; ConfigError where neither is given, or both are.

    ``lists`` go with a study, ``others`` with a result.
    """
    if (study is None) == (result is None):
        given = "both --study and --result" if study else "neither --study nor --result"
        raise ConfigError(f"{given} given; name a study of the database, or a file of {program()} export --format json")
    if result is not None:
        if lists:
            raise ConfigError("--timesteps goes with --study; name the study whose model and settings the list takes")
        return True
    for name, value in others.items():
        if value:
            raise ConfigError(f"--{name} goes with --result; a study keeps its own settings")
    return False


@app.command()
def sample(
    path: Annotated[Path, typer.Option("--out", help="Picture to write (PNG).")],
    study: StudyOption = None,
    result: ResultOption = None,
    images: Annotated[int, typer.Option("--images", min=1, max=1024, help="Different noises.")] = 12,
    steps: Annotated[
        int | None, typer.Option("--many-steps", min=1, help="With --study: steps of the last row; default 100.")
    ] = None,
    lists: Lists = None,
    overrides: Overrides = None,
    storage: StorageUrl = None,
    trust: Trust = False,
) -> None:
    """Draw the same noises with uniform steps and the best found. Of a study also with lists, and many steps."""
    from autodiffusion_optuna.export.result import Result
    from autodiffusion_optuna.images import check_picture, draw_grid
    from autodiffusion_optuna.results.captions import caption
    from autodiffusion_optuna.results.finalists import best_candidate
    from autodiffusion_optuna.results.summary import read_summary
    from autodiffusion_optuna.study import given, pictures, transfer

    from_file = _wants_result(study, result, lists)
    if from_file and steps is not None:
        raise ConfigError("--many-steps goes with --study; a result is drawn beside its baselines alone")
    check_out(path, "the picture", "grid.png")
    check_picture(path)
    if from_file:
        assert result is not None
        opened = transfer.open_images(Result.read(result), overrides or [], trust=trust)
        warn([opened.other] if opened.other else [])
        components, doubts = opened.components, transfer.doubts(opened)
        solver = components.images.sampling.solver
        named = [(caption(name, candidate, solver), candidate) for name, candidate in opened.compared.items()]
    else:
        assert study is not None
        url = storage_url(storage)
        begun = existing(study, url)[1]
        best = best_candidate(begun)  # or says so, before a model is loaded
        given.check_lists(lists or [], read_summary(begun))
        found, components = load_image_components(study, url, trust, overrides)
        beside, notes = given.beside_winner(lists or [], components, best)
        summary = read_summary(found)
        many = steps or min(pictures.MANY_STEPS, components.model.schedule.T)
        named = pictures.rows_of(components, summary, many, beside)
        doubts = [*notes, *summary.warnings(storage_option(url))]
    draw_grid(pictures.samples(components, named, images), path)
    say(f"wrote {path}")
    warn(list(dict.fromkeys([*components.model.notes, *doubts])))


@app.command()
def export(
    study: StudyName,
    form: Annotated[Format, typer.Option("--format", help="What to write.")] = "diffusers",
    folder: Annotated[Path | None, typer.Option("--out", help="Folder to write to; default: print.")] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Another number of steps, interpolated and not searched.")
    ] = None,
    given: Annotated[
        str | None,
        typer.Option("--timesteps", metavar="LIST", help="A list in place of the best candidate's; or NAME=LIST."),
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Compare the script's images with those of the search, where the model is here.")
    ] = True,
    storage: StorageUrl = None,
) -> None:
    """The best candidate for diffusers, ComfyUI or SD.Next, or as JSON."""
    from autodiffusion_optuna.export.formats import file_name, notes_of, result_text
    from autodiffusion_optuna.export.scripts import reads_json
    from autodiffusion_optuna.results.summary import read_summary
    from autodiffusion_optuna.study.derived import derived_result

    if folder is not None and folder.suffix in (".json", ".py", ".txt") and not folder.is_dir():
        raise ConfigError(f"--out {str(folder)!r}: give the folder, such as --out .; files are named after the study")
    if folder is not None and not folder.absolute().parent.is_dir():
        raise ConfigError(f"folder {str(folder.parent)!r} does not exist; create it or give another --out")
    url = storage_url(storage)
    report = read_summary(existing(study, url)[1])
    result, changed = derived_result(report, given, steps)
    text = result_text(result, form)
    if form == "diffusers" and check:
        text = _checked(result, text)
    warn([*report.warnings(storage_option(url)), *changed])
    for note in notes_of(result, form):
        err.print(note)
    beside = form == "diffusers" and reads_json(text)
    if folder is None:
        changes = {"timesteps": given, "steps": steps}
        options = "".join(f" --{name} {shlex.quote(str(value))}" for name, value in changes.items() if value)
        tail = options + storage_option(url)
        if beside:
            command = f"{program()} export --study {study} --format json --out .{tail}"
            err.print(f"the script reads {result.study}.json: {command}")
        _print_export(text, f"{program()} export --study {study} --format {form} --out .{tail}")
        return
    for name, content in {form: text, **({"json": result.text()} if beside else {})}.items():
        _write(folder, file_name(result.study, name), content)


def _print_export(text: str, whole: str) -> None:
    """Print an exported text; a terminal gets packed data shortened, and the command that writes the whole file."""
    from autodiffusion_optuna.results.json_text import shortened

    shown = shortened(text) if sys.stdout.isatty() else text
    print(shown, end="")
    if shown != text:
        err.print(f"packed data is shortened on the screen; the whole file: {whole}")


def _checked(result: Result, text: str) -> str:
    """The script for diffusers, or one with the search's own sampler where it draws other images than the search."""
    from autodiffusion_optuna.export.scripts import diffusers_script, uses_diffusers
    from autodiffusion_optuna.study.script_check import check_script

    if not uses_diffusers(text):
        return text
    err.print("comparing the script's images with those of the search's sampler (--no-check leaves it out) …")
    try:
        fault, *notes = check_script(result)
    except AdoptError as error:
        warn([f"the script was not checked against the search's sampler: {error}"])
        return text
    warn([note for note in notes if note])
    if fault is None:
        return text
    warn([f"{fault}; the script uses the search's own sampler instead"])
    return diffusers_script(result, why_not=fault)


def _write(folder: Path, name: str, text: str) -> None:
    try:
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {str(folder / name)!r}: {error.strerror}; give another --out") from None
    say(f"wrote {folder / name}")


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
    if logging.lastResort is not None:  # what prints our own warnings, in the form of all others, and notes
        logging.lastResort.setFormatter(Marked())
        logging.lastResort.setLevel(logging.INFO)
        logging.getLogger("autodiffusion_optuna").setLevel(logging.INFO)
    try:
        code = app(prog_name="adopt", standalone_mode=False)
    except AdoptError as error:
        _fail(str(error))
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)  # type: ignore[attr-defined]
            sys.exit(1)
        said = error.format_message().replace("Value error, ", "")  # type: ignore[attr-defined]
        _fail(f"{said} Try {program()} --help")
    except (KeyboardInterrupt, typer.Abort):
        err.print("stopped")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        from autodiffusion_optuna.storage.database import failure

        reason = failure(error)
        if reason is None:
            raise  # ours
        _fail(reason)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)
