"""A chain of fused linear + activation layers as one function of autograd: checks, the dispatcher's ops and autograd. The
launches are in kernels/mlp.py."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import mlp as arrays
from dlgpu.kernels import configs
from dlgpu.kernels import mlp as kernels
from dlgpu.kernels.activations import lookup, saved_for_backward
from dlgpu.kernels.linear import Drop
from dlgpu.ops.dropout import _draw_seeds, _probability, _require_probability
from dlgpu.ops.dropout import _eager as _eager_dropout
from dlgpu.ops.linear import _rows, linear

__all__ = ["mlp"]

Tensors = Sequence[torch.Tensor]
Optionals = Sequence[torch.Tensor | None]


def mlp(
    input: torch.Tensor,
    weights: Iterable[torch.Tensor],
    biases: Iterable[torch.Tensor | None] | None = None,
    *,
    activation: str | None,
    out_activation: str | None = None,
    negative_slope: float = 0.01,
    dropout: float = 0.0,
    training: bool = True,
) -> torch.Tensor:
    """x_(i + 1) = act_i(x_i w_i^T + b_i) from x_0 = input; the last of these. One kernel a layer, forward; backward, the
    derivative of each layer is multiplied in where the gradient of the layer above is made. With dropout all but the last are
    k act_i(x_i w_i^T + b_i) / (1 - dropout), k = 0 with probability `dropout`, else 1, in the same kernels.

    Args:
        input: x_0, [..., sizes[0]], float32, bfloat16, float16 or float64; any strides.
        weights: w_i, [sizes[i + 1], sizes[i]], of the same dtype; one at least.
        biases: b_i, [sizes[i + 1]], of the same dtype, or None; None for all of them.
        activation: of every layer but the last: None, "relu", "leaky_relu", "sigmoid", "tanh", "gelu" (through erf),
            "gelu_tanh" or "silu".
        out_activation: of the last layer; the same names.
        negative_slope: leaky ReLU's slope for negative z.
        dropout: the probability of each element of a hidden layer to be dropped.
        training: nothing is dropped without it.

    Returns:
        [..., sizes[-1]], of the same dtype, in autocast of the autocast dtype.

    Raises:
        RuntimeError: a shape or device does not fit.
        TypeError: an argument's type or dtype does not fit.
        ValueError: no weights; not as many biases; no such activation, and the message lists them; dropout is not between 0
            and 1 (a RuntimeError where it is NaN).

    Saved for backward: input and weights by reference; every x_i that dw_i needs; and of each layer what `linear` saves: y
    for relu, leaky_relu, sigmoid and tanh, which is the next layer's input, z for gelu, gelu_tanh and silu. Nothing of the
    layers below the lowest one that a gradient is asked of. With dropout y is saved as it is after it, with a seed for each
    hidden layer, of which its mask is drawn again: the one that `dropout` draws of that seed.

    Sources: Rumelhart, Hinton and Williams, Nature 323, 533 (1986); `dropout`.

    >>> x = torch.tensor([[1.0, -2.0]])
    >>> w = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    >>> mlp(x, [w, w], activation="relu")
    tensor([[1., 0.]])
    """
    _checks.require_tensor("mlp", "input", input)
    weights = _listed("weights", weights)
    biases = [None] * len(weights) if biases is None else _listed("biases", biases)
    for name, values in (("weights", weights), ("biases", biases)):
        for i, value in enumerate(values):
            if not isinstance(value, torch.Tensor) and (value is not None or name == "weights"):
                _checks.require_tensor("mlp", f"{name}[{i}]", value)
    if not weights:
        raise ValueError("mlp: weights is empty, expected a weight for each layer")
    if len(biases) != len(weights):
        raise ValueError(
            f"mlp: biases has {len(biases)} entries, expected {len(weights)}, one for each weight"
        )
    if type(negative_slope) is not float:
        _checks.require_number("mlp", "negative_slope", negative_slope)
    if dropout != 0:
        _checks.require_number("mlp", "dropout", dropout)
        _require_probability(dropout)
        if training and len(weights) > 1:
            if dropout == 1:
                return _all_dropped(input, weights, biases, activation, out_activation, negative_slope)
            backend = _dispatch.choose_backend(input, "dropout")
            seeds = _draw_seeds(len(weights) - 1, input.device)
            return _mlp(
                input,
                weights,
                biases,
                activation,
                out_activation,
                negative_slope,
                seeds,
                float(dropout),
                backend,
            )
    backend = _dispatch.choose_backend(input, "mlp")
    return _mlp(input, weights, biases, activation, out_activation, negative_slope, None, 0.0, backend)


def _all_dropped(
    x: torch.Tensor,
    weights: Tensors,
    biases: Optionals,
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
) -> torch.Tensor:
    _check(x, weights, biases, activation, out_activation)
    last = len(weights) - 1
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        act = out_activation if i == last else activation
        x = linear(x, weight, bias, activation=act, negative_slope=negative_slope)
        # NaN and infinity that are dropped are NaN.
        x = x if i == last else x * 0.0
    return x


def _drops(seeds: torch.Tensor | None, p: float) -> list[Drop]:
    """What the launchers take; nothing without seeds."""
    if seeds is None:
        return []
    return [Drop(seed, _probability(p), 1 / (1 - p)) for seed in seeds[:, :1]]


def _array_drops(seeds: torch.Tensor | None, p: float) -> list[tuple[Any, float, float]]:
    return [(to_array(seed), p, scale) for seed, p, scale in _drops(seeds, p)]


def _listed(name: str, values: Any) -> list[Any]:
    if type(values) in (list, tuple):
        return list(values)
    # A tensor would fall into its rows.
    if isinstance(values, torch.Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"mlp: {name} must be a sequence of Tensors, got {type(values).__name__}")
    return list(values)


def _check(
    input: torch.Tensor,
    weights: Tensors,
    biases: Optionals,
    activation: str | None,
    out_activation: str | None,
) -> None:
    lookup(activation)
    try:
        lookup(out_activation)
    except ValueError as error:
        raise ValueError(f"out_{error}") from None
    _checks.require_floating("mlp", "input", input)
    if input.dim() == 0:
        raise RuntimeError("mlp: input has no dimensions, expected [..., in_features]")
    dtype, device, width = input.dtype, input.device, input.shape[-1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        # The usual case, at once: on the CPU the messages' checks would cost as much as a small product.
        if not (
            weight.dtype is dtype
            and weight.device == device
            and weight.dim() == 2
            and weight.shape[1] == width
            and (bias is None or (bias.dtype is dtype and bias.device == device))
            and (bias is None or bias.shape == weight.shape[:1])
        ):
            _refuse(i, input, width, weight, bias)
        width = weight.shape[0]


def _refuse(i: int, input: torch.Tensor, width: int, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    _checks.require_dtype("mlp", f"weights[{i}]", weight, input.dtype, "input")
    _checks.require_device("mlp", f"weights[{i}]", weight, input.device, "input")
    _checks.require_shape("mlp", f"weights[{i}]", weight, ("out_features", width))
    if bias is not None:
        _checks.require_dtype("mlp", f"biases[{i}]", bias, input.dtype, "input")
        _checks.require_device("mlp", f"biases[{i}]", bias, input.device, "input")
        _checks.require_shape("mlp", f"biases[{i}]", bias, (weight.shape[0],))


def _lowest(needs: Sequence[bool]) -> int:
    """The lowest layer that backward has to reach; needs: of the input, of each weight, of each bias."""
    layers = len(needs) // 2
    if needs[0]:
        return 0
    return next(i for i in range(layers) if needs[1 + i] or needs[1 + layers + i])


def _shaped(y: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    # A result that autograd knows as a view may not be modified in place.
    return y if input.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*input.shape[:-1], y.shape[1]))


def _fwd_triton(
    input: torch.Tensor,
    weights: Tensors,
    biases: Optionals,
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    seeds: torch.Tensor | None,
    p: float,
    first: int,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    _check(input, weights, biases, activation, out_activation)
    y, hidden, zs = kernels.mlp_fwd(
        _rows(input), weights, biases, activation, out_activation, negative_slope, first, _drops(seeds, p)
    )
    return _shaped(y, input), hidden, zs


def _fwd_fallback(
    input: torch.Tensor,
    weights: Tensors,
    biases: Optionals,
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    seeds: torch.Tensor | None,
    p: float,
    first: int,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    _check(input, weights, biases, activation, out_activation)
    dtype = input.dtype
    y, hidden, zs = arrays.mlp_fwd(
        to_array(_rows(input)),
        [to_array(w) for w in weights],
        [None if b is None else to_array(b) for b in biases],
        activation,
        out_activation,
        negative_slope,
        first,
        _array_drops(seeds, p),
    )
    return (
        _shaped(to_tensor(y, dtype), input),
        [to_tensor(h, dtype) for h in hidden],
        [to_tensor(z, dtype) for z in zs],
    )


def _eager(
    input: torch.Tensor,
    weights: Tensors,
    biases: Optionals,
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    seeds: torch.Tensor | None,
    p: float,
) -> torch.Tensor:
    _check(input, weights, biases, activation, out_activation)
    return _layers(input, weights, biases, activation, out_activation, negative_slope, seeds, p)


def _layers(
    x: torch.Tensor,
    weights: Tensors,
    biases: Optionals,
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    seeds: torch.Tensor | None,
    p: float,
) -> torch.Tensor:
    """By torch's own operations, layer by layer."""
    last = len(weights) - 1
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        act = out_activation if i == last else activation
        x = lookup(act).eager(F.linear(x, weight, bias), negative_slope)
        if seeds is not None and i < last:
            x = _eager_dropout(x, seeds[i, :1], p)
    return x


def _fwd_fake(
    input: torch.Tensor,
    weights: Tensors,
    biases: Optionals,
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    seeds: torch.Tensor | None,
    p: float,
    first: int,
    backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    _check(input, weights, biases, activation, out_activation)
    rows, last = math.prod(input.shape[:-1]), len(weights) - 1
    hidden = [input.new_empty((rows, weights[i].shape[0])) for i in range(max(first - 1, 0), last)]
    zs = [
        input.new_empty((rows, weights[i].shape[0]))
        for i in range(first, last + 1)
        if saved_for_backward(out_activation if i == last else activation, negative_slope) == "z"
    ]
    return input.new_empty((*input.shape[:-1], weights[-1].shape[0])), hidden, zs


def _bwd_triton(
    dy: torch.Tensor,
    inputs: Optionals,
    weights: Tensors,
    saved: Optionals,
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    seeds: torch.Tensor | None,
    p: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    gradients = kernels.mlp_bwd(
        _rows(dy),
        [None if x is None else _rows(x) for x in inputs],
        weights,
        [None if s is None else _rows(s) for s in saved],
        activation,
        out_activation,
        negative_slope,
        _lowest(needs),
        needs,
        _drops(seeds, p),
    )
    return _gradients(*gradients, dy)


def _bwd_fallback(
    dy: torch.Tensor,
    inputs: Optionals,
    weights: Tensors,
    saved: Optionals,
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    seeds: torch.Tensor | None,
    p: float,
    needs: Sequence[bool],
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    dtype = dy.dtype
    dx, dws, dbs = arrays.mlp_bwd(
        to_array(_rows(dy)),
        [None if x is None else to_array(_rows(x)) for x in inputs],
        [to_array(w) for w in weights],
        [None if s is None else to_array(_rows(s)) for s in saved],
        activation,
        out_activation,
        negative_slope,
        _lowest(needs),
        needs,
        _array_drops(seeds, p),
    )
    return _gradients(
        None if dx is None else to_tensor(dx, dtype),
        [None if dw is None else to_tensor(dw, dtype) for dw in dws],
        [None if db is None else to_tensor(db, dtype) for db in dbs],
        dy,
    )


def _gradients(
    dx: torch.Tensor | None, dws: Optionals, dbs: Optionals, dy: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """An op returns tensors: an empty one stands for what was not needed."""
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    # Each its own: an op's results must not be one tensor.
    return (
        dy.new_empty(0) if dx is None else dx,
        [dy.new_empty(0) if dw is None else dw for dw in dws],
        [dy.new_empty(0) if db is None else db for db in dbs],
    )


def _bwd_fake(
    dy: torch.Tensor,
    inputs: Optionals,
    weights: Tensors,
    saved: Optionals,
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    seeds: torch.Tensor | None,
    p: float,
    needs: Sequence[bool],
    backend: str,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    layers = len(weights)
    return (
        dy.new_empty((*dy.shape[:-1], weights[0].shape[1]) if needs[0] else 0),
        [dy.new_empty(w.shape if need else 0) for w, need in zip(weights, needs[1:], strict=False)],
        [
            dy.new_empty(w.shape[0] if need else 0)
            for w, need in zip(weights, needs[1 + layers :], strict=True)
        ],
    )


class MLPFunction(torch.autograd.Function):
    """Autograd of `mlp`, at the op's Autograd key. It takes the weights and biases one by one: autograd does not look into
    lists."""

    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[str | None, str | None, float, float, str],
        seeds: torch.Tensor | None,
        input: torch.Tensor,
        *parameters: torch.Tensor | None,
    ) -> torch.Tensor:
        activation, out_activation, negative_slope, p, backend = options
        layers = len(parameters) // 2
        last = layers - 1
        needs = ctx.needs_input_grad[2:]
        first = _lowest(needs)
        y, hidden, zs = _mlp_fwd.below(
            input,
            list(parameters[:layers]),
            list(parameters[layers:]),
            activation,
            out_activation,
            negative_slope,
            seeds,
            p,
            first,
            backend,
        )
        saves = saved_for_backward(activation, negative_slope)
        out_saves = saved_for_backward(out_activation, negative_slope)
        # results[i] is what layer i gives where backward needs it: as the next layer's input, or for its own derivative.
        results: list[torch.Tensor | None] = [None] * max(first - 1, 0) + hidden
        results = [
            r if needs[2 + i] or (saves == "y" and i >= first) else None for i, r in enumerate(results)
        ]
        inner: Optionals = [None] * last
        if saves == "z":
            inner = [*inner[:first], *zs[: max(last - first, 0)]]
        outer = y if out_saves == "y" else zs[-1] if out_saves == "z" else None
        ctx.save_for_backward(seeds, input, *parameters, *results, *inner, outer)
        ctx.options = options
        ctx.saves = saves
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        needs = ctx.needs_input_grad[2:]
        layers = len(needs) // 2
        seeds, input, *kept = ctx.saved_tensors
        weights, biases = kept[:layers], kept[layers : 2 * layers]
        activation, out_activation, negative_slope, p, backend = ctx.options
        if _dispatch.differentiates():
            gradients = _differentiable_backward(
                dy, input, weights, biases, needs, activation, out_activation, negative_slope, seeds, p
            )
            return (None, None, *gradients)
        results, inner, outer = kept[2 * layers : 3 * layers - 1], kept[3 * layers - 1 : -1], kept[-1]
        inputs = [x if needs[1 + i] else None for i, x in enumerate((input, *results))]
        saved = [*(results if ctx.saves == "y" else inner), outer]
        dx, dws, dbs = _mlp_backward.below(
            dy, inputs, weights, saved, activation, out_activation, negative_slope, seeds, p, needs, backend
        )
        found = (dx, *dws, *dbs)
        return (None, None, *(g if need else None for g, need in zip(found, needs, strict=True)))


def _differentiable_backward(
    dy: torch.Tensor,
    input: torch.Tensor,
    weights: Tensors,
    biases: Optionals,
    needs: Sequence[bool],
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    seeds: torch.Tensor | None,
    p: float,
) -> tuple[torch.Tensor | None, ...]:
    layers = len(weights)

    def eager(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ws, bs = parameters[:layers], parameters[layers:]
        return _layers(x, ws, bs, activation, out_activation, negative_slope, seeds, p)

    return _dispatch.differentiable_vjp(eager, (input, *weights, *biases), needs, dy)


def _mlp_autograd(
    input: torch.Tensor,
    weights: Tensors,
    biases: Optionals,
    activation: str | None,
    out_activation: str | None,
    negative_slope: float,
    seeds: torch.Tensor | None,
    p: float,
    backend: str,
) -> torch.Tensor:
    # Decided here: inside the Function, needs_input_grad is True even under no_grad.
    if torch.is_grad_enabled() and (
        input.requires_grad or any(p is not None and p.requires_grad for p in (*weights, *biases))
    ):
        options = (activation, out_activation, negative_slope, p, backend)
        return MLPFunction.apply(options, seeds, input, *weights, *biases)
    return _mlp.below(input, weights, biases, activation, out_activation, negative_slope, seeds, p, backend)


def _result_only(forward: Any) -> Any:
    # No backward reaches down to a layer beyond the last.
    return lambda *args: forward(*args, len(args[1]))[0]


_mlp = _dispatch.define(
    "mlp(Tensor input, Tensor[] weights, Tensor?[] biases, str? activation, str? out_activation, float negative_slope, "
    "Tensor? seeds, float p, str backend) -> Tensor",
    triton=_result_only(_fwd_triton),
    fallback=_result_only(_fwd_fallback),
    eager=_eager,
    fake=lambda input, weights, biases, activation, out_activation, slope, seeds, p, backend: _fwd_fake(
        input, weights, biases, activation, out_activation, slope, seeds, p, len(weights), backend
    )[0],
    autograd=_mlp_autograd,
    autocast=_dispatch.cast_floating,
)
_mlp_fwd = _dispatch.define(
    "mlp_fwd(Tensor input, Tensor[] weights, Tensor?[] biases, str? activation, str? out_activation, "
    "float negative_slope, Tensor? seeds, float p, int first, str backend) -> (Tensor, Tensor[], Tensor[])",
    triton=_fwd_triton,
    fallback=_fwd_fallback,
    fake=_fwd_fake,
)
_mlp_backward = _dispatch.define(
    "mlp_backward(Tensor dy, Tensor?[] inputs, Tensor[] weights, Tensor?[] saved, str? activation, "
    "str? out_activation, float negative_slope, Tensor? seeds, float p, bool[] needs, str backend) "
    "-> (Tensor, Tensor[], Tensor[])",
    triton=_bwd_triton,
    fallback=_bwd_fallback,
    fake=_bwd_fake,
)


@_dispatch.explains("mlp")
def _explain(
    input: torch.Tensor,
    weights: Iterable[torch.Tensor],
    biases: Iterable[torch.Tensor | None] | None = None,
    *,
    activation: str | None,
    out_activation: str | None = None,
    negative_slope: float = 0.01,
    dropout: float = 0.0,
    training: bool = True,
) -> tuple[torch.Tensor, Any]:
    _checks.require_tensor("mlp", "input", input)
    weights = _listed("weights", weights)
    bs = [None] * len(weights) if biases is None else _listed("biases", biases)
    _check(input, weights, bs, activation, out_activation)
    drops = training and dropout != 0

    def steps(backend: str) -> list[tuple[str, str]]:
        saves = saved_for_backward(activation, negative_slope)
        if backend == "torch":
            return [
                ("forward", "torch.nn.functional.linear, then torch's activation, for each layer"),
                ("backward", "torch's own gradients of the activations, and two products for each layer"),
            ]
        if backend == "fallback":
            return [
                ("forward", "for each layer a BLAS product, then bias and activation in place"),
                (
                    "backward",
                    f"for each layer the activation's gradient from {saves}, then two BLAS products",
                ),
            ]
        # What a training step launches.
        found = []
        last = len(weights) - 1
        tiles = kernels.mlp_tiles(_rows(input), weights, activation, out_activation, negative_slope, drops)
        mask = ("_dropout_kernel", str(configs.dropout_tile(input.dtype)))
        sums = ("_sum_kernel", "adds the column sums of the bias's gradient")
        for name, tile in tiles.items():
            if name == f"dw{last}":
                out_saves = saved_for_backward(out_activation, negative_slope)
                if out_saves or bs[last] is not None:
                    strip = configs.linear_dz_tile(input.dtype, len(weights[last]))
                    found.append((f"_linear_dz_kernel (dz{last})", f"{strip}; saved: {out_saves}"))
                if bs[last] is not None:
                    found.append(sums)
            if isinstance(tile, configs.CuBlas):
                found.append((f"cuBLAS ({name})", tile.reason))
            else:
                kernel = "_linear_tma_kernel" if tile.tma else "_linear_kernel"
                found.append((f"{kernel} ({name})", str(tile)))
            hidden = name.startswith("dz") or (name.startswith("x") and name != f"x{len(weights)}")
            if drops and hidden and isinstance(tile, configs.CuBlas):
                found.append(mask)
            if name.startswith("dz"):
                below = int(name[2:])
                if isinstance(tile, configs.CuBlas) and (saves or bs[below] is not None):
                    strip = configs.linear_dz_tile(input.dtype, len(weights[below]))
                    found.append((f"_linear_dz_kernel ({name})", f"{strip}; saved: {saves}"))
                if bs[below] is not None:
                    found.append(sums)
        return found

    return input, steps
