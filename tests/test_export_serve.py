"""Images as people send them; the server, its logic without Ray and itself with; the Triton repository."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from export.images import decode

RNG = np.random.default_rng(0)
PHOTO = Image.fromarray(RNG.integers(0, 256, (6, 8, 3), np.uint8))


def content(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG of a few bytes that says it is that large."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# Images


def in_every_way(image, folder):
    path = folder / "it.png"
    image.save(path)
    yield from (path, str(path), path.read_bytes(), image, np.asarray(image))


def test_a_plain_image_keeps_every_pixel_however_it_comes(tmp_path):
    for way in in_every_way(PHOTO, tmp_path):
        found = decode(way)
        assert found.mode == "RGB"
        assert np.array_equal(np.asarray(found), np.asarray(PHOTO))


ORDINARY = {
    "jpeg": lambda: content(PHOTO, "JPEG"),
    "progressive jpeg": lambda: content(PHOTO, "JPEG", progressive=True),
    "grey jpeg": lambda: content(PHOTO.convert("L"), "JPEG"),
    "cmyk jpeg": lambda: content(PHOTO.convert("CMYK"), "JPEG"),
    "png": lambda: content(PHOTO),
    "palette png": lambda: content(PHOTO.quantize(16)),
    "bilevel png": lambda: content(PHOTO.convert("1")),
    "webp": lambda: content(PHOTO, "WEBP"),
    "bmp": lambda: content(PHOTO, "BMP"),
    "gif": lambda: content(PHOTO, "GIF"),
    "tiff": lambda: content(PHOTO, "TIFF"),
    "cmyk tiff": lambda: content(PHOTO.convert("CMYK"), "TIFF", compression="tiff_lzw"),
    "rotated jpeg": lambda: content(PHOTO, "JPEG", exif=rotated(6)),
    "rotated png": lambda: content(PHOTO, exif=rotated(8)),
}


def rotated(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", ORDINARY)
def test_the_ordinary_kinds_are_squashed_to_the_bit_as_in_training(kind):
    """As `vtab.data` decodes: upright, converted, bicubic."""
    file = ORDINARY[kind]()
    trained = ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")
    small = [np.asarray(each.resize((5, 5), Image.Resampling.BICUBIC)) for each in (trained, decode(file))]
    assert np.array_equal(*small)
    assert decode(file).size == ((6, 8) if "rotated" in kind else (8, 6))


def test_each_exif_orientation_is_made_upright():
    upright = np.asarray(decode(content(PHOTO)))
    stored = {1: upright, 3: upright[::-1, ::-1], 6: np.rot90(upright), 8: np.rot90(upright, -1)}
    for orientation, pixels in stored.items():
        file = content(Image.fromarray(np.ascontiguousarray(pixels)), exif=rotated(orientation))
        assert np.array_equal(np.asarray(decode(file)), upright), orientation


def test_what_is_transparent_is_seen_on_white():
    red = np.zeros((2, 2, 4), np.uint8)
    red[..., 0], red[..., 3] = 255, [[255, 0], [128, 255]]
    expected = [[[255, 0, 0], [255, 255, 255]], [[255, 127, 127], [255, 0, 0]]]
    for file in (content(Image.fromarray(red)), content(Image.fromarray(red), "WEBP", lossless=True, exact=True)):
        assert np.asarray(decode(file)).tolist() == expected
    grey = np.dstack([np.full((1, 3), 100, np.uint8), np.array([[255, 0, 51]], np.uint8)])
    assert np.asarray(decode(content(Image.fromarray(grey))))[0, :, 0].tolist() == [100, 255, 224]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for kind in ("PNG", "GIF"):
        assert np.asarray(decode(content(palette, kind, transparency=1)))[0].tolist() == [[10, 20, 30], [255] * 3]
    keyed = content(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3))
    assert np.asarray(decode(keyed))[0].tolist() == [[255] * 3, [4, 5, 6]]


def test_sixteen_bits_of_grey_become_eight():
    values = np.array([[0, 128, 129, 257, 32768, 65407, 65535]], np.uint16)
    expected = np.rint(values / 257).astype(int).tolist()
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(decode(content(Image.fromarray(values), kind)))
        assert pixels[..., 0].tolist() == pixels[..., 2].tolist() == expected


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_what_is_animated_the_first_frame_counts(kind):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "green")]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = content(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(file)).n_frames == 3
    assert np.asarray(decode(file))[0, 0].tolist() == [255, 0, 0]


def test_a_picture_of_the_caller_is_left_alone(tmp_path):
    content_before = content(PHOTO, exif=rotated(3))
    lazy = Image.open(io.BytesIO(content_before))
    decode(lazy)
    assert lazy.getexif()[0x0112] == 3
    grey = PHOTO.convert("LA")
    decode(grey)
    assert grey.mode == "LA"


whole = content(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)))
jpeg = content(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")
DAMAGED = {
    "empty": b"",
    "text": b"no image at all",
    "noise": RNG.bytes(5000),
    "half a png": whole[: len(whole) // 2],
    "half a jpeg": jpeg[: len(jpeg) // 2],
    "a jpeg's first bytes": jpeg[:20],
    "a flipped byte": whole[:200] + bytes([whole[200] ^ 255]) + whole[201:],
    "pdf": b"%PDF-1.4\n1 0 obj\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n",
    "icon": content(PHOTO, "ICO"),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_is_damaged_or_no_image_says_so_by_name(case, tmp_path):
    with pytest.raises(ValueError, match=f"the image of {len(DAMAGED[case]):,} bytes does not decode"):
        decode(DAMAGED[case])
    path = tmp_path / "it.jpg"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(ValueError, match=r"it\.jpg does not decode"):
        decode(path)


def test_no_size_and_a_vast_one_are_refused_by_the_header():
    with pytest.raises(ValueError, match="does not decode|no pixels"):
        decode(png_header(0, 0))
    with pytest.raises(ValueError, match="no pixels: it is 0×0"):
        decode(Image.new("RGB", (0, 0)))
    with pytest.raises(ValueError, match="exceeds limit|too large"):
        decode(png_header(20_000, 20_000))
    with pytest.raises(ValueError, match=r"is too large: 9,000×9,000, and 67,108,864 pixels are the limit; scale it"):
        decode(png_header(9_000, 9_000))
    with pytest.raises(ValueError, match=r"8×6, and 47 pixels"):
        decode(PHOTO, limit=47)
    assert decode(PHOTO, limit=48).size == (8, 6)


BOMB = """
import io, resource, sys
from export.images import decode
header = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(header)
    sys.exit("decoded")
except ValueError:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"])
def test_a_bomb_takes_no_memory(kind):
    """A file that says it is 12,000 × 12,000, which decoded would take 400 MB and more."""
    pytest.importorskip("resource")
    said = subprocess.run([sys.executable, "-c", BOMB], input=bomb(kind), capture_output=True, check=True)
    assert int(said.stdout) < 40, "MB"


def bomb(kind):
    if kind == "PNG":
        return png_header(12_000, 12_000)
    size = struct.pack("<HH", 12_000, 12_000)
    if kind == "JPEG":
        file = bytearray(content(PHOTO, "JPEG"))
        frame = file.index(b"\xff\xc0")
        file[frame + 5 : frame + 9] = struct.pack(">HH", 12_000, 12_000)
        return bytes(file)
    if kind == "GIF":
        file = bytearray(content(PHOTO, "GIF"))
        file[6:10] = size
        return bytes(file)
    if kind == "BMP":
        file = bytearray(content(PHOTO, "BMP"))
        file[18:26] = struct.pack("<ii", 12_000, 12_000)
        return bytes(file)
    if kind == "WEBP":
        file = bytearray(content(PHOTO, "WEBP", lossless=True))
        at = file.index(b"VP8L") + 9  # width - 1 and height - 1, in 14 bits each
        rest = struct.unpack_from("<I", file, at)[0] >> 28 << 28
        struct.pack_into("<I", file, at, 11_999 | 11_999 << 14 | rest)
        return bytes(file)
    return content(Image.new("1", (12_000, 12_000)), "TIFF", compression="group4")


def test_paths_that_are_no_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.png is not a file$"):
        decode(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="is not a file but a folder"):
        decode(tmp_path)


ARRAYS = {
    "floats": (np.zeros((4, 5, 3), np.float32), r"float32, shape \(4, 5, 3\), is no image: uint8 from 0 to 255"),
    "int64": (np.zeros((4, 5, 3), int), "int64"),
    "booleans": (np.zeros((4, 5), bool), "bool"),
    "channels first": (np.zeros((3, 4, 5), np.uint8), r"channels first; .*transpose\(1, 2, 0\)"),
    "a batch": (np.zeros((2, 4, 5, 3), np.uint8), r"shape \(2, 4, 5, 3\), is no image"),
    "two channels": (np.zeros((4, 5, 2), np.uint8), "in RGB"),
    "one row": (np.zeros(5, np.uint8), r"shape \(5,\)"),
    "nothing": (np.zeros((0, 0, 3), np.uint8), "the array has no pixels: it is 0×0"),
    "vast": (np.broadcast_to(np.uint8(0), (20_000, 20_000, 3)), "the array is too large: 20,000×20,000"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_an_array_of_another_dtype_or_layout_is_refused(case):
    array, message = ARRAYS[case]
    with pytest.raises(ValueError, match=message):
        decode(array)


def test_grey_arrays_strided_arrays_and_other_things():
    assert np.array_equal(
        np.asarray(decode(np.arange(6, dtype=np.uint8).reshape(2, 3)))[..., 1], [[0, 1, 2], [3, 4, 5]]
    )
    pixels = RNG.integers(0, 256, (3, 4, 6), np.uint8)
    assert np.array_equal(np.asarray(decode(pixels.transpose(1, 2, 0))), pixels.transpose(1, 2, 0))
    with pytest.raises(TypeError, match="a path, bytes, a PIL image or a numpy array, not a int"):
        decode(3)
    for mode in ("F", "I", "LAB"):
        with pytest.raises(ValueError, match=f"has mode {mode}, which has no agreed way to RGB"):
            decode(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"])
def test_the_bombs_are_ones(kind):
    """Else the test above would prove nothing."""
    with pytest.raises(ValueError, match="is too large: 12,000×12,000"):
        decode(bomb(kind))
