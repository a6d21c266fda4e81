"""The best candidate of a study as a result, and as a file's text in each format that leaves this package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

from autodiffusion_optuna.candidate import REUSE, SKIP, Candidate
from autodiffusion_optuna.config import MEMORY, Range, StudyConfig
from autodiffusion_optuna.errors import ConfigError, StudyError, choose_from, program
from autodiffusion_optuna.export.comfyui import comfyui_notes, comfyui_sigmas
from autodiffusion_optuna.export.comfyui_workflow import comfyui_workflow, workflow_notes
from autodiffusion_optuna.export.result import (
    BaselinePart,
    ConfigPart,
    HeldOutPart,
    ModelPart,
    NoisePart,
    Result,
    ScorePart,
)
from autodiffusion_optuna.export.scripts import diffusers_script
from autodiffusion_optuna.export.sdnext import sdnext_notes, sdnext_timesteps
from autodiffusion_optuna.results.held_out import Banks
from autodiffusion_optuna.results.summary import StudySummary
from autodiffusion_optuna.storage.attrs import CODEC, CONDITIONS, MODEL, MODEL_FACTS, VERSION

FORMATS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "json": (".json", Result.text),
    "diffusers": (".py", diffusers_script),
    "comfyui": ("-sigmas.txt", comfyui_sigmas),
    "comfyui-workflow": ("-workflow.json", comfyui_workflow),
    "sdnext": ("-timesteps.txt", sdnext_timesteps),
}
"""Format -> what the name of its file ends with after the study's, and a result's text in it."""


def result_text(result: Result, form: str) -> str:
    """A result as a file's text; ``form``: a name of ``FORMATS``.

    ``ConfigError`` for an unknown format, and for a model that neither diffusers nor ComfyUI can load.
    """
    if form not in FORMATS:
        raise ConfigError(choose_from("format", form, FORMATS))
    if form != "json" and result.model.kind == "mixture":
        raise ConfigError(
            "the analytic mixture is not a model of diffusers or ComfyUI; export it with "
            f"{program()} export --format json"
        )
    if form == "diffusers" and result.model.source.startswith(MEMORY):
        raise ConfigError(
            f"{result} is of a model in memory, which no script can load; save it with save_pretrained, and export the "
            "result's with_model(source=FOLDER)"
        )
    return FORMATS[form][1](result)


def notes_of(result: Result, form: str) -> list[str]:
    """What the reader of a result in a format needs to know and its text does not hold, a line each."""
    notes = {"comfyui": comfyui_notes, "comfyui-workflow": workflow_notes, "sdnext": sdnext_notes}
    return notes[form](result) if form in notes else []


def file_name(study: str, form: str) -> str:
    """Name of the file of a study's result in a format."""
    return study + FORMATS[form][0]


def result_of(summary: StudySummary) -> Result:
    """Everything that repeats the images of a study's best candidate (StudyError where there is none yet)."""
    if summary.best is None:
        raise StudyError(f"study {summary.config.name!r} has no finished trial to export; run it first")
    config, attrs = summary.config, summary.attrs
    best = summary.headline.found if summary.headline else summary.best  # on the same images as the baseline
    candidate, facts = best.candidate, attrs[MODEL_FACTS]
    sampling = _sampling(config, candidate, facts)
    said = {**facts, **{key: tuple(facts[key]) for key in ("shape", "image_shape", "units")}}
    del said["scale"]
    clip = config.model.clip
    return Result(
        study=config.name,
        model=ModelPart(
            source=config.model.source,
            sha256=attrs[MODEL],
            clip=said["shape"] == said["image_shape"] if clip is None else clip,  # unset: models of pixels do
            precision=config.model.precision,
            **said,
        ),
        train_timesteps=attrs[CODEC]["T"],
        amplification_cap=config.sampling.amplification_cap,
        timesteps=candidate.timesteps,
        skips=tuple(map(tuple, candidate.unit_names(summary.units, SKIP))),
        reuses=tuple(map(tuple, candidate.unit_names(summary.units, REUSE))),
        cost=best.cost,
        score=ScorePart(
            metric=summary.metric,
            value=best.value,
            images=config.score.images,
            held_out=None if best.held_out is None else HeldOutPart(**best.held_out.summary()),
            baseline=_baseline(summary),
        ),
        conditions=attrs[CONDITIONS],
        noise=NoisePart.of(summary.noise, candidate.timesteps, sampling["final"]),
        config=ConfigPart(model=config.model, score=config.score),
        made_with={"autodiffusion_optuna": attrs[VERSION], **_versions()},
        **sampling,
    )


def _baseline(summary: StudySummary) -> BaselinePart | None:
    """The headline's baseline, where it was scored."""
    headline = summary.headline
    if headline is None or headline.baseline_value is None:
        return None
    difference = headline.difference
    return BaselinePart(
        name=headline.baseline_name,
        timesteps=headline.baseline.candidate.timesteps,
        value=headline.baseline_value,
        difference=None if difference is None else HeldOutPart(**Banks.summary(difference)),
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


def _versions() -> dict[str, str]:
    """Versions here of the packages that decide what is drawn; without importing them."""
    names = ("optuna", "torch", "diffusers", "transformers")
    return {name: metadata.version(name) for name in names if any(metadata.distributions(name=name))}
