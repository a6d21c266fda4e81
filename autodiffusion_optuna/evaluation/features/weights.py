"""Published weights of feature extractors: their hashes, and their download where it is asked for."""

from __future__ import annotations

import hashlib
import http.client
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.hub

from autodiffusion_optuna.errors import ConfigError, ModelError, choose_from


@dataclass(frozen=True)
class Published:
    """A file at ``url`` with the hash ``sha256``, for the extractor and mode that ``use`` names."""

    url: str
    sha256: str
    use: str


PUBLISHED = {
    "inception": Published(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        "extractor inception, modes clean and legacy_tensorflow",
    ),
    "inception-legacy-pytorch": Published(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "extractor inception, mode legacy_pytorch",
    ),
    "clip": Published(
        "https://openaipublic.azureedge.net/clip/models/"
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        "extractor clip",
    ),
}
"""Kind -> file. A file with one of these hashes needs no trust: it is what everyone runs."""


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_published(path: Path) -> bool:
    """Whether the file is, byte for byte, one of ``PUBLISHED``."""
    return sha256_of(path) in {published.sha256 for published in PUBLISHED.values()}


def download_weights(kind: str, path: Path, sha256: str | None = None) -> bool:
    """Download the published weights ``kind`` to ``path``; False where they already lie there.

    ``sha256``: the hash that the file must have, where it is to differ from the known one. The file takes its
    place only after its hash was checked. ConfigError for an unknown kind, a hash that is none and a path that
    cannot be used; ModelError where the download fails or the hash differs.
    """
    if kind not in PUBLISHED:
        raise ConfigError(choose_from("weights", kind, PUBLISHED))
    published = PUBLISHED[kind]
    wanted = (sha256 or published.sha256).lower()
    if not re.fullmatch("[0-9a-f]{64}", wanted):
        raise ConfigError(f"sha256 {sha256!r} is no hash; give 64 hexadecimal digits, or leave it out")
    if path.is_file() and sha256_of(path) == wanted:
        return False
    if path.exists():
        raise ConfigError(f"{str(path)!r} exists and is not weights {kind!r}; remove it or give another --out")
    if not path.parent.is_dir():
        raise ConfigError(f"folder {str(path.parent)!r} does not exist; create it or give another --out")
    try:
        torch.hub.download_url_to_file(published.url, str(path), hash_prefix=wanted, progress=sys.stderr.isatty())
    except RuntimeError as error:
        raise ModelError(f"{published.url} is not the file expected ({error}); nothing was kept") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ModelError(
            f"cannot download {published.url} to {str(path)!r} ({reason}); fetch it elsewhere and give its path"
        ) from error
    return True
