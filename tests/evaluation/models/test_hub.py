from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hub_cache import COMMIT, ID, fill_cache, use_cache
from load_source import load_source
from tiny_models import write_ddpm

from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.models.hub import is_complete, needed_files, resolve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache, with downloads forbidden."""
    return use_cache(tmp_path, monkeypatch)


def test_a_cached_model_is_taken_without_the_network(hub: Path) -> None:
    snapshot = fill_cache(hub)
    assert resolve(ID) == resolve(f"{ID}@small") == resolve(f"{ID}@{COMMIT}") == snapshot
    model, saved = load_source(ID), load_source(hub.parent / "saved")
    assert model.name == ID
    assert model.fingerprint == saved.fingerprint
    x = torch.zeros(1, 3, 16, 16)
    assert torch.equal(model.denoiser(x, 10, 0), saved.denoiser(x, 10, 0))


def test_what_is_not_cached_is_one_line_while_offline(hub: Path) -> None:
    fill_cache(hub)
    for source in ("someone/else", f"{ID}@other"):
        with pytest.raises(ModelError) as caught:
            load_source(source)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"'{source}' is not (or not in whole) in the cache {hub}")
        assert "HF_HUB_OFFLINE forbids to download it; unset it, or run 'hf download" in message


@pytest.mark.parametrize("lost", ["unet/diffusion_pytorch_model.safetensors", "scheduler", "unet"])
def test_a_partly_cached_model_is_not_taken_for_whole(hub: Path, lost: str) -> None:
    snapshot = fill_cache(hub)
    assert is_complete(snapshot)
    path = snapshot / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.resolve().unlink()  # an interrupted download leaves a link to nothing
    assert not is_complete(snapshot)
    with pytest.raises(ModelError, match=r"not in whole.*HF_HUB_OFFLINE"):
        resolve(ID)


def test_folders_that_the_pipeline_does_not_name_may_lack_weights(hub: Path) -> None:
    """SDXL's repository has copies of its decoder for another runtime, which have configs and no weights of torch."""
    snapshot = fill_cache(hub)
    (snapshot / "vae_decoder").mkdir()
    (snapshot / "vae_decoder" / "config.json").write_text("{}")
    (snapshot / "vae_decoder" / "model.onnx").touch()
    assert is_complete(snapshot)
    assert resolve(ID) == snapshot


def test_shards_are_complete_only_together(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not is_complete(tmp_path)
    for number in (1, 2):
        assert not is_complete(tmp_path)
        (tmp_path / f"diffusion_pytorch_model-0000{number}-of-00002.safetensors").touch()
    assert is_complete(tmp_path)


@pytest.mark.parametrize("source", ["a/b/c", "only", "a/b@", "a b/c", "a/b@c d"])
def test_malformed_ids_are_refused(hub: Path, source: str) -> None:
    with pytest.raises(ModelError, match="neither a folder that exists nor a hub id: org/name"):
        resolve(source)


def test_only_needed_files_are_chosen() -> None:
    """The listing is that of a Stable Diffusion repository, shortened."""
    kept = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "tokenizer_3/spiece.model",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model-00002-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    left = [
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned-emaonly.safetensors",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "text_encoder/flax_model.msgpack",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.bin",
        "vae/diffusion_pytorch_model.fp16.bin",
        "vae/diffusion_flax_model.msgpack",
        "vae_decoder/model.onnx",
        "vae_1_0/diffusion_pytorch_model.safetensors",
        "unet/deeper/diffusion_pytorch_model.safetensors",
    ]
    parts = ["scheduler", "text_encoder", "tokenizer", "tokenizer_3", "transformer", "unet", "vae"]
    assert sorted(needed_files([*left, *kept], parts)) == sorted(kept)
    flat = [
        "config.json",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.safetensors",
        "scheduler_config.json",
    ]
    assert sorted(needed_files(flat, [])) == ["config.json", flat[2], "scheduler_config.json"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A hub that serves one repository: its address, and the files that were fetched from it."""
    repository = tmp_path / "repository"
    write_ddpm(repository)
    shutil.copy(
        repository / "unet" / "diffusion_pytorch_model.safetensors", repository / "unet" / "diffusion_pytorch_model.bin"
    )
    (repository / "README.md").write_text("a model")
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            if path.startswith(f"api/models/{ID}/tree"):
                files = [file for file in repository.rglob("*") if file.is_file()]
                tree = [
                    {
                        "type": "file",
                        "path": str(file.relative_to(repository)),
                        "size": file.stat().st_size,
                        "oid": COMMIT,
                    }
                    for file in files
                ]
                self.answer(json.dumps(tree).encode(), "application/json")
            elif path.startswith(f"api/models/{ID}"):
                siblings = [{"rfilename": str(f.relative_to(repository))} for f in repository.rglob("*") if f.is_file()]
                about = {"id": ID, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
                self.answer(json.dumps(about).encode(), "application/json")
            elif path.startswith(f"{ID}/resolve/"):
                name = path.split("/", 4)[4]
                if self.command == "GET":
                    fetched.append(name)
                self.answer((repository / name).read_bytes(), "application/octet-stream", name)
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def answer(self, content: bytes, kind: str, name: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{abs(hash(name)):x}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", fetched
        listening.shutdown()


RESOLVE = """
from autodiffusion_optuna.errors import ModelError
from autodiffusion_optuna.evaluation.models.hub import resolve
import sys
for source in sys.argv[1:]:
    try:
        print(resolve(source))
    except ModelError as error:
        print("ModelError:", error)
"""


def run_resolve(tmp_path: Path, *sources: str, **environment: str) -> list[str]:
    """What a new process prints for each source; the hub's client reads its environment once, when imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, *sources],
        env={
            **kept,
            "HF_HOME": str(tmp_path / "home"),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_XET": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout.splitlines()


def test_a_model_is_downloaded_once_and_then_cached(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    address, fetched = server
    folder, other = run_resolve(tmp_path, ID, "someone/else", HF_ENDPOINT=address)
    assert sorted(set(fetched)) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    assert Path(folder) == tmp_path / "home" / "hub" / "models--someone--tiny" / "snapshots" / COMMIT
    assert is_complete(Path(folder))
    assert other.startswith("ModelError: 'someone/else' is not (or not in whole) in the cache")
    assert "downloading it failed (" in other
    fetched.clear()
    again = run_resolve(tmp_path, ID, HF_HUB_OFFLINE="1")
    assert again == [folder]
    assert fetched == []


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path) -> None:
    (message,) = run_resolve(tmp_path, ID, HF_ENDPOINT="http://127.0.0.1:9")
    assert message.startswith(f"ModelError: '{ID}' is not (or not in whole) in the cache")
    assert "check the id, the network" in message
