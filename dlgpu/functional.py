"""The library's functions: torch.nn.functional's names, arguments and results, on dlgpu's kernels."""

from __future__ import annotations

import torch

from dlgpu.ops.activations import activation as _activation
from dlgpu.ops.batch_norm import batch_norm
from dlgpu.ops.cross_entropy import cross_entropy
from dlgpu.ops.dropout import dropout
from dlgpu.ops.gated import gated_linear
from dlgpu.ops.layer_norm import layer_norm, rms_norm
from dlgpu.ops.linear import linear
from dlgpu.ops.linear_cross_entropy import linear_cross_entropy
from dlgpu.ops.losses import (
    binary_cross_entropy_with_logits,
    hinge_loss,
    huber_loss,
    kl_div,
    l1_loss,
    mse_loss,
    multi_margin_loss,
    smooth_l1_loss,
)
from dlgpu.ops.mlp import mlp
from dlgpu.ops.softmax import log_softmax, logsumexp, softmax

__all__ = [
    "batch_norm",
    "binary_cross_entropy_with_logits",
    "cross_entropy",
    "dropout",
    "gated_linear",
    "gelu",
    "gelu_tanh",
    "hinge_loss",
    "huber_loss",
    "kl_div",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "linear_cross_entropy",
    "log_softmax",
    "logsumexp",
    "mlp",
    "mse_loss",
    "multi_margin_loss",
    "relu",
    "rms_norm",
    "sigmoid",
    "silu",
    "smooth_l1_loss",
    "softmax",
    "tanh",
]


def relu(input: torch.Tensor) -> torch.Tensor:
    """y = max(x, 0), NaN where x is NaN. Any shape; saves y. See `dlgpu.ops.activations.activation`."""
    return _activation(input, "relu")


def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01) -> torch.Tensor:
    """y = x where x > 0, else negative_slope x. Any shape; saves y (x where the slope is negative)."""
    return _activation(input, "leaky_relu", negative_slope)


def sigmoid(input: torch.Tensor) -> torch.Tensor:
    """y = 1 / (1 + exp(-x)). Any shape; saves y."""
    return _activation(input, "sigmoid")


def tanh(input: torch.Tensor) -> torch.Tensor:
    """y = tanh(x). Any shape; saves y."""
    return _activation(input, "tanh")


def gelu(input: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """y = x Phi(x), Phi the normal distribution function; with approximate="tanh",
    y = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2. Any shape; saves x by reference.

    Raises:
        RuntimeError: `approximate` is neither "none" nor "tanh".

    Source: Hendrycks and Gimpel, arXiv:1606.08415.
    """
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _activation(input, "gelu_tanh" if approximate == "tanh" else "gelu")


def gelu_tanh(input: torch.Tensor) -> torch.Tensor:
    """gelu(x, approximate="tanh")."""
    return _activation(input, "gelu_tanh")


def silu(input: torch.Tensor) -> torch.Tensor:
    """y = x / (1 + exp(-x)). Any shape; saves x by reference. Source: Elfwing et al., arXiv:1702.03118."""
    return _activation(input, "silu")
