"""A result inside a pipeline: the images are those of our own sampler, and nothing of it stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_results import example, ours, result_for
from tiny_models import make_unet, write_class_conditional, write_cosine, write_ddpm, write_dit
from tiny_pipelines import write_flux, write_prompts, write_sd, write_sd3, write_sdxl, write_zero_snr
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from autodiffusion_optuna import Result, apply, remove
from autodiffusion_optuna.errors import ConfigError
from autodiffusion_optuna.noise import linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:algorithm_type dpmsolver is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # diffusers, in pytest.warns
]


def as_images(found: Any) -> Tensor:
    """int32 [B, C, H, W] of a pipeline's PIL images."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in found.images]).int()


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


PROMPTS = ["a cat", "two dogs, far away"]
LABELS = [3, 7]
KINDS: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "ddpm": (write_ddpm, "DDPMPipeline", "dpmpp_2m"),
    "ddpm-heun": (write_ddpm, "DDPMPipeline", "heun"),
    "dit": (lambda folder: write_dit(folder, num_embeds_ada_norm=1000), "DiTPipeline", "dpmpp_2m"),
    "dit-lms": (lambda folder: write_dit(folder, num_embeds_ada_norm=1000), "DiTPipeline", "lms"),
    "sd": (write_sd, "StableDiffusionPipeline", "unipc_2"),
    "sd-heun": (write_sd, "StableDiffusionPipeline", "heun"),
    "sd-v": (lambda folder: write_sd(folder, "v_prediction"), "StableDiffusionPipeline", "deis_3"),
    "sd-zero": (write_zero_snr, "StableDiffusionPipeline", "dpmpp_2m"),
    "sd-zero-unipc": (write_zero_snr, "StableDiffusionPipeline", "unipc_2"),
    "sd-zero-deis": (write_zero_snr, "StableDiffusionPipeline", "deis_2"),
    "sdxl": (write_sdxl, "StableDiffusionXLPipeline", "ddim"),
    "sd3": (lambda folder: write_sd3(folder, t5=True), "StableDiffusion3Pipeline", "ddim"),
    "flux": (write_flux, "FluxPipeline", "dpmpp_2m"),
}


REUSES = ((), (0,), (1,), (0, 1))


def make(kind: str, folder: Path, **fields: Any) -> tuple[Any, Result, Callable[[Any], Tensor], Tensor]:
    """A pipeline as loaded, a result that skips layers, how images are drawn, and those of our own sampler."""
    import diffusers

    write, name, solver = KINDS[kind]
    write(folder / "net")
    text = name.startswith(("Stable", "Flux"))
    write_prompts(folder)
    options: dict[str, Any] = {"prompts": str(folder / "prompts.txt"), "size": [32, 32]} if text else {}
    first = 999 if "zero" in kind else 951
    given = {"solver": solver, "timesteps": (first, 600, 333, 40), "skips": ((1, 2), (), (0,), (2,)), **fields}
    result = result_for(folder / "net", options, **given)
    chosen = [0, 1] if text else LABELS
    steps: dict[str, Any] = {"num_inference_steps": len(result.timesteps)}
    pipe = getattr(diffusers, name).from_pretrained(folder / "net")
    pipe.set_progress_bar_config(disable=True)

    def draw(pipe: Any) -> Tensor:
        if text:
            size = {"height": 32, "width": 32}
            return as_images(pipe(PROMPTS, guidance_scale=result.guidance, generator=seed(), **size, **steps))
        if name == "DiTPipeline":
            return as_images(pipe(class_labels=LABELS, guidance_scale=result.guidance, generator=seed(), **steps))
        return as_images(pipe(batch_size=2, generator=seed(), **steps))

    return pipe, result, draw, ours(result, 2, chosen).int()


@pytest.mark.parametrize("kind", KINDS)
def test_the_pipeline_draws_our_images(tmp_path: Path, kind: str) -> None:
    pipe, result, draw, wanted = make(kind, tmp_path, reuses=REUSES)
    result.write(tmp_path / "best.json")
    assert apply(pipe, tmp_path / "best.json") is pipe
    masked = draw(pipe)
    assert int((masked - wanted).abs().max()) <= 2
    plain = draw(apply(pipe, result, masks=False))
    assert not torch.equal(plain, masked), "the masks change nothing"
    assert torch.equal(draw(apply(pipe, str(tmp_path / "best.json"))), masked)


def test_reuse_is_no_skipping_and_its_branches_do_not_outlive_the_run(tmp_path: Path) -> None:
    pipe, result, draw, wanted = make("ddpm-heun", tmp_path, skips=((),) * 4, reuses=REUSES)
    instead = result.model_copy(update={"skips": result.reuses, "reuses": result.skips})
    reused = draw(apply(pipe, result))
    assert int((reused - wanted).abs().max()) <= 2
    layers = [vars(module)["forward"] for module in pipe.unet.modules() if "forward" in vars(module)]
    assert len(layers) == 2
    assert not any(layer.__wrapped__.__self__.kept for layer in layers)
    assert torch.equal(draw(pipe), reused)
    assert int((draw(apply(pipe, instead)) - reused).abs().max()) > 2


ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "more steps": ({"num_inference_steps": 9}, r"num_inference_steps=9 \(given, or .*its own 4 steps; pass .*steps=4"),
    "no steps": ({}, "num_inference_steps=50"),
    "timesteps": ({"timesteps": [700, 3]}, r"timesteps=\[700, 3\] has no effect.*pass timesteps=\[951, 600, 333, 40\]"),
    "scale": ({"num_inference_steps": 4, "guidance_scale": 3.0}, r"guidance_scale=3 is not .*pass guidance_scale=7\.5"),
}


@pytest.mark.parametrize("name", ASKED)
def test_masks_and_steps_hold_whatever_a_call_asks_for_and_it_says_so_once(tmp_path: Path, name: str) -> None:
    pipe, result, draw, wanted = make("sd-heun", tmp_path)
    apply(pipe, result)
    asked, message = ASKED[name]
    given = {"guidance_scale": result.guidance, "height": 32, "width": 32, **asked}
    with pytest.warns(UserWarning, match=message):
        found = as_images(pipe(PROMPTS, generator=seed(), **given))
    assert torch.equal(as_images(pipe(PROMPTS, generator=seed(), **given)), found)
    assert (int((found - wanted).abs().max()) <= 2) == (name != "scale")
    assert torch.equal(draw(pipe), draw(pipe)), "what the result takes is not warned of"


def test_a_flows_own_sigmas_are_no_wish_of_the_users(tmp_path: Path) -> None:
    pipe, result, draw, _ = make("flux", tmp_path, solver="ddim")
    draw(apply(pipe, result))  # the pipeline hands on sigmas that it made of the number of steps
    given = {"guidance_scale": result.guidance, "height": 32, "width": 32, "generator": seed()}
    with pytest.warns(UserWarning, match=r"sigmas=\[1, 0\.7, 0\.2, 0\.1\] has no effect.*num_inference_steps=4"):
        pipe(PROMPTS, sigmas=[1.0, 0.7, 0.2, 0.1], **given)
    with pytest.warns(UserWarning, match="num_inference_steps=28"):
        pipe(PROMPTS, **given)


def test_noise_that_the_result_does_not_add_is_warned_of() -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    pipe = apply(DDPMPipeline(make_unet(), DDPMScheduler()), example())
    pipe.scheduler.set_timesteps(3)
    with pytest.warns(UserWarning, match="eta=0.5 has no effect.*pass eta=0,"):
        pipe.scheduler.step(torch.zeros(1, 1, 2, 2), 901, torch.zeros(1, 1, 2, 2), eta=0.5)


def test_with_a_scheduler_set_afterwards_all_layers_run_and_it_says_so(tmp_path: Path) -> None:
    pipe, result, _, _ = make("ddpm", tmp_path)
    before = pipe.scheduler
    plain = as_images(pipe(batch_size=2, num_inference_steps=4, generator=seed()))
    apply(pipe, result)
    pipe.scheduler = before
    with pytest.warns(UserWarning, match="scheduler was replaced after .* so all layers run; apply .* again"):
        assert torch.equal(as_images(pipe(batch_size=2, num_inference_steps=4, generator=seed())), plain)
    pipe(batch_size=1, num_inference_steps=4)


COMPILED: dict[str, Callable[[Any, Any], Any]] = {
    "around": lambda unet, backend: torch.compile(unet, backend=backend),
    "in place": lambda unet, backend: unet.compile(backend=backend),
    "forward": lambda unet, backend: setattr(unet, "forward", torch.compile(unet.forward, backend=backend)),
    "a part": lambda unet, backend: setattr(unet, "mid_block", torch.compile(unet.mid_block, backend=backend)),
    "parallel": lambda unet, backend: torch.nn.DataParallel(unet),
}


@pytest.fixture
def counter() -> Iterator[Any]:
    """A compiler that counts its graphs, with its limits as they were afterwards."""
    from torch._dynamo import config
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    limits = {name: getattr(config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with config.patch(limits):
        yield CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("how", COMPILED)
def test_a_compiled_network_skips_the_same_and_no_mask_compiles_it_again(
    tmp_path: Path, how: str, counter: Any
) -> None:
    timesteps = tuple(range(950, 40, -80))
    masks = tuple(tuple(u for u in (0, 1, 2) if step >> u & 1) for step in range(len(timesteps)))
    reuses = tuple(tuple({0, 1, 2} - {*mask}) if step % 4 == 3 else () for step, mask in enumerate(masks[:-1]))
    reuses = (*reuses, tuple({0, 1} - {*masks[-1]}))
    pipe, result, draw, wanted = make("ddpm", tmp_path, timesteps=timesteps, skips=masks, reuses=reuses)
    wrapped = COMPILED[how](pipe.unet, counter)
    pipe.unet = pipe.unet if wrapped is None else wrapped
    apply(pipe, result)
    if how == "parallel":
        assert all("forward" in vars(pipe.unet.module.get_submodule(unit)) for unit in result.skips[-1])
        return
    assert int((draw(pipe) - wanted).abs().max()) <= 2
    draw(pipe)
    compiled = counter.frame_count
    assert compiled > 0
    for _ in range(2):
        draw(pipe)
    assert counter.frame_count == compiled
    remove(pipe)
    assert not any(hasattr(vars(module).get("forward"), "_torchdynamo_disable") for module in pipe.unet.modules())


# The check


def cosine_beginning(folder: Path, **fields: Any) -> tuple[Any, Result]:
    """A pipeline whose highest level has sigma / alpha = 20291, and a result from there."""
    from diffusers import DDPMPipeline

    write_cosine(folder / "net")
    pipe = DDPMPipeline.from_pretrained(folder / "net")
    pipe.set_progress_bar_config(disable=True)
    return pipe, result_for(folder / "net", **{"timesteps": (999, 500), **fields})


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["heun", "dpm_solver_2", "deis_3", "unipc_3", "dpmpp_2s"])
def test_levels_far_apart_lose_no_digits(tmp_path: Path, solver: str, final: str) -> None:
    pipe, result = cosine_beginning(tmp_path, solver=solver, final=final)
    found = as_images(apply(pipe, result)(batch_size=2, num_inference_steps=2, generator=seed()))
    assert int((found - ours(result, 2).int()).abs().max()) <= 2


def test_steps_that_go_another_way_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, as diffusers takes them, Heun's steps between those levels are 92 of 255 off on this network."""
    pipe, result = cosine_beginning(tmp_path, solver="heun")
    before, state = pipe.scheduler, torch.get_rng_state()
    monkeypatch.setattr("autodiffusion_optuna.export.pipelines.step_dtype", lambda device: torch.float32)
    with pytest.raises(ConfigError, match=r"HeunDiscreteScheduler differs from the sampler .* by \d\d.* of 255 on its"):
        apply(pipe, result)
    assert pipe.scheduler is before
    assert torch.equal(torch.get_rng_state(), state)
    found = as_images(apply(pipe, result, check=False)(batch_size=2, num_inference_steps=2, generator=seed()))
    assert float((found - ours(result, 2).int()).abs().float().mean()) > 50


def test_states_in_half_precision_that_go_another_way_are_warned_of(tmp_path: Path) -> None:
    """Schedulers divide by an alpha of 5e-5, beyond float16; bfloat16 has the range, and DDIM needs no more."""
    pipe, result = cosine_beginning(tmp_path)
    pipe.to(torch.bfloat16)
    apply(pipe, result)
    pipe.to(torch.float16)
    with pytest.warns(UserWarning, match=r"in float16, diffusers' DPMSolver.* differs .*, in float32 by [\d.e-]+$"):
        apply(pipe, result)


def test_heun_skips_by_the_step_of_each_evaluation(tmp_path: Path) -> None:
    pipe, result, draw, _ = make("ddpm-heun", tmp_path)
    names = list(dict.fromkeys(name for step in result.skips for name in step))
    units = dict(pipe.unet.named_modules())
    apply(pipe, result)
    log: dict[str, list[float]] = {name: [] for name in names}
    now: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: now.append(float(args[1])))
    for name in names:  # what a unit's own parts see is what was not bypassed
        part = next(iter(units[name].children()))
        part.register_forward_pre_hook(lambda *_, name=name: log[name].append(now[-1]))
    draw(pipe)
    visits = [951, 600, 600, 333, 333, 40, 40]
    assert now == visits
    for name in names:
        skipped = {t for t, step in zip(result.timesteps, result.skips, strict=True) if name in step}
        assert log[name] == [t for t in visits if t not in skipped]
    pipe.unet(torch.zeros(1, 3, 16, 16), 500)
    assert all(seen[-1] == 500 for seen in log.values()), "a call outside of a run skips something"


def test_remove_leaves_the_pipeline_as_it_was(tmp_path: Path) -> None:
    pipe, result, _, _ = make("ddpm", tmp_path)

    def drawn() -> Tensor:
        return as_images(pipe(batch_size=2, num_inference_steps=4, generator=seed()))

    before, scheduler = drawn(), pipe.scheduler
    unit = pipe.unet.get_submodule(result.skips[0][0])
    own = unit.forward
    unit.forward = wrapped = lambda *args, **kwargs: own(*args, **kwargs)  # as offloading does
    modules = [module for module in pipe.unet.modules() if "forward" in vars(module)]
    for other in (result, example(timesteps=(800, 10)), result):
        apply(pipe, other)
    assert (
        len([m for m in pipe.unet.modules() if "forward" in vars(m)]) == len(modules) + 2
    )  # one switch a unit, and three units
    assert len(pipe.scheduler.timesteps) != 4
    assert remove(pipe) is pipe
    assert pipe.scheduler is scheduler
    assert [module for module in pipe.unet.modules() if "forward" in vars(module)] == modules
    assert unit.forward is wrapped
    assert torch.equal(drawn(), before)
    remove(pipe)  # without effect
    apply(pipe, result)
    pipe.scheduler = mine = type(scheduler)()
    assert remove(pipe).scheduler is mine, "a scheduler that the user set since is kept"


def test_applying_starts_from_the_pipelines_own_scheduler(tmp_path: Path) -> None:
    """A second result must not inherit what the first one set."""
    pipe, result, draw, wanted = make("ddpm", tmp_path)
    apply(pipe, example(solver="heun", model={"clip": False}))
    assert int((draw(apply(pipe, result)) - wanted).abs().max()) <= 2


def test_two_model_calls_a_step_share_its_mask(tmp_path: Path) -> None:
    pipe, result, _, _ = make("ddpm", tmp_path)
    apply(pipe, result)
    x = torch.randn(1, 3, 16, 16, generator=seed())
    pipe.scheduler.set_timesteps(4)
    with torch.inference_mode():
        for t in pipe.scheduler.timesteps:
            first, second = pipe.unet(x, t).sample, pipe.unet(x, t).sample
            assert torch.equal(first, second)
            x = pipe.scheduler.step(first, t, x).prev_sample


class Reads(TorchDispatchMode):
    """Counts the operations that would wait for a device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp_2m", "heun", "deis_2"])
def test_nothing_is_read_back_between_steps(tmp_path: Path, solver: str) -> None:
    write_ddpm(tmp_path / "net")
    from diffusers import DDPMPipeline

    pipe = DDPMPipeline.from_pretrained(tmp_path / "net")
    apply(pipe, result_for(tmp_path / "net", solver=solver, skips=((0,), (), (1,))))
    pipe.scheduler.set_timesteps(3)
    x = torch.randn(1, 3, 16, 16, generator=seed())
    with torch.inference_mode(), Reads() as reads:
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    assert reads.count == 0


def test_pipelines_of_another_kind_are_refused_and_left_alone(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    pipe = DDPMPipeline(unet=make_unet(), scheduler=DDPMScheduler())
    before = pipe.scheduler
    refused: list[tuple[Result, str]] = [
        (
            example(model={"kind": "StableDiffusionPipeline"}),
            "is for a StableDiffusionPipeline, not for a DDPMPipeline",
        ),
        (example(model={"kind": "adm"}), r"\(adm\) that is no diffusers pipeline; draw images with adopt sample"),
        (example(model={"kind": "mixture"}), r"\(mixture\)"),
        (example(model={"prediction": "v_prediction"}), "predicts v_prediction, the pipeline's scheduler says epsilon"),
        (example(linear(1000, 1e-4, 0.01)), "another noise schedule"),
        (example(linear(4000)), "another noise schedule"),
        (
            example(skips=(("mid.9",), (), ())),
            r"skips or reuses 'mid\.9', and the pipeline's UNet2DModel has no such layer",
        ),
        (example(skips=(("conv_in",), (), ())), "skips or reuses 'conv_in'"),
        (example(solver="plms"), "no scheduler that takes the steps of plms"),
    ]
    for result, message in refused:
        with pytest.raises(ConfigError, match=message) as caught:
            apply(pipe, result)
        assert "\n" not in str(caught.value)
        assert pipe.scheduler is before
        assert not any("forward" in vars(module) for module in pipe.unet.modules())
    with pytest.raises(ConfigError, match="int has no network and scheduler"):
        apply(3, example())
    with pytest.raises(ConfigError, match="cannot read result"):
        apply(pipe, tmp_path / "gone.json")


def test_the_pipelines_of_one_network_share_results(tmp_path: Path) -> None:
    """DDPMPipeline, DDIMPipeline and a bare UNet2DModel are the same loop; a bare one serves loops of one's own."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    write_class_conditional(tmp_path / "net")
    result = result_for(tmp_path / "net", solver="dpmpp_2m", skips=((0,), (2,), ()))
    unet = UNet2DModel.from_pretrained(tmp_path / "net", subfolder="unet").eval()
    pipe = apply(DDIMPipeline(unet=unet, scheduler=DDIMScheduler(beta_start=1e-4)), result)
    pipe.scheduler.set_timesteps(3)
    x = torch.randn(2, *result.model.shape, generator=seed())
    with torch.inference_mode():
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(unet(x, t, class_labels=torch.tensor([3, 1])).sample, t, x).prev_sample
    images = ((x + 1) * 127.5).clamp(0, 255).round().int()
    assert int((images - ours(result, 2, [3, 1]).int()).abs().max()) <= 2
