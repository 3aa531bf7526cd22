"""vtab.data check on miniature copies, whole and damaged in every way."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.miniature import write_all, write_task
from vtab import cli, data, lists, tasks
from vtab.data import open_task

SPELLINGS = max(len(task.names) for task in tasks.VTAB)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_all(tmp_path_factory.mktemp("vtab"))


@pytest.fixture
def dtd(tmp_path):
    """A root with one whole task."""
    write_task(tmp_path / "dtd", tasks.find("dtd"))
    return tmp_path


def check(root, *argv):
    return data.main(["check", "--root", str(root), "--partial", *argv])


def refused(capsys, *argv, main=data.main):
    """What the user sees: the lines on stdout, and the one on stderr with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.run(lambda: main([str(a) for a in argv]))
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return out, lines[0]


@pytest.mark.parametrize("spelling", range(SPELLINGS))
def test_all_nineteen_tasks_pass_under_every_name(tmp_path, spelling, capsys):
    root = write_all(tmp_path / "vtab-1k", spelling, ".png" if spelling == 1 else ".jpg")
    found = check(root.parent)  # the archive's top folder is found
    table = capsys.readouterr().out.splitlines()
    assert len(found) == 19
    assert len(table) == 21  # head, tasks, sum
    assert {f.folder.name for f in found} >= {t.names[spelling] for t in tasks.VTAB if len(t.names) > spelling}
    assert {f.variant for f in found} == {"lossless" if spelling == 1 else "jpeg"}
    assert all(f.images == {"train": 4, "val": 2, "trainval": 6, "test": 3} and not f.faults for f in found)
    assert "19 tasks, 285 images: every image decodes" in table[-1]


def test_a_miniature_is_refused_without_the_flag(whole, capsys):
    out, said = refused(capsys, "check", "--root", whole)
    assert "train800.txt has 4 lines instead of 800" in out
    assert "76 faults in 19 of 19 tasks" in said


def test_every_name_that_others_use_leads_to_its_task():
    assert len(tasks.VTAB) == 19
    for task in tasks.VTAB:
        for name in (*task.names, task.paper_name, f"vtab-{task.id}", task.names[-1].replace('"', "'")):
            assert tasks.find(name) == task
        assert task.label_rule
        assert task.licence
        assert task.source
    assert tasks.find('dsprites(predicted_attribute="label_x_position", num_classes=16)').id == "dsprites_loc"
    names = 'dsprites(predicted_attribute="label_orientation",num_classes=16),pets,clevr(task="count_all")'
    assert [task.id for task in tasks.several(names)] == ["dsprites_ori", "oxford_iiit_pet", "clevr_count"]


def _lines(root, file, change):
    path = root / "dtd" / file
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))


def _truncate(root):
    path = root / "dtd/images/test/000001.jpg"
    path.write_bytes(path.read_bytes()[:-60])  # the header is whole, the pixels are not


DAMAGES = {
    "a list is missing": (lambda r: (r / "dtd/train800.txt").unlink(), r"train800.txt is missing; the VTAB-1k layout"),
    "a list is empty": (lambda r: (r / "dtd/val200.txt").write_text(""), r"val200.txt is empty"),
    "a list is binary": (lambda r: (r / "dtd/val200.txt").write_bytes(b"\xff\xfe"), r"val200.txt is no text file"),
    "a label is out of range": (
        lambda r: _lines(r, "test.txt", lambda rows: [rows[0].split()[0] + " 47", *rows[1:]]),
        r"test.txt:1: label 47 is out of range; the 47 classes are 0 … 46",
    ),
    "an image is missing": (
        lambda r: (r / "dtd/images/test/000002.jpg").unlink(),
        r"test.txt:3: the image images/test/000002.jpg is missing in .*; restore it, or fetch",
    ),
    "a test image is trained on": (
        lambda r: _lines(r, "test.txt", lambda rows: [*rows, "images/./train800/000001.jpg 0"]),
        r"test.txt: images/./train800/000001.jpg and 0 more of its images are trained on too; restore",
    ),
    "a validation image is trained on": (
        lambda r: _lines(r, "val200.txt", lambda rows: [rows[0], "images/train800/000001.jpg 0"]),
        r"val200.txt: images/train800/000001.jpg and 0 more of its images are trained on too; restore",
    ),
    "a name leads out": (
        lambda r: _lines(r, "test.txt", lambda rows: ["../../secret.jpg 0", *rows]),
        r"test.txt:1: '../../secret.jpg' leads out of",
    ),
    "half an image": (_truncate, r"dtd/images/test/000001.jpg does not decode .*; replace the image"),
    "an empty image": (
        lambda r: (r / "dtd/images/val200/000000.jpg").write_bytes(b""),
        r"val200/000000.jpg does not decode",
    ),
    "a jpeg named png": (
        lambda r: [
            (r / "dtd/images/test/000000.jpg").rename(r / "dtd/images/test/000000.png"),
            _lines(r, "test.txt", lambda rows: [rows[0].replace(".jpg", ".png"), *rows[1:]]),
        ],
        r"000000.png is JPEG inside, which its name hides",
    ),
    "two formats": (
        lambda r: [
            Image.new("RGB", (9, 9)).save(r / "dtd/images/test/x.png"),
            _lines(r, "test.txt", lambda rows: [*rows, "images/test/x.png 0"]),
        ],
        r"mixes formats \(.*\), so it is neither the jpeg nor the lossless copy",
    ),
    "other labels together": (
        lambda r: _lines(r, "train800val200.txt", lambda rows: [f"{row.split()[0]} 1" for row in rows]),
        r"train800val200.txt does not hold the labels of train800.txt and val200.txt together \(class",
    ),
    "a damaged mark": (lambda r: (r / "dtd/origin.json").write_text("[1]"), r"origin.json is damaged .*; fetch"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_fault_is_a_line_that_names_file_and_cure(dtd, damage, capsys):
    assert len(check(dtd, "--task", "dtd")) == 1
    capsys.readouterr()
    change, message = DAMAGES[damage]
    change(dtd)
    before = sorted(dtd.rglob("*"))
    out, said = refused(capsys, "check", "--root", dtd, "--partial", "--task", "dtd")
    lines = [line for line in out.splitlines() if line.startswith("dtd: ")]
    assert any(re.search(message, line) for line in lines), lines
    assert "of 1 tasks" in said
    assert sorted(dtd.rglob("*")) == before


def test_faults_are_counted_and_only_the_first_shown(dtd, capsys):
    shutil.rmtree(dtd / "dtd" / "images")
    out, said = refused(capsys, "check", "--root", dtd, "--partial", "--task", "dtd")
    assert "dtd: … and 10 more" in out
    assert "15 faults in 1 of 1 tasks" in said


def test_a_quick_look_finds_what_is_missing_but_decodes_nothing(dtd, capsys):
    _truncate(dtd)
    assert check(dtd, "--task", "dtd", "--quick")[0].faults == []
    (dtd / "dtd/images/test/000000.jpg").write_bytes(b"")
    out, _ = refused(capsys, "check", "--root", dtd, "--partial", "--task", "dtd", "--quick")
    assert "000000.jpg is empty (a broken copy?)" in out


def test_a_missing_task_names_the_command_that_gets_it(dtd, capsys):
    out, said = refused(capsys, "check", "--root", dtd, "--partial")
    assert f"cifar: {dtd}/cifar is not there, nor under another name; python -m vtab.data fetch --root {dtd}" in out
    assert "18 faults in 18 of 19 tasks" in said


def test_half_a_download_is_damaged_not_missing(dtd, capsys):
    for path in (dtd / "dtd").glob("*.txt"):
        path.unlink()
    out, _ = refused(capsys, "check", "--root", dtd, "--partial", "--task", "dtd")
    assert "dtd: " + str(dtd / "dtd" / "train800.txt") + " is missing" in out
    said = refused(capsys, "fetch", "--root", dtd, "--task", "dtd")[1]  # before anything is downloaded
    assert "are there but damaged, and were left alone" in said
    assert (dtd / "dtd" / "images" / "test" / "000000.jpg").is_file()


def test_a_wrong_root_is_told_from_a_damaged_one(dtd, capsys):
    assert "is not a folder" in refused(capsys, "check", "--root", dtd / "absent")[1]
    assert "is dtd's own folder; name its parent" in refused(capsys, "check", "--root", dtd / "dtd")[1]


def test_a_task_is_not_read_from_another_tasks_folder(dtd):
    assert len(open_task("dtd", dtd / "dtd", partial=True).splits["test"]) == 3
    with pytest.raises(ValueError, match=r"task 'sun397': .* holds no sun397/train800.txt .*vtab.data fetch"):
        open_task("sun397", dtd / "dtd", partial=True)


def test_both_lengths_of_caltechs_test_list_are_right(tmp_path):
    task = tasks.find("caltech101")
    write_task(tmp_path / "caltech101", task)
    rows = {"test": lists.read_list(tmp_path / "caltech101" / "test.txt")}
    for count, faults in ((6084, 0), (6085, 0), (6083, 1)):
        many = {"test": (rows["test"] * 2100)[:count]}
        assert len(list(lists.faults(tmp_path / "caltech101", many, task))) == faults


def test_the_record_says_jpeg_or_lossless_or_generated(tmp_path):
    task = tasks.find("cifar")
    for suffix, variant in ((".jpg", "jpeg"), (".png", "lossless")):
        write_task(tmp_path / variant / "cifar", task, suffix)
        facts = open_task("cifar", tmp_path / variant, partial=True).facts
        assert facts["variant"] == variant
        assert facts["generated"] is False
    lists.mark(tmp_path / "lossless" / "cifar", "drawn", "generated", generated=True)
    opened = open_task("cifar", tmp_path / "lossless", partial=True)
    assert opened.facts["variant"] == "generated"
    assert opened.facts["generated"] is True
    assert opened.source.startswith("drawn, ")


def test_images_that_were_jpeg_once_are_jpeg_in_whatever_form(tmp_path):
    write_task(tmp_path / "dtd", tasks.find("dtd"))
    lists.write_lists(open_task("dtd", tmp_path, partial=True), tmp_path / "png" / "dtd")
    assert (tmp_path / "png/dtd/images/test/000000.png").is_file()
    assert open_task("dtd", tmp_path / "png", partial=True).facts["variant"] == "jpeg"


def test_a_name_that_leads_out_is_never_opened(dtd, tmp_path_factory, capsys):
    outside = tmp_path_factory.mktemp("outside") / "secret.jpg"
    outside.write_bytes(b"no image")
    (dtd / "dtd/images/link").symlink_to(outside.parent)
    _lines(dtd, "test.txt", lambda rows: [f"{outside} 0", "images/link/secret.jpg 0", *rows])
    said, _ = refused(capsys, "check", "--root", dtd, "--partial", "--task", "dtd")
    assert said.count("leads out of") == 2
    assert "does not decode" not in said


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, at what it can still read
def test_damaged_images_never_end_in_another_error_than_ours(tmp_path):
    """Pillow raises many kinds of errors at damaged files; each must become one that names the image."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8))
    failed = 0
    for suffix in (".jpg", ".png", ".gif", ".bmp", ".tif", ".webp"):
        noise.save(tmp_path / f"a{suffix}")
        good = (tmp_path / f"a{suffix}").read_bytes()
        for i in range(60):
            bad = bytearray(good)
            for at in rng.integers(len(bad), size=1 + i % 7):
                bad[at] = rng.integers(256)
            path = tmp_path / f"b{suffix}"
            path.write_bytes(bad[: rng.integers(8, len(bad))] if i % 2 else bad)
            split = data.file_split(tmp_path, [path.name], [0])
            try:
                split.decode(8)
            except ValueError as error:
                failed += 1
                assert f"{path.name} does not decode" in str(error)  # noqa: PT017
    assert failed > 100
