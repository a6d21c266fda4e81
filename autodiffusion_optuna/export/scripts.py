"""Take a result out of a study: a JSON schedule, a script for diffusers, sigmas for ComfyUI. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import optuna

from autodiffusion_optuna._version import __version__
from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import ModelConfig, Range, StudyConfig
from autodiffusion_optuna.errors import ConfigError, ModelError, StudyError, choose_from
from autodiffusion_optuna.export.pipelines import NOT_PIPELINES, SCALING, TEXT_PIPELINES, Recipe, find_recipe
from autodiffusion_optuna.export.schedule import ConfigPart, HeldOutPart, ModelPart, NoisePart, Result, ScorePart
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.results.summary import Best, StudySummary, read_summary
from autodiffusion_optuna.storage.attrs import MODEL_FACTS, NOISE, VERSION

BUNDLED = ("digits",)
IMAGES = 16
"""Images that a script without prompts draws."""
LATENTS = 2
"""Images that a script with this package's own sampler draws of a model of latents, in one batch."""
PROMPT = "a photograph of a cat"


def export_result(study: optuna.Study) -> Result:
    """Everything needed to repeat the best candidate's images (StudyError where there is none yet)."""
    return result_of(read_summary(study))


def result_of(report: StudySummary) -> Result:
    """``export_schedule`` of a study as it was read."""
    if report.best is None:
        raise StudyError(f"study {report.config.name!r} has no finished trial to export; run it first")
    config, best, attrs = report.config, report.best, report.attrs
    candidate = best.candidate
    sampling = _sampling(config, candidate, attrs)
    packed = attrs.get(NOISE)
    return Result(
        study=config.name,
        model=_model(config, attrs),
        train_timesteps=attrs["codec"]["T"],
        amplification_cap=config.sampling.amplification_cap,
        timesteps=candidate.timesteps,
        skips=tuple(tuple(names) for names in candidate.skip_names(report.units)),
        cost=best.cost,
        score=_score(config, report.metric, best),
        conditions=attrs.get("conditions"),
        noise=NoisePart.of(NoiseSchedule.unpack(packed), candidate.timesteps, sampling["final"]) if packed else None,
        config=ConfigPart(model=config.model, score=config.score),
        made_with={"autodiffusion_optuna": attrs.get(VERSION, __version__), **_versions()},
        **sampling,
    )


def _versions() -> dict[str, str]:
    """Versions here of the packages that decide what is drawn; without importing them."""
    names = ("optuna", "torch", "diffusers", "transformers")
    return {name: metadata.version(name) for name in names if any(metadata.distributions(name=name))}


def _sampling(config: StudyConfig, candidate: Candidate, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Solver, final, eta and guidance: what the candidate chose, else what the study fixes."""
    from autodiffusion_optuna.evaluation.solvers import solver_names

    fixed, chosen = config.sampling, candidate.settings_dict
    facts = attrs.get(MODEL_FACTS, {})
    guided = facts.get("guidance", "none") != "none"

    def setting(name: str) -> Any:
        return chosen[name] if name in chosen else _first(getattr(fixed, name))

    guidance = setting("guidance")
    return {
        "solver": chosen.get("solver") or solver_names(setting("solver"), _first(fixed.order)),
        "final": setting("final"),
        "eta": setting("eta"),
        "guidance": (facts["scale"] if guidance is None else guidance) if guided else None,
    }


def _first(value: Any) -> Any:
    """A setting that is not searched: itself, or the only one of a list."""
    assert not isinstance(value, Range), "a searched setting is the candidate's"
    return value[0] if isinstance(value, list) else value


def _model(config: StudyConfig, attrs: Mapping[str, Any]) -> ModelPart:
    facts = attrs.get(MODEL_FACTS, {"kind": "mixture" if config.model.source == "mixture" else "UNet2DModel"})
    shape, image_shape, units = facts.get("shape"), facts.get("image_shape"), facts.get("units")
    return ModelPart(
        source=config.model.source,
        sha256=attrs["model"],
        kind=facts["kind"],
        prediction=facts.get("prediction"),
        # Unset: models of pixels clip, and latent ones cannot.
        clip=shape == image_shape if config.model.clip is None else config.model.clip,
        precision=config.model.precision,
        guidance=facts.get("guidance", "none"),
        shape=shape and tuple(shape),
        image_shape=image_shape and tuple(image_shape),
        latent_scale=facts.get("latent_scale"),
        weights=facts.get("weights"),
        units=None if units is None else tuple(units),
    )


def _score(config: StudyConfig, metric: str, best: Best) -> ScorePart:
    held_out = None if best.held_out is None else HeldOutPart(**best.held_out.summary())
    return ScorePart(metric=metric, value=best.value, images=config.score.images, held_out=held_out)


def load_schedule(path: Path, units: tuple[str, ...]) -> Candidate:
    """Candidate of an exported JSON schedule for a model with the given unit names (ConfigError)."""
    return Result.read(path).candidate(units)


def export_text(study: optuna.Study, form: str) -> str:
    """The best candidate as a file's text; ``form``: a name of ``FORMS`` (ConfigError, StudyError)."""
    return result_text(export_result(study), form)


def result_text(schedule: Result, form: str) -> str:
    """A schedule as a file's text; ``form``: a name of ``FORMS``.

    ``ConfigError`` for an unknown form, and for a model that neither diffusers nor ComfyUI can load.
    """
    if form not in FORMS:
        raise ConfigError(choose_from("format", form, FORMS))
    if form != "json" and schedule.model.kind == "mixture":
        raise ConfigError(
            "the analytic mixture is not a model of diffusers or ComfyUI; export it with adopt export --format json"
        )
    return FORMS[form](schedule)


# diffusers


def diffusers_script(schedule: Result, images: int | None = None, why_not: str | None = None) -> str:
    """A script that draws images by the schedule with an unmodified model.

    Plain diffusers where it has the solver and nothing is skipped; else with ``autodiffusion_optuna.apply``; with this
    package's own sampler where diffusers has no scheduler that takes the steps, or cannot load the model. The last two
    read the schedule's JSON, ``STUDY.json``, from the folder of the script.
    ``images``: how many it draws; None: as many as suit a first look. ``why_not``: what was found to be wrong with the
    script for diffusers, in place of which this package's own sampler is used.
    """
    kind = schedule.model.kind
    if why_not is not None:
        return _package_script(schedule, why_not, images)
    if kind in NOT_PIPELINES:
        return _package_script(schedule, f"diffusers has no pipeline for this model ({kind})", images)
    if kind in (*TEXT_PIPELINES, "DiTPipeline") and schedule.model.guidance == "free" and (schedule.guidance or 0) < 1:
        return _package_script(schedule, "diffusers' pipelines apply no guidance below a scale of 1", images)
    try:
        recipe = find_recipe(schedule)
    except ConfigError as error:
        schedule.require_noise()
        return _package_script(schedule, str(error).partition(";")[0], images)
    if kind in (*TEXT_PIPELINES, "DiTPipeline"):
        return _pipeline_script(schedule, recipe, images)
    return _unet_script(schedule, recipe, images or IMAGES)


def uses_diffusers(script: str) -> bool:
    """Whether a script of ``diffusers_script`` draws with diffusers, and not with this package's own sampler."""
    return "from diffusers import " in script


def reads_json(script: str) -> bool:
    """Whether a script of ``diffusers_script`` reads the schedule's JSON."""
    return "Path(__file__)" in script


def _head(schedule: Result, note: str = "") -> str:
    held_out = schedule.score.held_out
    scored = (
        f"{held_out.mean:.4g} on {held_out.banks} x {held_out.images} held-out images"
        if held_out
        else f"{schedule.score.value:.4g} on the search's {schedule.score.images} images"
    )
    what = f"Study {schedule.study}: {schedule.solver}, {len(schedule.timesteps)} steps"
    text = f"{what}, {schedule.score.metric} {scored}." + (f"\n\n{note}.\n" if note else "")
    return '"""' + text.replace("\\", "/").replace('"', "'") + '"""\n\n'


def _imports(*lines: str) -> str:
    """Import lines in groups: standard library, others, this package."""
    own = sorted(line for line in lines if "autodiffusion_optuna" in line)
    standard = sorted(line for line in lines if line in STANDARD)
    others = sorted((line for line in lines if line not in own + standard), key=lambda line: line.startswith("from"))
    return "\n\n".join("\n".join(group) for group in (standard, others, own) if group) + "\n\n"


TYPES, PATH = "import types", "from pathlib import Path"
FILES = "from importlib.resources import files"
FOLDER = "from tempfile import TemporaryDirectory"
STANDARD = (TYPES, PATH, FILES, FOLDER)
TORCH = "import torch"
APPLY = "from autodiffusion_optuna import apply"
DEVICE = '"cuda" if torch.cuda.is_available() else "cpu"'


def _beside(schedule: Result) -> str:
    """Expression of the path of the schedule's JSON."""
    return f'Path(__file__).with_name("{schedule.study}.json")'


def _constant(name: str, values: Sequence[object]) -> str:
    return f"{name} = {list(values)!r}\n"


def _options(options: dict[str, Any]) -> str:
    return "".join(f"    {key}={value!r},\n" for key, value in options.items())


def _source(schedule: Result) -> tuple[str, str]:
    """Expression of what from_pretrained is given, and its further arguments."""
    source = schedule.model.source
    if source in BUNDLED:
        return f'str(files("autodiffusion_optuna") / "assets" / "{source}")', ""
    if Path(source).exists():  # the script may be run elsewhere
        return repr(str(Path(source).absolute())), ""
    name, _, revision = source.partition("@")
    if revision:
        return repr(name), f", revision={revision!r}"
    return repr(source), ""


def _constants(recipe: Recipe, schedule: Result) -> str:
    """What the scheduler is told, as the script's constants."""
    if recipe.argument == "timesteps":
        return _constant("TIMESTEPS", schedule.timesteps)
    if recipe.argument == "sigmas":
        return _constant("SIGMAS", recipe.sigmas[:-1])
    return _constant("TIMESTEPS", recipe.timesteps) + _constant("SIGMAS", recipe.sigmas)


WIDE_STEP = """

def step(self, model_output, timestep, sample, return_dict=False):
    # Between levels far apart a step multiplies what float32 rounds.
    result = type(self).step(self, model_output.double(), timestep, sample.double(), return_dict=False)
    return (result[0].to(sample.dtype), *result[1:])
"""


def _own_timesteps(recipe: Recipe, scheduler: str, wide: bool = False) -> str:
    """Code that makes the scheduler take the list whatever it is asked for; ``wide``: and its steps in float64."""
    if recipe.argument is not None:
        why = "    # No pipeline of this kind hands a list on."
        body = f"    type(self).set_timesteps(self, {recipe.argument}={recipe.argument.upper()}, device=device)\n"
    else:
        why = "    # This scheduler cannot be given these levels; it sets its own, and ours take their place."
        body = (
            f"    type(self).set_timesteps(self, {recipe.steps}, device=device)\n"
            "    self.timesteps = torch.tensor(TIMESTEPS, device=device)\n"
            f"    self.sigmas = torch.tensor(SIGMAS{', dtype=torch.float64' if recipe.scales else ''})\n"
        )
    text = f"\n\ndef set_timesteps(self, num_inference_steps=None, device=None, **kwargs):\n{why}\n{body}"
    methods = ["set_timesteps"]
    if recipe.euler_last:
        text += (
            "\n\ndef step(self, model_output, timestep, sample, return_dict=True):\n"
            f"    if self.step_index == {recipe.steps - 1}:\n"
            "        self.lower_order_nums = 0  # the last step, to no noise at all, is first order\n"
            "    return type(self).step(self, model_output, timestep, sample, return_dict=return_dict)\n"
        )
        methods.append("step")
    if wide:
        text += WIDE_STEP
        methods.append("step")
    lines = [f"{scheduler}.{method} = types.MethodType({method}, {scheduler})\n" for method in methods]
    return text + "\n\n" + "".join(lines)


def _pipeline_script(schedule: Result, recipe: Recipe, images: int | None) -> str:
    """For the pipelines of ``TEXT_PIPELINES``, which pass a list on, and DiT, which does not."""
    kind = schedule.model.kind
    text = kind in TEXT_PIPELINES
    unscaled = recipe.scales and kind not in SCALING
    applied = schedule.masked or unscaled
    injected = not applied and (recipe.argument is None or not text)
    note = ""
    if applied:
        why = "skips layers" if schedule.masked else f"uses a scheduler whose states {kind} does not scale"
        note = f"The schedule {why}: autodiffusion_optuna.apply does that. Keep {schedule.study}.json beside this file"
    classes = kind if applied else ", ".join(sorted((recipe.scheduler, kind)))
    imports = [TORCH, f"from diffusers import {classes}"]
    imports += [PATH, APPLY] if applied else []
    imports += [TYPES] if injected else []
    model, arguments = _source(schedule)
    what = _constant("PROMPTS", [PROMPT] * (images or 1))
    if not text:
        what = f"LABELS = {list(range(images or 4))}  # classes by index\n"
    return (
        _head(schedule, note)
        + _imports(*imports)
        + f"MODEL = {model}\n"
        + what
        + ("" if applied else _constants(recipe, schedule))
        + "\n"
        + _load_pipeline(schedule, arguments)
        + f"pipe.to({DEVICE})\n"
        + (f"apply(pipe, {_beside(schedule)})\n" if applied else _set_scheduler(recipe))
        + (_own_timesteps(recipe, "pipe.scheduler", wide=recipe.scales) if injected else "")
        + _call(schedule, None if applied or injected else recipe.argument)
    )


def _load_pipeline(schedule: Result, arguments: str) -> str:
    kind, precision = schedule.model.kind, schedule.model.precision
    loader = f"{kind}.from_pretrained(MODEL"
    if schedule.model.source.endswith(".safetensors"):
        config = schedule.config.model.config if schedule.config else None
        loader = f"{kind}.from_single_file(MODEL" + (f", config={config!r}" if config else "")
    dtype = "" if precision == "float32" else f", torch_dtype=torch.{precision}"
    without = "".join(f", {part}=None" for part in _left_out(schedule))
    return f"pipe = {loader}{arguments}{without}{dtype})\n"


def _left_out(schedule: Result) -> list[str]:
    """Parts that the model was saved without: diffusers insists on being told of those that are not optional."""
    config = schedule.config.model.config if schedule.config else None
    path = _file(config or schedule.model.source, "model_index.json")
    if path is None:
        return []
    index = json.loads(path.read_text(encoding="utf-8"))
    expected = ("text_encoder_3", "tokenizer_3") if schedule.model.kind == "StableDiffusion3Pipeline" else ()
    left_out = {name for name, part in index.items() if isinstance(part, list) and part[:1] == [None]}
    return sorted(name for name in {*left_out, *(set(expected) - index.keys())} if name.isidentifier())


def _set_scheduler(recipe: Recipe) -> str:
    return (
        f"pipe.scheduler = {recipe.scheduler}.from_config(\n    pipe.scheduler.config,\n{_options(recipe.options)})\n"
    )


def _call(schedule: Result, argument: str | None) -> str:
    """The pipeline's call; ``argument``: that takes the list, None where the scheduler already knows it."""
    model = schedule.config.model if schedule.config else None
    lines = ["PROMPTS" if schedule.model.kind in TEXT_PIPELINES else "class_labels=LABELS"]
    steps = len(schedule.timesteps)
    lines.append(f"{argument}={argument.upper()}" if argument else f"num_inference_steps={steps}")
    if schedule.guidance is not None:
        lines.append(f"guidance_scale={schedule.guidance!r}")
    if schedule.model.kind in TEXT_PIPELINES:
        if model and model.negative_prompt:
            lines.append(f"negative_prompt=[{model.negative_prompt!r}] * len(PROMPTS)")
        if schedule.model.image_shape:
            _, height, width = schedule.model.image_shape
            lines += [f"height={height}", f"width={width}"]
    lines.append("generator=torch.Generator().manual_seed(0)")
    return "images = pipe(\n" + "".join(f"    {line},\n" for line in lines) + ").images\n"


def _unet_script(schedule: Result, recipe: Recipe, images: int) -> str:
    """For a UNet2DModel: a loop of its own, as pipelines pass on neither class labels nor a list."""
    decoder = _decoder(schedule)
    if schedule.model.shape != schedule.model.image_shape and decoder is None:
        why = "the decoder of this model's latents was not found, or is not a plain one"
        return _package_script(schedule, why, images)
    masked = schedule.masked
    note = (
        f"The schedule skips layers: autodiffusion_optuna.apply does that. Keep {schedule.study}.json beside this file"
    )
    injected = not masked and recipe.argument is None
    scheduler = "DDPMScheduler" if masked else recipe.scheduler
    classes = ["UNet2DModel", scheduler, *(["DDPMPipeline"] if masked else []), *([decoder[0]] if decoder else [])]
    imports = [TORCH, f"from diffusers import {', '.join(sorted(classes))}"]
    imports += [PATH, APPLY] if masked else []
    imports += [TYPES] if injected else []
    imports += [FILES] if schedule.model.source in BUNDLED else []
    model, arguments = _source(schedule)
    options = "" if masked else "\n" + _options(recipe.options)
    unet = f"UNet2DModel.from_pretrained(MODEL{arguments}{_subfolder(schedule, 'unet')}).eval().to(device)"
    call = f"MODEL{arguments}{_subfolder(schedule, 'scheduler')}"
    built = (
        f"{scheduler}.from_pretrained({call})" if masked else (f"{scheduler}.from_pretrained(\n    {call},{options})")
    )
    return (
        _head(schedule, note if masked else "")
        + _imports(*imports)
        + f"MODEL = {model}\n"
        + ("" if masked else _constants(recipe, schedule))
        + f"\ndevice = {DEVICE}\n"
        + f"unet = {unet}\n"
        + f"scheduler = {built}\n"
        + (f"scheduler = apply(DDPMPipeline(unet, scheduler), {_beside(schedule)}).scheduler\n" if masked else "")
        + (_own_timesteps(recipe, "scheduler") if injected else "")
        + _loop(schedule, recipe, decoder, images)
    )


def _loop(schedule: Result, recipe: Recipe, decoder: tuple[str, str] | None, images: int) -> str:
    listed = "" if schedule.masked or recipe.argument is None else f"{recipe.argument}={recipe.argument.upper()}, "
    asked = listed or f"{len(schedule.timesteps)}, "
    scales = recipe.scales and not schedule.masked  # apply keeps states as this model knows them
    setup, label, guided = _labels(schedule, images)
    shape = ", ".join(map(str, schedule.model.shape)) if schedule.model.shape else "*shape"
    text = f"scheduler.set_timesteps({asked}device=device)\n{setup}"
    if not schedule.model.shape:
        text += "shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)\n"
    text += (
        f"\ngenerator = torch.Generator().manual_seed(0)\nx = torch.randn({images}, {shape}, generator=generator)\n"
        f"x = x.to(device){'.double() * scheduler.init_noise_sigma' if scales else ''}\n"
        "with torch.inference_mode():\n    for t in scheduler.timesteps:\n"
    )
    given = "x"
    if scales:
        text += (
            "        scaled = scheduler.scale_model_input(x, t).float()  # steps are in float64: levels lie far apart\n"
        )
        given = "scaled"
    text += f"        output = unet({given}, t{label}).sample\n"
    if guided:
        text += f"        away = unet({given}, t, class_labels=none).sample\n"
        text += f"        output = away + {schedule.guidance!r} * (output - away)\n"
    stochastic = ", generator=generator" if schedule.eta else ""
    text += "        output = output[:, : x.shape[1]]  # a learned variance is not used\n"
    text += f"        x = scheduler.step(output, t, x{stochastic}).prev_sample\n"
    if scales and schedule.final == "sigma_min":
        text += f"    x = x * {schedule.require_noise().alpha[-1]!r}  # this scheduler's states are x / alpha\n"
    if decoder:
        text += "    x = x.float()\n" if scales else ""
        text += f"    vae = {decoder[0]}.from_pretrained(MODEL, subfolder={decoder[1]!r}).eval().to(device)\n"
        text += "    x = vae.decode(x / vae.config.scaling_factor).sample\n"
    return text + f"images = ((x + 1) * 127.5).clamp(0, 255).round().to(torch.uint8).cpu()  # [{images}, C, H, W]\n"


def _labels(schedule: Result, images: int) -> tuple[str, str, bool]:
    """Code that chooses classes, the network's argument, and whether it is guided away from the null class."""
    if schedule.conditions is None:
        return "", "", False
    null = schedule.config.model.fields.get("null_class") if schedule.config else None
    classes = "range(unet.config.num_class_embeds)"
    if null is not None:
        classes = f"[c for c in {classes} if c != {null!r}]"
    setup = (
        f"classes = {classes}\n"
        f"labels = torch.tensor([classes[i % len(classes)] for i in range({images})], device=device)\n"
    )
    guided = schedule.model.guidance == "free" and schedule.guidance not in (None, 1)
    if guided:
        setup += f"none = torch.full_like(labels, {null!r})\n"
    return setup, ", class_labels=labels", guided


def _subfolder(schedule: Result, part: str) -> str:
    """The loader's subfolder argument: pipelines keep their parts in folders, a bare model does not."""
    source = schedule.model.source
    config = "scheduler_config.json" if part == "scheduler" else "config.json"
    inside = source in BUNDLED or _file(source, f"{part}/{config}") is not None
    if not inside and not Path(source).exists():  # a hub id that is not at hand: the usual layout
        inside = _file(source, "config.json") is None
    return f', subfolder="{part}"' if inside else ""


def _file(source: str, name: str) -> Path | None:
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


def local_folder(source: str) -> Path | None:
    """The folder in the hub's cache of a hub id; None for a model of another kind.

    ``ModelError`` where the cache does not hold the model in whole.
    """
    if source in BUNDLED or Path(source).exists() or ":" in source or source.count("/") != 1:
        return None
    from autodiffusion_optuna.evaluation.models.hub import is_complete

    found = _file(source, "model_index.json") or _file(source, "config.json")
    if found is None or not is_complete(found.parent):
        raise ModelError(f"{source!r} is not in the hub's cache")
    return found.parent


def _decoder(schedule: Result) -> tuple[str, str] | None:
    """(class, subfolder) of a latent model's decoder, whose latents are scaled by one factor."""
    for part in ("vqvae", "vae"):
        path = _file(schedule.model.source, f"{part}/config.json")
        if path is not None:
            config = json.loads(path.read_text(encoding="utf-8"))
            plain = not any(config.get(key) for key in ("latents_mean", "latents_std", "shift_factor"))
            name = str(config.get("_class_name"))
            return (name, part) if plain and name.isidentifier() else None
    return None


def _package_script(schedule: Result, why: str, images: int | None) -> str:
    """With this package's own sampler."""
    note = (
        f"{why[0].upper()}{why[1:]}:\n"
        f"this script uses the sampler that the search used. Keep {schedule.study}.json beside it"
    )
    latent = schedule.model.shape != schedule.model.image_shape
    count = images or (LATENTS if latent else IMAGES)
    prompted = schedule.config is not None and schedule.config.model.prompts is not None
    return (
        _head(schedule, note)
        + _imports(
            PATH,
            *([FOLDER] if prompted else []),
            TORCH,
            "from autodiffusion_optuna import Result",
            "from autodiffusion_optuna.config import ModelConfig",
            "from autodiffusion_optuna.evaluation.models import load_model",
            "from autodiffusion_optuna.evaluation.prefix_cache import NfeCounter, cached_denoise",
            "from autodiffusion_optuna.evaluation.sampling import Sampling",
            "from autodiffusion_optuna.evaluation.solvers import times",
        )
        + (_constant("PROMPTS", [PROMPT] * count) + "\n" if prompted else "")
        + f"schedule = Result.read({_beside(schedule)})\n"
        + _load_model(schedule, prompted)
        + "candidate = schedule.candidate(model.units, T=model.schedule.T)\n"
        + "sampling = Sampling(**schedule.sampling_settings())\n\n"
        + "generator = torch.Generator().manual_seed(0)\n\n\n"
        + "def noise(step):\n"
        + f"    return torch.randn({count}, *model.shape, generator=generator).to(model.device)\n\n\n"
        + "x = noise(0)\n"
        + f"chosen = [i % model.conditions.count for i in range({count})] if model.conditions else []\n"
        + "denoise = cached_denoise(model.bind(chosen, sampling.guidance), candidate, None, (), NfeCounter())\n"
        + "nodes = times(model.schedule, candidate.timesteps, sampling.final)\n"
        + "x = sampling.find_solver(noise)(denoise, x, nodes)\n"
        + f"images = model.to_images(x).cpu()  # uint8 [{count}, C, H, W]\n"
    )


LOADED = {"clip", "precision", "preset", "fields", "classifier", "negative_prompt", "size", "config"}
"""Settings of ``[model]`` that a script repeats; the prompts are its own."""


def _load_model(schedule: Result, prompted: bool) -> str:
    """Code that loads the model as the study does, with the script's own prompts."""
    stored = schedule.model
    known = {"source": stored.source, "clip": stored.clip, "precision": stored.precision}
    model = schedule.config.model if schedule.config else ModelConfig.model_validate(known)
    settings = model.model_dump(include=LOADED, exclude_defaults=True)
    arguments = [f"{key}={value!r}" for key, value in {"source": stored.source, **settings}.items()]
    if prompted:
        arguments.append("prompts=str(prompts)")
    # Whoever runs the script runs a plug-in's code.
    plugin = stored.kind == "plugin" or stored.source.startswith("python:")
    trust = ", trust=True" if plugin else ""
    call = f"model = load_model(ModelConfig({', '.join(arguments)}){trust})\n"
    if not prompted:
        return call
    return (
        "with TemporaryDirectory() as folder:\n"
        '    prompts = Path(folder) / "prompts.txt"\n'
        '    prompts.write_text("\\n".join(PROMPTS), encoding="utf-8")\n'
        f"    {call}"
    )


# ComfyUI

COMFYUI: dict[str, tuple[str, str]] = {
    "ddim": ("euler", ""),
    "euler": ("euler", ""),
    "heun": ("heun", ""),
    "lms": ("lms", ""),
    "dpmpp_2m": ("dpmpp_2m", ""),
    "plms": ("ipndm", "approximately: its first step is Euler's, and so is its last where it ends at 0"),
    "unipc_2": ("uni_pc_bh2", "approximately: its order is 3"),
    "unipc_3": ("uni_pc_bh2", "approximately: it stops a little above sigma = 0"),
    "deis_2": ("deis", "approximately: its order is 3, its weights are by another rule"),
    "deis_3": ("deis", "approximately: its weights are by another rule"),
    "dpmpp_3m": ("dpmpp_3m_sde", "approximately: set eta = 0 in the node SamplerDPMPP_3M_SDE"),
    "dpmpp_2s_mid": ("dpmpp_2s_ancestral", "set eta = 0 in the node SamplerDPMPP_2S_Ancestral"),
}
"""Solver -> ComfyUI's name of the sampler that takes the same steps, and what differs."""


def comfyui_sigmas(schedule: Result) -> str:
    """The text for ComfyUI's node ManualSigmas, which reads every number in it; ``notes`` says how to use it.

    K + 1 noise levels in ComfyUI's convention, sigma / alpha for eps and v models and s in [0, 1] for flows, the last
    one 0 with ``final = "zero"``. Without exponents, which the node does not read.
    """
    noise = schedule.require_noise()
    levels = noise.sigma
    if schedule.model.prediction != "flow_prediction":
        levels = tuple(s / a for a, s in zip(noise.alpha, noise.sigma, strict=True))
    return ", ".join(_fixed(level) for level in levels) + "\n"


def notes(schedule: Result, form: str) -> list[str]:
    """What the reader of an export needs to know and its text must not hold, a line each."""
    flow = schedule.model.prediction == "flow_prediction"
    if form == "comfyui":
        lines = [f"Study {schedule.study}: paste the numbers into the node ManualSigmas."]
        return [*lines, _comfyui_sampler(schedule, flow), *_comfyui_notes(schedule, flow)]
    return []


def _comfyui_sampler(schedule: Result, flow: bool) -> str:
    name, note = COMFYUI.get(schedule.solver, ("", ""))
    if schedule.eta:
        name, note = "euler_ancestral", f"set eta = {schedule.eta:g} in the node SamplerEulerAncestral"
        if flow:  # its own rule there: by sigma, not by lambda
            note = f"approximately: for flows it splits a step by another rule; {note}"
    if not name or schedule.amplification_cap is not None:
        capped = " with an amplification cap" if schedule.amplification_cap is not None else ""
        return f"Sampler: ComfyUI has none that takes the steps of {schedule.solver}{capped}; the nearest is euler."
    if flow and name != "euler" and not note:
        note = "approximately: for flows it works in another coordinate"
    return f"Sampler: {name}" + (f" ({note})." if note else ".")


def _comfyui_notes(schedule: Result, flow: bool) -> list[str]:
    notes = []
    if schedule.guidance is not None:
        what = "guidance of FluxGuidance, with a cfg of 1" if schedule.model.guidance == "embedded" else "cfg"
        notes.append(f"Guidance: {schedule.guidance:g} ({what}).")
    if schedule.timesteps[0] < schedule.train_timesteps - 1:
        scale = "this level" if flow else "its level alone, not by sqrt(1 + sigma^2)"
        notes.append(f"The first level is not the model's highest: ComfyUI scales the first noise by {scale}.")
    if schedule.masked:
        notes.append(
            "ComfyUI cannot skip layers by step: these are the schedule's timesteps alone, at their full cost."
        )
    if schedule.final == "sigma_min" and schedule.solver.startswith(("dpmpp", "deis", "unipc")):
        notes.append("The last step, which ends above 0, may be of a higher order than in the search.")
    if schedule.model.kind not in TEXT_PIPELINES:
        notes.append(f"ComfyUI has no loader for this model ({schedule.model.kind}); a custom node has to bring one.")
    return notes


def _fixed(level: float) -> str:
    """12 decimals, without trailing zeros and never with an exponent."""
    return f"{level:.12f}".rstrip("0").rstrip(".") or "0"


FORMS: dict[str, Callable[[Result], str]] = {
    "json": Result.text,
    "diffusers": diffusers_script,
    "python": diffusers_script,
    "comfyui": comfyui_sigmas,
}
"""Format -> a schedule's text in it."""
