from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from autodiffusion_optuna.errors import AdoptError, ConfigError, ModelError
from autodiffusion_optuna.evaluation.features.weights import PUBLISHED, Published, download_weights, is_published

DATA = bytes(range(256)) * 5000


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that stands for the published one ``mine``, fetched by its URL."""
    path = tmp_path / "source"
    path.write_bytes(DATA)
    monkeypatch.setitem(PUBLISHED, "mine", Published(path.as_uri(), hashlib.sha256(DATA).hexdigest(), "tests"))
    return path


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_download_is_whole_and_done_once(source: Path, tmp_path: Path) -> None:
    assert download_weights("mine", tmp_path / "mine.pt")
    assert (tmp_path / "mine.pt").read_bytes() == DATA
    assert is_published(tmp_path / "mine.pt")
    source.unlink()
    assert not download_weights("mine", tmp_path / "mine.pt")
    assert left(tmp_path) == ["mine.pt"]


def test_a_wrong_file_is_not_kept(source: Path, tmp_path: Path) -> None:
    source.write_bytes(DATA[:-1])
    with pytest.raises(ModelError, match=f"not the file expected .*{PUBLISHED['mine'].sha256}"):
        download_weights("mine", tmp_path / "mine.pt")
    with pytest.raises(ModelError, match="not the file expected .*" + "0" * 64):
        download_weights("mine", tmp_path / "mine.pt", sha256="0" * 64)
    assert left(tmp_path) == ["source"]


def test_a_stated_hash_takes_the_known_ones_place(source: Path, tmp_path: Path) -> None:
    source.write_bytes(b"newer")
    assert download_weights("mine", tmp_path / "mine.pt", sha256=hashlib.sha256(b"newer").hexdigest().upper())
    assert (tmp_path / "mine.pt").read_bytes() == b"newer"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/x.pt", "file:///no/such/file"])
def test_no_network_is_one_line(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED, "mine", Published(url, "0" * 64, "tests"))
    with pytest.raises(ModelError, match=r"cannot download .*fetch it elsewhere") as caught:
        download_weights("mine", tmp_path / "mine.pt")
    assert "\n" not in str(caught.value)
    assert left(tmp_path) == []


def test_arguments_are_checked_before_anything_is_fetched(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_text("something else")
    cases: list[tuple[str, Path, str | None, str]] = [
        ("incepton", tmp_path / "a", None, "did you mean 'inception'"),
        ("mine", tmp_path / "mine.pt", None, "exists and is not weights 'mine'"),
        ("mine", tmp_path / "no" / "a", None, "folder .* does not exist"),
        ("mine", tmp_path / "a", "abc", "64 hexadecimal digits"),
    ]
    for kind, path, sha256, words in cases:
        with pytest.raises(ConfigError, match=words):
            download_weights(kind, path, sha256)
    assert (tmp_path / "mine.pt").read_text() == "something else"
    assert issubclass(ConfigError, AdoptError)


def test_published_hashes_are_hashes_and_agree_with_the_names() -> None:
    for published in PUBLISHED.values():
        assert len(bytes.fromhex(published.sha256)) == 32
        assert published.url.startswith("https://")
    # torch.hub writes the first digits into the name, OpenAI all of them into the path.
    legacy, clip = PUBLISHED["inception-legacy-pytorch"], PUBLISHED["clip"]
    assert legacy.url.endswith(f"-{legacy.sha256[:8]}.pth")
    assert f"/{clip.sha256}/" in clip.url
