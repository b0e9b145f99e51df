"""Multi-tensor Adam and AdamW on arrays, in place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._blocks import BLOCK

__all__ = ["adam_step"]


def adam_step(
    params: list[Any],
    grads: list[Any],
    exp_avgs: list[Any],
    exp_avg_sqs: list[Any],
    max_exp_avg_sqs: list[Any] | None,
    steps: list[float],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
) -> None:
    """One step of Adam (decoupled: AdamW) on flat contiguous arrays; `steps` counts it already."""
    with np.errstate(all="ignore"):
        for n, p in enumerate(params):
            root = math.sqrt(1 - beta2 ** steps[n])
            scale, floor = lr * root / (1 - beta1 ** steps[n]), eps * root
            step = BLOCK if type(p) is np.ndarray else max(p.size, 1)
            for i in range(0, p.size, step):
                part = slice(i, i + step)
                q, g, m, v = p[part], grads[n][part], exp_avgs[n][part], exp_avg_sqs[n][part]
                t = np.empty_like(q)
                if maximize:
                    g = np.negative(g)
                if weight_decay and decoupled:
                    np.multiply(q, 1 - lr * weight_decay, out=q)
                elif weight_decay:
                    g = np.multiply(q, weight_decay, out=np.empty_like(q)) + g
                np.subtract(g, m, out=t)
                np.multiply(t, 1 - beta1, out=t)
                np.add(m, t, out=m)
                np.multiply(g, g, out=t)
                np.multiply(t, 1 - beta2, out=t)
                np.multiply(v, beta2, out=v)
                np.add(v, t, out=v)
                if max_exp_avg_sqs is not None:
                    v = np.maximum(max_exp_avg_sqs[n][part], v, out=max_exp_avg_sqs[n][part])
                np.sqrt(v, out=t)
                np.add(t, floor, out=t)
                np.divide(m, t, out=t)
                np.multiply(t, scale, out=t)
                np.subtract(q, t, out=q)
