"""Structured matrices against slow references in float64: loops over the equations, scipy's builders, numpy.kron."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils.flop_counter import FlopCounterMode

import capavision as cv
from capavision.structured import blocks_for, circulant, toeplitz
from tests.conftest import assert_moved, awaken, awaken_deltas, images, outputs, tiny_vit

SQUARE = [(7, 7), (8, 8), (48, 48)]
OBLONG = [(32, 27), (27, 32), (5, 1), (1, 5), (12, 4), (4, 12), (9, 4)]


def site(n_out, n_in, seed=0):
    return cv.Site("host", n_out, n_in, seed, torch.empty(0, dtype=torch.float64))


def built(method, n_out, n_in):
    return awaken(method.build(site(n_out, n_in)), seed=n_out)


def dense(delta):
    return delta.weight().detach().numpy()


def cyclic(c, sign=1):
    n = len(c)
    return np.array([[c[i - j] if i >= j else sign * c[n + i - j] for j in range(n)] for i in range(n)])


def tiled_reference(squares, n_out, n_in):
    """ΔW[i, j] out of square blocks along the longer side, entry by entry."""
    n = min(n_out, n_in)
    if n_out >= n_in:
        return np.array([[squares[i // n][i % n][j] for j in range(n_in)] for i in range(n_out)])
    return np.array([[squares[j // n][i][j % n] for j in range(n_in)] for i in range(n_out)])


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_a_circulant_is_scipys_and_its_fft_product(n):
    c, x = np.random.default_rng(n).standard_normal((2, n))
    ours = circulant(torch.tensor(c)).numpy()
    np.testing.assert_array_equal(ours, scipy.linalg.circulant(c))
    np.testing.assert_array_equal(ours, cyclic(c))
    np.testing.assert_allclose(ours @ x, np.fft.irfft(np.fft.rfft(c) * np.fft.rfft(x), n=n), atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 7, 8])
def test_a_skew_circulant_has_the_roots_of_minus_one_as_its_spectrum(n):
    h, x = np.random.default_rng(n).standard_normal((2, n))
    root = np.exp(1j * np.pi * np.arange(n) / n)
    by_fft = (root.conj() * np.fft.ifft(np.fft.fft(root * h) * np.fft.fft(root * x))).real
    ours = circulant(torch.tensor(h), sign=-1).numpy()
    np.testing.assert_array_equal(ours, cyclic(h, -1))
    np.testing.assert_allclose(ours @ x, by_fft, atol=1e-12)


@pytest.mark.parametrize(("n_out", "n_in"), SQUARE + OBLONG)
def test_a_toeplitz_matrix_is_scipys(n_out, n_in):
    v = np.random.default_rng(0).standard_normal(n_out + n_in - 1)
    expected = scipy.linalg.toeplitz(v[n_in - 1 :], v[:n_in][::-1])
    np.testing.assert_array_equal(toeplitz(torch.tensor(v), n_out, n_in).numpy(), expected)


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize(("n_out", "n_in"), SQUARE + OBLONG)
def test_circulant_updates_follow_their_equation(n_out, n_in, product):
    delta = built(cv.Circulant(alpha=1.7, product=product), n_out, n_in)
    c = delta.M.c.detach().numpy() * (delta.M.a.detach().numpy() if product else 1)
    expected = 1.7 / np.sqrt(min(n_out, n_in)) * tiled_reference([cyclic(row) for row in c], n_out, n_in)
    np.testing.assert_allclose(dense(delta), expected, atol=1e-13)


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("kind", ["general", "symmetric"])
@pytest.mark.parametrize(("n_out", "n_in"), SQUARE + OBLONG)
def test_toeplitz_updates_follow_their_equation(n_out, n_in, kind, product):
    delta = built(cv.Toeplitz(alpha=1.7, kind=kind, product=product), n_out, n_in)

    def matrix(t, rows):
        t = t.detach().numpy()
        if kind == "symmetric":
            return scipy.linalg.toeplitz(t[:rows], t[:n_in])
        return np.array([[t[i - j + n_in - 1] for j in range(n_in)] for i in range(rows)])

    expected = matrix(delta.M.t, n_out) @ (matrix(delta.M.a, n_in) if product else np.eye(n_in))
    np.testing.assert_allclose(dense(delta), 1.7 / np.sqrt(min(n_out, n_in)) * expected, atol=1e-13)


@pytest.mark.parametrize(("n_out", "n_in"), SQUARE + OBLONG)
def test_kronecker_updates_are_numpys_kron(n_out, n_in):
    delta = built(cv.Kronecker(alpha=1.7), n_out, n_in)
    A, B = delta.M.A.detach().numpy(), delta.M.B.detach().numpy()
    np.testing.assert_allclose(dense(delta), 1.7 * np.kron(B, A), atol=1e-13)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("n_out", "n_in"), SQUARE + OBLONG)
def test_ldr_updates_follow_their_equation(n_out, n_in, rank):
    delta = built(cv.LDR(alpha=1.7, rank=rank), n_out, n_in)
    g, h = delta.M.g.detach().numpy(), delta.M.h.detach().numpy()
    squares = [sum(cyclic(a) @ cyclic(b, -1) for a, b in zip(*pair, strict=True)) for pair in zip(g, h, strict=True)]
    expected = 1.7 / np.sqrt(min(n_out, n_in)) * tiled_reference(squares, n_out, n_in)
    np.testing.assert_allclose(dense(delta), expected, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2])
def test_ldr_has_that_displacement_rank_and_full_rank(rank):
    n = 12
    delta = dense(built(cv.LDR(rank=rank), n, n))
    shift = np.eye(n, k=-1)
    corner = np.zeros((n, n))
    corner[0, -1] = 1
    displaced = (shift + corner) @ delta - delta @ (shift - corner)
    assert np.linalg.matrix_rank(displaced) == rank
    assert np.linalg.matrix_rank(delta) == n


@pytest.mark.parametrize("rank", [1, 4])
def test_an_ldr_matrix_needs_no_product_of_matrices(rank):
    delta = built(cv.LDR(rank=rank), 24, 12)
    with FlopCounterMode(display=False) as counter:
        delta.weight().square().sum().backward()
    assert counter.get_total_flops() == 0
    assert all(p.grad.abs().max() > 0 for p in delta.parameters())


def test_ldr_of_rank_2_holds_every_toeplitz_matrix():
    n = 6
    target = torch.tensor(scipy.linalg.toeplitz(*np.random.default_rng(0).standard_normal((2, n))))
    shift = torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    corner = torch.zeros(n, n, dtype=torch.float64)
    corner[0, -1] = 1
    U, S, V = torch.linalg.svd((shift + corner) @ target - target @ (shift - corner))
    assert S[2] < 1e-12
    delta = cv.LDR(alpha=n**0.5, rank=2).build(site(n, n))
    with torch.no_grad():
        delta.M.g.copy_((U[:, :2] * S[:2]).T[None] / 2)
        delta.M.h.copy_(V[:2].flip(-1)[None])
    torch.testing.assert_close(delta.weight().detach(), target, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("split", "rank"), [(None, 576), (24, 576), (32, 576), (16, 256), (48, 256), (8, 64)])
def test_kronecker_ranks_are_those_of_the_equation(split, rank):
    delta = dense(built(cv.Kronecker(split=split), 768, 768))
    assert np.linalg.matrix_rank(delta) == rank


@pytest.mark.parametrize("method", [cv.Circulant(), cv.Circulant(product=True), cv.Toeplitz(), cv.LDR()], ids=str)
def test_the_others_have_full_rank(method):
    assert np.linalg.matrix_rank(dense(built(method, 96, 96))) == 96


def count(method, n_out=768, n_in=768):
    return sum(p.numel() for p in method.build(site(n_out, n_in)).parameters())


@pytest.mark.parametrize(
    ("method", "values"),
    [
        (cv.Circulant(product=True), 36_864),
        (cv.Circulant(), 18_432),
        (cv.Toeplitz(kind="symmetric", product=True), 36_864),
        (cv.Toeplitz(kind="symmetric"), 18_432),
        (cv.Toeplitz(), 36_840),
        (cv.Kronecker(), 36_864),
        (cv.LDR(rank=1), 36_864),
        (cv.LDR(rank=2), 73_728),
        (cv.LDR(rank=4), 147_456),
        (cv.LoRA(rank=1), 36_864),
    ],
    ids=str,
)
def test_parameters_on_q_and_v_of_a_vit_b_are_the_papers(method, values):
    assert 24 * count(method) == values


def test_oblong_hosts_cost_what_the_equations_say():
    assert blocks_for(3072, 768) == (4, 768)
    assert count(cv.Circulant(), 3072, 768) == count(cv.Circulant(), 768, 3072) == 3072
    assert count(cv.LDR(rank=2), 3072, 768) == 4 * 2 * 2 * 768
    assert count(cv.Toeplitz(), 3072, 768) == 3072 + 768 - 1
    assert count(cv.Toeplitz(kind="symmetric"), 3072, 768) == 3072
    assert count(cv.Kronecker(), 3072, 768) == 3072 + 768


ADAPTERS = [cv.Circulant, cv.Toeplitz, cv.Kronecker, cv.LDR]


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("activation", ["gelu", "silu", "tanh"])
def test_the_adapter_form_is_the_activation_of_m_h_plus_bias(kind, activation):
    delta = awaken(kind(where="houlsby", activation=activation).build(site(6, 6)))
    y = torch.randn(2, 3, 6, dtype=torch.float64)
    act = {"gelu": lambda a: a * (1 + scipy.special.erf(a / 2**0.5)) / 2, "silu": lambda a: a / (1 + np.exp(-a))}
    M, bias = delta.M().detach().numpy(), delta.bias.detach().numpy()
    expected = act.get(activation, np.tanh)(y.numpy() @ M.T) + bias
    np.testing.assert_allclose(delta(None, y).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_adapter_form_costs_its_matrix_and_a_bias(kind):
    model = tiny_vit()
    report = cv.inject(model, kind(where="houlsby"))
    assert len(report.hosts) == 4
    assert report.trained == 4 * (count(kind(), 48, 48) + 48)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("where", ["weight", "houlsby"])
@pytest.mark.parametrize("product", [False, True])
def test_nothing_starts_dead(kind, where, product):
    """A delta that is 0 with a gradient of 0 would never train."""
    if product and "product" not in kind.__dataclass_fields__:
        pytest.skip("no product")
    model, x = awaken(tiny_vit()).double(), images().double()
    cv.inject(model, kind(where=where, **({"product": True} if product else {})))
    optimizer = torch.optim.SGD(cv.parameters(model), lr=0.5)
    plain = outputs(model, x)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert_moved(outputs(model, x), plain)
    assert all(p.grad.abs().max() > 0 for p in cv.parameters(model))


def test_relu_is_refused_because_it_starts_dead():
    with pytest.raises(ValueError, match=r"activation='relu' is unknown; choose one of gelu, silu, tanh"):
        cv.Circulant(where="houlsby", activation="relu")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cv.Circulant(alpha=0), "alpha=0 must be a finite int or float other than 0, which would leave M at 0"),
        (
            lambda: cv.LDR(where="beside"),
            "where='beside' is unknown; choose one of weight, pfeiffer, houlsby, parallel",
        ),
        (lambda: cv.Toeplitz(kind="upper"), "kind='upper' is unknown; choose one of general, symmetric"),
        (lambda: cv.LDR(rank=0), "rank=0 must be a whole number of at least 1"),
        (lambda: cv.Kronecker(split=0), "split=0 must be a whole number of at least 1"),
        (lambda: cv.inject(tiny_vit(), cv.Kronecker(split=7)), r"split=7 does not divide both sides of \(48, 48\)"),
    ],
)
def test_what_cannot_be_served_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", ADAPTERS)
def test_beside_a_bfloat16_weight_a_small_update_is_not_rounded_away(kind):
    """ΔW a thousandth of W is below bfloat16's resolution: added to W it would vanish."""
    model = tiny_vit().bfloat16()
    cv.inject(model, kind(), "blocks.0.attn.qkv", "qkv")
    host = awaken_deltas(model).blocks[0].attn.qkv
    with torch.no_grad():
        for name, p in host.named_parameters():
            if name.rpartition(".")[2] in ("c", "t", "B", "g"):
                p.mul_(1e-3)
    assert all(p.dtype is torch.float32 for p in host.delta.parameters())
    x = torch.randn(64, 48).bfloat16()
    delta = host.delta.weight().double()
    found = host.delta(x).double()
    expected = x.double() @ delta.T
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    torch.testing.assert_close(
        host(x), torch.nn.functional.linear(x, host._parameters["weight"], host.bias) + found.bfloat16()
    )


@pytest.mark.parametrize("kind", ADAPTERS)
def test_autocast_keeps_the_matrix_in_float32(kind):
    model, x = awaken(tiny_vit()), images()
    cv.inject(model, kind(), "all")
    awaken_deltas(model)
    expected = outputs(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0].attn.qkv.delta.weight().dtype is torch.float32
        found = outputs(model, x)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
