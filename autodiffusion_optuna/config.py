"""StudyConfig: everything a study measures and how it searches, read from one TOML file.

One file: what a setting means, what it may be and how it is read belong together, and docs/settings.md is made from it.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from autodiffusion_optuna.errors import ConfigError, choose_from
from autodiffusion_optuna.noise import Final

BANK_SIZE = 100_000
"""Images in one bank of noise; the largest ``score.images`` and ``score.held_out_images``."""

SEARCH_BANK = 0
"""Every candidate is scored on the noise of this bank; held-out banks are numbered from 1."""

VALIDATION_BANK = 1_000_000
"""The finalists are scored again on the noise of this bank, which is beyond all held-out ones."""

FINALISTS, VALIDATION_RATIO = 4, 2
"""Unset ``score.finalists`` of preset ``adopt``, and unset ``score.validation_images`` over ``score.images``."""

LONGEST_GRACE = 30 * 24 * 3600
"""Seconds; a worker sleeps a share of ``search.grace`` between heartbeats, which no clock does for ever."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"

BUNDLED = ("digits", "faces", "mixture")
"""Names that ``model.source`` means before any file: the models that are shipped."""

MEMORY = "memory:"
"""What ``model.source`` begins with where the model was an object in Python; the rest is its class."""

FILES = ("model.source", "model.classifier", "model.prompts", "model.config", "score.weights", "score.reference")
"""Settings that name a file or a folder, or may do so."""

OF_THIS_HOST = (*FILES, "folder", "model.device", "model.prefix_cache_mb")
"""Settings that each command may change for itself: where files are, and what runs the model."""

FILL_IN = "FILL IN"
"""What ``adopt init`` writes where it cannot know a value; a study with it is not run."""

TO_FILL_IN = {
    "model.prompts": "a file of prompts (txt, csv, jsonl or COCO captions json)",
    "score.weights": "the weights of score.extractor (`reference weights inception --out FILE` downloads them)",
    "score.reference": "images like those the model was trained on (a folder, zip or npz), or their statistics",
}
"""Settings that may be left to fill in -> what they take."""

Mode = Literal["clean", "legacy_pytorch", "legacy_tensorflow"]
"""How clean-fid resizes images for Inception (arXiv 2104.11222)."""

Pruner = Literal["race", "percentile", "median", "none"]
"""What stops a candidate before all of its images are drawn."""

SCREEN_IMAGES, FEWEST_SCREEN_IMAGES = 32, 8
"""Images of the screen where a study does not say, and those below which it has none."""

Count = Annotated[int, Field(ge=1)]
Images = Annotated[int, Field(ge=2, le=BANK_SIZE)]


class Section(BaseModel):
    """A frozen table that refuses unknown keys and values of another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")


class ModelConfig(Section):
    """``[model]``: the frozen network and how it is run."""

    source: str
    """A bundled model (``digits``, ``faces``, ``mixture``), a diffusers folder or hub id, ``adm:FILE.pt``, a single
    ``FILE.safetensors``, or ``python:module:function``."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network alone; the sampling state is always float32."""
    batch: Count | Literal["auto"] = 64
    """Images in one network evaluation, fewer where the device runs out of memory; ``auto`` fits the device."""
    clip: bool | None = None
    """Clip the predicted image to [-1, 1] at every step; unset: models of pixels do, latent ones cannot."""
    prefix_cache_mb: Annotated[int, Field(ge=0)] = 2048
    """Budget of the prefix cache in MiB; 0 turns it off."""
    compile: bool = False
    """Compile each layer with torch.compile; worth its minutes on a GPU and for long searches."""
    preset: str | None = None
    """Architecture of an ADM checkpoint."""
    fields: dict[str, bool | int | float | str] = {}
    """Fields of the architecture in place of the preset's, by their names in guided-diffusion."""
    classifier: str | None = None
    """File of an ADM noisy classifier that guides the samples."""
    labels: Literal["balanced", "random"] = "balanced"
    """How the images' classes or prompts are drawn."""
    prompts: str | None = None
    """Prompts of a text-to-image model: txt, csv, jsonl or COCO captions json."""
    negative_prompt: str = ""
    """What classifier-free guidance leads a text-to-image model away from."""
    size: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    """[height, width] of the images of a text-to-image model; unset: the model's own."""
    config: str | None = None
    """Local diffusers folder with all other parts of a single-file model."""
    check: bool = True
    """See at every start whether the model denoises at all, and warn if not: 3 evaluations of 4 to 16 images, and 20
    more where there are no reference images."""


class StepRange(Section):
    """``steps = {min = 8, max = 12}``: the search chooses the number of steps."""

    min: Count
    max: Count

    @model_validator(mode="after")
    def _ordered(self) -> StepRange:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class Range(Section):
    """``guidance = {min = 1.0, max = 8.0}``: the search chooses a number between them."""

    min: float
    max: float

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not 0 <= self.min < self.max:
            raise ValueError(f"min {self.min} must not be negative and must be smaller than max {self.max}")
        return self


Scale = Annotated[float, Field(ge=0)]
Eta = Annotated[float, Field(ge=0, le=1)]
Choices = Field(min_length=1)


class SamplingConfig(Section):
    """``[sampling]``: the solver, and how many steps it takes.

    Where a list or a range is given, the search chooses, together with the timesteps.
    """

    solver: str | Annotated[list[str], Choices] = "ddim"
    """How a step is taken: one solver, or a list of which the search chooses."""
    order: Count | Annotated[list[Count], Choices] | None = None
    """Of a solver that comes in several (deis, dpm_solver, dpmpp, unipc); unset: its lowest."""
    steps: Count | StepRange
    """Steps of a candidate, or the range of which the search chooses."""
    final: Final | Annotated[list[Final], Choices] = "zero"
    """Where the last update ends: at no noise at all, or at time index 0."""
    min_gap: Count = 1
    """Smallest distance of neighbouring timesteps, in time indices."""
    guidance: Scale | Annotated[list[Scale], Choices] | Range | None = None
    """Guidance scale; unset: the model's own."""
    eta: Eta | Annotated[list[Eta], Choices] | Range = 0.0
    """Noise that ddim adds: 0 none, 1 as much as DDPM."""
    amplification_cap: Annotated[float, Field(ge=1)] | None = None
    """Largest amplification of network errors by a multistep solver; its order is lowered to keep it."""

    @property
    def step_bounds(self) -> tuple[int, int]:
        """Smallest and largest number of steps."""
        return (self.steps.min, self.steps.max) if isinstance(self.steps, StepRange) else (self.steps, self.steps)

    @model_validator(mode="after")
    def _eta_is_for_ddim(self) -> SamplingConfig:
        solvers = self.solver if isinstance(self.solver, list) else [self.solver]
        if self.eta != 0.0 and solvers != ["ddim"]:
            raise ValueError(f"eta {self.eta} is for solver ddim alone, solver is {self.solver!r}; leave eta out")
        if isinstance(self.eta, Range) and self.eta.max > 1:
            raise ValueError(f"eta goes up to 1, max is {self.eta.max}")
        return self


Numbers = Annotated[list[int | float], Choices]
"""A list of timesteps or sigmas."""


class SearchConfig(Section):
    """``[search]``: budget, operators and what layers may do. Unset sizes are the preset's."""

    preset: str = "adopt"
    """Sizes and operators: ``adopt``, or ``paper`` for the published ones."""
    trials: Count
    """Candidates to finish; a pruned candidate counts."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of proposals; runs with the same seed repeat exactly."""
    population: Count | None = None
    """Candidates in a generation."""
    parents: Count | None = None
    """Best candidates that a generation is bred from."""
    mutations: Annotated[int, Field(ge=0)] | None = None
    """Of a generation, those bred by mutation; what mutation and crossover leave over is drawn at random."""
    crossovers: Annotated[int, Field(ge=0)] | None = None
    """Of a generation, those bred from two parents."""
    mutation_probability: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of each timestep of a mutant and the modes of its layers there; one at least is changed."""
    stage_one_generations: Annotated[int, Field(ge=0)] | None = None
    """Generations in which every layer stays on; stage two begins earlier where nothing improves any more."""
    warm_starts: bool | list[str | Numbers] | None = None
    """What the search starts from. Names of baselines, "all" for every one, and lists of any form that ``search.lists``
    reads, which become baselines: all are evaluated first. ``true`` and unset: all baselines, the closed forms but
    ``uniform`` at every second place after the others (unset in ``paper``: uniform alone). ``oss`` and ``gits`` are
    computed from the model when the study is begun, where they are asked for."""
    max_skip: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Largest ratio of layers that need not run at a step; 0 searches timesteps alone."""
    modes: Annotated[list[Literal["skip", "reuse"]], Field(min_length=1)] = ["skip"]
    """What a layer does that does not run: ``skip`` leaves its residual branch out, ``reuse`` takes that of the last
    step at which it ran."""
    max_cost: Annotated[float, Field(gt=0)] | None = None
    """Largest cost of a candidate, 1.0 being ``cost_steps`` steps with every layer on."""
    cost_steps: Count | None = None
    """Full steps that cost 1.0; unset: the largest number of steps."""
    cost: Literal["macs", "latency"] = "macs"
    """What a layer costs: multiply-adds, or time measured once at the start."""
    chunk: Annotated[int, Field(ge=1, le=32)] = 32
    """Bits of one stored parameter of modes: a layer takes one, or about 1.6 where it may be skipped or reused."""
    barrier: bool = False
    """Wait for all of a generation before the next begins; any number of workers then finds the same candidates."""
    grace: Annotated[float, Field(gt=0, le=LONGEST_GRACE)] = 120.0
    """Seconds without a heartbeat after which a worker's trial is given to another; at most 30 days."""

    @field_validator("warm_starts", mode="before")
    @classmethod
    def _lists_or_a_switch(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [] if value is None or isinstance(value, bool) else [None]
        for entry in entries:  # a bool is an int too
            if not isinstance(entry, str) and not (isinstance(entry, list) and {*map(type, entry)} & {int, float}):
                raise ValueError('give true, false, or a list of names, lists of numbers and texts such as "ays:sd15"')
        return value


class ScoreConfig(Section):
    """``[score]``: what a candidate's value is."""

    extractor: str
    """What sees the images: a name of the table of extractors, or ``python:module:function``."""
    weights: str | None = None
    """Its weights, where it ships with none (inception, clip, dinov2, torchscript)."""
    mode: Mode | None = None
    """How clean-fid resizes for Inception; to be stated for statistics that do not say how they were made."""
    reference: str | None = None
    """Statistics, or images in a folder, zip or npz; unset: what the bundled model ships with."""
    metric: Literal["frechet", "kid"] = "frechet"
    """The distance of features: Fréchet, or the kernel distance KID."""
    images: Images = 256
    """Images a candidate is scored on in the search."""
    screen_images: Annotated[int, Field(ge=0)] | None = None
    """Images, at least 2, on which a candidate is first compared with a fine run of the model, noise by noise; unset:
    32, fewer where the rungs are small; 0: none, nor where eta or the guidance scale is searched, eta is above 0 or
    nothing prunes."""
    rungs: list[Annotated[int, Field(ge=2)]] | None = None
    """Smaller image counts at which a candidate may be stopped; unset: half of ``images`` for ``race``."""
    pruner: Pruner | None = None
    """What decides at the screen and at each rung: ``race`` stops a candidate that is worse than the best few beyond
    doubt, ``percentile`` goes by ``keep``, ``median`` by the median there; unset: ``race``, in ``paper`` ``none``."""
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """``percentile``: a rung stops a candidate that is not among this share of the complete ones there."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the images' noises, labels and prompts."""
    finalists: Annotated[int, Field(ge=0)] | None = None
    """Best candidates that are scored again, on more images of a validation bank, when the search ends; the best of
    them there is the result. 0: none, the best in the search is the result; unset: 4 (with preset ``paper`` 0)."""
    validation_images: Images | None = None
    """Images of the validation bank for each finalist, at least ``images``; unset: twice ``images``."""
    held_out_images: Images = 1000
    """Images in each held-out bank."""
    held_out_banks: Annotated[int, Field(ge=2, le=100)] = 5
    """Disjoint banks of noise on which the winner is scored again; an interval of two or three says little."""
    floor_steps: Annotated[int, Field(ge=0)] = 100
    """Uniform steps of the floor, what the model gives with steps enough; ``adopt run`` scores it where it takes no
    longer than the search did, ``adopt score`` always; 0: no such floor."""

    @field_validator("screen_images")
    @classmethod
    def _none_or_several(cls, value: int | None) -> int | None:
        if value == 1:  # of which there is no variance
            raise ValueError("give 0 for no screen, or at least 2 images")
        return value

    @model_validator(mode="after")
    def _validation_is_no_smaller(self) -> ScoreConfig:
        if self.validation_images is not None and self.validation_images < self.images:
            raise ValueError(
                f"validation_images {self.validation_images} must not be fewer than images = {self.images}; "
                "leave it out for twice as many"
            )
        return self

    @model_validator(mode="after")
    def _rungs_increase(self) -> ScoreConfig:
        counts = [*(self.rungs or []), self.images]
        if any(a >= b for a, b in itertools.pairwise(counts)):
            raise ValueError(
                f"rungs {self.rungs} must increase and stay below images = {self.images}; leave rungs out for none"
            )
        if self.pruner in ("percentile", "median"):
            if not self.rungs:
                raise ValueError(f"pruner {self.pruner!r} needs rungs, for example rungs = [100]")
            if self.metric == "kid":
                raise ValueError(
                    f'pruner {self.pruner!r} takes a value that falls as images are added; with metric = "kid" use '
                    '"race" or "none"'
                )
        return self


class StudyConfig(Section):
    """One study. ``fingerprint`` tells two studies apart that measure different things."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """What ``--study`` calls it once it is in a database."""
    description: str = ""
    """One line for ``adopt studies``."""
    folder: str | None = None
    """Where modules of ``python:module:function`` lie, besides the current folder; unset: with the study file."""
    model: ModelConfig
    sampling: SamplingConfig
    search: SearchConfig
    score: ScoreConfig

    @model_validator(mode="after")
    def _pruned_or_not(self) -> StudyConfig:
        given = {"rungs": self.score.rungs, "screen_images": self.score.screen_images}
        for name, value in given.items():
            if value and self.pruner == "none":
                unset = " (unset in preset 'paper')" if self.score.pruner is None else ""
                raise ValueError(
                    f"score.{name} {value} and score.pruner 'none'{unset} need each other: set a pruner, for example "
                    f'pruner = "race", or leave {name} out'
                )
        if self.score.screen_images and self.pruner != "race":
            raise ValueError(
                f"score.screen_images {self.score.screen_images} is for the race, whose values are not distances; with "
                f"pruner {self.pruner!r} leave it out"
            )
        next_count = [*self.rungs, self.score.images][0]
        if self.screen_images >= next_count:
            raise ValueError(
                f"score.screen_images {self.score.screen_images} must be fewer than the {next_count} of the first rung"
            )
        return self

    @property
    def pruner(self) -> Pruner:
        """``score.pruner``, or the preset's."""
        return self.score.pruner or ("none" if self.search.preset == "paper" else "race")

    @property
    def rungs(self) -> list[int]:
        """``score.rungs``, or what the race takes for them."""
        if self.score.rungs is not None:
            return self.score.rungs
        half = self.score.images // 2
        return [half] if self.pruner == "race" and half >= 2 else []

    @property
    def screen_images(self) -> int:
        """``score.screen_images``, or what the race takes for them; 0 where a fine run with one noise, eta and guidance
        scale is no measure for the candidates.
        """
        if self.pruner == "none" or self.sampling.eta != 0.0 or isinstance(self.sampling.guidance, (Range, list)):
            return 0
        if self.score.screen_images is not None:
            return self.score.screen_images
        if self.pruner != "race" or self.search.preset == "paper":
            return 0
        fewer = min(SCREEN_IMAGES, [*self.rungs, self.score.images][0] // 2)
        return fewer if fewer >= FEWEST_SCREEN_IMAGES else 0

    @property
    def finalists(self) -> int:
        """``score.finalists``, or what it is where it is unset."""
        unset = 0 if self.search.preset == "paper" else FINALISTS
        return unset if self.score.finalists is None else self.score.finalists

    @property
    def validation_images(self) -> int:
        """``score.validation_images``, or what it is where it is unset."""
        return self.score.validation_images or min(VALIDATION_RATIO * self.score.images, BANK_SIZE)

    def measured(self) -> dict[str, Any]:
        """Flat settings that decide candidates and values: those that may not change on resume."""
        flat = flatten(self.model_dump(mode="json"))
        flat["model.clip"] = self.model.clip is not False  # unset is on where there is a choice
        return {key: value for key, value in flat.items() if key not in MAY_CHANGE}

    def fingerprint(self) -> str:
        """Hex digest of ``measured``."""
        text = json.dumps(self.measured(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


MAY_CHANGE = {
    *OF_THIS_HOST,
    "name",
    "description",
    "model.check",
    "search.trials",
    "search.grace",
    "score.finalists",
    "score.validation_images",
    "score.held_out_images",
    "score.held_out_banks",
    "score.floor_steps",
}
"""Settings a study may be resumed with: they change how long it runs and where, and how it ends, not what it tries.

What lies at the paths is compared by hash.
"""


def load_config(path: Path, overrides: Iterable[str] = (), folder: Path | None = None) -> StudyConfig:
    """Study file with ``key=value`` overrides; the name defaults to the file's.

    Relative paths in it start from ``folder``, by default its own, and those of overrides from the current one. They
    are made absolute, so that the study works from any folder.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read study file {str(path)!r}: {reason}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path.name} is not valid TOML: {error}; fix that line and run again") from None
    table.setdefault("name", path.stem)
    locate_files(table, folder or path.parent)
    config = parse_config(table, overrides)
    check_filled_in(config, path.name)
    return config


def check_filled_in(config: StudyConfig, file: str) -> None:
    """ConfigError that names every setting of the study ``file`` that is still to be filled in."""
    flat = flatten(config.model_dump(mode="json"))
    missing = [f"{key}: {what}" for key, what in TO_FILL_IN.items() if flat[key] == FILL_IN]
    if missing:
        raise ConfigError(f"{file} is to be filled in where it says {FILL_IN!r}: {'; '.join(missing)}")


def parse_config(table: Mapping[str, Any], overrides: Iterable[str] = ()) -> StudyConfig:
    """Checked config of a nested table with ``key=value`` overrides (ConfigError, one line)."""
    merged = json.loads(json.dumps(table, default=str))
    for override in overrides:
        apply_override(merged, override)
    try:
        return StudyConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set the dotted key of ``key=value`` in ``table``; the value is read as TOML, else as a string."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals or not key:
        raise ConfigError(f"--set {override!r} has no '='; write --set key=value, for example --set search.trials=100")
    *path, name = key.split(".")
    given: dict[str, Any] = {name: _toml_value(text)}
    for part in reversed(path):
        given = {part: given}
    locate_files(given, Path.cwd())
    if "folder" in given:
        table["folder"] = given.pop("folder")
    for part in path:
        table, given = table.setdefault(part, {}), given[part]
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override!r}: {part!r} is a value, not a table; set it as a whole")
    table.update(given)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def locate_files(table: dict[str, Any], folder: Path) -> None:
    """Make the relative paths of a nested table absolute, from ``folder``; a table of Python plug-ins keeps it."""
    for key in FILES:
        section, name = key.split(".")
        values = table.get(section)
        if isinstance(values, dict) and isinstance(values.get(name), str):
            values[name] = _located(key, values[name], folder)
    search = table.get("search")
    if isinstance(search, dict) and isinstance(search.get("warm_starts"), list):
        search["warm_starts"] = [_with_content(entry, folder) for entry in search["warm_starts"]]
    if isinstance(table.get("folder"), str):
        table["folder"] = _absolute(table["folder"], folder)
    elif any(str(value).startswith("python:") for value in flatten(table).values()):
        table["folder"] = _absolute(".", folder)


def _with_content(entry: Any, folder: Path) -> Any:
    """``NAME=LIST`` for ``@FILE`` and ``NAME=@FILE``, so that a study holds the list and not where it was."""
    name, at, file = entry.partition("@") if isinstance(entry, str) else ("", "", "")
    if not at or (name.strip() and not name.strip().endswith("=")):
        return entry
    path = Path(_absolute(file.strip(), folder))
    try:
        content = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"search.warm_starts: cannot read {str(path)!r}: {reason}; give a file of a list") from None
    named = name.strip() or ("" if "{" in content else f"{path.stem}=")
    return f"{named}{content}"


def _located(key: str, value: str, folder: Path) -> str:
    """The value of one of ``FILES`` with an absolute path, where it is a path."""
    if value == FILL_IN:
        return value
    if key != "model.source":
        return _absolute(value, folder)
    if value.startswith("adm:"):
        return "adm:" + _absolute(value.removeprefix("adm:"), folder)
    if value in BUNDLED or value.startswith("python:"):
        return value
    absolute = _absolute(value, folder)
    # A hub id looks like a path, and a misspelt name is better called so.
    is_path = value.startswith((".", "~")) or Path(absolute).exists()
    return absolute if is_path else value


def _absolute(path: str, folder: Path) -> str:
    try:
        whole = folder / Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{path!r} names the folder of a user who is not here; write the whole path") from None
    return os.path.abspath(whole)  # not resolved: links stay as the user sees them


def missing_files(config: StudyConfig) -> list[str]:
    """Those of ``FILES``, and the folder of plug-ins, whose absolute path does not exist on this host."""
    flat = flatten(config.model_dump(mode="json"))
    paths = {key: str(flat[key] or "").removeprefix("adm:") for key in (*FILES, "folder")}
    return [key for key, path in paths.items() if os.path.isabs(path) and not os.path.exists(path)]


def known_keys(section: type[BaseModel] = StudyConfig) -> set[str]:
    """Dotted names of all settings."""
    keys = set()
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        tables = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        keys |= {f"{name}.{key}" for table in tables for key in known_keys(table)}
        if field.annotation not in tables:
            keys.add(name)
    return keys


def unknown_key(key: str) -> str:
    """One line for a setting that does not exist, with the nearest that does."""
    names = sorted(known_keys())
    near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    tail = [name for name in names if name.split(".")[-1] == key.split(".")[-1]]
    hint = next(iter(tail or near), None)
    advice = f"did you mean {hint!r}?" if hint else f"known settings: {', '.join(names)}"
    return f"unknown setting {key!r}; {advice}"


def explain(error: ValidationError) -> str:
    """First problem of a config as one line: the setting, what was given, what is allowed."""
    first = _most_telling(error.errors())
    # A union of an int and a table puts the member's name in the location.
    parts = {part for key in known_keys() for part in key.split(".")}
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in parts)
    if first["type"] == "extra_forbidden":
        *path, last = first["loc"]
        return unknown_key(".".join([*(str(part) for part in path if part in parts), str(last)]))
    if first["type"] == "missing":
        return f"setting {where!r} is missing; add it to the study file"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not where:  # of settings of several sections, which it names itself
        return message
    given = first["input"]
    shown = "" if isinstance(given, dict) else f" (given: {given!r})"
    return f"setting {where!r}: {message}{shown}"


def _most_telling(problems: Sequence[ErrorDetails]) -> ErrorDetails:
    """An unknown key before the missing one that it was meant to be; else the first problem.

    A union reports one problem per member: of a table or a list, that member's is the one that helps.
    """
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            return problem
    given = problems[0]["input"]
    member = "Range" if isinstance(given, dict) else "list[" if isinstance(given, list) else None
    fitting = [p for p in problems if member and any(member in str(part) for part in p["loc"])]
    return (fitting or problems)[0]


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(old: StudyConfig, new: StudyConfig) -> list[str]:
    """``key: old -> new`` for every setting that decides what is measured."""
    before, after = old.measured(), new.measured()
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def presets() -> dict[str, Path]:
    """Shipped study files by name."""
    package = Path(__file__).parent
    folders = package / "studies", package.parent / "studies"  # of an installed package, and of a checkout
    folder = next(folder for folder in folders if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_preset(name: str, overrides: Iterable[str] = ()) -> StudyConfig:
    """Shipped study by name (ConfigError listing what exists)."""
    shipped = presets()
    if name not in shipped:
        raise ConfigError(choose_from("study preset", name, shipped))
    return load_config(shipped[name], overrides, folder=Path.cwd())  # its files are the user's
