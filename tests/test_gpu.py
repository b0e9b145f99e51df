"""On a GPU: no synchronization, torch's allocator alone, the current stream alone, whole steps captured in CUDA graphs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dlgpu
from dlgpu import functional
from test_dispatch import CALLS, inputs, targets
from tolerance import assert_same_bits

ROOT = Path(__file__).resolve().parents[1]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def on_gpu(test):
    for mark in gpu:
        test = mark(test)
    return test


# Calls that wait for a device, or move to another stream, by file, and what they are there for.
WAITING = {
    # Counters and verdicts on the CPU; a learning rate on another device than the parameters.
    ("dlgpu/ops/optimizers.py", "item"),
    ("dlgpu/ops/optimizers.py", "numpy"),
    # A NumPy array's.
    ("kernels/optimizers.py", "tolist"),
}
CALLS_THAT_WAIT = {
    "item",
    "tolist",
    "cpu",
    "numpy",
    "synchronize",
    "wait_stream",
    "wait_event",
    "Stream",
    "set_stream",
}


def test_nothing_waits_in_launchers_and_ops():
    """Read from the source, so with no GPU either. Checks of values ask `_dispatch.may_read`."""
    found = set()
    for folder in ("kernels", "dlgpu/ops"):
        for path in sorted((ROOT / folder).glob("*.py")):
            # Tuning measures, so it waits.
            if path.name == "tuning.py":
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in CALLS_THAT_WAIT
                ):
                    found.add((f"{folder}/{path.name}", node.func.attr))
    assert found == WAITING


class Network(nn.Module):
    """Every kind of layer, and the loss."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            dlgpu.nn.Linear(64, 64, activation="gelu"),
            dlgpu.nn.BatchNorm1d(64, activation="relu"),
            dlgpu.nn.SwiGLU(64, 64),
            dlgpu.nn.LayerNorm(64),
            dlgpu.nn.Dropout(dropout),
            dlgpu.nn.MLP([64, 48, 32], activation="relu"),
            dlgpu.nn.RMSNorm(32),
        )
        self.head = dlgpu.nn.Linear(32, 16)
        self.loss = dlgpu.nn.CrossEntropyLoss(label_smoothing=0.1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.loss(self.head(self.layers(x)), t)


OPTIMIZERS = {
    "SGD": {"momentum": 0.9},
    "Adagrad": {},
    "RMSprop": {},
    "Adam": {"amsgrad": True},
    "AdamW": {"max_grad_norm": 1.0},
}


def made(optimizer: str = "AdamW", dropout: float = 0.1, seed: int = 0):
    torch.manual_seed(seed)
    model = Network(dropout).cuda()
    return model, getattr(dlgpu.optim, optimizer)(model.parameters(), lr=1e-2, **OPTIMIZERS[optimizer])


def batches(count: int):
    return inputs(count, 32, 64, device="cuda"), targets(32, 16, "cuda")


@pytest.fixture
def no_synchronization():
    """Within the `with` block that this gives, an operation that waits for the GPU is an error."""

    class Strict:
        def __enter__(self):
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")

        def __exit__(self, *error):
            torch.cuda.set_sync_debug_mode("default")

    yield Strict()
    torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize("name", [name for name in CALLS if name != "nn"])
def test_no_function_synchronizes(name, no_synchronization):
    function, shapes = CALLS[name]
    args = [inputs(*shape, device="cuda").requires_grad_() for shape in shapes]

    def both():
        y = function(*args)
        y.backward(torch.ones_like(y))

    both()
    with no_synchronization:
        both()


@on_gpu
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_step_synchronizes(optimizer, scaled, no_synchronization):
    model, optim = made(optimizer)
    scaler = torch.amp.GradScaler("cuda", enabled=scaled)
    x, t = batches(1)

    def step():
        optim.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16, enabled=scaled):
            loss = model(x[0], t)
        scaler.scale(loss).backward()
        scaler.step(optim)
        scaler.update()

    # The first makes the state and the tables.
    step()
    step()
    with no_synchronization:
        step()


@on_gpu
@pytest.mark.parametrize("name", [name for name in CALLS if name != "nn"])
def test_functions_run_on_the_current_stream(name):
    """A side stream that is late: what ran on another would have read the old numbers."""
    function, shapes = CALLS[name]
    new = [inputs(*shape, device="cuda") for shape in shapes]
    leaves = [a.clone().requires_grad_() for a in new]
    y = function(*leaves)
    expected = [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]
    old = [torch.full_like(a, torch.nan) for a in new]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for a, b in zip(old, new, strict=True):
            a.copy_(b)
        leaves = [a.requires_grad_() for a in old]
        y = function(*leaves)
        found = [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]
    torch.cuda.current_stream().wait_stream(stream)
    assert_same_bits(found, expected)


@on_gpu
def test_memory_is_the_caching_allocators():
    """After a first step, a step takes nothing from the device that torch does not know of."""
    model, optim = made()
    x, t = batches(1)

    def step():
        optim.zero_grad()
        model(x[0], t).backward()
        optim.step()

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    free, reserved = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() == reserved
    # Others may use the device meanwhile: a leak of each step's tensors would be far more.
    assert abs(free - torch.cuda.mem_get_info()[0]) < 64 << 20


@on_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_captured_step_equals_eager_ones(optimizer):
    """Forward, backward and the optimizer's step in one graph, bit for bit, over several replays."""
    xs, t = batches(6)
    results = []
    for captured in (False, True):
        model, optim = made(optimizer, dropout=0.0)
        static = xs[0].clone()

        def step(model=model, optim=optim, static=static):
            optim.zero_grad()
            loss = model(static, t)
            loss.backward()
            optim.step()
            return loss

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for x in xs[:3]:
                static.copy_(x)
                step()
        torch.cuda.current_stream().wait_stream(side)
        if captured:
            graph = torch.cuda.CUDAGraph()
            optim.zero_grad()
            with torch.cuda.graph(graph):
                step()
        for x in xs[3:]:
            static.copy_(x)
            if captured:
                graph.replay()
            else:
                step()
        results.append([*model.parameters(), *model.buffers()])
    assert_same_bits(results[1], results[0])


@on_gpu
@pytest.mark.parametrize("name", [name for name in CALLS if name != "nn"])
def test_a_captured_function_equals_an_eager_one(name):
    """Forward and backward of every function in a graph, replayed with other numbers than it was captured with."""
    function, shapes = CALLS[name]
    leaves = [inputs(*shape, device="cuda").requires_grad_() for shape in shapes]

    def both():
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        both()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(inputs(*leaf.shape, device="cuda"))
    graph.replay()
    assert_same_bits(found, both())


@on_gpu
def test_each_replay_draws_another_mask():
    x = torch.ones(64, 64, device="cuda")
    functional.dropout(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = functional.dropout(x)
    masks = []
    for _ in range(2):
        graph.replay()
        masks.append(y.clone())
    assert not torch.equal(*masks)
    assert all(0.4 < (mask == 0).float().mean() < 0.6 for mask in masks)


@on_gpu
def test_compiled_into_graphs_by_torch():
    """mode="reduce-overhead": torch's own capture of what Inductor makes."""
    torch._dynamo.reset()
    model, _ = made(dropout=0.0)
    model.eval()
    fast = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    xs, t = batches(4)
    for x in xs:
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(fast(x, t).clone(), model(x, t))
    torch._dynamo.reset()


@on_gpu
def test_a_second_device_is_launched_on():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    x, w = (inputs(*shape, device="cuda:1") for shape in ((33, 64), (16, 64)))
    y = functional.linear(x, w, activation="relu")
    assert y.device == x.device
    torch.testing.assert_close(y, F.linear(x, w).relu(), rtol=1e-2, atol=1e-2)
