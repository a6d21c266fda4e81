"""Lists that users give: as starts and baselines of a search, and beside the winner of a study."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import optuna

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import SearchConfig
from autodiffusion_optuna.errors import ConfigError, choose_from
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.results.held_out import stored_held_out
from autodiffusion_optuna.results.summary import Row, StudySummary
from autodiffusion_optuna.search.lists import NamedList, looks_like_list, read_lists
from autodiffusion_optuna.search.repair import spread
from autodiffusion_optuna.search.space import SearchSpace
from autodiffusion_optuna.storage.trials import values_by_key

if TYPE_CHECKING:
    from autodiffusion_optuna.study.components import ImageComponents, StudyComponents

ALL = "all"
"""Stands for every baseline in ``search.warm_starts``."""
ROWS = ("best found", "adopt", "uniform")
"""Names that tables and pictures have for candidates of their own."""


@dataclass(frozen=True)
class WarmStarts:
    """What a search starts from: ``names`` in their order, and the ``lists`` among them that are no known baselines.

    ``chosen``: whether they were named one by one; all of them are then evaluated before anything else.
    """

    names: tuple[str, ...]
    lists: tuple[NamedList, ...] = ()
    chosen: bool = True


def read_warm_starts(
    search: SearchConfig, known: Collection[str], schedule: NoiseSchedule, space: SearchSpace
) -> WarmStarts:
    """What ``search.warm_starts`` asks for; ``known``: names of the baselines.

    A list of a number of steps that the search does not try is interpolated to the nearest that it does, with a note.
    ``ConfigError`` for a name that does not exist, and for what is no list.
    """
    given = search.warm_starts
    if given is None:
        given = ["uniform"] if search.preset == "paper" else True
    if isinstance(given, bool):
        return WarmStarts(tuple(known) if given else (), chosen=False)
    entries = [entry if isinstance(entry, str) else str(entry) for entry in given]
    names_of_all = {*known, ALL}
    for entry in entries:
        if entry not in names_of_all and not looks_like_list(entry):
            raise ConfigError("search.warm_starts: " + choose_from("baseline", entry, names_of_all))
    try:
        read = read_lists([entry for entry in entries if entry not in names_of_all], schedule, {*names_of_all, *ROWS})
    except ConfigError as error:
        raise ConfigError(f"search.warm_starts: {error}") from None
    lists = [_fitted(one, schedule, space) for one in read]
    labels, names = iter(lists), list[str]()
    for entry in entries:
        names += known if entry == ALL else [entry if entry in known else next(labels).label]
    return WarmStarts(tuple(dict.fromkeys(names)), tuple(lists))


def _fitted(given: NamedList, schedule: NoiseSchedule, space: SearchSpace) -> NamedList:
    """A list of as many steps, and as far apart, as the search tries."""
    steps = min(max(len(given.timesteps), space.min_steps), space.full_steps)
    fitted = given.resampled(schedule, steps, space.min_gap)
    apart = spread(fitted.timesteps, schedule.T, space.min_gap)
    if apart == fitted.timesteps:
        return fitted
    note = f"{given.label}: timesteps moved to lie at least sampling.min_gap = {space.min_gap} apart"
    return replace(fitted, timesteps=apart, notes=(*fitted.notes, note))


def check_lists(texts: Iterable[str], summary: StudySummary) -> None:
    """``ConfigError`` as ``beside_winner``, from what is stored with the study: no model is loaded."""
    read_lists(texts, summary.noise, {*(row.name for row in summary.baselines), *ROWS})


def beside_winner(
    texts: Iterable[str], components: StudyComponents | ImageComponents, winner: Candidate
) -> tuple[dict[str, Candidate], list[str]]:
    """Candidates of the lists by label, with the winner's settings and every layer on; and what was changed in them.

    They keep their own number of steps. ``ConfigError`` as ``read_list``.
    """
    lists = read_lists(texts, components.model.schedule, {*components.baselines, *ROWS})
    found = {read.label: Candidate(read.timesteps, settings=winner.settings) for read in lists}
    return found, [note for read in lists for note in read.notes]


def with_lists(
    summary: StudySummary,
    components: StudyComponents,
    study: optuna.Study,
    lists: Mapping[str, Candidate],
    size: tuple[int, int],
) -> StudySummary:
    """A summary with a row for each list; ``size``: (images, banks) that they were scored on."""
    from autodiffusion_optuna.study.components import relative_cost

    values = values_by_key(study)
    rows = [
        Row(
            name=label,
            candidate=candidate,
            cost=relative_cost(components, candidate),
            value=values.get(candidate.key),
            held_out=stored_held_out(study.user_attrs, candidate.key, *size),
        )
        for label, candidate in lists.items()
    ]
    return replace(summary, baselines=[*summary.baselines, *rows])
