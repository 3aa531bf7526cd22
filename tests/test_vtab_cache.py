"""Decode once: the cache of decoded images, its key, its memory, and what it does when something is wrong."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from capavision.files import cache_dir
from tests.miniature import write_task
from vtab import cache, cli, disk, tasks, train
from vtab.data import Split, open_task


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CAPAVISION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    write_task(tmp_path / "vtab" / "dtd", tasks.find("dtd"))
    return tmp_path / "vtab"


def opened(root, keep="train"):
    """The task, and how many images of each split have been read so far."""
    data, counts = open_task("dtd", root, partial=True), {}

    def counting(name, split):
        counts[name] = 0

        def read(i):
            counts[name] += 1
            return split.read(i)

        return dataclasses.replace(split, read=read)

    data = dataclasses.replace(data, splits={name: counting(name, split) for name, split in data.splits.items()})
    return cache.attach(data, keep), counts


def kept():
    return sorted(path.name for path in (cache_dir() / "images").glob("*.npy"))


def plain(split, size):
    """The slow reference: one image after another, with nothing of ours."""
    return np.stack(
        [
            np.asarray(split.read(i).convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
            for i in range(len(split))
        ]
    )


def test_images_are_decoded_once_and_come_back_as_they_were(root):
    expected = plain(open_task("dtd", root, partial=True).splits["train"], 16)
    assert expected.std() > 10
    data, counts = opened(root)
    for _ in range(3):
        assert np.array_equal(data.splits["train"].decode(16), expected)
        pieces = [images for images, _ in data.splits["train"].batches(16, 3)]
        assert [len(piece) for piece in pieces] == [3, 1]
        assert np.array_equal(np.concatenate(pieces), expected)
    assert counts["train"] == 4
    again, counts = opened(root)  # another process would find the same file
    assert np.array_equal(again.splits["train"].decode(16), expected)
    assert counts["train"] == 0
    assert len(kept()) == 1
    assert kept()[0].startswith("dtd-train-16-")


def test_what_is_kept_is_as_asked(root, monkeypatch):
    for keep, small, splits in (
        ("none", 5000, set()),
        ("train", 2, {"train", "val", "trainval"}),
        ("train", 3, {"train", "val", "trainval", "test"}),
        ("all", 2, {"train", "val", "trainval", "test"}),
    ):
        monkeypatch.setattr(cache, "SMALL", small)
        data, _ = opened(root, keep)
        for split in data.splits.values():
            split.decode(8)
        assert {name.split("-")[1] for name in kept()} == splits
    with pytest.raises(ValueError, match="--cache 'some' is unknown; choose none, train, all"):
        cache.attach(data, "some")


def test_a_glance_at_a_few_images_keeps_nothing(root):
    data, counts = opened(root, "all")
    assert len(data.splits["test"].decode(8, 0, 2)) == 2
    assert len(data.splits["test"].head(2).decode(8)) == 2
    assert counts["test"] == 4
    assert not kept()


def test_the_key_follows_images_size_and_folder(root, tmp_path):
    path = root / "dtd" / "images" / "train800" / "000002.jpg"
    opened(root)[0].splits["train"].decode(8)
    opened(root)[0].splits["train"].decode(9)
    assert len(kept()) == 2
    Image.new("RGB", (9, 12), "red").save(path)  # another image
    changed = opened(root)[0].splits["train"].decode(8)
    assert np.array_equal(changed, plain(open_task("dtd", root, partial=True).splits["train"], 8))
    assert abs(changed[2].astype(int) - [254, 0, 0]).max() < 3
    assert len(kept()) == 3
    os.utime(path, ns=(1, 1))  # maybe another image
    opened(root)[0].splits["train"].decode(8)
    shutil.copytree(root, tmp_path / "other")  # maybe another copy
    opened(tmp_path / "other")[0].splits["train"].decode(8)
    assert len(kept()) == 5


def test_drawn_images_are_keyed_by_what_is_drawn():
    loc, ori = (open_task(name).splits for name in ("dsprites_loc", "dsprites_ori"))
    assert loc["train"].identity() == ori["train"].identity()  # the same sprites, other labels
    assert loc["train"].identity() != loc["val"].identity()
    assert open_task("digits").splits["train"].identity is None


def test_a_corrupt_image_is_named_and_nothing_is_kept(root):
    path = root / "dtd" / "images" / "train800" / "000002.jpg"
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(ValueError, match=r"images/train800/000002.jpg does not decode .*; replace the image"):
        opened(root)[0].splits["train"].decode(8)
    assert not kept()
    assert not list((cache_dir() / "images").glob("*.part*"))


@pytest.mark.parametrize("damage", ["cut", "empty", "no header", "other type"])
def test_a_damaged_cache_file_is_made_again(root, damage):
    expected = opened(root)[0].splits["train"].decode(8)
    path = cache_dir() / "images" / kept()[0]
    whole = path.read_bytes()
    other = whole.replace(b"|u1", b"|i1")
    path.write_bytes({"cut": whole[:-9], "empty": b"", "no header": b"x" * len(whole), "other type": other}[damage])
    assert np.array_equal(opened(root)[0].splits["train"].decode(8), expected)
    assert path.read_bytes() == whole


def test_a_full_disk_costs_time_and_nothing_else(root, capsys, monkeypatch):
    expected = plain(open_task("dtd", root, partial=True).splits["train"], 8)
    small = shutil.disk_usage(root)._replace(free=disk.SPARE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    assert np.array_equal(opened(root)[0].splits["train"].decode(8), expected)
    said = capsys.readouterr().err
    assert "decoded images are not kept" in said
    assert "and 0.25 GiB are free in" in said
    monkeypatch.undo()
    monkeypatch.setenv("CAPAVISION_CACHE", str(root.parent / "cache"))

    def fills_up(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", fills_up)
    assert np.array_equal(opened(root)[0].splits["train"].decode(8), expected)
    assert "No space left on device" in capsys.readouterr().err
    assert not kept()


def test_two_processes_decode_a_split_once(root, tmp_path):
    """Side-by-side runs of a sweep: the second waits for the first one's file."""
    code = textwrap.dedent(f"""
        import time
        from vtab import cache
        from vtab.data import Data, Split, open_task
        data = open_task("dtd", __import__("pathlib").Path({str(root)!r}), partial=True)
        split = data.splits["train"]
        def read(i):
            open({str(tmp_path / "reads")!r}, "a").write("x")
            time.sleep(0.2)
            return split.read(i)
        slow = Split(split.labels, read, split.names, split.identity)
        data = cache.attach(Data(data.task, data.classes, {{"train": slow}}, data.source))
        print(data.splits["train"].decode(8).sum())
    """)
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {process.communicate(timeout=60)[0] for process in both}
    assert len(sums) == 1
    assert (tmp_path / "reads").read_text() == "xxxx"


def test_memory_stays_far_below_the_splits_size(tmp_path):
    """30,000 images of 64 pixels are 352 MiB decoded; writing and reading them may cost a fraction of that."""
    code = textwrap.dedent("""
        import pathlib, re, resource, sys
        import numpy as np
        from PIL import Image
        from vtab import cache
        from vtab.data import Data, Split
        count, size = 30_000, 64
        colours = np.arange(count) % 251
        images = [Image.new("RGB", (size, size), (int(c), 7, 9)) for c in range(251)]
        split = Split(colours, lambda i: images[i % 251], [""] * count, lambda: "memory")
        data = cache.attach(Data("t", [], {"test": split}, ""), "all")

        def peak():  # MiB; Linux lets ru_maxrss start from the parent's, so its own count is asked there
            status = pathlib.Path("/proc/self/status")
            if status.is_file():
                return int(re.search("VmHWM:\\s+(\\d+)", status.read_text())[1]) >> 10
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)

        data.splits["test"].decode(size, 0, 256)
        before = peak()
        seen = 0
        for images_, labels in data.splits["test"].batches(size, 256):
            assert (images_[:, 5, 5, 0] == labels).all() and (images_[:, 0, 0, 1] == 7).all()
            seen += len(images_)
        file, = (cache.cache_dir() / "images").glob("*.npy")
        print(seen, peak() - before, file.stat().st_size >> 20)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen, grown, size = map(int, done.stdout.split())
    assert seen == 30_000
    assert size == 351
    assert grown < 100, f"{grown} MiB more for a split of {size} MiB"


def command(root):
    data = ["--task", "dtd", "--data-root", str(root), "--partial"]
    return [*data, "--model", "test_vit", "--weights", "random", "--img-size", "32", "--epochs", "1", "--rank", "2"]


@pytest.mark.usefixtures("no_pictures")
def test_a_damaged_test_image_is_found_before_training(root, tmp_path):
    damaged = sorted((root / "dtd" / "images" / "test").iterdir())[-1]
    damaged.write_bytes(damaged.read_bytes()[:-40])
    with pytest.raises(ValueError, match=f"{damaged.name} does not decode"):
        train.main([*command(root), "--out", str(tmp_path / "runs"), "--name", "a"])
    assert not (tmp_path / "runs" / "a").exists(), "an epoch was trained first"
    train.main([*command(root), "--stage", "tune", "--out", str(tmp_path / "runs"), "--name", "b"])


@pytest.mark.usefixtures("no_pictures")
def test_a_run_decodes_its_training_images_once(root, tmp_path, monkeypatch):
    """Through the command: the second run of the same task reads no training file, and gives the same numbers."""
    tiny = [*command(root), "--out", str(tmp_path / "runs")]
    monkeypatch.setattr(cache, "SMALL", 2)
    first = train.main([*tiny, "--name", "a"])
    reads = []
    original = Split._pixels
    monkeypatch.setattr(
        Split, "_pixels", lambda self, i, size: [reads.append(self.names[i]), original(self, i, size)][1]
    )
    second = train.main([*tiny, "--name", "b"])
    assert not [name for name in reads if "train" in name]
    assert [name for name in reads if "test" in name]  # the test split is decoded again: it is not kept, being large
    rows = [json.loads((tmp_path / "runs" / name / "metrics.jsonl").read_text()) for name in "ab"]
    assert rows[0]["loss"] == rows[1]["loss"]
    assert first["accuracy"] == second["accuracy"]
    assert first["data"]["variant"] == "jpeg"
    reads.clear()
    train.main([*tiny, "--name", "a", "--cache", "all"])  # another --cache is the same run, finished already
    assert not reads
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: train.main([*tiny, "--name", "c", "--cache", "some"]))
    assert stop.value.code == 2
