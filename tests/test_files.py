"""A file that holds something else than its name says is called what it is, whoever reads it."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_cache import ID, fill_cache, use_cache
from load_source import load_source
from tiny_adm import write_adm
from tiny_models import write_ddpm
from tiny_pipelines import write_prompts, write_sd

from autodiffusion_optuna.errors import AdoptError
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.models.prompts import read_prompts
from autodiffusion_optuna.evaluation.references.formats import read_reference_data

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 334643276\n"
STANDINS = {
    POINTER: "is a Git LFS pointer: run git lfs pull",
    b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n": "is a web page that was saved in place",
    b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': "is a web page that was saved in place",
    b"": "is empty",
}


def refused(read: Callable[[], object]) -> str:
    with pytest.raises(AdoptError) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sd(tmp_path_factory.mktemp("sd"))


@pytest.mark.parametrize("content", STANDINS, ids=["pointer", "page", "xml", "empty"])
@pytest.mark.parametrize(
    "name",
    [
        "model.npz", "model.npy", "model.pt", "model.pkl", "images.zip",
        "prompts.txt", "prompts.csv", "prompts.jsonl", "prompts.json",
    ],
)  # fmt: skip
def test_references_and_prompts(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    read = read_prompts if name.startswith("prompts") else read_reference_data
    words = "" if name.startswith("prompts") and not content else STANDINS[content]  # no prompts: as before
    assert refused(lambda: read(path)).startswith(f"{path}: {words}")


@pytest.mark.parametrize("content", STANDINS, ids=["pointer", "page", "xml", "empty"])
@pytest.mark.parametrize("name", ["a.png", "b.jpg", "c.webp"])
def test_images_of_a_folder_or_zip(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / name).write_bytes(content)
    assert f"{name} {STANDINS[content]}" in refused(lambda: read_reference_data(tmp_path / "images"))
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr(name, content)
    assert f"{name} {STANDINS[content]}" in refused(lambda: read_reference_data(tmp_path / "images.zip"))


@pytest.mark.parametrize("content", STANDINS, ids=["pointer", "page", "xml", "empty"])
@pytest.mark.parametrize("extractor", ["digits", "inception", "clip", "torchscript", "dinov2", "efficientnet-lite0"])
def test_weights_of_extractors(tmp_path: Path, extractor: str, content: bytes) -> None:
    """Before trust is asked for, which would not help."""
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    assert refused(lambda: load_extractor(extractor, "cpu", path)) == f"{path}: {line_of(content, path)}"


def line_of(content: bytes, path: Path) -> str:
    return refused(lambda: read_reference_data(path)).removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_of_dinov2(tmp_path: Path, name: str) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_text('{"model_type": "dinov2"}')
    (tmp_path / name).write_bytes(POINTER)
    message = refused(lambda: load_extractor("dinov2", "cpu", tmp_path))
    assert message == f"{tmp_path / name}: is a Git LFS pointer: run git lfs pull"


def test_every_file_of_a_text_to_image_pipeline(pipeline: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path)
    files = [file.relative_to(pipeline) for file in pipeline.rglob("*") if file.is_file()]
    files = [file for file in files if file.parts[0] != "safety_checker"]
    assert len(files) > 8
    for number, file in enumerate(files):
        folder = Path(shutil.copytree(pipeline, tmp_path / str(number)))
        (folder / file).write_bytes(POINTER)
        message = refused(lambda folder=folder: load_source(folder, prompts=prompts))
        assert message == f"{folder / file}: is a Git LFS pointer: run git lfs pull"


def test_single_files_and_checkpoints(pipeline: Path, tmp_path: Path) -> None:
    unet, classifier, fields = write_adm(tmp_path)
    single = tmp_path / "model.safetensors"
    text: dict[str, Any] = {"prompts": write_prompts(tmp_path), "config": pipeline}
    for content, words in STANDINS.items():
        single.write_bytes(content)
        assert refused(lambda: load_source(single, **text)).startswith(f"{single}: {words}")
        for broken in (classifier, unet):
            broken.write_bytes(content)
            message = refused(lambda: load_source(f"adm:{unet}", fields=fields, classifier=classifier))
            assert message.startswith(f"{broken}: {words}")
        write_adm(tmp_path)


def test_a_bare_checkpoint_is_looked_into_before_it_is_called_one(tmp_path: Path) -> None:
    for name in ("model.ckpt", "model.pt", "model.bin"):
        (tmp_path / name).write_bytes(POINTER)
        assert "run git lfs pull" in refused(lambda name=name: load_source(tmp_path / name))


def test_a_pointer_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = fill_cache(use_cache(tmp_path, monkeypatch), write_ddpm)
    weights = snapshot / "unet" / "diffusion_pytorch_model.safetensors"
    weights.resolve().write_bytes(POINTER)
    assert refused(lambda: load_source(ID)) == f"{weights}: is a Git LFS pointer: run git lfs pull"
