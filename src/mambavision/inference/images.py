"""Pictures as people have them, turned into upright 8-bit RGB.

What is decided here: EXIF rotation is applied; transparent pixels are shown on white; 16-bit values keep their high
byte, as Pillow does for 16-bit colour; floating-point pictures may use 0..1 or 0..255; the first frame of an
animation is taken; colour profiles are ignored, as timm and torchvision do.
"""

from __future__ import annotations

import io
import os
import threading
import warnings
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Picture: TypeAlias = "str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray"

_WIDE_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
# Restoring the warning filters is not safe between threads.
_WARNING_FILTERS = threading.Lock()


class ImageError(ValueError):
    """A picture that cannot be read; the message is one sentence that names it and the reason."""


def read_image(picture: Picture, *, name: str | None = None) -> Image.Image:
    """Read one picture as upright RGB, 8 bits a channel, decoded completely.

    Args:
        picture: a path, the bytes of a file, a file opened for reading bytes, a PIL image, or a uint8 array of shape
            (height, width), (height, width, 1), (height, width, 3) or (height, width, 4).
        name: what messages call the picture; its path when None.

    Raises:
        ImageError: when there is no such file, or it is empty, broken, no picture, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (of which Pillow itself only warns).
        TypeError: when `picture` is none of these.
    """
    name = printable(name or picture_name(picture) or "the picture")
    if isinstance(picture, Image.Image):
        return _decode(picture, name)
    if isinstance(picture, np.ndarray):
        return _decode(_from_array(picture, name), name)
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return _read_file(io.BytesIO(picture), name)
    if hasattr(picture, "read"):
        return _read_file(io.BytesIO(picture.read()), name)
    if not isinstance(picture, (str, os.PathLike)):
        raise TypeError(
            f"A picture is a path, bytes, a file, a PIL image or a uint8 array, not {type(picture).__name__}."
        )
    try:
        with open(picture, "rb") as file:
            return _read_file(file if file.seekable() else io.BytesIO(file.read()), name)
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist.") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a folder, not a picture.") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        raise ImageError(f"{name} cannot be opened: {reason(error)}.") from error


def picture_name(picture: Picture) -> str:
    """A picture's path, or an empty text when it has none."""
    if isinstance(picture, (str, os.PathLike)):
        return os.fspath(picture)
    named = getattr(picture, "filename", None) or getattr(picture, "name", None)
    return named if isinstance(named, str) else ""


def printable(text: str) -> str:
    """`text` without what terminals and text files cannot take: control characters and undecodable bytes of names."""
    shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in shown)


def _read_file(file: BinaryIO, name: str) -> Image.Image:
    try:
        with _WARNING_FILTERS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its limit is an error below
            image = Image.open(file)
    except UnidentifiedImageError:
        file.seek(0)
        raise ImageError(f"{name} {_what_instead(file.read(32))}") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name} has {_TOO_LARGE}") from None
    except Exception as error:  # decoders raise what they please on damaged headers
        raise ImageError(f"{name} is broken: {reason(error)}.") from error
    with image:
        return _decode(image, name)


_TOO_LARGE = (
    "more pixels than PIL.Image.MAX_IMAGE_PIXELS allows, as a guard against decompression bombs; scale it down first."
)


def _what_instead(header: bytes) -> str:
    if not header:
        return "is empty."
    if header[4:8] == b"ftyp" and header[8:12] in (b"heic", b"heix", b"heim", b"heis", b"mif1", b"msf1"):
        return "is a HEIC picture, which Pillow cannot read; convert it to JPEG first."
    return "is not a picture, or of a kind that Pillow cannot read."


def _decode(image: Image.Image, name: str) -> Image.Image:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ImageError(f"{name} has {image.width} x {image.height} pixels, {_TOO_LARGE}")
    if image.format == "EPS":  # Pillow would start Ghostscript on it
        raise ImageError(f"{name} is PostScript, not a picture of pixels; convert it to PNG first.")
    try:
        return _to_rgb(image)
    except Exception as error:  # decoders raise what they please on damaged data, SyntaxError and IndexError among it
        raise ImageError(f"{name} is broken: {reason(error)}.") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in _WIDE_MODES:
        image = _to_8_bit(image)
    if image.mode == "La":  # converts to LA only
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey values scaled to 0..255, where Pillow's own conversion would clip them."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 255):  # written so that NaN fails it
            raise ValueError(f"its floating-point values span {low:g} to {high:g}, neither 0..1 nor 0..255")
        values = np.rint(values * 255 if high <= 1 else values)
    elif low < 0 or high > 65535:
        raise ValueError(f"its integer values span {low} to {high}, beyond 16 bits")
    else:
        values = values >> 8
    return Image.fromarray(values.astype(np.uint8))


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ImageError(
            f"{name} is an array of shape {array.shape} and type {array.dtype}; "
            f"give uint8 values of shape (height, width, channels) with 1, 3 or 4 channels."
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)


def reason(error: BaseException) -> str:
    """What went wrong, as the end of a sentence without its point."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return printable(text.splitlines()[0]).rstrip(".")
