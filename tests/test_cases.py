"""The benchmark's catalogue: every op's description is whole, and every library's function of it does what it says."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
import time

import pytest
import torch

from dlgpu.bench import cases, providers, report, suite
from dlgpu.bench.cases import BACKWARD, BOTH, FORWARD, OPS, STEP, Make
from dlgpu.bench.cases._base import Kept, NotOffered, bind, late, leaves
from dlgpu.bench.gpu import TARGETS, target_jobs
from dlgpu.bench.harness import Stop
from dlgpu.bench.laws import Meter
from dlgpu.bench.measure import Case, measure
from dlgpu.kernels import _triton

EVERY = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
# Small sizes for each name that a size has.
SMALL = {"M": 6, "N": 10, "K": 5, "H": 7, "V": 11, "I": 9, "O": 4, "C": 12, "L": 2, "n": 50, "tensors": 3}


def small(op):
    return {name: SMALL[name] for name in next(iter(op.shapes.values()))}


def rows(op, passes, libraries, dtype=torch.float32, cold=False, **options):
    case = Case(op, small(op), passes, dtype, options)
    stop = Stop(budget_s=1e-6, min_pairs=2, max_pairs=2, warmup_s=0.0)
    timer = lambda function, repeats: float(bool(function())) or 1.0  # noqa: E731
    return list(measure(case, libraries, stop=stop, timer=timer, extras=False, cold=cold))


def right(op, passes, name="dlgpu", dtype=torch.float32, **options):
    """Whether the library's results pass, before and after: else why not."""
    found = rows(
        op, passes, {name: providers.function(op, name), "eager": op.functions["eager"]}, dtype, **options
    )
    return [row["kind"] for row in found] == ["timing"] or found


@EVERY
def test_the_description_is_whole(op):
    assert OPS[op.name] is op
    assert op.equation
    assert op.source.startswith("kernels/")
    keys = list(next(iter(op.shapes.values())))
    assert all(list(shape) == keys for shape in op.shapes.values())
    assert all(size > 0 for shape in op.shapes.values() for size in shape.values())
    assert not next(iter(op.shapes)).startswith("h200-")
    assert any(name.startswith("h200-") for name in op.shapes)
    assert {"dlgpu", "eager"} <= set(op.functions) <= set(providers.PROVIDERS)
    assert set(op.refuses) | set(op.overwrites) <= set(op.functions)
    assert op.passes in ((FORWARD, BACKWARD, BOTH), (STEP,))
    assert all(len(set(choices)) == len(choices) > 1 for choices in op.options.values())


def test_every_stem_is_in_the_table():
    stems = [info.name for info in pkgutil.iter_modules(cases.__path__) if not info.name.startswith("_")]
    modules = [importlib.import_module(f"dlgpu.bench.cases.{stem}") for stem in stems]
    assert sorted(op.name for module in modules for op in module.OPS) == sorted(OPS)


@EVERY
def test_every_function_takes_the_inputs(op):
    """Of libraries that are not installed, too: so far as that can be seen without them."""
    inputs = op.inputs(small(op), Make("cpu", torch.float32), op.defaults())
    for function in op.functions.values():
        inspect.signature(function).bind(**inputs)


@EVERY
def test_equal_seeds_give_equal_inputs(op):
    def tensors(seed, **more):
        inputs = op.inputs(small(op), Make("cpu", torch.float32, seed, **more), op.defaults())
        return [x.detach() for x in leaves(inputs)]

    first, again, other = tensors(1), tensors(1), tensors(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for a, b in zip(first, tensors(1, wide=torch.float64), strict=True):
        assert b.dtype == torch.float64
        # Rounded to the dtype, then widened; what is a softmax of random numbers is widened before.
        assert torch.allclose(a.double(), b, atol=1e-6)


@EVERY
def test_ours_is_right(op):
    for passes in op.passes:
        assert right(op, passes) is True, passes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@EVERY
def test_ours_is_right_in_16_bits(op, dtype):
    passes = op.passes[-1]
    if op.name == "multi_margin_loss":
        pytest.skip("torch has none on a CPU")
    if dtype == torch.float16 and op.name not in ("linear", "cross_entropy", "layer_norm"):
        pytest.skip("bfloat16 tells as much")
    assert right(op, passes, dtype=dtype) is True


@EVERY
def test_ours_is_right_with_every_option(op):
    for name, choices in op.options.items():
        for choice in choices[1:]:
            assert right(op, op.passes[-1], **{name: choice}) is True, (name, choice)


@EVERY
def test_the_fallback_and_torch_itself_are_right(op):
    others = [
        name
        for name in ("fallback", "torch-fused", "eager-float", "cublaslt")
        if name == "fallback" or name in op.functions
    ]
    if op.name == "linear_cross_entropy" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        # Torch has it from 2.13 on.
        others.remove("torch-fused")
    for name in others:
        for options in ({}, {"activation": "relu"} if "activation" in op.options else {}):
            for passes in op.passes:
                if providers.offered(op, name, options, passes) is None:
                    assert right(op, passes, name, **options) is True, (name, passes)


@EVERY
def test_what_is_a_little_wrong_is_found(op):
    """A thousandth too much, or for what is held to its whole only, a tenth."""
    ours = op.functions["dlgpu"]
    factor = 1.1 if op.jumps else 1.001

    def wrong(**inputs):
        y = ours(**inputs)
        if isinstance(y, torch.Tensor):
            return y * factor
        with torch.no_grad():
            return [x * factor for x in y]

    found = rows(op, op.passes[0], {"wrong": wrong, "eager": op.functions["eager"]})
    assert [(row["kind"], row["provider"]) for row in found] == [("wrong", "wrong")]


@pytest.mark.parametrize("name", ["sgd", "adagrad", "rmsprop", "adam", "adamw"])
def test_a_step_that_is_a_little_wrong_is_found(name):
    op = OPS[name]

    def wrong(params, options, state):
        results = op.functions["dlgpu"](params, options, state)
        if "wrong" not in state:
            for group in state["step"].__self__.param_groups:
                group["lr"] *= 1.01
            state["wrong"] = True
        return results

    found = rows(op, STEP, {"wrong": wrong, "eager": op.functions["eager"]})
    assert [row["kind"] for row in found] == ["wrong"]


@EVERY
def test_nothing_is_computed_on_meta_tensors(op):
    """The largest sizes, which fit no memory: how bytes are counted."""
    passes = STEP if op.passes == (STEP,) else FORWARD
    shape = max(op.shapes.values(), key=lambda shape: math.prod(shape.values()) // shape.get("tensors", 1))
    results = bind(op, op.functions["eager"], shape, passes, Make("meta", torch.float32))()
    assert all(t.device.type == "meta" for t in results)


def test_dropout_is_held_to_its_law():
    op = OPS["dropout"]
    shape = {"M": 200, "N": 100}

    def verdicts(function, p=0.5):
        found = []
        for passes in op.passes:
            bound = bind(op, function, shape, passes, Make("cpu", torch.float32), {"p": p})
            found.append(op.verify(bound, list(bound()), passes, {"p": p}))
        return found

    assert verdicts(op.functions["dlgpu"]) == verdicts(op.functions["eager"]) == [None] * 3
    assert verdicts(op.functions["dlgpu"], 0.1) == [None] * 3
    share = verdicts(lambda x, p: torch.nn.functional.dropout(x, 0.55) * (0.45 / 0.5))
    assert all("a share of 0.4" in said for said in share)
    assert all("scaled" in said for said in verdicts(lambda x, p: torch.nn.functional.dropout(x, p) * 0.99))

    class Other(torch.autograd.Function):
        """Backward with a mask of its own."""

        @staticmethod
        def forward(ctx, x):
            return torch.nn.functional.dropout(x)

        @staticmethod
        def backward(ctx, dy):
            return torch.nn.functional.dropout(dy)

    assert verdicts(lambda x, p: Other.apply(x))[2] == "the gradient is not kept where the result is"


def test_a_forward_alone_makes_no_graph():
    op = OPS["mlp"]
    bound = bind(op, op.functions["eager"], small(op), FORWARD, Make("cpu", torch.float32))
    assert not bound()[0].requires_grad
    assert not leaves(bound.inputs)


def test_what_is_kept_between_steps_is_no_input():
    op = OPS["adam"]
    bound = bind(op, op.functions["eager"], small(op), STEP, Make("cpu", torch.float32))
    before = len(bound.tensors())
    bound()
    assert isinstance(bound.inputs["state"], Kept)
    assert len(bound.tensors()) == before == 3


def test_a_training_step_makes_its_gradients_anew():
    op = OPS["training_step"]
    bound = bind(op, op.functions["eager"], small(op), STEP, Make("cpu", torch.float32))
    grads = []
    for _ in range(2):
        bound()
        grads.append([p.grad for p in bound.inputs["state"]["params"]])
    assert grads[0]
    assert all(new is not old for old, new in zip(*grads, strict=True))


def test_a_library_is_imported_when_it_is_called():
    missing = late("a_package_that_is_not_there:function")
    with pytest.raises(ImportError, match="a_package_that_is_not_there"):
        missing()
    assert late("math:sqrt")(4.0) == 2.0
    assert late("torch.nn:functional.relu")(torch.tensor(-1.0)) == 0


def test_who_is_absent():
    none = providers.Provider("none", "", "a_package_that_is_not_there", "its-package")
    assert providers.version(none) is None
    assert "pip install its-package" in providers.absent(none)
    liger = dataclasses.replace(providers.PROVIDERS["liger"], module="json", package="")
    assert providers.version(liger) == ""
    assert providers.absent(liger, "cpu") == "runs on an NVIDIA GPU only"
    assert providers.absent(liger, "cuda") is None
    for name in ("dlgpu", "eager", "compile", "torch-fused", "fallback", "cublaslt"):
        assert providers.absent(providers.PROVIDERS[name], "cpu") is None


def test_who_offers_what():
    def offered(op, name, passes=BOTH, **options):
        return providers.offered(OPS[op], name, options, passes)

    assert offered("linear", "compile") is None
    assert offered("linear", "torch-fused", FORWARD, activation="relu") is None
    assert offered("linear", "torch-fused", activation="relu") == "offers fwd only"
    assert offered("linear", "torch-fused", FORWARD, activation="silu").startswith("offers activation relu")
    assert offered("linear", "cce") == "offers no linear"
    assert offered("cross_entropy", "liger", target="probabilities") == "offers target classes only"
    assert offered("cross_entropy", "quack", label_smoothing=0.1) == "offers no label smoothing"
    with pytest.raises(KeyError):
        providers.function(OPS["linear"], "cce")
    with pytest.raises(NotOffered):
        OPS["linear"].functions["torch-fused"](
            torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), activation="silu"
        )


def test_who_is_not_here_leaves_the_others():
    def refuses(**inputs):
        raise NotOffered("offers nothing")

    def fails(**inputs):
        raise RuntimeError("out of luck\nand a long story")

    op = OPS["softmax"]
    functions = {
        "dlgpu": op.functions["dlgpu"],
        "refuses": refuses,
        "fails": fails,
        "eager": op.functions["eager"],
    }
    found = rows(op, BOTH, functions)
    assert [row["kind"] for row in found] == ["absent", "error", "timing"]
    assert found[1]["message"] == "fails: RuntimeError: out of luck"
    assert (found[2]["a"], found[2]["b"]) == ("dlgpu", "eager")


def test_a_library_that_overwrites_its_input():
    """As Liger's cross-entropy does, which is known; of one that is not known to, it is an error."""
    ours = OPS["softmax"].functions["dlgpu"]

    def overwrites(x):
        y = ours(x)
        x.detach().mul_(2)
        return y

    op = dataclasses.replace(OPS["softmax"], functions={**OPS["softmax"].functions, "liger": overwrites})
    libraries = {"dlgpu": ours, "liger": overwrites}
    assert [row["kind"] for row in rows(op, FORWARD, libraries)] == ["wrong"]
    op = dataclasses.replace(op, overwrites={"liger": ("x",)})
    assert [row["kind"] for row in rows(op, FORWARD, libraries)] == ["timing"]


def test_the_targets_are_there():
    for name, shape, passes, dtype, options, rivals in TARGETS:
        op = OPS[name]
        assert shape in op.shapes
        assert passes in op.passes
        assert dtype in op.dtypes
        assert all(value in op.options[option] for option, value in options.items())
        assert "eager" in rivals or "liger" in rivals
        for rival in rivals:
            assert providers.offered(op, rival, options, passes) is None, (name, rival)
    jobs = target_jobs()
    said = list(jobs[0].run(None, 0.0))
    if torch.cuda.is_available():
        return
    assert {row["provider"] for row in said} >= {"liger", "quack"}
    assert {row["kind"] for row in said} == {"absent"}
    assert len(jobs) > 15


def test_compile_time_is_all_of_the_first_call():
    """Of those who compile here; what forward takes to compile too, which runs where backward is bound."""
    eager, called = OPS["softmax"].functions["eager"], []

    def slow_at_first(x):
        if not called:
            called.append(time.sleep(0.05))
        return eager(x)

    (row,) = rows(OPS["softmax"], BOTH, {"compile": slow_at_first, "eager": eager}, cold=True)
    assert 0.05 <= row["compile_a_s"] < 5
    assert row["compile_b_s"] is None
    (row,) = rows(OPS["softmax"], BOTH, {"compile": eager, "eager": eager})
    assert row["compile_a_s"] is None


@pytest.mark.skipif(not _triton.INTERPRETED, reason="metering takes interpreted kernels")
def test_the_bytes_of_a_timing_row():
    laws = Meter().derive("softmax").laws
    case = Case(OPS["softmax"], {"N": 32, "V": 1000}, BOTH, torch.bfloat16, device="cuda")
    said = suite.counted(case, laws, (90, 232448, 132))
    # Forward reads x and writes y; backward reads y and dy and writes dx.
    assert said == {
        "compulsory_bytes": 5 * 64000,
        "unfused_bytes": 5 * 64000,
        "launches_a": 2,
        "unfused_launches": 2,
    }
    # As the plots read it.
    assert set(said) <= set(report.KINDS["timing"])
    assert suite.counted(case, None) == {}
