"""Sigmas for ComfyUI's node ManualSigmas, and what its user needs to know. Torch-free."""

from __future__ import annotations

from autodiffusion_optuna.export.recipes import TEXT_PIPELINES
from autodiffusion_optuna.export.result import Result

SAMPLERS: dict[str, tuple[str, str]] = {
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


def comfyui_sigmas(result: Result) -> str:
    """The text for the node, which reads every number in it; ``comfyui_notes`` says how to use it.

    K + 1 noise levels in ComfyUI's convention, sigma / alpha for eps and v models and s in [0, 1] for flows, the last
    one 0 with ``final = "zero"``. With 12 decimals and never an exponent, which the node does not read.
    """
    return ", ".join(f"{level:.12f}".rstrip("0").rstrip(".") or "0" for level in result.levels) + "\n"


def comfyui_notes(result: Result) -> list[str]:
    """What the reader of ``comfyui_sigmas`` needs to know and its text must not hold, a line each."""
    return [f"Study {result.study}: paste the numbers into the node ManualSigmas.", *common_notes(result)]


def common_notes(result: Result) -> list[str]:
    """What differs in ComfyUI however the sigmas get there, a line each; the first names the sampler."""
    notes = [_sampler(result)]
    if result.guidance is not None:
        what = "guidance of FluxGuidance, with a cfg of 1" if result.model.guidance == "embedded" else "cfg"
        notes.append(f"Guidance: {result.guidance:g} ({what}).")
    if result.timesteps[0] < result.train_timesteps - 1:
        scale = "this level" if result.is_flow else "its level alone, not by sqrt(1 + sigma^2)"
        notes.append(f"The first level is not the model's highest: ComfyUI scales the first noise by {scale}.")
    if result.masked:
        notes.append("ComfyUI cannot skip layers by step: these are the result's timesteps alone, at their full cost.")
    if result.final == "sigma_min" and result.solver.startswith(("dpmpp", "deis", "unipc")):
        notes.append("The last step, which ends above 0, may be of a higher order than in the search.")
    if result.model.kind not in TEXT_PIPELINES:
        notes.append(f"ComfyUI has no loader for this model ({result.model.kind}); a custom node has to bring one.")
    return notes


def sampler_of(result: Result) -> tuple[str, str]:
    """ComfyUI's name of the sampler that takes a result's steps, and what differs; both empty where it has none."""
    if result.amplification_cap is not None:
        return "", ""
    name, note = SAMPLERS.get(result.solver, ("", ""))
    if result.eta:
        name, note = "euler_ancestral", f"set eta = {result.eta:g} in the node SamplerEulerAncestral"
        if result.is_flow:  # its own rule there: by sigma, not by lambda
            note = f"approximately: for flows it splits a step by another rule; {note}"
    return name, note


def no_sampler(result: Result) -> str:
    """Why there is no sampler for a result."""
    capped = " with an amplification cap" if result.amplification_cap is not None else ""
    return f"ComfyUI has none that takes the steps of {result.solver}{capped}"


def _sampler(result: Result) -> str:
    name, note = sampler_of(result)
    if not name:
        return f"Sampler: {no_sampler(result)}; the nearest is euler."
    if result.is_flow and name != "euler" and not note:
        note = "approximately: for flows it works in another coordinate"
    return f"Sampler: {name}" + (f" ({note})." if note else ".")
