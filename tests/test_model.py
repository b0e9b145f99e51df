"""The byte laws of every op, exact on sizes they were not fitted on and pinned here; and what the model makes of them."""

import importlib
import importlib.util
import json
import pkgutil
import sys

import pytest
import torch

from dlgpu.bench import compiled, gpus, laws, model, report
from dlgpu.bench.__main__ import main
from dlgpu.bench.cases import BOTH, OPS, STEP
from dlgpu.bench.environment import UsageError
from dlgpu.bench.launches import Operand, Record
from dlgpu.bench.laws import PROBES, Law, LawError, Laws, Sample, Traffic
from dlgpu.bench.measure import Case
from dlgpu.kernels import _triton

interpreted = pytest.mark.skipif(not _triton.INTERPRETED, reason="the meter sees interpreted kernels only")

# Compulsory and requested bytes of each kernel, by argument: x is all of its bytes, "3 x" three times, "down w" as many times
# as there are rows of tiles. A pass too many over an argument, or one too few, changes a line here.
LAWS = {
    "_activation_bwd_kernel": (
        "dx + dy + saved",
        "dx + dy + saved",
    ),
    "_activation_fwd_kernel": (
        "x + y",
        "x + y",
    ),
    "_batch_norm_apply_kernel": (
        "b + mean + var + w + x + y",
        "programs b + programs mean + programs var + programs w + x + y",
    ),
    "_batch_norm_dx_kernel": (
        "b + db + dw + dx + dy + stats + w + x",
        "programs b + programs db + programs dw + dx + dy + programs stats + programs w + x",
    ),
    "_batch_norm_finish_kernel": (
        "mean + running_mean + running_mean + running_var + running_var + square + stats + C of x",
        "2 mean + 2 running_mean + 2 running_var + square + stats + C of x",
    ),
    "_batch_norm_small_bwd_kernel": (
        "b + db + dw + dx + dy + stats + w + x",
        "2 b + db + dw + dx + 2 dy + stats + 2 w + 2 x",
    ),
    "_batch_norm_small_fwd_kernel": (
        "b + running_mean + running_mean + running_var + running_var + stats + w + x + y",
        "b + 2 running_mean + 2 running_var + stats + w + 2 x + C of x + y",
    ),
    "_batch_norm_statistics_kernel": (
        "mean + square + x",
        "mean + square + x + strips C of x",
    ),
    "_batch_norm_sums_kernel": (
        "b + db + dw + dy + stats + w + x",
        "programs b + db + dw + dy + programs stats + programs w + x",
    ),
    "_cross_entropy_bwd_kernel": (
        "denominator + dloss + dtarget + dx + stats + target + x",
        "programs denominator + columns N of dloss + dtarget + dx + columns stats + columns target + target + x",
    ),
    "_cross_entropy_combine_kernel": (
        "loss + partial + stats + target + N of x",
        "loss + partial + stats + target + N of x",
    ),
    "_cross_entropy_fwd_grad_kernel": (
        "denominator + dx + loss + stats + target + x",
        "blocks denominator + dx + loss + stats + target + x + long x + N of x + edges of x",
    ),
    "_cross_entropy_fwd_kernel": (
        "loss + partial + stats + target + x",
        "loss + partial + stats + columns target + target + x + N of x",
    ),
    "_cross_entropy_reduce_kernel": (
        "denominator + loss + losses + target",
        "denominator + loss + losses + target",
    ),
    "_dropout_kernel": (
        "seed + x + y",
        "programs seed + x + y",
    ),
    "_gated_bwd_kernel": (
        "dgu + dh + gu + h + partial",
        "dgu + dh + gu + h + partial",
    ),
    "_gated_fwd_kernel": (
        "bias + gu + h + w + x",
        "down bias + gu + h + down w + across x",
    ),
    "_gated_fwd_tma_kernel": (
        "bias + gu + h + w + x",
        "down bias + gu + h + down (columns + N) K of w + across x",
    ),
    "_layer_norm_bwd_kernel": (
        "db + dw + dx + dy + means + stats + w + x",
        "db + dw + dx + dy + columns means + columns stats + steps w + x",
    ),
    "_layer_norm_fwd_kernel": (
        "b + stats + w + x + y",
        "programs b + stats + programs w + x + long x + y",
    ),
    "_layer_norm_means_kernel": (
        "dy + means + stats + w + x",
        "dy + means + stats + N w + x",
    ),
    "_linear_cross_entropy_dz_kernel": (
        "N columns of dz + N columns of kept + scales + target + columns H of w + x",
        "N columns of dz + N columns of kept + across scales + across target + down columns H of w + across x",
    ),
    "_linear_cross_entropy_fwd_kernel": (
        "N columns of kept + fields splits N of partial + target + columns H of w + x",
        "N columns of kept + fields splits N of partial + splits target + down columns H of w + across x",
    ),
    "_linear_cross_entropy_product_kernel": (
        "a + add + add|out + add|out + b + out",
        "across a + add + 2 add|out + down b + out",
    ),
    "_linear_cross_entropy_reduce_kernel": (
        "denominator + loss + losses + share",
        "denominator + loss + losses + share",
    ),
    "_linear_cross_entropy_rows_kernel": (
        "loss + lse + partial + share + stats + target",
        "loss + lse + partial + share + stats + target",
    ),
    "_linear_cross_entropy_scales_kernel": (
        "denominator + dloss + scales + stats + target",
        "programs denominator + N of dloss + scales + stats + target",
    ),
    "_linear_dz_kernel": (
        "dy + dz + partial + saved",
        "dy + dz + partial + saved",
    ),
    "_linear_kernel": (
        "a + b + bias + partial + saved + y + z",
        "across a + down b + down bias + partial + saved + y + z",
    ),
    "_linear_tma_kernel": (
        "a + b + bias + partial + saved + y + z",
        "across a + down b + down bias + partial + saved + y + z",
    ),
    "_logsumexp_bwd_kernel": (
        "dlse + dx + stats + x",
        "columns dlse + dx + columns stats + x",
    ),
    "_logsumexp_fwd_kernel": (
        "lse + stats + x",
        "lse + stats + x",
    ),
    "_loss_bwd_kernel": (
        "dloss + dx + t + x",
        "(programs + 1) dloss + dloss + dx + t + x",
    ),
    "_loss_fwd_kernel": (
        "loss, one program + loss, not reduced + partial, programs + t + x",
        "loss, one program + loss, not reduced + partial, programs + t + x",
    ),
    "_loss_reduce_kernel": (
        "loss + partial",
        "loss + partial",
    ),
    "_multi_margin_bwd_kernel": (
        "dloss + dx + target + x",
        "N of dloss + dx + target + x + long x + N of x",
    ),
    "_multi_margin_fwd_kernel": (
        "loss, one program + loss, not reduced + partial, programs + target + x",
        "loss, one program + loss, not reduced + partial, programs + target + x + N of x",
    ),
    "_multi_tensor_kernel(adagrad, states 1)": (
        "chunk + grads + params + params + 24 T + states + states + 32 T",
        "chunk + grads + 2 params + 24 programs + 20 tensors with a rest + 2 states + 40 programs + 24 tensors with a rest",
    ),
    "_multi_tensor_kernel(adam, states 3)": (
        "chunk + grads + params + params + 44 T + states + states + 40 T",
        "chunk + grads + 2 params + 44 programs + 40 tensors with a rest + 2 states + 56 programs + 32 tensors with a rest",
    ),
    "_multi_tensor_kernel(adam, states 7)": (
        "chunk + grads + params + params + 44 T + states + states + 48 T",
        "chunk + grads + 2 params + 44 programs + 40 tensors with a rest + 2 states + 72 programs + 40 tensors with a rest",
    ),
    "_multi_tensor_kernel(rmsprop, states 1)": (
        "chunk + grads + params + params + 32 T + states + states + 32 T",
        "chunk + grads + 2 params + 32 programs + 28 tensors with a rest + 2 states + 40 programs + 24 tensors with a rest",
    ),
    "_multi_tensor_kernel(rmsprop, states 5)": (
        "chunk + grads + params + params + 36 T + states + states + 40 T",
        "chunk + grads + 2 params + 36 programs + 32 tensors with a rest + 2 states + 56 programs + 32 tensors with a rest",
    ),
    "_multi_tensor_kernel(sgd, states 0)": (
        "chunk + grads + params + params + 20 T + 24 T",
        "chunk + grads + 2 params + 20 programs + 16 tensors with a rest + 24 programs + 16 tensors with a rest",
    ),
    "_multi_tensor_kernel(sgd, states 1)": (
        "chunk + grads + params + params + 36 T + states + states + 32 T",
        "chunk + grads + 2 params + 36 programs + 32 tensors with a rest + 2 states + 40 programs + 24 tensors with a rest",
    ),
    "_parameter_gradients_kernel": (
        "db_partial + db + dw_partial + dw",
        "db_partial + db + dw_partial + dw",
    ),
    "_prologue_kernel": (
        "hyper + 8 groups + scalars + steps + steps + 16 T",
        "48 T + 8 T + scalars + 2 steps + 16 T",
    ),
    "_scale_kernel": (
        "g",
        "programs g",
    ),
    "_softmax_bwd_kernel": (
        "dx + dy + y",
        "dx + dy + long dy + y + long y",
    ),
    "_softmax_fwd_kernel": (
        "x + y",
        "x + long x + y",
    ),
    "_sum_kernel": (
        "out + partial",
        "out + partial",
    ),
}
# What no op of the benchmark launches: clipping, whose law is in test_optimizers_extras.py, and a gated unit together with
# the projection above it, in test_gated.py.
ELSEWHERE = {"_square_sum_kernel", "_gated_dgrad_kernel", "_gated_dgrad_tma_kernel"}
GROUPS = {
    "products": ("linear", "mlp", "gated_linear", "linear_cross_entropy"),
    "cross_entropy": ("cross_entropy",),
    "rows": ("softmax", "log_softmax", "logsumexp", "activation", "dropout"),
    "losses": tuple(name for name, op in OPS.items() if op.source == "kernels/losses.py"),
    "norms": ("batch_norm", "layer_norm", "rms_norm"),
    "optimizers": tuple(name for name, op in OPS.items() if op.source == "kernels/optimizers.py"),
}
METER = laws.Meter()


def test_every_op_and_kernel_has_a_law():
    assert set(PROBES) == set(OPS)
    assert {name for names in GROUPS.values() for name in names} == set(OPS) - {"training_step"}
    kernels = set()
    for info in pkgutil.iter_modules(importlib.import_module("dlgpu.kernels").__path__):
        names = dir(importlib.import_module(f"dlgpu.kernels.{info.name}"))
        kernels |= {name for name in names if name.startswith("_") and name.endswith("_kernel")}
    assert kernels - ELSEWHERE == {name.partition("(")[0] for name in LAWS}


@interpreted
@pytest.mark.parametrize("group", GROUPS)
def test_laws(group):
    """Metered, fitted, exact at the held-out sizes and in other dtypes, a dry run of the launchers the same as the launches;
    and the laws are those above."""
    for name in GROUPS[group]:
        derived = METER.derive(name)
        assert derived.held_out >= 2
    together = laws.fit([sample for name in GROUPS[group] for sample in METER.samples(name)])
    found = {
        key: tuple(together.text(key, q) for q in ("compulsory", "requested")) for key in together.kernels
    }
    assert found == {key: LAWS[key] for key in found}
    # At real sizes, on GPUs of each kind, each launch has a law.
    for name in GROUPS[group]:
        op, op_laws = OPS[name], METER.derive_fitted(name)
        for shape in [s for s in op.shapes.values() if s.get("tensors", 1) <= 100][-3:]:
            for dtype in op.dtypes[:2]:
                case = Case(op, shape, STEP if STEP in op.passes else BOTH, dtype)
                for gpu in ("a100", "h100", "rtx5090"):
                    launches = model.fused(case, gpus.GPUS[gpu], op_laws)
                    assert sum(launch.nbytes for launch in launches) > 0


@interpreted
def test_laws_of_a_whole_step():
    """A training step launches the kernels of its ops: their laws hold for it, at sizes that no op was metered at."""
    samples = [s for name in ("mlp", "cross_entropy", "adam") for s in METER.samples(name)]
    step = laws.fit(samples)
    for probe in PROBES["training_step"].held_out[:1]:
        metered = laws.meter(OPS["training_step"], probe)
        assert len(metered) > 10
        assert [laws.check(step, sample) for sample in metered] == [[]] * len(metered)


def planted(monkeypatch, tmp_path, stem, kernel, right, wrong):
    """Replaces a kernel by one of a copy of its file in which `right` has become `wrong`."""
    module = importlib.import_module(f"dlgpu.kernels.{stem}")
    with open(module.__file__) as file:
        text = file.read()
    assert text.count(right) == 1
    path = tmp_path / f"planted_{stem}.py"
    path.write_text(text.replace(right, wrong))
    name = f"dlgpu.kernels.planted_{stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, copy)
    spec.loader.exec_module(copy)
    monkeypatch.setattr(module, kernel, getattr(copy, kernel))


@interpreted
@pytest.mark.parametrize(
    ("op", "stem", "kernel", "right", "wrong"),
    [
        pytest.param(
            "activation",
            "activations",
            "_activation_fwd_kernel",
            "    x = tl.load(x_ptr + offs",
            "    tl.load(x_ptr + offs, mask=offs < n)\n    x = tl.load(x_ptr + offs",
            id="a pass too many",
        ),
        pytest.param(
            "dropout",
            "dropout",
            "_dropout_kernel",
            "    seed = tl.load(seed_ptr)\n",
            "    seed = tl.load(seed_ptr)\n    if tl.program_id(0) == 1:\n        tl.load(seed_ptr)\n",
            id="a load in one program only",
        ),
        pytest.param(
            "logsumexp",
            "softmax",
            "_logsumexp_fwd_kernel",
            "    tl.store(stats_ptr + N + rows, s, mask=mask_m)\n",
            "    tl.store(stats_ptr + N + rows, s, mask=mask_m & (rows > 0))\n",
            id="a row not written",
        ),
        pytest.param(
            "logsumexp",
            "softmax",
            "_logsumexp_bwd_kernel",
            "    cols = tl.program_id(1) * (LANES * VECTOR) + tile\n",
            "    cols = tl.program_id(1) * (LANES * VECTOR) + tile\n    tl.load(stats_ptr + tl.arange(0, 1))\n",
            id="four bytes a program",
        ),
    ],
)
def test_a_planted_mistake_breaks_the_law(monkeypatch, tmp_path, op, stem, kernel, right, wrong):
    def law():
        try:
            return laws.Meter().derive(op).laws.text(kernel, "requested")
        except LawError as error:
            return f"none: {error}"

    assert law() == LAWS[kernel][1]
    planted(monkeypatch, tmp_path, stem, kernel, right, wrong)
    assert law() != LAWS[kernel][1]


def record(nbytes, **sizes):
    return Record(
        "_dropout_kernel", {"seed_ptr": Operand(8, 8), "x_ptr": Operand(nbytes, 2)}, {"grid0": 1, **sizes}
    )


def sample(nbytes, requested, seed, **sizes):
    operands = {"seed_ptr": Traffic(8, 0, seed), "x_ptr": Traffic(nbytes, 0, requested)}
    return Sample(record(nbytes, **sizes), operands)


def test_fit_finds_whole_coefficients_or_none():
    found = laws.fit([sample(10, 30, 24, grid0=3), sample(70, 210, 8, grid0=1)])
    assert found.text("_dropout_kernel", "requested") == "programs seed + 3 x"
    assert found.text("_dropout_kernel", "compulsory") == "seed + x"
    assert found(record(1000, grid0=5)) == Traffic(1008, 0, 3040)
    assert laws.check(found, sample(1000, 3000, 40, grid0=5)) == []
    assert len(laws.check(found, sample(1000, 3000, 48, grid0=5))) == 1
    with pytest.raises(LawError, match="15 were metered"):
        laws.fit([sample(10, 15, 8)])
    with pytest.raises(LawError, match=r"(210|11) were metered"):
        laws.fit([sample(10, 11, 8), sample(70, 210, 8)])
    with pytest.raises(LawError, match="never metered"):
        found(Record("_other_kernel", {"x_ptr": Operand(4, 4)}, {}))
    with pytest.raises(LawError, match="no metered launch had the argument y_ptr"):
        found(Record("_dropout_kernel", {"y_ptr": Operand(4, 4)}, {}))
    # What was the same in all launches says nothing of how it grows.
    softmax = {"x_ptr": Operand(8, 4)}
    one = Sample(Record("_softmax_fwd_kernel", softmax, {"WHOLE": 1}), {"x_ptr": Traffic(8, 0, 8)})
    with pytest.raises(LawError, match="had the term 'long x'"):
        laws.fit([one])(Record("_softmax_fwd_kernel", softmax, {"WHOLE": 0}))
    other = Sample(Record("_softmax_fwd_kernel", softmax, {"WHOLE": 0}), {"x_ptr": Traffic(8, 0, 16)})
    with pytest.raises(LawError, match="open"):
        laws.fit([other])


@pytest.mark.parametrize("gpu", gpus.GPUS.values(), ids=lambda gpu: gpu.name)
def test_the_table_of_gpus(gpu):
    """Figures in their units, dense, and said to be a datasheet's."""
    assert 2e11 < gpu.bandwidth < 1e13
    assert 30 <= gpu.multiprocessors <= 200
    assert 3 << 20 <= gpu.l2 <= 128 << 20
    assert gpu.capability in (75, 80, 86, 89, 90, 100, 120)
    assert ("bfloat16" in gpu.flops) == (gpu.capability >= 80)
    assert gpu.flops["float16"] / gpu.flops["float32"] < 40
    assert 4e12 < gpu.flops["float32"] < 2e14
    if "tf32" in gpu.flops:
        assert 1.9 < gpu.flops["bfloat16"] / gpu.flops["tf32"] < 2.1
    assert gpu.source
    assert gpu.origin == "datasheet, not measured"
    assert model.limits_of(gpu)[0] == gpu.capability


def test_measured_figures_take_the_place_of_published_ones():
    h100 = gpus.find("H100")
    both = h100.measured(3e12, 7e14, "bfloat16")
    assert (both.bandwidth, both.flops["bfloat16"]) == (3e12, 7e14)
    assert both.flops["float32"] == h100.flops["float32"]
    assert both.origin == "given as measured"
    one = h100.measured(3e12, None, "bfloat16")
    assert one.flops == h100.flops
    assert one.origin == "bandwidth given as measured, else datasheet, not measured"
    assert h100.measured(None, None, "bfloat16") is h100
    with pytest.raises(UsageError, match="table has t4, a100"):
        gpus.find("h1000")


def whole_laws(monkeypatch, *names):
    """Laws that this process meters, where the command would start another."""

    def laws_of(wanted):
        for name in wanted:
            yield name, METER.derive_fitted(name)

    monkeypatch.setattr(model, "laws_of", laws_of)


@interpreted
def test_rows(monkeypatch):
    """The numbers follow from one another, and from the sizes where those are plain."""
    whole_laws(monkeypatch)
    h200 = [gpus.find("h200")]
    adam, softmax = model.rows(("adam", "softmax"), h200)
    n = adam["shape"]["n"]
    assert adam["dtype"] == "float32"
    assert 28 * n < adam["compulsory_bytes"] < 28.1 * n
    assert adam["unfused_bytes"] == {"torch eager": 72 * n}
    assert adam["unfused_bound_s"]["torch eager"] == pytest.approx(72 * n / 4.8e12)
    assert "without running it" in adam["absent"]
    N, V = softmax["shape"].values()
    assert softmax["compulsory_bytes"] == 2 * 5 * N * V == softmax["unfused_bytes"]["torch eager"]
    assert softmax["unfused_bytes"]["torch.compile"] == 2 * 5 * N * V
    assert softmax["gain"] == pytest.approx(1)
    assert softmax["crossover"]["pays_short"] == "nowhere"
    for row in (adam, softmax):
        assert row["kind"] == row["section"] == "model"
        assert row["origin"] == "datasheet, not measured"
        assert row["bound_s"] == pytest.approx(sum(kernel["bound_s"] for kernel in row["kernels"]))
        assert row["launches"] == len(row["kernels"])
        assert row["gain"] == pytest.approx(row["unfused_bound_s"]["torch eager"] / row["bound_s"])
        assert row["saved_by_launches_s"] is None
        report.validate({**EMPTY, "rows": [{**row, "at_s": 0.0}]})


EMPTY = {
    "schema": report.SCHEMA,
    "status": "complete",
    "started": "2026-01-01T00:00:00+00:00",
    "seconds": 0.0,
    "arguments": {},
    "environment": {},
    "rows": [],
}


@interpreted
def test_a_product_is_bound_by_its_operations_and_fusing_stops_paying(monkeypatch):
    whole_laws(monkeypatch)
    settings = model.Settings(shape="h200-8k", passes="fwd", inductor=False)
    (row,) = model.rows(("linear",), [gpus.find("h200")], settings)
    M, N, K = row["shape"].values()
    assert row["flops"] == 2 * M * N * K
    assert row["compulsory_bytes"] == 2 * (M * N + M * K + N * K + N)
    assert row["requested_bytes"] > row["compulsory_bytes"]
    assert row["bound_s"] == pytest.approx(row["flops"] / 989.4e12)
    assert row["limited_by"] == "products"
    # Unfused, the activation is a pass of its own.
    assert row["unfused_bound_s"]["torch eager"] - row["bound_s"] == pytest.approx(4 * M * N / 4.8e12)
    crossover = row["crossover"]
    low, high = crossover["between"]
    assert (crossover["size"], crossover["pays"]) == ("K", f"K <= {low}")
    gains = dict(crossover["gains"])
    assert gains[high] < 1.05 <= gains[low]
    # With what launches cost, the gain has two parts.
    costly = model.Settings(shape="h200-8k", passes="fwd", inductor=False, overhead_s=5e-6)
    (other,) = model.rows(("linear",), [gpus.find("h200")], costly)
    assert other["saved_launches"] == 1
    assert other["saved_by_launches_s"] == pytest.approx(5e-6)
    assert other["saved_by_bytes_s"] == pytest.approx(4 * M * N / 4.8e12)
    # A measured bandwidth counts.
    slow = [gpus.find("h200").measured(1e12, None, "bfloat16")]
    (third,) = model.rows(("linear",), slow, settings)
    assert third["gain"] > row["gain"]


@pytest.mark.parametrize(
    ("gains", "text", "between"),
    [
        ([1.0, 1.01], "nowhere", None),
        ([1.2, 1.05], "throughout", None),
        ([1.2, 1.1, 1.0, 1.0], "K <= 20", [20, 30]),
        ([1.0, 1.2, 1.1], "20 <= K", None),
        ([1.0, 1.2, 1.1, 1.0], "20 <= K <= 30", [30, 40]),
        ([1.2, 1.0, 1.2, 1.0], "30 <= K <= 30", [30, 40]),
        ([], "", None),
    ],
)
def test_where_fusing_pays(gains, text, between):
    found = model._reading("K", [(10 * i, gain) for i, gain in enumerate(gains, 1)])
    assert (found["pays_short"], found["between"]) == (text, between)


@interpreted
def test_what_a_gpu_cannot_do_has_no_number(monkeypatch):
    whole_laws(monkeypatch)
    (row,) = model.rows(("softmax",), [gpus.find("t4")])
    assert row["kind"] == "skipped"
    assert "no bfloat16" in row["reason"]


def test_no_law_no_number(monkeypatch):
    monkeypatch.setattr(model, "laws_of", lambda names: ((name, Laws(())) for name in names))
    settings = model.Settings(inductor=False, crossover=None)
    (row,) = model.rows(("softmax",), [gpus.find("h200")], settings)
    assert (row["kind"], row["reason"]) == ("skipped", "no number: _softmax_fwd_kernel: was never metered")
    monkeypatch.setattr(model, "laws_of", lambda names: ((name, "no such law") for name in names))
    (row,) = model.rows(("softmax",), [gpus.find("h200")], settings)
    assert (row["kind"], row["message"]) == ("error", "no such law")


@pytest.mark.parametrize(
    ("op", "shape", "passes", "nbytes"),
    [
        ("softmax", {"N": 64, "V": 1024}, "fwd", [2 * 2 * 64 * 1024]),
        ("softmax", {"N": 64, "V": 1024}, "bwd", [3 * 2 * 64 * 1024]),
        # The product, then bias and activation; dZ, two products, and the bias's sums.
        (
            "linear",
            {"M": 64, "N": 128, "K": 32},
            "fwd",
            [2 * (64 * 32 + 128 * 32 + 128 + 64 * 128), 4 * 64 * 128],
        ),
    ],
)
def test_inductors_count(op, shape, passes, nbytes):
    found = compiled.kernels(OPS[op], shape, passes, torch.bfloat16)
    assert [kernel.nbytes for kernel in found] == nbytes
    assert found[0].flops == (2 * 64 * 128 * 32 if op == "linear" else 0)


def test_inductor_counts_no_step():
    with pytest.raises(compiled.NotCounted, match="optimizer's step"):
        compiled.kernels(OPS["adam"], OPS["adam"].shapes["small"], STEP, torch.float32)


@interpreted
def test_every_line_says_model(monkeypatch, capsys, tmp_path):
    """On the terminal and in the file."""
    whole_laws(monkeypatch)
    out = tmp_path / "model.json"
    arguments = ["model", "softmax", "dropout", "--gpu", "h100,t4", "--dtype", "bf16", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    # All but the title of the section and the table's header.
    other = [line.split()[0] for line in printed.splitlines() if line.strip() and "MODEL" not in line]
    assert other == ["What"]
    document = report.load(out)
    assert document["status"] == "complete"
    assert [row["kind"] for row in document["rows"]] == ["model", "skipped"] * 2
    for row in document["rows"]:
        assert "MODEL" in json.dumps(row) or row["kind"] == "model"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch"], "unknown op 'nosuch'"),
        (["softmaxx"], "did you mean softmax"),
        (["softmax", "--gpu", "h1000"], "the table has"),
        (["softmax", "--shape", "nosuch"], "unknown shape 'nosuch'"),
        (["softmax", "--shape", "N=0"], "positive whole number"),
        (["softmax", "--shape", "Q=3"], "unknown size of softmax 'Q'"),
        (["--shape", "N=3"], "name it"),
        (["softmax", "--vary", "Q"], "unknown size 'Q'"),
        (["softmax", "--option", "p=1"], "no options"),
        (["softmax", "--dtype", "int8"], "int8"),
        (["softmax", "--pass", "step"], "unknown pass of softmax 'step'"),
        (["softmax", "--launch-us", "nan"], "nan is no number"),
        (["softmax", "--bandwidth", "-1"], "-1"),
        (["softmax", "--bandwidth", "3000"], "one GPU's"),
        (["softmax", "--gpu", "h100", "--ceilings", "/nowhere/at/all.json"], "all.json"),
    ],
)
def test_bad_input_is_one_line(capsys, monkeypatch, arguments, message):
    """Before anything is metered."""
    monkeypatch.setattr(model, "laws_of", lambda names: pytest.fail("metered"))
    assert main(["model", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1


def test_ceilings_of_a_results_file(tmp_path):
    path = tmp_path / "ceilings.json"
    rows = [
        {
            "section": "ceilings",
            "kind": "ceiling",
            "name": name,
            "value": value,
            "unit": unit,
            "samples_s": [1.0],
        }
        for name, value, unit in (
            ("copy, bytes read and written", 3e12, "B/s"),
            ("matmul, bfloat16", 6e14, "FLOP/s"),
        )
    ]
    path.write_text(json.dumps({**EMPTY, "rows": rows}))
    (gpu,) = model.chosen_gpus(["h200"], None, None, path, torch.bfloat16)
    assert (gpu.bandwidth, gpu.flops["bfloat16"]) == (3e12, 6e14)
    assert gpu.origin == "measured (ceilings.json)"
    path.write_text(json.dumps(EMPTY))
    with pytest.raises(UsageError, match="no ceilings"):
        model.chosen_gpus(["h200"], None, None, path, torch.bfloat16)


def test_interrupted(monkeypatch, tmp_path, capsys):
    """What was there is kept, and marked."""

    def rows(*arguments):
        yield {"section": "model", "kind": "skipped", "title": "MODEL: one", "reason": "for a test"}
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "rows", rows)
    out = tmp_path / "model.json"
    assert main(["model", "softmax", "--out", str(out)]) == 130
    said = capsys.readouterr()
    assert f"1 rows are kept in {out}" in said.out
    assert said.err.strip() == "dlgpu-bench: interrupted"
    document = report.load(out)
    assert (document["status"], len(document["rows"])) == ("interrupted", 1)


@pytest.mark.slow
def test_the_command_meters_in_a_process_of_its_own(capsys):
    assert main(["model", "activation", "--gpu", "h200", "--no-compiled"]) == 0
    assert "MODEL activation" in capsys.readouterr().out


def test_the_laws_come_from_another_process(monkeypatch):
    """As one JSON object an op; an op without laws says why."""
    law = Law("_k", "x_ptr", "read", {"x": 1}, ("y",))
    told = [
        {"op": "softmax", "laws": {"laws": [{**law.__dict__, "unseen": ["y"]}]}, "fitted": 1},
        {"op": "linear", "error": "why not"},
    ]
    asked = []

    def run(job, *names):
        asked.append((job, names))
        yield from told

    monkeypatch.setattr(model.interpreted, "run", run)
    monkeypatch.setattr(model, "_LAWS", {})
    found = dict(model.laws_of(["softmax", "linear"]))
    assert found == {"softmax": Laws((law,)), "linear": "why not"}
    # Metered once a process.
    assert dict(model.laws_of(["linear"])) == {"linear": "why not"}
    assert asked == [("laws", ("softmax", "linear"))]
    told.clear()
    monkeypatch.setattr(model, "_LAWS", {})
    with pytest.raises(model.interpreted.InterpreterError, match="ended before"):
        list(model.laws_of(["softmax"]))
