"""The committed benchmark results are complete and say what README claims of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())["result"]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_every_result_names_its_machine_and_versions(path: Path) -> None:
    machine = json.loads(path.read_text())["machine"]
    assert {"cpu", "cores", "threads", "python", "torch", "numpy", "optuna"} <= machine.keys()
    assert not any("/" in str(value) for value in machine.values())


def test_the_demo_finds_a_far_better_schedule_in_minutes() -> None:
    demo = result("digits-4")
    show = demo["show"]
    baselines = {b["name"]: b["held_out"] for b in show["baselines"]}
    best = show["best"]["held_out"]
    assert demo["wall_seconds"] < 300
    assert (best["images"], best["banks"]) == (1000, 3)
    assert best["mean"] <= 0.65 * baselines["uniform"]["mean"]
    assert best["mean"] <= 0.75 * baselines[demo["best_baseline"]]["mean"]
    assert best["high"] < min(baselines["uniform"]["low"], baselines[demo["best_baseline"]]["low"])


def test_the_layer_search_stays_within_its_cost() -> None:
    layers = result("digits-10-layers")
    assert layers["show"]["best"]["cost"] <= 0.8 + 1e-9
    assert layers["show"]["stage"] == 2
    assert {"uniform, every layer on", "best without skips"} == set(layers["without_skips"])


def test_the_prefix_cache_changed_no_bit() -> None:
    prefix = result("prefix")
    assert prefix["candidates"] >= 200
    assert prefix["candidates whose values differ in any bit"] == 0
    assert prefix["evaluations saved, digits-4"] > prefix["evaluations saved, digits-4-paper"] > 0


def test_the_distance_is_fast_and_right() -> None:
    frechet = result("frechet")
    assert frechet["speed_ratio"] >= 40
    assert frechet["relative_difference"] < 1e-6


@pytest.mark.parametrize("budget", [100, 300])
def test_our_preset_has_less_regret_than_the_published_search(budget: int) -> None:
    mixture = result("mixture")
    assert mixture["candidates"] == 9880
    ours, published = (mixture[f"{preset}, {budget} trials"] for preset in ("adopt", "paper"))
    assert ours["seeds"] == published["seeds"] == 10
    assert ours["regret mean"] < published["regret mean"]


def test_taking_a_trial_was_measured_in_both_databases_and_sizes() -> None:
    storage = result("storage")
    assert storage["parameters"] == 30
    for name, limit in (("sqlite", 100), ("postgres", 250)):
        small, large = (storage["milliseconds"][name][size] for size in ("100", "5000"))
        assert large["cpu"] < 3 * small["cpu"]  # fifty times the trials
        assert large["together"] < limit
        assert large["locked"] < 60
    sleeping = storage["sleeping"]
    assert sleeping["trials"] == 160
    assert min(sleeping["fewest and most of one worker"]) >= 15


def test_the_dashboard_bears_thousands_of_trials() -> None:
    dashboard = result("dashboard")
    assert dashboard["parameters"] == 30
    assert dashboard["trials"] >= 5000
    assert dashboard["poll with a new trial, seconds"] < 15


def test_the_check_at_load_tells_the_clear_cases_apart() -> None:
    sanity = result("sanity")
    warned = {name: row["images"]["warned"] for name, row in sanity["rows"].items()}
    for kind in ("digits", "ADM"):
        assert not warned[f"{kind}, right"]
        assert not sanity["rows"][f"{kind}, right"]["own samples"]["warned"]
        for wrong in (
            "prediction: sample",
            "prediction: v",
            "prediction: flow",
            "betas: cosine",
            "betas: scaled linear, Stable Diffusion's",
            "weights halved",
            "weights doubled",
            "random: weights shuffled",
            "states doubled",
            "states halved",
        ):
            assert warned[f"{kind}, {wrong}"], (kind, wrong)
    for name in ("digits, states doubled", "ADM, states doubled"):  # a right model that does not clip
        assert not sanity["rows"][name]["own samples"]["warned"]
    assert warned["ADM, attention: other order"]
    assert not warned["digits, attention: other order"]  # it hardly matters there
    for name, worst in sanity["false alarms"].items():
        assert worst["largest ratio"] < 0.6, name
        assert worst["least kept"] > 0.9, name
