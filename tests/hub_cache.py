"""A cache of the Hugging Face hub on disk, with one tiny model in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import write_ddpm

ID = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def use_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in ``folder`` for the rest of the test, with downloads forbidden."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder / "hub"


def fill_cache(hub: Path, write: Callable[[Path], object] = write_ddpm) -> Path:
    """A pipeline in the cache's standard layout: blobs, and a snapshot of links to them. Returns the snapshot."""
    place = hub / "models--someone--tiny"
    snapshot = place / "snapshots" / COMMIT
    for folder in (place / "blobs", place / "refs", snapshot):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    (place / "refs" / "small").write_text(COMMIT)
    source = hub.parent / "saved"
    write(source)
    for number, path in enumerate(path for path in source.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(source)
        link.parent.mkdir(exist_ok=True)
        shutil.copy(path, place / "blobs" / str(number))
        link.symlink_to(place / "blobs" / str(number))
    return snapshot
