"""Pictures as people have them: every mode and format, everything broken, and finding them in folders."""

import contextlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mambavision.inference.images import ImageError, read_image
from mambavision.inference.picture_files import SAMPLES, find_pictures, sample_pictures

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(picture):
    image = read_image(picture)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(values):
    return np.repeat(np.asarray(values, dtype=np.uint8)[:, :, None], 3, axis=2)


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8))
    # What a camera stores so that the tag turns it back: the inverse of the tag's operation.
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(inverse[orientation]))
    tags = Image.Exif()
    tags[0x0112] = orientation
    assert np.array_equal(pixels(encoded(stored, "PNG", exif=tags)), np.asarray(upright))


def test_transparency_is_shown_on_white():
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (200, 0, 100, alpha))
    expected = [[255, 255, 255], [227, 127, 177], [200, 0, 100]]
    for picture in (image, encoded(image, "PNG"), encoded(image, "WEBP", lossless=True, exact=True)):
        assert np.abs(pixels(picture)[0].astype(int) - expected).max() <= 1
    luma = image.convert("LA").getpixel((1, 0))[0]
    assert np.abs(pixels(image.convert("LA"))[0, 1].astype(int) - (luma + 255) / 2).max() <= 1
    assert np.abs(pixels(image.convert("RGBa"))[0].astype(int) - expected).max() <= 1
    assert pixels(image.convert("LA").convert("La"))[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palette_pictures_with_and_without_transparency(transparency):
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert pixels(encoded(image, "PNG")).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    transparent = encoded(image, "PNG", transparency=transparency)
    assert pixels(transparent).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


def test_a_colour_declared_transparent_is_shown_on_white():
    image = Image.new("RGB", (2, 1), (10, 20, 30))
    image.putpixel((1, 0), (1, 2, 3))
    assert pixels(encoded(image, "PNG", transparency=(10, 20, 30))).tolist() == [[[255, 255, 255], [1, 2, 3]]]


def test_cmyk_and_other_colour_spaces():
    assert pixels(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).tolist() == [[[255, 0, 0]]]
    jpeg = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(pixels(jpeg).astype(int) - [255, 0, 0]).max() <= 3
    red = Image.new("RGB", (1, 1), "red")
    for mode in ("YCbCr", "HSV"):
        assert np.abs(pixels(red.convert(mode)).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "GIF", "PPM", "TGA", "JPEG2000"])
def test_grey_pictures(kind):
    assert np.array_equal(pixels(encoded(Image.fromarray(RAMP), kind)), grey(RAMP))


def test_black_and_white_pictures():
    image = Image.fromarray((RAMP % 2 * 255).astype(np.uint8)).convert("1")
    assert np.array_equal(pixels(encoded(image, "PNG")), grey(RAMP % 2 * 255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_pictures_are_scaled_not_clipped(kind):
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(pixels(encoded(deep, kind)), grey(RAMP))


def test_big_endian_and_32_bit_integers_hold_16_bit_values():
    deep = RAMP.astype(np.uint16) * 257
    assert np.array_equal(pixels(Image.fromarray(deep.astype(">u2"))), grey(RAMP))
    assert np.array_equal(pixels(encoded(Image.fromarray(deep.astype(np.int32)), "TIFF")), grey(RAMP))
    with pytest.raises(ImageError, match="beyond 16 bits"):
        read_image(Image.fromarray(RAMP.astype(np.int32) * 10_000))


def test_floating_point_pictures_in_both_usual_ranges():
    assert np.array_equal(pixels(encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF")), grey(RAMP))
    assert np.array_equal(pixels(encoded(Image.fromarray((RAMP / 255).astype(np.float32)), "TIFF")), grey(RAMP))
    for wrong in (np.float32(RAMP) - 1, np.float32(RAMP) * 2, np.full((2, 2), np.nan, np.float32)):
        with pytest.raises(ImageError, match="neither 0..1 nor 0..255"):
            read_image(Image.fromarray(wrong))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert pixels(data)[0, 0].tolist() == [255, 0, 0]


def test_the_same_from_path_bytes_file_array_and_image(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    path = tmp_path / "a picture.PNG"
    image.save(path)
    expected = np.asarray(image)
    with path.open("rb") as file:
        for picture in (path, str(path), path.read_bytes(), file, image, expected, Image.open(path)):
            assert np.array_equal(pixels(picture), expected)


def test_arrays_of_one_and_four_channels():
    assert np.array_equal(pixels(RAMP), grey(RAMP))
    assert np.array_equal(pixels(RAMP[:, :, None]), grey(RAMP))
    assert pixels(np.array([[[9, 8, 7, 0]]], dtype=np.uint8)).tolist() == [[[255, 255, 255]]]


def test_the_given_image_is_not_changed():
    image = Image.new("RGBA", (2, 2), (1, 2, 3, 4))
    read_image(image)
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (1, 2, 3, 4))


# ---- what cannot be read ---------------------------------------------------------------------------------------------


def message(picture, **options):
    with pytest.raises(ImageError) as caught:
        read_image(picture, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


def test_missing_empty_folder_and_text_are_named(tmp_path):
    assert message(tmp_path / "no.jpg") == f"{tmp_path / 'no.jpg'} does not exist."
    assert "is a folder" in message(tmp_path)
    for name, content, reason in (("a.jpg", b"", "is empty"), ("b.png", b"hello, world", "is not a picture")):
        (tmp_path / name).write_bytes(content)
        assert reason in message(tmp_path / name)
        assert name in message(tmp_path / name)
    assert "cannot be opened" in message("a\0b.jpg")
    assert message(b"", name="standard input") == "standard input is empty."


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind here")
def test_a_file_without_permission_is_named(tmp_path):
    path = tmp_path / "secret.png"
    path.touch(mode=0)
    assert "Permission denied" in message(path)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of the many tags that the damage hits
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_truncated_and_damaged_files_raise_nothing_else(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    message(data[: len(data) // 2], name="half")
    random = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(data)
        for place in random.integers(0, min(len(data), 200), 4):
            damaged[place] = random.integers(0, 256)
        with contextlib.suppress(ImageError):
            assert read_image(bytes(damaged)).mode == "RGB"


@pytest.mark.parametrize("factor", [0.9, 3.0])  # Pillow warns of the first and refuses the second
def test_a_decompression_bomb_is_an_error_and_leaves_pillow_alone(monkeypatch, factor):
    bomb = encoded(Image.new("L", (300, 300)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(300 * 300 / factor / 1.2))
    filters = list(warnings.filters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "decompression bombs" in message(bomb, name="bomb.png")
        filters_inside = list(warnings.filters)
        message(bomb)
        assert warnings.filters == filters_inside
    assert warnings.filters == filters
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(bomb).size == (300, 300)


def test_postscript_and_heic_are_refused_by_name():
    assert "PostScript" in message(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert "HEIC" in message(b"\0\0\0\x18ftypheic\0\0\0\0" + b"mif1heic" * 3)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_arrays_that_are_no_pictures_are_refused(array):
    assert str(array.dtype) in message(array)


def test_things_that_are_no_pictures_are_a_type_error():
    with pytest.raises(TypeError, match="not int"):
        read_image(3)


def test_names_are_made_printable():
    assert message("bad\x1b[31m\udcff.jpg") == "bad�[31m�.jpg does not exist."


# ---- finding them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.JPG", "a.png", "notes.txt", ".hidden.jpg", "sub/c.webp", "sub/[d].gif", ".git/e.jpg", "none/x.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    return tmp_path


def test_folders_are_searched_with_their_subfolders(tree):
    found, problems = find_pictures(["."])
    assert [path.as_posix() for path in found] == ["a.png", "b.JPG", "sub/[d].gif", "sub/c.webp"]
    assert problems == []


def test_globs_files_and_order(tree):
    assert find_pictures(["sub/*.webp", "b.JPG", "notes.txt"])[0] == [
        Path("sub/c.webp"),
        Path("b.JPG"),
        Path("notes.txt"),
    ]
    assert [path.name for path in find_pictures(["**/*.*g*"])[0]] == ["a.png", "[d].gif"]
    assert find_pictures(["sub/[d].gif"])[0] == [Path("sub/[d].gif")]  # a file of that very name
    assert find_pictures(["su*"])[0] == [Path("sub/[d].gif"), Path("sub/c.webp")]


def test_what_gives_no_picture_is_named(tree):
    found, problems = find_pictures(["none", "*.tiff", "https://example.org/a.jpg", "missing.jpg"])
    assert found == [Path("missing.jpg")]  # reading it says that it does not exist
    assert problems == [
        "none is a folder without pictures.",
        "*.tiff matches no file.",
        "https://example.org/a.jpg is a URL, which is not fetched; download the picture first.",
    ]


def test_sample_photographs_are_small_real_and_sourced():
    samples = sample_pictures()
    sources = (SAMPLES / "SOURCES.md").read_text(encoding="utf-8")
    assert len(samples) >= 3
    for path in samples:
        assert path.stat().st_size < 100_000
        assert min(read_image(path).size) >= 256
        row = next(line for line in sources.splitlines() if line.startswith(f"| {path.name} |"))
        assert "http" in row
        assert "CC0" in row or "public domain" in row
