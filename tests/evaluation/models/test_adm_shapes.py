"""An ADM's architecture is read off its weights, but for what leaves no trace there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_adm
import torch

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.models.adm_fields import PRESETS, AdmFields, resolve_fields
from autodiffusion_optuna.evaluation.models.adm_shapes import is_adm, matching_presets, visible_fields

SEEN = (
    "num_channels", "num_res_blocks", "channel_mult", "learn_sigma", "class_cond", "use_scale_shift_norm",
    "resblock_updown",
)  # fmt: skip


def described(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    about, tensors = tiny_adm.golden(name)
    weights = {key: value.to("meta") for key, value in tiny_adm.state(tensors).items()}
    return {**about["create_model"], "num_classes": about.get("num_classes") or 0}, weights


@pytest.mark.parametrize("name", ["adm_unet_a", "adm_unet_b"])
def test_what_can_be_seen_is_what_the_network_was_made_with(name: str) -> None:
    made, weights = described(name)
    assert is_adm(weights)
    found = visible_fields(weights, made["image_size"])
    assert {key: found[key] for key in SEEN} == {key: made[key] for key in SEEN}
    own, given = (resolve_fields(None, {"image_size": made["image_size"], **fields}) for fields in (found, made))
    assert own.attention_levels == given.attention_levels
    assert found["num_classes"] == (made["num_classes"] if made["class_cond"] else 0)


def test_a_published_architecture_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    made, weights = described("adm_unet_a")
    assert matching_presets(weights) == []
    tiny = resolve_fields(None, made)
    monkeypatch.setitem(PRESETS, "tiny", tiny)
    monkeypatch.setitem(PRESETS, "wider", replace(tiny, num_channels=64))
    monkeypatch.setitem(PRESETS, "unlabelled", replace(tiny, class_cond=False))
    assert matching_presets(weights) == ["tiny"]


def test_other_networks_are_none() -> None:
    _, weights = described("adm_unet_a")
    assert not is_adm({**weights, "input_blocks.1.1.transformer_blocks.0.norm1.weight": torch.empty(1)})
    assert not is_adm({"weight": torch.empty(3)})
    del weights["input_blocks.1.0.out_layers.3.weight"]
    with pytest.raises(ModelError, match="not those of an ADM"):
        visible_fields(weights, AdmFields().image_size)
