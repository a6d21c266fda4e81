from __future__ import annotations

import re
from pathlib import Path

import pytest

from autodiffusion_optuna import config as c
from autodiffusion_optuna.errors import ConfigError

TABLE = {
    "name": "x",
    "model": {"source": "digits"},
    "sampling": {"steps": 4},
    "search": {"trials": 10},
    "score": {"extractor": "digits"},
}


@pytest.mark.parametrize("name", sorted(c.presets()))
def test_every_preset_loads_under_its_own_name(name: str) -> None:
    config = c.load_preset(name)
    assert config.name == name
    assert config.description


def test_the_presets_of_the_first_release_are_there() -> None:
    faces = {"faces-4", "faces-6", "faces-10", "faces-solvers-6"}
    assert {"digits-4", "digits-6", "digits-10", "digits-10-layers", "digits-4-paper", "mixture-4"} | faces <= set(
        c.presets()
    )


def test_overrides_are_read_as_toml() -> None:
    config = c.parse_config(
        TABLE,
        ["sampling.steps={min=2, max=5}", "score.rungs=[16, 64]", "score.pruner=median", "model.source=my/folder"],
    )
    assert config.sampling.step_bounds == (2, 5)
    assert config.score.rungs == [16, 64]
    assert config.model.source == "my/folder"


def test_fingerprint_ignores_what_only_prolongs_a_study() -> None:
    config = c.parse_config(TABLE)
    assert (
        c.parse_config(TABLE, ["search.trials=99", "name=y", "model.device=cpu"]).fingerprint() == config.fingerprint()
    )
    changed = c.parse_config(TABLE, ["score.images=99"])
    assert changed.fingerprint() != config.fingerprint()
    assert c.differences(config, changed) == ["score.images: 256 -> 99"]


def test_a_step_count_and_a_range_differ() -> None:
    ranged = c.parse_config(TABLE, ["sampling.steps={min=2, max=5}"])
    assert any("sampling.steps" in line for line in c.differences(c.parse_config(TABLE), ranged))


def test_config_survives_json() -> None:
    config = c.parse_config(TABLE, ["sampling.steps={min=2, max=5}", "search.max_cost=1"])
    assert c.parse_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("foo", "has no '='"),
        ("search.trails=3", "did you mean 'search.trials'?"),
        ("sampling.steps=0", "'sampling.steps': input should be greater than or equal to 1 (given: 0)"),
        ("sampling.steps=many", "'sampling.steps': input should be a valid integer (given: 'many')"),
        ("sampling.steps={min=0, max=3}", "'sampling.steps.min'"),
        ("sampling.steps={min=5, max=3}", "min 5 is larger than max 3"),
        ("sampling.steps.min=2", "set it as a whole"),
        ("search.trials=1.5", "'search.trials'"),
        ("score.images=0", "'score.images': input should be greater than or equal to 2 (given: 0)"),
        ("score.images=100001", "'score.images': input should be less than or equal to 100000"),
        ("score.rungs=[64, 64]", "must increase and stay below images = 256"),
        ("score.rungs=[256]", "must increase and stay below images = 256"),
        ("score.pruner=median", "pruner 'median' needs rungs"),
        ("score.screen_images=128", "must be fewer than the 128 of the first rung"),
        ("score.screen_images=-1", "greater than or equal to 0"),
        ("score.screen_images=1", "'score.screen_images': give 0 for no screen, or at least 2 images (given: 1)"),
        ("score.seed=4294967296", "less than 4294967296"),
        ("model.precision=fp8", "'float32', 'bfloat16' or 'float16' (given: 'fp8')"),
        ("name=a/b", "'name'"),
    ],
)
def test_a_wrong_override_is_explained_in_one_line(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        c.parse_config(TABLE, [override])
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], ("race", [128], 32)),
        (["score.images=64"], ("race", [32], 16)),
        (["score.images=4"], ("race", [2], 0)),
        (["score.images=3"], ("race", [], 0)),
        (["score.rungs=[16, 64]"], ("race", [16, 64], 8)),
        (["score.rungs=[]"], ("race", [], 32)),
        (["score.screen_images=0"], ("race", [128], 0)),
        (["score.screen_images=100"], ("race", [128], 100)),
        (["score.screen_images=2"], ("race", [128], 2)),
        (["sampling.eta=0.5"], ("race", [128], 0)),
        (["sampling.eta={min=0.0, max=0.5}", "score.screen_images=20"], ("race", [128], 0)),
        (["sampling.guidance=[1.0, 2.0]"], ("race", [128], 0)),
        (["sampling.guidance=2.0"], ("race", [128], 32)),
        (["score.metric=kid"], ("race", [128], 32)),
        (["score.pruner=none"], ("none", [], 0)),
        (["score.pruner=median", "score.rungs=[64]"], ("median", [64], 0)),
        (["search.preset=paper"], ("none", [], 0)),
        (["search.preset=paper", "score.pruner=race"], ("race", [128], 0)),
    ],
)
def test_what_prunes_and_where(overrides: list[str], expected: tuple[str, list[int], int]) -> None:
    config = c.parse_config(TABLE, overrides)
    assert (config.pruner, config.rungs, config.screen_images) == expected


@pytest.mark.parametrize("given", ["score.rungs=[64]", "score.screen_images=20"])
def test_rungs_and_screen_need_a_pruner(given: str) -> None:
    for no_pruner in ("score.pruner=none", "search.preset=paper"):
        with pytest.raises(ConfigError, match="need each other: set a pruner") as error:
            c.parse_config(TABLE, [given, no_pruner])
        assert "setting ''" not in str(error.value)


def test_pruners_that_take_falling_values_take_no_kid_and_no_screen() -> None:
    with pytest.raises(ConfigError, match="screen_images 20 is for the race, whose values are not distances"):
        c.parse_config(TABLE, ["score.screen_images=20", "score.pruner=median", "score.rungs=[64]"])
    with pytest.raises(ConfigError, match='with metric = "kid" use "race" or "none"'):
        c.parse_config(TABLE, ["score.metric=kid", "score.pruner=median", "score.rungs=[64]"])


def test_an_unknown_key_in_a_file_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[model]\nsource = "digits"\n[sampling]\nsteps = 4\n[search]\ntrials = 3\n[score]\nextractr = "digits"\n'
    )
    with pytest.raises(ConfigError, match=r"unknown setting 'score\.extractr'; did you mean 'score\.extractor'\?"):
        c.load_config(path)


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[model]\nsource = "digits"\n')
    with pytest.raises(ConfigError, match="'sampling' is missing"):
        c.load_config(path)


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[model]\nsource = "digits"\n[sampling]\nsteps = 4\n[search]\ntrials = 3\n[score]\nextractor = "digits"\n'
    )
    assert c.load_config(path).name == "mine"


def test_clipping_is_on_where_nothing_is_said_of_it() -> None:
    config = c.parse_config(TABLE)
    assert c.differences(config, c.parse_config(TABLE, ["model.clip=true"])) == []
    assert c.differences(config, c.parse_config(TABLE, ["model.clip=false"])) == ["model.clip: True -> False"]


def test_settings_of_the_solver_may_be_lists_and_ranges() -> None:
    config = c.parse_config(
        TABLE,
        [
            "sampling.solver=['ddim', 'deis']",
            "sampling.order=[2, 3]",
            "sampling.final=['zero', 'sigma_min']",
            "sampling.guidance={min=1, max=4}",
        ],
    )
    assert config.sampling.solver == ["ddim", "deis"]
    assert config.sampling.guidance == c.Range(min=1, max=4)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampling.guidance=-1", "greater than or equal to 0"),
        ("sampling.guidance={min=4, max=1}", "min 4.0 must not be negative and must be smaller than max 1.0"),
        ("sampling.guidance={lo=4, max=1}", "unknown setting 'sampling.guidance.lo'"),
        ("sampling.solver=[]", "at least 1 item"),
        ("sampling.final=last", "'zero' or 'sigma_min'"),
        ("sampling.eta=2", "less than or equal to 1"),
        ("sampling.solver=['ddim', 3]", "valid string"),
        ("model.batch=several", "batch"),
        ("model.size=[512]", "at least 2 items"),
    ],
)
def test_a_wrong_setting_of_the_solver_is_one_line(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        c.parse_config(TABLE, [setting])
    assert "\n" not in str(error.value)


def test_eta_is_for_ddim() -> None:
    with pytest.raises(ConfigError, match=r"eta 0\.5 is for solver ddim alone, solver is 'heun'"):
        c.parse_config(TABLE, ["sampling.eta=0.5", "sampling.solver=heun"])


def test_fields_of_an_architecture_are_open() -> None:
    config = c.parse_config(TABLE, ["model.fields.num_heads=4", "model.fields.learn_sigma=true"])
    assert config.model.fields == {"num_heads": 4, "learn_sigma": True}
