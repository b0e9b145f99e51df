"""Modules: torch.nn's, on dlgpu's functions. Parameters and state only; the math is in dlgpu.functional."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from dlgpu import functional as F
from dlgpu.kernels.activations import lookup
from dlgpu.ops.activations import activation as _activation
from dlgpu.ops.cross_entropy import CrossEntropyOutput

__all__ = [
    "Activation",
    "BCEWithLogitsLoss",
    "BatchNorm1d",
    "CrossEntropyLoss",
    "Dropout",
    "GEGLU",
    "HingeLoss",
    "HuberLoss",
    "KLDivLoss",
    "L1Loss",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "MLP",
    "MSELoss",
    "MultiMarginLoss",
    "RMSNorm",
    "ReGLU",
    "Sequential",
    "SmoothL1Loss",
    "SwiGLU",
]


class Linear(torch.nn.Linear):
    """y = act(x W^T + b), fused: torch.nn.Linear with the activation inside.

    Args:
        in_features, out_features, bias, device, dtype: as torch.nn.Linear, whose parameters, initialization and
            state_dict these are: after the same seed both hold the same numbers.
        activation: None, "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "gelu_tanh" or "silu".
        negative_slope: leaky ReLU's slope for negative z.

    Shape: input [..., in_features], result [..., out_features].

    Raises:
        ValueError: no such activation; the message lists them.

    >>> layer = Linear(784, 256, activation="relu")
    >>> layer(torch.zeros(32, 784)).shape
    torch.Size([32, 256])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
    ) -> None:
        lookup(activation)
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.linear`."""
        return F.linear(
            input, self.weight, self.bias, activation=self.activation, negative_slope=self.negative_slope
        )

    def extra_repr(self) -> str:
        """torch.nn.Linear's, and the activation."""
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            text += f", negative_slope={self.negative_slope}"
        return text


class Activation(torch.nn.Module):
    """y = act(x), elementwise: an activation of `MLP` as a module of its own.

    Args:
        activation: "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "gelu_tanh" or "silu".
        negative_slope: leaky ReLU's slope for negative x.
    """

    def __init__(self, activation: str, negative_slope: float = 0.01) -> None:
        lookup(activation)
        super().__init__()
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional`'s function of that name."""
        return _activation(input, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        """The activation, and leaky ReLU's slope."""
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return repr(self.activation) + slope


class MLP(torch.nn.Sequential):
    """x_(i + 1) = act_i(x_i W_i^T + b_i), as one chain: torch.nn.Sequential(Linear, act, Linear, act, ..., Linear), whose
    parameters, initialization and state_dict ("0.weight", "0.bias", "2.weight", ...) these are.

    The chain is `dlgpu.functional.mlp`: nothing between its layers is visible. Where something has to be (a submodule has
    hooks, is parametrized, compiled, or was replaced by one of another class, or hooks on all modules are registered), the
    submodules are called one after the other, as torch.nn.Sequential does.

    Args:
        sizes: features of the input, of each hidden layer, of the result; two at least.
        activation: of every layer but the last: None (then no module stands between the layers), "relu", "leaky_relu",
            "sigmoid", "tanh", "gelu", "gelu_tanh" or "silu".
        out_activation: of the last layer; the same names.
        bias, device, dtype: as torch.nn.Linear, for every layer.
        negative_slope: leaky ReLU's slope for negative z.
        dropout: the probability of each element of a hidden layer's result to be dropped, in training. A `Dropout` stands
            after each hidden layer then, but for 0.

    Shape: input [..., sizes[0]], result [..., sizes[-1]].

    Raises:
        ValueError: fewer than two sizes; no such activation, and the message lists them; dropout is not between 0 and 1.

    >>> net = MLP([784, 256, 10], "relu")
    >>> net(torch.zeros(32, 784)).shape
    torch.Size([32, 10])
    >>> list(net.state_dict())
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | None,
        out_activation: str | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        negative_slope: float = 0.01,
        dropout: float = 0.0,
    ) -> None:
        lookup(activation)
        try:
            lookup(out_activation)
        except ValueError as error:
            raise ValueError(f"out_{error}") from None
        sizes = list(sizes)
        if len(sizes) < 2:
            raise ValueError(f"sizes: got {sizes}, expected two at least, of the input and of the result")
        modules: list[torch.nn.Module] = []
        for i in range(len(sizes) - 1):
            modules.append(Linear(sizes[i], sizes[i + 1], bias=bias, device=device, dtype=dtype))
            act = out_activation if i == len(sizes) - 2 else activation
            if act is not None:
                modules.append(Activation(act, negative_slope))
            if dropout != 0 and i < len(sizes) - 2:
                modules.append(Dropout(dropout))
        super().__init__(*modules)

    def __getitem__(self, index: Any) -> Any:
        """A submodule, or for a slice a torch.nn.Sequential of them."""
        if isinstance(index, slice):
            return torch.nn.Sequential(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.mlp`."""
        chain = _chain(self._modules.values())
        if chain is None:
            return super().forward(input)
        layers, activation, out_activation, negative_slope, dropout = chain
        return F.mlp(
            input,
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            activation=activation,
            out_activation=out_activation,
            negative_slope=negative_slope,
            dropout=dropout,
        )


class _GatedUnit(torch.nn.Module):
    """(act(x Wg^T + bg) * (x Wu^T + bu)) W3^T + b3 on `dlgpu.functional.gated_linear`."""

    activation: ClassVar[str]

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        self.w12 = Linear(in_features, 2 * hidden_features, bias=bias, device=device, dtype=dtype)
        self.w3 = Linear(hidden_features, out_features, bias=bias, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.gated_linear`."""
        inner, outer = self.w12, self.w3
        if any(_global_hooks()) or not (_is_plain_linear(inner) and _is_plain_linear(outer)):
            gate, up = inner(input).chunk(2, -1)
            return outer(_activation(gate, self.activation) * up)
        return F.gated_linear(
            input, inner.weight, inner.bias, outer.weight, outer.bias, activation=self.activation
        )


class SwiGLU(_GatedUnit):
    """y = (silu(x Wg^T + bg) * (x Wu^T + bu)) W3^T + b3, the feed-forward unit of Llama.

    The parameters are packed, with the names of xformers' SwiGLU: w12.weight is [2 hidden_features, in_features], the gate's
    rows first, then the up projection's, and w12.bias likewise; w3 projects down. They are two `Linear` layers, initialized
    as torch.nn.Linear. From a Llama checkpoint: torch.cat([gate_proj.weight, up_proj.weight]) and down_proj.weight.

    Nothing between the layers is visible. Where a layer has hooks, is parametrized, compiled, or was replaced by one of
    another class, or hooks on all modules are registered, the layers are called one after the other.

    Args:
        in_features: of the input.
        hidden_features: of each of the two projections and of their product.
        out_features: of the result; None for in_features.
        bias, device, dtype: as torch.nn.Linear, for both layers.

    Shape: input [..., in_features], result [..., out_features].

    Source: Shazeer, arXiv:2002.05202.

    >>> unit = SwiGLU(512, 1365)
    >>> unit(torch.zeros(32, 512)).shape
    torch.Size([32, 512])
    """

    activation = "silu"


class GEGLU(_GatedUnit):
    """y = (gelu(x Wg^T + bg) * (x Wu^T + bu)) W3^T + b3, gelu through erf. See `SwiGLU`."""

    activation = "gelu"


class ReGLU(_GatedUnit):
    """y = (relu(x Wg^T + bg) * (x Wu^T + bu)) W3^T + b3. See `SwiGLU`."""

    activation = "relu"


def _chain(modules: Iterable[Any]) -> tuple[list[Any], str | None, str | None, float, float] | None:
    """(linear layers, activation, out_activation, negative_slope, dropout) of modules that are layers with activations and
    dropouts after them, the same ones after all but the last, which has no dropout; None if they are not, or a call of one
    would do more than its forward."""
    if any(_global_hooks()):
        return None
    layers: list[Any] = []
    acts: list[str | None] = []
    # Of the layers so far; what is behind the last one counts once another layer follows.
    drops: list[float] = []
    dropped = False
    slopes = set()
    for module in modules:
        if _is_plain_linear(module):
            drops += [0.0] if layers and not dropped else []
            dropped = False
            layers.append(module)
            acts.append(None)
        elif type(module) is Dropout and _is_plain(module) and layers and not dropped:
            drops.append(module.p if module.training else 0.0)
            dropped = True
        elif type(module) is Activation and _is_plain(module) and acts and acts[-1] is None and not dropped:
            acts[-1] = module.activation
            if module.activation == "leaky_relu":
                slopes.add(module.negative_slope)
        else:
            return None
    if not layers or dropped or len(set(acts[:-1])) > 1 or len(slopes) > 1 or len(set(drops)) > 1:
        return None
    return layers, acts[0], acts[-1], slopes.pop() if slopes else 0.01, drops[0] if drops else 0.0


def _global_hooks() -> tuple[Any, ...]:
    module = torch.nn.modules.module
    return (
        module._global_forward_hooks,
        module._global_forward_pre_hooks,
        module._global_backward_hooks,
        module._global_backward_pre_hooks,
    )


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether a call of the module does what its class's forward does, and no more."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or "forward" in module.__dict__
    )


def _is_plain_linear(module: Any) -> bool:
    return type(module) is Linear and module.activation is None and _is_plain(module)


class Sequential(torch.nn.Sequential):
    """y = f_n(... f_2(f_1(x))): torch.nn.Sequential, whose arguments, submodules and state_dict these are, with runs of
    submodules computed as one:

        Linear layers with activations and dropouts after them, the same ones after all but the last:
        `dlgpu.functional.mlp`
        BatchNorm1d with an activation after it: `dlgpu.functional.batch_norm`

    Layers are `Linear` and `BatchNorm1d`; activations `Activation`, and torch's modules of the same functions.

    The submodules stay what they are: each gives its own result when it is called by itself, may stand in other places too,
    and may be exchanged. What is fused is seen anew at each call. Where something between two submodules has to be visible
    (one has hooks, is parametrized or compiled, or hooks on all modules are registered), they are called one after the other.

    Shape: the first submodule's input, the last one's result.

    >>> net = Sequential(Linear(784, 256), Activation("gelu"), torch.nn.Flatten(), BatchNorm1d(256), torch.nn.ReLU())
    >>> net.fused()
    [['0', '1'], ['3', '4']]
    """

    def forward(self, input: Any) -> Any:
        """See `dlgpu.functional.mlp` and `dlgpu.functional.batch_norm`."""
        if any(_global_hooks()):
            return super().forward(input)
        for members, layers, acts, dropout in _runs(self._modules.values()):
            if len(members) == 1:
                input = members[0](input)
                continue
            activation, out_activation = acts[0][0], acts[-1][0]
            slope = next((slope for name, slope in acts if name == "leaky_relu"), 0.01)
            if type(layers[0]) is BatchNorm1d:
                input = layers[0]._normalized(input, activation, slope)
            elif len(layers) == 1:
                (layer,) = layers
                input = F.linear(input, layer.weight, layer.bias, activation=activation, negative_slope=slope)
            else:
                input = F.mlp(
                    input,
                    [layer.weight for layer in layers],
                    [layer.bias for layer in layers],
                    activation=activation,
                    out_activation=out_activation,
                    negative_slope=slope,
                    dropout=dropout or 0.0,
                )
        return input

    def fused(self) -> list[list[str]]:
        """The names of the submodules that a call now would compute as one, run by run."""
        return [] if any(_global_hooks()) else _fused(self._modules)


def _fused(modules: Mapping[str, Any]) -> list[list[str]]:
    names = iter(modules)
    runs = [[next(names) for _ in run.members] for run in _runs(modules.values())]
    return [run for run in runs if len(run) > 1]


_TORCH_ACTIVATIONS: dict[type, str] = {
    torch.nn.LeakyReLU: "leaky_relu",
    torch.nn.ReLU: "relu",
    torch.nn.SiLU: "silu",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.Tanh: "tanh",
}


def _activation_of(module: Any) -> tuple[str, float] | None:
    """(name, slope) of a module that is an activation of ours or of torch's, and no more; None of any other."""
    kind = type(module)
    if kind is Activation:
        found = module.activation, module.negative_slope
    elif kind in _TORCH_ACTIVATIONS:
        found = _TORCH_ACTIVATIONS[kind], getattr(module, "negative_slope", 0.01)
    elif kind is torch.nn.GELU and module.approximate in ("none", "tanh"):
        found = "gelu" if module.approximate == "none" else "gelu_tanh", 0.01
    else:
        return None
    return found if _is_plain(module) else None


class _Run(NamedTuple):
    """Modules in a row that are computed as one: linear layers, or one batch norm, with activations and dropouts after them,
    the same ones after all but the last, which has no dropout. Another module is alone in its run, without layers."""

    members: list[Any]
    layers: list[Any]
    acts: list[tuple[str | None, float]]  # (name, slope), of each layer
    dropout: float | None  # of the hidden layers' results, None where there are none


def _runs(modules: Iterable[Any]) -> list[_Run]:
    """All modules, in order."""
    runs = [_Run([], [], [], None)]
    for module in modules:
        is_layer = type(module) in (Linear, BatchNorm1d) and _is_plain(module)
        act = (module.activation, module.negative_slope) if is_layer else _activation_of(module)
        if act is None:
            runs.append(_Run([module], [], [], None))
            continue
        fits = False
        members, layers, acts, dropout = runs[-1]
        between = 0.0
        if type(module) is Linear:
            if len(runs) > 2 and not layers and type(members[0]) is Dropout and _is_plain(members[0]):
                # A dropout is in a run once a layer comes after it.
                between = members[0].p if members[0].training else 0.0
                members, layers, acts, dropout = runs[-2]
            # By length: torch 2.11 compiles no bool() of a list.
            fits = (
                is_layer
                and len(layers) > 0
                and type(layers[0]) is Linear
                and len({name for name, _ in acts}) == 1
                and dropout in (None, between)
            )
        elif not is_layer:
            fits = len(acts) > 0 and acts[-1][0] is None
        # `mlp` takes one slope.
        if not fits or len({slope for name, slope in [*acts, act] if name == "leaky_relu"}) > 1:
            runs.append(_Run([module], [module], [act], None) if is_layer else _Run([module], [], [], None))
        elif is_layer:
            if members is not runs[-1].members:
                members += runs.pop().members
            runs[-1] = _Run([*members, module], [*layers, module], [*acts, act], between)
        else:
            members.append(module)
            acts[-1] = act
    return runs[1:]


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Softmax cross-entropy: torch.nn.CrossEntropyLoss on `dlgpu.functional.cross_entropy`.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as torch.nn.CrossEntropyLoss.
        z_loss, softcap, logit_scale, return_lse, return_accuracy, inplace_grad, grad_in_forward: as
            `dlgpu.functional.cross_entropy`.

    Shape: input [C], [N, C] or [N, C, d1, ...]; target [], [N] or [N, d1, ...] of int64, or class probabilities of the
    input's shape; token_weights, if given, of the unreduced loss's; result a scalar, or the unreduced loss for
    reduction="none". With return_lse or return_accuracy a named tuple (loss, lse, accuracy).
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        return_lse: bool = False,
        return_accuracy: bool = False,
        inplace_grad: bool = False,
        grad_in_forward: bool = False,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.return_lse = return_lse
        self.return_accuracy = return_accuracy
        self.inplace_grad = inplace_grad
        self.grad_in_forward = grad_in_forward

    def forward(  # type: ignore[override]
        self, input: torch.Tensor, target: torch.Tensor, token_weights: torch.Tensor | None = None
    ) -> torch.Tensor | CrossEntropyOutput:
        """See `dlgpu.functional.cross_entropy`."""
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            token_weights=token_weights,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            return_lse=self.return_lse,
            return_accuracy=self.return_accuracy,
            inplace_grad=self.inplace_grad,
            grad_in_forward=self.grad_in_forward,
        )


# torch's own from 2.13 on; before that there is none to be a subclass of.
_LinearCrossEntropyLoss: Any = getattr(
    torch.nn, "LinearCrossEntropyLoss", torch.nn.modules.loss._WeightedLoss
)


class LinearCrossEntropyLoss(_LinearCrossEntropyLoss):
    """A linear layer and the softmax cross-entropy of its result, which is never all stored: torch.nn.LinearCrossEntropyLoss
    on `dlgpu.functional.linear_cross_entropy`.

    Args:
        in_features, num_classes, out_features, bias, device, dtype: as torch.nn.LinearCrossEntropyLoss, whose parameters
            (`linear.weight` and `linear.bias`), initialization and state_dict these are.
        reduction, weight, ignore_index, label_smoothing, options: likewise.
        z_loss, softcap, logit_scale, memory_budget: as `dlgpu.functional.linear_cross_entropy`.

    Shape: input [N, in_features] or [in_features]; target [N] or [] of int64, [N, *out_features], or class probabilities;
    result a scalar, or target's shape for reduction="none".

    Raises:
        RuntimeError: weight's shape or label_smoothing does not fit.

    >>> LinearCrossEntropyLoss(16, 10)(torch.zeros(4, 16), torch.arange(4)).shape
    torch.Size([])
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        memory_budget: int | None = None,
    ) -> None:
        if weight is not None and tuple(weight.shape) != (num_classes,):
            raise RuntimeError(
                f"LinearCrossEntropyLoss: weight has shape {list(weight.shape)}, expected [{num_classes}]"
            )
        if not 0.0 <= label_smoothing <= 1.0:
            raise RuntimeError(
                f"LinearCrossEntropyLoss: label_smoothing must be between 0 and 1, got {label_smoothing}"
            )
        torch.nn.modules.loss._WeightedLoss.__init__(self, weight=weight, reduction=reduction)
        self.num_classes = num_classes
        self.out_features = out_features
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.linear = torch.nn.Linear(
            in_features, math.prod(out_features, start=num_classes), bias=bias, device=device, dtype=dtype
        )
        self.z_loss = z_loss
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.memory_budget = memory_budget

    def forward(
        self, input: torch.Tensor, target: torch.Tensor, token_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `dlgpu.functional.linear_cross_entropy`."""
        outer = self.num_classes, *self.out_features
        bias = self.linear.bias
        return F.linear_cross_entropy(
            input,
            self.linear.weight.reshape(*outer, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(outer),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            z_loss=self.z_loss,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            token_weights=token_weights,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        """torch.nn.LinearCrossEntropyLoss's, and what of the rest is set."""
        text = (
            f"in_features={self.linear.in_features}, num_classes={self.num_classes}, out_features={self.out_features}, "
            f"bias={self.linear.bias is not None}, reduction={self.reduction}, ignore_index={self.ignore_index}, "
            f"label_smoothing={self.label_smoothing}, options={self.options}"
        )
        for name, default in (
            ("z_loss", 0.0),
            ("softcap", None),
            ("logit_scale", 1.0),
            ("memory_budget", None),
        ):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        return text


class MSELoss(torch.nn.MSELoss):
    """The squared error: torch.nn.MSELoss on `dlgpu.functional.mse_loss`.

    Args:
        size_average, reduce, reduction: as torch.nn.MSELoss.

    Shape: input and target of one shape; result a scalar, or of that shape for reduction="none".
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.mse_loss`."""
        return F.mse_loss(input, target, reduction=self.reduction)


class L1Loss(torch.nn.L1Loss):
    """The absolute error: torch.nn.L1Loss on `dlgpu.functional.l1_loss`.

    Args:
        size_average, reduce, reduction: as torch.nn.L1Loss.

    Shape: as `MSELoss`.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.l1_loss`."""
        return F.l1_loss(input, target, reduction=self.reduction)


class SmoothL1Loss(torch.nn.SmoothL1Loss):
    """Squared errors below beta, absolute ones above: torch.nn.SmoothL1Loss on `dlgpu.functional.smooth_l1_loss`.

    Args:
        size_average, reduce, reduction, beta: as torch.nn.SmoothL1Loss.

    Shape: as `MSELoss`.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.smooth_l1_loss`."""
        return F.smooth_l1_loss(input, target, reduction=self.reduction, beta=self.beta)


class HuberLoss(torch.nn.HuberLoss):
    """Squared errors up to delta, absolute ones beyond: torch.nn.HuberLoss on `dlgpu.functional.huber_loss`.

    Args:
        reduction, delta: as torch.nn.HuberLoss.

    Shape: as `MSELoss`.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.huber_loss`."""
        return F.huber_loss(input, target, reduction=self.reduction, delta=self.delta)


class BCEWithLogitsLoss(torch.nn.BCEWithLogitsLoss):
    """Binary cross-entropy of logits: torch.nn.BCEWithLogitsLoss on `dlgpu.functional.binary_cross_entropy_with_logits`.

    Args:
        weight, size_average, reduce, reduction, pos_weight: as torch.nn.BCEWithLogitsLoss.

    Shape: as `MSELoss`; the weights broadcast to it.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.binary_cross_entropy_with_logits`."""
        return F.binary_cross_entropy_with_logits(
            input, target, self.weight, reduction=self.reduction, pos_weight=self.pos_weight
        )


class HingeLoss(torch.nn.Module):
    """max(0, 1 - t x) for targets t of -1 and 1, on `dlgpu.functional.hinge_loss`. Torch has no such module.

    Args:
        reduction: "none", "mean" or "sum".
        squared: whether to square each loss.

    Shape: as `MSELoss`.
    """

    def __init__(self, reduction: str = "mean", *, squared: bool = False) -> None:
        super().__init__()
        self.reduction = reduction
        self.squared = squared

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.hinge_loss`."""
        return F.hinge_loss(input, target, self.reduction, squared=self.squared)


class MultiMarginLoss(torch.nn.MultiMarginLoss):
    """The multi-class hinge loss: torch.nn.MultiMarginLoss on `dlgpu.functional.multi_margin_loss`.

    Args:
        p, margin, weight, size_average, reduce, reduction: as torch.nn.MultiMarginLoss.

    Shape: input [N, C] or [C]; target [N] or [] of int64; result a scalar, or target's shape for reduction="none".
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.multi_margin_loss`."""
        return F.multi_margin_loss(input, target, self.p, self.margin, self.weight, reduction=self.reduction)


class KLDivLoss(torch.nn.KLDivLoss):
    """The Kullback-Leibler divergence of log-probabilities: torch.nn.KLDivLoss on `dlgpu.functional.kl_div`.

    Args:
        size_average, reduce, reduction, log_target: as torch.nn.KLDivLoss.

    Shape: as `MSELoss`.
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.kl_div`."""
        return F.kl_div(input, target, reduction=self.reduction, log_target=self.log_target)


class BatchNorm1d(torch.nn.BatchNorm1d):
    """y = act((x - mean) / sqrt(var + eps) w + b), fused: torch.nn.BatchNorm1d with the activation inside.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype, and bias where torch has it: as
            torch.nn.BatchNorm1d, whose parameters, buffers and state_dict these are.
        activation: None, "relu", "leaky_relu", "sigmoid", "tanh", "gelu", "gelu_tanh" or "silu".
        negative_slope: leaky ReLU's slope for negative z.

    Shape: input [N, num_features] or [N, num_features, L], result the same.

    Raises:
        ValueError: no such activation; an input of other dimensions, or of one value a channel in training.

    >>> layer = BatchNorm1d(64, activation="relu")
    >>> layer(torch.randn(32, 64)).shape
    torch.Size([32, 64])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        **kwargs: bool,
    ) -> None:
        lookup(activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.batch_norm`."""
        return self._normalized(input, self.activation, self.negative_slope)

    def _normalized(self, input: torch.Tensor, activation: str | None, negative_slope: float) -> torch.Tensor:
        self._check_input_dim(input)
        tracks = self.training and self.track_running_stats
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None and self.num_batches_tracked is None:
            momentum = 0.0
        keeps = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            activation=activation,
            negative_slope=negative_slope,
            num_batches_tracked=self.num_batches_tracked,
        )

    def extra_repr(self) -> str:
        """torch.nn.BatchNorm1d's, and the activation."""
        return super().extra_repr() + _shown(self.activation, self.negative_slope)


def _shown(activation: str | None, negative_slope: float) -> str:
    """A layer's activation, as its repr shows it."""
    text = "" if activation is None else f", activation={activation!r}"
    return text + (f", negative_slope={negative_slope}" if activation == "leaky_relu" else "")


class LayerNorm(torch.nn.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) w + b over the last dimensions: torch.nn.LayerNorm, whose arguments, parameters and
    state_dict these are, on `dlgpu.functional.layer_norm`.

    Shape: input [*, *normalized_shape], result the same.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.layer_norm`."""
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """y = x / sqrt(mean x^2 + eps) w over the last dimensions: torch.nn.RMSNorm, whose arguments, parameters and state_dict
    these are, on `dlgpu.functional.rms_norm`.

    Shape: input [*, *normalized_shape], result the same.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.rms_norm`."""
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Dropout(torch.nn.Dropout):
    """In training, each element is dropped with probability p and the others are scaled by 1 / (1 - p): torch.nn.Dropout,
    whose arguments these are, on `dlgpu.functional.dropout`.

    Shape: any.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.dropout`."""
        return F.dropout(input, self.p, self.training, self.inplace)
