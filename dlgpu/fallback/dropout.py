"""Dropout on arrays, with the mask of kernels/dropout.py bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from ._blocks import for_blocks

__all__ = ["dropout_fwd", "keep"]

# Philox4x32: Salmon et al., SC 2011.
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEYS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 7
_LOW = 0xFFFFFFFF

# Elements in a block: 8 bytes of each of six streams for every fourth.
_BLOCK = 1 << 15


def keep(seed: Any, start: int, stop: int, p: float) -> Any:
    """Which elements from start, a multiple of 4, to stop are kept; seed is an int64 array of one, p a
    float32's value."""
    count = -(-(stop - start) // 4)
    counter: Any = np.arange(start // 4, start // 4 + count, dtype=np.uint64, like=seed)
    key = seed.reshape(()).view(np.uint64)
    keys = [key & _LOW, key >> np.uint64(32)]
    c0, c1 = counter & _LOW, counter >> np.uint64(32)
    c2, c3 = np.zeros_like(c0), np.zeros_like(c0)
    for _ in range(_ROUNDS):
        # The lower halves of c1 and c3 count alone: the upper ones fall away in the next round.
        a, b = np.multiply(c0, _MULTIPLIERS[0]), np.multiply(c2, _MULTIPLIERS[1])
        for c, product, k in ((c1, b, keys[0]), (c3, a, keys[1])):
            np.bitwise_xor(c, k, out=c)
            np.bitwise_xor(c, product >> np.uint64(32), out=c)
            np.bitwise_and(c, _LOW, out=c)
        c0, c1, c2, c3 = c1, b, c3, a
        keys = [(k + constant) & _LOW for k, constant in zip(keys, _KEYS, strict=True)]
    bits: Any = np.empty_like(c0, dtype=np.int32, shape=(count, 4))
    for lane, c in enumerate((c0, c1, c2, c3)):
        bits[:, lane] = (c & _LOW) >> np.uint64(1)
    return bits.reshape(-1)[: stop - start] >= int(p * (1 << 31))


def dropout_fwd(x: Any, seed: Any, p: float, scale: float) -> Any:
    """x times scale where it is kept, times 0 where it is dropped."""
    y = np.empty_like(x, order="C", shape=x.shape)
    flat, result = x.reshape(-1), y.reshape(-1)

    def block(i: int, j: int) -> None:
        np.multiply(keep(seed, i, j, p), result.dtype.type(scale), out=result[i:j])
        np.multiply(result[i:j], flat[i:j], out=result[i:j])

    # A product, as torch's: NaN and infinity that are dropped are NaN.
    with np.errstate(all="ignore"):
        for_blocks(block, flat.size, 1, x, _BLOCK)
    return y
