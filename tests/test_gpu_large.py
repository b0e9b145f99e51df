"""Shapes past 2^31 elements, on a GPU: what lies there is right. Without one the same code runs on a few rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dlgpu
from conftest import DEVICE
from tolerance import assert_accurate, assert_same_bits

LARGE = DEVICE == "cuda"
ELEMENTS = (1 << 31) + (1 << 16) if LARGE else 1 << 10
# Compared with torch, at both ends.
ROWS = 4
DTYPE = torch.bfloat16


def rows_of(width: int) -> int:
    return -(-ELEMENTS // width)


def filled(*shape: int) -> torch.Tensor:
    """Random normal, made without a second copy in float32."""
    return torch.empty(*shape, device=DEVICE, dtype=DTYPE).normal_()


@pytest.fixture(autouse=True)
def memory():
    """Kernels, and on a GPU room for a few tensors of this size."""
    if LARGE and torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("takes 40 GiB of free memory")
    with dlgpu.use_backend("triton"):
        yield
    if LARGE:
        torch.cuda.empty_cache()


def ends(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t[:ROWS], t[-ROWS:]])


# What works on rows by themselves: (width, ours, torch's), of a matrix.
BY_ROW = {
    "activation": (4096, lambda x: dlgpu.functional.gelu(x), F.gelu),
    "softmax": (4096, lambda x: dlgpu.functional.softmax(x, -1), lambda x: F.softmax(x, -1)),
    "long softmax": (1 << 17, lambda x: dlgpu.functional.log_softmax(x, -1), lambda x: F.log_softmax(x, -1)),
    "layer_norm": (
        4096,
        lambda x: dlgpu.functional.layer_norm(x, x.shape[-1:]),
        lambda x: F.layer_norm(x, x.shape[-1:]),
    ),
    "rms_norm": (
        4096,
        lambda x: dlgpu.functional.rms_norm(x, x.shape[-1:]),
        lambda x: F.rms_norm(x, x.shape[-1:]),
    ),
}


def sized(width: int) -> int:
    return width if LARGE else min(width, 64)


@pytest.mark.parametrize("name", BY_ROW)
def test_rows(name):
    width, ours, theirs = BY_ROW[name]
    width = sized(width)
    x = filled(max(rows_of(width), 2 * ROWS), width).requires_grad_()
    y = ours(x)
    dy = filled(*y.shape)
    (dx,) = torch.autograd.grad(y, x, dy)
    few, upstream = ends(x.detach()), ends(dy)
    found = {}
    for dtype in (torch.float64, DTYPE):
        leaf = few.to(dtype).requires_grad_()
        result = theirs(leaf)
        found[dtype] = result.detach(), *torch.autograd.grad(result, leaf, upstream.to(dtype))
    for i, actual in enumerate((y, dx)):
        assert_accurate(ends(actual.detach()), found[torch.float64][i], found[DTYPE][i], f"result {i}")


@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_cross_entropy(grad_in_forward):
    classes = sized(1 << 15)
    x = filled(rows_of(classes), classes).requires_grad_()
    target = torch.randint(0, classes, (len(x),), device=DEVICE)
    loss = dlgpu.functional.cross_entropy(x, target, reduction="sum", grad_in_forward=grad_in_forward)
    (dx,) = torch.autograd.grad(loss, x)
    few, found = ends(x.detach()), {}
    for dtype in (torch.float64, DTYPE):
        leaf = few.to(dtype).requires_grad_()
        total = F.cross_entropy(leaf, ends(target), reduction="sum")
        (found[dtype],) = torch.autograd.grad(total, leaf)
    assert_accurate(ends(dx), found[torch.float64], found[DTYPE])


@pytest.mark.parametrize("unit", ["linear", "gated"])
def test_products(unit):
    """Results past 2^31, from and to few features."""
    width, depth = sized(4096), 16
    x = filled(rows_of(width), depth).requires_grad_()
    weight = filled(width * (2 if unit == "gated" else 1), depth).mul_(depth**-0.5).requires_grad_()

    def ours(x, w):
        if unit == "linear":
            return dlgpu.functional.linear(x, w, activation="silu")
        return dlgpu.functional.gated_linear(x, w)

    def theirs(x, w):
        if unit == "linear":
            return F.silu(F.linear(x, w))
        gate, up = F.linear(x, w).chunk(2, -1)
        return F.silu(gate) * up

    y = ours(x, weight)
    dy = filled(*y.shape)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    found = {}
    for dtype in (torch.float64, DTYPE):
        leaf, w = ends(x.detach()).to(dtype).requires_grad_(), weight.detach().to(dtype)
        result = theirs(leaf, w)
        found[dtype] = result.detach(), *torch.autograd.grad(result, leaf, ends(dy).to(dtype))
    for i, actual in enumerate((y, dx)):
        assert_accurate(ends(actual.detach()), found[torch.float64][i], found[DTYPE][i], f"result {i}")
    # The weight's gradient is a sum over all rows: that of the halves together.
    half = len(x) // 2
    parts = []
    for part in (slice(None, half), slice(half, None)):
        leaf = weight.detach().float().requires_grad_()
        y = ours(x.detach()[part].float(), leaf)
        parts += torch.autograd.grad(y, leaf, dy[part].float())
        del y
    exact = (parts[0].double() + parts[1].double()).detach()
    assert_accurate(dw, exact, exact.to(DTYPE), "the weight's gradient")


def test_a_step():
    """Parameters past 2^31: what is beyond steps as the same numbers do by themselves."""
    p = torch.nn.Parameter(filled(ELEMENTS))
    p.grad = filled(ELEMENTS)
    few = torch.nn.Parameter(ends(p.detach()[:, None])[:, 0].clone())
    few.grad = ends(p.grad[:, None])[:, 0].clone()
    for parameter in (p, few):
        dlgpu.optim.SGD([parameter], lr=0.1, weight_decay=0.01).step()
    assert_same_bits([ends(p.detach()[:, None])[:, 0]], [few.detach()])


def test_a_loss():
    x, t = filled(ELEMENTS).requires_grad_(), filled(ELEMENTS)
    loss = dlgpu.functional.mse_loss(x, t, reduction="sum")
    (dx,) = torch.autograd.grad(loss, x)
    edge = 1 << 10
    exact = {}
    for dtype in (torch.float64, DTYPE):
        leaf = x.detach()[-edge:].to(dtype).requires_grad_()
        (exact[dtype],) = torch.autograd.grad(F.mse_loss(leaf, t[-edge:].to(dtype), reduction="sum"), leaf)
    assert_accurate(dx[-edge:], exact[torch.float64], exact[DTYPE])
