"""The lossless copy: labels against slow references, splits against a stand-in and, if here, TensorFlow Datasets."""

import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.test_vtab_check import refused
from vtab import data, lists, lossless, tasks
from vtab.data import open_task


def by_thresholds(value, thresholds):
    """The rule as task_adaptation words it: the last threshold that lies strictly below the value."""
    label = None
    for i, threshold in enumerate(thresholds):
        if threshold - np.float32(value) < 0:
            label = i
    return label


def test_clevr_labels_against_a_slow_reference():
    rng = np.random.default_rng(0)
    seen = set()
    edges = [8.0, 8.5, 9.0, 9.5, 10.0, 7.999, 8.001, 99.0, 0.5]
    for nearest in [*edges, *rng.uniform(6, 12, 200)]:
        depths = np.sort(np.r_[nearest, nearest + rng.uniform(0, 9, rng.integers(2, 10))])
        coords = np.column_stack([rng.uniform(0, 400, (len(depths), 2)), rng.permutation(depths)]).astype(np.float32)
        example = {"objects": {"pixel_coords": coords, "size": np.zeros(len(coords))}}
        expected = by_thresholds(min(c[2] for c in coords), [0, 8, 8.5, 9, 9.5, 10, 100])
        assert lossless.clevr_dist(example) == expected
        assert lossless.clevr_count(example) == {3: 0, 4: 1, 5: 2, 6: 3, 7: 4, 8: 5, 9: 6, 10: 7}[len(coords)]
        seen.add(expected)
    assert seen == set(range(6))


def test_kitti_labels_against_a_slow_reference():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(300):
        kinds = rng.integers(0, 8, rng.integers(0, 6))
        where = rng.uniform(-3, 40, (len(kinds), 3)).astype(np.float32)
        if len(where) and rng.random() < 0.2:
            where[0, 2] = rng.choice([8.0, 20.0])
        nearest = np.float32(1000)
        for kind, (_, _, z) in zip(kinds, where, strict=True):
            if kind in (0, 1, 2):
                nearest = min(nearest, z)
        expected = by_thresholds(nearest, [-100, 8, 20, 999])
        assert lossless.kitti({"objects": {"type": kinds, "location": where}}) == expected
        seen.add(expected)
    assert seen == {0, 1, 2, 3}
    assert lossless.kitti({"objects": {"type": np.zeros(0, int), "location": np.zeros((0, 3))}}) == 3


def test_dsprites_labels_cover_sixteen_classes_evenly():
    assert [lossless.dsprites_loc({"label_x_position": np.int64(x)}) for x in range(32)] == [x // 2 for x in range(32)]
    found = [lossless.dsprites_ori({"label_orientation": np.int64(o)}) for o in range(40)]
    assert np.bincount(found).tolist() == [3, 2] * 8


def test_splits_have_vtabs_sizes_and_do_not_overlap():
    """Against the sizes of the sources as TensorFlow Datasets has them."""
    sizes = {
        "cifar": {"train": 50_000, "test": 10_000}, "eurosat": {"train": 27_000}, "resisc45": {"train": 31_500},
        "dsprites_loc": {"train": 737_280}, "smallnorb_azi": {"train": 24_300, "test": 24_300},
        "clevr_dist": {"train": 70_000, "validation": 15_000}, "svhn": {"train": 73_257, "test": 26_032},
        "oxford_iiit_pet": {"train": 3_680, "test": 3_669},
    }  # fmt: skip
    for name, parts in sizes.items():
        source = {part: [(part, i) for i in range(n)] for part, n in parts.items()}
        cut = {split: sliced(source, wanted) for split, wanted in lossless.splits(tasks.find(name)).items()}
        assert len(cut["train"]) == 800
        assert len(cut["val"]) == 200
        assert cut["trainval"] == cut["train"] + cut["val"]
        assert len(cut["test"]) == tasks.find(name).test_images
        assert len({*cut["trainval"], *cut["test"]}) == 1000 + len(cut["test"])


def sliced(source, wanted):
    """TensorFlow Datasets' slices: part[a:b] with counts or percents, joined by +."""
    chosen = []
    for piece in wanted.split("+"):
        part, start, stop = re.fullmatch(r"(\w+)(?:\[(\d*%?):(\d*%?)\])?", piece).groups()
        rows = source[part]

        def at(bound, default, rows=rows):
            if not bound:
                return default
            return len(rows) * int(bound[:-1]) // 100 if bound[-1] == "%" else int(bound)

        chosen += rows[at(start, 0) : at(stop, len(rows))]
    return chosen


def norb(rng, n):
    """Examples with smallNORB's features."""
    return [
        {
            "image": rng.integers(256, size=(12, 12, 1), dtype=np.uint8),
            "label_azimuth": int(rng.integers(18)),
            "label_elevation": int(rng.integers(9)),
            "label_category": 4,
        }
        for _ in range(n)
    ]


@pytest.fixture
def source():
    rng = np.random.default_rng(2)
    return {"train": norb(rng, 820), "test": norb(rng, 420)}


def assert_is_the_copy(root, source, version):
    for name, key in (("smallnorb_azi", "label_azimuth"), ("smallnorb_ele", "label_elevation")):
        opened = open_task(name, root, partial=True)
        expected = {"train": source["train"][:800], "val": source["test"][:200], "test": source["test"][210:]}
        expected["trainval"] = expected["train"] + expected["val"]
        for split, examples in expected.items():
            found = opened.splits[split]
            assert found.labels.tolist() == [example[key] for example in examples]
            for i in (0, 7, len(examples) - 1):
                pixels = np.asarray(found.read(i))
                assert pixels.shape == (12, 12, 3)
                assert (pixels == examples[i]["image"]).all()  # every channel, bit for bit
        assert opened.facts["variant"] == "lossless"
        assert opened.source == f"tfds {version}, lists in {name}"


NORB = ("--task", "smallnorb_azi,smallnorb_ele", "--source", "tfds", "--partial")


def test_the_copy_has_exact_splits_labels_and_pixels(source, tmp_path, monkeypatch):
    asked = []

    def as_dataset(split, shuffle_files, read_config):
        assert not shuffle_files
        assert read_config == {"interleave_cycle_length": 1, "try_autocache": False}
        asked.append(split)
        return sliced(source, split)

    info = SimpleNamespace(full_name="smallnorb/2.0.0")
    builder = SimpleNamespace(download_and_prepare=lambda: None, as_dataset=as_dataset, info=info)
    known = {"smallnorb:2.*.*": builder}
    fake = SimpleNamespace(builder=known.__getitem__, as_numpy=iter, ReadConfig=dict)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", fake)
    data.main(["fetch", "--root", str(tmp_path), *NORB])
    assert asked[:4] == ["train[:800]", "test[:200]", "train[:800]+test[:200]", "test[50%:]"]
    assert_is_the_copy(tmp_path, source, "smallnorb/2.0.0")
    assert data.main(["check", "--root", str(tmp_path), "--partial", *NORB[:2]])[0].variant == "lossless"


def test_a_later_version_is_taken_where_the_first_is_gone(monkeypatch):
    tried = []

    def builder(name):
        tried.append(name)
        if ":3" in name:
            raise AssertionError("cannot be loaded at version 3.*.*, only: 4.0.0")
        return SimpleNamespace(download_and_prepare=lambda: None)

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", SimpleNamespace(builder=builder))
    assert lossless._builder(tasks.find("pets"))
    assert tried == ["oxford_iiit_pet:3.*.*", "oxford_iiit_pet:4.*.*"]


def test_what_tensorflow_datasets_cannot_do_is_one_line(tmp_path, capsys, monkeypatch):
    def prepare():
        raise AssertionError("Manual directory /x does not exist.\n Create it and download the files there.")

    builder = SimpleNamespace(download_and_prepare=prepare)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", SimpleNamespace(builder=lambda name: builder))
    argv = ("fetch", "--root", tmp_path, "--source", "tfds", "--task", "resisc45")
    assert (
        "cannot prepare resisc45:3.*.* for resisc45: Manual directory /x does not exist. Create"
        in refused(capsys, *argv)[1]
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert 'pip install "capavision[tfds]"' in refused(capsys, *argv)[1]
    assert [p.name for p in tmp_path.iterdir()] == [".fetch.lock"]


def test_black_and_white_sprites_and_extra_channels():
    sprite = {"image": np.array([[[0], [1]]], np.uint8)}
    assert lossless.pixels(tasks.find("dsprites_loc"), sprite).tolist() == [[[0] * 3, [255] * 3]]
    clevr = {"image": np.arange(8, dtype=np.uint8).reshape(1, 2, 4)}
    assert lossless.pixels(tasks.find("clevr_count"), clevr).tolist() == [[[0, 1, 2], [4, 5, 6]]]


def test_the_real_library_gives_the_same_copy(source, tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets", reason='needs pip install "capavision[tfds]"')

    class Smallnorb(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("2.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(12, 12, 1)),
                "label_azimuth": tfds.features.ClassLabel(num_classes=18),
                "label_elevation": tfds.features.ClassLabel(num_classes=9),
                "label_category": tfds.features.ClassLabel(num_classes=5),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {part: enumerate(rows) for part, rows in source.items()}

        def _generate_examples(self):
            raise NotImplementedError

    builder = Smallnorb(data_dir=tmp_path / "tfds")
    builder.download_and_prepare()
    # its fixed order is that of the keys' hashes: the whole splits, read at once, tell it
    order = {part: list(tfds.as_numpy(builder.as_dataset(split=part, shuffle_files=False))) for part in source}
    assert not all((a["image"] == b["image"]).all() for a, b in zip(order["train"], source["train"], strict=True))
    monkeypatch.setattr(tfds, "builder", lambda name: builder)
    data.main(["fetch", "--root", str(tmp_path / "root"), *NORB])
    assert_is_the_copy(tmp_path / "root", order, "smallnorb/2.0.0")


def test_every_source_exists_in_the_real_library():
    tfds = pytest.importorskip("tensorflow_datasets", reason='needs pip install "capavision[tfds]"')
    with tfds.testing.mock_data(num_examples=2):
        for task in tasks.VTAB:
            builder = lossless._builder(task)
            example = next(iter(lossless._examples(builder, "train")))
            assert lossless.pixels(task, example).dtype == np.uint8
            if task.id != "kitti":  # whose mock has lists of different lengths for one object
                assert isinstance(lossless.label(task, example), int)


def test_lists_cover_the_rows():
    assert set(lossless.LABELS) == {task.id for task in tasks.VTAB if task.label_rule != tasks.OWN}
    assert set(lossless.splits(tasks.find("dtd"))) == set(lists.LISTS)
