"""The command ``adopt``: its subcommands, and the only place where errors are caught and printed."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.cli.dashboard import dashboard
from autodiffusion_optuna.cli.output import (
    EXIT_INTERRUPTED,
    Overrides,
    ResultOption,
    StorageUrl,
    StudyName,
    StudyOption,
    Trust,
    err,
    existing,
    load_components,
    out,
    print_facts,
    print_table,
    say,
    warn,
)
from autodiffusion_optuna.cli.reference import reference_app
from autodiffusion_optuna.cli.run import run, status
from autodiffusion_optuna.cli.studies import storage_app, studies_app
from autodiffusion_optuna.cli.views import report
from autodiffusion_optuna.errors import AdoptError, ConfigError, choose_from
from autodiffusion_optuna.search.timesteps import uniform_timesteps
from autodiffusion_optuna.storage.url import storage_option, storage_url

if TYPE_CHECKING:
    from autodiffusion_optuna.export.result import Result
    from autodiffusion_optuna.study.components import StudyComponents
    from autodiffusion_optuna.study.transfer import Opened

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Search the timesteps and skipped layers of a frozen diffusion model.\n\n"
    "\b\nadopt run --study digits-4             search, resume, or say that it is finished\n"
    "adopt show --study digits-4            the best found beside the baselines\n"
    "adopt sample --study digits-4 --out grid.png",
)
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
    """The best candidate, the baselines beside it, evaluations run and saved, and the history."""
    from autodiffusion_optuna.results.summary import read_summary

    url = storage_url(storage)
    summary = read_summary(existing(study, url)[1])
    if as_json:
        print(json.dumps(summary.to_json(storage_option(url)), indent=2))
        return
    print_table(summary)
    print_facts(summary)
    warn(summary.warnings(storage_option(url)))


@app.command()
def score(
    study: StudyOption = None,
    result: ResultOption = None,
    model: Annotated[str | None, typer.Option("--model", help="With --result: another model to try it on.")] = None,
    images: Annotated[int | None, typer.Option("--images", help="Images a bank; default the study's.")] = None,
    banks: Annotated[int | None, typer.Option("--banks", help="Banks of held-out noise; default the study's.")] = None,
    overrides: Overrides = None,
    storage: StorageUrl = None,
    trust: Trust = False,
) -> None:
    """Score the winner and the baselines, or a result from a file, on held-out noise, with 95 % intervals."""
    given = {"images": images, "banks": banks}
    settings = [f"score.held_out_{name}={value}" for name, value in given.items() if value is not None]
    if _wants_result(study, result, model=model):
        assert result is not None
        source = [] if model is None else [f"model.source={json.dumps(model)}"]
        _score_result(result, [*source, *(overrides or []), *settings], trust)
    else:
        assert study is not None
        _score_study(study, overrides, settings, storage, trust)


def _score_study(study: str, places: list[str] | None, settings: list[str], storage: str | None, trust: bool) -> None:
    from autodiffusion_optuna.results.summary import read_summary
    from autodiffusion_optuna.study import validation

    url = storage_url(storage)
    found, components = load_components(study, url, trust, places, settings)
    candidates = dict.fromkeys([validation.best_candidate(found), *components.baselines.values()])
    size = components.config.score.held_out_images, components.config.score.held_out_banks
    for position, candidate in enumerate(candidates, 1):
        err.print(f"scoring {position} of {len(candidates)}: {candidate.key}")
        validation.score_held_out(components, found, candidate, *size)
    summary = read_summary(found, size)
    print_table(summary)
    warn(summary.warnings(storage_option(url)))


def _score_result(path: Path, overrides: list[str], trust: bool) -> None:
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
    for column in ("candidate", f"{components.metric_name(opened.components)}, {noise}", "timesteps"):
        table.add_column(column, overflow="fold")
    for name, held_out in scored.items():
        timesteps = " ".join(map(str, opened.compared[name].timesteps))
        table.add_row(name, f"{held_out.mean:.4g} ± {held_out.half_width:.2g}", timesteps)
    say(f"model {opened.components.model.name}, solver {opened.components.evaluator.sampling.solver}")
    out.print(table)
    warn(components.warnings(opened.components, settings.held_out_images))


def _open_result(path: Path, overrides: list[str], trust: bool) -> Opened:
    """An exported result on a model, with a warning where that is not the one it was found on."""
    from autodiffusion_optuna.export.result import Result
    from autodiffusion_optuna.study.transfer import open_result

    opened = open_result(Result.read(path), overrides, trust=trust)
    warn([opened.other] if opened.other else [])
    return opened


def _wants_result(study: str | None, result: Path | None, **others: object) -> bool:
    """Whether an exported result is meant rather than a study; ConfigError where neither is given, or both are."""
    if (study is None) == (result is None):
        given = "both --study and --result" if study else "neither --study nor --result"
        raise ConfigError(f"{given} given; name a study of the database, or a file of adopt export --format json")
    if result is not None:
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
    steps: Annotated[int, typer.Option("--many-steps", min=1, help="With --study: steps of the last row.")] = 100,
    overrides: Overrides = None,
    storage: StorageUrl = None,
    trust: Trust = False,
) -> None:
    """Draw the same noises with uniform steps and with the best candidate; of a study also with many steps."""
    from autodiffusion_optuna.images import draw_grid
    from autodiffusion_optuna.study import validation

    from_file = _wants_result(study, result)
    if not path.parent.is_dir():
        raise ConfigError(
            f"folder {str(path.parent)!r} for the picture does not exist; create it or give another --out"
        )
    if from_file:
        assert result is not None
        opened = _open_result(result, overrides or [], trust)
        components, named = opened.components, list(opened.compared.items())
    else:
        assert study is not None
        found, components = load_components(study, storage_url(storage), trust, overrides)
        named = [("uniform", components.baselines["uniform"]), ("adopt", validation.best_candidate(found))]
        named.append(("uniform", _uniform(components, steps)))
    draw_grid(validation.samples(components, named, images), path)
    say(f"wrote {path}")
    warn([*components.model.notes, *components.sanity])


def _uniform(components: StudyComponents, steps: int) -> Candidate:
    """Uniform timesteps, as many as ``--many-steps`` asks for."""
    T = components.model.schedule.T
    if steps > T:
        raise ConfigError(f"--many-steps {steps} is more than the model's {T} timesteps; give {T} or fewer")
    return Candidate(uniform_timesteps(T, steps))


@app.command()
def export(
    study: StudyName,
    form: Annotated[str, typer.Option("--format", help="diffusers, json or comfyui.")] = "diffusers",
    folder: Annotated[Path | None, typer.Option("--out", help="Folder to write to; default: print.")] = None,
    check: Annotated[
        bool, typer.Option(help="Compare the script's images with those of the search, where the model is here.")
    ] = True,
    storage: StorageUrl = None,
) -> None:
    """The best candidate as Python that applies it with diffusers, as JSON, or as sigmas for ComfyUI."""
    from autodiffusion_optuna.export.comfyui import comfyui_notes
    from autodiffusion_optuna.export.formats import FORMATS, file_name, result_of, result_text
    from autodiffusion_optuna.export.scripts import reads_json
    from autodiffusion_optuna.results.summary import read_summary

    form = "diffusers" if form == "python" else form
    if form not in FORMATS:
        raise ConfigError(choose_from("format", form, FORMATS))
    if folder is not None and not folder.absolute().parent.is_dir():
        raise ConfigError(f"folder {str(folder.parent)!r} does not exist; create it or give another --out")
    url = storage_url(storage)
    report = read_summary(existing(study, url)[1])
    result = result_of(report)
    text = result_text(result, form)
    if form == "diffusers" and check:
        text = _checked(result, text)
    warn(report.warnings(storage_option(url)))
    for note in comfyui_notes(result) if form == "comfyui" else []:
        err.print(note)
    beside = form == "diffusers" and reads_json(text)
    if folder is None:
        if beside:
            tail = storage_option(url)
            err.print(f"the script reads {study}.json: adopt export --study {study} --format json --out .{tail}")
        print(text, end="")
        return
    for name, content in {form: text, **({"json": result.text()} if beside else {})}.items():
        _write(folder, file_name(study, name), content)


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
    if logging.lastResort is not None:  # what prints our own warnings, in the form of all others
        logging.lastResort.setFormatter(logging.Formatter("warning: %(message)s"))
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
        from autodiffusion_optuna.storage.database import failure

        reason = failure(error)
        if reason is None:
            raise  # ours
        _fail(reason)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)
