from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from load_source import load_source

from autodiffusion_optuna.errors import ConfigError, ModelError
from autodiffusion_optuna.evaluation.models import Model
from autodiffusion_optuna.evaluation.models.plugin import load_plugin

START = """
import torch
from autodiffusion_optuna.evaluation.models.plugin import PluginModel
from autodiffusion_optuna.noise import linear
"""
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder; what a test imports from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def write(body: str) -> None:
    Path("mine.py").write_text(START + textwrap.dedent(body))
    sys.modules.pop("mine", None)


def refused(source: str = "python:mine:make", **settings: Any) -> str:
    """The one line with which the plug-in is refused."""
    with pytest.raises((ModelError, ConfigError)) as caught:
        load_source(source, **{"trust": True, **settings})
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def test_the_example_of_the_docstring_runs() -> None:
    """It denoises standard normal data, whose samples are their own noise."""
    assert load_plugin.__doc__ is not None
    example = load_plugin.__doc__.split("::\n", 1)[1].split("\n    A whole")[0]
    assert len(example.strip().splitlines()) <= 12
    Path("mine.py").write_text(textwrap.dedent(example))
    model = load_source("python:mine:shrink", clip=False, trust=True)
    assert (model.name, model.shape, model.kind, model.units) == ("mine:shrink", (3, 8, 8), "plugin", ())
    torch.testing.assert_close(model.denoiser(X, 500, 0), model.schedule.alpha(500) * X, rtol=1e-4, atol=1e-5)
    assert load_source("python:mine:shrink", trust=True).denoiser(9 * X, 1, 0).abs().max() == 1
    assert load_source("python:mine:shrink", trust=True).fingerprint == model.fingerprint


def test_a_mapping_does_and_labels_reach_the_network() -> None:
    write("""
        def make(device):
            def network(x, t, condition):
                return torch.zeros_like(x) + condition["label"][:, None, None, None]
            return {"network": network, "shape": (3, 8, 8), "schedule": linear(), "prediction": "sample",
                    "fingerprint": "1", "labels": 4}
    """)
    model = load_source("python:mine:make", clip=False, trust=True)
    assert model.conditions is not None
    assert model.conditions.count == 4
    assert model.bind([3, 1])(X, 10, 0)[:, 0, 0, 0].tolist() == [3, 1]
    with pytest.raises(ConfigError, match="has none"):
        model.check_scale(2.0)


def test_blocks_of_a_module_can_be_skipped() -> None:
    write("""
        from diffusers.models.resnet import ResnetBlock2D

        class Network(torch.nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.block = ResnetBlock2D(in_channels=3, temb_channels=None, groups=3, eps=1e-5)

            def forward(self, x, t, condition):
                return self.block(x, None)

        def make(device):
            return PluginModel(Network(), [3, 8, 8], linear(), "sample", "1")
    """)
    model = load_source("python:mine:make", clip=False, trust=True)
    assert model.units == ("block",)
    torch.testing.assert_close(model.denoiser(X, 10, 1), X)
    assert not torch.allclose(model.denoiser(X, 10, 0), X)


def test_states_may_be_latents() -> None:
    write("""
        def make(device):
            decode = lambda x: x[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3)
            return PluginModel(lambda x, t, c: 3 * torch.ones_like(x), (4, 8, 8), linear(), "sample", "1",
                               decode=decode)
    """)
    model = load_source("python:mine:make", trust=True)
    assert model.picture_shape == (1, 16, 16)
    assert model.denoiser(torch.zeros(2, 4, 8, 8), 10, 0).max() == 3
    assert model.to_images(torch.zeros(2, 4, 8, 8)).shape == (2, 1, 16, 16)
    assert "are latents" in refused(clip=True)


def test_a_whole_model_is_taken_as_it_is() -> None:
    write("""
        from autodiffusion_optuna.evaluation.models.mixture import mixture_model

        def make(device):
            return mixture_model(T=40, device=str(device))
    """)
    model = load_source("python:mine:make", trust=True)
    assert isinstance(model, Model)
    assert (model.name, model.schedule.T) == ("mixture", 40)
    assert "sets its own precision" in refused(precision="bfloat16")
    assert "sets its own clip" in refused(clip=False)


def test_the_fingerprint_covers_what_the_plug_in_says() -> None:
    body = """
        def make(device):
            return PluginModel(lambda x, t, c: x, (3, 8, 8), linear({T}), "{prediction}", "{mark}")
    """
    seen = set()
    for T, prediction, mark in (
        (1000, "sample", "1"),
        (900, "sample", "1"),
        (900, "epsilon", "1"),
        (900, "epsilon", "2"),
    ):
        write(body.format(T=T, prediction=prediction, mark=mark))
        seen.add(load_source("python:mine:make", trust=True).fingerprint)
        assert load_source("python:mine:make", clip=False, trust=True).fingerprint in seen
    assert len(seen) == 4


def test_nothing_runs_without_trust() -> None:
    Path("mine.py").write_text("from pathlib import Path\nPath('harm-was-done').touch()\n")
    message = refused("python:mine:make", trust=False)
    assert message == "python:mine:make would run Python code of your own; add --trust if you mean it to"
    assert not Path("harm-was-done").exists()


def test_errors_of_the_users_code_are_one_line() -> None:
    assert "write python:module:function" in refused("python:mine")
    assert "mine:make raised ModuleNotFoundError: No module named 'mine'" in refused()
    write("1 / 0")
    assert "mine:make raised ZeroDivisionError: division by zero" in refused()
    write("def other(device): pass")
    assert "module 'mine' has no function 'make'" in refused()
    write("def make(): pass")
    assert "mine:make raised TypeError" in refused()
    write("def make(device): raise RuntimeError('one\\ntwo')")
    assert "mine:make raised RuntimeError: one; fix" in refused()
    write("def make(device): return 3")
    assert "mine:make returned a int" in refused()
    write("def make(device): return {'network': None}")
    assert "missing 4 required positional arguments" in refused()


@pytest.mark.parametrize(
    ("network", "rest", "reason"),
    [
        ("None", "(3, 8, 8), linear(), 'sample', '1'", "network is None; make it a function"),
        ("lambda x, t, c: x", "(3, 8), linear(), 'sample', '1'", "shape is (3, 8); make it (C, H, W)"),
        ("lambda x, t, c: x", "(3, 8, 8), 1000, 'sample', '1'", "schedule is 1000; make it a NoiseSchedule"),
        ("lambda x, t, c: x", "(3, 8, 8), linear(), 'x0', '1'", "prediction is 'x0'; make it one of epsilon"),
        ("lambda x, t, c: x", "(3, 8, 8), linear(), 'sample', ''", "fingerprint is ''; make it a text"),
        ("lambda x, t, c: x", "(3, 8, 8), linear(), 'sample', '1', 0", "labels is 0; make it a positive integer"),
        (
            "lambda x, t, c: x[:, :2]",
            "(3, 8, 8), linear(), 'sample', '1'",
            "mine:make: network output has shape [1, 2,",
        ),
        ("lambda x, t: x", "(3, 8, 8), linear(), 'sample', '1'", "mine:make raised TypeError"),
        ("lambda x, t, c: x", "(3, 8, 8), linear(), 'sample', '1', None, lambda x: x[0]", "decode returned [3, 8, 8]"),
    ],
)
def test_models_that_do_not_fit_are_refused(network: str, rest: str, reason: str) -> None:
    write(f"def make(device): return PluginModel({network}, {rest})")
    assert reason in refused()


@pytest.mark.parametrize(
    "levels",
    [
        "[1.0, 0.5, 0.0], [0.1, 0.8, 1.0]",  # no signal left
        "[1.0, 0.9, 0.5], [0.0, 0.4, 0.8]",  # no noise at first
        "[1.0, 0.5, 0.9], [0.1, 0.8, 0.4]",  # not in order
        "[1.0, 0.9, float('nan')], [0.1, 0.4, 0.8]",
    ],
)
def test_levels_that_no_solver_can_use_are_refused(levels: str) -> None:
    schedule = f"NoiseSchedule(*np.array([{levels}, [0.0, 1.0, 2.0]]))"
    write(
        "import numpy as np\nfrom autodiffusion_optuna.noise import NoiseSchedule\n"
        f"def make(device): return PluginModel(lambda x, t, c: x, (3, 8, 8), {schedule}, 'sample', '1')"
    )
    assert "mine:make: schedule has levels that no solver can use; make alphas and sigmas positive" in refused()


def test_too_little_memory_is_left_to_the_evaluator() -> None:
    write("""
        def network(x, t, condition):
            if len(x) > 1:
                raise torch.OutOfMemoryError
            return x

        def make(device):
            return PluginModel(network, (3, 8, 8), linear(), "sample", "1")
    """)
    model = load_source("python:mine:make", trust=True)
    with pytest.raises(torch.OutOfMemoryError):
        model.denoiser(X, 10, 0)
