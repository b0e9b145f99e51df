"""The byte counter for torch operations, held to counts done by hand."""

import pytest
import torch
import torch.nn.functional as F

from dlgpu.bench import unfused
from dlgpu.bench.unfused import ByteCounter


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _count(function):
    with ByteCounter() as counter:
        function()
    return sum(row.read for row in counter.rows), sum(row.written for row in counter.rows)


X, Y = _meta(6, 10), _meta(6, 10)
INDEX = _meta(6, 2, dtype=torch.int64)
TABLE, TOKENS = _meta(100, 8), _meta(5, dtype=torch.int64)
NLL_BACKWARD = (_meta(), X, _meta(6, dtype=torch.int64), None, 1, -100, _meta())


@pytest.mark.parametrize(
    ("function", "read", "written"),
    [
        pytest.param(lambda: X + Y, 480, 240, id="two inputs"),
        pytest.param(lambda: X * X, 240, 240, id="one input twice"),
        pytest.param(lambda: X + _meta(10).expand(6, 10), 280, 240, id="stride 0"),
        pytest.param(lambda: X + X[:, :1], 264, 240, id="view"),
        pytest.param(lambda: X.t()[1:].unsqueeze(0), 0, 0, id="views"),
        pytest.param(lambda: X.add_(Y), 480, 240, id="in place"),
        pytest.param(lambda: torch.add(X, Y, out=_meta(6, 10)), 480, 240, id="out"),
        pytest.param(lambda: X.to(torch.bfloat16), 240, 120, id="cast"),
        pytest.param(lambda: _meta(6, 10), 0, 0, id="allocation"),
        pytest.param(lambda: torch.zeros_like(X), 0, 240, id="zeros"),
        pytest.param(lambda: X.zero_(), 0, 240, id="zero_"),
        pytest.param(lambda: X.fill_(1.0), 0, 240, id="fill_"),
        pytest.param(lambda: X.copy_(Y), 240, 240, id="copy_"),
        pytest.param(lambda: X @ Y.t(), 480, 144, id="matmul"),
        pytest.param(lambda: X.gather(1, INDEX), 96 + 48, 48, id="gather"),
        pytest.param(lambda: F.embedding(TOKENS, TABLE), 40 + 160, 160, id="embedding"),
        pytest.param(lambda: TABLE.index_select(0, TOKENS), 40 + 160, 160, id="index_select"),
        pytest.param(lambda: TABLE[TOKENS], 40 + 160, 160, id="index"),
        pytest.param(lambda: X.scatter_(1, INDEX, Y), 96 + 48, 48, id="scatter_"),
        pytest.param(lambda: X.scatter_(1, INDEX, 1.0), 96, 48, id="scatter_ of a value"),
        pytest.param(lambda: X.scatter_add_(1, INDEX, Y), 96 + 48 + 48, 48, id="scatter_add_"),
        # 6 targets, 6 log-probabilities; the loss and the total weight.
        pytest.param(lambda: F.nll_loss(X, TOKENS.new_empty(6)), 48 + 24, 8, id="nll_loss"),
        pytest.param(lambda: torch.ops.aten.nll_loss_backward(*NLL_BACKWARD), 4 + 48 + 4, 240, id="nll back"),
        pytest.param(lambda: torch._foreach_mul_([X, Y], 2.0), 480, 480, id="foreach"),
        pytest.param(lambda: torch._foreach_copy_([X], [Y]), 240, 240, id="foreach copy"),
    ],
)
def test_operation(function, read, written):
    assert _count(function) == (read, written)


def test_rows_by_op_and_device():
    with ByteCounter("meta") as counter:
        X.mul(2.0).mul(2.0)
        torch.ones(3).mul(2.0)
    assert counter.rows == [("aten.mul.Tensor", 240, 240, 0)] * 2
    assert counter.by_op() == {"aten.mul.Tensor": (480, 480)}
    assert counter.total == 960


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh", "identity"])
def test_linear_activation(activation):
    M, N, K = 64, 48, 32
    passes = 0 if activation == "identity" else 2
    forward = M * K + N * K + N + (1 + passes) * M * N
    # dZ (three passes), dX, dW and db.
    backward = (passes and 3 * M * N) + (M * N + N * K + M * K) * 2 + M * N + N
    count = unfused.linear_activation(M, N, K, activation, torch.bfloat16)
    both = unfused.linear_activation(M, N, K, activation, torch.bfloat16, backward=True)
    assert count.total == 2 * forward
    assert both.total == 2 * (forward + backward)


@pytest.mark.parametrize(("upcast", "passes"), [(False, 6), (True, 18)])
def test_cross_entropy_moves_the_logits_many_times(upcast, passes):
    N, V = 512, 32000
    count = unfused.cross_entropy(N, V, torch.bfloat16, backward=True, upcast=upcast)
    logits = 2 * N * V
    # Beside the logits: targets, gathered entries and scalars, a few dozen bytes a row.
    assert passes * logits < count.total < passes * logits + 40 * N


def test_cross_entropy_forward_alone():
    count = unfused.cross_entropy(8, 100, torch.float32)
    assert count.by_op() == {
        "aten._log_softmax.default": (3200, 3200),
        "aten.nll_loss_forward.default": (8 * 8 + 8 * 4, 8),
    }


@pytest.mark.parametrize(
    ("options", "per_param"),
    [
        ({"foreach": True}, 72),
        ({"foreach": True, "decoupled": True}, 80),
        ({"foreach": False}, 72),
        ({"fused": True}, 28),
        ({"fused": True, "decoupled": True}, 28),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam(options, per_param, dtype):
    n = 12345
    count = unfused.adam(n, dtype, **options)
    # The fused step counter, kept on the device: read and advanced, then read again.
    step = 12 if options.get("fused") else 0
    assert count.total == per_param * n * dtype.itemsize // 4 + step


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        pytest.param(lambda: X @ Y.t(), 2 * 6 * 10 * 6, id="matmul"),
        pytest.param(lambda: F.linear(X, _meta(4, 10), _meta(4)), 2 * 6 * 10 * 4, id="linear"),
        pytest.param(lambda: X + Y, 0, id="no product"),
    ],
)
def test_products_have_flops(function, flops):
    with ByteCounter() as counter:
        function()
    assert sum(row.flops for row in counter.rows) == flops


def test_operations_are_those_of_a_gpu():
    """RMS norm is a launch each way, and optimizers take their foreach forms, as on a GPU and unlike elsewhere."""
    M, N = 8, 32
    x, weight = _meta(M, N, dtype=torch.bfloat16), _meta(N, dtype=torch.bfloat16)

    def bind():
        for leaf in (x, weight):
            leaf.requires_grad_()
        return lambda: torch.autograd.grad(F.rms_norm(x, (N,), weight), (x, weight), torch.empty_like(x))

    forward, backward = unfused.operations(bind)
    assert (forward.read, forward.written) == (2 * (M * N + N), 2 * M * N + 4 * M)
    assert (backward.read, backward.written) == (2 * (2 * M * N + N) + 4 * M, 2 * (M * N + N))
    params = [_meta(5).requires_grad_() for _ in range(3)]
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer = torch.optim.SGD(params, lr=0.1)
    rows = unfused.operations(lambda: optimizer.step, warm=True)
    assert [row.op for row in rows] == ["aten._foreach_add_.List"]


def test_an_operation_without_a_meta_form():
    x, target = _meta(4, 6).requires_grad_(), _meta(4, dtype=torch.int64)
    with ByteCounter() as counter:
        F.multi_margin_loss(x, target).backward()
    assert counter.by_op()["aten.multi_margin_loss_backward.default"][1] == 4 * 24
