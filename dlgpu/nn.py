"""Modules: torch.nn's, on dlgpu's functions. Parameters and state only; the math is in dlgpu.functional."""

from __future__ import annotations

from typing import Any

import torch

from dlgpu import functional as F
from dlgpu.kernels.activations import lookup

__all__ = ["CrossEntropyLoss", "Linear"]


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


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """Softmax cross-entropy of logits and class indices: torch.nn.CrossEntropyLoss on `dlgpu.functional.cross_entropy`.

    Args:
        weight, size_average, ignore_index, reduce, reduction, label_smoothing: as torch.nn.CrossEntropyLoss.

    Shape: input [C], [N, C] or [N, C, d1, ...]; target [], [N] or [N, d1, ...] of int64; result a scalar, or target's
    shape for reduction="none".
    """

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """See `dlgpu.functional.cross_entropy`."""
        return F.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )
