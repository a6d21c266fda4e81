"""A Python script that draws a result's images with an unmodified diffusers model, and saves them. Torch-free.

What the scripts say is in the templates of ``assets/scripts``; here is which one a result needs, and what fills it.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodiffusion_optuna.config import BUNDLED
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.export.recipes import NOT_PIPELINES, SCALING, TEXT_PIPELINES, Recipe, find_recipe
from autodiffusion_optuna.export.result import Result

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent.parent / "assets" / "scripts"
IMAGES = 16
"""Images that a script without prompts draws."""
LATENTS = 2
"""Images that a script with this package's own sampler draws of a model of latents, in one batch."""
SHOWN = 96
"""Pixels to which the longer side of small images is enlarged, by a whole factor."""
PROMPT = "a photograph of a cat"


def diffusers_script(result: Result, images: int | None = None, why_not: str | None = None) -> str:
    """A script that draws images by the result with an unmodified model.

    Plain diffusers where it has the solver and nothing is skipped; else with ``autodiffusion_optuna.apply``; with this
    package's own sampler where diffusers has no scheduler that takes the steps, or cannot load the model. The last two
    read the result's JSON, ``STUDY.json``, from the folder of the script.
    ``images``: how many it draws; None: as many as suit a first look. ``why_not``: what was found to be wrong with the
    script for diffusers, in place of which this package's own sampler is used.
    """
    kind, guidance = result.model.kind, result.model.guidance
    is_pipeline = kind in (*TEXT_PIPELINES, "DiTPipeline")
    if why_not is not None:
        return _package_script(result, why_not, images)
    if kind in NOT_PIPELINES:
        return _package_script(result, f"diffusers has no pipeline for this model ({kind})", images)
    if is_pipeline and guidance == "free" and (result.guidance or 0) < 1:
        return _package_script(result, "diffusers' pipelines apply no guidance below a scale of 1", images)
    try:
        recipe = find_recipe(result)
    except ConfigError as error:
        return _package_script(result, str(error).partition(";")[0], images)
    return _pipeline_script(result, recipe, images) if is_pipeline else _network_script(result, recipe, images)


def uses_diffusers(script: str) -> bool:
    """Whether a script of ``diffusers_script`` draws with diffusers, and not with this package's own sampler."""
    return "from diffusers import " in script


def reads_json(script: str) -> bool:
    """Whether a script of ``diffusers_script`` reads the result's JSON."""
    return "Path(__file__)" in script


def cached_file(source: str, name: str) -> Path | None:
    """A file of a model in a local folder or in the hub's cache; nothing is downloaded."""
    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, revision = source.partition("@")
    try:
        found = try_to_load_from_cache(repository, name, revision=revision or None)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


@functools.cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["repr"] = repr
    environment.filters["plain"] = lambda text: text.replace("\\", "/").replace('"', "'")  # inside a docstring
    return environment


def _render(template: str, result: Result, **values: Any) -> str:
    model, revision = _source(result)
    given = {"result": result, "model": model, "revision": revision, "prompt": PROMPT}
    return _templates().get_template(template).render(**given, **values)


def _source(result: Result) -> tuple[str, str]:
    """Expression of what from_pretrained is given, and its further arguments."""
    source = result.model.source
    if source in BUNDLED:
        return f'str(files("autodiffusion_optuna") / "assets" / "{source}")', ""
    if Path(source).exists():  # the script may be run elsewhere
        return repr(str(Path(source).absolute())), ""
    name, _, revision = source.partition("@")
    return (repr(name), f", revision={revision!r}") if revision else (repr(source), "")


def _pipeline_script(result: Result, recipe: Recipe, images: int | None) -> str:
    """For the pipelines of ``TEXT_PIPELINES``, which pass a list on, and DiT, which does not."""
    kind = result.model.kind
    text = kind in TEXT_PIPELINES
    applied = result.masked or (recipe.scales and kind not in SCALING)
    return _render(
        "pipeline.py.j2",
        result,
        recipe=recipe,
        images=images,
        text=text,
        applied=applied,
        injected=not applied and (recipe.argument is None or not text),
        left_out=_left_out(result),
    )


def _left_out(result: Result) -> list[str]:
    """Parts that the model was saved without: diffusers has to be given None for those that are not optional."""
    path = cached_file(result.config.model.config or result.model.source, "model_index.json")
    if path is None:
        return []
    index = json.loads(path.read_text(encoding="utf-8"))
    expected = ("text_encoder_3", "tokenizer_3") if result.model.kind == "StableDiffusion3Pipeline" else ()
    left_out = {name for name, part in index.items() if isinstance(part, list) and part[:1] == [None]}
    return sorted(name for name in {*left_out, *(set(expected) - index.keys())} if name.isidentifier())


def _network_script(result: Result, recipe: Recipe, images: int | None) -> str:
    """For a UNet2DModel: a loop of its own, as pipelines pass on neither class labels nor a list."""
    decoder = _decoder(result)
    if result.model.shape != result.model.image_shape and decoder is None:
        why = "the decoder of this model's latents was not found, or is not a plain one"
        return _package_script(result, why, images)
    return _render(
        "network.py.j2",
        result,
        recipe=recipe,
        images=images or IMAGES,
        **_layout(result, images or IMAGES),
        bundled=result.model.source in BUNDLED,
        subfolder={part: _subfolder(result, part) for part in ("unet", "scheduler")},
        decoder=decoder,
    )


def _subfolder(result: Result, part: str) -> str:
    """The loader's subfolder argument: pipelines keep their parts in folders, a bare model does not."""
    source = result.model.source
    config = "scheduler_config.json" if part == "scheduler" else "config.json"
    inside = source in BUNDLED or cached_file(source, f"{part}/{config}") is not None
    if not inside and not Path(source).exists():  # a hub id that is not at hand: the usual layout
        inside = cached_file(source, "config.json") is None
    return f', subfolder="{part}"' if inside else ""


def _decoder(result: Result) -> tuple[str, str] | None:
    """(class, subfolder) of a latent model's decoder, whose latents are scaled by one factor."""
    for part in ("vqvae", "vae"):
        path = cached_file(result.model.source, f"{part}/config.json")
        if path is not None:
            config = json.loads(path.read_text(encoding="utf-8"))
            plain = not any(config.get(key) for key in ("latents_mean", "latents_std", "shift_factor"))
            name = str(config.get("_class_name"))
            return (name, part) if plain and name.isidentifier() else None
    return None


def _package_script(result: Result, why: str, images: int | None) -> str:
    """With this package's own sampler."""
    of_pixels = result.model.shape == result.model.image_shape
    images = images or (IMAGES if of_pixels else LATENTS)
    return _render("package.py.j2", result, why=why, images=images, **_layout(result, images))


def _layout(result: Result, images: int) -> dict[str, int]:
    """A picture of the images: ``rows`` of equal length, near a square; ``scale``, by which small ones grow."""
    rows = next(rows for rows in range(math.isqrt(images), 0, -1) if images % rows == 0)
    return {"rows": rows, "scale": max(1, SHOWN // max(result.model.image_shape[1:]))}
