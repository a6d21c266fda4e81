"""Models from a local folder of a DiTPipeline: a class-conditional transformer over latents (arXiv 2212.09748)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.denoiser import Condition, Denoiser, weights_sample
from autodiffusion_optuna.evaluation.models.base import Model, Options, find_device
from autodiffusion_optuna.evaluation.models.checks import (
    check_options,
    check_precision,
    choose_clip,
    decoded_shape,
    sides_of,
    trace_units,
)
from autodiffusion_optuna.evaluation.models.labels import label_conditions
from autodiffusion_optuna.evaluation.models.parts import digest, load_part, load_scheduler, networks_beside, read_config
from autodiffusion_optuna.evaluation.models.vae import load_vae
from autodiffusion_optuna.evaluation.skip import compile_units

NETWORK = "DiTTransformer2DModel"
NAMES = (NETWORK, "Transformer2DModel")
"""Classes that a config may name; the second is what older versions of diffusers called it, among others."""

SCALE = 4.0


def load_dit(
    folder: Path,
    device: str = "cpu",
    precision: str = "float32",
    clip: bool | None = None,
    name: str = "",
    options: Options | None = None,
    network: str = "",
) -> Model:
    """The DiT in ``folder``, which holds ``transformer/`` (or the folder ``network``), ``vae/`` and ``scheduler/``.

    Classes are labels in [0, ``num_embeds_ada_norm``), and the label after the last, 1000 for ImageNet, is the one of
    no class, which classifier-free guidance leads away from. Guidance scale 4 unless ``options.guidance`` is given,
    that of the paper's samples and of DiTPipeline (the paper's best FID is at 1.5). All latent channels are guided,
    as in DiTPipeline; the published code guides the first three only. The learned variance is dropped.
    ``clip``: None or False, as states are latents. ``name`` defaults to the folder's. Nothing is downloaded.
    ``ModelError`` where a part is missing or broken, or the model is of a kind not supported; ``ConfigError`` where
    an option does not suit the model.
    """
    options = options or Options()
    check_precision(precision)
    place = find_device(device)
    name = name or folder.resolve().name
    clip = choose_clip(clip, name, latent=True)
    check_options(options, name)
    transformer = folder / (network or "transformer")
    config, path = read_config(transformer, NAMES), transformer / "config.json"
    shape, classes = _check_network(config, path)
    part = load_part(transformer, NETWORK, config, precision if options.reduced else None)
    scheduler = load_scheduler(folder)
    vae = load_vae(folder / "vae", place, precision, usual=True)
    image_shape = decoded_shape(vae, shape, path)
    net = part.network.to(place)
    conditions = label_conditions(range(classes), place, classes, options.labels)

    def predict(x: Tensor, model_times: Tensor, condition: Condition) -> Tensor:
        output: Tensor = net(x, model_times, class_labels=condition["label"], return_dict=False)[0]
        return output

    units = trace_units(net, lambda x, t: predict(x, t, conditions.rows([0])), shape, place, precision, path)
    if options.compile:
        compile_units(units)
    denoiser = Denoiser(predict, scheduler.schedule, scheduler.prediction, place, precision, clip, units, "free")
    return Model(
        name,
        digest(part.files, config, scheduler.config, {"vae": vae.digest}),
        shape,
        scheduler.schedule,
        denoiser,
        place,
        units.names,
        latent_scale=vae.scale,
        weights=weights_sample(part.network),
        conditions=conditions,
        guidance="free",
        scale=SCALE if options.guidance is None else options.guidance,
        decode=vae.decode,
        encode=vae.encode,
        image_shape=image_shape,
        kind="DiTPipeline",
        notes=(*networks_beside(transformer), *part.notes, *scheduler.notes, *vae.notes),
    )


def _check_network(config: Mapping[str, Any], path: Path) -> tuple[tuple[int, int, int], int]:
    """(C, H, W) of a config's latents, and the number of classes; ``ModelError`` where it describes no DiT."""
    if config.get("norm_type", "ada_norm_zero") != "ada_norm_zero" or config.get("cross_attention_dim") is not None:
        raise ModelError(
            f"{path}: norm_type is {config.get('norm_type')!r} and cross_attention_dim "
            f"{config.get('cross_attention_dim')!r}; only a DiT is supported, with 'ada_norm_zero' and none"
        )
    height, width = sides_of(config.get("sample_size"), path)
    channels, classes = config.get("in_channels", 4), config.get("num_embeds_ada_norm", 1000)
    out = config.get("out_channels") or channels
    if not isinstance(channels, int) or out not in (channels, 2 * channels):
        raise ModelError(
            f"{path}: {channels} channels in and {out} out; expected as many out as in, "
            "or twice as many (learned variance)"
        )
    if type(classes) is not int or classes < 1:
        raise ModelError(f"{path}: num_embeds_ada_norm is {classes!r}; set it to the number of classes")
    return (channels, height, width), classes
