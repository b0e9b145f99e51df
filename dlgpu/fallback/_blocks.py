"""Blocks: elementwise work in pieces that stay in a core's L2 cache from one ufunc pass to the next.

Anything but a NumPy array is one block: another library's device wants few large calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["BLOCK", "for_blocks"]

# Elements in a block: four float32 streams of it fill half of a 1 MiB L2.
BLOCK = 1 << 15


def for_blocks(function: Callable[[int, int], None], rows: int, width: int, like: Any) -> None:
    """Calls function(start, stop) over the rows [0, rows), each of `width` elements, block by block."""
    if type(like) is not np.ndarray or rows * width <= BLOCK:
        function(0, rows)
        return
    step = max(1, BLOCK // max(width, 1))
    for start in range(0, rows, step):
        function(start, min(start + step, rows))
