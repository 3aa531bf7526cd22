"""vtab.data fetch: every source on miniature copies, and every way in which one can fail."""

import errno
import hashlib
import http.server
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.miniature import write_all, write_task
from tests.test_vtab_check import refused
from vtab import archive, data, disk, generated, hub, lists, tasks
from vtab.data import open_task

TREE = ("cifar", "dtd", "oxford_pet")  # what the small copies of these tests hold, the last by another name


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A folder with three whole tasks."""
    root = tmp_path_factory.mktemp("copy")
    for name in TREE:
        write_task(root / name, tasks.find(name))
    return root


@pytest.fixture(scope="module")
def packed(copy, tmp_path_factory):
    """The same as a zip, in the archive's form: one folder vtab-1k/ at the top, and what macOS adds."""
    return pack(copy, tmp_path_factory.mktemp("zip") / "vtab-1k.zip")


def pack(copy, path, **more):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for member in sorted(p for p in copy.rglob("*") if p.is_file()):
            file.write(member, f"vtab-1k/{member.relative_to(copy).as_posix()}")
        file.writestr("__MACOSX/vtab-1k/._dtd", b"junk")
        file.writestr("vtab-1k/dtd/.DS_Store", b"junk")
        for name, content in more.items():
            file.writestr(name, content)
    return path


def run(root, source, *argv):
    return data.main(["fetch", "--root", str(root), "--source", str(source), "--partial", *argv])


def bad(capsys, root, source, *argv):
    return refused(capsys, "fetch", "--root", root, "--source", source, "--partial", *argv)


def files(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name[0] != "."}


THREE = ("--task", "cifar,dtd,pets")


@pytest.mark.parametrize("source", ["copy", "packed"])
def test_a_copy_becomes_the_canonical_layout_byte_for_byte(source, copy, request, tmp_path, capsys):
    folders = run(tmp_path / "new", request.getfixturevalue(source), *THREE)
    assert [folder.name for folder in folders] == ["cifar", "dtd", "oxford_iiit_pet"]
    expected = {name.replace("oxford_pet/", "oxford_iiit_pet/"): content for name, content in files(copy).items()}
    assert files(tmp_path / "new") == expected
    assert "15 images, jpeg, licence: " in capsys.readouterr().out
    data.main(["check", "--root", str(tmp_path / "new"), "--partial", *THREE])


def test_all_nineteen_come_out_of_a_zip_under_every_spelling(tmp_path):
    for spelling in range(max(len(task.names) for task in tasks.VTAB)):
        path = pack(write_all(tmp_path / f"from{spelling}", spelling), tmp_path / f"{spelling}.zip")
        assert len(run(tmp_path / f"to{spelling}", path)) == 19


def test_what_is_there_is_skipped_and_what_is_damaged_there_is_left_alone(copy, packed, tmp_path, capsys):
    run(tmp_path, copy, "--task", "cifar,dtd")
    (tmp_path / "dtd" / "images/test/000000.jpg").unlink()
    before, times = files(tmp_path), (tmp_path / "cifar" / "test.txt").stat().st_mtime_ns
    capsys.readouterr()
    out, said = bad(capsys, tmp_path, packed, *THREE)
    assert "cifar: there already, jpeg" in out
    assert "dtd in " in said
    assert "left alone" in said
    after = files(tmp_path)
    assert {name: content for name, content in after.items() if not name.startswith("oxford")} == before
    assert (tmp_path / "cifar" / "test.txt").stat().st_mtime_ns == times
    assert lists.find_folder(tmp_path, "pets") == tmp_path / "oxford_iiit_pet"  # the others are fetched all the same


def test_a_source_without_the_task_is_refused_before_anything_is_written(copy, packed, tmp_path, capsys):
    for source in (copy, packed):
        assert "lacks svhn; pass --task with those it has" in bad(capsys, tmp_path, source, "--task", "cifar,svhn")[1]
        assert not files(tmp_path)
    for source, message in (("nowhere", "is neither hub, tfds"), (copy / "dtd" / "test.txt", "is no whole zip file")):
        assert message in bad(capsys, tmp_path, source, *THREE)[1]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "must hold folders such as cifar/" in bad(capsys, tmp_path, empty, *THREE)[1]


def test_a_damaged_source_leaves_no_folder(copy, tmp_path, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(copy, mine)
    (mine / "dtd" / "images" / "val200" / "000001.jpg").unlink()
    zipped = pack(mine, tmp_path / "mine.zip")
    for number, source in enumerate((mine, zipped)):
        said = bad(capsys, tmp_path / f"new{number}", source, *THREE)[1]
        assert "val200.txt:2: the image images/val200/000001.jpg is missing" in said
        assert {p.name for p in (tmp_path / f"new{number}").iterdir()} == {"cifar", ".fetch.lock"}


def test_lists_of_other_lengths_need_the_flag(copy, tmp_path, capsys):
    said = refused(capsys, "fetch", "--root", tmp_path, "--source", copy, "--task", "dtd")[1]
    assert "train800.txt has 4 lines instead of 800" in said
    assert not files(tmp_path)


# Hostile archives


def test_a_folder_that_lists_a_file_outside_is_refused(copy, tmp_path, capsys):
    mine = tmp_path / "mine"
    shutil.copytree(copy / "dtd", mine / "dtd")
    (tmp_path / "secret.jpg").write_bytes((mine / "dtd/images/test/000000.jpg").read_bytes())
    (mine / "dtd/images/test/000000.jpg").unlink()
    (mine / "dtd/images/test/000000.jpg").symlink_to(tmp_path / "secret.jpg")
    assert "leads out of" in bad(capsys, tmp_path / "new", mine, "--task", "dtd")[1]
    assert not files(tmp_path / "new")


@pytest.mark.parametrize(
    "name",
    ["../evil.jpg", "vtab-1k/dtd/images/../../../../evil.jpg", "/evil.jpg", "C:/evil.jpg", "vtab-1k\\..\\evil.jpg"],
)
def test_a_zip_with_a_path_that_leads_out_is_refused_whole(copy, tmp_path, name, capsys):
    path = pack(copy, tmp_path / "a.zip", **{name: b"evil"})
    said = bad(capsys, tmp_path / "new", path, *THREE)[1]
    assert "leads out of the folder; nothing was unpacked" in said
    assert not files(tmp_path / "new")
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_a_zip_with_a_link_or_a_device_is_refused_whole(copy, tmp_path, kind, capsys):
    path = pack(copy, tmp_path / "a.zip")
    member = zipfile.ZipInfo("vtab-1k/dtd/images/test/link.jpg")
    member.external_attr = (kind | 0o777) << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(member, "/etc/passwd")
    assert "a link or a device; nothing was unpacked" in bad(capsys, tmp_path / "new", path, *THREE)[1]
    assert not files(tmp_path / "new")


def test_bombs_twins_and_secrets_are_refused_whole(copy, tmp_path, capsys, monkeypatch):
    bomb = pack(copy, tmp_path / "bomb.zip", **{"vtab-1k/dtd/images/test/big.jpg": bytes(65 << 20)})
    assert "68,157,440 bytes, 67,108,864 at most make sense" in bad(capsys, tmp_path / "new", bomb, *THREE)[1]
    many = {f"vtab-1k/dtd/images/test/{i}.jpg": bytes(2 << 20) for i in range(40)}
    assert "would unpack to" in bad(capsys, tmp_path / "new", pack(copy, tmp_path / "many.zip", **many), *THREE)[1]
    with pytest.warns(UserWarning, match="Duplicate name"):
        twins = pack(copy, tmp_path / "twins.zip", **{"vtab-1k/dtd/test.txt": b"images/test/000000.jpg 0\n"})
    assert "holds vtab-1k/dtd/test.txt twice" in bad(capsys, tmp_path / "new", twins, *THREE)[1]
    locked = pack(copy, tmp_path / "locked.zip")
    content = bytearray(locked.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 8] |= 1  # the flag of the last member's entry
    locked.write_bytes(content)
    assert "which is encrypted" in bad(capsys, tmp_path / "new", locked, *THREE)[1]
    assert not files(tmp_path / "new")


def test_a_member_that_lies_about_its_size_or_is_damaged_leaves_no_folder(packed, tmp_path, capsys):
    for number, what in enumerate(("size", "content")):
        content = bytearray(packed.read_bytes())
        entry = content.index(b"vtab-1k/dtd/images/test/000001.jpg", content.index(b"PK\x01\x02")) - 46
        start = int.from_bytes(content[entry + 42 : entry + 46], "little")
        if what == "size":
            content[entry + 24 : entry + 28] = (10).to_bytes(4, "little")
        else:
            content[start + 100] ^= 0xFF
        path = tmp_path / f"{what}.zip"
        path.write_bytes(content)
        said = bad(capsys, tmp_path / f"new{number}", path, *THREE)[1]
        assert f"{path} is damaged at vtab-1k/dtd/images/test/000001.jpg" in said
        assert {p.name for p in (tmp_path / f"new{number}").iterdir()} == {"cifar", ".fetch.lock"}
    path.write_bytes(packed.read_bytes()[:-3000])
    assert "is no whole zip file" in bad(capsys, tmp_path / "cut", path, *THREE)[1]


# The disk


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(copy, packed, tmp_path, capsys, monkeypatch):
    small = shutil.disk_usage(tmp_path)._replace(free=disk.SPARE + 5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    for source in (copy, packed):
        said = bad(capsys, tmp_path / "new", source, *THREE)[1]
        assert "GiB are free in" in said
        assert "free some space, fewer --task, or another --root" in said
        assert not files(tmp_path / "new")
    monkeypatch.setattr(hub, "describe", lambda: ("commit", 4_660_000_000, "0" * 64))
    assert "the archive and what is unpacked from it needs 8.68 GiB" in bad(capsys, tmp_path / "new", "hub")[1]
    assert "the archive and what is unpacked from it needs 4.56 GiB" in bad(capsys, tmp_path / "new", "hub", *THREE)[1]


def test_a_disk_that_fills_up_costs_one_unfinished_task(packed, tmp_path, capsys, monkeypatch):
    written = []

    def full(source, target, length=0):
        written.append(target)
        if len(written) > 25:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(source, target, length)

    original = shutil.copyfileobj
    monkeypatch.setattr(archive.shutil, "copyfileobj", full)
    said = bad(capsys, tmp_path, packed, *THREE)[1]
    assert "is full (No space left on device); the unfinished task was removed, all else stays" in said
    assert {p.name for p in tmp_path.iterdir()} == {"cifar", ".fetch.lock"}
    monkeypatch.undo()
    assert len(run(tmp_path, packed, *THREE)) == 3  # the same command goes on


def test_a_real_limit_on_files_is_a_clear_line_too(tmp_path):
    """The kernel's own refusal, through RLIMIT_FSIZE: a list longer than the limit."""
    write_task(tmp_path / "from" / "dtd", tasks.find("dtd"))
    path = tmp_path / "from" / "dtd" / "test.txt"
    path.write_text(path.read_text() * 700)
    code = (
        "import resource, signal; from vtab import cli, data;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000));"
        f"cli.run(lambda: data.main(['fetch', '--root', {str(tmp_path / 'to')!r}, '--source', "
        f"{str(tmp_path / 'from')!r}, '--task', 'dtd', '--partial']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "is full (File too large); the unfinished task was removed" in done.stderr.splitlines()[-1]
    assert not files(tmp_path / "to")


# The hub


class Hub:
    """A hub on this machine, as far as the client asks for it, and what it was asked for."""

    def __init__(self, path: Path, sha256: str = "") -> None:
        content, asked = path.read_bytes(), []
        lfs = {"size": len(content), "sha256": sha256 or hashlib.sha256(content).hexdigest(), "pointerSize": 134}
        files = [{"rfilename": hub.FILE, "size": len(content), "blobId": "0" * 40, "lfs": lfs}]
        tree = [{"type": "file", "path": hub.FILE, "oid": "0" * 40, "size": len(content)}]
        about = {"id": hub.REPO, "sha": "c" * 40, "siblings": files, "private": False, "tags": [], "downloads": 0}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                span = self.headers.get("Range")
                asked.append((self.path, span))
                if self.path.startswith("/api/"):
                    body, status = json.dumps(tree if "/tree/" in self.path else about).encode(), 200
                else:
                    first, last = (int(n) for n in span.removeprefix("bytes=").split("-"))
                    body, status = content[first : last + 1], 206
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.asked, self.size = asked, len(content)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def fetch(self, root, *argv):
        """The command in a process of its own, for which this is the hub."""
        port = self.server.server_address[1]
        here = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{port}", "NO_PROXY": "*", "HF_HOME": str(root)}
        command = [sys.executable, "-m", "vtab.data", "fetch", "--root", str(root), "--partial", *argv]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | here, check=False)


def test_the_hubs_own_client_goes_on_where_an_earlier_download_stopped(packed, copy, tmp_path):
    served = Hub(packed)
    digest = hashlib.sha256(packed.read_bytes()).hexdigest()
    half = packed.read_bytes()[:1500]
    (tmp_path / f"vtab-1k-{digest[:12]}.zip.part").write_bytes(half)
    done = served.fetch(tmp_path, *THREE)
    assert done.returncode == 0, done.stderr
    spans = [span for path, span in served.asked if "/resolve/" in path]
    assert spans == [f"bytes=1500-{served.size - 1}"]
    assert all("c" * 40 in path for path, _ in served.asked if "/resolve/" in path)  # pinned to one commit
    for name in TREE:
        for file, content in files(copy / name).items():
            assert (tmp_path / tasks.find(name).id / file).read_bytes() == content
    assert lists.origin(tmp_path / "dtd")["source"] == f"hub XiN0919/VTAB-1k vtab-1k.zip, sha256 {digest[:12]}…"
    assert (tmp_path / f"vtab-1k-{digest[:12]}.zip").is_file()  # other tasks may follow without a download
    served.server.shutdown()


def hub_of(monkeypatch, path, sha256=None, stop_after=None):
    """The hub as two functions; the pieces are small, and end in an error after `stop_after` of them."""
    content = path.read_bytes()
    digest = sha256 or hashlib.sha256(content).hexdigest()
    starts = []

    def pieces(commit, start, stop):
        starts.append(start)
        for number, at in enumerate(range(start, stop, 1000)):
            if number == stop_after:
                raise ConnectionError("the line was cut")
            yield content[at : at + 1000]

    monkeypatch.setattr(hub, "describe", lambda: ("commit", len(content), digest))
    monkeypatch.setattr(hub, "pieces", pieces)
    return starts


def test_an_interrupted_download_keeps_what_it_has(packed, tmp_path, capsys, monkeypatch):
    starts = hub_of(monkeypatch, packed, stop_after=3)
    said = bad(capsys, tmp_path, "hub", *THREE)[1]
    assert f"the download stopped at 3,000 of {packed.stat().st_size:,} bytes (the line was cut)" in said
    assert "keeps them and the same command goes on" in said
    hub_of(monkeypatch, packed)
    starts = hub_of(monkeypatch, packed)
    run(tmp_path, "hub", *THREE)
    assert starts == [3000]
    assert not list(tmp_path.glob("*.part"))


def test_an_archive_that_is_not_what_the_hub_states_is_deleted(packed, tmp_path, capsys, monkeypatch):
    hub_of(monkeypatch, packed, sha256="ab" * 32)
    said = bad(capsys, tmp_path, "hub", *THREE)[1]
    assert "the hub states abababababab…; it was deleted" in said
    assert not files(tmp_path)


def test_a_hub_out_of_reach_names_the_other_sources(tmp_path, capsys):
    said = bad(capsys, tmp_path, "hub", *THREE)[1]  # tests are offline
    assert "the hub does not tell about XiN0919/VTAB-1k vtab-1k.zip" in said
    assert "pass --source with a copy you have" in said


def test_the_archive_goes_when_all_nineteen_are_there(tmp_path, monkeypatch, capsys):
    path = pack(write_all(tmp_path / "all"), tmp_path / "all.zip")
    hub_of(monkeypatch, path)
    assert len(run(tmp_path / "root", "hub")) == 19
    assert not list((tmp_path / "root").glob("*.zip*"))


# Two at once, and what a killed one leaves


def test_two_fetches_into_one_root_do_not_meet(copy, tmp_path, capsys):
    from filelock import FileLock

    with FileLock(tmp_path / ".fetch.lock"):
        assert "another process fetches into" in bad(capsys, tmp_path, copy, *THREE)[1]
    assert not files(tmp_path)


def test_what_a_killed_fetch_left_is_swept(copy, tmp_path):
    (tmp_path / ".dtd.abcd1234" / "images").mkdir(parents=True)
    run(tmp_path, copy, "--task", "dtd")
    assert {p.name for p in tmp_path.iterdir()} == {"dtd", ".fetch.lock"}


# Generated


def test_generated_tasks_are_marked_in_every_record(tmp_path, monkeypatch, capsys):
    few = {name: lambda name=name: _few(name) for name in ("dsprites_loc", "dsprites_ori")}
    monkeypatch.setattr(generated, "SOURCES", few)
    folders = run(tmp_path, "generated")
    assert [folder.name for folder in folders] == ["dsprites_loc", "dsprites_ori"]
    opened = open_task("dsprites_loc", tmp_path, partial=True)
    assert opened.facts["generated"] is True
    assert opened.facts["variant"] == "generated"
    assert opened.source == "dSprites-like (procedural), version 1, lists in dsprites_loc"
    drawn = _few("dsprites_loc").splits["test"]
    assert np.array_equal(opened.splits["test"].decode(64), drawn.decode(64))
    assert np.array_equal(opened.splits["test"].labels, drawn.labels)
    assert "cannot be generated" in bad(capsys, tmp_path, "generated", "--task", "dtd")[1]


_full = dict(generated.SOURCES)


def _few(name):
    task = _full[name]()
    ends = {"train": 5, "val": 3, "test": 4}
    few = {split: task.splits[split].head(end) for split, end in ends.items()}
    both = generated.Split(
        np.r_[few["train"].labels, few["val"].labels],
        lambda i: few["train"].read(i) if i < 5 else few["val"].read(i - 5),
        [*few["train"].names, *few["val"].names],
    )
    return data.Data(task.task, task.classes, {**few, "trainval": both}, task.source, task.facts)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    task, saved = _few("dsprites_loc"), []

    def save(self, path, *args):
        saved.append(path)
        if len(saved) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        Path(path).write_bytes(b"x")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match="No space left"):
        lists.write_lists(task, tmp_path / "dsprites_loc")
    assert not list(tmp_path.iterdir())
