"""What a folder of images holds is read as clean-fid reads it, or is named."""

from __future__ import annotations

import io
import re
import struct
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

from autodiffusion_optuna.errors import StatisticsError
from autodiffusion_optuna.evaluation.features import load_extractor
from autodiffusion_optuna.evaluation.references.formats import read_reference_data
from autodiffusion_optuna.evaluation.references.images import FORMATS, Images, folder_images, zip_images
from autodiffusion_optuna.evaluation.references.reference import (
    build_reference,
    check_images,
    doubts,
    load_reference,
    save_reference,
)

PIXELS = load_extractor("pixels", "cpu")
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (24, 4, 4, 3), dtype=np.uint8)


def pixels(images: Images) -> np.ndarray[Any, Any]:
    return np.concatenate(list(images.batches(5)))


def deep_png(values: np.ndarray[Any, Any], kind: int) -> bytes:
    """A PNG of 16 bits a channel, which PIL does not write: ``kind`` 0 is grey, 2 RGB, 4 LA, 6 RGBA."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def write_mixed(folder: Path) -> Path:
    """10 PNG, 10 BMP, a TIFF, a GIF and junk, as in pytorch-fid's issue 50."""
    folder.mkdir()
    for index in range(10):
        Image.fromarray(COLOUR[index]).save(folder / f"{index:02}.png")
        Image.fromarray(COLOUR[10 + index]).save(folder / f"{10 + index:02}.bmp")
    Image.fromarray(COLOUR[20]).save(folder / "20.tiff")
    Image.fromarray(COLOUR[21]).save(folder / "21.gif")
    (folder / "a.txt").write_text("hello")
    (folder / "b.json").write_text("{}")
    (folder / "c").write_text("")
    for junk in (".DS_Store", "._00.png", "Thumbs.db", ".cache"):
        (folder / junk).write_bytes(b"\0")
    return folder


def test_formats_are_those_of_clean_fid() -> None:
    source = Path(pytest.importorskip("importlib.util").find_spec("cleanfid").origin).with_name("utils.py").read_text()
    listed = source.partition("EXTENSIONS = {")[2].partition("}")[0].replace("'", "").split(",")
    assert {suffix.strip().lower() for suffix in listed} == set(FORMATS)


def test_every_file_is_read_or_named(tmp_path: Path) -> None:
    folder = write_mixed(tmp_path / "mine")
    images = folder_images(folder)
    assert images.total == 21
    np.testing.assert_array_equal(pixels(images), COLOUR[:21].transpose(0, 3, 1, 2))
    assert len(images.notes) == 1
    assert images.notes[0].startswith("reference 'mine': 4 files left out (read are bmp, ")
    assert images.notes[0].endswith(": 21.gif, a.txt, b.json, …")
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
        archive.writestr("__MACOSX/._00.png", b"")
        archive.mkdir("empty")
    zipped = zip_images(tmp_path / "mine.zip")
    np.testing.assert_array_equal(pixels(zipped), pixels(images))
    assert zipped.notes == (images.notes[0].replace("'mine'", "'mine.zip'"),)


def test_files_in_odd_places_are_read_or_named(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    (folder / "deep" / "er").mkdir(parents=True)
    elsewhere.mkdir()
    Image.fromarray(COLOUR[0]).save(folder / "deep" / "er" / "a.PNG")
    Image.fromarray(COLOUR[1]).save(elsewhere / "b.Tif")
    Image.fromarray(COLOUR[2]).save(folder / ".hidden.png")
    Image.fromarray(COLOUR[3]).save(folder / "really.png", "BMP")
    Image.fromarray(COLOUR[4]).save(folder / "no_suffix", "PNG")
    (folder / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)  # a circle
    images = folder_images(folder)
    np.testing.assert_array_equal(pixels(images), COLOUR[[0, 1, 3]].transpose(0, 3, 1, 2))
    assert [note.rpartition(": ")[2] for note in images.notes] == [".hidden.png, no_suffix"]
    (folder / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(StatisticsError, match=r"gone\.png cannot be read"):
        folder_images(folder)


def test_arrays_among_the_images(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", COLOUR[0])
    np.save(tmp_path / "b.npy", COLOUR[1, :, :, :1])
    np.save(tmp_path / "labels.npy", np.arange(3))
    np.save(tmp_path / "scaled.npy", COLOUR[2] / 255)
    images = folder_images(tmp_path)
    np.testing.assert_array_equal(pixels(images)[0], COLOUR[0].transpose(2, 0, 1))
    np.testing.assert_array_equal(pixels(images)[1], COLOUR[1, :, :, :1].repeat(3, 2).transpose(2, 0, 1))
    assert images.notes[0].endswith("npy as uint8 [H, W, 3]): labels.npy, scaled.npy")
    (tmp_path / "cut.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:20])
    with pytest.raises(StatisticsError, match=r"cut\.npy is not a readable array"):
        folder_images(tmp_path)


def test_what_is_not_read_as_it_is_is_named(tmp_path: Path) -> None:
    frames = [Image.fromarray(image) for image in COLOUR[:2]]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.dstack([COLOUR[2], COLOUR[3, :, :, 0]])).save(tmp_path / "see_through.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    frames[1].save(tmp_path / "turned.jpg", exif=turned)
    frames[1].convert("CMYK").save(tmp_path / "print.tif")
    notes = folder_images(tmp_path).notes
    assert sorted(note.removeprefix(f"reference {tmp_path.name!r}: 1 file ") for note in notes) == [
        "of several images read for the first one: pages.tif",
        "read without being turned as their EXIF says, as clean-fid does: turned.jpg",
        "read without transparency, as clean-fid does: see_through.png",
    ]
    np.testing.assert_array_equal(pixels(folder_images(tmp_path))[0], COLOUR[0].transpose(2, 0, 1))


@pytest.mark.parametrize(("kind", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_16_bits_are_read_alike_in_grey_and_colour(tmp_path: Path, kind: int, channels: int) -> None:
    deep = RNG.integers(0, 2**16, (4, 4, 1), dtype=np.uint16)
    (tmp_path / "deep.png").write_bytes(deep_png(deep.repeat(channels, 2), kind))
    images = folder_images(tmp_path)
    assert images.shape == (1 if kind in (0, 4) else 3, 4, 4)
    np.testing.assert_array_equal(pixels(images)[0, 0], deep[..., 0] >> 8)
    assert any("1 file of 16 bits a channel read in their upper 8: deep.png" in note for note in images.notes)


@pytest.mark.parametrize("form", ["tiff", "ppm"])
def test_16_bits_of_grey_in_other_formats(tmp_path: Path, form: str) -> None:
    deep = RNG.integers(0, 2**16, (4, 4), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / f"deep.{form}")
    np.testing.assert_array_equal(pixels(folder_images(tmp_path))[0, 0], deep >> 8)
    big = Image.fromarray(deep.astype(">u2")) if form == "tiff" else None
    if big is not None:
        big.save(tmp_path / "big.tiff")
        np.testing.assert_array_equal(pixels(folder_images(tmp_path))[:, 0], np.stack([deep >> 8] * 2))


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "a.tif")
    with pytest.raises(StatisticsError, match="must be grey or RGB of 8 or 16 bits"):
        folder_images(tmp_path)


def test_one_bit_becomes_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(COLOUR[0, :, :, 0] > 127).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(folder_images(tmp_path))[0, 0], 255 * (COLOUR[0, :, :, 0] > 127))


def test_an_npz_says_which_images_it_leaves_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", arr_0=COLOUR[:5], more=COLOUR[5:], labels=np.arange(5))
    images = read_reference_data(tmp_path / "mine.npz").images
    assert images is not None
    assert images.total == 5
    assert images.notes == ("reference 'mine': images in more left out, as those in arr_0 are read",)
    np.savez(tmp_path / "named.npz", x=COLOUR, y=np.arange(24))
    assert read_reference_data(tmp_path / "named.npz").images is not None


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_grey_images_need_no_channel_axis_and_no_name(tmp_path: Path, save: Callable[..., None]) -> None:
    grey = COLOUR[..., 0]
    save(tmp_path / "train.npz", x_train=grey, y_train=np.arange(len(grey), dtype=np.uint8))
    save(tmp_path / "turned.npz", x_train=np.asfortranarray(grey))
    np.save(tmp_path / "bare.npy", grey)
    for name in ("train.npz", "turned.npz", "bare.npy"):
        images = read_reference_data(tmp_path / name).images
        assert images is not None
        assert images.shape == (1, *grey.shape[1:])
        assert np.array_equal(np.concatenate(list(images.batches(5)))[:, 0], grey), name
    save(tmp_path / "masks.npz", photos=COLOUR, masks=grey)  # what has colours is the images
    images = read_reference_data(tmp_path / "masks.npz").images
    assert images is not None
    assert images.shape == (3, *grey.shape[1:])


def test_where_it_is_not_clear_which_arrays_are_the_images_they_are_listed(tmp_path: Path) -> None:
    count, height, width, _ = COLOUR.shape
    np.savez(tmp_path / "two.npz", train=COLOUR, test=COLOUR[:3], labels=np.arange(3))
    shown = f"test (uint8 [3, {height}, {width}, 3]), train (uint8 [{count}, {height}, {width}, 3]); it needs"
    with pytest.raises(StatisticsError, match=re.escape(f"holds labels (int64 [3]), {shown}")):
        read_reference_data(tmp_path / "two.npz")
    np.savez(tmp_path / "one.npz", picture=COLOUR[0])  # one image in colour is not a batch of narrow grey ones
    with pytest.raises(StatisticsError, match=re.escape(f"picture (uint8 [{height}, {width}, 3])")):
        read_reference_data(tmp_path / "one.npz")
    np.savez(tmp_path / "many.npz", **{f"a{i}": np.zeros(2) for i in range(30)})
    with pytest.raises(StatisticsError, match="22 others; it needs"):
        read_reference_data(tmp_path / "many.npz")


def test_notes_and_a_few_images_are_kept_with_a_reference(tmp_path: Path) -> None:
    folder = write_mixed(tmp_path / "mine")
    built = load_reference(folder, PIXELS)
    assert built.images is not None
    assert torch.equal(built.images, torch.from_numpy(COLOUR[:21:2]).permute(0, 3, 1, 2))
    save_reference(tmp_path / "own.npz", built)
    loaded = load_reference(tmp_path / "own.npz", PIXELS)
    assert loaded.notes == built.notes
    assert len(loaded.notes) == 1
    assert loaded.images is not None
    assert torch.equal(loaded.images, built.images)
    assert loaded.digest == built.digest
    with np.load(tmp_path / "own.npz") as stored:  # a reference of an older version has no images
        np.savez(tmp_path / "old.npz", **{key: stored[key] for key in stored if key != "images"})
    assert load_reference(tmp_path / "old.npz", PIXELS).digest == built.digest


def doubt(images: np.ndarray[Any, Any], shape: tuple[int, int, int], metric: str = "frechet") -> str:
    reference = build_reference(torch.from_numpy(images).permute(0, 3, 1, 2), PIXELS, "mine")
    return "\n".join(doubts(reference, shape, metric))


def test_doubtful_references_are_reported() -> None:
    few, many = COLOUR, RNG.integers(0, 256, (200, 4, 4, 3), dtype=np.uint8)
    assert doubt(many, (3, 4, 4)) == ""
    assert doubt(many, (3, 4, 4), "kid") == ""
    assert "has images of 4x4, the model's are 8x8: the distance counts" in doubt(many, (3, 8, 8))
    assert "the model's are 8x4 and of another aspect ratio" in doubt(many, (3, 4, 8))
    assert "has 24 images for 48 features" in doubt(few, (3, 4, 4))
    assert "has 24 images for the kernel distance" in doubt(few, (3, 4, 4), "kid")
    assert "grey images only, saved as colour" in doubt(many[..., :1].repeat(3, 3), (3, 4, 4))


def test_few_images_show_where_a_file_does_not_say_how_many(tmp_path: Path) -> None:
    features = RNG.normal(size=(3, 4))
    inception = PIXELS.__class__(
        "inception", "0" * 16, 4, torch.device("cpu"), lambda images: images.float(), mode="clean"
    )
    np.savez(tmp_path / "few.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    lines = doubts(load_reference(tmp_path / "few.npz", inception), (3, 4, 4), "frechet")
    assert ["has seemingly 3 images for 4 features" in line for line in lines] == [True]
    np.savez(tmp_path / "many.npz", mu=features.mean(0), sigma=np.eye(4))
    assert doubts(load_reference(tmp_path / "many.npz", inception), (3, 4, 4), "frechet") == []


def test_grey_saved_as_colour_is_said_where_it_is_refused() -> None:
    images = torch.from_numpy(COLOUR[..., :1].repeat(3, 3)).permute(0, 3, 1, 2)
    with pytest.raises(StatisticsError, match="have 3, all of them the same: save them as grey"):
        check_images(build_reference(images, PIXELS, "mine"), (1, 4, 4))


def test_a_broken_exif_turns_nothing(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(COLOUR[0]).save(stream, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())
    assert folder_images(tmp_path).notes == ()


@pytest.mark.parametrize("largest", [4095, 65535])
def test_deep_colour_of_portable_bitmaps_is_said(tmp_path: Path, largest: int) -> None:
    values = RNG.integers(0, largest + 1, (2, 4, 4, 3)).astype(">u2")
    for number, image in enumerate(values):
        (tmp_path / f"{number}.ppm").write_bytes(b"P6\n# made here\n4 4\n%d\n" % largest + image.tobytes())
    assert any("of 16 bits a channel read in their upper 8" in note for note in folder_images(tmp_path).notes)


def test_a_zip_of_images_may_hold_other_things(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(COLOUR[number]).save(folder / f"{number}.png")
    np.save(folder / "labels.npy", np.arange(3))
    (folder / "data.pkl").write_bytes(b"x")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in folder.iterdir():
            archive.write(path, path.name)
    images = read_reference_data(tmp_path / "all.zip").images
    assert images is not None
    assert images.total == 3
    assert any("labels.npy" in note for note in images.notes)
    with zipfile.ZipFile(tmp_path / "arrays.zip", "w") as archive:
        for number in range(3):
            with archive.open(f"x/{number}.npy", "w") as file:
                np.save(file, COLOUR[number])
    arrays = read_reference_data(tmp_path / "arrays.zip").images
    assert arrays is not None
    assert arrays.total == 3


def test_pointers_in_place_of_arrays_are_called_so(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.npy").write_text(pointer)
    with pytest.raises(StatisticsError, match=r"0\.npy: is a Git LFS pointer: run git lfs pull"):
        read_reference_data(tmp_path / "images")
    np.savez(tmp_path / "x_clean_train_32.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    (tmp_path / "x_clean_train_32_kid.npz").write_text(pointer)
    with pytest.raises(StatisticsError, match=r"_kid\.npz: is a Git LFS pointer"):
        read_reference_data(tmp_path / "x_clean_train_32.npz")


@pytest.mark.parametrize("sizes", ["mixed", "large"])
def test_a_few_images_of_any_size_are_kept(tmp_path: Path, sizes: str) -> None:
    for number in range(40):
        side = 8 + number if sizes == "mixed" else 2600
        shade = np.full((side, side, 3), 6 * number, dtype=np.uint8)
        Image.fromarray(shade).save(tmp_path / f"{number:02}.png", compress_level=1)
    if sizes == "large":
        for number in range(20, 40):
            (tmp_path / f"{number}.png").unlink()
    small = replace(PIXELS, network=lambda images: images.float().flatten(1)[:, :3], seen=lambda height, width: (8, 8))
    images = load_reference(tmp_path, small).images
    assert images is not None
    assert 10 <= len(images) <= 16
    assert images.nbytes <= 2**24
    assert len(images.flatten(1).float().mean(1).unique()) == len(images)
