"""PyTorch's own conformance data for optimizers (torch.testing._internal.common_optimizers): its arguments, the arguments that
it refuses and its schedulers, on all five classes."""

import copy

import pytest
import torch
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

import dlgpu
from tolerance import DTYPES, PAIRS, assert_accurate

INFOS = {
    info.optim_cls.__name__: info
    for info in optim_db
    if info.optim_cls in (getattr(torch.optim, name) for name in dlgpu.optim.__all__)
}
# Whole blocks and rests, odd sizes, nothing, one element, no dimension.
SHAPES = [(37,), (5, 7), (0, 4), (1,), (), (2, 3, 4)]
# Those for interpreted kernels, which take milliseconds a tensor.
FEW = [(0, 4), (39,), ()]
# 1e-8 is the usual eps: only there does it show where eps stands.
SCALES = [1.0, 1e-8]


def cases(name, device="cpu"):
    """Arguments for the class. `lr` as a tensor is cloned: schedulers write into it."""
    return [copy.deepcopy(given.kwargs) for given in INFOS[name].optim_inputs_func(device)]


def test_all_five_are_there():
    assert sorted(INFOS) == sorted(dlgpu.optim.__all__)
    assert all(len(cases(name)) >= 5 for name in INFOS)


class Run:
    """One class on one set of tensors, for each of several sets of arguments a group; equal seeds give equal gradients."""

    def __init__(self, cls, kwargs, dtype, device, work=None, shapes=SHAPES, **shared):
        generator = torch.Generator().manual_seed(1)
        self.generator = torch.Generator().manual_seed(2)
        self.dtype, self.work, self.shapes = dtype, work or dtype, shapes
        self.scales = SCALES if dtype is not torch.float16 else [1.0]
        groups = []
        for given in copy.deepcopy(kwargs):
            if dtype is torch.float16 and "SGD" not in cls.__name__:
                # In torch's fp16 arithmetic an eps of 1e-8 is 0: it gives infinities.
                given["eps"] = 1e-2
            if isinstance(given.get("lr"), torch.Tensor):
                given["lr"] = given["lr"].to(device, work)
            params = [
                # Half of them start from 0, so that nothing hides the update.
                (torch.randn(shape, generator=generator) * (i % 2)).to(dtype).to(device, self.work)
                for _ in self.scales
                for i, shape in enumerate(shapes)
            ]
            groups.append({"params": [torch.nn.Parameter(p) for p in params], **given})
        self.optimizer = cls(groups, **shared)

    def step(self):
        for group in self.optimizer.param_groups:
            for n, p in enumerate(group["params"]):
                g = torch.randn(p.shape, generator=self.generator) * self.scales[n // len(self.shapes)]
                p.grad = g.to(self.dtype).to(p.device, self.work)
        self.optimizer.step()

    def results(self):
        """Of each group and scale, all values of the parameters, and of each state."""
        found = {}
        for number, group in enumerate(self.optimizer.param_groups):
            for n, p in enumerate(group["params"]):
                where = f"of group {number}, scale {self.scales[n // len(self.shapes)]}"
                found.setdefault(f"parameters {where}", []).append(p.detach().flatten())
                for name, value in self.optimizer.state[p].items() if p in self.optimizer.state else ():
                    found.setdefault(f"{name} {where}", []).append(value.flatten())
        return {name: torch.cat(values) for name, values in found.items()}


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize(("backend", "dtype"), PAIRS, indirect=["backend"])
def test_inputs(backend, device, dtype, name):
    """Parameters and states after the steps, with gradients of order 1 and of order eps: all inputs in one optimizer, as
    groups."""
    ours, theirs, kwargs = getattr(dlgpu.optim, name), getattr(torch.optim, name), cases(name)
    shapes = SHAPES if backend == "fallback" else FEW
    runs = [Run(cls, kwargs, dtype, device, shapes=shapes) for cls in (ours, theirs)]
    runs.append(Run(theirs, kwargs, dtype, device, torch.float64, shapes))
    for _ in range(5 if backend == "fallback" else 2):
        for run in runs:
            run.step()
    actual, expected, truth = (run.results() for run in runs)
    assert actual.keys() == expected.keys()
    for what, value in actual.items():
        assert_accurate(value, truth[what], expected[what], f"{kwargs}: {what}")


@pytest.mark.parametrize("name", INFOS)
def test_inputs_alone(name):
    """Each input as the constructor's arguments."""
    for kwargs in cases(name):
        runs = [
            Run(getattr(m, name), [{}], torch.float32, "cpu", **kwargs) for m in (dlgpu.optim, torch.optim)
        ]
        for _ in range(3):
            for run in runs:
                run.step()
        ours, theirs = (run.results() for run in runs)
        for what, value in theirs.items():
            torch.testing.assert_close(ours[what], value, rtol=1e-5, atol=1e-7, msg=f"{kwargs}: {what}")


# The schedulers see no backend: for the kernels one combination is enough.
SCHEDULED = [
    (backend, name, number)
    for name, info in INFOS.items()
    for backend, count in (("fallback", len(info.scheduler_inputs)), ("triton", 1))
    for number in range(count)
]


@pytest.mark.parametrize(("backend", "name", "number"), SCHEDULED, indirect=["backend"])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers(backend, device, name, number, tensor_lr):
    """Torch's combinations of schedulers drive both alike, bit by bit in lr, and to rounding in the parameters."""
    runs = []
    for cls in (getattr(dlgpu.optim, name), getattr(torch.optim, name)):
        lr = torch.tensor(1e-2, device=device) if tensor_lr else 1e-2
        run = Run(cls, [{}], torch.float32, device, shapes=FEW, lr=lr)
        run.schedulers = [make(run.optimizer) for make in INFOS[name].scheduler_inputs[number]]
        runs.append(run)
    for _ in range(3):
        for run in runs:
            run.step()
            for scheduler in run.schedulers:
                if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                    scheduler.step(1.0)
                else:
                    scheduler.step()
    rates = [[float(g["lr"]) for g in run.optimizer.param_groups] for run in runs]
    assert rates[0] == rates[1]
    ours, theirs = (run.results() for run in runs)
    for what, value in theirs.items():
        torch.testing.assert_close(ours[what], value, rtol=1e-5, atol=1e-7, msg=lambda m, w=what: f"{w}: {m}")


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_checkpoints(name, dtype):
    """Mid-training each loads the other's state_dict, for all inputs, and goes on as the other would have."""
    kwargs = cases(name)
    runs = [Run(getattr(m, name), kwargs, dtype, "cpu") for m in (dlgpu.optim, torch.optim, torch.optim)]
    truth = Run(getattr(torch.optim, name), kwargs, dtype, "cpu", torch.float64)
    for _ in range(2):
        for run in (*runs, truth):
            run.step()
    saved = [copy.deepcopy(run.optimizer.state_dict()) for run in runs]
    for one, other in zip(*(s["state"].values() for s in saved[:2]), strict=True):
        shown = [{k: (v.dtype, v.shape, v.stride()) for k, v in state.items()} for state in (one, other)]
        assert shown[0] == shown[1]
    assert saved[0]["param_groups"] == saved[1]["param_groups"]
    runs[0].optimizer.load_state_dict(saved[1])
    runs[1].optimizer.load_state_dict(saved[0])
    for run in (*runs, truth):
        run.step()
    ours, loaded, theirs = (run.results() for run in runs)
    for what, value in truth.results().items():
        assert_accurate(ours[what], value, theirs[what], f"torch's state loaded: {what}")
        assert_accurate(loaded[what], value, theirs[what], f"our state loaded by torch: {what}")


@pytest.mark.parametrize("name", INFOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_inputs(name, dtype):
    """What torch refuses is refused with torch's words."""
    cls = getattr(dlgpu.optim, name)
    seen = 0
    for wrong in INFOS[name].optim_error_inputs_func("cpu", dtype):
        given = wrong.optimizer_error_input
        params = [torch.nn.Parameter(torch.ones(3))] if given.params is None else given.params
        expect = pytest.warns if issubclass(wrong.error_type, Warning) else pytest.raises
        if wrong.error_on is OptimizerErrorEnum.CONSTRUCTION_ERROR:
            with expect(wrong.error_type, match=wrong.error_regex):
                cls(params, **given.kwargs)
        else:
            optimizer = cls(params, **given.kwargs)
            with expect(wrong.error_type, match=wrong.error_regex):
                optimizer.step()
        seen += 1
    assert seen >= 5


def torch_impls(name):
    return [flag for flag in ("foreach", "fused") if flag in INFOS[name].supported_impls]


@pytest.mark.parametrize("name", INFOS)
def test_flags(name):
    """foreach and fused are taken, kept, and change nothing; both at once are refused where torch refuses them."""
    results = []
    for flags in ({}, *({flag: value} for flag in torch_impls(name) for value in (True, False))):
        run = Run(getattr(dlgpu.optim, name), [{}], torch.float32, "cpu", **flags)
        run.step()
        assert all(run.optimizer.param_groups[0][flag] is value for flag, value in flags.items())
        results.append(run.results())
    for other in results[1:]:
        assert all(torch.equal(value, results[0][what]) for what, value in other.items())
    if "fused" in torch_impls(name):
        with pytest.raises(RuntimeError, match="cannot be `True` together"):
            Run(getattr(dlgpu.optim, name), [{}], torch.float32, "cpu", foreach=True, fused=True)


@pytest.mark.parametrize("name", INFOS)
def test_what_is_refused_names_torchs_class(name):
    cls = getattr(dlgpu.optim, name)
    with pytest.raises(NotImplementedError, match=rf"torch\.optim\.{name}\b"):
        cls([torch.nn.Parameter(torch.ones(3))], differentiable=True)
    p = torch.nn.Parameter(torch.ones(3) * 1j)
    p.grad = torch.ones(3) * 1j
    with pytest.raises(NotImplementedError, match=rf"torch\.optim\.{name}\b"):
        cls([p]).step()
    q = torch.nn.Parameter(torch.ones(3))
    q.grad = torch.ones(3).to_sparse()
    takes = name if INFOS[name].supports_sparse else "SparseAdam"
    with pytest.raises(RuntimeError, match=rf"torch\.optim\.{takes}\b"):
        cls([q]).step()
    assert torch.equal(q.detach(), torch.ones(3))
