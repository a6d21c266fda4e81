"""``adopt reference``: build reference statistics, look into them, fetch an extractor's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from autodiffusion_optuna.cli.completion import EXTRACTORS, MODES, one_of
from autodiffusion_optuna.cli.output import err, out, say, warn
from autodiffusion_optuna.cli.places import check_out

if TYPE_CHECKING:
    from autodiffusion_optuna.config import Mode
    from autodiffusion_optuna.evaluation.references.formats import ReferenceData

reference_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Build and inspect what generated images are compared with."
)

Force = Annotated[bool, typer.Option("--force", help="Overwrite the file.")]


@reference_app.command()
def build(
    images: Annotated[Path, typer.Option("--images", help="Folder, zip, npz or npy of images of one size.")],
    extractor: Annotated[
        str,
        typer.Option(
            "--extractor", help=f"As in the study file: {', '.join(EXTRACTORS)}.", autocompletion=one_of(EXTRACTORS)
        ),
    ],
    path: Annotated[Path, typer.Option("--out", help="File to write (npz).")],
    weights: Annotated[Path | None, typer.Option("--weights", help="Local weights, where it ships with none.")] = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            metavar=f"[{'|'.join(MODES)}]",
            help="Inception's resize, as clean-fid names it.",
            autocompletion=one_of(MODES),
        ),
    ] = "clean",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    trust: Annotated[bool, typer.Option("--trust", help="Allow weights that are code.")] = False,
    force: Force = False,
) -> None:
    """Embed images and write their statistics, for score.reference."""
    check_out(path, "the statistics", "reference.npz", force=force)
    from autodiffusion_optuna.evaluation.features import check_extractor, load_extractor
    from autodiffusion_optuna.evaluation.models import find_device
    from autodiffusion_optuna.evaluation.references.formats import require_reference
    from autodiffusion_optuna.evaluation.references.reference import build_reference_from, save_reference, too_few

    require_reference(images)
    check_extractor(extractor, weights, trust, cast("Mode", mode))
    loaded = load_extractor(extractor, find_device(device), weights, trust, mode=cast("Mode", mode))
    with _progress() as on_images:
        reference = build_reference_from(images, loaded, on_images=on_images)
    save_reference(path, reference)
    few = too_few(reference.n or 0, len(reference.mu))
    warn([*reference.notes, *([few] if few else [])])
    say(f"wrote {path}: {reference.n:,} images, {len(reference.mu):,} features each")


@reference_app.command()
def show(file: Annotated[Path, typer.Argument(help="Statistics in any format, or images.")]) -> None:
    """What a file of statistics or images holds, and what made it."""
    from autodiffusion_optuna.evaluation.references.formats import read_reference_data

    table = Table("", Column(overflow="fold"), box=None, show_header=False, pad_edge=False)
    for name, value in [("file", str(file)), *_facts(read_reference_data(file))]:
        table.add_row(name, value)
    out.print(table)


@reference_app.command()
def weights(
    kind: Annotated[str, typer.Argument(help="inception, inception-legacy-pytorch or clip.")],
    path: Annotated[Path, typer.Option("--out", help="File to write.")],
    sha256: Annotated[str | None, typer.Option("--sha256", help="Its hash, if not the known one.")] = None,
) -> None:
    """Download an extractor's published weights. Kept only where their hash is right."""
    from autodiffusion_optuna.evaluation.features.weights import PUBLISHED, download_weights

    if kind in PUBLISHED:
        err.print(f"downloading {PUBLISHED[kind].url}")
    fetched = download_weights(kind, path, sha256)
    verb = "wrote" if fetched else "already there, unchanged:"
    say(f"{verb} {path} ({PUBLISHED[kind].use})")


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A callback for every batch: a bar on a terminal, a line every tenth elsewhere, both on stderr."""
    if not err.is_terminal:
        tenth = -1

        def plain(done: int, total: int) -> None:
            nonlocal tenth
            if done * 10 // total != tenth:
                tenth = done * 10 // total
                err.print(f"{done:,} of {total:,} images")

        yield plain
        return
    columns = TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("images", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _facts(data: ReferenceData) -> list[tuple[str, str]]:
    """Name and value of everything known."""
    facts = [("holds", data.what)]
    if data.meta is not None:
        meta = data.meta
        facts += [("extractor", meta.extractor), ("fingerprint", meta.fingerprint), ("dataset", meta.dataset)]
    for part in data.statistics:
        if data.meta is None:
            made_by = f"{part.extractor}{f', mode {part.mode}' if part.mode else ''}" if part.extractor else "not said"
            facts.append(("extractor", made_by))
        facts.append(("n", "not said" if part.n is None else f"{part.n:,}"))
        if part.mu is not None and part.sigma is not None:
            facts.append(("dim", f"{part.mu.size:,}"))
            facts.append(("trace", f"{part.sigma.trace():.6g}" if part.sigma.ndim == 2 else "none"))
        if part.features is not None:
            facts.append(("features", " x ".join(f"{length:,}" for length in part.features.shape)))
    if data.meta is not None:
        facts.append(("channels", str(meta.channels or "not said")))
        facts.append(("size", f"{meta.size[1]}x{meta.size[0]}" if meta.size else "not said"))
        facts += [("note", note) for note in meta.notes]
    if data.images is not None:
        channels, height, width = data.images.shape
        more = f" and {len(data.images.others):,} others" if data.images.others else ""
        facts += [("images", f"{data.images.total:,}"), ("channels", str(channels))]
        facts.append(("size", f"{width}x{height}{more}"))
        facts += [("note", note) for note in data.images.notes]
    return facts
