"""Pictures of notable trials: which trials get one, where they are kept, and that a full disk costs no trial."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import optuna
import pytest
from command import Adopt
from numpy.typing import NDArray
from optuna.artifacts import FileSystemArtifactStore, download_artifact, get_all_artifact_meta
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import FrozenTrial, TrialState, create_trial
from PIL import Image

from autodiffusion_optuna.cli.dashboard import pictures as shown_by_dashboard
from autodiffusion_optuna.errors import StorageError
from autodiffusion_optuna.storage import artifacts
from autodiffusion_optuna.storage.artifacts import (
    BEST_OF_GENERATION,
    NEW_BEST,
    OF_BASELINE,
    Prefixed,
    attach_picture,
    notable,
)
from autodiffusion_optuna.storage.artifacts import open_store as open_artifacts
from autodiffusion_optuna.storage.attrs import ARTIFACTS, BASELINE, GENERATION, NOTABLE
from autodiffusion_optuna.storage.database import open_storage
from autodiffusion_optuna.storage.studies import load_study


def images(count: int, channels: int = 1, side: int = 8) -> NDArray[np.uint8]:
    shape = (count, channels, side, side)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def one_line(location: str) -> str:
    with pytest.raises(StorageError) as error:
        open_artifacts(location)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("count", "channels", "cells"), [(1, 1, (1, 1)), (3, 3, (2, 2)), (16, 3, (4, 4)), (40, 1, (4, 4))]
)
def test_a_picture_is_kept_and_read_back(tmp_path: Path, count: int, channels: int, cells: tuple[int, int]) -> None:
    store = open_artifacts(str(tmp_path / "pictures"))
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/a.db")
    trial = study.ask()
    drawn = images(count, channels)
    assert attach_picture(trial, store, drawn, NEW_BEST)
    study.tell(trial, 1.0)
    (frozen,) = study.trials
    assert frozen.user_attrs[NOTABLE] == NEW_BEST
    (meta,) = get_all_artifact_meta(frozen, storage=study._storage)
    assert (meta.mimetype, meta.filename) == ("image/png", "samples.png")
    copy = tmp_path / "copy.png"
    download_artifact(artifact_store=store, file_path=str(copy), artifact_id=meta.artifact_id)
    with Image.open(copy) as picture:
        assert picture.size == (cells[0] * 82 - 2, cells[1] * 82 - 2)
        # The middle of the first cell's first pixel.
        assert np.allclose(np.asarray(picture.convert("RGB"))[5, 5], drawn[0, :, 0, 0], atol=24)


def test_large_images_make_small_files(tmp_path: Path) -> None:
    """Noise is the worst there is for a PNG."""
    store = open_artifacts(str(tmp_path / "pictures"))
    assert attach_picture(optuna.create_study().ask(), store, images(16, 3, 256), OF_BASELINE)
    (file,) = (tmp_path / "pictures").iterdir()
    assert file.stat().st_size < 120_000


class Broken:
    """A store whose disk is full."""

    def open_reader(self, artifact_id: str) -> BinaryIO:
        raise NotImplementedError

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    def remove(self, artifact_id: str) -> None:
        raise NotImplementedError


def test_a_store_that_fails_costs_the_picture_and_not_the_trial() -> None:
    study = optuna.create_study()
    trial = study.ask()
    assert not attach_picture(trial, Broken(), images(4), NEW_BEST)
    study.tell(trial, 1.0)
    assert study.trials[0].state == TrialState.COMPLETE
    assert NOTABLE not in study.trials[0].user_attrs
    assert get_all_artifact_meta(study.trials[0], storage=study._storage) == []


def test_why_there_are_no_pictures_is_told_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifacts, "WARNED", set())
    study = optuna.create_study()
    for _ in range(3):
        attach_picture(study.ask(), Broken(), images(4), NEW_BEST)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "autodiffusion_optuna"]
    assert "pictures are not kept (No space left on device)" in line
    assert "--artifacts" in line


class Half(FileSystemArtifactStore):
    """A store whose disk is full after some bytes."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        super().write(artifact_id, io.BytesIO(content_body.read(10)))
        raise OSError(28, "No space left on device")


def test_half_a_picture_is_taken_away(tmp_path: Path) -> None:
    assert not attach_picture(optuna.create_study().ask(), Half(tmp_path), images(4), NEW_BEST)
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_is_run_again_keeps_its_picture(tmp_path: Path) -> None:
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/a.db")
    store = open_artifacts(str(tmp_path / "pictures"))
    trial = study.ask()
    for _ in range(2):
        assert attach_picture(trial, store, images(4), NEW_BEST)
    study.tell(trial, 1.0)
    (meta,) = get_all_artifact_meta(study.trials[0], storage=study._storage)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == [meta.artifact_id]


def test_a_finished_trial_gets_no_picture(tmp_path: Path) -> None:
    study = optuna.create_study()
    trial = study.ask()
    study.tell(trial, 1.0)
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        attach_picture(trial, open_artifacts(str(tmp_path)), images(4), NEW_BEST)
    assert list(tmp_path.iterdir()) == []


def finished(number: int, value: float | None, generation: int) -> FrozenTrial:
    state = TrialState.PRUNED if value is None else TrialState.COMPLETE
    trial = create_trial(state=state, value=value, user_attrs={GENERATION: generation})
    trial.number = number
    return trial


@pytest.mark.parametrize(
    ("value", "attrs", "why"),
    [
        (9.0, {BASELINE: "uniform", GENERATION: 1}, OF_BASELINE),
        (0.5, {GENERATION: 1}, NEW_BEST),
        (1.0, {GENERATION: 1}, BEST_OF_GENERATION),  # as good as the best is no new best
        (2.5, {GENERATION: 1}, BEST_OF_GENERATION),
        (3.0, {GENERATION: 1}, None),
        (3.5, {GENERATION: 1}, None),
        (99.0, {GENERATION: 2}, BEST_OF_GENERATION),
        (99.0, {}, None),
    ],
)
def test_why_a_trial_is_notable(value: float, attrs: dict[str, Any], why: str | None) -> None:
    running = create_trial(state=TrialState.RUNNING, user_attrs=attrs)
    running.number = 4
    trials = [finished(0, 1.0, 0), finished(1, 5.0, 0), finished(2, None, 1), finished(3, 3.0, 1), running]
    assert notable(trials, 4, value, attrs) == why


def test_the_first_trial_is_the_best_so_far() -> None:
    assert notable([], 0, 7.0, {GENERATION: 0}) == NEW_BEST


def test_a_folder_is_created_and_its_parents_are_not(tmp_path: Path) -> None:
    assert isinstance(open_artifacts(str(tmp_path / "new")), FileSystemArtifactStore)
    assert (tmp_path / "new").is_dir()
    assert "No such file" in one_line(str(tmp_path / "no" / "where"))
    assert not (tmp_path / "no").exists()


def test_a_folder_that_is_only_read_is_neither_created_nor_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist; say with --artifacts"):
        open_artifacts(str(tmp_path / "new"), write=False)
    assert list(tmp_path.iterdir()) == []
    assert isinstance(open_artifacts("/proc/self", write=False), FileSystemArtifactStore)


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("/data/studies/pictures", "pictures"),
        ("/data/studies/a/b", "a/b"),
        ("/data/studies", "."),
        ("/data/elsewhere", "/data/elsewhere"),
        ("/data/studies2", "/data/studies2"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
    ],
)
def test_a_folder_below_a_sqlite_files_is_kept_relative_to_it(given: str, stored: str) -> None:
    url = "sqlite:////data/studies/adopt.db"
    assert artifacts.stored_location(given, url) == stored
    assert os.path.normpath(artifacts.location_of(stored, url)) == os.path.normpath(given)
    postgres = "postgresql+psycopg://host/db"
    assert artifacts.location_of(artifacts.stored_location(given, postgres), postgres) == given


def test_a_study_is_moved_with_its_pictures(folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "zero").mkdir()
    monkeypatch.chdir(folder / "zero")
    assert adopt("run", "--study", "../quick.toml", "--set", "search.trials=3").code == 0
    (folder / "zero").rename(folder / "two")
    monkeypatch.chdir(folder / "two")
    done = adopt("run", "--study", "quick", "--set", "search.trials=6")
    assert done.code == 0, done
    study = load_study(open_storage("sqlite:///adopt.db"), "quick")
    assert study.user_attrs[ARTIFACTS] == "adopt-artifacts"
    store = shown_by_dashboard(study, "sqlite:///adopt.db", None)
    assert store is not None
    pictures = [meta for trial in study.trials for meta in get_all_artifact_meta(trial, storage=study._storage)]
    assert len(pictures) >= 4  # of the baselines among the six
    for meta in pictures:
        with store.open_reader(meta.artifact_id) as picture:
            assert picture.read(4) == b"\x89PNG"
    assert adopt("studies", "copy", "--study", "quick", "--to", "twin", "--to-storage", "../other.db").code == 0
    twin = load_study(open_storage("sqlite:///../other.db"), "twin")
    assert twin.user_attrs[ARTIFACTS] == "two/adopt-artifacts"
    assert len(list((folder / "two" / "adopt-artifacts").iterdir())) == 2 * (len(pictures) + 1)  # and the comparison
    assert not (folder / "zero").exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "File exists" in one_line(str(tmp_path / "file"))
    assert "give another folder with --artifacts" in one_line("/proc/pictures")
    assert "give another folder" in one_line("/proc/self")
    assert "names no folder" in one_line(" ")


def test_an_address_that_is_no_bucket_is_refused_without_its_password() -> None:
    assert "no store for azure://" in one_line("azure://container")
    assert "names no bucket" in one_line("s3:///prefix")
    for location in ("s3://key:secret@bucket/prefix", "ftp://me:secret@host", "gs://me:sec@ret@bucket"):
        message = one_line(location)
        assert "sec" not in message
        assert "ret" not in message


@pytest.mark.parametrize(("location", "package", "extra"), [("s3://b/p", "boto3", "s3"), ("gs://b", "google", "gcs")])
def test_a_missing_package_is_named_with_its_command(
    location: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(bucket: str) -> None:
        raise ImportError(f"no module named {package}")

    monkeypatch.setattr(artifacts, "Boto3ArtifactStore" if extra == "s3" else "GCSArtifactStore", missing)
    assert f'pip install "autodiffusion-optuna[{extra}]"' in one_line(location)


def test_a_client_without_credentials_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(bucket: str) -> None:
        raise RuntimeError("no credentials found\nand much more")

    monkeypatch.setattr(artifacts, "GCSArtifactStore", refused)
    assert one_line("gs://b").endswith("no credentials found")


def test_files_of_a_prefix_stay_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buckets = []

    def bucket(name: str) -> FileSystemArtifactStore:
        buckets.append(name)
        return FileSystemArtifactStore(tmp_path)

    monkeypatch.setattr(artifacts, "Boto3ArtifactStore", bucket)
    (tmp_path / "mine" / "too").mkdir(parents=True)
    store = open_artifacts("s3://bucket/mine/too/")
    assert isinstance(store, Prefixed)
    assert buckets == ["bucket"]
    store.write("id", io.BytesIO(b"content"))
    assert (tmp_path / "mine" / "too" / "id").read_bytes() == b"content"
    with store.open_reader("id") as file:
        assert file.read() == b"content"
    store.remove("id")
    with pytest.raises(ArtifactNotFound):
        store.open_reader("id")
