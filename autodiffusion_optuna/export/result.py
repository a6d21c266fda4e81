"""Result: one candidate outside its study, as a JSON file that repeats its images. Torch-free."""

from __future__ import annotations

import base64
import binascii
import itertools
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, ValidationError, model_validator

from autodiffusion_optuna.candidate import REUSE, RUN, SKIP, Candidate, packed
from autodiffusion_optuna.config import NAME_PATTERN, ModelConfig, ScoreConfig, Section
from autodiffusion_optuna.errors import ConfigError, program
from autodiffusion_optuna.files import START, not_content
from autodiffusion_optuna.noise import Final, NoiseSchedule
from autodiffusion_optuna.results.json_text import one_line_lists

FORMAT: Literal[4] = 4

# Names become file names and code in exports, so they hold nothing else.
Name = Annotated[str, Field(pattern=NAME_PATTERN)]
Identifier = Annotated[str, Field(pattern=r"^\w+$")]
Index = Annotated[int, Field(ge=0)]
Shape = tuple[int, int, int]


class Table(Section):
    """A part of the file: unknown fields, other types, infinities and NaN are refused."""

    model_config = ConfigDict(allow_inf_nan=False)


class ModelPart(Table):
    """The model that the result was found on; see ``evaluation.models.Model``.

    ``clip`` is what was done, never "the model's own". ``guidance``: what a guidance scale acts on. ``weights``: some
    of the network's by name, see ``evaluation.denoiser.weights_sample``. ``units``: names of all layers that could be
    skipped. ``prediction`` and ``weights`` are None where the model has none, ``latent_scale`` also of pixels.
    """

    source: str
    sha256: str
    kind: Identifier
    prediction: str | None = None
    clip: bool
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    guidance: Literal["none", "free", "embedded", "classifier"] = "none"
    shape: Shape
    image_shape: Shape
    latent_scale: float | None = None
    weights: dict[str, float] | None = None
    units: tuple[str, ...]


class NoisePart(Table):
    """Noise levels in float64: those of the K timesteps and the final point, and the whole schedule.

    ``model_times`` [K]: what the network takes as its timestep. ``alpha``, ``sigma`` [K + 1]: at the timesteps and the
    final point. ``packed``: ``NoiseSchedule.pack``.
    """

    model_times: tuple[float, ...]
    alpha: tuple[float, ...]
    sigma: tuple[float, ...]
    packed: str

    @classmethod
    def of(cls, noise: NoiseSchedule, timesteps: Sequence[int], final: Final) -> NoisePart:
        """Levels of ``noise`` at ``timesteps`` and at the final point."""
        end = (1.0, 0.0) if final == "zero" else (noise.alpha(0), noise.sigma(0))
        return cls(
            model_times=tuple(float(noise.model_times[t]) for t in timesteps),
            alpha=(*(noise.alpha(t) for t in timesteps), end[0]),
            sigma=(*(noise.sigma(t) for t in timesteps), end[1]),
            packed=noise.pack(),
        )


class HeldOutPart(Table):
    """Mean on held-out banks of noise and its 95 % interval; see ``results.held_out.HeldOut``."""

    mean: float
    low: float
    high: float
    images: int
    banks: int


class BaselinePart(Table):
    """The uniform timesteps that the candidate is compared with: their value on the same images.

    ``name``: with the settings that were searched. ``difference``: the candidate's value minus theirs, paired by bank,
    where both have held-out values.
    """

    name: str
    timesteps: tuple[Index, ...]
    value: float
    difference: HeldOutPart | None = None


class ScorePart(Table):
    """What the candidate scored: on the ``images`` of the search, and on held-out ones if it was scored there."""

    metric: str
    value: float
    images: int
    held_out: HeldOutPart | None = None
    baseline: BaselinePart | None = None


class OriginPart(Table):
    """Where timesteps come from that no search found.

    ``list``: label of a list that was given. ``interpolated_from``: number of steps of the list, or of the best
    candidate, that they were interpolated from in log-SNR.
    """

    list: str | None = None
    interpolated_from: int | None = None

    def __str__(self) -> str:
        """As scripts and messages say it."""
        what = "timesteps" if self.list is None else f"timesteps of {self.list}"
        found = "found steps" if self.list is None else "steps"
        how = f", interpolated from {self.interpolated_from} {found}" if self.interpolated_from else ""
        return f"{what}{how}, not searched"


class ConfigPart(Table):
    """The sections of the study file that say how images are made and compared."""

    model: ModelConfig
    score: ScoreConfig


class Result(Table):
    """Everything that repeats the images of one candidate.

    ``train_timesteps``: T, the size of the grid that ``timesteps`` index. ``solver``: a name of ``SOLVERS``.
    ``guidance``: the scale used, None where the model has no guidance. ``skips``, ``reuses``: names of the units at
    each step that are skipped, and of those whose branch is that of the last step at which they ran. ``cost``: relative
    to the study's full run. ``origin``: None for a candidate that the search found; others
    have no ``score``. ``conditions``: fingerprint of the labels or prompts, if any.
    """

    format: Literal[4] = FORMAT
    study: Name
    model: ModelPart
    train_timesteps: Annotated[int, Field(ge=1, le=1_000_000)]  # no file is believed to have a larger grid
    solver: Identifier
    final: Final
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    amplification_cap: Annotated[float, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0)] | None = None
    timesteps: Annotated[tuple[Index, ...], Field(min_length=1)]
    skips: tuple[tuple[str, ...], ...]
    reuses: tuple[tuple[str, ...], ...]
    cost: float
    origin: OriginPart | None = None
    score: ScorePart | None
    conditions: str | None = None
    noise: NoisePart
    config: ConfigPart
    made_with: Annotated[dict[str, str], Field(default_factory=dict)]

    @model_validator(mode="after")
    def _consistent(self) -> Result:
        if any(a <= b for a, b in itertools.pairwise(self.timesteps)) or self.timesteps[0] >= self.train_timesteps:
            raise ValueError(f"timesteps must descend strictly within [0, {self.train_timesteps - 1}]")
        for name in ("skips", "reuses"):
            if len(getattr(self, name)) != len(self.timesteps):
                raise ValueError(f"{len(self.timesteps)} timesteps but {name} for {len(getattr(self, name))}")
        if any(set(skips) & set(reuses) for skips, reuses in zip(self.skips, self.reuses, strict=True)):
            raise ValueError("a layer is skipped and reused at the same step")
        unpacked = NoisePart.of(self.noise_schedule(), self.timesteps, self.final)
        for name in ("model_times", "alpha", "sigma"):
            given, packed = getattr(self.noise, name), getattr(unpacked, name)
            if len(given) != len(packed) or not np.allclose(given, packed, rtol=1e-9, atol=1e-12):
                raise ValueError(f"noise.{name} is not what noise.packed holds at the timesteps")
        return self

    def __str__(self) -> str:
        """As messages name it."""
        return f"the result of study {self.study!r}"

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """The result in a JSON file (ConfigError)."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(
                f"cannot read result {str(path)!r}: {reason}; give a file of {program()} export --format json"
            ) from None
        if problem := not_content(text[:START].encode()):
            raise ConfigError(f"{path}: {problem}")
        return cls.parse(text, path.name)

    @classmethod
    def parse(cls, text: str, name: str = "text") -> Result:
        """The result in JSON text; ``name`` stands for it in a ConfigError."""
        foreign = f"result {name} is not one that adopt wrote"
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{foreign}: it is not valid JSON ({error}); export it again") from None
        version = data.get("format") if isinstance(data, dict) else None
        if version != FORMAT:
            given = "no format" if version is None else f"format {version!r}"
            raise ConfigError(
                f"result {name} has {given}, this version reads format {FORMAT}; give a file of {program()} "
                "export --format json"
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(f"{foreign}: {_first_problem(error)}; export it again") from None

    def text(self) -> str:
        """The file's text: indented JSON, floats exact, a list of numbers on one line."""
        return one_line_lists(self.model_dump_json(indent=2)) + "\n"

    def write(self, path: str | Path) -> None:
        """Write the file (ConfigError)."""
        try:
            Path(path).write_text(self.text(), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}; give another path") from None

    @property
    def masked(self) -> bool:
        """Whether any step skips or reuses a unit."""
        return any(self.skips) or any(self.reuses)

    def modes_of(self, unit: str) -> list[int]:
        """Mode of a unit at each step."""
        return [
            SKIP if unit in skips else REUSE if unit in reuses else RUN
            for skips, reuses in zip(self.skips, self.reuses, strict=True)
        ]

    @property
    def is_flow(self) -> bool:
        """Whether the network predicts a flow: its levels are s in [0, 1] and not sigma / alpha."""
        return self.model.prediction == "flow_prediction"

    @property
    def levels(self) -> tuple[float, ...]:
        """K + 1 noise levels as other programs take them: sigma / alpha, and s of flows."""
        if self.is_flow:
            return self.noise.sigma
        return tuple(sigma / alpha for alpha, sigma in zip(self.noise.alpha, self.noise.sigma, strict=True))

    def candidate(self, units: Sequence[str], T: int | None = None) -> Candidate:
        """The candidate for a model with the given unit names, which may be another than the result's.

        ``T``: number of that model's time indices; None to take it for granted. ``ConfigError`` naming the first unit
        that the model lacks, or both numbers where they differ.
        """
        if T is not None and self.train_timesteps != T:
            raise ConfigError(
                f"{self} indexes {self.train_timesteps} timesteps and the model has {T}; use it with a model of the "
                "same number, or search for this model"
            )
        position = {name: index for index, name in enumerate(units)}
        for name in itertools.chain.from_iterable(self.skips + self.reuses):
            if name not in position:
                raise ConfigError(
                    f"{self} skips or reuses {name!r}, and the model has no such layer; use it with a model of the "
                    "same architecture, or search for this model"
                )
        by_step = zip(self.skips, self.reuses, strict=True)
        modes = (packed(*([position[name] for name in names] for names in at_step)) for at_step in by_step)
        return Candidate(self.timesteps, tuple(modes))

    def sampling_settings(self) -> dict[str, Any]:
        """Keywords of ``evaluation.sampling.Sampling``."""
        return {**self.model_dump(include={"solver", "final", "guidance", "eta"}), "cap": self.amplification_cap}

    def noise_schedule(self) -> NoiseSchedule:
        """The whole noise schedule, exact."""
        return _unpack(self.noise.packed, self.train_timesteps)

    def with_model(self, **changes: Any) -> Result:
        """The same result with another ``source`` or ``precision`` of its model."""
        model = self.config.model.model_copy(update=changes)
        config = self.config.model_copy(update={"model": model})
        return self.model_copy(update={"model": self.model.model_copy(update=changes), "config": config})


def _unpack(text: str, T: int) -> NoiseSchedule:
    """``NoiseSchedule.unpack`` of text that may be damaged or hostile: ValueError, and never more than 24 T bytes."""
    try:
        unzip = zlib.decompressobj()
        size = len(unzip.decompress(base64.b64decode(text, validate=True), 24 * T + 1))
    except (zlib.error, binascii.Error) as error:
        raise ValueError(f"noise.packed is damaged ({error})") from None
    if size != 24 * T or not unzip.eof:
        raise ValueError(f"noise.packed does not hold {T} timesteps")
    noise = NoiseSchedule.unpack(text)
    arrays = np.stack([noise.alphas, noise.sigmas, noise.model_times])
    if not (np.isfinite(arrays).all() and (noise.alphas > 0).all() and (noise.sigmas > 0).all()):
        raise ValueError("noise.packed holds levels that are not positive and finite")
    return noise


def _first_problem(error: ValidationError) -> str:
    """First problem of a file as one line, an unknown field before the missing one that it was meant to be."""
    problems = error.errors(include_url=False)
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"unknown field {where!r}"
    if first["type"] == "missing":
        return f"field {where!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"field {where!r}: {message[0].lower()}{message[1:]}" if where else message
