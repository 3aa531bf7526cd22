"""Any image a person may send, as upright RGB, or a refusal that names what is wrong with it.

formats         JPEG, PNG, WebP, GIF, BMP, TIFF; never one whose reader calls another program (EPS, PDF)
size            read in the header; more than `limit` pixels, or none, are refused before anything is decoded
orientation     EXIF's is applied
transparency    composited on white: alpha, a palette's transparent entry, a PNG's transparent colour
16-bit grey     scaled to 8 bits: x / 257, rounded
CMYK, YCbCr, …  Pillow's conversion, without a colour profile
animated        the first frame; of a file of several pages, the first page
32-bit, LAB     refused: no range, or no conversion, is agreed upon
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
LIMIT = 2**26  # pixels: 8192 × 8192, 256 MB decoded
OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")
TURN = Image.Transpose
UPRIGHT = {  # what undoes each orientation of EXIF
    **{2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE},
    **{6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90},
}

Picture = str | Path | bytes | np.ndarray | Image.Image


def decode(image: Picture, limit: int = LIMIT) -> Image.Image:
    """One image, upright and RGB; what is already so keeps its pixels.

    Args:
        image: a path, a file's content, a PIL image, or a uint8 array (H, W, 3) or (H, W).
        limit: the most pixels it may have.

    Raises:
        ValueError: it is missing, empty, damaged, too large, or of a format, mode, dtype or layout that is not read.
        TypeError: it is none of the kinds above.

    >>> decode(np.zeros((2, 3), np.uint8)).size
    (3, 2)
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, limit)
    if isinstance(image, Image.Image):
        return upright_rgb(image, "the image", limit)
    if isinstance(image, bytes):
        return _from_file(io.BytesIO(image), f"the image of {len(image):,} bytes", limit)
    if not isinstance(image, (str, Path)):
        raise TypeError(f"an image is a path, bytes, a PIL image or a numpy array, not a {type(image).__name__}")
    path = Path(image)
    if not path.is_file():  # a named pipe would be waited for
        raise ValueError(f"{path} is not a file{' but a folder' if path.is_dir() else ''}")
    return _from_file(path, str(path), limit)


def _from_array(array: np.ndarray, limit: int) -> Image.Image:
    found = f"an array of {array.dtype}, shape {array.shape},"
    if array.dtype != np.uint8:
        raise ValueError(f"{found} is no image: uint8 from 0 to 255 is expected; scale, round and convert it first")
    if array.ndim == 3 and array.shape[0] == 3 != array.shape[2]:
        raise ValueError(f"{found} has its channels first; (height, width, 3) is expected: array.transpose(1, 2, 0)")
    if array.ndim != 2 and array.shape[2:] != (3,):
        cure = "convert it with PIL.Image.fromarray, or take one image of it"
        raise ValueError(f"{found} is no image: (height, width, 3) in RGB, or (height, width), is expected; {cure}")
    _check_size("the array", array.shape[1], array.shape[0], limit)
    return Image.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _from_file(source: Path | io.BytesIO, name: str, limit: int) -> Image.Image:
    with _pillow(name):
        opened = Image.open(source, formats=FORMATS)  # reads the header
    with opened:
        return upright_rgb(opened, name, limit)


def upright_rgb(image: Image.Image, name: str, limit: int = LIMIT) -> Image.Image:
    """`image`, perhaps not decoded yet, which errors call `name`; the caller's own is left alone.

    Raises:
        ValueError: as `decode`.
    """
    _check_size(name, *image.size, limit)
    sixteen = image.mode in SIXTEEN or (image.mode == "I" and image.format == "PNG")  # the latter in older Pillows
    if not sixteen and image.mode not in OPAQUE + TRANSPARENT:
        raise ValueError(f"{name} has mode {image.mode}, which has no agreed way to RGB; convert it to 8-bit RGB first")
    with _pillow(name):
        upright = _upright(image)
        if sixteen:
            upright = Image.fromarray(_eight_bits(np.asarray(upright), image.info.get("transparency")))
        elif image.mode in TRANSPARENT or "transparency" in image.info:
            layer = upright if upright.mode == "RGBA" else upright.convert("RGBA")
            upright = Image.new("RGB", layer.size, "white")
            upright.paste(layer, mask=layer)
        return upright if upright.mode == "RGB" else upright.convert("RGB")


def _eight_bits(values: np.ndarray, transparent: int | None) -> np.ndarray:
    eight = np.empty(values.shape, np.uint8)
    for row, wide in zip(eight, values, strict=True):  # all at once would take three times the memory
        row[:] = (wide.astype(np.uint32) + 128) // 257
        row[wide == transparent] = 255
    return eight


def _upright(image: Image.Image) -> Image.Image:
    image.load()  # some formats keep EXIF behind the pixels
    turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    if turn is None:
        return image
    turned = image.transpose(turn)  # ImageOps.exif_transpose also writes the EXIF anew, and fails where that is damaged
    turned.info = {key: value for key, value in image.info.items() if key == "transparency"}
    return turned


def _check_size(name: str, width: int, height: int, limit: int) -> None:
    if not width * height:
        raise ValueError(f"{name} has no pixels: it is {width}×{height}")
    if width * height > limit:
        raise ValueError(
            f"{name} is too large: {width:,}×{height:,}, and {limit:,} pixels are the limit; scale it down"
        )


@contextlib.contextmanager
def _pillow(name: str) -> Iterator[None]:
    """What Pillow raises, as ValueError; damaged files make it raise nearly every class."""
    try:
        yield
    except Image.UnidentifiedImageError:
        raise ValueError(f"{name} does not decode: it is no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except Exception as error:
        raise ValueError(f"{name} does not decode ({error})") from error
