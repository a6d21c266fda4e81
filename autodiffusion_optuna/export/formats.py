"""The best candidate of a study as a result, and as a file's text in each format that leaves this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from autodiffusion_optuna.candidate import Candidate
from autodiffusion_optuna.config import Range, StudyConfig
from autodiffusion_optuna.errors import ConfigError, StudyError, choose_from
from autodiffusion_optuna.export.comfyui import comfyui_sigmas
from autodiffusion_optuna.export.result import ConfigPart, HeldOutPart, ModelPart, NoisePart, Result, ScorePart
from autodiffusion_optuna.export.scripts import diffusers_script
from autodiffusion_optuna.noise import NoiseSchedule
from autodiffusion_optuna.results.summary import Best, StudySummary
from autodiffusion_optuna.storage.attrs import MODEL_FACTS, NOISE, VERSION

FORMATS: dict[str, Callable[[Result], str]] = {
    "json": Result.text,
    "diffusers": diffusers_script,
    "comfyui": comfyui_sigmas,
}
"""Format -> a result's text in it."""


def result_text(result: Result, form: str) -> str:
    """A result as a file's text; ``form``: a name of ``FORMATS``.

    ``ConfigError`` for an unknown format, and for a model that neither diffusers nor ComfyUI can load.
    """
    if form not in FORMATS:
        raise ConfigError(choose_from("format", form, FORMATS))
    if form != "json" and result.model.kind == "mixture":
        raise ConfigError(
            "the analytic mixture is not a model of diffusers or ComfyUI; export it with adopt export --format json"
        )
    return FORMATS[form](result)


def result_of(summary: StudySummary) -> Result:
    """Everything that repeats the images of a study's best candidate (StudyError where there is none yet)."""
    if summary.best is None:
        raise StudyError(f"study {summary.config.name!r} has no finished trial to export; run it first")
    config, best, attrs = summary.config, summary.best, summary.attrs
    candidate = best.candidate
    sampling = _sampling(config, candidate, attrs[MODEL_FACTS])
    return Result(
        study=config.name,
        model=_model(summary),
        train_timesteps=attrs["codec"]["T"],
        amplification_cap=config.sampling.amplification_cap,
        timesteps=candidate.timesteps,
        skips=tuple(tuple(names) for names in candidate.skip_names(summary.units)),
        cost=best.cost,
        score=_score(summary, best),
        conditions=attrs["conditions"],
        noise=NoisePart.of(NoiseSchedule.unpack(attrs[NOISE]), candidate.timesteps, sampling["final"]),
        config=ConfigPart(model=config.model, score=config.score),
        made_with={"autodiffusion_optuna": attrs[VERSION], **_versions()},
        **sampling,
    )


def _sampling(config: StudyConfig, candidate: Candidate, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Solver, final, eta and guidance: what the candidate chose, else what the study fixes."""
    from autodiffusion_optuna.evaluation.solvers import solver_names

    chosen = candidate.settings_dict

    def setting(name: str) -> Any:
        return chosen[name] if name in chosen else _first(getattr(config.sampling, name))

    guidance = facts["scale"] if setting("guidance") is None else setting("guidance")
    return {
        "solver": chosen.get("solver") or solver_names(setting("solver"), _first(config.sampling.order)),
        "final": setting("final"),
        "eta": setting("eta"),
        "guidance": None if facts["guidance"] == "none" else guidance,
    }


def _first(value: Any) -> Any:
    """A setting that is not searched: itself, or the only one of a list."""
    assert not isinstance(value, Range), "a searched setting is the candidate's"
    return value[0] if isinstance(value, list) else value


def _model(summary: StudySummary) -> ModelPart:
    config, facts = summary.config.model, summary.attrs[MODEL_FACTS]
    shape, image_shape = tuple(facts["shape"]), tuple(facts["image_shape"])
    return ModelPart(
        source=config.source,
        sha256=summary.attrs["model"],
        kind=facts["kind"],
        prediction=facts["prediction"],
        clip=shape == image_shape if config.clip is None else config.clip,  # unset: models of pixels clip, latents not
        precision=config.precision,
        guidance=facts["guidance"],
        shape=shape,
        image_shape=image_shape,
        latent_scale=facts["latent_scale"],
        weights=facts["weights"],
        units=tuple(facts["units"]),
    )


def _score(summary: StudySummary, best: Best) -> ScorePart:
    held_out = None if best.held_out is None else HeldOutPart(**best.held_out.summary())
    return ScorePart(metric=summary.metric, value=best.value, images=summary.config.score.images, held_out=held_out)


def _versions() -> dict[str, str]:
    """Versions here of the packages that decide what is drawn; without importing them."""
    names = ("optuna", "torch", "diffusers", "transformers")
    return {name: metadata.version(name) for name in names if any(metadata.distributions(name=name))}
