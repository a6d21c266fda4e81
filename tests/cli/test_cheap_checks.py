"""What is quickly checked comes first: no model is loaded and no image embedded where a path or a name is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import optuna
import pytest
from command import Adopt, check_refused, listing

COMPONENTS = "autodiffusion_optuna.study.components."


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("it was loaded")

    for name in ("load_model", "load_extractor", "load_reference"):
        monkeypatch.setattr(COMPONENTS + name, refuse)
    monkeypatch.setattr(
        "autodiffusion_optuna.evaluation.features.EXTRACTORS", dict.fromkeys(("pixels", "inception"), refuse)
    )


HUB = ["--set", "model.source=org/name"]
"""A model that may take any setting, as far as its name tells."""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--storage", "no/adopt.db"], "storage folder 'no' does not exist"),
        (["--storage", "sqlite:////proc/adopt.db"], "read-only"),
        (["--artifacts", "no/deeper/pictures"], "cannot write artifact folder"),
        (["--set", "score.reference=nowhere"], "nowhere' does not exist"),
        (["--set", "score.weights=nowhere.pt"], "leave score.weights out"),
        (["--set", "score.extractor=inception", "--set", "score.weights=nowhere.pt"], "nowhere.pt' is not a file"),
        (["--set", "score.extractor=inception"], "was given no weights"),
        ([*HUB, "--set", "model.prompts=nowhere.txt"], "there is no such file"),
        ([*HUB, "--set", "model.prompts=quick.toml"], "unknown kind of prompt file '.toml'"),
        ([*HUB, "--set", "model.classifier=nowhere.pt"], "nowhere.pt' does not exist"),
        ([*HUB, "--set", "model.config=nowhere"], "nowhere' does not exist"),
        (["--set", "model.source=./quick.toml"], "ships with no reference"),
        (["--set", "model.device=cuda:99"], "does not exist here"),
        (["--set", "search.preset=papr"], "did you mean 'paper'"),
        (["--set", "sampling.solver=dim"], "did you mean 'ddim'"),
        (["--engine", "slrum", "--workers", "2"], "did you mean 'slurm'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else None,
)
def test_run(nothing_loads: None, folder: Path, adopt: Adopt, arguments: list[str], expected: str) -> None:
    before = listing(folder)
    check_refused(adopt("run", "--study", "quick.toml", *arguments), expected)
    assert listing(folder) == before


def test_score(quick: optuna.Study, nothing_loads: None, folder: Path, adopt: Adopt) -> None:
    check_refused(adopt("score", "--study", "quick", "--set", "score.reference=nowhere"), "--set score.reference=PATH")
    check_refused(adopt("score", "--study", "quick", "--set", "score.weights=quick.toml"), "leave score.weights out")
    (folder / "empty.toml").write_text((folder / "quick.toml").read_text())
    check_refused(adopt("score", "--result", "nowhere.json"), "nowhere.json")
    exported = adopt("export", "--study", "quick", "--format", "json", "--out", ".")
    assert exported.code == 0
    refused = adopt("score", "--result", "quick.json", "--set", "score.reference=nowhere")
    check_refused(refused, "nowhere' does not exist")
    check_refused(adopt("score", "--result", "quick.json", "--ablation"), "--ablation goes with --study")
    check_refused(adopt("score", "--result", "quick.json", "--floor-steps", "9"), "--floor-steps goes with --study")
    for command in (["score"], ["sample", "--out", "grid.png"]):
        wrong = adopt(*command, "--study", "quick", "--timesteps", "829 x")
        check_refused(wrong, "list '829 x' holds 'x', which is no number")


def test_sample(quick: optuna.Study, nothing_loads: None, folder: Path, adopt: Adopt) -> None:
    check_refused(adopt("sample", "--study", "quick", "--out", "no/grid.png"), "folder 'no'")
    long = adopt("sample", "--study", "quick", "--out", f"{'a' * 300}.png")
    check_refused(long, "File name too long; give another --out")
    check_refused(adopt("sample", "--study", "quick", "--out", "grid.xyz"), "grid.xyz", "--out FILE.png")
    check_refused(adopt("sample", "--study", "quick", "--out", "/proc/grid.png"), "cannot write '/proc/grid.png'")
    check_refused(adopt("sample", "--study", "quik", "--out", "grid.png"), "did you mean 'quick'")


def test_sample_before_a_trial_is_finished(
    nothing_loads: None, folder: Path, adopt: Adopt, quick: optuna.Study
) -> None:
    optuna.create_study(study_name="new", storage="sqlite:///adopt.db")
    study = optuna.load_study(study_name="new", storage="sqlite:///adopt.db")
    for name, value in quick.user_attrs.items():
        study.set_user_attr(name, value)
    for command in (["sample", "--out", "grid.png"], ["score"]):
        check_refused(adopt(*command, "--study", "new"), "no finished trial yet")


def test_report(quick: optuna.Study, nothing_loads: None, folder: Path, adopt: Adopt) -> None:
    check_refused(adopt("report", "--study", "quick", "--out", "no/a.html"), "folder 'no' for the page does not exist")
    check_refused(adopt("report", "--study", "quick", "--out", "."), "is a folder")
    check_refused(adopt("report", "--study", "quick", "--out", "/proc/a.html"), "cannot write '/proc/a.html'")


def test_reference_build(nothing_loads: None, folder: Path, adopt: Adopt) -> None:
    build = ("reference", "build", "--extractor", "pixels")
    (folder / "old.npz").touch()
    (folder / "photos").mkdir()
    for arguments, expected in (
        (["--images", "photos", "--out", "old.npz"], "pass --force"),
        (["--images", "photos", "--out", "no/new.npz"], "folder 'no'"),
        (["--images", "photos", "--out", "/proc/new.npz"], "cannot write '/proc/new.npz'"),
        (["--images", "nowhere", "--out", "new.npz"], "nowhere' does not exist"),
        (["--images", "photos", "--out", "new.npz", "--weights", "old.npz"], "leave score.weights out"),
        (["--images", "photos", "--out", "new.npz", "--mode", "legacy_pytorch"], "leave the mode out"),
    ):
        check_refused(adopt(*build, *arguments), expected)
    assert not (folder / "new.npz").exists()


@pytest.mark.parametrize("command", [["sample", "--out", "grid.png"], ["report", "--out", "page.html"]])
def test_what_needs_no_score_looks_at_no_reference(
    quick: optuna.Study, folder: Path, adopt: Adopt, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(COMPONENTS + "load_extractor", refuse)
    done = adopt(*command, "--study", "quick")
    assert done.code == 0, done.err
    assert "no pictures" not in done.err
    assert adopt("export", "--study", "quick", "--format", "json", "--out", ".").code == 0
    if command[0] == "sample":
        assert adopt("sample", "--result", "quick.json", "--out", "other.png").code == 0
    shutil.rmtree(folder / "adopt-artifacts", ignore_errors=True)
