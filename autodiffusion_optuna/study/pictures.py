"""Samples of what was found beside what it is compared with, all from the same noise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import optuna
from numpy.typing import NDArray

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.images import grid_png
from autodiffusion_optuna.results.captions import BEST, captions
from autodiffusion_optuna.results.summary import StudySummary, read_summary
from autodiffusion_optuna.search.timesteps import uniform_timesteps
from autodiffusion_optuna.storage.artifacts import ArtifactStore, comparison_of, keep_comparison
from autodiffusion_optuna.storage.study_storage import StudyStorage
from autodiffusion_optuna.study.components import ImageComponents, StudyComponents
from autodiffusion_optuna.study.validation import compared

ARTIFACT_IMAGES = 8
"""Columns of the picture that is kept with a study."""
MANY_STEPS = 100
"""Steps of the last row, unless the model has fewer timesteps: about what the model can do."""


def rows_of(
    components: StudyComponents | ImageComponents,
    summary: StudySummary,
    many: int | None = None,
    beside: Mapping[str, Candidate] | None = None,
) -> list[tuple[str, Candidate]]:
    """Captioned candidates to draw: uniform steps, the best found, and ``many`` uniform steps, all with one solver.

    ``beside``: others by name, drawn below the best found.
    Nothing where no candidate is finished. ConfigError where the model has fewer timesteps than ``many``.
    """
    if summary.best is None:
        return []
    T = components.model.schedule.T
    if many is not None and many > T:
        raise ConfigError(f"--many-steps {many} is more than the model's {T} timesteps; give {T} or fewer")
    uniform, best = (candidate for _, candidate in compared(components, summary.best.candidate))
    floor = summary.many_steps
    many = many or (MANY_STEPS if floor is None else floor.candidate.steps)
    last = Candidate(uniform_timesteps(T, min(many, T)), settings=best.settings)
    return captions(summary, [("uniform", uniform), (BEST, best), *(beside or {}).items(), ("many steps", last)])


def samples(
    components: StudyComponents | ImageComponents, captioned: Iterable[tuple[str, Candidate]], images: int
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Samples of candidates from the same held-out noises: (caption, uint8 [images, C, H, W]) of each."""
    return [(text, components.images.sample(c, 0, images, bank=1).cpu().numpy()) for text, c in captioned]


def keep(components: StudyComponents, study: optuna.Study, storage: StudyStorage, store: ArtifactStore | None) -> None:
    """Keep the comparison among the study's artifacts, unless it is there; nothing without a ``store``."""
    rows = rows_of(components, read_summary(study)) if store is not None else []
    content = "; ".join(f"{text} {candidate.key}" for text, candidate in rows)
    if store is not None and rows and comparison_of(study, storage).get("content") != content:
        keep_comparison(study, storage, store, grid_png(samples(components, rows, ARTIFACT_IMAGES)), content)
