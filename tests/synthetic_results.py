"""Results files that nobody measured, for tests: a machine, a GPU and times that do not exist."""

import copy
import json
from pathlib import Path

import numpy as np

from dlgpu.bench import harness, report

GPU = "Synthetic GPU"
ENVIRONMENT = {
    "dlgpu": "0.synthetic",
    "source_hash": "0123456789abcdef",
    "git": None,
    "device": "cuda",
    "why": GPU,
    "gpu": {"name": GPU, "driver": "0.0", "cuda": "0.0"},
    "cpu": "Synthetic CPU",
    "cores": 2,
    "threads": {"torch": 2, "numpy": 2},
    "system": "Synthetic",
    "python": "3.0",
    "torch": "0.0",
    "torch_cuda": None,
    "triton": "0.0",
    "numpy": "0.0",
}


def timing(
    op="synthetic",
    time_a=1e-3,
    time_b=2e-3,
    *,
    shape=None,
    noise=0.02,
    pairs=60,
    seed=0,
    drift=0.0,
    **more,
):
    """A timing row: pairs of lognormal samples about two times, which drift together."""
    rng = np.random.default_rng(seed)
    common = 1 + drift * np.linspace(0, 1, pairs)
    a, b = (t * common * rng.lognormal(0, noise, pairs) for t in (time_a, time_b))
    ratio, low, high = harness.bootstrap_interval(a, b)
    row = {
        "section": "run",
        "kind": "timing",
        "op": op,
        "options": {},
        "passes": "fwd+bwd",
        "shape": shape or {"M": 64, "N": 32},
        "dtype": "bfloat16",
        "note": "",
        "device": "cuda",
        "cache": "cold",
        "timer": "events",
        "a": "dlgpu",
        "b": "eager",
        "samples_a_s": a.tolist(),
        "samples_b_s": b.tolist(),
        "repeats_a": 1,
        "repeats_b": 1,
        "ratio": ratio,
        "low": low,
        "high": high,
        "confidence": 0.95,
        "pairs": pairs,
        "converged": True,
        "dropped": 0,
        "others": 0.1,
        "crowded": False,
    }
    assert more.keys() <= report.KINDS["timing"].keys()
    return {**row, **more}


def document(rows, status="complete", **environment):
    """A results document of these rows."""
    return {
        "schema": report.SCHEMA,
        "status": status,
        "started": "2000-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "arguments": {"suite": "synthetic"},
        "environment": {**copy.deepcopy(ENVIRONMENT), **environment},
        "rows": list(rows),
    }


def write(path: Path, rows, **more) -> Path:
    """A results file of these rows."""
    path.write_text(json.dumps(document(rows, **more)))
    return path


def ceilings():
    """Round numbers."""
    return [
        {
            "section": "ceilings",
            "kind": "ceiling",
            "name": name,
            "value": value,
            "unit": unit,
            "samples_s": [1.0],
        }
        for name, value, unit in (
            ("copy, bytes read and written", 4e12, "B/s"),
            ("bf16 matmul, synthetic", 8e14, "FLOP/s"),
            ("fp32 matmul, synthetic", 5e13, "FLOP/s"),
            ("launches of torch's add_", 2e5, "1/s"),
        )
    ]


def model(gpu, gain):
    """A row of kind model."""
    return {
        "section": "model",
        "kind": "model",
        "op": "synthetic",
        "options": {"activation": "gelu"},
        "passes": "fwd+bwd",
        "shape": {"M": 64, "N": 32},
        "dtype": "bfloat16",
        "gpu": gpu,
        "launches": 2,
        "compulsory_bytes": 10**9,
        "flops": 0,
        "bound_s": 1e-3,
        "unfused_bytes": {"torch eager": 25 * 10**8, "torch.compile": 15 * 10**8},
        "unfused_launches": {"torch eager": 5},
        "unfused_bound_s": {"torch eager": gain * 1e-3},
        "gain": gain,
        "limited_by": "bytes",
    }


def full():
    """Rows of every kind, with all that the plots show."""
    rows = ceilings()
    seed = 0
    for op, passes, intensity in (
        ("linear", "fwd", "MNK"),
        ("linear", "fwd+bwd", "MNK"),
        ("linear_cross_entropy", "fwd+bwd", "MNK"),
        ("cross_entropy", "fwd+bwd", ""),
        ("layer_norm", "fwd+bwd", ""),
        ("adam", "step", ""),
    ):
        for scale in (1, 4, 16):
            shape = {"M": 512 * scale, "N": 4096, "K": 1024} if intensity else {"N": 512 * scale, "V": 32000}
            elements = float(np.prod(list(shape.values())[:2]))
            fused = int(6 * elements)
            flops = 2 * int(np.prod(list(shape.values()))) if intensity else None
            for b, unfused, gain in (("eager", 2.2, 1.7), ("compile", None, 1.05), ("liger", None, 0.9)):
                seed += 1
                time_a = fused / 3.1e12 + (flops or 0) / 6e14 + 8e-6
                rows.append(
                    timing(
                        op,
                        time_a,
                        time_a * gain * (1 + 0.03 * (seed % 5)),
                        shape=shape,
                        seed=seed,
                        noise=0.01 + 0.3 * (seed % 11 == 0),
                        passes=passes,
                        b=b,
                        options={"activation": "gelu"} if op == "linear" else {},
                        compulsory_bytes=fused,
                        unfused_bytes=int(fused * unfused) if unfused else None,
                        launches_a=2,
                        unfused_launches=5,
                        flops=flops,
                        bytes_per_s=fused / time_a,
                        flops_per_s=flops / time_a if flops else None,
                        peak_memory_a_bytes=fused // 2,
                        peak_memory_b_bytes=fused,
                    )
                )
    title = "synthetic fwd M=1"
    rows += [
        {
            "section": "bytes",
            "kind": "count",
            "op": "synthetic",
            "options": {},
            "passes": "step",
            "shape": {"n": 10**9, "tensors": 1},
            "dtype": "float32",
            "launches": 1,
            "compulsory_bytes": 28 * 10**9,
            "requested_bytes": None,
            "unfused_bytes": {"torch eager (foreach)": 72 * 10**9, "torch fused=True": 28 * 10**9},
            "laws": [],
            "fitted_on": [],
            "held_out": [],
        },
        {
            "section": "ceilings",
            "kind": "bound",
            "op": "synthetic",
            "passes": "step",
            "shape": {"n": 10**9},
            "dtype": "float32",
            "bandwidth": 4e12,
            "compulsory_s": 0.007,
            "unfused_s": {"torch eager": 0.018},
        },
        {
            "section": "digits",
            "kind": "training",
            "a": "dlgpu",
            "b": "torch",
            "losses_a": [2.3, 1.0, None],
            "losses_b": [2.3, 1.0, 0.5],
            "accuracy_a": 0.97,
            "accuracy_b": 0.97,
            "epochs": 1,
            "batch": 64,
            "seed": 0,
            "device": "cpu",
        },
        {"section": "digits", "kind": "kernels", "losses": [2.3, 1.0], "max_difference": 1e-7},
        {
            "section": "digits",
            "kind": "float64",
            "a": "dlgpu",
            "b": "torch",
            "steps": 100,
            "distance_a": 1e-7,
            "distance_b": 1e-7,
        },
        *(model(gpu, gain) for gpu, gain in (("Synthetic GPU A", 2.5), ("Synthetic GPU B", 1.4))),
        {
            "section": "correctness",
            "kind": "tests",
            "title": "synthetic tests",
            "passed": 10,
            "failed": 1,
            "skipped": 2,
            "failures": [{"id": "tests/test_synthetic.py::test_one", "message": "assert 1 == 2"}],
        },
        {
            "section": "check",
            "kind": "checker",
            "title": "synthetic kernels",
            "checker": "synthetic",
            "errors": 0,
            "detail": "",
            "kernels": [],
        },
        {"section": "tune", "kind": "tuned", "title": "a synthetic table"},
        {
            "section": "profile",
            "kind": "achieved",
            "op": "synthetic",
            "options": {},
            "passes": "fwd",
            "shape": {"n": 1},
            "dtype": "float32",
            "seconds": 1e-3,
            "compulsory_bytes": 10**9,
            "requested_bytes": None,
            "flops": None,
            "bytes_per_s": 1e12,
            "flops_per_s": None,
            "copy_share": 0.25,
            "matmul_share": None,
        },
        {
            "section": "profile",
            "kind": "counter",
            "op": "synthetic",
            "options": {},
            "passes": "fwd",
            "shape": {"n": 1},
            "dtype": "float32",
            "hardware_bytes": 11,
            "law_bytes": 10,
            "over_law": 1.1,
            "kernels": [],
        },
        {"section": "run", "kind": "absent", "provider": "quack", "reason": "no module named quack"},
        {
            "section": "run",
            "kind": "wrong",
            "title": title,
            "provider": "cce",
            "detail": "error 0.5, allowed 0.1",
        },
        {
            "section": "run",
            "kind": "impossible",
            "title": title,
            "provider": "cupy",
            "detail": "above the ceiling",
        },
        {"section": "run", "kind": "skipped", "title": title, "reason": "no time left"},
        {"section": "run", "kind": "error", "title": title, "message": "RuntimeError: synthetic"},
    ]
    return rows
