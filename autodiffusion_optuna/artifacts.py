"""Pictures of notable trials, kept as Optuna artifacts in a folder or a bucket. Torch-free."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore, GCSArtifactStore, upload_artifact
from optuna.exceptions import OptunaError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from autodiffusion_optuna import records
from autodiffusion_optuna.errors import StorageError
from autodiffusion_optuna.plots import square_grid

if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

EXTRAS = {"s3": "s3", "gs": "gcs"}
"""Scheme of a bucket's address -> the extra that brings its client."""
FILE = "samples.png"
"""Name under which the dashboard shows a picture."""
KNOWN, NEW_BEST, BEST_OF_GENERATION = "known schedule", "new best", "best of its generation so far"


@dataclass(frozen=True)
class Prefixed:
    """An artifact store whose files have names below ``prefix``: several studies may then share a bucket."""

    store: ArtifactStore
    prefix: str

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """A file to read (``ArtifactNotFound``)."""
        return self.store.open_reader(f"{self.prefix}/{artifact_id}")

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Keep a file's content."""
        self.store.write(f"{self.prefix}/{artifact_id}", content_body)

    def remove(self, artifact_id: str) -> None:
        """Forget a file (``ArtifactNotFound``)."""
        self.store.remove(f"{self.prefix}/{artifact_id}")


def open_store(location: str) -> ArtifactStore:
    """The artifact store at a folder's path, ``s3://bucket[/prefix]`` or ``gs://bucket[/prefix]``.

    A folder is created if its parent exists. Whether a bucket can be written shows with the first picture. Raises
    StorageError, one line without passwords, for an unknown address, a folder that cannot be written, a client that is
    not installed or finds no credentials.
    """
    scheme, separator, rest = location.partition("://")
    if not separator:
        return _folder(location)
    if scheme not in EXTRAS:
        raise StorageError(
            f"artifacts {_shown(location)!r}: no store for {scheme}://; give a folder, s3://BUCKET/PREFIX or "
            "gs://BUCKET/PREFIX"
        )
    bucket, _, prefix = rest.partition("/")
    if not re.fullmatch(r"[\w.-]+", bucket):
        raise StorageError(f"artifacts {_shown(location)!r} names no bucket; write {scheme}://BUCKET/PREFIX")
    store = _bucket(scheme, bucket, location)
    return Prefixed(store, prefix.strip("/")) if prefix.strip("/") else store


def _folder(location: str) -> ArtifactStore:
    path = Path(location)
    if not location.strip():
        raise StorageError("artifacts '' names no folder; give a path, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    try:
        path.mkdir(exist_ok=True)
        # Tried rather than asked: root is told yes on a read-only mount.
        with tempfile.TemporaryFile(dir=path):
            return FileSystemArtifactStore(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"cannot write artifact folder {location!r}: {reason}; give another folder") from None


def _bucket(scheme: str, bucket: str, location: str) -> ArtifactStore:
    kind = Boto3ArtifactStore if scheme == "s3" else GCSArtifactStore
    try:
        return kind(bucket)
    except ImportError:
        raise StorageError(
            f"artifacts {_shown(location)!r} need a package that is not installed: "
            f'pip install "autodiffusion-optuna[{EXTRAS[scheme]}]"'
        ) from None
    except Exception as error:  # the clients' errors have no common base
        reason = str(error).strip().partition("\n")[0]
        raise StorageError(f"cannot open artifacts {_shown(location)!r}: {reason}") from None


def _shown(location: str) -> str:
    """The address without what may be a password."""
    return re.sub(r"//.*@", "//***@", location)


def notable(trials: Sequence[FrozenTrial], number: int, value: float, attrs: Mapping[str, Any]) -> str | None:
    """Why trial ``number``, about to finish with ``value``, deserves a picture; None where it does not.

    ``trials``: all of the study. ``attrs``: the user attributes of the trial. It does as a known schedule, as a new
    best, or as the best of its generation so far.
    """
    if records.KNOWN_NAME in attrs:
        return KNOWN
    others = [t for t in trials if t.state == TrialState.COMPLETE and t.number != number]
    if all(value < t.values[0] for t in others):
        return NEW_BEST
    generation = attrs.get(records.GENERATION)
    siblings = [t for t in others if t.user_attrs.get(records.GENERATION) == generation]
    return BEST_OF_GENERATION if generation is not None and all(value < t.values[0] for t in siblings) else None


def attach_picture(trial: optuna.Trial, store: ArtifactStore, images: NDArray[np.uint8], why: str) -> bool:
    """Keep a picture of a running trial's first images and note ``why``; whether the store took it.

    ``images``: uint8 [N, C, H, W] with C = 1 or 3, of which up to 16 are drawn. Must come before the trial is finished.
    A store that fails costs the picture, never the trial; errors of the study's database are raised.
    """
    content = square_grid(images)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILE
            path.write_bytes(content)
            upload_artifact(artifact_store=store, file_path=str(path), study_or_trial=trial)
    except (OptunaError, SQLAlchemyError):
        raise
    except Exception:  # the errors of buckets' clients have no common base
        return False
    trial.set_user_attr(records.NOTABLE, why)
    return True
