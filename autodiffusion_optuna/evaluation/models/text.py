"""Prompts as the networks of text-to-image models take them: encoded once each, by the model's own text encoders."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autodiffusion_optuna.errors import ConfigError, ModelError, first_line
from autodiffusion_optuna.evaluation.models.checkpoints import find_weights, read_shapes
from autodiffusion_optuna.evaluation.models.parts import Pipeline, digest
from autodiffusion_optuna.evaluation.tensors import PLAIN, SCALE, check_numbers, plain_weights
from autodiffusion_optuna.files import check_content, read_json

ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast")
NAMES = ("text_encoder", "text_encoder_2", "text_encoder_3")

OTHER_HALF = re.compile(
    r"vision_model\.|visual_projection\.|text_projection\.|logit_scale$|decoder\.|lm_head\.|(.*\.)?position_ids$"
)
"""Names of weights beside a text encoder that it has no use for: the rest of CLIP or T5."""

CLIP_LENGTH, SD3_LENGTH, FLUX_LENGTH = 77, 256, 512
"""Tokens of the released CLIP models, and those that the pipelines of Stable Diffusion 3 and Flux take from T5."""


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A text encoder on a device, with its tokenizer. ``length``: tokens that every prompt is cut or filled to."""

    tokenizer: Any
    model: Any
    length: int

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], layer: int = -1) -> tuple[Tensor, Tensor | None]:
        """(tokens [n, length, D] of a layer, whole prompts [n, P] or None), on the CPU.

        ``layer``: -1 is the last with its norm, -2 the one before without.
        """
        text = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        masked = getattr(self.model.config, "use_attention_mask", False)
        mask = text.attention_mask.to(self.model.device) if masked else None
        ids = text.input_ids.to(self.model.device)
        out = self.model(ids, attention_mask=mask, output_hidden_states=layer != -1)
        tokens = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
        whole = next((out[key] for key in ("text_embeds", "pooler_output") if out.get(key) is not None), None)
        return tokens.cpu(), None if whole is None else whole.cpu()


Encoders = Mapping[str, TextEncoder]
"""By name of their folders, ``NAMES``; some may be absent."""

Encode = Callable[[Sequence[str], Encoders, Any], dict[str, Tensor]]
"""(prompts, encoders, config of the network) -> tensors [n, ...] of a condition by name."""


def encode_sd(prompts: Sequence[str], encoders: Encoders, config: Any) -> dict[str, Tensor]:
    """Stable Diffusion 1.x and 2.x: ``text`` [n, L, D]."""
    return {"text": _need(encoders, "text_encoder")(prompts)[0]}


def encode_sdxl(prompts: Sequence[str], encoders: Encoders, config: Any) -> dict[str, Tensor]:
    """SDXL: ``text`` [n, L, D1 + D2] of both encoders, ``pooled`` [n, P] of the second (arXiv 2307.01952, table 1)."""
    first, _ = _need(encoders, "text_encoder")(prompts, -2)
    second, pooled = _need(encoders, "text_encoder_2")(prompts, -2)
    assert pooled is not None
    return {"text": torch.cat([first, second], -1), "pooled": pooled}


def encode_sd3(prompts: Sequence[str], encoders: Encoders, config: Any) -> dict[str, Tensor]:
    """Stable Diffusion 3: ``text`` [n, L + 256, D], CLIP's tokens then T5's; ``pooled`` [n, P1 + P2] of both CLIPs.

    An encoder that is absent counts as zeros, as in training (arXiv 2403.03206); of a CLIP its tokens
    are taken to be as wide as its whole prompt, which holds for the released ones.
    """
    clips = [encoders[name](prompts, -2) if name in encoders else None for name in NAMES[:2]]
    if not encoders:
        raise ModelError("the pipeline has none of its three text encoders, so its prompts cannot be read; add one")
    n, width = len(prompts), config.joint_attention_dim
    there = [clip for clip in clips if clip is not None]
    absent = max(config.pooled_projection_dim - sum(clip[1].shape[1] for clip in there if clip[1] is not None), 0)
    length = there[0][0].shape[1] if there else CLIP_LENGTH
    zeros = (torch.zeros(n, length, absent), torch.zeros(n, absent))
    tokens, whole = zip(*(clip or zeros for clip in (clips if there else clips[:1])), strict=True)
    clip_text = torch.cat(tokens, -1)
    clip_text = functional.pad(clip_text, (0, width - clip_text.shape[-1]))
    t5_text = encoders[NAMES[2]](prompts)[0] if NAMES[2] in encoders else torch.zeros(n, SD3_LENGTH, width)
    return {"text": torch.cat([clip_text, t5_text], 1), "pooled": torch.cat(whole, -1)}


def encode_flux(prompts: Sequence[str], encoders: Encoders, config: Any) -> dict[str, Tensor]:
    """Flux: ``text`` [n, 512, D] of T5, ``pooled`` [n, P] of CLIP."""
    _, pooled = _need(encoders, "text_encoder")(prompts)
    text, _ = _need(encoders, "text_encoder_2")(prompts)
    assert pooled is not None
    return {"text": text, "pooled": pooled}


def _need(encoders: Encoders, name: str) -> TextEncoder:
    if name not in encoders:
        raise ModelError(f"the pipeline has no {name}, without which its prompts cannot be read; add it")
    return encoders[name]


@dataclass(frozen=True, eq=False)
class PromptCache:
    """Prompts as the condition of a network, each encoded once, and only where it is asked for.

    ``load``: the encoders on a device, which are dropped again after each call that needed them. ``config``: of the
    network. A prompt is encoded alone, so that its embedding has the same bits whatever else is drawn and in which
    order: workers and interrupted runs agree. Embeddings are kept in ``dtype`` on the CPU.
    """

    load: Callable[[torch.device], Encoders]
    encode: Encode
    config: Any
    dtype: torch.dtype
    device: torch.device
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def prepare(self, prompts: Iterable[str]) -> None:
        """Encode those that are not yet.

        ``ConfigError`` where they would take over half of the machine's memory; 40,000 of Flux are 160 GiB.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.kept]
        if not missing:
            return
        try:
            self._add(missing, self.device)
        except torch.OutOfMemoryError:  # the network has taken the place that the encoders had when it was loaded
            torch.cuda.empty_cache()
            self._add([prompt for prompt in missing if prompt not in self.kept], torch.device("cpu"))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def rows(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Tensors [n, ...] of a condition by name, on the device."""
        self.prepare(prompts)
        each = [self.kept[prompt] for prompt in prompts]
        return {name: torch.stack([row[name] for row in each]).to(self.device) for name in each[0]}

    def _add(self, prompts: Sequence[str], device: torch.device) -> None:
        encoders = self.load(device)
        for i, prompt in enumerate(prompts):
            encoded = self.encode([prompt], encoders, self.config)
            row = {name: tensor[0].to(self.dtype) for name, tensor in encoded.items()}
            if i == 0:
                each, count = sum(tensor.nbytes for tensor in row.values()), len(self.kept) + len(prompts)
                room = machine_memory() // 2
                if each * count > room:
                    raise ConfigError(
                        f"{count:,} different prompts are drawn, which take {each * count / 2**30:.1f} GiB encoded; at "
                        f"most {room // each:,} fit half of this machine's memory. Score fewer images, or give a file "
                        "of fewer prompts"
                    )
            self.kept[prompt] = row


def machine_memory() -> int:
    """Bytes of the machine's main memory; endless where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def load_encoders(
    pipeline: Pipeline, device: torch.device, dtype: torch.dtype, t5_length: int
) -> dict[str, TextEncoder]:
    """The text encoders of a pipeline.

    ``t5_length``: tokens of a prompt for T5; for CLIP the tokenizer says. Nothing is downloaded.
    ``ModelError`` where transformers is not installed, or a part is missing, broken or of another class.
    """
    encoders = {}
    folder, index = pipeline.folder, pipeline.index
    for name in _present(index):
        tokenizer_name = name.replace("text_encoder", "tokenizer")
        model = _load_model(folder / name, index[name][1], dtype).to(device).eval().requires_grad_(False)
        tokenizer = _load_tokenizer(folder / tokenizer_name, index.get(tokenizer_name))
        encoders[name] = TextEncoder(tokenizer, model, token_length(tokenizer, model, t5_length))
    return encoders


def token_length(tokenizer: Any, model: Any, t5_length: int) -> int:
    """Tokens that every prompt is cut or filled to: CLIP's tokenizer says, of T5 ``t5_length``."""
    longest = getattr(model.config, "max_position_embeddings", None)
    return min(tokenizer.model_max_length, longest) if longest else t5_length


def encoders_digest(pipeline: Pipeline) -> str:
    """sha256 in hexadecimal over configs, weights and tokenizers of a pipeline's text encoders."""
    parts = {}
    for name in _present(pipeline.index):
        path, tokenizer = pipeline.folder / name, pipeline.folder / name.replace("text_encoder", "tokenizer")
        files = sorted(file for file in tokenizer.iterdir() if file.is_file())
        names = {"tokenizer": [file.name for file in files]}
        parts[name] = digest([*_find_weights(path), *files], read_json(path / "config.json"), names)
    return digest([], parts)


def _present(index: Mapping[str, Any]) -> list[str]:
    """Names of the text encoders that a pipeline has; an entry [null, null] is one that was left out."""
    return [name for name in NAMES if isinstance(index.get(name), list) and None not in index[name]]


def _find_weights(path: Path) -> list[Path]:
    """Files of a text encoder's weights; transformers has names of its own for them."""
    return find_weights(path, "model", "pytorch_model")


def _load_model(path: Path, kind: str, dtype: torch.dtype) -> Any:
    with _transformers(path, kind, ENCODERS) as loaded:
        files = _find_weights(path)
        for file in (path / "config.json", *files):
            check_content(file, ModelError)
        if read_json(path / "config.json").get("quantization_config"):
            raise ModelError(f"{path / 'config.json'}: has a quantization_config; {PLAIN}")
        stored = read_shapes(files)
        plain_weights(stored, files[0])
        if scale := next(filter(SCALE.fullmatch, stored), None):
            raise ModelError(f"{files[0]}: {scale} scales a weight, which transformers would leave out; {PLAIN}")
        check_numbers(stored, (name for name in stored if not name.endswith("position_ids")), files[0])
        model, info = loaded.from_pretrained(
            path,
            dtype=dtype,
            variant="fp16" if ".fp16" in files[0].name else None,
            use_safetensors=files[0].suffix == ".safetensors",
            weights_only=True,  # of a .bin file no code is run
            local_files_only=True,
            output_loading_info=True,
        )
    unknown = [key for key in info["unexpected_keys"] if not OTHER_HALF.match(key)]
    for what, keys in (("missing", sorted(info["missing_keys"])), ("unexpected", sorted(unknown))):
        if keys:
            raise ModelError(f"{path}: weights do not fit config.json, {len(keys)} {what}, first {keys[0]!r}")
    return model


def _load_tokenizer(path: Path, entry: Any) -> Any:
    kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    with _transformers(path, kind, TOKENIZERS) as loaded:
        if not path.is_dir():
            raise ModelError(f"{path}: no such folder; copy the whole pipeline")
        for file in sorted(path.iterdir()):
            check_content(file, ModelError)
        return loaded.from_pretrained(path, local_files_only=True)


@contextlib.contextmanager
def _transformers(path: Path, kind: Any, known: Sequence[str]) -> Iterator[Any]:
    """The class ``kind`` of transformers, which is quiet inside the block, and whose errors are one line."""
    try:
        import transformers
    except ImportError:
        raise ModelError(
            "text-to-image models need transformers, which is not installed; "
            "run pip install 'autodiffusion-optuna[text]'"
        ) from None
    if kind not in known:
        raise ModelError(f"{path}: is a {kind}; only {', '.join(known)} are supported")
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield getattr(transformers, kind)
    except ModelError:
        raise
    except Exception as error:  # whatever transformers makes of a broken file
        raise ModelError(
            f"{path}: transformers cannot load this {kind} ({first_line(error)}); copy it again"
        ) from error
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
