"""What torch.compile makes of an op, by Inductor's own count and without running or allocating anything.

The op's torch form is traced forward and backward on fake tensors, which have shapes and no memory, lowered and scheduled by
Inductor, and each kernel of its schedule asked for the bytes that it reads and writes, the number that Inductor adds up as
`num_bytes_accessed`: of each buffer the smaller of its size and the accesses to it. Where there is no GPU the tensors are on
the CPU: what is counted is Inductor's schedule for a CPU, whose fusions are nearly those for a GPU, but not the splits of long
reductions, and none of the templates of "max-autotune".
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from .cases import BOTH, FORWARD, STEP, Make, Op

__all__ = ["NOTE", "Kernel", "NotCounted", "kernels"]

NOTE = "Inductor's own count, of its schedule for a CPU"


class NotCounted(Exception):
    """Inductor gives no count for this; why."""


class Kernel(NamedTuple):
    """A kernel of Inductor's schedule: bytes read and written, and the operations of a product."""

    nbytes: int
    flops: int


def kernels(
    op: Op,
    shape: Mapping[str, int],
    passes: str,
    dtype: torch.dtype,
    options: Mapping[str, Any] | None = None,
) -> list[Kernel]:
    """The kernels that torch.compile of the op's torch form would run, in order.

    Raises:
        NotCounted: an optimizer's step, or what Inductor cannot trace or lower here.
    """
    if passes == STEP:
        raise NotCounted("torch.compile of an optimizer's step cannot be traced without running it")
    try:
        with contextlib.redirect_stderr(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            forward, backward = _graphs(op, shape, passes, dtype, {**op.defaults(), **(options or {})})
    except NotCounted:
        raise
    except Exception as error:
        # Inductor's errors are of every kind; what is lost is a number, and the row says so.
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise NotCounted(f"{type(error).__name__}: {first_line}"[:200]) from error
    return {FORWARD: forward, BOTH: forward + backward}.get(passes, backward)


def _graphs(
    op: Op, shape: Mapping[str, int], passes: str, dtype: torch.dtype, options: Mapping[str, Any]
) -> tuple[list[Kernel], list[Kernel]]:
    from torch._functorch.aot_autograd import aot_function, make_boxed_func
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor import compile_fx
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode

    found: list[list[Kernel]] = []

    def count(gm: Any, example_inputs: Any) -> Any:
        found.append(_lowered(gm, example_inputs))
        return make_boxed_func(gm.forward)

    mode = FakeTensorMode()

    def partition(graph: Any, inputs: Any, **settings: Any) -> Any:
        with V.set_fake_mode(mode):
            compile_fx._recursive_joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, compiler="inductor", **settings)

    def infer(gm: Any, example_inputs: Any) -> Any:
        with V.set_fake_mode(mode):
            compile_fx._recursive_joint_graph_passes(gm)
        return count(gm, example_inputs)

    with mode:
        inputs = op.inputs(shape, Make("meta", dtype), options)
        flat, structure = pytree.tree_flatten(inputs)
        at = [i for i, leaf in enumerate(flat) if isinstance(leaf, torch.Tensor)]
        tensors = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).requires_grad_(
                t.requires_grad and passes != FORWARD
            )
            for t in (flat[i] for i in at)
        ]

        def function(*args: torch.Tensor) -> Any:
            given = [*flat]
            for i, tensor in zip(at, args, strict=True):
                given[i] = tensor
            return op.functions["eager"](**pytree.tree_unflatten(given, structure))

        traced = aot_function(
            function,
            fw_compiler=count,
            bw_compiler=count,
            inference_compiler=infer,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        y = traced(*tensors)
        if passes != FORWARD and len(found) == 1:
            torch.autograd.grad(y, [t for t in tensors if t.requires_grad], torch.ones_like(y))
    return found[0], found[1] if len(found) > 1 else []


def _lowered(module: Any, inputs: Any) -> list[Kernel]:
    """The kernels of one graph, forward or backward, as Inductor schedules them."""
    from torch._inductor import compile_fx
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    mode = torch._guards.detect_fake_mode(inputs)
    with V.set_fake_mode(mode):
        compile_fx.view_to_reshape(module)
        compile_fx._recursive_post_grad_passes(module, is_inference=False)
        lowering = GraphLowering(module, example_inputs=inputs, is_inference=False)
        with (
            V.set_graph_handler(lowering),
            V.set_extern_kernel_nodes([]),
            V.set_debug_handler(DebugContext()),
        ):
            lowering.run(*inputs)
            lowering._update_scheduler()
            return [
                Kernel(nbytes, node.estimate_flops() or 0)
                for node in lowering.scheduler.nodes
                if (nbytes := node.get_read_write_buffers_sizes())
            ]
