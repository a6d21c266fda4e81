"""A result as a workflow of ComfyUI in its API format, the one that ``POST /prompt`` takes. Torch-free.

Nodes and their inputs are those of ComfyUI's own ``nodes.py`` and ``comfy_extras`` (``nodes_custom_sampler.py``,
``nodes_flux.py``, ``nodes_sd3.py``) at commit 4be318a; ``ManualSigmas`` came with pull request 11499.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from autodiffusion_optuna.errors import ConfigError, program
from autodiffusion_optuna.export.comfyui import comfyui_sigmas, common_notes, no_sampler, sampler_of
from autodiffusion_optuna.export.recipes import TEXT_PIPELINES
from autodiffusion_optuna.export.result import Result
from autodiffusion_optuna.export.scripts import PROMPT

Node = dict[str, Any]
Workflow = dict[str, Node]

FLUX_FILES = {"clip_l": "clip_l.safetensors", "t5xxl": "t5xxl_fp16.safetensors", "vae": "ae.safetensors"}
"""What the files beside the network are called in ComfyUI's own Flux example."""
MOST_GUIDANCE = 100.0
"""Largest cfg that ComfyUI's nodes take."""


def comfyui_workflow(result: Result) -> str:
    """JSON of a text-to-image workflow: node by id, with its class and its inputs.

    An input is a value or [id of a node, number of its output]. ``ConfigError`` where ComfyUI has no loader for the
    model or no sampler for the steps.
    """
    if result.model.kind not in TEXT_PIPELINES:
        raise ConfigError(
            f"ComfyUI has no loader for this model ({result.model.kind}); paste the numbers of {program()} export "
            "--format comfyui into a workflow that has one"
        )
    if not sampler_of(result)[0]:
        raise ConfigError(
            f"sampler: {no_sampler(result)}; paste the numbers of {program()} export --format comfyui into a workflow "
            "with another"
        )
    if (result.guidance or 0) > MOST_GUIDANCE:
        raise ConfigError(f"ComfyUI takes a guidance of at most {MOST_GUIDANCE:g}, the result has {result.guidance:g}")
    embedded = result.model.guidance == "embedded"
    loaders, model, clip, vae = _loaders(result)
    height, width = result.model.image_shape[1:]
    latent = "EmptyLatentImage" if result.model.shape[0] == 4 else "EmptySD3LatentImage"
    title = str(result.origin) if result.origin else f"{len(result.timesteps)} steps found by study {result.study}"
    nodes: Workflow = {
        **loaders,
        "positive": _node("CLIPTextEncode", text=PROMPT, clip=clip),
        "negative": _node("CLIPTextEncode", text=result.config.model.negative_prompt, clip=clip),
        "latent": _node(latent, width=width, height=height, batch_size=1),
        "sigmas": _node("ManualSigmas", title, sigmas=comfyui_sigmas(result).strip()),
        "sampler": _sampler_node(result),
        "sample": _node(
            "SamplerCustom",
            model=model,
            add_noise=True,
            noise_seed=0,
            cfg=1.0 if embedded or result.guidance is None else float(result.guidance),
            positive=["guidance", 0] if embedded else ["positive", 0],
            negative=["negative", 0],
            sampler=["sampler", 0],
            sigmas=["sigmas", 0],
            latent_image=["latent", 0],
        ),
        "decode": _node("VAEDecode", samples=["sample", 0], vae=vae),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix=result.study),
    }
    if embedded:
        nodes["guidance"] = _node("FluxGuidance", conditioning=["positive", 0], guidance=float(result.guidance or 1))
    ids = {name: str(number) for number, name in enumerate(nodes, 1)}
    numbered = {ids[name]: {**node, "inputs": _linked(node["inputs"], ids)} for name, node in nodes.items()}
    return json.dumps(numbered, indent=2) + "\n"


def workflow_notes(result: Result) -> list[str]:
    """What the reader of ``comfyui_workflow`` needs to know, a line each."""
    if result.model.kind == "FluxPipeline":
        files = f"the files of the loaders ({_file(result)}, {', '.join(FLUX_FILES.values())})"
    else:
        files = f"ckpt_name ({_file(result)})"
    return [
        f'Study {result.study}: send {{"prompt": WORKFLOW}} to ComfyUI\'s /prompt, or open the file in its window; set '
        f"{files} to what they are called there, and the prompt.",
        *common_notes(result),
    ]


def _node(kind: str, title: str | None = None, **inputs: Any) -> Node:
    """A node; ``title``: what its window shows above it."""
    return {"class_type": kind, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


def _linked(inputs: dict[str, Any], ids: dict[str, str]) -> dict[str, Any]:
    """Inputs with the ids of nodes in place of their names here."""
    return {key: [ids[value[0]], value[1]] if isinstance(value, list) else value for key, value in inputs.items()}


def _loaders(result: Result) -> tuple[Workflow, list[Any], list[Any], list[Any]]:
    """The nodes that load the model, and where its network, its text encoders and its decoder come out."""
    if result.model.kind != "FluxPipeline":
        loader = {"checkpoint": _node("CheckpointLoaderSimple", ckpt_name=_file(result))}
        return loader, ["checkpoint", 0], ["checkpoint", 1], ["checkpoint", 2]
    names = {"clip_name1": FLUX_FILES["clip_l"], "clip_name2": FLUX_FILES["t5xxl"]}
    flux = {
        "network": _node("UNETLoader", unet_name=_file(result), weight_dtype="default"),
        "encoders": _node("DualCLIPLoader", **names, type="flux"),
        "vae": _node("VAELoader", vae_name=FLUX_FILES["vae"]),
    }
    return flux, ["network", 0], ["encoders", 0], ["vae", 0]


def _file(result: Result) -> str:
    """Name of the model's file: its own, or one after its folder or hub id."""
    name = Path(result.model.source.partition("@")[0]).name
    return name if re.search(r"\.(safetensors|ckpt)$", name) else f"{name}.safetensors"


def _sampler_node(result: Result) -> Node:
    """Deterministic wherever the result is: ComfyUI's own defaults of these samplers add noise."""
    name = sampler_of(result)[0]
    if name == "euler_ancestral":
        return _node("SamplerEulerAncestral", eta=float(result.eta), s_noise=1.0)
    if name == "dpmpp_3m_sde":
        return _node("SamplerDPMPP_3M_SDE", eta=0.0, s_noise=1.0, noise_device="cpu")
    if name == "dpmpp_2s_ancestral":
        return _node("SamplerDPMPP_2S_Ancestral", eta=0.0, s_noise=1.0)
    return _node("KSamplerSelect", sampler_name=name)
