import json
import shutil

import numpy as np
import pytest
from PIL import Image

from export.images import decode
from vtab import folder, generated
from vtab.data import open_task
from vtab.folder import FILE
from vtab.lists import write_lists
from vtab.tasks import TASKS, find


@pytest.fixture(scope="module")
def sprites():
    return open_task("dsprites_loc")


@pytest.fixture(scope="module")
def once_written(sprites, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "dsprites_loc"
    write_lists(sprites, folder, test_limit=4)
    return folder


@pytest.fixture
def written(once_written, tmp_path):
    """A VTAB-1k folder with full training lists and four test images, that a test may spoil."""
    shutil.copytree(once_written, tmp_path / "dsprites_loc")
    return tmp_path


@pytest.fixture
def class_folders(tmp_path):
    for name, grey in (("cat", 40), ("dog", 200)):
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.new("RGB", (9, 7), (grey + i, grey, grey)).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_the_table_has_vtabs_nineteen_tasks_in_three_groups():
    groups = [task.group for task in TASKS.values() if task.group != "extra"]
    assert [groups.count(g) for g in ("natural", "specialized", "structured")] == [7, 4, 8]
    assert sum(task.test_images for task in TASKS.values() if task.group != "extra") == 387_905
    assert find("pets").id == "oxford_iiit_pet"


def test_an_unknown_task_gets_near_names():
    with pytest.raises(ValueError, match=r"unknown task 'dsprite_loc'.*'dsprites_loc'"):
        open_task("dsprite_loc")


def test_a_task_without_data_says_what_it_needs():
    with pytest.raises(ValueError, match=r"'dtd' needs its images: --data-root FOLDER.*digits"):
        open_task("dtd")


def test_sprite_labels_follow_vtabs_rules():
    for index in (0, 31, 32, 5 * 1024, 39 * 1024 + 31 * 32, 737_279):
        shape, scale, angle, x, y = generated.latents(index)
        assert (((shape * 6 + scale) * 40 + angle) * 32 + x) * 32 + y == index
        assert generated.location(index) == x // 2
        assert generated.orientation(index) == int(angle / 2.5)
    assert {generated.orientation(angle * 1024) for angle in range(40)} == set(range(16))


def test_a_sprite_sits_where_its_latents_say():
    for x, y in ((0, 0), (31, 5), (16, 31)):
        pixels = np.asarray(generated.draw((2 * 40 + 7) * 1024 + x * 32 + y))
        assert set(np.unique(pixels)) == {0, 255}
        rows, columns = np.nonzero(pixels)
        assert abs(columns.mean() + 0.5 - (16 + x)) < 1
        assert abs(rows.mean() + 0.5 - (16 + y)) < 1


def test_no_sprite_touches_the_border():
    for corner in (0, 31, 31 * 32, 1023):
        for shape in range(3):
            pixels = np.asarray(generated.draw(((shape * 6 + 5) * 40 + 5) * 1024 + corner))
            assert not np.concatenate([pixels[[0, -1]].ravel(), pixels[:, [0, -1]].ravel()]).any()


def test_the_sprites_order_is_frozen(sprites):
    assert sprites.splits["train"].names[:3] == ["sprite 411381", "sprite 138274", "sprite 149609"]
    sizes = {name: len(split) for name, split in sprites.splits.items()}
    assert sizes == {"train": 800, "val": 200, "trainval": 1000, "test": 73_728}
    assert not set(sprites.splits["trainval"].names) & set(sprites.splits["test"].names)


def test_digits_are_split_800_200_797_without_overlap():
    splits = open_task("digits").splits
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 800,
        "val": 200,
        "trainval": 1000,
        "test": 797,
    }
    assert len(set(splits["trainval"].names) | set(splits["test"].names)) == 1797
    assert np.bincount(splits["val"].labels).min() >= 19  # stratified


def test_decoding_gives_square_uint8_and_pieces_equal_the_whole():
    split = open_task("digits").splits["test"].head(7)
    whole = split.decode(24)
    assert whole.shape == (7, 24, 24, 3)
    assert whole.dtype == np.uint8
    assert whole.std() > 10
    assert np.array_equal(np.concatenate([images for images, _ in split.batches(24, 3)]), whole)


def test_written_lists_read_back_as_the_same_task(sprites, written):
    read = open_task("dsprites_loc", written, partial=True)
    for name, count in (("train", 800), ("val", 200), ("test", 4)):
        assert np.array_equal(read.splits[name].labels, sprites.splits[name].labels[:count])
    assert np.array_equal(read.splits["test"].decode(56), sprites.splits["test"].head(4).decode(56))
    assert len(read.classes) == 16


@pytest.mark.parametrize("nest", ["dsprites_position", "vtab-1k/dsprites_loc"])
def test_aliases_and_the_archives_top_folder_are_found(written, nest):
    (written / nest).parent.mkdir(exist_ok=True)
    (written / "dsprites_loc").rename(written / nest)
    assert len(open_task("dsprites_loc", written, partial=True).splits["test"]) == 4


def _edit(root, file, change):
    path = root / "dsprites_loc" / file
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


BAD_LISTS = {
    "missing image": (
        "test.txt",
        lambda rows: ["images/test/none.png 3", *rows],
        r"test.txt:1: the image images/test/none",
    ),
    "leaves the root": ("test.txt", lambda rows: ["../../secret.png 3", *rows], r"'\.\./\.\./secret.png' leads out of"),
    "absolute path": ("test.txt", lambda rows: ["/etc/secret.png 3", *rows], r"'/etc/secret.png' leads out of"),
    "label out of range": (
        "val200.txt",
        lambda rows: [*rows[:-1], "images/val200/000000.png 16"],
        r"val200.txt:200: label 16",
    ),
    "negative label": (
        "val200.txt",
        lambda rows: [*rows[:-1], "images/val200/000000.png -1"],
        r"val200.txt:200: .* is not",
    ),
    "empty line": ("train800.txt", lambda rows: [rows[0], "", *rows[1:]], r"train800.txt:2: '' is not 'path label'"),
    "wrong count": ("train800.txt", lambda rows: rows[:-1], r"train800.txt has 799 lines instead of 800"),
    "other labels together": (
        "train800val200.txt",
        lambda rows: [f"{row.rsplit(' ')[0]} 0" for row in rows],
        r"train800val200.txt does not hold the labels",
    ),
}


@pytest.mark.parametrize("case", BAD_LISTS)
def test_a_bad_list_is_refused_by_file_and_line(written, case):
    file, change, message = BAD_LISTS[case]
    _edit(written, file, change)
    with pytest.raises(ValueError, match=message):
        open_task("dsprites_loc", written, partial="count" not in case)


def test_a_test_list_of_another_length_needs_partial(written):
    with pytest.raises(ValueError, match=r"test.txt has 4 lines instead of 73728; .*--partial"):
        open_task("dsprites_loc", written)


def test_a_missing_list_names_the_layout(written):
    (written / "dsprites_loc" / "val200.txt").unlink()
    with pytest.raises(ValueError, match=r"val200.txt is missing; the VTAB-1k layout has"):
        open_task("dsprites_loc", written)


def test_a_link_out_of_the_root_is_refused(written, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (4, 4)).save(outside)
    image = written / "dsprites_loc" / "images" / "test" / "000001.png"
    image.unlink()
    image.symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of"):
        open_task("dsprites_loc", written, partial=True)


def test_a_truncated_image_is_named(written):
    path = written / "dsprites_loc" / "images" / "test" / "000002.png"
    path.write_bytes(path.read_bytes()[:60])
    split = open_task("dsprites_loc", written, partial=True).splits["test"]
    with pytest.raises(ValueError, match=r"images/test/000002.png does not decode"):
        split.decode(56)


def test_an_exif_turned_image_is_set_upright(class_folders):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter to the right
    left_black = Image.new("RGB", (40, 20), "white")
    left_black.paste("black", (0, 0, 20, 20))
    left_black.save(class_folders / "cat" / "0.jpg", exif=exif)
    data = open_task("", class_folders)
    names = data.splits["trainval"].names + data.splits["test"].names
    split = "trainval" if "cat/0.jpg" in data.splits["trainval"].names else "test"
    index = data.splits[split].names.index("cat/0.jpg")
    pixels = data.splits[split].decode(20, index, index + 1)[0]
    assert len(names) == 21
    assert pixels[:8].mean() < 40  # the black half is on top now
    assert pixels[-8:].mean() > 200


def test_a_folder_is_told_from_others_of_its_name_and_is_the_same_wherever_it_lies(class_folders, tmp_path_factory):
    known = open_task("", class_folders).facts
    moved = open_task("", shutil.copytree(class_folders, tmp_path_factory.mktemp("elsewhere") / "photos")).facts
    assert (moved["digest"], moved["test_digest"]) == (known["digest"], known["test_digest"])
    one = next((class_folders / "cat").glob("*"))
    Image.new("RGB", (33, 17)).save(one)
    other = open_task("", class_folders).facts
    assert other["digest"] != known["digest"]


def test_images_are_read_as_a_package_reads_them(class_folders):
    """Transparency on white, 16-bit grey scaled: else a run would be trained on other pixels than it is used on."""
    clear = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    clear.save(class_folders / "cat" / "0.png")
    Image.fromarray(np.full((20, 40), 257 * 99, np.uint16)).save(class_folders / "cat" / "1.png")
    data = open_task("", class_folders)
    for name, grey in (("cat/0.png", 255), ("cat/1.png", 99)):
        split = next(split for split in data.splits.values() if name in split.names)
        index = list(split.names).index(name)
        pixels = split.decode(20, index, index + 1)[0]
        assert (pixels == grey).all()
        shown = decode(class_folders / name).resize((20, 20), Image.Resampling.BICUBIC)
        assert np.array_equal(pixels, np.asarray(shown))


def test_class_folders_are_split_once_and_stay_so(class_folders, capsys):
    first = open_task("", class_folders, seed=0)
    assert first.classes == ["cat", "dog"]
    assert [len(first.splits[s]) for s in ("train", "val", "trainval", "test")] == [12, 4, 16, 4]
    assert np.bincount(first.splits["test"].labels).tolist() == [2, 2]
    assert all(
        (label == 1) == name.startswith("dog/") for label, name in zip(*_rows(first.splits["test"]), strict=True)
    )
    again = open_task("", class_folders, seed=7)  # the written split wins over another seed
    assert again.splits["test"].names == first.splits["test"].names
    Image.new("RGB", (9, 7)).save(class_folders / "cat" / "new.png")
    assert open_task("", class_folders).facts["images_outside_split"] == 1
    assert "1 images of" in capsys.readouterr().out


def _rows(split):
    return split.labels, split.names


def test_another_seed_draws_another_split(class_folders):
    first = open_task("", class_folders, seed=0).splits["test"].names
    (class_folders / FILE).unlink()
    assert open_task("", class_folders, seed=1).splits["test"].names != first


def test_two_first_runs_with_different_seeds_share_one_split(class_folders, monkeypatch):
    draw = folder._draw

    def overtaken(files, seed):
        if seed == 0:
            open_task("", class_folders, seed=1)  # another process, while this one draws
        return draw(files, seed)

    monkeypatch.setattr(folder, "_draw", overtaken)
    first = open_task("", class_folders, seed=0)
    assert first.splits["test"].names == open_task("", class_folders).splits["test"].names
    assert json.loads((class_folders / FILE).read_text())["seed"] == 1


def test_a_split_file_elsewhere_leaves_the_folder_alone(class_folders, tmp_path_factory):
    path = tmp_path_factory.mktemp("splits") / "mine.json"
    open_task("", class_folders, split_file=path)
    assert json.loads(path.read_text())["classes"] == ["cat", "dog"]
    assert not (class_folders / FILE).exists()


BAD_SPLITS = {
    "no json": (lambda s: "oops", "is no split file"),
    "missing part": (lambda s: json.dumps({**s, "val": None}), "is no split file"),
    "other classes": (lambda s: json.dumps({**s, "classes": ["cat", "cow"]}), "was drawn for the classes"),
    "lost image": (lambda s: json.dumps({**s, "test": ["cat/99.png"]}), "lists cat/99.png"),
    "leaves the root": (lambda s: json.dumps({**s, "test": ["../x.png"]}), "leads out of"),
}


@pytest.mark.parametrize("case", BAD_SPLITS)
def test_a_bad_split_file_is_refused(class_folders, case):
    change, message = BAD_SPLITS[case]
    open_task("", class_folders)
    path = class_folders / FILE
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(ValueError, match=message):
        open_task("", class_folders)


def test_a_folder_without_classes_or_with_a_tiny_class_is_refused(class_folders, tmp_path_factory):
    with pytest.raises(ValueError, match="0 class folders"):
        open_task("", tmp_path_factory.mktemp("empty"))
    with pytest.raises(ValueError, match="is not a folder"):
        open_task("", class_folders / "absent")
    (class_folders / "cow").mkdir()
    Image.new("RGB", (9, 7)).save(class_folders / "cow" / "0.png")
    with pytest.raises(ValueError, match="class 'cow' has 1 images"):
        open_task("", class_folders)
