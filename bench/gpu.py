"""What an NVIDIA GPU is measured at: the shapes that the kernels were made for, each with those who do the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .cases import BOTH, FORWARD, OPS, STEP
from .measure import Case
from .providers import PROVIDERS, absent, offered
from .suite import Job, compare, metering

__all__ = ["TARGETS", "target_jobs"]

_HALF, _SINGLE = torch.bfloat16, torch.float32
_COMPILED = ("eager", "compile-max")

# (op, shape, passes, dtype, options, against whom).
Target = tuple[str, str, str, torch.dtype, Mapping[str, Any], tuple[str, ...]]
TARGETS: tuple[Target, ...] = (
    *(
        ("linear", shape, passes, _HALF, {"activation": activation}, rivals)
        for shape in ("h200-8k", "h200-ffn", "h200-k1024", "h200-k512", "h200-k256")
        for passes, activation, rivals in (
            (FORWARD, "gelu_tanh", ("eager", "torch-fused")),
            (BOTH, "gelu", _COMPILED),
        )
    ),
    ("mlp", "h200-mlp", BOTH, _HALF, {}, _COMPILED),
    ("gated_linear", "h200-ffn", BOTH, _HALF, {}, (*_COMPILED, "liger")),
    *(
        ("cross_entropy", shape, passes, _HALF, options, rivals)
        for shape in ("h200-llama3", "h200-llama2")
        for passes, options, rivals in (
            (FORWARD, {}, ("eager", "liger", "quack")),
            (BOTH, {}, ("eager", "eager-float", "compile", "liger", "quack")),
            (BOTH, {"grad_in_forward": True}, ("liger",)),
        )
    ),
    (
        "linear_cross_entropy",
        "h200-8k",
        BOTH,
        _HALF,
        {},
        ("eager", "cublaslt", "torch-fused", "liger", "cce-exact"),
    ),
    ("linear_cross_entropy", "h200-8k", BOTH, _HALF, {"memory": "lean"}, ("cublaslt", "liger", "cce-exact")),
    ("linear_cross_entropy", "h200-1k", BOTH, _HALF, {}, ("eager", "cublaslt", "liger")),
    ("softmax", "h200-llama2", BOTH, _HALF, {}, ("eager", "compile", "liger", "quack")),
    ("layer_norm", "h200-4k", BOTH, _HALF, {}, ("eager", "compile", "liger")),
    ("rms_norm", "h200-4k", BOTH, _HALF, {}, ("eager", "compile", "liger", "quack")),
    *(
        (op, shape, STEP, _SINGLE, {}, ("eager", "torch-fused"))
        for op, shape in (
            ("adam", "h200-300m"),
            ("adamw", "h200-300m"),
            ("adam", "h200-300m-1000"),
            ("adam", "many"),
            ("adam", "small"),
            ("sgd", "h200-300m"),
        )
    ),
    ("training_step", "h200-mlp", STEP, _HALF, {}, ("eager", "torch-fused", "compile")),
)


def target_jobs() -> list[Job]:
    """A job for each target, and before them a row for each library that is not here."""
    missing = {
        name: why
        for name in dict.fromkeys(rival for *_, rivals in TARGETS for rival in rivals)
        if (why := absent(PROVIDERS[name], "cuda"))
    }

    def said(context: Any, share: float) -> Iterator[dict[str, Any]]:
        for name, why in missing.items():
            yield {"section": "gpu", "kind": "absent", "provider": name, "reason": why}

    jobs = [Job("gpu", "who is here", said), metering(list(dict.fromkeys(name for name, *_ in TARGETS)))]
    for name, shape, passes, dtype, options, rivals in TARGETS:
        op = OPS[name]
        case = Case(op, op.shapes[shape], passes, dtype, options, "cuda")
        here = [r for r in rivals if r not in missing and not offered(op, r, options, passes)]
        if here:
            jobs.append(compare(case, here, section="gpu"))
    return jobs
