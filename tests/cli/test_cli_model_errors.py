"""Bad models, references and prompts: one clear line on stderr, exit code 1, nothing written."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_adm
import tiny_models
import tiny_pipelines
import torch
from command import Adopt, Result
from PIL import Image


class Payload:
    """What a hostile pickle holds: code that would leave a file behind."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch pwned",)


def refuse(folder: Path, adopt: Adopt, *settings: str, study: str = "quick.toml") -> Result:
    """``adopt run`` with settings, checked to end in one line and to have written nothing."""
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    given = ("score.reference=quick.toml", *settings)  # which is there, and looked into after the model
    result = adopt("run", "--study", study, *(a for setting in given for a in ("--set", setting)))
    assert result.code == 1, result
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    assert "Traceback" not in result.err
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    return result


def adm_settings(folder: Path, **changed: object) -> list[str]:
    unet, classifier, fields = tiny_adm.write_adm(folder)
    fields |= changed
    given = [f"model.fields.{name}={json.dumps(value)}" for name, value in fields.items()]
    return [f"model.source=adm:{unet}", f"model.classifier={classifier}", *given]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_missing_checkpoint(folder: Path, adopt: Adopt) -> None:
    result = refuse(folder, adopt, "model.source=adm:nowhere.pt", "model.preset=imagenet64")
    assert "nowhere.pt: no such file" in result.err


def test_a_truncated_checkpoint(folder: Path, adopt: Adopt) -> None:
    settings = adm_settings(folder)
    cut(Path(settings[0].partition("adm:")[2]))
    assert "damaged or cut short" in refuse(folder, adopt, *settings).err


def test_a_truncated_classifier(folder: Path, adopt: Adopt) -> None:
    settings = adm_settings(folder)
    cut(Path(settings[1].partition("=")[2]))
    assert "damaged or cut short" in refuse(folder, adopt, *settings).err


def test_a_state_dict_of_another_architecture(folder: Path, adopt: Adopt) -> None:
    settings = adm_settings(folder)
    torch.save({"weight": torch.zeros(3)}, folder / "other.pt")
    settings[0] = f"model.source=adm:{folder / 'other.pt'}"
    refuse(folder, adopt, *settings)
    unet = Path(adm_settings(folder)[0].partition("adm:")[2])
    result = refuse(folder, adopt, f"model.source=adm:{unet}", "model.preset=imagenet64")
    assert "weights do not fit the preset" in result.err


def test_a_wrong_attention_order_where_the_weights_tell(folder: Path, adopt: Adopt) -> None:
    """What is checked is the whole architecture: a preset's with another order than that preset's is refused."""
    fields = ["model.preset=imagenet64", "model.fields.use_new_attention_order=false"]
    (folder / "x.pt").touch()
    assert "use_new_attention_order" in refuse(folder, adopt, "model.source=adm:x.pt", *fields).err


def test_an_unknown_preset_of_a_checkpoint(folder: Path, adopt: Adopt) -> None:
    settings = adm_settings(folder)[:1]
    assert "did you mean 'imagenet64'" in refuse(folder, adopt, *settings, "model.preset=imagenet46").err


def test_a_pickle_with_code_inside(folder: Path, adopt: Adopt) -> None:
    torch.save({"weight": Payload()}, folder / "evil.pt")
    result = refuse(folder, adopt, f"model.source=adm:{folder / 'evil.pt'}", "model.preset=imagenet64")
    assert "code" in result.err
    (folder / "evil.pkl").write_bytes(pickle.dumps({"mu": Payload()}))
    assert "evil.pkl" in refuse(folder, adopt, "score.reference=evil.pkl").err
    assert not (folder / "pwned").exists()


def test_folders_that_are_damaged(folder: Path, adopt: Adopt) -> None:
    tiny_models.write_ddpm(folder / "model")
    weights = next((folder / "model").rglob("*.safetensors"))
    shutil.copytree(folder / "model", folder / "gone")
    next((folder / "gone").rglob("*.safetensors")).unlink()
    cut(weights)
    assert "damaged or cut short" in refuse(folder, adopt, "model.source=model").err
    assert "save_pretrained" in refuse(folder, adopt, "model.source=gone").err


def save(path: Path, **arrays: object) -> None:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]


def make_changed(folder: Path, adopt: Adopt, **changed: np.ndarray[Any, Any]) -> str:
    """A reference of the study's own extractor, with other arrays in it."""
    images = np.random.default_rng(0).integers(0, 256, (80, 4, 4, 1), dtype=np.uint8)
    save(folder / "images.npz", arr_0=images)
    built = adopt(
        "reference", "build", "--images", "images.npz", "--extractor", "pixels", "--out", "changed.npz", "--force"
    )
    assert built.code == 0, built.err
    with np.load(folder / "changed.npz", allow_pickle=False) as archive:
        arrays = {key: value for key, value in archive.items() if key != "features"}
    save(folder / "changed.npz", **(arrays | changed))
    return "score.reference=changed.npz"


def make_bomb(folder: Path) -> str:
    with (
        zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("mu.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 27,)})
        for _ in range(1024):
            file.write(bytes(1 << 20))
    return "bomb.npz"


def make_colour(folder: Path) -> str:
    save(folder / "colour.npz", arr_0=np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8))
    return "colour.npz"


def make_empty(folder: Path) -> str:
    (folder / "empty").mkdir()
    return "empty"


def make_one_image(folder: Path) -> str:
    (folder / "zero").mkdir()
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / "zero" / "a.png")
    return "zero"


def make_text(folder: Path) -> str:
    (folder / "text.npz").write_text("not an archive")
    return "text.npz"


REFERENCES: list[tuple[Callable[[Path], str], list[str]]] = [
    (make_bomb, ["bomb.npz", "zip bomb", "claims 1,073,741,952 bytes"]),
    (make_colour, ["images have 1 channel(s), those of reference 'colour' have 3"]),
    (make_empty, ["empty", "images"]),
    (make_one_image, ["1 image"]),
    (make_text, ["text.npz"]),
]


@pytest.mark.parametrize(("make", "expected"), REFERENCES, ids=lambda value: getattr(value, "__name__", None))
def test_a_wrong_reference(folder: Path, adopt: Adopt, make: Callable[[Path], str], expected: list[str]) -> None:
    result = refuse(folder, adopt, f"score.reference={make(folder)}")
    for text in expected:
        assert text in result.err


def test_statistics_that_are_none(folder: Path, adopt: Adopt) -> None:
    nan = np.full(16, np.nan)
    assert "holds NaN or infinity" in refuse(folder, adopt, make_changed(folder, adopt, mu=nan)).err
    nan_sigma = np.where(np.eye(16) == 1, np.nan, 0.0)
    assert "holds NaN or infinity" in refuse(folder, adopt, make_changed(folder, adopt, sigma=nan_sigma)).err
    none = np.zeros((16, 16))
    assert "all have the same features" in refuse(folder, adopt, make_changed(folder, adopt, sigma=none)).err
    indefinite = np.ones((16, 16)) - np.eye(16) / 2
    assert "is no covariance" in refuse(folder, adopt, make_changed(folder, adopt, sigma=indefinite)).err


def test_a_reference_of_another_dimension(folder: Path, adopt: Adopt) -> None:
    changed = make_changed(folder, adopt, mu=np.zeros(24), sigma=np.eye(24))
    assert "gives 16 features" in refuse(folder, adopt, changed).err
    assert "the reference has 24" in refuse(folder, adopt, changed).err


def test_a_reference_of_another_extractor(folder: Path, adopt: Adopt) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 28, 28, 1), dtype=np.uint8)
    save(folder / "images.npz", arr_0=images)
    built = adopt("reference", "build", "--images", "images.npz", "--extractor", "digits", "--out", "made.npz")
    assert built.code == 0, built.err
    assert "digits" in adopt("reference", "show", "made.npz").out
    assert "made with extractor 'digits'" in refuse(folder, adopt, "score.reference=made.npz").err


def test_prompts(folder: Path, adopt: Adopt) -> None:
    tiny_pipelines.write_sd(folder / "sd")
    (folder / "empty.txt").write_text("\n\n")
    (folder / "wrong.csv").write_text("a,b\n1,2\n")
    assert "holds no prompts" in refuse(folder, adopt, "model.source=sd", "model.prompts=empty.txt").err
    assert "none of its 2 columns" in refuse(folder, adopt, "model.source=sd", "model.prompts=wrong.csv").err
    tiny_models.write_ddpm(folder / "ddpm")
    result = refuse(folder, adopt, "model.source=ddpm", "model.prompts=empty.txt")
    assert "empty.txt' is not for models such as 'ddpm'" in result.err
    assert "nowhere.txt" in refuse(folder, adopt, "model.source=sd", "model.prompts=nowhere.txt").err
    assert "model.prompts" in refuse(folder, adopt, "model.source=sd").err


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["sampling.guidance=2.0"], "guidance 2 was given, but model 'mixture' has none"),
        (["sampling.guidance=[1.0, 2.0]"], "has none"),
        (["sampling.solver=['ddim', 'dies']"], "did you mean 'deis'"),
        (["sampling.solver=deis", "sampling.order=7"], "order"),
        (["sampling.solver=ddim", "sampling.order=2"], "takes no order"),
        (["sampling.amplification_cap=4"], "has no cap"),
        (["sampling.steps={min=0, max=4}"], "greater than or equal to 1"),
        (["sampling.steps={min=4, max=2000}"], "2000"),
        (["model.source=python:os:getcwd"], "--trust"),
        (["model.source=checkpoint.pt"], "no such file"),
        (["model.prompts=x.txt"], "x.txt' is not for models such as 'mixture'; leave model.prompts out"),
        (["model.negative_prompt=blurry"], "leave model.negative_prompt out"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else None,
)
def test_wrong_settings(folder: Path, adopt: Adopt, settings: list[str], expected: str) -> None:
    assert expected in refuse(folder, adopt, *settings).err


def test_a_hub_id_while_offline(folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the variable is read once, at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
    result = refuse(folder, adopt, "model.source=google/ddpm-cifar10-32")
    assert "google/ddpm-cifar10-32" in result.err
    assert "offline" in result.err


def test_schedules_that_do_not_fit(folder: Path, adopt: Adopt) -> None:
    assert adopt("run", "--study", "quick.toml", "--set", "search.trials=2").code == 0
    assert adopt("export", "--study", "quick", "--format", "json", "--out", ".").code == 0
    (folder / "broken.json").write_text((folder / "quick.json").read_text()[:-20])
    for arguments, expected in (
        (["score", "--result", "nowhere.json"], "cannot read result 'nowhere.json'"),
        (["score", "--result", "broken.json"], "not valid JSON"),
        (["score"], "neither --study nor --result"),
        (["score", "--study", "quick", "--result", "quick.json"], "both --study and --result"),
        (["score", "--study", "quick", "--model", "digits"], "--model goes with --result"),
        (["score", "--result", "quick.json", "--model", "nowhere"], "unknown model 'nowhere'"),
        (["sample", "--result", "quick.json", "--out", "no/where.png"], "does not exist"),
    ):
        result = adopt(*arguments)
        assert (result.code, result.err.count("\n")) == (1, 1), result
        assert expected in result.err
