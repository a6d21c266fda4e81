"""adopt report: a study as a page to send to others."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autodiffusion_optuna.cli.output import (
    Places,
    StorageUrl,
    StudyName,
    Trust,
    err,
    existing,
    load_image_components,
    say,
    warn,
)
from autodiffusion_optuna.cli.places import check_out
from autodiffusion_optuna.errors import AdoptError, ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autodiffusion_optuna.results.summary import StudySummary


def report(
    study: StudyName,
    path: Annotated[Path, typer.Option("--out", help="Page to write (HTML).")],
    storage: StorageUrl = None,
    images: Annotated[int, typer.Option("--images", min=1, max=64, help="Noises to draw.")] = 8,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Without samples; needs no model.")] = False,
    places: Places = None,
    trust: Trust = False,
) -> None:
    """Write one page with the result and its figures.

    With pictures; it opens anywhere, without a network.
    """
    from autodiffusion_optuna.report.page import page
    from autodiffusion_optuna.results.summary import read_summary
    from autodiffusion_optuna.storage.url import storage_option, storage_url

    check_out(path, "the page", "report.html")
    url = storage_url(storage)
    tail = storage_option(url)
    # Read once: drawing takes minutes, in which a running study may find another winner.
    summary = read_summary(existing(study, url)[1])
    known = summary.warnings(tail)
    text = page(
        summary,
        pictures=() if no_pictures or not summary.best else _pictures(summary, url, images, places, trust),
        notes=known,
        tail=tail,
        written=f"{datetime.now():%Y-%m-%d}",
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}; give another --out") from None
    say(f"wrote {path}")
    warn(known)


def _pictures(
    summary: StudySummary, url: str, images: int, places: list[str] | None, trust: bool
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Samples from the same held-out noises, see ``pictures.rows_of``; none, with a warning, without the model."""
    from autodiffusion_optuna.study import pictures

    try:
        components = load_image_components(summary.config.name, url, trust, places)[1]
        rows = pictures.rows_of(components, summary)
        err.print(f"drawing {images} images with each of {len(rows)} candidates …")
        return pictures.samples(components, rows, images)
    except AdoptError as error:
        warn([f"the page has no pictures: {' '.join(str(error).split())}"])
        return []
