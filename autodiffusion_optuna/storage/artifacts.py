"""Pictures of notable trials, kept as Optuna artifacts in a folder or a bucket. Torch-free."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore, GCSArtifactStore, get_all_artifact_meta
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from autodiffusion_optuna.errors import StorageError
from autodiffusion_optuna.images import square_grid
from autodiffusion_optuna.storage.attrs import BASELINE, GENERATION, NOTABLE
from autodiffusion_optuna.storage.study_storage import id_of_study, id_of_trial
from autodiffusion_optuna.storage.url import sqlite_path

ATTR = "artifacts:"
"""Prefix of the system attr that Optuna keeps for each artifact of a trial or a study: its id follows."""
EXTRAS = {"s3": "s3", "gs": "gcs"}
"""Scheme of a bucket's address -> the extra that brings its client."""
FILE = "samples.png"
"""Name under which the dashboard shows a picture."""
COMPARISON = "comparison.png"
"""Name of the study's own picture: what was found beside what it is compared with."""
OF_BASELINE, NEW_BEST, BEST_OF_GENERATION = "baseline", "new best", "best of its generation so far"
_log = logging.getLogger("autodiffusion_optuna")


@dataclass(frozen=True)
class Prefixed:
    """An artifact store whose files have names below ``prefix``: several studies may then share a bucket."""

    store: ArtifactStore
    prefix: str

    def open_reader(self, artifact_id: str) -> BinaryIO:  # noqa: D102 (as Optuna's stores have it)
        return self.store.open_reader(f"{self.prefix}/{artifact_id}")

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:  # noqa: D102
        self.store.write(f"{self.prefix}/{artifact_id}", content_body)

    def remove(self, artifact_id: str) -> None:  # noqa: D102
        self.store.remove(f"{self.prefix}/{artifact_id}")


ArtifactStore: TypeAlias = FileSystemArtifactStore | Boto3ArtifactStore | GCSArtifactStore | Prefixed


def default_folder(url: str) -> str | None:
    """Folder for the pictures of a SQLite database's studies, beside it; None for other databases."""
    file = sqlite_path(url)
    return None if file is None else str(file.absolute().with_name(f"{file.stem}-artifacts"))


def stored_location(location: str, url: str) -> str:
    """A location as a study in the database at ``url`` keeps it.

    A folder in that of a SQLite file is kept relative to it, so that both may be moved; any other folder is absolute,
    for workers may start elsewhere.
    """
    if "://" in location or not location.strip():
        return location
    folder, file = Path(os.path.abspath(location)), sqlite_path(url)
    home = None if file is None else os.path.abspath(file.parent)
    return str(folder.relative_to(home)) if home and folder.is_relative_to(home) else str(folder)


def location_of(stored: str, url: str) -> str:
    """Inverse of ``stored_location``: what ``open_store`` takes."""
    file = sqlite_path(url)
    return stored if "://" in stored or file is None else str(file.absolute().parent / stored)


def open_store(location: str, *, write: bool = True) -> ArtifactStore:
    """The artifact store at a folder's path, ``s3://bucket[/prefix]`` or ``gs://bucket[/prefix]``.

    A folder is created if its parent exists; with ``write`` False it is only read, and must be there. Whether a bucket
    can be written shows with the first picture. Raises StorageError, one line without passwords, for an unknown
    address, a folder that is missing or cannot be written, a client that is not installed or finds no credentials.
    """
    scheme, separator, rest = location.partition("://")
    if not separator:
        return _folder(location, write)
    if scheme not in EXTRAS:
        raise StorageError(
            f"artifacts {shown(location)!r}: no store for {scheme}://; give a folder, s3://BUCKET/PREFIX or "
            "gs://BUCKET/PREFIX"
        )
    bucket, _, prefix = rest.partition("/")
    if not re.fullmatch(r"[\w.-]+", bucket):
        raise StorageError(f"artifacts {shown(location)!r} names no bucket; write {scheme}://BUCKET/PREFIX")
    store = _bucket(scheme, bucket, location)
    return Prefixed(store, prefix.strip("/")) if prefix.strip("/") else store


def check_store(location: str) -> None:
    """StorageError where ``open_store`` would raise it. Nothing is created."""
    path = Path(location)
    if "://" in location or not location.strip() or path.exists():
        open_store(location)
    else:
        with _folder_errors(location), tempfile.TemporaryFile(dir=path.parent):
            pass


def _folder(location: str, write: bool) -> ArtifactStore:
    path = Path(location)
    if not location.strip():
        raise StorageError("artifacts '' names no folder; give a path, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    if not write:
        if not path.is_dir():
            raise StorageError(f"artifact folder {location!r} does not exist; say with --artifacts where it is")
        return FileSystemArtifactStore(path)
    with _folder_errors(location):
        path.mkdir(exist_ok=True)
        # Tried rather than asked: root is told yes on a read-only mount.
        with tempfile.TemporaryFile(dir=path):
            pass
    return FileSystemArtifactStore(path)


@contextlib.contextmanager
def _folder_errors(location: str) -> Iterator[None]:
    """What the system says of a folder, as StorageError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot write artifact folder {location!r}: {reason}; give another folder with --artifacts"
        ) from None


def _bucket(scheme: str, bucket: str, location: str) -> ArtifactStore:
    kind = Boto3ArtifactStore if scheme == "s3" else GCSArtifactStore
    try:
        return kind(bucket)
    except ImportError:
        raise StorageError(
            f"artifacts {shown(location)!r} need a package that is not installed: "
            f'pip install "autodiffusion-optuna[{EXTRAS[scheme]}]"'
        ) from None
    except Exception as error:  # the clients' errors have no common base
        raise StorageError(f"cannot open artifacts {shown(location)!r}: {reason_of(error)}") from None


def shown(location: str) -> str:
    """The address without what may be a password."""
    return re.sub(r"//.*@", "//***@", location)


def notable(trials: Sequence[FrozenTrial], number: int, value: float, attrs: Mapping[str, Any]) -> str | None:
    """Why trial ``number``, about to finish with ``value``, deserves a picture; None where it does not.

    ``trials``: all of the study. ``attrs``: the user attributes of the trial. It does as a baseline, as a new
    best, or as the best of its generation so far.
    """
    if BASELINE in attrs:
        return OF_BASELINE
    others = [t for t in trials if t.state == TrialState.COMPLETE and t.values and t.number != number]
    if all(value < t.values[0] for t in others):
        return NEW_BEST
    generation = attrs.get(GENERATION)
    siblings = [t for t in others if t.user_attrs.get(GENERATION) == generation]
    return BEST_OF_GENERATION if generation is not None and all(value < t.values[0] for t in siblings) else None


def attach_picture(trial: optuna.Trial, store: ArtifactStore, images: NDArray[np.uint8], why: str) -> bool:
    """Keep a picture of a running trial's first images and note ``why``; whether it has one then.

    ``images``: uint8 [N, C, H, W] with C = 1 or 3, of which up to 16 are drawn. Must come before the trial is finished.
    A trial that was taken back after its picture was kept is left that one. A store that fails costs the picture,
    never the trial, and is warned of; errors of the study's database are raised.
    """
    if all(kept.filename != FILE for kept in get_all_artifact_meta(trial)):
        picture = str(uuid.uuid4())
        try:
            # The content first: what the database lists, the dashboard shows. Optuna's upload_artifact lists it first.
            store.write(picture, io.BytesIO(square_grid(images)))
        except Exception as error:  # the errors of buckets' clients have no common base
            _remove(store, picture)
            _warn_of(error)
            return False
        meta = {"artifact_id": picture, "filename": FILE, "mimetype": "image/png", "encoding": None}
        try:
            trial.storage.set_trial_system_attr(id_of_trial(trial), ATTR + picture, json.dumps(meta))
        except Exception:
            _remove(store, picture)
            raise
    trial.set_user_attr(NOTABLE, why)
    return True


def comparison_of(study: optuna.Study, storage: BaseStorage) -> dict[str, Any]:
    """What is listed of the study's own picture: its id, and under ``content`` what is on it; empty without one."""
    listed = storage.get_study_system_attrs(id_of_study(study))
    metas = (json.loads(value) for key, value in listed.items() if key.startswith(ATTR))
    # The dashboard leaves null where one was removed, over which Optuna's own reader falls.
    return next((meta for meta in metas if meta and meta["filename"] == COMPARISON), {})


def keep_comparison(study: optuna.Study, storage: BaseStorage, store: ArtifactStore, png: bytes, content: str) -> None:
    """Keep the study's own picture, in place of an earlier one; ``content``: what is on it.

    A store that fails costs the picture, and is warned of; errors of the study's database are raised.
    """
    study_id, begun = id_of_study(study), study.get_trials(deepcopy=False)[0].datetime_start
    # One id for a study, so that two workers that end together keep one picture; studies may share a bucket.
    own = str(uuid.uuid5(uuid.NAMESPACE_URL, f"{storage.get_study_name_from_id(study_id)}/{study_id}/{begun}"))
    picture = comparison_of(study, storage).get("artifact_id", own)
    try:
        store.write(picture, io.BytesIO(png))
    except Exception as error:  # the errors of buckets' clients have no common base
        _warn_of(error)
        return
    meta = {"artifact_id": picture, "filename": COMPARISON, "mimetype": "image/png", "encoding": None}
    storage.set_study_system_attr(study_id, ATTR + picture, json.dumps({**meta, "content": content}))


def _remove(store: ArtifactStore, picture: str) -> None:
    """Take away what may be half written."""
    with contextlib.suppress(Exception):
        store.remove(picture)


WARNED: set[type[Exception]] = set()
"""Kinds of trouble that this process has warned of."""


def _warn_of(error: Exception) -> None:
    """Say why a picture could not be kept, once for each kind of trouble: a search may have hundreds of pictures."""
    if type(error) in WARNED:
        return
    WARNED.add(type(error))
    why = reason_of(error)
    _log.warning("pictures are not kept (%s); the search goes on without. Fix it, or give another --artifacts", why)


def reason_of(error: Exception) -> str:
    """Why a store failed, in a few words without passwords."""
    reason = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), "")
    return shown(reason) or type(error).__name__
