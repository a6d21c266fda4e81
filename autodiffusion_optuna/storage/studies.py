"""Finds, loads and lists studies, and says whether a config measures what a study does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from pydantic import ValidationError

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.config import StudyConfig, differences, explain, flatten, missing_files
from autodiffusion_optuna.errors import StudyError, choose_from, program
from autodiffusion_optuna.storage.attrs import CONFIG, READY, RUNTIME, UNIT_COSTS, VERSION
from autodiffusion_optuna.storage.database import is_empty, open_storage
from autodiffusion_optuna.storage.study_storage import StudyStorage, id_of_study


def load_study(storage: StudyStorage, name: str) -> optuna.Study:
    """An existing study made by adopt (StudyError listing those there are)."""
    names = study_names(storage)
    if name not in names:
        if not names:
            raise StudyError(
                f"no study {name!r}: the database holds none yet; start one with {program()} run --study {name}"
            )
        raise StudyError(choose_from("study", name, names))
    study = optuna.load_study(study_name=name, storage=storage)
    if CONFIG not in study.user_attrs:
        if study.user_attrs or study.get_trials(deepcopy=False):
            raise StudyError(f"study {name!r} was not made by adopt; choose another")
        raise StudyError(
            f"study {name!r} is empty: it was not made by adopt, or whoever began it was stopped; choose another, or "
            "run it again as it was begun, with its study file or preset"
        )
    return study


def find_storage(url: str, *, known: bool = False) -> StudyStorage | None:
    """The database at ``url``, or None where there is none yet: looking never creates one. ``known``: it was there."""
    return None if is_empty(url, known=known) else open_storage(url, create=False, known=known)


def find_study(url: str, name: str, *, known: bool = False, ready: bool = True) -> optuna.Study | None:
    """A study made by adopt, or None where the database or the study does not exist or was never begun in full.

    ``known``: whether the database has answered before; it is then waited for. ``ready`` False: one whose beginning
    was cut off will do, if it says what it is.
    """
    storage = find_storage(url, known=known)
    if storage is None or name not in study_names(storage):
        return None
    study = optuna.load_study(study_name=name, storage=storage)
    needed = {CONFIG, READY} if ready else {CONFIG}
    return study if needed <= study.user_attrs.keys() else None


def require_same(study: optuna.Study, config: StudyConfig) -> None:
    """StudyError with the differences where a config measures something else than the study does."""
    changed = differences(stored_config(study), config)
    if changed:
        raise StudyError(
            f"study {config.name!r} was begun with other settings ({'; '.join(changed)}); "
            "run it with the old ones, or start another with --set name=NEW"
        )


def require_files(study: optuna.Study, config: StudyConfig, unneeded: str = "none") -> None:
    """StudyError where a file of a study that was begun elsewhere does not exist here, with what gives its place.

    ``unneeded``: the table of the config whose files are not looked for.
    """
    missing = [key for key in missing_files(config) if not key.startswith(f"{unneeded}.")]
    if missing:
        settings = flatten(config.model_dump(mode="json"))
        where = " and ".join(f"{key} = {settings[key]!r}" for key in missing)
        places = " ".join(f"--set {key}=PATH" for key in missing)
        raise StudyError(f"study {config.name!r} has {where}, not to be found here; say where it is now: {places}")


def stored_unit_costs(study: optuna.Study | None) -> dict[str, tuple[float, ...]] | None:
    """Shares that units save, by mode, as they were when the study was begun: latencies are not measured again."""
    costs = None if study is None else study.user_attrs.get(UNIT_COSTS)
    return None if costs is None else {mode: tuple(shares) for mode, shares in costs.items()}


def stored_batch(study: optuna.Study | None) -> int | None:
    """Images in one network evaluation when the study was begun; another batch computes other bits."""
    return None if study is None else (study.user_attrs.get(RUNTIME) or {}).get("batch")


def study_names(storage: StudyStorage) -> list[str]:
    """Names of all studies in a database."""
    return sorted(study.study_name for study in storage.get_all_studies())


def current_name(study: optuna.Study) -> str:
    """The study's name as it is now: others may have renamed it since it was opened (KeyError where it is deleted)."""
    storage = study._storage  # of a study that Optuna opened by itself, its own
    return storage.current_name(id_of_study(study)) if isinstance(storage, StudyStorage) else study.study_name


def is_deleted(study: optuna.Study) -> bool:
    """Whether a study that was opened is gone."""
    try:
        current_name(study)
    except KeyError:
        return True
    return False


@contextmanager
def still_there(study: optuna.Study) -> Iterator[None]:
    """StudyError where others delete the study meanwhile, of which Optuna says KeyError."""
    try:
        yield
    except KeyError:
        if not is_deleted(study):
            raise
        raise StudyError(f"study {study.study_name!r} was deleted meanwhile, with all that it had found") from None


def stored_config(study: optuna.Study) -> StudyConfig:
    """The config a study was last run with, under the study's present name.

    optuna-dashboard's rename and Optuna's ``copy_study`` leave the old name in the config, and may choose one that no
    study file could have: the name is not checked. StudyError for a config that only another version of adopt reads.
    """
    attrs, name = study.user_attrs, current_name(study)
    try:
        return StudyConfig.model_validate(attrs[CONFIG]).model_copy(update={"name": name})
    except ValidationError as error:
        reason = explain(error).partition(";")[0]
        raise StudyError(
            f"study {name!r} was written by adopt {attrs.get(VERSION)}, this is {__version__}: {reason}; "
            "install that version to go on with it, or choose another study"
        ) from None
