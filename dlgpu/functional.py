"""The library's functions: torch.nn.functional's names, arguments and results, on dlgpu's kernels.

They also take arrays in place of tensors: NumPy's, CuPy's, or any that speaks DLPack, all of one kind, and then give that
kind back. Nothing is copied on the way (but NumPy arrays that are read-only or have negative strides), and there is no
autograd.

>>> import numpy as np
>>> relu(np.array([-1.0, 2.0]))
array([0., 2.])
"""

from __future__ import annotations

import torch

from dlgpu._arrays import takes_arrays
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

batch_norm = takes_arrays(batch_norm)
binary_cross_entropy_with_logits = takes_arrays(binary_cross_entropy_with_logits)
cross_entropy = takes_arrays(cross_entropy)
dropout = takes_arrays(dropout)
gated_linear = takes_arrays(gated_linear)
hinge_loss = takes_arrays(hinge_loss)
huber_loss = takes_arrays(huber_loss)
kl_div = takes_arrays(kl_div)
l1_loss = takes_arrays(l1_loss)
layer_norm = takes_arrays(layer_norm)
linear = takes_arrays(linear)
linear_cross_entropy = takes_arrays(linear_cross_entropy)
log_softmax = takes_arrays(log_softmax)
logsumexp = takes_arrays(logsumexp)
mlp = takes_arrays(mlp)
mse_loss = takes_arrays(mse_loss)
multi_margin_loss = takes_arrays(multi_margin_loss)
rms_norm = takes_arrays(rms_norm)
smooth_l1_loss = takes_arrays(smooth_l1_loss)
softmax = takes_arrays(softmax)


@takes_arrays
def relu(input: torch.Tensor) -> torch.Tensor:
    """y = max(x, 0), NaN where x is NaN. Any shape; saves y. See `dlgpu.ops.activations.activation`."""
    return _activation(input, "relu")


@takes_arrays
def leaky_relu(input: torch.Tensor, negative_slope: float = 0.01) -> torch.Tensor:
    """y = x where x > 0, else negative_slope x. Any shape; saves y (x where the slope is negative)."""
    return _activation(input, "leaky_relu", negative_slope)


@takes_arrays
def sigmoid(input: torch.Tensor) -> torch.Tensor:
    """y = 1 / (1 + exp(-x)). Any shape; saves y."""
    return _activation(input, "sigmoid")


@takes_arrays
def tanh(input: torch.Tensor) -> torch.Tensor:
    """y = tanh(x). Any shape; saves y."""
    return _activation(input, "tanh")


@takes_arrays
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


@takes_arrays
def gelu_tanh(input: torch.Tensor) -> torch.Tensor:
    """gelu(x, approximate="tanh")."""
    return _activation(input, "gelu_tanh")


@takes_arrays
def silu(input: torch.Tensor) -> torch.Tensor:
    """y = x / (1 + exp(-x)). Any shape; saves x by reference. Source: Elfwing et al., arXiv:1702.03118."""
    return _activation(input, "silu")
