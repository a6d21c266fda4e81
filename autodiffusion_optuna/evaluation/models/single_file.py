"""Networks from one safetensors file in the layout of their authors, read by diffusers' converters."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autodiffusion_optuna.errors import ConfigError, ModelError, first_line
from autodiffusion_optuna.evaluation.models.checkpoints import open_safetensors, read_weights
from autodiffusion_optuna.evaluation.tensors import Weights, plain_weights


def read_single_file(
    path: Path, kind: str, config: Path, subfolder: str, dtype: torch.dtype = torch.float32
) -> tuple[Weights, list[str]]:
    """Weights of diffusers' class ``kind`` from one file in the layout of its authors, by diffusers' names.

    Where the file holds a moving average besides the weights in training, it is the average, as in the folders that
    the authors publish. ``config``: a pipeline's folder, in whose ``subfolder`` the class's config lies. ``dtype``: the
    one in which matrices are kept in the end. The second value says what of the file is used where it holds more, a
    line each. ``ModelError`` where the file does not hold such weights, or holds any that the converter would drop;
    ``ConfigError`` where diffusers cannot read single files of this class.
    """
    import diffusers

    original: Any = getattr(diffusers, kind)
    if not hasattr(original, "from_single_file"):
        raise ConfigError(f"{path}: diffusers cannot read a {kind} from a single file; give the folder of its pipeline")
    stored = read_weights([path])
    own = {name: tensor for name, tensor in stored.items() if not name.startswith(OTHER_PARTS) and name not in MARKERS}
    weights = dict(plain_weights(own, path, dtype=dtype))
    averaged = sum(name.startswith("model_ema.") for name in weights) > 100  # fewer are none to diffusers
    converted = _convert(original, weights.copy(), path, config, subfolder)
    # The same once more with each tensor's number in its place tells which ones the converter takes. It looks at no
    # more than their rows.
    numbers = {
        name: torch.tensor(i).expand((*tensor.shape[:1], *[1] * (tensor.ndim - 1)))
        for i, (name, tensor) in enumerate(weights.items())
    }
    places = _convert(original, numbers, path, config, subfolder)
    taken = {int(number) for rows in places.values() for number in rows.flatten().tolist()}
    training = {name for name in weights if averaged and name.startswith("model.")}
    unused = [name for i, name in enumerate(weights) if i not in taken and name not in training]
    if unused:
        raise ModelError(
            f"{path}: holds tensors that are no weights of the {kind} in {config / subfolder}, {len(unused)} of them, "
            f"first {unused[0]!r}, and what they mean is not known; give a file of the plain weights, and in "
            "model.config the folder of a pipeline of the same kind"
        )
    return converted, list(_notes(path, stored, averaged, config))


OTHER_PARTS = ("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae.", "safety_checker.")
"""What names of the other parts of a pipeline begin with, in a file that holds them as well."""

EDM = ("edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std")
MARKERS = ("v_pred", "ztsnr", "scale_factor", *EDM)
"""Names of tensors that say how the network was trained."""


PREDICTION_TYPES = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "sample": "sample",
    "x0": "sample",
}
"""What ``modelspec.prediction_type`` says -> diffusers' name; what else is said of flows is of no consequence."""


def training_facts(path: Path) -> dict[str, Any]:
    """What a single file itself says of the training of its network, by the names of diffusers' configs.

    ``prediction_type`` and ``rescale_betas_zero_snr`` where they are marked, ``scaling_factor`` of the latents,
    ``alphas_cumprod`` float [T]. ``ModelError`` where it was trained on other noise than the pipelines read here, or
    contradicts itself.
    """
    with open_safetensors(path) as stored:
        names = set(stored.keys())
        marked = {name: stored.get_tensor(name).float() for name in ("scale_factor", "alphas_cumprod") if name in names}
        metadata = stored.metadata() or {}
    if found := sorted(names.intersection(EDM)):
        raise ModelError(
            f"{path}: holds {found[0]!r}, so it was trained on EDM's noise levels or latents, which a pipeline of "
            "betas does not have; write a plug-in for it (python:module:function)"
        )
    facts: dict[str, Any] = {}
    if predictions := _predictions(names, metadata):
        facts["prediction_type"] = next(iter(predictions.values()))
    if len(set(predictions.values())) > 1:
        said = ", ".join(f"{place} says {value}" for place, value in predictions.items())
        raise ModelError(f"{path}: contradicts itself: {said}; save it again without the wrong one")
    if "ztsnr" in names:
        facts["rescale_betas_zero_snr"] = True
    if "scale_factor" in marked and marked["scale_factor"].numel() == 1:
        facts["scaling_factor"] = float(marked["scale_factor"])
    if "alphas_cumprod" in marked and marked["alphas_cumprod"].ndim == 1:
        facts["alphas_cumprod"] = marked["alphas_cumprod"].numpy()
    return facts


def _predictions(names: Collection[str], metadata: Mapping[str, str]) -> dict[str, str]:
    """Each place in a file that says what its network predicts, and what it says."""
    found = {"the tensor v_pred": "v_prediction"} if "v_pred" in names else {}
    if metadata.get("ss_v_parameterization", "").lower() == "true":
        found["ss_v_parameterization"] = "v_prediction"
    written = metadata.get("modelspec.prediction_type", "").lower()
    if written in PREDICTION_TYPES:
        found["modelspec.prediction_type"] = PREDICTION_TYPES[written]
    return found


def _notes(path: Path, stored: Weights, averaged: bool, config: Path) -> Iterator[str]:
    if averaged:
        yield f"{path.name} holds weights twice: the moving average model_ema is used, not those in training"
    others = sorted({name.split(".")[0] for name in stored if name.startswith(OTHER_PARTS)})
    if others:
        yield f"of {path.name} the denoising network alone is used, not {', '.join(others)}: those of {config} are"


def _convert(original: Any, stored: dict[str, Tensor], path: Path, config: Path, subfolder: str) -> dict[str, Tensor]:
    """``stored`` by the names of diffusers' class ``original``, in whatever shapes."""
    import diffusers

    converted: dict[str, Tensor] = {}

    def from_config(cls: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.device("meta"):
            return super(caught, cls).from_config(*args, **kwargs)

    def load_state_dict(self: nn.Module, weights: Weights, strict: bool = True) -> tuple[list[str], list[str]]:
        converted.update(weights)
        return [], []

    # The class itself would leave weights that the file lacks at random, and say so nowhere.
    methods = {"from_config": classmethod(from_config), "load_state_dict": load_state_dict}
    caught: Any = type(original.__name__, (original,), methods)
    log = diffusers.utils.logging
    level = log.get_verbosity()
    log.set_verbosity_error()
    try:
        caught.from_single_file(
            stored,
            config=str(config),
            subfolder=subfolder,
            local_files_only=True,
            low_cpu_mem_usage=False,
            extract_ema=True,
        )
    except Exception as error:  # a KeyError for a weight that is not there, and whatever else
        raise ModelError(
            f"{path}: holds no weights of the {original.__name__} in {config / subfolder} ({type(error).__name__}: "
            f"{first_line(error)}); give model.config the folder of a pipeline of the same kind"
        ) from error
    finally:
        log.set_verbosity(level)
    return converted
