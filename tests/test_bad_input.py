"""Every bad input and its error: the type torch would raise for the same mistake (TypeError for a dtype), and a message that
names the argument, what came and what was expected."""

import re

import pytest
import torch

import dlgpu.functional as F
from dlgpu import explain, nn, optim, use_backend

# [2, 3] @ [4, 3].T + [4], and targets of two rows with three classes.
X, W, B, T = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), torch.tensor([0, 2])
ACTIVATIONS = "None or one of relu, leaky_relu, sigmoid, tanh, gelu, gelu_tanh, silu"
FLOATS = "float32, .*float16"

# (function, arguments, keyword arguments, error, what its message says)
TABLE = [
    # No tensor.
    (F.linear, (1, W), {}, TypeError, "linear: input must be a Tensor, got int"),
    (F.linear, (X.tolist(), W), {}, TypeError, "linear: input must be a Tensor, got list"),
    (
        F.linear,
        (X.numpy(), W),
        {},
        TypeError,
        "linear: weight is of type Tensor, expected ndarray, as the first argument",
    ),
    (F.linear, (X, None), {}, TypeError, "linear: weight must be a Tensor, got NoneType"),
    (F.linear, (X, W.numpy()), {}, TypeError, "linear: weight must be a Tensor, got ndarray"),
    (F.linear, (X, W, 1.0), {}, TypeError, "linear: bias must be a Tensor, got float"),
    (F.relu, (1.0,), {}, TypeError, "relu: input must be a Tensor, got float"),
    (F.silu, (None,), {}, TypeError, "silu: input must be a Tensor, got NoneType"),
    (F.cross_entropy, (1, T), {}, TypeError, "cross_entropy: input must be a Tensor, got int"),
    (F.cross_entropy, (X, 1), {}, TypeError, "cross_entropy: target must be a Tensor, got int"),
    (F.cross_entropy, (X, None), {}, TypeError, "cross_entropy: target must be a Tensor, got NoneType"),
    (F.cross_entropy, (X, T, 1), {}, TypeError, "cross_entropy: weight must be a Tensor, got int"),
    # Dtypes.
    (F.linear, (X.int(), W.int()), {}, TypeError, rf"{FLOATS}, (got|not) torch.int32"),
    (F.linear, (X.cfloat(), W.cfloat()), {}, TypeError, rf"{FLOATS}, (got|not) torch.complex64"),
    (
        F.linear,
        (X, W.double()),
        {},
        TypeError,
        "weight has dtype torch.float64, expected torch.float32, .* input",
    ),
    (
        F.linear,
        (X, W, B.half()),
        {},
        TypeError,
        "bias has dtype torch.float16, expected torch.float32, .* input",
    ),
    (F.relu, (T,), {}, TypeError, rf"{FLOATS}, (got|not) torch.int64"),
    (F.tanh, (X.cfloat(),), {}, TypeError, rf"{FLOATS}, (got|not) torch.complex64"),
    (F.cross_entropy, (X.int(), T), {}, TypeError, rf"{FLOATS}, (got|not) torch.int32"),
    (F.cross_entropy, (X, T.int()), {}, TypeError, "target has dtype torch.int32, expected torch.int64"),
    (F.cross_entropy, (X, T.bool()), {}, TypeError, "target has dtype torch.bool, expected torch.int64"),
    (
        F.cross_entropy,
        (X, T, X[0].double()),
        {},
        TypeError,
        "weight has dtype torch.float64, expected torch.float32",
    ),
    (
        F.cross_entropy,
        (X, T.float()),
        {},
        TypeError,
        "target has dtype torch.float32, expected torch.int64, or",
    ),
    (
        F.cross_entropy,
        (X, X.double()),
        {},
        TypeError,
        "target has dtype torch.float64, expected torch.float32",
    ),
    # Shapes.
    (F.linear, (X[0, 0], W), {}, RuntimeError, r"input has no dimensions, expected \[..., in_features\]"),
    (F.linear, (X, W.t()), {}, RuntimeError, r"weight has shape \[3, 4\], expected \[out_features, 3\]"),
    (F.linear, (X, W[0]), {}, RuntimeError, r"weight has shape \[3\], expected \[out_features, 3\]"),
    (F.linear, (X, W[None]), {}, RuntimeError, r"weight has shape \[1, 4, 3\], expected \[out_features, 3\]"),
    (F.linear, (X, W, B[:3]), {}, RuntimeError, r"bias has shape \[3\], expected \[4\]"),
    (F.linear, (X, W, B[None]), {}, RuntimeError, r"bias has shape \[1, 4\], expected \[4\]"),
    (F.linear, (X, W, B[0]), {}, RuntimeError, r"bias has shape \[\], expected \[4\]"),
    (F.cross_entropy, (X[0, 0], T[0]), {}, RuntimeError, "input has no dimensions"),
    (F.cross_entropy, (X, T[:1]), {}, ValueError, r"target has shape \[1\], expected \[2\]"),
    (
        F.cross_entropy,
        (X, T[None]),
        {},
        ValueError,
        r"target has shape \[1, 2\], expected \[2\] for .* \[2, 3\]",
    ),
    (F.cross_entropy, (X[0], T), {}, ValueError, r"target has shape \[2\], expected \[\] for .* \[3\]"),
    (
        F.cross_entropy,
        (X[None], T),
        {},
        ValueError,
        r"target has shape \[2\], expected \[1, 3\] for .* \[1, 2, 3\]",
    ),
    (F.cross_entropy, (X[:, :0], T), {}, ValueError, r"input has shape \[2, 0\]: no classes"),
    (F.cross_entropy, (X, T, B), {}, RuntimeError, r"weight has shape \[4\], expected \[3\]"),
    (F.cross_entropy, (X, T, X), {}, RuntimeError, r"weight has shape \[2, 3\], expected \[3\]"),
    # Devices.
    (F.linear, (X, W.to("meta")), {}, RuntimeError, "weight is on meta, expected cpu, the device of input"),
    (F.linear, (X, W, B.to("meta")), {}, RuntimeError, "bias is on meta, expected cpu, the device of input"),
    (
        F.cross_entropy,
        (X, T.to("meta")),
        {},
        RuntimeError,
        "target is on meta, expected cpu, the device of input",
    ),
    (F.cross_entropy, (X, T, X[0].to("meta")), {}, RuntimeError, "weight is on meta, expected cpu"),
    # Targets that are no class.
    (F.cross_entropy, (X, T + 1), {}, IndexError, "target 3 of row 1 is out of bounds for 3 classes"),
    (F.cross_entropy, (X, T - 1), {}, IndexError, "target -1 of row 0 is out of bounds for 3 classes"),
    # Torch has no gradient for the weight either, and drops none in silence.
    (F.cross_entropy, (X, T, X[0].clone().requires_grad_()), {}, RuntimeError, "weight requires a gradient"),
    # Options.
    (F.linear, (X, W), {"activation": "rulu"}, ValueError, f"activation: got 'rulu', expected {ACTIVATIONS}"),
    (F.linear, (X, W), {"activation": ["relu"]}, ValueError, r"activation: got \['relu'\], expected"),
    (
        F.linear,
        (X, W),
        {"activation": "leaky_relu", "negative_slope": "a"},
        TypeError,
        "negative_slope .* got str",
    ),
    (F.linear, (X, W, B, "relu"), {}, TypeError, "positional arguments"),
    (F.leaky_relu, (X, None), {}, TypeError, "negative_slope must be a number, got NoneType"),
    (F.gelu, (X, "sigmoid"), {}, RuntimeError, "approximate must be 'none' or 'tanh', got 'sigmoid'"),
    (F.cross_entropy, (X, T), {"reduction": "avg"}, ValueError, "reduction .* none, mean, sum, got 'avg'"),
    (F.cross_entropy, (X, T), {"reduction": None}, ValueError, "reduction .* none, mean, sum, got None"),
    (F.cross_entropy, (X, T), {"label_smoothing": 1.5}, RuntimeError, "label_smoothing .* 0 and 1, got 1.5"),
    (
        F.cross_entropy,
        (X, T),
        {"label_smoothing": -0.1},
        RuntimeError,
        "label_smoothing .* 0 and 1, got -0.1",
    ),
    (F.cross_entropy, (X, T), {"label_smoothing": float("nan")}, RuntimeError, "label_smoothing .* got nan"),
    (
        F.cross_entropy,
        (X, T),
        {"label_smoothing": "a"},
        TypeError,
        "label_smoothing must be a number, got str",
    ),
    (F.cross_entropy, (X, T), {"ignore_index": "a"}, TypeError, "ignore_index must be an integer, got str"),
    (F.cross_entropy, (X, T), {"ignore_index": 1.5}, TypeError, "ignore_index must be an integer, got float"),
    # Chains of layers.
    (F.mlp, (1, [W]), {"activation": None}, TypeError, "mlp: input must be a Tensor, got int"),
    (
        F.mlp,
        (X, W),
        {"activation": None},
        TypeError,
        "mlp: weights must be a sequence of Tensors, got Tensor",
    ),
    (F.mlp, (X, 3), {"activation": None}, TypeError, "mlp: weights must be a sequence of Tensors, got int"),
    (
        F.mlp,
        (X, [W], B),
        {"activation": None},
        TypeError,
        "mlp: biases must be a sequence of Tensors, got Tensor",
    ),
    (
        F.mlp,
        (X, [W, None]),
        {"activation": None},
        TypeError,
        r"mlp: weights\[1\] must be a Tensor, got NoneType",
    ),
    (
        F.mlp,
        (X, [W], [1.0]),
        {"activation": None},
        TypeError,
        r"mlp: biases\[0\] must be a Tensor, got float",
    ),
    (F.mlp, (X, []), {"activation": None}, ValueError, "mlp: weights is empty"),
    (F.mlp, (X, [W], []), {"activation": None}, ValueError, "mlp: biases has 0 entries, expected 1"),
    (F.mlp, (X.int(), [W.int()]), {"activation": None}, TypeError, rf"{FLOATS}, (got|not) torch.int32"),
    (
        F.mlp,
        (X, [W, W.t().double()]),
        {"activation": None},
        TypeError,
        r"weights\[1\] has dtype torch.float64, expected torch.float32",
    ),
    (
        F.mlp,
        (X, [W], [B.half()]),
        {"activation": None},
        TypeError,
        r"biases\[0\] has dtype torch.float16, expected",
    ),
    (F.mlp, (X[0, 0], [W]), {"activation": None}, RuntimeError, "mlp: input has no dimensions"),
    (
        F.mlp,
        (X, [W, W]),
        {"activation": None},
        RuntimeError,
        r"weights\[1\] has shape \[4, 3\], expected \[out_features, 4\]",
    ),
    (F.mlp, (X, [W[0]]), {"activation": None}, RuntimeError, r"weights\[0\] has shape \[3\], expected"),
    (
        F.mlp,
        (X, [W], [B[:3]]),
        {"activation": None},
        RuntimeError,
        r"biases\[0\] has shape \[3\], expected \[4\]",
    ),
    (
        F.mlp,
        (X, [W.to("meta")]),
        {"activation": None},
        RuntimeError,
        r"weights\[0\] is on meta, expected cpu",
    ),
    (F.mlp, (X, [W]), {"activation": "rulu"}, ValueError, f"activation: got 'rulu', expected {ACTIVATIONS}"),
    (
        F.mlp,
        (X, [W]),
        {"activation": None, "out_activation": "rulu"},
        ValueError,
        f"out_activation: got 'rulu', expected {ACTIVATIONS}",
    ),
    (F.mlp, (X, [W]), {"activation": None, "negative_slope": "a"}, TypeError, "negative_slope .* got str"),
    (F.mlp, (X, [W]), {}, TypeError, "activation"),
    # Gated units, [2, 3] @ [4, 3].T: two gates and two projections.
    (F.gated_linear, (1, W), {}, TypeError, "gated_linear: input must be a Tensor, got int"),
    (F.gated_linear, (X, None), {}, TypeError, "gated_linear: weight must be a Tensor, got NoneType"),
    (F.gated_linear, (X, W, B, 1), {}, TypeError, "gated_linear: out_weight must be a Tensor, got int"),
    (F.gated_linear, (X.int(), W.int()), {}, TypeError, rf"{FLOATS}, (got|not) torch.int32"),
    (
        F.gated_linear,
        (X, W.double()),
        {},
        TypeError,
        "weight has dtype torch.float64, expected torch.float32",
    ),
    (
        F.gated_linear,
        (X, W, B, W[:, :2].half()),
        {},
        TypeError,
        "out_weight has dtype torch.float16, expected",
    ),
    (F.gated_linear, (X[0, 0], W), {}, RuntimeError, "gated_linear: input has no dimensions"),
    (
        F.gated_linear,
        (X, W[:3]),
        {},
        RuntimeError,
        r"weight has shape \[3, 3\], expected \[2 \* hidden_features, 3\]",
    ),
    (
        F.gated_linear,
        (X, W.t()),
        {},
        RuntimeError,
        r"weight has shape \[3, 4\], expected \[2 \* hidden_features, 3\]",
    ),
    (F.gated_linear, (X, W, B[:2]), {}, RuntimeError, r"bias has shape \[2\], expected \[4\]"),
    (
        F.gated_linear,
        (X, W, None, W),
        {},
        RuntimeError,
        r"out_weight has shape \[4, 3\], expected \[out_features, 2\]",
    ),
    (
        F.gated_linear,
        (X, W, None, W[:, :2], X[0]),
        {},
        RuntimeError,
        r"out_bias has shape \[3\], expected \[4\]",
    ),
    (F.gated_linear, (X, W, None, None, B), {}, ValueError, "out_bias is given without out_weight"),
    (
        F.gated_linear,
        (X, W.to("meta")),
        {},
        RuntimeError,
        "weight is on meta, expected cpu, the device of input",
    ),
    (
        F.gated_linear,
        (X, W),
        {"activation": "rulu"},
        ValueError,
        f"activation: got 'rulu', expected {ACTIVATIONS}",
    ),
    (F.gated_linear, (X, W), {"negative_slope": "a"}, TypeError, "negative_slope .* got str"),
    # Sparse tensors have no memory that a kernel could be pointed at.
    (F.linear, (X.to_sparse(), W), {}, (TypeError, NotImplementedError), "[Ss]parse"),
    (F.linear, (X, W.to_sparse()), {}, (TypeError, NotImplementedError), "[Ss]parse"),
    # Modules: what torch's own refuse, and what is new.
    (
        nn.Linear,
        (3, 4),
        {"activation": "rulu"},
        ValueError,
        f"activation: got 'rulu', expected {ACTIVATIONS}",
    ),
    (nn.Linear, (-3, 4), {}, RuntimeError, "negative dimension"),
    (nn.MLP, ([3], "relu"), {}, ValueError, r"sizes: got \[3\], expected two at least"),
    (nn.MLP, ([3, 4], "rulu"), {}, ValueError, f"activation: got 'rulu', expected {ACTIVATIONS}"),
    (nn.MLP, ([3, 4], None, "rulu"), {}, ValueError, f"out_activation: got 'rulu', expected {ACTIVATIONS}"),
    (nn.MLP([3, 4, 2], "relu"), (X[:, :2],), {}, RuntimeError, r"weights\[0\] has shape \[4, 3\], expected"),
    (nn.Activation, ("rulu",), {}, ValueError, f"activation: got 'rulu', expected {ACTIVATIONS}"),
    (nn.SwiGLU, (-3, 4), {}, RuntimeError, "negative dimension"),
    (nn.SwiGLU(3, 2), (X[:, :2],), {}, RuntimeError, r"weight has shape \[4, 3\], expected"),
    (nn.Linear, (3, 4, True, None, None, "relu"), {}, TypeError, "positional arguments"),
    (nn.Linear(3, 4), (X.double(),), {}, TypeError, "float32.* (expected|not) torch.float64"),
    (
        nn.Linear(3, 4),
        (X[:, :2],),
        {},
        RuntimeError,
        r"weight has shape \[4, 3\], expected \[out_features, 2\]",
    ),
    (nn.CrossEntropyLoss(reduction="avg"), (X, T), {}, ValueError, "reduction"),
    (nn.CrossEntropyLoss(label_smoothing=2), (X, T), {}, RuntimeError, "label_smoothing .* got 2"),
    # Settings and explanations.
    (
        lambda name: use_backend(name).__enter__(),
        ("cuda",),
        {},
        ValueError,
        "got 'cuda', expected .*auto, triton, fallback",
    ),
    (lambda name: use_backend(name).__enter__(), (None,), {}, ValueError, "got None, expected .*auto"),
    (explain, ("lineal", X), {}, ValueError, "op: got 'lineal', expected one of .*linear"),
    (explain, ("linear", X), {}, TypeError, "weight"),
    (explain, ("linear", 1, W), {}, TypeError, "input must be a Tensor, got int"),
    (explain, ("relu", 1), {}, TypeError, "input must be a Tensor, got int"),
    (explain, ("cross_entropy", 1, T), {}, TypeError, "input must be a Tensor, got int"),
    (explain, ("linear", X, W.t()), {}, RuntimeError, r"weight has shape \[3, 4\]"),
    # Optimizers.
    (optim.Adam, ([X], -1.0), {}, ValueError, "Invalid learning rate: -1.0"),
    (optim.Adam, ([X],), {"betas": (1.0, 0.9)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
    (optim.Adam, ([X],), {"eps": -1.0}, ValueError, "Invalid epsilon value: -1.0"),
    (optim.AdamW, ([],), {}, ValueError, "empty parameter list"),
    (optim.AdamW, ([1],), {}, TypeError, "int"),
]


def name_of(row):
    function, args, kwargs, *_ = row
    name = getattr(function, "__name__", type(function).__name__)
    shown = [
        f"{list(a.shape)} {a.dtype} {a.device}" if isinstance(a, torch.Tensor) else repr(a) for a in args
    ]
    return re.sub(r"\s+|torch\.", "", f"{name}-{'-'.join(shown)}-{kwargs or ''}")[:80]


def on(device, value):
    """Rows are written with CPU tensors; a GPU's go there, but for those on meta."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        return value.to(device)
    return value.to(device) if isinstance(value, torch.nn.Module) else value


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("row", TABLE, ids=name_of)
@pytest.mark.usefixtures("debug_on_gpu")
def test_bad_input(backend, device, row):
    function, args, kwargs, error, message = row
    args = [on(device, a) for a in args]
    message = message.replace("expected cpu", f"expected {device}")
    with pytest.raises(error, match=message):
        function(*args, **kwargs)


@pytest.mark.parametrize("function", [lambda x: F.linear(x, x), F.relu, lambda x: F.cross_entropy(x, T)])
def test_the_triton_backend_names_what_it_takes(device, function):
    with (
        use_backend("triton"),
        pytest.raises(TypeError, match=r"float32, bfloat16, float16, not torch\.float64"),
    ):
        function(torch.ones(2, 2, dtype=torch.float64, device=device))


def test_bad_input_needs_no_launch(launches, device):
    """Refused before a kernel sees it, with gradients asked for as without."""
    x = torch.ones(2, 3, device=device, requires_grad=True)
    with use_backend("triton"):
        for call in (
            lambda: F.linear(x, x.new_ones(4, 2)),
            lambda: F.cross_entropy(x, torch.zeros(3, dtype=torch.int64, device=device)),
            lambda: F.linear(x, x.new_ones(4, 3), activation="rulu"),
        ):
            with pytest.raises((RuntimeError, ValueError)):
                call()
        assert launches == []
        # And the next call is none the worse for it.
        assert torch.equal(F.linear(x, x.new_ones(4, 3)), torch.full((2, 4), 3.0, device=device))
