"""Masks: exact counts, partitions, 2:4 groups; drawn from their key alone, and frozen for good by digests."""

import hashlib
from collections import namedtuple

import numpy as np
import pytest
import torch

from capavision import masks
from capavision.masks import Factor, Sharing, checksum, complementary, random, smallest, stream, two_of_four

SHAPES = [(1, 1), (3, 7), (8, 768), (5, 27)]


def draw(key="0/host/A"):
    return lambda branch, count: stream(f"{key}/{branch}", count)


def digest(array):
    return hashlib.sha256(np.packbits(array).tobytes()).hexdigest()


def made(kind, branches, key="0/host/A", shape=(4, 12), density=None):
    factor = Sharing(branches=branches, density=density, masks=kind).factor(torch.ones(shape), key, dim=0)
    return factor.mask.numpy()


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("branches", [1, 2, 5])
def test_random_masks_keep_exactly_the_rounded_share(shape, density, branches):
    drawn = random(shape, branches, density, draw())
    assert drawn.shape == (branches, *shape)
    assert drawn.dtype == bool
    assert [m.sum() for m in drawn] == [round(density * shape[0] * shape[1])] * branches


def test_random_masks_have_no_favourite_entry():
    counts = sum(random((2, 5), 1, 0.5, draw(f"{i}/host/A"))[0].astype(int) for i in range(400))
    # 400 draws of 1/2: mean 200, deviation 10
    assert counts.min() > 150
    assert counts.max() < 250


def test_a_density_that_keeps_nothing_is_refused():
    assert random((1, 8), 1, 0.07, draw()).sum() == 1
    with pytest.raises(ValueError, match=r"density=0.05 keeps none of the 8 entries of a \(1, 8\) factor"):
        random((1, 8), 1, 0.05, draw())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("branches", [1, 2, 3, 4, 7])
def test_complementary_masks_use_every_entry_exactly_once(shape, branches):
    drawn = complementary(shape, branches, 1 / branches, draw())
    assert drawn.shape == (branches, *shape)
    assert (drawn.sum(0) == 1).all()


@pytest.mark.parametrize("branches", [2, 3, 4, 7])
def test_complementary_branches_differ_by_one_entry_at_most(branches):
    counts = complementary((5, 27), branches, 1 / branches, draw()).sum((1, 2))
    assert counts.max() - counts.min() == (135 % branches > 0)


@pytest.mark.parametrize("branches", [1, 2, 4, 6])
def test_two_of_four_keeps_two_of_every_four_along_the_last_axis(branches):
    drawn = two_of_four((6, 20), branches, 0.5, draw())
    assert drawn.shape == (branches, 6, 20)
    assert (drawn.reshape(branches, 6, 5, 4).sum(-1) == 2).all()


def test_two_of_four_branches_pair_up_as_complements_and_pairs_differ():
    drawn = two_of_four((6, 20), 4, 0.5, draw())
    assert (drawn[0] ^ drawn[1]).all()
    assert (drawn[2] ^ drawn[3]).all()
    assert (drawn[0] != drawn[2]).any()
    assert (drawn[0] != drawn[3]).any()


def test_two_of_four_draws_all_six_patterns_alike():
    groups = two_of_four((100, 48), 1, 0.5, draw()).reshape(-1, 4)
    patterns, counts = np.unique(groups, axis=0, return_counts=True)
    assert len(patterns) == 6
    assert counts.min() > 140  # of 1,200 groups, 200 each on average
    assert counts.max() < 260


@pytest.mark.parametrize(("shape", "fits"), [((3, 4), True), ((1, 8), True), ((4, 3), False), ((4, 6), False)])
def test_two_of_four_needs_a_reduction_axis_of_fours(shape, fits):
    if fits:
        assert two_of_four(shape, 2, 0.5, draw()).shape == (2, *shape)
    else:
        with pytest.raises(ValueError, match="2:4 masks need a reduction axis divisible by 4, and this factor is"):
            two_of_four(shape, 2, 0.5, draw())


ALL = [("random", 2), ("random", 3), ("complementary", 2), ("complementary", 3), ("2:4", 2), ("2:4", 4)]


@pytest.mark.parametrize(("kind", "branches"), ALL)
def test_masks_depend_on_the_key_alone(kind, branches):
    first = made(kind, branches)
    torch.manual_seed(123)
    np.random.seed(123)  # the global state is what must not matter
    made(kind, branches, key="0/other/A")
    assert np.array_equal(first, made(kind, branches))


@pytest.mark.parametrize(("kind", "branches"), ALL)
def test_masks_leave_the_global_generators_alone(kind, branches):
    torch.manual_seed(7)
    np.random.seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    made(kind, branches)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize(("kind", "branches"), ALL)
@pytest.mark.parametrize("other", ["1/host/A", "0/host/B", "0/host2/A", "0/host:q/A"])
def test_masks_differ_between_seeds_factors_and_modules(kind, branches, other):
    assert (made(kind, branches) != made(kind, branches, key=other)).any()


@pytest.mark.parametrize(("kind", "branches"), ALL)
def test_masks_differ_between_branches(kind, branches):
    drawn = made(kind, branches)
    assert len({m.tobytes() for m in drawn}) == branches


def test_a_branch_keeps_its_mask_when_more_branches_are_asked_for():
    assert np.array_equal(made("random", 2), made("random", 5, density=0.5)[:2])


# Frozen: a saved file holds the seed and not the masks, so another generator would make every file unreadable.
GOLDEN = [
    ("random", 2, None, "1092152561dba1cbcb4f6eda26dfe693f4ae584d029542ef81172f591cd3f8f6"),
    ("random", 4, 0.25, "e7086fb1601c1993b16d5b6e8393337dcb3a8218738e88b8b6cd07362399de0d"),
    ("complementary", 2, None, "b61c4f33a9e6b0bf9c53289fcd92a5c53cc062b4f9f504d96cd9d2411b9ab60d"),
    ("complementary", 3, None, "8bd1397a48e2269f469c7d7cee0b465c0c1e4eb5f3cb6a9b369b0a0ebf5804e5"),
    ("2:4", 2, None, "688e7f680000dd36a3f39b821717e8f0125662996c1e2b8791a5fa5e55c28ee9"),
    ("2:4", 4, None, "82f0f03bfdb31d6a1da775e71b25a95a5b3779f025579c119e6291119b912d7e"),
]


@pytest.mark.parametrize(("kind", "branches", "density", "expected"), GOLDEN)
def test_masks_are_those_of_the_first_release(kind, branches, density, expected):
    drawn = made(kind, branches, "0/blocks.0.attn.qkv:q/A", (8, 192), density)
    assert digest(drawn) == expected


ODD_AND_LARGE = [
    ("random", 3, 0.3, (5, 27), 0, "ad1415a30227d9c5a12125a32801f8c1f4a97430c41d9f88367c50d141708890"),
    ("random", 1, 0.07, (1, 8), 0, "36a9e7f1c95b82ffb99743e0c5c4ce95d83c9a430aac59f84ef3cbfab6145068"),
    ("random", 2, None, (96, 768), 0, "741d613da4350d311257f20bac6e686ffa2790e3517eab32575d259be4711a55"),
    ("complementary", 7, None, (5, 27), 1, "7d0630a534763cc1c1fb15372ef3d4cb00f7b1401164f9dc0d8fe936fba857de"),
    ("complementary", 4, None, (1, 3), 0, "e79e418e48623569d75e2a7b09ae88ed9b77b126a445b9ff9dc6989a08efa079"),
    ("complementary", 4, None, (64, 768), 1, "54b8595ddbad2f80f653718e3a1aced0d184989a92bcc6553bdc32d8fd80df64"),
    ("2:4", 6, None, (3, 20), 1, "f2c6077f28e38f8de88a7e50641801d08beb1081c031923f3f82f6326875c8fb"),
]


@pytest.mark.parametrize(("kind", "branches", "density", "shape", "dim", "expected"), ODD_AND_LARGE)
def test_masks_of_odd_and_large_factors_are_too(kind, branches, density, shape, dim, expected):
    sharing = Sharing(branches=branches, density=density, masks=kind)
    for _ in range(2):  # drawn, then perhaps from memory
        mask = sharing.factor(torch.ones(shape), "7/stages.1.conv/B", dim).mask
        assert digest(mask.movedim(dim, 0).numpy()) == expected


def test_initial_values_are_those_of_the_first_release():
    drawn = masks.uniform("7/stages.1.conv/B/init", 5, 27)
    assert drawn.dtype is torch.float64
    assert hashlib.sha256(drawn.numpy().tobytes()).hexdigest() == (
        "6b06e39c7ceed57b945e34c337b1a5a62ceced1fdee92cf9c997fe46699a3dd3"
    )


@pytest.mark.parametrize(("right", "left"), [(0, 0), (20, 0), (61, 0), (61, 61), (61, 46)])
@pytest.mark.parametrize("size", [1, 2, 13, 500])
def test_the_smallest_words_are_those_of_a_stable_sort(right, left, size):
    """With equal words, equal top 16 bits, or both."""
    words = stream("any", size) >> np.uint64(right) << np.uint64(left)
    counts = sorted({1, (size + 1) // 2, size})
    order = np.argsort(words, kind="stable")
    assert np.array_equal(smallest(words, counts), [np.isin(np.arange(size), order[:count]) for count in counts])


@pytest.mark.parametrize(("kind", "branches"), ALL)
def test_masks_from_memory_are_those_drawn_and_nobody_elses(kind, branches):
    masks.packed.cache_clear()
    first, second = (Sharing(branches=branches, masks=kind).factor(torch.ones(3, 4), "k", dim=0) for _ in range(2))
    assert masks.packed.cache_info()[:2] == (1, 1)  # hits, misses
    assert torch.equal(first.mask, second.mask)
    first.mask.logical_not_()
    third = Sharing(branches=branches, masks=kind).factor(torch.ones(3, 4), "k", dim=0)
    assert torch.equal(third.mask, second.mask)
    assert not torch.equal(third.mask, first.mask)


def test_large_masks_are_not_kept_in_memory():
    masks.packed.cache_clear()
    for rows, kept in ((64, 1), (65, 1)):
        Sharing(branches=2).factor(torch.ones(rows, 1024), "k", dim=0)
        assert masks.packed.cache_info().currsize == kept


def philox(key, count):
    """Philox4x64-10 in plain Python (Salmon et al., 2011), the counter starting at 1 as numpy's does."""
    words, low = [], 2**64 - 1
    for block in range(1, -(-count // 4) + 1):
        c, k = [block, 0, 0, 0], [key & low, key >> 64]
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [(p1 >> 64) ^ c[1] ^ k[0], p1 & low, (p0 >> 64) ^ c[3] ^ k[1], p0 & low]
            k = [(k[0] + 0x9E3779B97F4A7C15) & low, (k[1] + 0xBB67AE8584CAA73B) & low]
        words += c
    return words[:count]


@pytest.mark.parametrize("key", ["", "0/blocks.0.attn.qkv:q/A/0"])
def test_the_stream_is_raw_philox_keyed_by_the_first_half_of_a_sha256(key):
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
    assert stream(key, 11).tolist() == philox(number, 11)


def test_a_prefix_of_the_stream_is_the_shorter_stream():
    assert np.array_equal(stream("key", 100)[:10], stream("key", 10))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_factor_concatenates_its_masked_branches(dim):
    value = torch.randn(4, 8)
    factor = Sharing(branches=3).factor(value.clone(), "0/host/A", dim)
    drawn = torch.from_numpy(random((4, 8), 3, 0.5, draw()))
    assert torch.equal(factor(), torch.cat([value * m for m in drawn], dim))
    assert not torch.equal(*factor().chunk(3, dim)[:2])


@pytest.mark.parametrize("dim", [0, 1])
def test_a_factor_of_one_full_branch_is_its_value(dim):
    factor = Sharing().factor(torch.randn(4, 8), "0/host/A", dim)
    assert factor.mask is None
    assert factor() is factor.value


def test_masks_are_not_saved_and_not_trained():
    factor = Sharing(branches=2).factor(torch.randn(4, 8), "0/host/A", 0)
    assert list(factor.state_dict()) == ["value"]
    assert [name for name, _ in factor.named_parameters()] == ["value"]
    assert factor.mask.dtype is torch.bool


def test_a_factor_prints_its_shape_and_branches():
    assert "(4, 8), branches=2" in repr(Sharing(branches=2).factor(torch.randn(4, 8), "0/host/A", 0))
    assert "branches" not in repr(Sharing().factor(torch.randn(4, 8), "0/host/A", 0))


def test_the_checksum_tells_masks_apart_and_nothing_else():
    def factor(key="0/host/A", dim=0, scale=1.0):
        return Sharing(branches=2).factor(scale * torch.ones(4, 8), key, dim)

    plain = Sharing().factor(torch.ones(4, 8), "0/host/A", 0)
    known = checksum([factor()])
    assert known == checksum([factor(scale=3.0)])
    assert known == checksum([factor(dim=1)])  # the layout in memory is no property of the masks
    assert known == checksum([plain, factor()])
    assert known != checksum([factor("1/host/A")])
    assert known != checksum([factor(), factor()])
    assert checksum([factor("a"), factor("b")]) != checksum([factor("b"), factor("a")])
    assert checksum([]) == checksum([plain]) == hashlib.sha256().hexdigest()


def test_the_checksum_is_that_of_the_first_release():
    factors = [Sharing(branches=2).factor(torch.ones(4, 8), f"0/host/{factor}", 0) for factor in "AB"]
    assert checksum(factors) == "7b091ba91f9500360e12df079ea3c7f6b7c0bbd86142d4b1e15f698679c8607a"


def test_one_flipped_entry_changes_the_checksum():
    factor = Sharing(branches=2).factor(torch.ones(4, 8), "0/host/A", 0)
    before = checksum([factor])
    flipped = factor.mask.clone()
    flipped[0, 0, 0] ^= True
    factor.mask = flipped
    assert checksum([factor]) != before


@pytest.mark.parametrize(
    ("given", "density"),
    [
        ((), 1.0),
        ((1, None, "2:4"), 0.5),
        ((2,), 0.5),
        ((4,), 0.5),
        ((4, None, "complementary"), 0.25),
        ((3, None, "complementary"), 1 / 3),
        ((4, None, "2:4"), 0.5),
        ((4, 0.25), 0.25),
        ((1, 0.3), 0.3),
    ],
)
def test_the_density_has_a_default_for_every_kind(given, density):
    assert Sharing(**dict(zip(("branches", "density", "masks"), given, strict=False))).density == density


Case = namedtuple("Case", "accepted refused match")
CASES = [
    Case({"branches": 1}, {"branches": 0}, "branches=0 must be a whole number of at least 1"),
    Case({"branches": 2}, {"branches": -2}, "branches=-2 must be a whole number"),
    Case({"branches": 3}, {"branches": 2.0}, r"branches=2\.0 must be a whole number"),
    Case({"branches": 4}, {"branches": "2"}, "branches='2' must be a whole number"),
    Case({"masks": "random"}, {"masks": "Random"}, "masks='Random' is unknown; choose one of random, complem"),
    Case({"masks": "2:4"}, {"masks": "4:2"}, "masks='4:2' is unknown"),
    Case({"density": 1.0}, {"density": 1.01}, r"density=1\.01 must lie in \(0, 1\]"),
    Case({"density": 0.01}, {"density": 0.0}, r"density=0\.0 must lie in"),
    Case({"density": 0.5}, {"density": -0.5}, r"density=-0\.5 must lie in"),
    Case({"density": 0.5}, {"density": float("nan")}, "density=nan must lie in"),
    Case(
        {"branches": 2, "density": 0.5, "masks": "complementary"},
        {"branches": 2, "density": 0.25, "masks": "complementary"},
        "complementary masks share the entries out among 2 branches, so density is 0.5, not 0.25",
    ),
    Case(
        {"branches": 3, "masks": "complementary"},
        {"branches": 3, "density": 0.5, "masks": "complementary"},
        r"so density is 0\.333333, not 0\.5",
    ),
    Case(
        {"branches": 2, "density": 0.5, "masks": "2:4"},
        {"branches": 2, "density": 0.25, "masks": "2:4"},
        "2:4 masks keep half of every four entries: density is 0.5, not 0.25",
    ),
    Case({"branches": 2, "masks": "complementary"}, {"masks": "complementary"}, "branches is at least 2, not 1"),
    Case({"branches": 4, "masks": "2:4"}, {"branches": 3, "masks": "2:4"}, "branches is 1 or even, not 3"),
    Case({"branches": 2, "density": 0.99}, {"branches": 2, "density": 1.0}, "density=1 makes the 2 branches equal"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.refused))
def test_settings_that_cannot_be_served_are_refused(case):
    assert isinstance(Sharing(**case.accepted), Sharing)
    with pytest.raises(ValueError, match=case.match):
        Sharing(**case.refused)


def test_every_kind_of_mask_is_tested_here():
    assert masks.KINDS.keys() == {kind for kind, _ in ALL}
    assert isinstance(Sharing(branches=2).factor(torch.ones(2, 2), "", 0), Factor)
