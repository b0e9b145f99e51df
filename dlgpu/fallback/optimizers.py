"""Multi-tensor Adam and AdamW on arrays, in place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ._blocks import BLOCK

__all__ = ["adam_step"]


@np.errstate(all="ignore")
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
    """One step of Adam (decoupled: AdamW) on flat contiguous arrays:

        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    `steps` holds t, which counts this step already. Every block of an array goes through all of it while it is in cache.
    """
    decay = 1 - lr * weight_decay if decoupled else 1.0
    coupled = 0.0 if decoupled else weight_decay
    for n, p in enumerate(params):
        # sqrt(1 - b2^t) taken out of the denominator: one pass fewer.
        root = math.sqrt(1 - beta2 ** steps[n])
        rate, floor = lr * root / (1 - beta1 ** steps[n]), eps * root
        g, m, v = grads[n], exp_avgs[n], exp_avg_sqs[n]
        top = None if max_exp_avg_sqs is None else max_exp_avg_sqs[n]
        size = p.size
        if size <= BLOCK or type(p) is not np.ndarray:
            _update(p, g, m, v, top, beta1, beta2, rate, floor, decay, coupled, maximize)
            continue
        for i in range(0, size, BLOCK):
            at = slice(i, i + BLOCK)
            _update(
                p[at], g[at], m[at], v[at], None if top is None else top[at],
                beta1, beta2, rate, floor, decay, coupled, maximize,
            )  # fmt: skip


def _update(
    p: Any,
    g: Any,
    m: Any,
    v: Any,
    top: Any | None,
    beta1: float,
    beta2: float,
    rate: float,
    floor: float,
    decay: float,
    coupled: float,
    maximize: bool,
) -> None:
    if maximize:
        g = np.negative(g)
    if decay != 1:
        np.multiply(p, decay, out=p)
    if coupled:
        g = g + p * coupled
    t = np.subtract(g, m)
    # torch.lerp: from whichever end is nearer, so that b1 = 0 gives g itself.
    if beta1 > 0.5:
        np.multiply(t, 1 - beta1, out=t)
        np.add(m, t, out=m)
    else:
        np.multiply(t, beta1, out=t)
        np.subtract(g, t, out=m)
    np.multiply(g, g, out=t)
    np.multiply(t, 1 - beta2, out=t)
    np.multiply(v, beta2, out=v)
    np.add(v, t, out=v)
    if top is not None:
        v = np.maximum(top, v, out=top)
    np.sqrt(v, out=t)
    np.add(t, floor, out=t)
    np.divide(m, t, out=t)
    np.multiply(t, rate, out=t)
    np.subtract(p, t, out=p)
