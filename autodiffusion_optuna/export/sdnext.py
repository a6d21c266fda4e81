"""Timesteps for the field "Timesteps override" of SD.Next. Torch-free.

The field takes whole numbers from 0 to 999, highest first, with commas or spaces between, at least three; they replace
the sampler's own and set the number of steps, where the sampler's scheduler takes a list (its hint in SD.Next's Enso
interface, github.com/CalamitousFelicitousness/enso, SamplerTab.tsx; SD.Next's own presets "AYS SD15" and "AYS SDXL" in
github.com/vladmandic/sdnext, modules/ui_sections.py, are such texts). AUTOMATIC1111's web UI has no field for a list.
"""

from __future__ import annotations

from autodiffusion_optuna.errors import ConfigError, program
from autodiffusion_optuna.export.result import Result

KINDS = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Models whose timesteps are those of the field."""
ORDERS = {"ddim": 1, "euler": 1, "dpmpp_2m": 2, "dpmpp_3m": 3}
"""Solver -> order of SD.Next's "DPM++ 2M", diffusers' DPMSolverMultistepScheduler, that takes the same steps."""
FEWEST, GRID = 3, 1000


def sdnext_timesteps(result: Result) -> str:
    """The text for the field: commas alone, since SD.Next counts what is between a comma and a space as a step.

    ``ConfigError`` where the field cannot give the result's steps.
    """
    elsewhere = f"use {program()} export --format diffusers"
    if result.model.kind not in KINDS or result.train_timesteps != GRID or result.is_flow:
        raise ConfigError(f"SD.Next takes timesteps of Stable Diffusion alone, not of {result.model.kind}; {elsewhere}")
    if len(result.timesteps) < FEWEST:
        raise ConfigError(f"SD.Next takes {FEWEST} timesteps or more, the result has {len(result.timesteps)}")
    if result.solver not in ORDERS or result.eta or result.amplification_cap is not None or result.final != "zero":
        raise ConfigError(
            f"SD.Next has no sampler that takes the steps of {result.solver} as the study does on such a list; "
            f"{elsewhere}"
        )
    return ",".join(map(str, result.timesteps)) + "\n"


def sdnext_notes(result: Result) -> list[str]:
    """What the reader of ``sdnext_timesteps`` needs to know, a line each."""
    notes = [
        f'Study {result.study}: paste the numbers into the field "Timesteps override" of SD.Next\'s sampler settings.',
        f'Sampler: DPM++ 2M, with "Sampler order" {ORDERS[result.solver]} and the option "low order" off.',
    ]
    if result.guidance is not None:
        notes.append(f"Guidance: {result.guidance:g}.")
    if result.masked:
        notes.append("SD.Next cannot skip layers by step: these are the result's timesteps alone, at their full cost.")
    return notes
