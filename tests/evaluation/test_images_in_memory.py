"""Images of a reference that are in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.references.in_memory import images_of

COLOUR = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)
GREY = COLOUR[..., :1]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (COLOUR, COLOUR),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR),
        (torch.from_numpy(COLOUR), COLOUR),
        ([Image.fromarray(image) for image in COLOUR], COLOUR),
        (GREY, GREY),
        (GREY[..., 0], GREY),
        ([Image.fromarray(image[..., 0]) for image in GREY], GREY),
        ([Image.fromarray(GREY[0, ..., 0]), Image.fromarray(COLOUR[1])], np.stack([GREY[0].repeat(3, 2), COLOUR[1]])),
    ],
)
def test_they_come_channels_first(given: Any, wanted: np.ndarray[Any, Any]) -> None:
    found = images_of(given)
    assert found.dtype == torch.uint8
    assert (found.numpy() == wanted.transpose(0, 3, 1, 2)).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (COLOUR / 255, "pixels must be uint8"),
        (COLOUR[0, 0], r"images are an array uint8 \[8, 3\]; give"),
        (COLOUR[:0], "give a folder"),
        (COLOUR[:, :3], "either the second or the last size could be the channels"),
        (COLOUR.repeat(2, 3), "without channels"),
        (["a.png", "b.png"], "images are a list"),
        ([Image.fromarray(COLOUR[0]), Image.fromarray(COLOUR[0, :4])], "images are of 2 sizes"),
        ([Image.new("F", (4, 4))] * 2, "has 'F' pixels"),
    ],
)
def test_other_things_are_refused(given: Any, message: str) -> None:
    with pytest.raises(StatisticsError, match=message):
        images_of(given)
