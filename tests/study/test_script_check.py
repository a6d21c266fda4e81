"""A script is compared with the search's sampler before it is given out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from example_results import result_for
from tiny_models import write_cosine, write_ddpm
from tiny_pipelines import write_prompts, write_sd, write_sd3

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.study import script_check
from autodiffusion_optuna.study.script_check import check_script

pytestmark = pytest.mark.filterwarnings("ignore:algorithm_type dpmsolver is deprecated:FutureWarning")

TIMESTEPS = (951, 600, 333, 40)
SKIPS = ((1, 2), (), (0,), (2,))


def test_a_script_that_draws_our_images_has_no_fault(folder: Path) -> None:
    write_cosine(folder / "net")
    result = result_for(Path("net"), solver="heun", timesteps=(999, 500))
    assert check_script(result) == (None, None, None)
    write_sd3(folder / "sd3")
    write_prompts(folder)
    options = {"prompts": "prompts.txt", "size": [32, 32]}
    for skips in (((),) * 4, SKIPS):
        assert check_script(result_for(Path("sd3"), options, timesteps=TIMESTEPS, skips=skips)) == (None, None, None)


def test_a_script_that_draws_other_images_has_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cosine(folder / "net")
    result = result_for(Path("net"), solver="heun", timesteps=(999, 500))
    given = script_check.diffusers_script
    monkeypatch.setattr(
        script_check,
        "diffusers_script",
        lambda *a, **k: given(*a, **k).replace(".double()", "").replace("float64", "float32"),
    )
    fault = check_script(result).fault
    assert fault is not None
    found = re.fullmatch(r"on this model diffusers' images differ from those of .* sampler by (\d+\.\d) of 255", fault)
    assert found
    assert float(found[1]) > 50
    monkeypatch.setattr(script_check, "diffusers_script", lambda *a, **k: "raise OSError('no such part\\nat all')")
    assert check_script(result).fault == "diffusers cannot draw with this model as it is here (OSError: no such part)"
    monkeypatch.setattr(script_check, "diffusers_script", lambda *a, **k: "import no_such_package")
    with pytest.raises(
        ModelError, match=r"it cannot be run here .ModuleNotFoundError: No module named 'no_such_package'"
    ):
        check_script(result)


@pytest.mark.parametrize(
    ("found", "fault", "rounding"),
    [
        ((1.0,), None, None),
        ((9.0, 0.2), None, "by 9 of 255 in bfloat16, and by 0.2 in float32"),
        ((9.0, 8.0), "by 9 of 255", None),
        ((9.0, torch.OutOfMemoryError("full")), None, "in bfloat16; they were not compared in float32: it cannot be"),
    ],
)
def test_float32_decides_where_reduced_precision_differs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, found: tuple[Any, ...], fault: str | None, rounding: str | None
) -> None:
    write_sd(folder / "net")
    write_prompts(folder)
    plain = result_for(Path("net"), {"prompts": "prompts.txt", "size": [32, 32]}, timesteps=TIMESTEPS)
    result = plain.with_model(precision="bfloat16")
    scripts: list[str] = []
    left: list[Any] = [*found]
    given = script_check.diffusers_script

    def noted(*args: Any, **kwargs: Any) -> str:
        scripts.append(given(*args, **kwargs))
        if isinstance(left[0], Exception):
            monkeypatch.setattr(script_check, "run_script", lambda _: (_ for _ in ()).throw(left[0]))
        return scripts[-1]

    monkeypatch.setattr(script_check, "diffusers_script", noted)
    monkeypatch.setattr(script_check, "difference", lambda *_: left.pop(0))
    checked = check_script(result)
    assert (checked.fault is None) == (fault is None)
    assert (fault or "") in (checked.fault or "")
    assert (checked.rounding is None) == (rounding is None)
    assert (rounding or "") in (checked.rounding or "")
    assert ["torch_dtype=torch.bfloat16" in script for script in scripts] == [True, False][: len(found)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
@pytest.mark.parametrize("place", ["load_model", "draw", "run_script"])
def test_a_model_too_large_for_the_check_is_not_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: type[Exception]
) -> None:
    write_cosine(folder / "net")

    def fail(*_: object, **__: object) -> None:
        raise error("no room")

    monkeypatch.setattr(script_check, place, fail)
    with pytest.raises(ModelError, match=rf"^it cannot be run here \({error.__name__}: no room\)$"):
        check_script(result_for(Path("net"), timesteps=(999, 500)))


def test_a_check_that_cannot_be_made_downloads_nothing(folder: Path) -> None:
    write_ddpm(folder / "net")
    result = result_for(Path("net"), timesteps=TIMESTEPS)
    for source, message in (("gone", "gone"), ("org/name", "'org/name' is not in the hub's cache")):
        model = result.model.model_copy(update={"source": source})
        config = result.config.model_copy(update={"model": result.config.model.model_copy(update={"source": source})})
        with pytest.raises(ModelError, match=message):
            check_script(result.model_copy(update={"model": model, "config": config}))
