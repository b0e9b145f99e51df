"""The library's functions: torch.nn.functional's names, arguments and results, on dlgpu's kernels."""

from __future__ import annotations

import torch

from dlgpu.ops.activations import activation as _activation
from dlgpu.ops.cross_entropy import cross_entropy
from dlgpu.ops.linear import linear

__all__ = [
    "cross_entropy",
    "gelu",
    "gelu_tanh",
    "leaky_relu",
    "linear",
    "relu",
    "sigmoid",
    "silu",
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
