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
    load_components,
    say,
    warn,
)
from autodiffusion_optuna.errors import AdoptError, ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autodiffusion_optuna.candidate import Candidate


def report(
    study: StudyName,
    path: Annotated[Path, typer.Option("--out", help="Page to write (HTML).")],
    storage: StorageUrl = None,
    images: Annotated[int, typer.Option("--images", min=1, max=64, help="Noises to draw.")] = 8,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Without samples; needs no model.")] = False,
    places: Places = None,
    trust: Trust = False,
) -> None:
    """Write one page with the result, figures, pictures and how to apply it; it opens anywhere, without a network."""
    from autodiffusion_optuna.report.page import page
    from autodiffusion_optuna.results.summary import read_summary
    from autodiffusion_optuna.storage.url import storage_option, storage_url

    if not path.parent.is_dir():
        raise ConfigError(f"folder {str(path.parent)!r} for the page does not exist; create it or give another --out")
    if path.is_dir():
        raise ConfigError(f"--out {str(path)!r} is a folder; give a file: --out {path / 'report.html'}")
    url = storage_url(storage)
    tail = storage_option(url)
    # Read once: drawing takes minutes, in which a running study may find another winner.
    summary = read_summary(existing(study, url)[1])
    best = None if no_pictures else summary.best
    text = page(
        summary,
        pictures=_pictures(best.candidate, study, url, images, places, trust) if best else (),
        notes=summary.warnings(tail),
        tail=tail,
        written=f"{datetime.now():%Y-%m-%d}",
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}; give another --out") from None
    say(f"wrote {path}")


def _pictures(
    best: Candidate, study: str, url: str, images: int, places: list[str] | None, trust: bool
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Samples from the same held-out noises: uniform, then the best; none, with a warning, without the model."""
    from autodiffusion_optuna.study import validation

    try:
        components = load_components(study, url, trust, places)[1]
        err.print(f"drawing {images} images with each of two candidates …")
        return validation.samples(components, [("uniform", components.baselines["uniform"]), ("adopt", best)], images)
    except AdoptError as error:
        warn([f"the page has no pictures: {' '.join(str(error).split())}"])
        return []
