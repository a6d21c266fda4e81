"""Class labels as the condition of a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from autodiffusion_optuna.evaluation.models.base import Conditions
from autodiffusion_optuna.evaluation.seeds import Draw


def label_conditions(
    labels: Sequence[int], device: torch.device, null: int | None = None, draw: Draw = "balanced"
) -> Conditions:
    """Condition ``{"label": int64 [n]}`` of a model with the class labels ``labels``.

    ``null``: label of no class, which classifier-free guidance leads away from; None where the model has none.
    """
    known = torch.tensor(list(labels), dtype=torch.int64, device=device)

    def rows(chosen: Sequence[int]) -> dict[str, Tensor]:
        return {"label": known[torch.tensor(list(chosen), dtype=torch.int64, device=device)]}

    def negative(count: int) -> dict[str, Tensor]:
        assert null is not None
        return {"label": torch.full((count,), null, device=device)}

    described = json.dumps({"labels": list(labels), "null": null, "draw": draw})
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    return Conditions("labels", len(labels), rows, negative if null is not None else None, fingerprint, draw)
