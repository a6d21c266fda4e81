"""Every format of reference statistics, and files that are refused."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from autodiffusion_optuna.config import Mode
from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.features import Extractor, load_extractor
from autodiffusion_optuna.evaluation.frechet import Moments
from autodiffusion_optuna.evaluation.references import formats as module
from autodiffusion_optuna.evaluation.references.formats import MODES, read_reference_data
from autodiffusion_optuna.evaluation.references.pickles import FIDStatistics, read_pickle
from autodiffusion_optuna.evaluation.references.reference import (
    Reference,
    build_reference,
    build_reference_from,
    check_images,
    load_reference,
    log_trace_ratio,
    save_reference,
    too_few,
)

PIXELS = load_extractor("pixels", "cpu")
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(40, 12)).astype(np.float32)
MU, SIGMA = FEATURES.mean(0, dtype=np.float64), np.cov(FEATURES.astype(np.float64), rowvar=False)
IMAGES = RNG.integers(0, 256, (7, 2, 2, 3), dtype=np.uint8)


def extractor(name: str = "inception", mode: Mode | None = None) -> Extractor:
    """Stands for a published network: twelve pixels are its features, its name and mode decide what it reads."""
    return Extractor(name, f"{name}-{mode or 'clean'}", 12, torch.device("cpu"), PIXELS.network, mode=mode)


CLEAN, PYTORCH, TENSORFLOW = (extractor(mode=mode) for mode in MODES)
UNSTATED, DINOV2, CLIP = extractor(), extractor("dinov2"), extractor("clip")


def assert_moments(reference: Reference, scale: float = 1.0) -> None:
    np.testing.assert_allclose(reference.mu, MU * scale, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(reference.sigma, SIGMA, rtol=1e-5, atol=1e-7)
    assert reference.mu.dtype == reference.sigma.dtype == torch.float64


def assert_from_images(reference: Reference) -> None:
    expected = build_reference(torch.from_numpy(IMAGES).permute(0, 3, 1, 2), PIXELS, "")
    assert torch.equal(reference.mu, expected.mu)
    assert torch.equal(reference.sigma, expected.sigma)
    assert (reference.n, reference.channels, reference.size) == (7, 3, (2, 2))


def refused(path: Path, by: Extractor, words: str) -> None:
    with pytest.raises(StatisticsError, match=words) as caught:
        load_reference(path, by)
    assert "\n" not in str(caught.value)
    assert str(path.name) in str(caught.value)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def pickled(path: Path, value: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path


# Which statistics belong to which extractor


@pytest.mark.parametrize("mode", MODES)
def test_clean_fids_names_tell_the_mode(tmp_path: Path, mode: Mode) -> None:
    path = npz(tmp_path / f"cifar10_{mode}_train_32.npz", mu=MU, sigma=SIGMA)
    for by in (CLEAN, PYTORCH, TENSORFLOW, UNSTATED):
        if (by.mode or "clean") == mode:
            reference = load_reference(path, by)
            assert_moments(reference)
            assert (reference.fingerprint, reference.n, reference.features) == (by.fingerprint, None, None)
        else:
            refused(path, by, f"made in mode {mode}, .* set the mode to {mode}")
    refused(path, DINOV2, "made with extractor 'inception', the study uses 'dinov2'")


def test_clean_fids_kid_file_is_read_beside_its_own(tmp_path: Path) -> None:
    main, kid = tmp_path / "mine_clean_custom_na.npz", tmp_path / "mine_clean_custom_na_kid.npz"
    npz(kid, feats=FEATURES)
    alone = load_reference(kid, CLEAN)
    assert_moments(alone)
    assert (alone.n, alone.dataset) == (40, "mine_clean_custom_na")
    npz(main, mu=MU * 2, sigma=SIGMA)
    for path in (main, kid):
        both = load_reference(path, CLEAN)
        assert_moments(both, scale=2)
        assert both.features is not None
        np.testing.assert_array_equal(both.features, FEATURES)
    npz(kid, feats=FEATURES[:, :5])
    refused(main, CLEAN, r"features must be float32 \[M, 12\]")


def test_clean_fids_clip_statistics_are_for_clip(tmp_path: Path) -> None:
    path = npz(tmp_path / "ffhq_clean_clip_vit_b_32_trainval70k_1024.npz", mu=MU, sigma=SIGMA)
    assert_moments(load_reference(path, CLIP))
    refused(path, CLEAN, "made with extractor 'clip', the study uses 'inception'")


def test_statistics_of_unknown_make_need_a_stated_mode(tmp_path: Path) -> None:
    path = npz(tmp_path / "fid_stats_cifar10.npz", mu=MU, sigma=SIGMA)
    for by in (CLEAN, PYTORCH, TENSORFLOW):
        assert_moments(load_reference(path, by))
    refused(path, UNSTATED, "do not say how .* legacy_pytorch for pytorch-fid")
    refused(path, DINOV2, "taken for Inception's, the study uses 'dinov2'")


def test_adm_statistics_win_in_their_own_mode_and_images_elsewhere(tmp_path: Path) -> None:
    adm = {"mu": MU, "sigma": SIGMA, "mu_s": MU, "sigma_s": SIGMA}
    path = npz(tmp_path / "VIRTUAL_imagenet64.npz", arr_0=IMAGES, **adm)
    assert_moments(load_reference(path, TENSORFLOW))
    for by in (CLEAN, PYTORCH, UNSTATED, DINOV2, PIXELS):
        assert_from_images(load_reference(path, by))
    assert_from_images(build_reference_from(path, TENSORFLOW))
    bare = npz(tmp_path / "stats.npz", **adm)
    assert_moments(load_reference(bare, TENSORFLOW))
    refused(bare, CLEAN, "made in mode legacy_tensorflow")
    with pytest.raises(StatisticsError, match="no images"):
        build_reference_from(bare, TENSORFLOW)


def test_features_become_statistics(tmp_path: Path) -> None:
    paths = [npz(tmp_path / f"{key}.npz", **{key: FEATURES}) for key in ("feats", "reps", "features", "arr_0")]
    np.save(tmp_path / "bare.npy", FEATURES)
    for path in [*paths, tmp_path / "bare.npy"]:
        reference = load_reference(path, CLEAN)
        assert_moments(reference)
        assert reference.n == 40
        assert reference.features is not None
        np.testing.assert_array_equal(reference.features, FEATURES)
        refused(path, UNSTATED, "do not say how")
        refused(path, PIXELS, "taken for Inception's")


def test_dgm_eval_needs_no_pickle(tmp_path: Path) -> None:
    path = npz(tmp_path / "reps.npz", model="dinov2", reps=FEATURES, hparams={"nimages": 40})
    assert_moments(load_reference(path, DINOV2))
    refused(path, CLEAN, "made with extractor 'dinov2'")
    path = npz(tmp_path / "other.npz", model="inception", reps=FEATURES, hparams={})
    refused(path, CLEAN, "made with extractor 'dgm-eval inception'")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ">f8"])
def test_edm2_pickles(tmp_path: Path, protocol: int, dtype: Any) -> None:
    moments = {"mu": MU.astype(dtype), "sigma": np.asfortranarray(SIGMA.astype(dtype))}
    other = {"mu": MU + 3, "sigma": SIGMA}
    path = pickled(tmp_path / "img512.pkl", {"num_images": 50, "fid": moments, "fd_dinov2": other}, protocol)
    reference = load_reference(path, TENSORFLOW)
    assert_moments(reference)
    assert reference.n == 50
    np.testing.assert_allclose(load_reference(path, DINOV2).mu, MU + 3)
    refused(path, CLEAN, "made .* legacy_tensorflow|made with extractor")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("where", ["__main__", "evaluations.evaluator_v1"])
def test_autodiffusions_pickled_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, protocol: int
) -> None:
    class Original:
        def __init__(self) -> None:
            self.mu, self.sigma = MU, SIGMA

    Original.__module__, Original.__qualname__, Original.__name__ = where, "FIDStatistics", "FIDStatistics"
    with monkeypatch.context() as patch:
        home: Any = types.ModuleType(where)
        home.FIDStatistics = Original
        patch.setitem(sys.modules, where.partition(".")[0], types.ModuleType("parent"))
        patch.setitem(sys.modules, where, home)
        path = pickled(tmp_path / "lsun.pkl", Original(), protocol)
    assert_moments(load_reference(path, TENSORFLOW))
    refused(path, CLEAN, "AutoDiffusion statistics, made in mode legacy_tensorflow")


def test_plain_pickles_of_moments_are_of_unknown_make(tmp_path: Path) -> None:
    for name, value in {"dict": {"mu": MU, "sigma": SIGMA}, "pair": (MU, SIGMA)}.items():
        path = pickled(tmp_path / f"{name}.pkl", value)
        assert_moments(load_reference(path, PYTORCH))
        refused(path, UNSTATED, "do not say how")


def test_torch_fidelitys_files(tmp_path: Path) -> None:
    torch.save({"mu": MU, "sigma": SIGMA}, tmp_path / "stats.pt")
    torch.save(torch.from_numpy(FEATURES), tmp_path / "features.pt")
    torch.save({"mu": MU, "sigma": SIGMA}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("stats.pt", "features.pt", "old.pt"):
        assert_moments(load_reference(tmp_path / name, TENSORFLOW))
        refused(tmp_path / name, UNSTATED, "do not say how")


@pytest.mark.parametrize("fortran", [False, True])
def test_arrays_of_images(tmp_path: Path, fortran: bool) -> None:
    images = np.asfortranarray(IMAGES) if fortran else IMAGES
    np.savez(tmp_path / "samples.npz", arr_0=images, arr_1=np.zeros(7, np.int64))
    np.savez_compressed(tmp_path / "packed.npz", images=images)
    np.save(tmp_path / "bare.npy", images)
    for name in ("samples.npz", "packed.npz", "bare.npy"):
        assert_from_images(load_reference(tmp_path / name, PIXELS))


def test_images_of_an_array_are_read_batch_by_batch(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (250, 3, 4, 1), dtype=np.uint8)
    path = npz(tmp_path / "samples.npz", arr_0=images)
    found = read_reference_data(path).images
    assert found is not None
    batches = list(found.batches(100))
    assert [len(batch) for batch in batches] == [100, 100, 50]
    np.testing.assert_array_equal(np.concatenate(batches), images.transpose(0, 3, 1, 2))
    assert all(batch.flags.writeable for batch in batches)


# Folders and zips of images


def image_bytes(image: np.ndarray[Any, Any], form: str = "png") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, form, **({"lossless": True} if form == "webp" else {}))
    return stream.getvalue()


def test_a_zip_is_read_as_its_folder_is(tmp_path: Path) -> None:
    names = ["b/2.png", "b/10.webp", "a.png", "b.c/x.PNG", "z.png", "y.png", "b/1.png"]
    folder = tmp_path / "images"
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, image in zip(names, IMAGES, strict=True):
            data = image_bytes(image, Path(name).suffix[1:].lower())
            archive.writestr(name, data)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        archive.writestr("__MACOSX/._a.png", b"not an image")
        archive.writestr("notes.txt", "hello")
    (folder / ".hidden.png").write_bytes(b"not an image")
    from_zip, from_folder = (load_reference(tmp_path / name, PIXELS) for name in ("images.zip", "images"))
    order = [names.index(name) for name in ("a.png", "b/1.png", "b/10.webp", "b/2.png", "b.c/x.PNG", "y.png", "z.png")]
    expected = torch.from_numpy(IMAGES[order]).permute(0, 3, 1, 2).flatten(1).float()
    for reference in (from_zip, from_folder):
        assert reference.features is not None
        assert torch.equal(reference.features, expected)
        assert reference.dataset == "images"


def test_bad_zips_of_images(tmp_path: Path) -> None:
    path = tmp_path / "bad.zip"
    members: list[tuple[dict[str, bytes], str]] = [
        ({"notes.txt": b"hello"}, "holds no images .bmp, "),
        (
            {"a.png": image_bytes(IMAGES[0]), "b.png": image_bytes(np.zeros((3, 4), np.uint8))},
            r"b\.png is 4x3, a\.png is 2x2",
        ),
        ({"a.png": image_bytes(IMAGES[0]), "b.png": b"no image"}, r"b\.png is not a readable image"),
        ({"a.png": image_bytes(IMAGES[0])[:50], "b.png": image_bytes(IMAGES[1])}, r"a\.png is not a readable image"),
    ]
    for files, words in members:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        refused(path, PIXELS, words)


def test_an_image_of_absurd_size_is_refused(tmp_path: Path) -> None:
    def chunk(body: bytes) -> bytes:
        return (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00"
    parts = chunk(header), chunk(b"IDAT" + zlib.compress(bytes(1000))), chunk(b"IEND")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with pytest.raises(StatisticsError, match="claims more pixels"):
        load_reference(tmp_path, PIXELS)


# Files that harm


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, protocol: int) -> None:
    proof = tmp_path / "ran"
    for value in (Command(proof), {"fid": {"mu": MU, "sigma": Command(proof)}}):
        path = pickled(tmp_path / "evil.pkl", value, protocol)
        refused(path, TENSORFLOW, r"asks for (posix|nt)\.system, which is not data")
        assert not proof.exists()
        pickle.loads(path.read_bytes())  # what an ordinary reader would have done
        assert proof.exists()
        proof.unlink()


def test_code_in_a_torch_file_does_not_run(tmp_path: Path) -> None:
    proof, path = tmp_path / "ran", tmp_path / "evil.pt"
    for new in (True, False):
        torch.save({"mu": MU, "sigma": Command(proof)}, path, _use_new_zipfile_serialization=new)
        refused(path, TENSORFLOW, "not a torch file of plain arrays")
        assert not proof.exists()


@pytest.mark.parametrize(
    "body",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy\ndtype\n(S'O8'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.",
        b"ccopyreg\n_reconstructor\n.",
        b"cnumpy.core.multiarray\nscalar\n.",
        b"cbuiltins\ngetattr\n.",
    ],
)
def test_globals_off_the_list_are_refused(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(b"\x80\x02" + body)
    with pytest.raises(StatisticsError, match=r"a pickle that is not read: it (asks for|holds|encodes)"):
        read_pickle(path)


def test_a_pickle_leaves_nothing_behind_for_the_next(tmp_path: Path) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(b"\x80\x02cx\nFIDStatistics\n(N}U\x02muK\x01stb.")  # sets an attribute of the class
    assert read_pickle(path).mu == 1
    path.write_bytes(b"\x80\x02cnumpy\nndarray\n(N}U\x0c__setstate__Nstb.")
    with pytest.raises(StatisticsError, match="damaged pickle"):
        read_pickle(path)
    assert FIDStatistics.mu is None
    good = pickled(tmp_path / "good.pkl", {"fid": {"mu": MU, "sigma": SIGMA}})
    assert_moments(load_reference(good, TENSORFLOW))


def test_arrays_of_objects_in_a_pickle_are_refused(tmp_path: Path) -> None:
    objects = np.array([None, {}], dtype=object)
    refused(pickled(tmp_path / "a.pkl", {"mu": objects, "sigma": SIGMA}), CLEAN, "holds an array of 'O8'")


@pytest.mark.parametrize("cut", [1, 2, 30, 200, -1])
def test_damaged_pickles(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.pkl"
    path.write_bytes(pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}}, 4)[:cut])
    refused(path, TENSORFLOW, "damaged pickle")


def test_pickles_of_something_else(tmp_path: Path) -> None:
    for value, words in (
        ({"a": 1}, "a dict of a"),
        (3, "pickle of int"),
        ({"mu": [1.0], "sigma": SIGMA}, "mu is a list"),
    ):
        refused(pickled(tmp_path / "a.pkl", value), CLEAN, words)


def test_a_zip_bomb_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.npz"
    claim = {"descr": "|u1", "fortran_order": False, "shape": (2**20, 20, 20, 1)}
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, claim)
        for _ in range(400):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    refused(path, PIXELS, "claims 4.* bytes .* zip bomb")
    images = tmp_path / "bomb.zip"
    with zipfile.ZipFile(images, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(2**28 + 1))
    refused(images, PIXELS, "zip bomb")
    monkeypatch.setattr(module, "MAX_MEMBER", 100)
    refused(npz(tmp_path / "large.npz", mu=np.zeros(50), sigma=np.eye(50)), CLEAN, "claims 400 bytes; at most 100")


def test_headers_that_claim_more_than_the_file_holds(tmp_path: Path) -> None:
    header = io.BytesIO()
    claim = {"descr": "<f8", "fortran_order": False, "shape": (2**40, 2**10)}
    np.lib.format.write_array_header_1_0(header, claim)
    (tmp_path / "a.npy").write_bytes(header.getvalue() + bytes(80))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue() + bytes(80))
        archive.writestr("sigma.npy", header.getvalue())
    for name in ("a.npy", "a.npz"):
        refused(tmp_path / name, CLEAN, "claims 9,007,199,254,740,992 bytes")


def test_truncated_and_tampered_files(tmp_path: Path) -> None:
    whole = npz(tmp_path / "whole.npz", mu=MU, sigma=SIGMA, arr_0=IMAGES).read_bytes()
    path = tmp_path / "cut.npz"
    for length in (3, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:length])
        refused(path, CLEAN, "is not an npz")
    position = whole.index(MU.tobytes())
    path.write_bytes(whole[:position] + bytes(8) + whole[position + 8 :])
    with np.load(tmp_path / "whole.npz") as archive:
        assert archive["mu"][0] != 0
    np.savez(tmp_path / "bare.npz", mu=MU, sigma=SIGMA)
    data = bytearray((tmp_path / "bare.npz").read_bytes())
    data[data.index(MU.tobytes())] ^= 255
    path.write_bytes(data)
    refused(path, CLEAN, "Bad CRC-32")
    data = bytearray(npz(tmp_path / "images.npz", arr_0=IMAGES).read_bytes())
    data[data.index(IMAGES.tobytes())] ^= 255
    path.write_bytes(data)
    refused(path, PIXELS, "images are damaged|Bad CRC-32")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": MU, "sigma": np.array([[None]])}, "array of objects, which is code"),
        ({"arr_0": np.array([None])}, "array of objects, which is code"),
        ({"feats": FEATURES[:1]}, "at least 2"),
        ({"feats": np.full((5, 12), np.nan)}, "NaN"),
        ({"feats": FEATURES[:, :5]}, "gives 12 numbers"),
        ({"feats": FEATURES[:, 0]}, r"must be float \[N, D\]"),
        ({"feats": np.ones((5, 12), np.int64)}, r"must be float \[N, D\]"),
        ({"arr_0": np.ones(4)}, "images are uint8"),
        ({"arr_0": IMAGES.astype(np.float32)}, "images are uint8"),
        ({"x": np.ones(4), "y": np.ones(3)}, r"holds x \(float64 \[4\]\), y \(float64 \[3\]\); it needs"),
        ({}, "is not an npz"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    refused(npz(tmp_path / "bad.npz", **arrays), CLEAN, words)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones(4), "is not an npz"),
        (np.ones((4, 2, 2, 3)), "images are uint8"),
        (np.array([None]), "array of objects"),
        (np.ones((3, 3), complex), "is not an npz"),
    ],
)
def test_bad_npy(tmp_path: Path, array: Any, words: str) -> None:
    np.save(tmp_path / "bad.npy", array, allow_pickle=True)
    refused(tmp_path / "bad.npy", CLEAN, words)


def test_torch_files_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for value in ({"weight": torch.zeros(2)}, torch.zeros(3)):
        torch.save(value, path)
        refused(path, CLEAN, "is a torch file of")
    path.write_bytes(b"\x80\x02nothing")
    refused(path, CLEAN, "not a torch file of plain arrays")


# What a reference says of its images


def test_channels_and_size_are_kept(tmp_path: Path) -> None:
    grey = build_reference(torch.from_numpy(IMAGES).permute(0, 3, 1, 2)[:, :1], PIXELS, "grey")
    save_reference(tmp_path / "grey.npz", grey)
    loaded = load_reference(tmp_path / "grey.npz", PIXELS)
    assert (loaded.channels, loaded.size) == (1, (2, 2))
    check_images(loaded, (1, 2, 2))
    check_images(loaded, (1, 9, 9))
    with pytest.raises(StatisticsError, match=r"have 3 channel\(s\), those of reference 'grey' have 1"):
        check_images(loaded, (3, 2, 2))
    check_images(replace(loaded, channels=None, size=None), (3, 2, 2))


def test_efficientnet_compares_images_of_one_size() -> None:
    reference = Reference(torch.zeros(2), torch.eye(2), 9, "", "efficientnet-lite0", "mine", channels=3, size=(32, 32))
    check_images(reference, (3, 64, 64))
    with pytest.raises(StatisticsError, match="in 128 pixels, those of reference 'mine' in 64"):
        check_images(reference, (3, 128, 128))


def test_log_trace_ratio_shows_lost_variety() -> None:
    moments = Moments.of(torch.from_numpy(FEATURES))
    reference = Reference(moments.mean, moments.covariance, 40, "", "", "")
    assert log_trace_ratio(moments, reference) == pytest.approx(0, abs=1e-12)
    halved, same = Moments.of(torch.from_numpy(FEATURES) * 0.5 + 3), Moments.of(torch.ones(5, 12))
    assert log_trace_ratio(halved, reference) == pytest.approx(2 * np.log(0.5))
    assert log_trace_ratio(same, reference) == -np.inf
    with pytest.raises(StatisticsError, match="at least 2 images"):
        log_trace_ratio(Moments.of(torch.ones(1, 12)), reference)
    with pytest.raises(StatisticsError, match="has no variance"):
        log_trace_ratio(moments, replace(reference, sigma=torch.zeros(12, 12)))


def test_too_few_images_are_reported() -> None:
    assert too_few(2048, 2048) is None
    assert too_few(5000, 64) is None
    warning = too_few(500, 2048)
    assert warning is not None
    assert warning.startswith("500 images for 2,048 features")
    assert "\n" not in warning


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    reference = build_reference(torch.from_numpy(IMAGES).permute(0, 3, 1, 2), PIXELS, "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StatisticsError, match="cannot write"):
        save_reference(tmp_path / "folder", reference)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
