"""Statistics of reference images are kept: never wrong, whatever happens to the images or to what is kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from autodiffusion_optuna.evaluation.features import Extractor, load_extractor
from autodiffusion_optuna.evaluation.references import cache as module
from autodiffusion_optuna.evaluation.references.reference import Reference, load_reference


class Counted:
    """The extractor ``pixels``, and how many images it has embedded."""

    def __init__(self) -> None:
        self.images, plain = 0, load_extractor("pixels", "cpu")

        def network(images: torch.Tensor) -> torch.Tensor:
            self.images += len(images)
            return plain.network(images)

        self.extractor = Extractor("pixels", plain.fingerprint, None, torch.device("cpu"), network)

    def load(self, path: Path) -> Reference:
        return load_reference(path, self.extractor)


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "deeper").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(12):
        place = folder / "deeper" if i % 2 else folder
        Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(place / f"{i}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


def same(one: Reference, other: Reference) -> bool:
    assert one.features is not None
    assert other.features is not None
    assert one.images is not None
    assert other.images is not None
    equal = torch.equal(one.mu, other.mu) and torch.equal(one.sigma, other.sigma)
    equal = equal and torch.equal(one.features, other.features) and torch.equal(one.images, other.images)
    facts = ("n", "fingerprint", "extractor", "dataset", "channels", "size", "notes", "digest")
    return equal and all(getattr(one, name) == getattr(other, name) for name in facts)


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "references").glob("*"))


def test_images_are_embedded_once_and_every_bit_is_the_same(counted: Counted, photos: Path, cache: Path) -> None:
    first = counted.load(photos)
    assert counted.images == 12
    again = counted.load(photos)
    assert counted.images == 12
    assert same(first, again)
    assert "left out" in again.notes[0]
    assert len(kept(cache)) == 1


def change_a_pixel(photos: Path) -> None:
    file = photos / "4.png"
    before = file.stat()
    pixels = np.array(Image.open(file))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a tool that keeps times would leave it


@pytest.mark.parametrize(
    "change",
    [
        change_a_pixel,
        lambda photos: (photos / "4.png").unlink(),
        lambda photos: (photos / "0.png").rename(photos / "zz.png"),
        lambda photos: (photos / "new.png").write_bytes((photos / "0.png").read_bytes()),
    ],
    ids=["pixel", "removed", "renamed", "added"],
)
def test_other_images_are_embedded_again(counted: Counted, photos: Path, change: Callable[[Path], None]) -> None:
    counted.load(photos)
    change(photos)
    before = counted.images
    changed = counted.load(photos)
    assert counted.images == before + (changed.n or 0)
    os.environ["ADOPT_CACHE"] = "/dev/null/none"  # and what is kept is what is made without
    assert same(changed, counted.load(photos))


def test_another_extractor_has_statistics_of_its_own(counted: Counted, photos: Path, cache: Path) -> None:
    counted.load(photos)
    other = Counted()
    other.extractor = Extractor("pixels", "0" * 16, None, torch.device("cpu"), other.extractor.network)
    assert other.load(photos).fingerprint == "0" * 16
    assert other.images == 12
    assert len(kept(cache)) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"", lambda data: data[:-40], lambda data: data[:900] + b"\0" * 9 + data[909:]],
    ids=["empty", "cut", "changed"],
)
def test_what_cannot_be_read_is_made_again(
    counted: Counted, photos: Path, cache: Path, damage: Callable[[bytes], bytes]
) -> None:
    first = counted.load(photos)
    (file,) = kept(cache)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert same(first, counted.load(photos))
    assert counted.images == 24
    assert same(first, counted.load(photos))
    assert counted.images == 24


def test_a_file_of_another_name_and_a_cache_that_cannot_be_written(
    counted: Counted, photos: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file in its place")
    counted.load(photos)
    counted.load(photos)
    assert counted.images == 24
    assert cache.read_text() == "a file in its place"


def test_an_array_is_known_by_its_file(counted: Counted, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 6, 5, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images)
    counted.load(tmp_path / "a.npz")
    counted.load(tmp_path / "a.npz")
    assert counted.images == 9
    np.savez(tmp_path / "a.npz", images[:8])
    assert counted.load(tmp_path / "a.npz").n == 8
    assert counted.images == 17


def test_images_that_change_while_they_are_embedded_are_not_kept(counted: Counted, photos: Path, cache: Path) -> None:
    network = counted.extractor.network

    def meddling(images: torch.Tensor) -> torch.Tensor:
        (photos / "0.png").write_bytes((photos / "2.png").read_bytes() + b"\0")
        return network(images)

    counted.extractor = Extractor("pixels", counted.extractor.fingerprint, None, torch.device("cpu"), meddling)
    counted.load(photos)
    assert kept(cache) == []


def test_several_at_once_leave_one_whole_file(photos: Path, cache: Path) -> None:
    found: list[Reference] = []
    threads = [Thread(target=lambda: found.append(Counted().load(photos))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(same(found[0], other) for other in found)
    assert len(kept(cache)) == 1


def test_the_ones_used_longest_ago_go_first(
    counted: Counted, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", 2)
    for name in "abc":
        images = np.random.default_rng(ord(name)).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images)
        counted.load(tmp_path / f"{name}.npz")
    assert len(kept(cache)) == 2
    counted.load(tmp_path / "c.npz")
    assert counted.images == 12


def test_the_code_of_a_user_is_run_each_time(counted: Counted, photos: Path, cache: Path) -> None:
    counted.extractor = Extractor("python:mine:net", "0" * 16, None, torch.device("cpu"), counted.extractor.network)
    counted.load(photos)
    counted.load(photos)
    assert counted.images == 24
    assert not cache.exists()


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADOPT_CACHE", str(tmp_path / "mine"))
    assert module.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("ADOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert module.cache_folder() == tmp_path / "xdg" / "adopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert module.cache_folder() == tmp_path / "home" / ".cache" / "adopt"
