"""``adopt init``: looks at a model and drafts a study of it, with the reason for each setting that it suggests."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autodiffusion_optuna.config import BUNDLED, FILL_IN, ModelConfig, apply_override, parse_config
from autodiffusion_optuna.errors import ConfigError, StatisticsError, program
from autodiffusion_optuna.evaluation.denoiser import Denoiser
from autodiffusion_optuna.evaluation.features import load_extractor, usual_extractor
from autodiffusion_optuna.evaluation.features.bundled import MAX_PIXELS
from autodiffusion_optuna.evaluation.features.weights import PUBLISHED, sha256_of
from autodiffusion_optuna.evaluation.models import Model, load_model
from autodiffusion_optuna.evaluation.models.adm_fields import resolve_fields
from autodiffusion_optuna.evaluation.models.adm_shapes import is_adm, matching_presets, visible_fields
from autodiffusion_optuna.evaluation.models.base import find_device
from autodiffusion_optuna.evaluation.models.checkpoints import read_shapes
from autodiffusion_optuna.evaluation.models.hub import resolve
from autodiffusion_optuna.evaluation.models.parts import find_pipeline
from autodiffusion_optuna.evaluation.models.prompts import read_prompts
from autodiffusion_optuna.evaluation.models.scheduler import load_scheduler
from autodiffusion_optuna.evaluation.models.text_to_image import PIPELINES
from autodiffusion_optuna.evaluation.references.formats import read_reference_data
from autodiffusion_optuna.evaluation.references.images import Images
from autodiffusion_optuna.study.draft import Draft, Line

INCEPTION = "inception-2015-12-05.pt"
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
FEATURES = {"inception": 2048, "clip": 512, "efficientnet-lite0": 1280}
LARGE = 50_000_000
"""Parameters from which reduced precision is worth it on a GPU."""
BATCH_VALUES = 2**18
"""Numbers of the states in one batch on a CPU, which is no faster with more."""
MOST_IMAGES = {"cpu": 1000, "cuda": 5000}


@dataclass(frozen=True)
class Wish:
    """What the user gave to ``adopt init``.

    ``file``: the study file to be written. ``overrides``: ``key=value`` settings of ``[model]``.
    """

    source: str
    name: str
    file: Path
    images: Path | None = None
    prompts: Path | None = None
    weights: Path | None = None
    overrides: tuple[str, ...] = ()
    trust: bool = False

    @property
    def folder(self) -> Path:
        """Where the study file will lie, and paths in it start."""
        return self.file.parent


@dataclass(frozen=True)
class Measure:
    """A suggested extractor: its name, weights and mode, how many features it has, and why it was chosen."""

    extractor: str
    features: int
    why: str
    weights: str | None = None
    mode: str | None = None


def draft_study(wish: Wish) -> Draft:
    """A study of the model ``wish.source``, which is loaded as ``adopt run`` would load it.

    What is cheap to check comes first. Raises AdoptError children as ``load_model`` does; ``ConfigError`` where a
    checkpoint lacks what only the user knows, ``StatisticsError`` where images are unlike the model's.
    """
    images = None if wish.images is None else _read_images(wish.images)
    prompts = None if wish.prompts is None else len(read_prompts(wish.prompts))
    measure = None if wish.weights is None else _measure_of(wish.weights, wish)
    settings, remarks = _model_settings(wish, images)
    config, model = _look(settings, wish)
    if images is not None:
        _check_channels(images, model, wish)
    measure = measure or _choose_measure(model, images, config, wish)
    facts = {
        "model": _kind(model),
        "images": "x".join(map(str, model.picture_shape)) + " (channels, height, width)" + _latent(model),
        "conditions": _conditions(model, prompts),
        "predicts": model.denoiser.prediction if isinstance(model.denoiser, Denoiser) else "the clean image",
        "noise": f"{_noise(config, model)}, T = {model.schedule.T}",
        "layers": f"{len(model.units)} that a step may skip" if model.units else "none that a step may skip",
        "device": f"{find_device('auto')} here",
    }
    if images is not None:
        more = f" and {len(images.others)} other sizes" if images.others else ""
        facts["reference"] = f"{images.total:,} images, {'x'.join(map(str, images.shape))}{more}, in {wish.images}"
    sections = {
        "": [Line("name", wish.name), Line("description", f"{_steps(config)} steps of {model.name}")],
        "model": _model_lines(settings, model, wish),
        "sampling": _sampling_lines(config, model),
        "search": list(_search_lines(model)),
        "score": list(_score_lines(measure, model, images, wish)),
    }
    notes = () if images is None else images.notes
    title = f"Written by {program()} init from {wish.source}. First: {program()} run --study {wish.file.name} --dry-run"
    return Draft(title, facts, (*remarks, *model.notes, *notes), sections)


# The model


def _model_settings(wish: Wish, images: Images | None) -> tuple[dict[str, Any], list[str]]:
    """Settings of ``[model]`` that say which model it is, paths as they are from here, and what to say of them."""
    settings: dict[str, Any] = {"source": wish.source}
    remarks: list[str] = []
    table = {"model": settings}
    for override in wish.overrides:
        if not override.strip().startswith("model."):
            raise ConfigError(
                f"--set {override!r}: {program()} init takes settings of the model (model.preset=…) alone"
            )
        apply_override(table, override)
    path = Path(wish.source.removeprefix("adm:"))
    known = wish.source in BUNDLED or wish.source.startswith("python:") or path.is_dir()
    if not known and path.suffix in CHECKPOINTS and path.is_file():
        shapes = read_shapes([path])
        if is_adm(shapes):
            settings["source"] = f"adm:{path}"
            if "preset" not in settings:
                remarks += _recognise(settings, shapes, path, images)
        elif path.suffix == ".safetensors" and "config" not in settings:
            raise ConfigError(
                f"{path}: a single file holds neither configs nor a noise schedule; give the folder of a diffusers "
                "pipeline of the same kind: --set model.config=FOLDER"
            )
    if wish.prompts is not None:
        settings["prompts"] = str(wish.prompts)
    return settings, remarks


def _recognise(settings: dict[str, Any], shapes: Mapping[str, Any], path: Path, images: Images | None) -> Iterator[str]:
    """Write what the weights of an ADM tell into ``settings``; what they cannot tell, a line each."""
    given: dict[str, Any] = settings.get("fields", {})
    presets = [] if given else matching_presets(shapes)
    if presets:
        settings["preset"] = min(presets, key=lambda name: (name.rstrip("0123456789") not in path.stem, name))
        if len(presets) > 1:
            others = ", ".join(name for name in presets if name != settings["preset"])
            yield f"{path.name} has the architecture of presets {others} as well"
        return
    square = images is not None and images.shape[1] == images.shape[2] and not images.others
    side = given.get("image_size", images.shape[1] if images is not None and square else None)
    if not isinstance(side, int):
        raise ConfigError(
            f"{path}: the weights of an ADM do not tell the side of its images; give --images of that size, "
            "or --set model.fields.image_size=PIXELS"
        )
    settings["fields"] = {"image_size": side, **visible_fields(shapes, side), **given}
    resolve_fields(None, settings["fields"])


def _look(settings: Mapping[str, Any], wish: Wish) -> tuple[ModelConfig, Model]:
    """The model on the CPU, as ``adopt run`` loads it; one of prompts takes a prompt of ours where none is known."""
    with TemporaryDirectory() as place:
        table = dict(settings)
        if _takes_prompts(settings):
            table["precision"] = "bfloat16"  # half the memory, and nothing is computed but one prompt
            if "prompts" not in settings:
                stand_in = Path(place) / "prompt.txt"
                stand_in.write_text("a photograph\n", encoding="utf-8")
                table["prompts"] = str(stand_in)
        score = {"extractor": "pixels"}
        needed = {"name": "draft", "sampling": {"steps": 1}, "search": {"trials": 1}, "score": score}
        config = parse_config({**needed, "model": table}).model
        return config, load_model(config, device="cpu", trust=wish.trust)


def _folder_of(settings: Mapping[str, Any]) -> Path | None:
    """The folder with a model's configs; None where it has none."""
    source = str(settings.get("config") or settings["source"])
    if source in BUNDLED or ":" in source:
        return None
    if Path(source).is_dir():
        return Path(source)
    is_id = source.count("/") == 1 and not source.startswith((".", "/", "~")) and Path(source).suffix not in CHECKPOINTS
    return resolve(source) if is_id else None


def _takes_prompts(settings: Mapping[str, Any]) -> bool:
    folder = _folder_of(settings)
    return folder is not None and find_pipeline(folder).kind in PIPELINES


# Facts


def _kind(model: Model) -> str:
    parameters = "" if model.parameters is None else f", {_count(model.parameters)} parameters"
    return f"{model.name}, {model.kind}{parameters}"


def _count(number: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,}"


def _latent(model: Model) -> str:
    return "" if model.decode is None else f", of latents {'x'.join(map(str, model.shape))}"


def _conditions(model: Model, prompts: int | None) -> str:
    conditions = model.conditions
    if conditions is None:
        return "none: it takes no prompts, no labels and no guidance"
    guidance = "no guidance" if model.guidance == "none" else f"guidance scale {model.scale:g} where none is set"
    if conditions.kind == "labels":
        return f"{conditions.count:,} classes, an image's drawn by its number; {guidance}"
    known = "prompts, which are to be given" if prompts is None else f"{prompts:,} prompts, an image's by its number"
    return f"{known}; {guidance}"


def _noise(config: ModelConfig, model: Model) -> str:
    """The noise levels that a model was trained on, in words."""
    if config.source.startswith("adm:"):
        return f"{resolve_fields(config.preset, config.fields).noise_schedule} betas"
    folder = _folder_of(config.model_dump())
    if folder is None:
        return f"log-SNR {2 * model.schedule.lambdas[0]:.3g} to {2 * model.schedule.lambdas[-1]:.3g}"
    filled = load_scheduler(find_pipeline(folder).folder).filled
    if "FlowMatch" in str(filled.get("_class_name")):
        moved = "by the size of the image" if filled.get("use_dynamic_shifting") else f"by {filled.get('shift', 1.0):g}"
        return f"flow matching, shifted {moved}"
    if filled.get("trained_betas") is not None:
        return "betas that the scheduler lists"
    zero = ", rescaled to no signal at the end" if filled.get("rescale_betas_zero_snr") else ""
    ends = f" {filled['beta_start']:g} to {filled['beta_end']:g}" if "beta_start" in filled else ""
    return f"{filled['beta_schedule']} betas{ends}{zero}"


# Settings


def _steps(config: ModelConfig) -> int:
    return 4 if config.source in BUNDLED else 6


def _model_lines(settings: Mapping[str, Any], model: Model, wish: Wish) -> list[Line]:
    device, prompted = find_device("auto").type, model.conditions is not None and model.conditions.kind == "prompts"
    source = str(settings["source"])
    scheme = "adm:" if source.startswith("adm:") else ""
    lines = [Line("source", scheme + written(source.removeprefix("adm:"), wish.folder))]
    for key, value in settings.items():
        if key not in ("source", "prompts", "device", "precision", "batch"):
            shown = written(str(value), wish.folder) if key in ("config", "classifier") else value
            lines.append(Line(key, shown))
    if prompted:
        known = settings.get("prompts")
        lines.append(Line("prompts", FILL_IN if known is None else written(known, wish.folder)))
    reduced = device == "cuda" and (model.parameters or 0) >= LARGE
    room = BATCH_VALUES // math.prod(model.shape)
    batch = "auto" if device == "cuda" else 2 ** max(min(room, 64).bit_length() - 1, 0)
    lines += [
        Line("device", settings.get("device", "auto"), "a GPU if there is one"),
        Line(
            "precision",
            settings.get("precision", "bfloat16" if reduced else "float32"),
            "of the network; sampling stays float32" if reduced else "bfloat16 may be faster on a GPU",
        ),
        Line("batch", settings.get("batch", batch), 'images in one network evaluation; "auto": what fits the device'),
    ]
    if "null_class" in " ".join(model.notes):
        lines.append(Line("fields", {"null_class": 0}, "if it was trained with one class as no class", active=False))
    return lines


def _sampling_lines(config: ModelConfig, model: Model) -> list[Line]:
    solver = "ddim" if model.decode is None else "dpmpp_2m"
    lines = [
        Line("solver", solver, 'a list has the search choose: ["ddim", "dpmpp_2m", "unipc"]'),
        Line("steps", _steps(config)),
    ]
    if model.guidance != "none":
        why = f"has the search choose; unset it is {model.scale:g}"
        lines.append(Line("guidance", {"min": 1.0, "max": round(2 * model.scale, 2)}, why, active=False))
    return lines


def _search_lines(model: Model) -> Iterator[Line]:
    yield Line("trials", 200, "candidates; more can be added later")
    if model.units:
        yield Line("max_skip", 0.3, "has the search skip up to 30 % of the layers at a step, too", active=False)


def _score_lines(measure: Measure, model: Model, images: Images | None, wish: Wish) -> Iterator[Line]:
    yield Line("extractor", measure.extractor, f"{called(measure.extractor)}: {measure.why}")
    if measure.weights is not None:
        shown = measure.weights if measure.weights == FILL_IN else written(measure.weights, wish.folder)
        yield Line("weights", shown, 'or another extractor without: "efficientnet-lite0"' if shown == FILL_IN else "")
    if measure.mode is not None:
        yield Line("mode", measure.mode)
    if wish.images is not None:
        yield Line("reference", written(str(wish.images), wish.folder), "what the images are compared with")
    elif model.reference is None:
        yield Line("reference", FILL_IN)
    count, why = _images(measure, model)
    yield Line("images", count, why)
    yield Line("held_out_images", max(1000, count), "of each bank of held-out noise that scores the winner again")


def _images(measure: Measure, model: Model) -> tuple[int, str]:
    """How many images a candidate is scored on, and why."""
    if model.reference is not None and measure.weights is None:
        return (512 if measure.extractor == "pixels" else 256), "of each candidate"
    most, features = MOST_IMAGES[find_device("auto").type], measure.features
    enough = max(100 * math.ceil(features / 100), 300)
    if enough <= most:
        return enough, f"of each candidate: no fewer than its {features:,} features"
    return most, (
        f"of each candidate: fewer than its {features:,} features, which is quick and can prefer images of less "
        f"variety; {enough:,} are better"
    )


def called(extractor: str) -> str:
    """What a Fréchet distance over these features may be called."""
    return "its figure is FID" if extractor == "inception" else f"its figure is FD({extractor}), not FID"


def _choose_measure(model: Model, images: Images | None, config: ModelConfig, wish: Wish) -> Measure:
    """The extractor that is here and sees most of such images."""
    values = math.prod(model.picture_shape)
    same_size = images is None or (images.shape[1:] == model.picture_shape[1:] and not images.others)
    usual = usual_extractor(config.source, model.picture_shape, one_size=same_size)
    if config.source in BUNDLED and not same_size and wish.weights is None:
        assert images is not None
        sizes = "several sizes" if images.others else "x".join(map(str, images.shape[1:]))
        raise StatisticsError(
            f"--images {str(wish.images)!r} holds images of {sizes}, those of model {config.source!r} are "
            f"{'x'.join(map(str, model.picture_shape[1:]))}; give images of that size, or leave --images out"
        )
    if config.source in BUNDLED and usual == "pixels":
        return Measure("pixels", values, "the values themselves, which is all there is to this model")
    if config.source in BUNDLED and usual is not None:
        features = load_extractor(usual, "cpu").dim or 0
        return Measure(usual, features, "the bundled network for these images")
    found = next((path for path in _beside(wish, config) if _published(path) == "inception"), None)
    if found is not None:
        return Measure("inception", FEATURES["inception"], f"{INCEPTION} was found", str(found))
    if usual == "pixels":
        why = "honest but weak, it sees colours and places and no shapes; inception or your own network sees more"
        return Measure("pixels", values, why)
    if usual is not None:
        return Measure(usual, FEATURES[usual], "the network at hand for photographs")
    why = "pixels takes smaller images" if values > MAX_PIXELS else "pixels takes images of one size"
    return Measure("inception", FEATURES["inception"], f"what the field reports; {why}", FILL_IN)


def _measure_of(weights: Path, wish: Wish) -> Measure:
    """The extractor of a published file of weights; ``ConfigError`` for another file."""
    if not weights.is_file():
        raise ConfigError(f"--weights {str(weights)!r} is not a file; give the path of local weights")
    kind = _published(weights)
    if kind is None:
        raise ConfigError(
            f"--weights {str(weights)!r} is none of the published files ({', '.join(PUBLISHED)}); leave --weights out, "
            "and set score.extractor and score.weights in the file that is written"
        )
    extractor = kind.partition("-")[0]
    mode = "legacy_pytorch" if kind == "inception-legacy-pytorch" else None
    return Measure(extractor, FEATURES[extractor], f"{weights.name} was given", str(weights), mode)


def _published(path: Path) -> str | None:
    """Which of the published files of weights this is."""
    digest = sha256_of(path)
    return next((kind for kind, file in PUBLISHED.items() if file.sha256 == digest), None)


def _beside(wish: Wish, config: ModelConfig) -> Iterable[Path]:
    """Where Inception's weights may lie: here, beside the study file, in the model's folder or beside it."""
    source = Path(config.source.removeprefix("adm:"))
    places = [Path(), wish.folder, *([source, source.absolute().parent] if source.exists() else [])]
    return [place / INCEPTION for place in places if (place / INCEPTION).is_file()]


# Files


def _read_images(path: Path) -> Images:
    """Images of the reference, whose headers alone are read; ``StatisticsError`` where there are none."""
    data = read_reference_data(path)
    if data.images is None:
        raise StatisticsError(
            f"--images {str(path)!r} holds {data.what}, no images; leave --images out and set score.reference to it in "
            "the file that is written"
        )
    return data.images


def _check_channels(images: Images, model: Model, wish: Wish) -> None:
    if images.shape[0] != model.picture_shape[0]:
        raise StatisticsError(
            f"--images {str(wish.images)!r} holds images of {images.shape[0]} channel(s), the model's have "
            f"{model.picture_shape[0]}; give images like those it was trained on"
        )


def written(path: str, folder: Path) -> str:
    """A path as a study file in ``folder`` names it: what is no path, or a whole one, stays as it is."""
    if path in BUNDLED or os.path.isabs(path) or not Path(path).exists():
        return path
    relative = os.path.relpath(path, folder)
    return f"./{relative}" if relative in BUNDLED else relative
