"""A Python script that draws a result's images with an unmodified diffusers model. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.export.recipes import NOT_PIPELINES, SCALING, TEXT_PIPELINES, Recipe, find_recipe
from autodiffusion_optuna.export.result import Result

BUNDLED = ("digits",)
IMAGES = 16
"""Images that a script without prompts draws."""
LATENTS = 2
"""Images that a script with this package's own sampler draws of a model of latents, in one batch."""
PROMPT = "a photograph of a cat"

TYPES, PATH = "import types", "from pathlib import Path"
FILES = "from importlib.resources import files"
FOLDER = "from tempfile import TemporaryDirectory"
STANDARD = (TYPES, PATH, FILES, FOLDER)
TORCH = "import torch"
APPLY = "from autodiffusion_optuna import apply"
DEVICE = '"cuda" if torch.cuda.is_available() else "cpu"'


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
    return _pipeline_script(result, recipe, images) if is_pipeline else _unet_script(result, recipe, images or IMAGES)


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


# Parts of every script


def _head(result: Result, note: str = "") -> str:
    held_out = result.score.held_out
    scored = (
        f"{held_out.mean:.4g} on {held_out.banks} x {held_out.images} held-out images"
        if held_out
        else f"{result.score.value:.4g} on the search's {result.score.images} images"
    )
    what = f"Study {result.study}: {result.solver}, {len(result.timesteps)} steps"
    text = f"{what}, {result.score.metric} {scored}." + (f"\n\n{note}.\n" if note else "")
    return '"""' + text.replace("\\", "/").replace('"', "'") + '"""\n\n'


def _applied_note(result: Result, why: str) -> str:
    return f"The result {why}: autodiffusion_optuna.apply does that. Keep {result.study}.json beside this file"


def _imports(*lines: str) -> str:
    """Import lines in groups: standard library, others, this package."""
    own = sorted(line for line in lines if "autodiffusion_optuna" in line)
    standard = sorted(line for line in lines if line in STANDARD)
    others = sorted((line for line in lines if line not in own + standard), key=lambda line: line.startswith("from"))
    return "\n\n".join("\n".join(group) for group in (standard, others, own) if group) + "\n\n"


def _beside(result: Result) -> str:
    """Expression of the path of the result's JSON."""
    return f'Path(__file__).with_name("{result.study}.json")'


def _constant(name: str, values: Sequence[object]) -> str:
    return f"{name} = {list(values)!r}\n"


def _scheduler_constants(recipe: Recipe) -> str:
    """What the scheduler is given, as the script's constants."""
    if recipe.argument == "timesteps":
        return _constant("TIMESTEPS", recipe.timesteps)
    if recipe.argument == "sigmas":
        return _constant("SIGMAS", recipe.sigmas[:-1])
    return _constant("TIMESTEPS", recipe.timesteps) + _constant("SIGMAS", recipe.sigmas)


def _options(options: dict[str, Any]) -> str:
    return "".join(f"    {key}={value!r},\n" for key, value in options.items())


def _source(result: Result) -> tuple[str, str]:
    """Expression of what from_pretrained is given, and its further arguments."""
    source = result.model.source
    if source in BUNDLED:
        return f'str(files("autodiffusion_optuna") / "assets" / "{source}")', ""
    if Path(source).exists():  # the script may be run elsewhere
        return repr(str(Path(source).absolute())), ""
    name, _, revision = source.partition("@")
    return (repr(name), f", revision={revision!r}") if revision else (repr(source), "")


WIDE_STEP = """

def step(self, model_output, timestep, sample, return_dict=False):
    # Between levels far apart a step multiplies what float32 rounds.
    result = type(self).step(self, model_output.double(), timestep, sample.double(), return_dict=False)
    return (result[0].to(sample.dtype), *result[1:])
"""
FIRST_ORDER_LAST_STEP = """

def step(self, model_output, timestep, sample, return_dict=True):
    if self.step_index == {last}:
        self.lower_order_nums = 0  # the last step, to no noise at all, is first order
    return type(self).step(self, model_output, timestep, sample, return_dict=return_dict)
"""


def _own_timesteps(recipe: Recipe, scheduler: str, wide: bool = False) -> str:
    """Code that makes the scheduler take the list whatever it is asked for; ``wide``: and its steps in float64."""
    if recipe.argument is not None:
        body = (
            "    # No pipeline of this kind hands a list on.\n"
            f"    type(self).set_timesteps(self, {recipe.argument}={recipe.argument.upper()}, device=device)\n"
        )
    else:
        body = (
            "    # This scheduler cannot be given these levels; it sets its own, and ours take their place.\n"
            f"    type(self).set_timesteps(self, {recipe.steps}, device=device)\n"
            "    self.timesteps = torch.tensor(TIMESTEPS, device=device)\n"
            f"    self.sigmas = torch.tensor(SIGMAS{', dtype=torch.float64' if recipe.scales else ''})\n"
        )
    step = FIRST_ORDER_LAST_STEP.format(last=recipe.steps - 1) if recipe.euler_last else WIDE_STEP if wide else ""
    return (
        f"\n\ndef set_timesteps(self, num_inference_steps=None, device=None, **kwargs):\n{body}{step}\n\n"
        f"{scheduler}.set_timesteps = types.MethodType(set_timesteps, {scheduler})\n"
        + (f"{scheduler}.step = types.MethodType(step, {scheduler})\n" if step else "")
    )


# Pipelines


def _pipeline_script(result: Result, recipe: Recipe, images: int | None) -> str:
    """For the pipelines of ``TEXT_PIPELINES``, which pass a list on, and DiT, which does not."""
    kind = result.model.kind
    text = kind in TEXT_PIPELINES
    applied = result.masked or (recipe.scales and kind not in SCALING)
    injected = not applied and (recipe.argument is None or not text)
    why = "skips layers" if result.masked else f"uses a scheduler whose states {kind} does not scale"
    imports = [TORCH, f"from diffusers import {kind if applied else ', '.join(sorted((recipe.scheduler, kind)))}"]
    imports += [PATH, APPLY] if applied else [TYPES] if injected else []
    model, arguments = _source(result)
    labels = f"LABELS = {list(range(images or 4))}  # classes by index\n"
    return (
        _head(result, _applied_note(result, why) if applied else "")
        + _imports(*imports)
        + f"MODEL = {model}\n"
        + (_constant("PROMPTS", [PROMPT] * (images or 1)) if text else labels)
        + ("" if applied else _scheduler_constants(recipe))
        + "\n"
        + _load_pipeline(result, arguments)
        + f"pipe.to({DEVICE})\n"
        + (f"apply(pipe, {_beside(result)})\n" if applied else _set_scheduler(recipe))
        + (_own_timesteps(recipe, "pipe.scheduler", wide=recipe.scales) if injected else "")
        + _call(result, None if applied or injected else recipe.argument)
    )


def _load_pipeline(result: Result, arguments: str) -> str:
    kind, precision, config = result.model.kind, result.model.precision, result.config.model.config
    loader = f"{kind}.from_pretrained(MODEL"
    if result.model.source.endswith(".safetensors"):
        loader = f"{kind}.from_single_file(MODEL" + (f", config={config!r}" if config else "")
    dtype = "" if precision == "float32" else f", torch_dtype=torch.{precision}"
    without = "".join(f", {part}=None" for part in _left_out(result))
    return f"pipe = {loader}{arguments}{without}{dtype})\n"


def _left_out(result: Result) -> list[str]:
    """Parts that the model was saved without: diffusers has to be given None for those that are not optional."""
    path = cached_file(result.config.model.config or result.model.source, "model_index.json")
    if path is None:
        return []
    index = json.loads(path.read_text(encoding="utf-8"))
    expected = ("text_encoder_3", "tokenizer_3") if result.model.kind == "StableDiffusion3Pipeline" else ()
    left_out = {name for name, part in index.items() if isinstance(part, list) and part[:1] == [None]}
    return sorted(name for name in {*left_out, *(set(expected) - index.keys())} if name.isidentifier())


def _set_scheduler(recipe: Recipe) -> str:
    return (
        f"pipe.scheduler = {recipe.scheduler}.from_config(\n    pipe.scheduler.config,\n{_options(recipe.options)})\n"
    )


def _call(result: Result, argument: str | None) -> str:
    """The pipeline's call; ``argument``: that takes the list, None where the scheduler already knows it."""
    text = result.model.kind in TEXT_PIPELINES
    lines = ["PROMPTS" if text else "class_labels=LABELS"]
    lines.append(f"{argument}={argument.upper()}" if argument else f"num_inference_steps={len(result.timesteps)}")
    if result.guidance is not None:
        lines.append(f"guidance_scale={result.guidance!r}")
    if text:
        if negative := result.config.model.negative_prompt:
            lines.append(f"negative_prompt=[{negative!r}] * len(PROMPTS)")
        _, height, width = result.model.image_shape
        lines += [f"height={height}", f"width={width}"]
    lines.append("generator=torch.Generator().manual_seed(0)")
    return "images = pipe(\n" + "".join(f"    {line},\n" for line in lines) + ").images\n"


# Bare networks


def _unet_script(result: Result, recipe: Recipe, images: int) -> str:
    """For a UNet2DModel: a loop of its own, as pipelines pass on neither class labels nor a list."""
    decoder = _decoder(result)
    if result.model.shape != result.model.image_shape and decoder is None:
        why = "the decoder of this model's latents was not found, or is not a plain one"
        return _package_script(result, why, images)
    masked = result.masked
    injected = not masked and recipe.argument is None
    scheduler = "DDPMScheduler" if masked else recipe.scheduler
    classes = ["UNet2DModel", scheduler, *(["DDPMPipeline"] if masked else []), *([decoder[0]] if decoder else [])]
    imports = [TORCH, f"from diffusers import {', '.join(sorted(classes))}"]
    imports += [PATH, APPLY] if masked else [TYPES] if injected else []
    imports += [FILES] if result.model.source in BUNDLED else []
    model, arguments = _source(result)
    unet = f"UNet2DModel.from_pretrained(MODEL{arguments}{_subfolder(result, 'unet')}).eval().to(device)"
    given = f"MODEL{arguments}{_subfolder(result, 'scheduler')}"
    return (
        _head(result, _applied_note(result, "skips layers") if masked else "")
        + _imports(*imports)
        + f"MODEL = {model}\n"
        + ("" if masked else _scheduler_constants(recipe))
        + f"\ndevice = {DEVICE}\n"
        + f"unet = {unet}\n"
        + f"scheduler = {scheduler}.from_pretrained("
        + (f"{given})\n" if masked else f"\n    {given},\n{_options(recipe.options)})\n")
        + (f"scheduler = apply(DDPMPipeline(unet, scheduler), {_beside(result)}).scheduler\n" if masked else "")
        + (_own_timesteps(recipe, "scheduler") if injected else "")
        + _loop(result, recipe, decoder, images)
    )


def _loop(result: Result, recipe: Recipe, decoder: tuple[str, str] | None, images: int) -> str:
    listed = recipe.argument and not result.masked
    asked = f"{recipe.argument}={recipe.argument.upper()}" if listed and recipe.argument else len(result.timesteps)
    scales = recipe.scales and not result.masked  # apply keeps states as this model knows them
    setup, label, guided = _labels(result, images)
    shape = ", ".join(map(str, result.model.shape))
    given = "scaled" if scales else "x"
    stochastic = ", generator=generator" if result.eta else ""
    lines = [
        f"scheduler.set_timesteps({asked}, device=device)",
        *setup,
        "",
        "generator = torch.Generator().manual_seed(0)",
        f"x = torch.randn({images}, {shape}, generator=generator)",
        f"x = x.to(device){'.double() * scheduler.init_noise_sigma' if scales else ''}",
        "with torch.inference_mode():",
        "    for t in scheduler.timesteps:",
    ]
    if scales:
        lines.append(
            "        scaled = scheduler.scale_model_input(x, t).float()  # steps are in float64: levels lie far apart"
        )
    lines.append(f"        output = unet({given}, t{label}).sample")
    if guided:
        lines.append(f"        away = unet({given}, t, class_labels=none).sample")
        lines.append(f"        output = away + {result.guidance!r} * (output - away)")
    lines.append("        output = output[:, : x.shape[1]]  # a learned variance is not used")
    lines.append(f"        x = scheduler.step(output, t, x{stochastic}).prev_sample")
    if scales and result.final == "sigma_min":
        lines.append(f"    x = x * {result.noise.alpha[-1]!r}  # this scheduler's states are x / alpha")
    if decoder:
        lines += ["    x = x.float()"] if scales else []
        lines.append(f"    vae = {decoder[0]}.from_pretrained(MODEL, subfolder={decoder[1]!r}).eval().to(device)")
        lines.append("    x = vae.decode(x / vae.config.scaling_factor).sample")
    lines.append(f"images = ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).cpu()  # [{images}, C, H, W]")
    return "\n".join(lines) + "\n"


def _labels(result: Result, images: int) -> tuple[list[str], str, bool]:
    """Lines that choose classes, the network's argument, and whether it is guided away from the null class."""
    if result.conditions is None:
        return [], "", False
    null = result.config.model.fields.get("null_class")
    classes = "range(unet.config.num_class_embeds)"
    if null is not None:
        classes = f"[c for c in {classes} if c != {null!r}]"
    setup = [
        f"classes = {classes}",
        f"labels = torch.tensor([classes[i % len(classes)] for i in range({images})], device=device)",
    ]
    guided = result.model.guidance == "free" and result.guidance not in (None, 1)
    if guided:
        setup.append(f"none = torch.full_like(labels, {null!r})")
    return setup, ", class_labels=labels", guided


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


# This package's own sampler


def _package_script(result: Result, why: str, images: int | None) -> str:
    note = (
        f"{why[0].upper()}{why[1:]}:\n"
        f"this script uses the sampler that the search used. Keep {result.study}.json beside it"
    )
    count = images or (IMAGES if result.model.shape == result.model.image_shape else LATENTS)
    prompted = result.config.model.prompts is not None
    loaders = f"from autodiffusion_optuna.evaluation.models import {', '.join(_loaders(result))}"
    drawing = "from autodiffusion_optuna.export.draw import draw"
    return (
        _head(result, note)
        + _imports(PATH, *([FOLDER] if prompted else []), "from autodiffusion_optuna import Result", loaders, drawing)
        + (_constant("PROMPTS", [PROMPT] * count) + "\n" if prompted else "")
        + f"result = Result.read({_beside(result)})\n"
        + _load_model(result, prompted)
        + f"images = draw(result, model, images={count})  # uint8 [{count}, C, H, W]\n"
    )


def _loaders(schedule: Result) -> list[str]:
    return ["Options", "load_model"] if _model_options(schedule) else ["load_model"]


def _load_model(schedule: Result, prompted: bool) -> str:
    """Code that loads the model as the study does, with the script's own prompts."""
    arguments = [repr(schedule.model.source), 'device="auto"', f"clip={schedule.model.clip!r}"]
    if schedule.model.precision != "float32":
        arguments.append(f"precision={schedule.model.precision!r}")
    if options := _model_options(schedule):
        arguments.append("options=Options(" + ", ".join(f"{key}={value}" for key, value in options.items()) + ")")
    call = f"model = load_model({', '.join(arguments)})\n"
    if not prompted:
        return call
    return (
        "with TemporaryDirectory() as folder:\n"
        '    prompts = Path(folder) / "prompts.txt"\n'
        '    prompts.write_text("\\n".join(PROMPTS), encoding="utf-8")\n'
        f"    {call}"
    )


def _model_options(schedule: Result) -> dict[str, str]:
    """Arguments of ``Options``, as code, where they differ from its defaults."""
    if schedule.config is None:
        return {}
    model = schedule.config.model
    options = {key: repr(getattr(model, key)) for key in ("preset", "fields", "negative_prompt") if getattr(model, key)}
    for key in ("classifier", "config"):
        if getattr(model, key) is not None:
            options[key] = f"Path({getattr(model, key)!r})"
    if model.prompts is not None:
        options["prompts"] = "prompts"  # the script's own
    if schedule.model.precision != "float32":
        options["reduced"] = "True"
    if model.size is not None:
        options["size"] = repr(tuple(model.size))
    if schedule.model.kind == "plugin":
        options["trust"] = "True"  # whoever runs the script runs the plug-in's code
    return options
