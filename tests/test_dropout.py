"""Dropout: its mask, torch's semantics, and its byte law, on every backend."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dlgpu.functional
import dlgpu.nn
from dlgpu.fallback import dropout as arrays
from dlgpu.kernels import _triton
from dlgpu.kernels import dropout as kernels
from dlgpu.kernels._triton import launch, tl, triton
from tolerance import LAYOUTS, PAIRS, assert_same_bits, run

pytestmark = pytest.mark.usefixtures("poisoned")

INF, NAN = float("inf"), float("nan")
SEEDS = [0, 1, -1, 2**40 + 123456789, -(2**63), 2**63 - 1]


def op(x, seed, p, backend):
    return torch.ops.dlgpu.dropout(x, torch.tensor([seed], device=x.device), p, backend)


def philox(seed, counter, rounds):
    """Four numbers by the paper's definition, in Python's integers."""
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_is_the_papers():
    """Known answers of the reference implementation (Random123), at ten rounds; seven are the same loop, cut short."""
    assert philox(0, 0, 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for seed in SEEDS:
        # More than four billion counters.
        for start in (0, 4 * (2**32 - 2)):
            found = arrays.keep(np.array([seed]), start, start + 16, 0.3)
            words = [w for k in range(start // 4, start // 4 + 4) for w in philox(seed & (2**64 - 1), k, 7)]
            assert found.tolist() == [w >> 1 >= int(0.3 * 2**31) for w in words]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_mask_everywhere(device, seed, dtype):
    """Triton, NumPy and torch's operations, bit for bit."""
    for n, p in ((1, 0.5), (3, 0.1), (8, 1 - 1e-12), (1027, 0.1), (5000, 0.5)):
        x = torch.randn(n, dtype=dtype, device=device)
        found = op(x, seed, p, "triton")
        assert_same_bits([found.cpu()], [op(x.cpu(), seed, p, "fallback")])
        assert_same_bits([found], [op(x, seed, p, "torch")])


@triton.jit
def _mask_kernel(seed_ptr, out_ptr, offset, p, BLOCK: tl.constexpr):
    offs = offset + tl.arange(0, BLOCK).to(tl.int64)
    keep = kernels._keep(tl.load(seed_ptr), offs, p)
    tl.store(out_ptr + tl.arange(0, BLOCK), keep.to(tl.int8))


@pytest.mark.parametrize("start", [0, 4 * (2**32 - 2)])
def test_an_epilogues_mask(device, start):
    """The helper for elements in any order, past 2^32 counters too."""
    seed, out = torch.tensor([77], device=device), torch.empty(16, dtype=torch.int8, device=device)
    launch(_mask_kernel, (1,), seed, out, start, 0.4, BLOCK=16)
    assert out.tolist() == arrays.keep(np.array([77]), start, start + 16, float(np.float32(0.4))).tolist()


@pytest.mark.parametrize(("backend", "dtype"), PAIRS, indirect=["backend"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_values_and_gradients(backend, device, dtype, p):
    """Kept elements are scaled by 1 / (1 - p), rounded once; backward drops the same."""
    x = torch.randn(70, 33, dtype=dtype, device=device)
    y, dx = run(lambda x: dlgpu.functional.dropout(x, p), [x], lambda y: 2 * x)
    keep = y != 0
    scaled = (x.double() / (1 - p)).to(dtype)
    torch.testing.assert_close(y, torch.where(keep, scaled, 0))
    torch.testing.assert_close(dx, torch.where(keep, (2 * x.double() / (1 - p)).to(dtype), 0))
    # Binomial: six standard deviations.
    assert abs(keep.double().mean().item() - (1 - p)) < 6 * (p * (1 - p) / x.numel()) ** 0.5


def test_elements_are_independent():
    """Each of a million is dropped as often as its neighbours, and no matter what became of them."""
    n, p = 1 << 20, 0.3
    dropped = ~torch.from_numpy(arrays.keep(np.array([3]), 0, n, float(np.float32(p))))
    assert abs(dropped.double().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    other = ~torch.from_numpy(arrays.keep(np.array([4]), 0, n, float(np.float32(p))))
    for pair in (*((dropped[:-k], dropped[k:]) for k in (1, 2, 3, 4, 8, 1024)), (dropped, other)):
        both = (pair[0] & pair[1]).double().mean().item()
        assert abs(both - p * p) < 6 * (p * p * (1 - p * p) / n) ** 0.5
    for lane in range(4):
        assert abs(dropped[lane::4].double().mean().item() - p) < 5 * (p * (1 - p) / (n / 4)) ** 0.5


def test_torchs_seed(backend, device):
    """torch.manual_seed repeats it; each call draws another; a graph's backward drops what its forward did."""
    x = torch.randn(64, 40, device=device, requires_grad=True)
    torch.manual_seed(7)
    first, second = (dlgpu.functional.dropout(x) for _ in range(2))
    torch.manual_seed(7)
    again = dlgpu.functional.dropout(x)
    assert_same_bits([again], [first])
    assert not torch.equal(first, second)
    for y in (second, first):
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
        assert torch.equal(dx == 0, y == 0)
        assert_same_bits([dx], torch.autograd.grad(y, x, torch.ones_like(y)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend, device, layout):
    """The mask goes by an element's index, not by its address."""
    x = LAYOUTS[layout](torch.randn(9, 21, device=device))
    dy = LAYOUTS[layout](torch.randn(9, 21, device=device))
    torch.manual_seed(2)
    found = run(dlgpu.functional.dropout, [x], lambda y: dy)
    torch.manual_seed(2)
    assert_same_bits(found, run(dlgpu.functional.dropout, [x.contiguous()], lambda y: dy.contiguous()))


def test_nothing_is_dropped(backend, device, launches):
    """As torch: the input itself, and no random number is drawn."""
    torch.manual_seed(4)
    state = torch.get_rng_state()
    x = torch.randn(5, device=device)
    torch.set_rng_state(state)
    for args in ((0.0,), (0.5, False), (1.0, False), (0.5, False, True), (0.0, True, True)):
        assert dlgpu.functional.dropout(x, *args) is x
        assert F.dropout(x, *args).data_ptr() == x.data_ptr()
    assert dlgpu.functional.dropout(x[:0]).shape == (0,)
    assert torch.equal(torch.get_rng_state(), state)
    assert launches == []


def test_all_is_dropped(backend, device):
    x = torch.tensor([1.0, -1.0, NAN, INF], device=device)
    assert_same_bits([dlgpu.functional.dropout(x, 1.0)], [F.dropout(x, 1.0)])
    leaf = torch.ones(3, device=device, requires_grad=True)
    (dx,) = torch.autograd.grad(dlgpu.functional.dropout(leaf, 1.0).sum(), leaf)
    assert torch.equal(dx, torch.zeros_like(leaf))


def test_nan_and_infinity(backend, device):
    """As torch, which multiplies: what is dropped of them is NaN."""
    x = torch.tensor([NAN, INF, -INF], device=device).repeat_interleave(40)
    y = dlgpu.functional.dropout(x)
    assert y[:40].isnan().all()
    assert not y[40:].isfinite().any()
    assert 0 < y[40:].isnan().sum() < 80


def test_in_place(backend, device):
    x = torch.randn(40, device=device)
    before, version = x.clone(), x._version
    torch.manual_seed(1)
    y = dlgpu.functional.dropout(x, inplace=True)
    assert y is x
    assert x._version > version
    torch.manual_seed(1)
    assert_same_bits([x], [dlgpu.functional.dropout(before)])
    leaf = before.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        dlgpu.functional.dropout(leaf, inplace=True)
    # In the middle of a graph.
    torch.manual_seed(1)
    middle = leaf * 3
    dlgpu.functional.dropout(middle, inplace=True)
    (dx,) = torch.autograd.grad(middle.sum(), leaf)
    torch.testing.assert_close(dx, torch.where(x == 0, 0.0, 6.0))
    assert (dlgpu.functional.dropout(before, 1.0, True, True) == 0).all()


def test_gradcheck():
    x = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([9])
    for backend in ("fallback", "torch"):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda x, b=backend: torch.ops.dlgpu.dropout(x, seed, 0.3, b), [x])


def test_second_derivatives(backend, device):
    x, dy = (torch.randn(5, 7, device=device, requires_grad=True) for _ in range(2))
    y = dlgpu.functional.dropout(x)
    (first,) = torch.autograd.grad(y, x, dy, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), dy)
    torch.testing.assert_close(second, torch.where(y == 0, 0.0, 8.0) * dy)


def test_compiled():
    """In one graph, forward and backward, with the seed drawn inside: as without."""
    torch._dynamo.reset()

    def function(x):
        return dlgpu.functional.dropout(x * 2, 0.3)

    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, results = torch.randn(5, 9), []
    for f in (fast, fast, function):
        torch.manual_seed(6)
        results.append(run(f, [x], torch.ones_like))
    for found in results[:2]:
        assert_same_bits(found, results[2])
    torch._dynamo.reset()


def test_autocast_leaves_it_alone(backend, device):
    x = torch.randn(5, 9, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert dlgpu.functional.dropout(x).dtype == F.dropout(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((1.0,), TypeError, "input must be a Tensor, got float"),
        ((torch.ones(3).int(),), TypeError, "input must be float32, .* got torch.int32"),
        ((torch.ones(3), 1.5), ValueError, "dropout probability has to be between 0 and 1, but got 1.5"),
        ((torch.ones(3), -0.1), ValueError, "dropout probability has to be between 0 and 1, but got -0.1"),
        ((torch.ones(3), NAN), RuntimeError, "dropout probability has to be between 0 and 1, but got nan"),
        ((torch.ones(3), "a"), TypeError, "p must be a number, got str"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        dlgpu.functional.dropout(*args)
    if error is ValueError:
        with pytest.raises(error, match=message):
            dlgpu.nn.Dropout(args[1])


def test_the_module_is_torchs(backend, device):
    ours, theirs = dlgpu.nn.Dropout(0.3, True), torch.nn.Dropout(0.3, True)
    assert isinstance(ours, torch.nn.Dropout)
    assert repr(ours) == repr(theirs)
    x = torch.ones(200, device=device)
    assert copy.deepcopy(ours).eval()(x) is x
    y = ours(x)
    assert y is x
    assert 20 < (y == 0).sum() < 110


@pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2048, 3001])
def test_byte_law(dtype, n):
    """One read and one write, and the seed by each program."""
    from dlgpu.bench.meter import TrafficMeter

    x, seed = torch.randn(n, dtype=dtype), torch.tensor([5])
    with TrafficMeter() as meter:
        kernels.dropout_fwd(x, seed, 0.5, 2.0)
    moved, programs = 2 * n * dtype.itemsize, -(-n // 1024)
    (only,) = meter.launches
    assert (only.compulsory, only.requested) == (moved + 8, moved + 8 * programs)
    assert only.clean
