"""Models of the Hugging Face hub, as local folders: from the standard cache, or else downloaded into it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath

from autodiffusion_optuna.errors import ModelError, first_line
from autodiffusion_optuna.evaluation.models.checkpoints import STEM
from autodiffusion_optuna.evaluation.models.parts import INDEX
from autodiffusion_optuna.files import read_json

SOURCE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
TEXTS = (".json", ".txt", ".model")
"""Configs, indices of shards, and tokenizers; .model is SentencePiece's."""
WEIGHTS = re.compile(
    rf"(?P<stem>{STEM}|model|pytorch_model)(\.(?P<variant>fp16))?(-\d+-of-(?P<total>\d+))?\.(?P<kind>safetensors|bin)"
)
SECONDS = 20.0
"""How long the hub may take to answer at all."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines that making images from noise does not need."""


def resolve(source: str) -> Path:
    """The local folder of the model ``"org/name"``, or ``"org/name@revision"`` for a branch, tag or commit.

    What the standard cache holds in whole (``HF_HOME``) is taken as it is, without asking the hub. Anything else is
    downloaded into it: configs, tokenizers and, of each part, its weights in one format (``needed_files``).
    ``ModelError`` where the id is malformed, or the model is not in the cache and the hub cannot be asked or refuses.
    """
    match = SOURCE.fullmatch(source)
    if match is None:
        raise ModelError(f"{source!r} is neither a folder that exists nor a hub id: org/name, or org/name@revision")
    repository, revision = match["id"], match["revision"]
    cached = _cached(repository, revision)
    return cached if cached and is_complete(cached) else _download(repository, revision, source)


def _cached(repository: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in (INDEX, "config.json"):
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def is_complete(folder: Path) -> bool:
    """Whether ``folder`` has every part that its ``model_index.json`` names, and weights beside their configs.

    Other folders, such as an exported copy for another runtime, do not count.
    """
    flat = (folder / "config.json").is_file()
    named = [] if flat or not (folder / INDEX).is_file() else [folder / part for part in _parts(folder / INDEX)]
    configured = [part for part in ([folder] if flat else named) if (part / "config.json").is_file()]
    return bool(configured) and all(part.is_dir() for part in named) and all(map(_has_weights, configured))


def _parts(index: Path) -> list[str]:
    """Names of the parts of a pipeline that are used here."""
    entries = read_json(index).items()
    return [name for name, entry in entries if isinstance(entry, list) and all(entry) and name not in UNUSED]


def _has_weights(folder: Path) -> bool:
    """Whether all files of one format are there; a file of the cache is a link, and may lead nowhere."""
    found = [match for path in folder.iterdir() if path.is_file() and (match := WEIGHTS.fullmatch(path.name))]
    shards = Counter(match["total"] for match in found)  # None for a single file
    return any(total is None or count >= int(total) for total, count in shards.items())


def needed_files(files: Iterable[str], parts: Collection[str]) -> list[str]:
    """Which of a repository's ``files`` a model needs: those at the top and in the folders ``parts``.

    Of a part's weights one set is taken: full precision before fp16, safetensors before .bin, one file before shards.
    Original checkpoints, and weights for other frameworks, are left out.
    """
    wanted: list[str] = []
    weights: dict[PurePosixPath, dict[tuple[bool, bool, bool], list[str]]] = {}
    for name in sorted(files):
        path = PurePosixPath(name)
        if path.parent.parts not in {(), *((part,) for part in parts)}:
            continue
        if path.suffix in TEXTS:
            wanted.append(name)
        elif match := WEIGHTS.fullmatch(path.name):
            rank = (match["variant"] is not None, match["kind"] == "bin", match["total"] is not None)
            weights.setdefault(path.parent, {}).setdefault(rank, []).append(name)
    return wanted + [name for formats in weights.values() for name in formats[min(formats)]]


def _download(repository: str, revision: str | None, source: str) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

    home = f"in the cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(
            f"{source!r} is not (or not in whole) {home}, and HF_HUB_OFFLINE forbids to download it; unset it, "
            f"or run 'hf download {repository}' where the hub can be reached and copy the cache or the folder here"
        )
    try:
        about = HfApi().model_info(repository, revision=revision, timeout=SECONDS)
        files = [file.rfilename for file in about.siblings or []]
        parts = _parts(Path(hf_hub_download(repository, INDEX, revision=revision))) if INDEX in files else ["scheduler"]
        chosen = needed_files(files, parts)
        return Path(snapshot_download(repository, revision=revision, allow_patterns=chosen))
    except ModelError:
        raise
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the system
        raise ModelError(
            f"{source!r} is not (or not in whole) {home}, and downloading it failed ({type(error).__name__}: "
            f"{first_line(error)}); check the id, the network and, for gated models, 'hf auth login', "
            "or give the path of a local folder"
        ) from error
