"""Dropout: checks, the dispatcher's op and autograd. The kernel is in kernels/dropout.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import dropout as arrays
from dlgpu.kernels import configs
from dlgpu.kernels import dropout as kernels

__all__ = ["dropout"]

# The largest float32 below 1.
_LARGEST = 1 - 2.0**-24


def dropout(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> torch.Tensor:
    """y = x k / (1 - p), k = 0 with probability p, else 1, independently for each element; y = x unless `training`.

    Args:
        input: x, any shape, float32, bfloat16, float16 or float64.
        p: the probability of an element to be dropped.
        inplace: x becomes y, and is returned.

    Returns:
        y, of x's dtype; x itself where nothing is dropped (not training, p = 0, no elements), as
        torch.nn.functional.dropout.

    Raises:
        TypeError: an argument's type or dtype does not fit.
        ValueError, RuntimeError: p is not between 0 and 1, or not a number.

    Every call draws a seed from torch's generator of x's device, on the device: torch.manual_seed repeats it, and each replay
    of a CUDA graph draws another. The mask is not torch's for that seed, but one for all backends. Saved for backward: the
    seed, of which the mask is drawn again. One read and one write each way.

    Sources: Srivastava et al., JMLR 15, 2014; Philox4x32, Salmon et al., SC 2011.

    >>> dropout(torch.ones(3), training=False)
    tensor([1., 1., 1.])
    """
    _checks.require_tensor("dropout", "input", input)
    _checks.require_number("dropout", "p", p)
    _checks.require_floating("dropout", "input", input)
    _require_probability(p)
    if not training or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return input.mul_(0.0) if inplace else input * 0.0
    backend = _dispatch.choose_backend(input, "dropout")
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=input.device)
    y = _dropout(input, seed, float(p), backend)
    return input.copy_(y) if inplace else y


def _require_probability(p: float) -> None:
    if not 0 <= p <= 1:
        # torch's types.
        error = RuntimeError if p != p else ValueError
        raise error(f"dropout probability has to be between 0 and 1, but got {p}")


def _draw_seeds(n: int, device: torch.device) -> torch.Tensor:
    """[n, 2] int64, of which the first column counts: each begins at 16 bytes, so that kernels are not compiled twice."""
    return torch.randint(-(1 << 63), (1 << 63) - 1, (n, 2), dtype=torch.int64, device=device)


def _probability(p: float) -> float:
    """p in float32, with which the mask is drawn."""
    return float(np.float32(min(p, _LARGEST)))


def _triton(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    return kernels.dropout_fwd(x, seed, _probability(p), 1 / (1 - p))


def _fallback(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    y = arrays.dropout_fwd(to_array(x), to_array(seed), _probability(p), 1 / (1 - p))
    return to_tensor(y, x.dtype)


def _eager(x: torch.Tensor, seed: torch.Tensor, p: float) -> torch.Tensor:
    """The same mask by torch's integer operations."""
    low = 0xFFFFFFFF
    counter = torch.arange(-(-x.numel() // 4), device=x.device)
    keys = [seed & low, (seed >> 32) & low]
    c = [counter & low, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    for _ in range(arrays._ROUNDS):
        a, b = (c[i] * multiplier for i, multiplier in zip((0, 2), arrays._MULTIPLIERS, strict=True))
        c = [
            ((b >> 32) & low) ^ c[1] ^ keys[0],
            b & low,
            ((a >> 32) & low) ^ c[3] ^ keys[1],
            a & low,
        ]
        keys = [(key + constant) & low for key, constant in zip(keys, arrays._KEYS, strict=True)]
    bits = torch.stack(c, 1).view(-1)[: x.numel()] >> 1
    keep = (bits >= int(_probability(p) * (1 << 31))).view(x.shape)
    scaled = x.double() if x.dtype is torch.float64 else x.float()
    return (scaled * (keep * (1 / (1 - p)))).to(x.dtype).contiguous()


class DropoutFunction(torch.autograd.Function):
    """Autograd of `dropout`, at the op's Autograd key."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seed: torch.Tensor, p: float, backend: str) -> torch.Tensor:
        ctx.save_for_backward(seed)
        ctx.options = p, backend
        return _dropout.below(x, seed, p, backend)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        # The op is linear in x: its derivative is itself, which is differentiable too.
        if _dispatch.transformed():
            return _eager(dy, seed, ctx.options[0]), None, None, None
        op = _dropout if torch.is_grad_enabled() else _dropout.below
        return op(dy, seed, *ctx.options), None, None, None


def _dropout_autograd(x: torch.Tensor, seed: torch.Tensor, p: float, backend: str) -> torch.Tensor:
    if torch.is_grad_enabled() and x.requires_grad:
        return DropoutFunction.apply(x, seed, p, backend)
    return _dropout.below(x, seed, p, backend)


_dropout = _dispatch.define(
    "dropout(Tensor input, Tensor seed, float p, str backend) -> Tensor",
    triton=_triton,
    fallback=_fallback,
    eager=_eager,
    fake=lambda x, seed, p, backend: x.new_empty(x.shape),
    autograd=_dropout_autograd,
)


@_dispatch.explains("dropout")
def _explain(
    input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> tuple[torch.Tensor, Any]:
    _checks.require_tensor("dropout", "input", input)
    _checks.require_floating("dropout", "input", input)

    def steps(backend: str) -> list[tuple[str, str]]:
        if not training or p == 0 or input.numel() == 0:
            return [("nothing", "the input is returned")]
        if p == 1:
            return [("torch.mul", "by 0")]
        if backend != "triton":
            return [
                (
                    "forward, backward",
                    "the same mask by torch's operations" if backend == "torch" else "NumPy or CuPy",
                )
            ]
        tile = str(configs.dropout_tile(input.dtype))
        return [("_dropout_kernel (forward)", tile), ("_dropout_kernel (backward)", tile)]

    return input, steps
