"""Renames, copies and deletes studies. Needs Optuna, never torch."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import sqlalchemy
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError

from autodiffusion_optuna.config import NAME_PATTERN
from autodiffusion_optuna.errors import ConfigError, StorageError, StudyError
from autodiffusion_optuna.storage.artifacts import ATTR, location_of, open_store, reason_of, shown, stored_location
from autodiffusion_optuna.storage.attrs import ARTIFACTS, CONFIG, OWNER
from autodiffusion_optuna.storage.lease import is_dead, owner
from autodiffusion_optuna.storage.studies import load_study, study_names
from autodiffusion_optuna.storage.study_storage import StudyStorage, id_of_study, id_of_trial

if TYPE_CHECKING:
    from autodiffusion_optuna.storage.artifacts import ArtifactStore

NOTE = re.compile(r"^dashboard:(\d+):(note_\w+.*)$")
"""Study system attr in which optuna-dashboard keeps a part of the note of the trial with that database id."""
COPYING = "{} (being copied)"
"""Name of a copy until it is complete; no study of adopt's can have it, see ``config.NAME_PATTERN``."""

OnCopied = Callable[[int, int], None]


@dataclass(frozen=True)
class Deleted:
    """What became of a deleted study's pictures: how many are removed; ids of those that are left in the store, why."""

    removed: int
    left: tuple[str, ...] = ()
    why: str = ""


def check_name(name: str) -> None:
    """ConfigError where no study may be called that."""
    if not re.fullmatch(NAME_PATTERN, name) or name.endswith("\n"):
        raise ConfigError(
            f"{name!r} cannot be a study's name; use letters, digits, '.', '_' and '-', a letter or digit first"
        )


def rename_study(storage: StudyStorage, old: str, new: str, *, force: bool = False) -> None:
    """Give a study another name; trials, pictures, notes and plots stay as they are.

    Raises ConfigError for a name that cannot be one, and StudyError where the study is missing, was not made by adopt
    or is being run (unless ``force``), or where ``new`` exists. Nothing is changed then.
    """
    check_name(new)
    study = load_study(storage, old)
    with storage.locked(study):  # no worker begins a trial between the check and the change
        _check_at_rest(study, force)
        _check_free(storage, new)
        _set_name(storage, id_of_study(study), new, study.user_attrs[CONFIG])


def copy_study(
    storage: StudyStorage,
    old: str,
    new: str,
    target: Callable[[], StudyStorage] | None = None,
    *,
    force: bool = False,
    on_copied: OnCopied | None = None,
) -> None:
    """Copy a study within a database, or to the one that ``target`` opens, with pictures of its own.

    The copy goes on exactly as the original would; a trial that is running is waiting in the copy. ``on_copied`` is
    called with (trials copied, trials in all). Until all is there the copy has another name and no config: one that was
    killed is no study of adopt's, and is removed when it is tried again. Raises as ``rename_study`` does.
    """
    check_name(new)
    study = load_study(storage, old)
    _check_at_rest(study, force)
    destination = storage if target is None else target()
    _check_free(destination, new)
    with _unfinished_copy(destination, new, force) as copy_id:
        _copy_into(study, storage, destination, copy_id, on_copied)
        _set_name(destination, copy_id, new, study.user_attrs[CONFIG])


def delete_study(storage: StudyStorage, name: str, *, force: bool = False) -> Deleted:
    """Delete a study and the pictures that are its alone.

    Raises as ``rename_study`` does, and StorageError where the pictures cannot be removed: the study is kept then, but
    with ``force`` deleted without them.
    """
    study = load_study(storage, name)
    with storage.locked(study):  # a trial begun meanwhile would be left behind without its study
        _check_at_rest(study, force)
        return _delete(storage, id_of_study(study), leave_pictures=force)


def _check_at_rest(study: optuna.Study, force: bool) -> None:
    """StudyError where somebody runs the study."""
    # A worker on another host, or one that has no name, may be alive.
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    workers = [name for t in running if not is_dead(name := str(t.user_attrs.get(OWNER, "unknown")))]
    if workers and not force:
        raise StudyError(
            f"study {study.study_name!r} is being run: {len(workers)} running trials of "
            f"{', '.join(sorted(set(workers)))}; "
            "stop its workers first, or give --force"
        )


def _check_free(storage: StudyStorage, name: str) -> None:
    if name in study_names(storage):
        raise StudyError(f"a study {name!r} exists already; choose another name, or delete it first")


def _set_name(storage: StudyStorage, study_id: int, name: str, config: Mapping[str, Any]) -> None:
    """Name and config in one transaction. By SQL: Optuna has no rename, and its copy loses pictures and notes."""
    studies = sqlalchemy.table("studies", sqlalchemy.column("study_id"), sqlalchemy.column("study_name"))
    rename = studies.update().where(studies.c.study_id == study_id).values(study_name=name)
    named = {**config, "name": name}
    try:
        storage.in_one_transaction((rename,), lambda: storage.rdb.set_study_user_attr(study_id, CONFIG, named))
    except IntegrityError:  # made by another process a moment ago
        raise StudyError(f"a study {name!r} exists already; choose another name, or delete it first") from None


@contextmanager
def _unfinished_copy(storage: StudyStorage, name: str, force: bool) -> Iterator[int]:
    """Id of an empty study to copy into; removed again, with what it holds, where the copy does not come to its end."""
    temporary = COPYING.format(name)
    if temporary in study_names(storage):
        left = storage.get_study_id_from_name(temporary)
        copier = storage.get_study_user_attrs(left).get(OWNER)
        if copier is not None and not is_dead(copier) and not force:
            raise StudyError(f"{name!r} is being copied by {copier}; wait for it, or give --force where it is dead")
        _delete(storage, left)
    study = optuna.create_study(study_name=temporary, storage=storage, direction="minimize")
    study.set_user_attr(OWNER, owner())
    study_id = storage.get_study_id_from_name(temporary)
    try:
        yield study_id
    except BaseException:
        _delete(storage, study_id, leave_pictures=True)
        raise


def _copy_into(
    study: optuna.Study, storage: StudyStorage, destination: StudyStorage, copy_id: int, on_copied: OnCopied | None
) -> None:
    """Copy everything but name and config; Optuna's ``copy_study`` writes those first, and mixes up trials' notes."""
    location = _location(storage, study.user_attrs)
    store = None if location is None else _open_store(location)
    if location is not None:  # first, so that pictures of a copy that was killed can be found
        destination.set_study_user_attr(copy_id, ARTIFACTS, stored_location(location, _url(destination)))
    trials = study.get_trials(deepcopy=False)
    new_ids: dict[int, int] = {}
    for count, trial in enumerate(trials, 1):
        attrs, pictures = _with_own_pictures(trial.system_attrs)
        new_ids[id_of_trial(trial)] = destination.create_new_trial(copy_id, _template(trial, attrs))
        _copy_pictures(store, location, pictures)
        if on_copied is not None:
            on_copied(count, len(trials))
    system_attrs, pictures = _with_own_pictures(storage.get_study_system_attrs(id_of_study(study)))
    for key, value in system_attrs.items():
        note = NOTE.match(key)
        own = f"dashboard:{new_ids.get(int(note[1]))}:{note[2]}" if note else key
        destination.set_study_system_attr(copy_id, own, value)
    _copy_pictures(store, location, pictures)
    for key, value in study.user_attrs.items():
        if key not in (CONFIG, ARTIFACTS):
            destination.set_study_user_attr(copy_id, key, value)


def _template(trial: FrozenTrial, system_attrs: dict[str, Any]) -> FrozenTrial:
    """What a trial is created from. One that is running has no worker in the copy: it waits, with what it has."""
    template = copy(trial)
    template.system_attrs = system_attrs
    if trial.state == TrialState.RUNNING:
        template.state = TrialState.WAITING
    return template


def _with_own_pictures(attrs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """System attrs with a new id for every artifact, and {old id: new id}."""
    own: dict[str, Any] = {}
    ids: dict[str, str] = {}
    for key, value in attrs.items():
        if key.startswith(ATTR) and json.loads(value) is None:
            continue  # removed
        if key.startswith(ATTR):
            old, new = key.removeprefix(ATTR), str(uuid.uuid4())
            ids[old] = new
            own[ATTR + new] = json.dumps({**json.loads(value), "artifact_id": new})
        else:
            own[key] = value
    return own, ids


def _copy_pictures(store: ArtifactStore | None, location: str | None, ids: Mapping[str, str]) -> None:
    if store is None:
        return
    for old, new in ids.items():
        with _storage_error("copy", location), store.open_reader(old) as picture:
            store.write(new, picture)


@contextmanager
def _storage_error(what: str, location: str | None) -> Iterator[None]:
    """Errors of a store as StorageError, one line; none for a picture that was lost before."""
    try:
        yield
    except ArtifactNotFound:
        pass
    except Exception as error:  # the errors of buckets' clients have no common base
        where = shown(location or "")
        raise StorageError(f"cannot {what} pictures in {where!r}: {reason_of(error)}; fix that and try again") from None


def _delete(storage: StudyStorage, study_id: int, *, leave_pictures: bool = False) -> Deleted:
    """Delete pictures, then the study: a delete that was killed can be repeated.

    StorageError, and the study is kept, where a picture cannot be removed; with ``leave_pictures`` it is deleted.
    """
    location = _location(storage, storage.get_study_user_attrs(study_id))
    left = [] if location is None else _own_pictures(storage, study_id)
    removed, why = 0, ""
    try:
        store = _open_store(location) if location is not None and left else None
        while left:
            if store is not None:
                with _storage_error("remove", location):
                    store.remove(left[0])
                    removed += 1
            del left[0]
    except StorageError as error:
        if not leave_pictures:
            raise StorageError(f"{error}, or give --force to delete the study and leave its pictures") from None
        why = str(error)
    storage.delete_study(study_id)
    return Deleted(removed, tuple(left), why)


def _own_pictures(storage: StudyStorage, study_id: int) -> list[str]:
    """Ids of a study's pictures that no other study has."""
    # Optuna's copy and the dashboard's rename leave two studies with the same pictures: those stay.
    own, others = _picture_ids(storage, study_id), set[str]()
    for study in storage.get_all_studies():
        if own and id_of_study(study) != study_id:
            others |= _picture_ids(storage, id_of_study(study))
    return sorted(own - others)


def _picture_ids(storage: StudyStorage, study_id: int) -> set[str]:
    """Ids of all artifacts of a study and its trials."""
    trials = storage.get_all_trials(study_id, deepcopy=False)
    keys = [*storage.get_study_system_attrs(study_id), *(key for trial in trials for key in trial.system_attrs)]
    return {key.removeprefix(ATTR) for key in keys if key.startswith(ATTR)}


def _url(storage: StudyStorage) -> str:
    return storage.engine.url.render_as_string(hide_password=False)


def _location(storage: StudyStorage, attrs: Mapping[str, Any]) -> str | None:
    """Where the pictures of a study with these user attributes are, as ``open_store`` takes it."""
    stored = attrs.get(ARTIFACTS)
    return None if stored is None else location_of(stored, _url(storage))


def _open_store(location: str) -> ArtifactStore | None:
    """The store of a study's pictures; None for a folder that is gone, and the pictures with it."""
    return None if "://" not in location and not Path(location).is_dir() else open_store(location)
