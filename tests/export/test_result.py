"""The JSON of a result: what is written is read back exactly, and nothing else is read."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_results import example

from autodiffusion_optuna import Result
from autodiffusion_optuna.candidate import Candidate, packed
from autodiffusion_optuna.config import ModelConfig, ScoreConfig
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.export.result import BaselinePart, ConfigPart, HeldOutPart, ScorePart
from autodiffusion_optuna.noise import flow, scaled_linear


def full() -> Result:
    """A result with every field set."""
    return example(
        scaled_linear(),
        solver="deis_3",
        final="sigma_min",
        eta=0.0,
        amplification_cap=8.0,
        guidance=7.5,
        timesteps=(999, 631, 77),
        skips=(("down.0",), (), ("up.1", "down.0")),
        reuses=((), ("up.1",), ()),
        cost=2.9 / 3,
        score=ScorePart(
            metric="FID",
            value=1 / 3,
            images=500,
            held_out=HeldOutPart(mean=0.1, low=-0.2, high=0.4, images=9, banks=3),
            baseline=BaselinePart(
                name="uniform, solver deis_3",
                timesteps=(666, 333, 0),
                value=1.5,
                difference=HeldOutPart(mean=-1.4, low=-1.5, high=-1.3, images=9, banks=3),
            ),
        ),
        conditions="f00",
        config=ConfigPart(
            model=ModelConfig(source="net", size=[64, 64], fields={"null_class": 3}),
            score=ScoreConfig(extractor="clip"),
        ),
        made_with={"autodiffusion_optuna": "0.2.0"},
    )


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    result = full()
    result.write(tmp_path / "best.json")
    assert Result.read(tmp_path / "best.json") == result
    assert Result.read(str(tmp_path / "best.json")).text() == result.text()
    assert json.loads(result.text())["format"] == 4


@pytest.mark.parametrize("noise", [scaled_linear(), flow(1000, 3.0)], ids=["eps", "flow"])
def test_the_noise_is_kept_bit_for_bit(noise: Any) -> None:
    read = Result.parse(example(noise).text())
    for name in ("alphas", "sigmas", "model_times"):
        np.testing.assert_array_equal(getattr(read.noise_schedule(), name), getattr(noise, name))
    assert read.noise.alpha == (*(noise.alpha(t) for t in read.timesteps), 1.0)
    assert read.noise.sigma == (*(noise.sigma(t) for t in read.timesteps), 0.0)
    assert read.noise.model_times == tuple(noise.model_times[list(read.timesteps)])
    first = example(noise, final="sigma_min").noise
    assert (first.alpha[-1], first.sigma[-1]) == (noise.alpha(0), noise.sigma(0))


def test_a_result_is_a_candidate_of_any_model_with_its_layers() -> None:
    result = full()
    assert result.candidate(("down.0", "mid", "up.1")) == Candidate(
        (999, 631, 77), (packed([0]), packed(reuses=[2]), packed([0, 2]))
    )
    assert result.candidate(("up.1", "down.0"), T=1000) == Candidate(
        (999, 631, 77), (packed([1]), packed(reuses=[0]), packed([0, 1]))
    )
    with pytest.raises(ConfigError, match=r"skips or reuses 'up\.1', and the model has no such layer"):
        result.candidate(("down.0", "mid"))
    with pytest.raises(ConfigError, match="indexes 1000 timesteps and the model has 4000"):
        result.candidate(("down.0", "up.1"), T=4000)
    assert example().candidate(()) == Candidate((901, 500, 40))


def test_sampling_settings_are_those_of_the_sampler() -> None:
    from autodiffusion_optuna.evaluation.sampling import Sampling

    assert Sampling(**full().sampling_settings()) == Sampling("deis_3", "sigma_min", 7.5, 0.0, 8.0)


def damaged(**changes: Any) -> str:
    data = json.loads(full().text())
    for key, value in changes.items():
        table, _, field = key.rpartition("__")
        (data[table] if table else data)[field] = value
    return json.dumps(data)


BOMB = base64.b64encode(zlib.compress(bytes(2**26), 9)).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "has no format, this version reads format 4"),
        ('{"timesteps": [5]}', "has no format"),
        ('{"format": "4"}', "has format '4', this version reads format 4"),
        ('{"format": 5}', "format 5, this version reads format 4; give a file of adopt export"),
        ('{"format": 2}', "format 2, this version reads format 4"),
        ('{"format": 4}', "field 'study' is missing"),
        (damaged(noise=None), "'noise': input should be an object"),
        (damaged(colour="red"), "unknown field 'colour'"),
        (damaged(model__colour="red"), r"unknown field 'model\.colour'"),
        (damaged(config={"model": {"source": "x", "sauce": 1}}), r"unknown field 'config\.model\.sauce'"),
        (damaged(timesteps=["5", 2, 1]), r"field 'timesteps\.0': input should be a valid integer"),
        (damaged(timesteps=[5, 5, 1]), r"timesteps must descend strictly within \[0, 999\]"),
        (damaged(timesteps=[1000, 5, 1]), "timesteps must descend strictly"),
        (damaged(timesteps=[5, 1, -1]), r"timesteps\.2"),
        (damaged(timesteps=[]), "timesteps"),
        (damaged(skips=[[]]), "3 timesteps but skips for 1"),
        (damaged(study="../x"), "'study': string should match pattern"),
        (damaged(solver="ddim\nimport os"), "'solver': string should match pattern"),
        (damaged(model__kind='"""'), r"'model\.kind': string should match pattern"),
        (damaged(final="two"), "'final': input should be 'zero' or 'sigma_min'"),
        (damaged(cost=float("nan")), "'cost': input should be a finite number"),
        (damaged(train_timesteps=10**9), "train_timesteps"),
        (damaged(train_timesteps=4000), r"noise\.packed does not hold 4000 timesteps"),
        (damaged(noise__packed="?"), r"noise\.packed is damaged"),
        (damaged(noise__packed="AAAA"), r"noise\.packed is damaged"),
        (damaged(noise__packed=BOMB), r"noise\.packed does not hold 1000 timesteps"),
        (damaged(noise__packed=base64.b64encode(zlib.compress(bytes(24_000))).decode()), "not positive and finite"),
        (damaged(noise__alpha=[0.1, 0.2, 0.3, 0.4]), r"noise\.alpha is not what noise\.packed holds"),
        (damaged(noise__sigma=[0.1]), r"noise\.sigma is not what"),
    ],
)
def test_what_is_damaged_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Result.read(path)
    assert "\n" not in str(caught.value)
    assert "result.json" in str(caught.value)


def test_files_that_cannot_be_read_or_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read result '.*gone\.json': No such file"):
        Result.read(tmp_path / "gone.json")
    (tmp_path / "picture.json").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ConfigError, match="it is not text"):
        Result.read(tmp_path / "picture.json")
    with pytest.raises(ConfigError, match=r"cannot write '.*best\.json': No such file"):
        full().write(tmp_path / "gone" / "best.json")


def test_the_package_and_a_result_need_neither_torch_nor_optuna() -> None:
    code = (
        "import sys, autodiffusion_optuna as package\n"
        "assert {'apply', 'remove', 'Result', 'SearchSpace'} <= set(dir(package))\n"
        "heavy = {'torch', 'diffusers', 'optuna', 'pydantic'}\n"
        "assert not heavy & set(sys.modules)\n"
        "package.Result, package.apply\n"
        "assert not (heavy - {'pydantic'}) & set(sys.modules)\n"
        "from autodiffusion_optuna import apply\n"
        "assert callable(apply)\n"
        "try: package.nothing\n"
        "except AttributeError: sys.exit(0)\n"
        "sys.exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_pointer_in_place_of_a_result_is_called_so(tmp_path: Path) -> None:
    path = tmp_path / "best.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConfigError, match=r"best\.json: is a Git LFS pointer: run git lfs pull"):
        Result.read(path)
