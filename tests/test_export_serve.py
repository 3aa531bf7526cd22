"""Images as people send them; the server, its logic without Ray and itself with; the Triton repository."""

import asyncio
import contextlib
import io
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from PIL import Image, ImageOps

import capavision as cv
from benchmarks import serve as load_test
from export import __main__ as export_command
from export import desk, serve, triton
from export.images import decode
from export.runtime import Classifier, random_pixels, relative_error
from tests.conftest import awaken_deltas

ROOT = Path(__file__).resolve().parent.parent

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


def test_every_orientation_is_undone_once_as_pillow_does_it():
    for orientation in range(1, 10):
        file = content(PHOTO, "JPEG", exif=rotated(orientation))
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB"))
        assert np.array_equal(np.asarray(decode(file)), expected), orientation
        assert np.array_equal(np.asarray(decode(decode(file))), expected), orientation


def test_exif_that_is_damaged_elsewhere_still_turns_the_image():
    """A float where a whole number belongs: Pillow reads that, and cannot write it."""
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHIf", 0x0100, 11, 1, 1.5)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + tags + bytes(4)
    file = content(PHOTO, "JPEG")
    assert decode(file[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + file[2:]).size == (6, 8)


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
    keyed = np.asarray(decode(content(Image.fromarray(values), transparency=257)))
    assert keyed[0, :, 0].tolist() == [*expected[0][:3], 255, *expected[0][4:]]


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


PEAK = """
import sys
from pathlib import Path
from export.images import decode
def peak():  # ru_maxrss would be that of the process that started this one, where that is larger
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
file = sys.stdin.buffer.read()
before = peak()
try:
    decode(file)
except ValueError as error:
    print(error, file=sys.stderr)
print((peak() - before) // 1024)
"""


def decoding(file):
    """(MB that decoding it takes, the refusal)."""
    if not Path("/proc/self/status").is_file():
        pytest.skip("only Linux tells the peak of a process")
    said = subprocess.run([sys.executable, "-c", PEAK], input=file, capture_output=True, check=True)
    return int(said.stdout), said.stderr.decode()


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG"])
def test_a_bomb_takes_no_memory(kind):
    """A file that says it is 12,000 × 12,000, which decoded would take 400 MB and more."""
    megabytes, refusal = decoding(bomb(kind))
    assert "is too large: 12,000×12,000" in refusal
    assert megabytes < 40


def wide(mode, kind="PNG", dtype=None, **options):
    image = Image.new(mode, (2000, 2000)) if dtype is None else Image.fromarray(np.zeros((2000, 2000), dtype))
    return content(image, kind, **options)


HUNGRY = {
    "palette": lambda: wide("P", transparency=0),
    "grey and alpha": lambda: wide("LA"),
    "rgba webp": lambda: wide("RGBA", "WEBP", lossless=True),
    "turned rgba": lambda: wide("RGBA", exif=rotated(6)),
    "16 bits": lambda: wide("", dtype=np.uint16),
}


@pytest.mark.parametrize("kind", HUNGRY)
def test_a_pixel_takes_no_more_memory_than_a_server_reckons_with(kind):
    """export.desk decodes a few images at a time, of up to `LIMIT` pixels."""
    megabytes, refusal = decoding(HUNGRY[kind]())
    assert refusal == ""
    assert 10 < megabytes <= 16 * 2000**2 / 2**20 + 8


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
    "an alpha channel": (np.zeros((4, 5, 4), np.uint8), "in RGB, .* convert it with PIL.Image.fromarray"),
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


# Packages


def run_file(path, classes, seed):
    base = cv.Base("test_vit", "random", 32, kwargs={"depth": 1})
    model = base.build(len(classes))
    cv.inject(model, cv.LoRA(rank=2, branches=2))
    awaken_deltas(model, seed)
    preprocessing = {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    cv.save(model, path, base=base, classes=classes, info={"task": path.stem, "preprocessing": preprocessing})
    return str(path)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """One merged package of the task "toy", one split package of "pets" and "petals"."""
    folder = tmp_path_factory.mktemp("packages")
    toy = run_file(folder / "toy.safetensors", ["ant", "bee", "cow"], 0)
    pets = run_file(folder / "pets.safetensors", ["cat", "dog"], 1)
    petals = run_file(folder / "petals.safetensors", ["rosé", 'a "lily"\nof the valley'], 2)
    export_command.main([toy, "--out", str(folder / "merged"), "--exporter", "legacy"])  # the faster one
    export_command.main(["--split", pets, petals, "--out", str(folder / "split")])
    return folder / "merged", folder / "split"


# The desk: requests without a server


def answer(counter, query, body):
    async def batched(item):
        return counter.rows([item])[0]

    return asyncio.run(counter.predict(query, body, batched))


@pytest.fixture(scope="module")
def counters(packages):
    """A desk of one task, and one of two."""
    return [desk.Desk(package, threads=1) for package in packages]


def test_a_prediction_is_what_the_classifier_says(counters, packages):
    assert [counter.tasks().keys() for counter in counters] == [{"toy"}, {"pets", "petals"}]
    assert counters[0].tasks()["toy"] == ["ant", "bee", "cow"]
    body = content(PHOTO)
    for number, task in ((0, "toy"), (1, "pets"), (1, "petals")):
        (expected,) = Classifier(packages[number]).predict([body], top=2, task=task)
        for query in ({"task": task, "top": "2"}, {"top": "2"})[: 2 - number]:  # one task need not be named
            said = answer(counters[number], query, body)
            assert said["task"] == task
            assert [(row["label"], row["probability"]) for row in said["predictions"]] == expected
            json.dumps(said)


def test_a_batch_of_several_tasks_keeps_its_order(counters):
    items = list(zip(["pets", "petals", "petals"] * 2, random_pixels(3, 6, 32), strict=True))
    together = counters[1].rows(items)
    for item, row in zip(items, together, strict=True):
        (alone,) = counters[1].rows([item])
        assert [label for label, _ in row] == [label for label, _ in alone]
        assert [p for _, p in row] == pytest.approx([p for _, p in alone], abs=1e-6)


REFUSED = {
    "no task": ({}, None, 400, "name a task, as in /predict?task=pets; GET /tasks lists them"),
    "another task": ({"task": "x" * 500}, None, 404, "there is no task 'xxx"),
    "top 0": ({"task": "pets", "top": "0"}, None, 400, "top='0' must be a whole number from 1 to 9999"),
    "top vast": ({"task": "pets", "top": "9" * 40}, None, 400, "must be a whole number"),
    "top text": ({"task": "pets", "top": "½"}, None, 400, "must be a whole number"),
    "top other digits": ({"task": "pets", "top": "٣"}, None, 400, "must be a whole number"),
    "noise": ({"task": "pets"}, RNG.bytes(500), 400, "the image of 500 bytes does not decode"),
    "no image": ({"task": "pets"}, b"x", 400, "the body must be an image file"),
    "no body": ({"task": "pets"}, b"", 400, "the body is empty"),
    "parameter": ({"task": "pets", "topp": "2"}, None, 400, "there is no parameter 'topp'; there are task and top"),
    "bomb": ({"task": "pets"}, png_header(20_000, 20_000), 400, "exceeds limit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_request_has_its_status_and_a_sentence(counters, case):
    query, body, status, message = REFUSED[case]
    with pytest.raises(desk.RefusedError, match=message.replace("?", r"\?")) as refused:
        answer(counters[1], query, content(PHOTO) if body is None else body)
    assert refused.value.status == status
    assert len(str(refused.value)) < 300


def test_where_too_many_wait_the_next_is_sent_away(packages):
    full = desk.Desk(packages[0], threads=1, queue=2)

    async def ask():
        let = asyncio.Event()

        async def batched(item):
            await let.wait()
            return full.rows([item])[0]

        waiting = [asyncio.create_task(full.predict({}, content(PHOTO), batched)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(desk.RefusedError, match="2 requests wait already") as refused:
            await full.predict({}, content(PHOTO), batched)
        let.set()
        return refused.value.status, await asyncio.gather(*waiting), await full.predict({}, content(PHOTO), batched)

    status, (first, second), later = asyncio.run(ask())
    assert status == 503
    assert first == second == later


def test_more_labels_than_there_are_is_all_of_them(counters):
    said = answer(counters[1], {"task": "pets", "top": "9999"}, content(PHOTO))
    assert sum(row["probability"] for row in said["predictions"]) == pytest.approx(1)


async def trickle(count, size, pause=0.0):
    for _ in range(count):
        await asyncio.sleep(pause)
        yield bytes(size)


def test_a_body_is_read_whole_in_bounds_and_in_time(monkeypatch):
    assert asyncio.run(desk.read_body({"content-length": "6"}, trickle(3, 2))) == bytes(6)
    monkeypatch.setattr(desk, "LARGEST", 1000)
    assert len(asyncio.run(desk.read_body({}, trickle(10, 100)))) == 1000
    monkeypatch.setattr(desk, "PATIENCE", 0.2)
    none = trickle(0, 0)
    for headers, chunks, status in (
        ({}, trickle(10**9, 100), 413),
        ({"content-length": "1001"}, trickle(11, 91), 413),
        ({"content-length": "4001"}, none, 413),
        ({"content-length": "9" * 5000}, none, 413),
        ({"content-length": "-1"}, none, 413),
        ({}, trickle(100, 1, 0.05), 408),
    ):
        with pytest.raises(desk.RefusedError) as refused:
            asyncio.run(desk.read_body(headers, chunks))
        assert refused.value.status == status


def refused_command(main, argv, match):
    with pytest.raises(ValueError, match=match):
        main([str(a) for a in argv])


def test_a_mistake_on_the_command_line_is_told_before_ray_starts(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "connect", lambda *a: pytest.fail("Ray was started"))
    merged = packages[0]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused_command(serve.main, [merged, "--port", port], f"--port {port} cannot be listened on")
    port = free_port()
    refused_command(serve.main, [tmp_path, "--port", port], "is no exported package")
    refused_command(serve.main, [merged, "--port", port, "--queue", 0], "--queue 0 must be at least 1")
    refused_command(serve.main, [merged, "--port", port, "--variant", "int8"], "serve int8-static, float16 or float32")
    refused_command(serve.main, [merged, "--port", port, "--variant", "float16"], "no variant 'float16'; choose of flo")
    refused_command(serve.main, [merged, "--port", 99999], "--port 99999 cannot be listened on")
    refused_command(serve.main, [merged, "--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000 cannot be listened on")


@pytest.mark.parametrize("found", [None, types.ModuleType("ray")], ids=["nothing", "a folder called ray"])
def test_without_ray_the_extra_is_named(found, packages, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", found)
    refused_command(serve.main, [packages[0], "--port", free_port()], r"needs Ray: pip install 'capavision\[serve\]'")


class OldRay:
    __version__ = "2.59.1"

    def init(self, *args, **kwargs):
        pytest.fail("Ray was started")


def test_a_ray_whose_ports_obey_anyone_is_not_started_and_a_bad_port_is_told(packages, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", OldRay())
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)  # remembered, so that what `connect` sets is undone
    port = ["--port", free_port()]
    refused_command(serve.main, [packages[0], *port], r"Ray 2\.59\.1 would open ports .*capavision\[serve\]")
    address = ["--address", "127.0.0.1:99999"]
    refused_command(serve.main, [packages[0], *port, *address], "no Ray cluster answers at '127.0.0.1:99999'")


def test_ray_without_its_serve_names_the_extra(packages, monkeypatch):
    monkeypatch.setattr(serve, "connect", lambda *a: None)
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))  # vtab.sweep --ray needs no more
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)
    refused_command(serve.main, [packages[0], "--port", free_port()], r"needs Ray Serve: .*capavision\[serve\]")


def test_what_a_cluster_serves_already_is_left_alone(packages, monkeypatch):
    """A second application of the name would replace the first; the stub has no `start`, `run` or `delete`."""
    ray = types.ModuleType("ray")
    ray.serve = types.SimpleNamespace(status=lambda: types.SimpleNamespace(applications={"capavision": "RUNNING"}))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(serve, "connect", lambda *a: ray)
    refused_command(serve.main, [packages[0], "--port", free_port()], "serves something already")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


# The server itself, where Ray Serve is installed


@contextlib.contextmanager
def serving(package, output, queue):
    """(port, process, its output) of a server in which `queue` requests may wait."""
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'capavision[serve]'")
    port = free_port()
    command = [sys.executable, "-m", "export.serve", str(package), "--port", str(port), "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with output.open("wb") as file:
        process = subprocess.Popen([*command, "--queue", str(queue)], stdout=file, stderr=file, env=environment)
        try:
            until(lambda: process.poll() is not None or (get(port, "/-/healthz") or [0])[0] == 200)
            assert process.poll() is None, output.read_text()
            yield port, process, output
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def server(packages, tmp_path_factory):
    with serving(packages[1], tmp_path_factory.mktemp("server") / "output", 220) as started:
        yield started


def until(find, seconds=120):
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.2)
    return found


def get(port, path, body=None):
    """(status, content); None where nothing listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", body, timeout=60) as reply:
            return reply.status, reply.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except OSError:
        return None


def test_the_server_predicts_and_says_what_it_has(server, packages):
    port = server[0]
    body = content(PHOTO)
    for task in ("pets", "petals"):
        status, said = get(port, f"/predict?task={task}&top=2", body)
        assert status == 200, said
        (expected,) = Classifier(packages[1]).predict([body], top=2, task=task)
        found = [(row["label"], row["probability"]) for row in json.loads(said)["predictions"]]
        assert [label for label, _ in found] == [label for label, _ in expected]
        assert [p for _, p in found] == pytest.approx([p for _, p in expected], abs=1e-6)
    assert json.loads(get(port, "/tasks")[1])["pets"] == ["cat", "dog"]
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=5)  # only who listens on all addresses would answer
    assert until(lambda: b"ray_serve_deployment_request_counter" in get(port, "/metrics")[1])


def test_the_server_refuses_with_the_right_status_and_lives(server):
    port = server[0]
    body = content(PHOTO)
    for path, sent, status, says in (
        ("/predict", body, 400, "name a task"),
        ("/predict?task=pet", body, 404, "there is no task 'pet'"),
        ("/predict?task=pets", RNG.bytes(3000), 400, "does not decode"),
        ("/predict?task=pets", png_header(20_000, 20_000), 400, "exceeds limit"),
        ("/predict?task=pets", bytes(desk.LARGEST + 1), 413, "larger than 16,777,216 bytes"),
        ("/elsewhere", None, 404, "there are POST /predict"),
        ("/predict", None, 404, "there are POST /predict"),
    ):
        found = get(port, path, sent)
        assert found[0] == status, (path, found)
        assert says in json.loads(found[1])["error"]
    for raw in (RNG.bytes(4000), b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as garbage:
            garbage.sendall(raw)
            garbage.recv(10)
    assert get(port, "/predict?task=pets", body)[0] == 200


def test_slow_clients_take_no_ones_place(server):
    """220 requests may wait; 250 whose bodies never end are none of them."""
    port = server[0]
    head = b"POST /predict?task=pets HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nx"
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(250)]
    try:
        for each in slow:
            each.sendall(head)
        time.sleep(0.5)
        began = time.monotonic()
        assert get(port, "/predict?task=pets", content(PHOTO))[0] == 200
        assert time.monotonic() - began < desk.PATIENCE / 2
        slow[0].settimeout(3 * desk.PATIENCE)
        assert b" 408 " in slow[0].recv(100)
    finally:
        for each in slow:
            each.close()


def test_two_hundred_at_once_are_all_answered(server):
    port = server[0]
    body = content(PHOTO)
    with ThreadPoolExecutor(200) as crowd:
        found = crowd.map(lambda i: get(port, f"/predict?task={['petals', 'pets'][i % 2]}", body), range(200))
        assert {each and each[0] for each in found} == {200}


def begin(port, body):
    """A connection whose request is sent and not yet answered."""
    opened = socket.create_connection(("127.0.0.1", port), timeout=60)
    opened.sendall(
        f"POST /predict?task=pets HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )
    return opened


def test_a_full_server_sends_away_and_after_sigterm_answers_what_has_begun(packages, tmp_path):
    body = content(Image.new("RGB", (6000, 6000)))  # which takes a while to decode
    with serving(packages[1], tmp_path / "output", 4) as (port, process, output):
        statuses = [each.recv(12) for each in [begin(port, body) for _ in range(40)]]
        assert set(statuses) == {b"HTTP/1.1 200", b"HTTP/1.1 503"}
        begun = [begin(port, body) for _ in range(4)]
        time.sleep(0.5)
        assert not all(select.select([each], [], [], 0)[0] for each in begun), "this would prove nothing"
        process.terminate()
        assert {each.recv(12) for each in begun} == {b"HTTP/1.1 200"}
        assert process.wait(60) == 0
        assert output.read_text().splitlines()[1:] == ["answering what has begun, then stopping"]


# The load test's client, against a stand-in


async def stand_in(reader, writer):
    """Answers POST /predict after a moment, refuses other paths, hangs up on what is no HTTP."""
    head = await reader.readline()
    while (await reader.readline()).strip():
        pass
    if head.endswith(b"HTTP/1.1\r\n"):
        await asyncio.sleep(0.01)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" if b"/predict " in head else b"HTTP/1.1 404 No\r\n\r\n")
    writer.close()


def test_the_load_test_counts_what_it_is_answered(monkeypatch):
    monkeypatch.setattr(load_test, "LIMIT", 1.0)

    async def both():
        async with await asyncio.start_server(stand_in, "127.0.0.1", 0, limit=2**20) as listening:
            port = listening.sockets[0].getsockname()[1]
            good = await load_test.load(port, load_test.post(b"image"), 10, 50, 30)
            bad = await load_test.load(port, load_test.post(b"image", path="/other"), 3, 7, 30)
            abused = await load_test.abuse(port, load_test.post(b"image"), b"image", 5, 1.5)
        return good, bad, abused, await load_test.ask(port, load_test.post(b"image"))

    good, bad, abused, closed = asyncio.run(both())
    assert (good["requests"], good["errors"], good["statuses"]) == (50, 0, {200: 50})
    assert 0.01 <= good["p50"] <= good["p99"]
    assert good["rate"] <= 10 / 0.01
    assert (bad["errors"], bad["statuses"]) == (7, {404: 7})
    assert abused["errors"] == 0
    assert {0, 200, 404} & abused["garbage"].keys()
    assert closed == 0


# Triton

SCHEMA = {  # the part of triton-inference-server/common's model_config.proto that is written: field -> (number, type)
    "ModelConfig": {
        "name": (1, "string"), "max_batch_size": (4, "int32"), "input": (5, "*ModelInput"),
        "output": (6, "*ModelOutput"), "dynamic_batching": (11, "ModelDynamicBatching"),
        "parameters": (14, "*Entry"), "backend": (17, "string"),
    },
    "ModelInput": {"name": (1, "string"), "data_type": (2, "DataType"), "dims": (4, "*int64")},
    "ModelOutput": {
        "name": (1, "string"), "data_type": (2, "DataType"), "dims": (3, "*int64"), "label_filename": (4, "string"),
    },
    "ModelDynamicBatching": {
        "max_queue_delay_microseconds": (2, "uint64"), "default_queue_policy": (6, "ModelQueuePolicy"),
    },
    "ModelQueuePolicy": {"timeout_action": (1, "TimeoutAction"), "max_queue_size": (4, "uint32")},
    "Entry": {"key": (1, "string"), "value": (2, "ModelParameter")},
    "ModelParameter": {"string_value": (1, "string")},
}  # fmt: skip
ENUMS = {"DataType": {"TYPE_INVALID": 0, "TYPE_FP32": 11}, "TimeoutAction": {"REJECT": 0, "DELAY": 1}}


def parsed(text):
    """config.pbtxt through protobuf's own parser, by the schema above."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name, values in ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            label = kinds.LABEL_REPEATED if kind.startswith("*") else kinds.LABEL_OPTIONAL
            plain = kind.lstrip("*")
            added = message.field.add(name=field, number=number, label=label)
            if plain in SCHEMA or plain in ENUMS:
                added.type_name = f".t.{plain}"
                added.type = kinds.TYPE_MESSAGE if plain in SCHEMA else kinds.TYPE_ENUM
            else:
                added.type = getattr(kinds, f"TYPE_{plain.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    made = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))
    return text_format.Parse(text, made())


def test_triton_gets_a_model_for_each_task_that_computes_the_same(packages, tmp_path):
    assert triton.main([*map(str, packages), "--out", str(tmp_path / "repo")]) == ["petals", "pets", "toy"]
    pixels = random_pixels(7, 3, 32)
    logits = {}
    for task in ("toy", "pets", "petals"):
        folder, package = tmp_path / "repo" / task, Classifier(packages[task != "toy"])
        assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*")) == [
            "1/model.onnx", "config.pbtxt", "labels.txt",
        ]  # fmt: skip
        config = parsed((folder / "config.pbtxt").read_text())
        session = onnxruntime.InferenceSession(str(folder / "1" / "model.onnx"))
        (given,), (gives,) = session.get_inputs(), session.get_outputs()
        assert (config.name, config.backend, config.max_batch_size) == (task, "onnxruntime", 16)
        assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [(given.name, 11, given.shape[1:])]
        assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [(gives.name, 11, gives.shape[1:])]
        assert config.dynamic_batching.max_queue_delay_microseconds == 5000
        assert config.dynamic_batching.default_queue_policy.max_queue_size == 512
        assert {p.key: json.loads(p.value.string_value) for p in config.parameters}["image_mean"] == [0.5, 0.4, 0.3]
        labels = (folder / config.output[0].label_filename).read_text("utf-8").splitlines()
        assert labels == [" ".join(label.split()) for label in package.manifest["tasks"][task]["labels"]]
        (logits[task],) = session.run(None, {"pixel_values": package.normalize(pixels)})
        assert relative_error(logits[task], package.logits(pixels, task)) < 1e-5
    assert relative_error(logits["pets"], logits["petals"]) > 1e-2, "the tasks agree, so this test would prove nothing"


def test_a_slot_that_is_not_filled_is_noticed_and_nothing_is_written(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(triton, "fill", lambda *a: None)
    refused_command(triton.main, [packages[1], "--out", tmp_path / "repo"], "differ by .* of the largest logit")
    assert list(tmp_path.iterdir()) == []


def test_what_triton_cannot_take_is_refused(packages, tmp_path):
    out = tmp_path / "repo"
    refused_command(
        triton.main, [packages[0], packages[0], "--out", out], "both have a task 'toy'; give each its --out"
    )
    refused_command(triton.main, [packages[0], "--out", out, "--variant", "int4"], "has no variant 'int4'")
    twice = [packages[0], "--out", out, "--variant", "int8", "--batch", 2]
    refused_command(triton.main, twice, "int8 takes its scales from a whole batch, and --batch is 2")
    refused_command(triton.main, [packages[0], "--out", out, "--batch", 0], "--batch 0 must be at least 1")
    refused_command(triton.main, [packages[0], "--out", tmp_path], "exists; name another folder")
    assert list(tmp_path.iterdir()) == []
