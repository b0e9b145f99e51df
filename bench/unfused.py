"""Counts the bytes that unfused torch operations must move, on the basis the traffic meter uses for kernels.

Each operation of a tensor program is a launch of its own: it must read every distinct byte of its inputs and
write every distinct byte of its results. Meta tensors have shapes and no memory, so the count for a model of
any size takes milliseconds and no GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# From an operation's arguments by name, and its result: how many bytes of an argument it reads and writes,
# where that is not all of them.
Sizes = dict[str, int]
Rule = Callable[[Mapping[str, Any], Any], tuple[Sizes, Sizes]]


class Row(NamedTuple):
    """One operation, its compulsory bytes, and the floating-point operations of a product."""

    op: str
    read: int
    written: int
    flops: int = 0


def distinct_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory behind a tensor: a dimension of stride 0 repeats the same ones."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def _at_most(tensor: torch.Tensor, count: int) -> int:
    """Bytes of `count` elements picked out of a tensor."""
    return min(distinct_bytes(tensor), count * tensor.element_size())


def _overwrites_self(args: Mapping[str, Any], out: Any) -> tuple[Sizes, Sizes]:
    return {"self": 0}, {}


def _picks(table: str) -> Rule:
    return lambda args, out: ({table: _at_most(args[table], out.numel())}, {})


def _nll_forward(args: Mapping[str, Any], out: Any) -> tuple[Sizes, Sizes]:
    rows = args["target"].numel()
    return {name: _at_most(args[name], rows) for name in ("self", "weight") if args.get(name) is not None}, {}


def _scatter(args: Mapping[str, Any], out: Any) -> tuple[Sizes, Sizes]:
    count = args["index"].numel()
    reads = {"self": 0}
    if "src" in args:
        reads["src"] = _at_most(args["src"], count)
    return reads, {"self": _at_most(args["self"], count)}


def _scatter_add(args: Mapping[str, Any], out: Any) -> tuple[Sizes, Sizes]:
    reads, writes = _scatter(args, out)
    return reads | writes, writes


# The schema calls gradients written, for the sake of grad_scale, which unscales them in place.
def _fused_optimizer(args: Mapping[str, Any], out: Any) -> tuple[Sizes, Sizes]:
    return {}, {} if args.get("grad_scale") is not None else {"grads": 0}


_RULES: dict[str, Rule] = {
    "nll_loss_forward": _nll_forward,
    "nll_loss2d_forward": _nll_forward,
    # It fills a matrix of zeros and one entry a row: only the shape of `self` is used.
    "nll_loss_backward": _overwrites_self,
    "nll_loss2d_backward": _overwrites_self,
    "gather": _picks("self"),
    "index_select": _picks("self"),
    "index": _picks("self"),
    "embedding": _picks("weight"),
    "scatter_": _scatter,
    "scatter_add_": _scatter_add,
}
# These, their foreach forms, and what makes a tensor like another.
_OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
# Operations that torch has no meta form of: the result, from the arguments.
_WITHOUT_META = {
    torch.ops.aten.multi_margin_loss_backward.default: lambda grad, self, *rest: torch.empty_like(self),
}
# Views are free too, and say so themselves.
_FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "resize_",
    "set_",
}


def _rule(op: str) -> Rule | None:
    if op.startswith("_fused_"):
        return _fused_optimizer
    if op.removeprefix("_foreach_") in _OVERWRITING or op.startswith("new_") or op.endswith("_like"):
        return _overwrites_self
    return _RULES.get(op)


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Two for each element of a result and each of the sums that it is."""
    packet = func.overloadpacket
    if packet.__name__ in ("matmul", "linear"):
        # Composite ones, which are seen whole below autograd.
        return 2 * int(out.numel()) * int(args[0].shape[-1])
    count = flop_registry.get(packet)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


class ByteCounter(TorchDispatchMode):
    """Context manager: counts the compulsory bytes of every torch operation inside it, those of backward too.

    Views and allocations are free; a fill writes. Two arguments that are the same view of the same storage
    are read once; views that overlap otherwise are counted as if they did not.

    Args:
        device: count only tensors on this type of device, to leave out scalars kept on the host.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.rows: list[Row] = []
        self._device = device

    @property
    def total(self) -> int:
        return sum(row.read + row.written for row in self.rows)

    def by_op(self) -> dict[str, tuple[int, int]]:
        """Bytes read and written, by operation, in order of first use."""
        sums: dict[str, tuple[int, int]] = {}
        for row in self.rows:
            before = sums.get(row.op, (0, 0))
            sums[row.op] = (before[0] + row.read, before[1] + row.written)
        return sums

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # The result of an in-place operation is its argument: sizes are taken after it, and are the same.
        out = _WITHOUT_META[func](*args) if func in _WITHOUT_META else func(*args, **kwargs)
        if not func.is_view and func.overloadpacket.__name__ not in _FREE:
            read, written = self._traffic(func, args, kwargs, out)
            if read or written:
                self.add(Row(str(func), read, written, _flops(func, args, kwargs, out)))
        return out

    def add(self, row: Row) -> None:
        """Takes note of an operation."""
        self.rows.append(row)

    def _tensors(self, value: Any) -> list[torch.Tensor]:
        return [
            leaf
            for leaf in tree_leaves(value)
            if isinstance(leaf, torch.Tensor) and self._device in (None, leaf.device.type)
        ]

    def _traffic(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[int, int]:
        if not self._tensors((args, kwargs, out)):
            return 0, 0
        schema = func._schema
        bound = {formal.name: actual for formal, actual in zip(schema.arguments, args, strict=False)} | kwargs
        rule = _rule(func.overloadpacket.__name__)
        reads, writes = rule(bound, out) if rule else ({}, {})

        read: dict[tuple[Any, ...], int] = {}
        written: dict[tuple[Any, ...], int] = {}
        for formal in schema.arguments:
            for tensor in self._tensors(bound.get(formal.name)):
                # Meta tensors have no address: it takes the storage's identity to see `x * x` read x once.
                storage = tensor.untyped_storage()._cdata
                view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride())
                size = distinct_bytes(tensor)
                if not formal.is_out:
                    read[view] = max(read.get(view, 0), reads.get(formal.name, size))
                if formal.alias_info is not None and formal.alias_info.is_write:
                    written[view] = max(written.get(view, 0), writes.get(formal.name, size))
        results = out if len(schema.returns) > 1 else (out,)
        created = sum(
            distinct_bytes(tensor)
            for formal, value in zip(schema.returns, results, strict=False)
            if formal.alias_info is None
            for tensor in self._tensors(value)
        )
        return sum(read.values()), sum(written.values()) + created


class _RmsNorm(torch.autograd.Function):
    """RMS norm as torch has it on a GPU, a launch each way. On meta tensors it would be made of single operations."""

    @staticmethod
    def forward(ctx: Any, counter: ByteCounter, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        y = torch.empty_like(x)
        # Of each row the reciprocal of its root mean square is kept, in float32.
        kept = 4 * x[..., 0].numel()
        given = [t for t in (x, weight) if t is not None]
        counter.add(
            Row("aten._fused_rms_norm.default", sum(map(distinct_bytes, given)), distinct_bytes(y) + kept)
        )
        ctx.counter, ctx.kept, ctx.weighted = counter, kept, weight is not None
        ctx.save_for_backward(*given)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        given = ctx.saved_tensors
        read = distinct_bytes(grads[0]) + sum(map(distinct_bytes, given)) + ctx.kept
        written = [torch.empty_like(t) for t in given]
        row = Row("aten._fused_rms_norm_backward.default", read, sum(map(distinct_bytes, written)))
        ctx.counter.add(row)
        return None, written[0], written[1] if ctx.weighted else None


@contextlib.contextmanager
def _as_on_a_gpu(counter: ByteCounter) -> Iterator[None]:
    """torch chooses for meta tensors as for CUDA ones: optimizers their foreach forms, RMS norm its own kernels."""
    supported = optimizers._get_foreach_kernels_supported_devices
    devices = [*supported(), "meta"]

    def rms_norm(x: Any, shape: Any, weight: Any = None, eps: Any = None) -> Any:
        return _RmsNorm.apply(counter, x, weight)

    with (
        mock.patch.object(optimizers, "_get_foreach_kernels_supported_devices", return_value=devices),
        mock.patch.object(torch, "rms_norm", rms_norm),
    ):
        yield


def operations(bind: Callable[[], Callable[[], object]], warm: bool = False) -> list[Row]:
    """The operations of the call that `bind` makes on meta tensors, in order, as on a GPU; what `bind` does is left out.

    Args:
        warm: leave out a first call too, in which an optimizer makes its states.
    """
    counter = ByteCounter("meta")
    with _as_on_a_gpu(counter):
        function = bind()
        if warm:
            function()
        counter.rows.clear()
        with counter:
            function()
    return counter.rows


def linear_activation(
    M: int,
    N: int,
    K: int,
    activation: str = "relu",
    dtype: torch.dtype = torch.bfloat16,
    backward: bool = False,
) -> ByteCounter:
    """act(x Wᵀ + b) with x [M, K] and W [N, K]; the backward pass gives the gradients of x, W and b.

    Args:
        activation: a function of torch.nn.functional, "gelu_tanh", or "identity" for none.
    """
    x, weight, bias, grad = (
        torch.empty(shape, dtype=dtype, device="meta") for shape in ((M, K), (N, K), (N,), (M, N))
    )
    for leaf in (x, weight, bias):
        leaf.requires_grad_(backward)
    with ByteCounter("meta") as counter:
        y = F.linear(x, weight, bias)
        if activation == "gelu_tanh":
            y = F.gelu(y, approximate="tanh")
        elif activation != "identity":
            y = getattr(F, activation)(y)
        if backward:
            y.backward(grad)
    return counter


def cross_entropy(
    N: int, V: int, dtype: torch.dtype = torch.bfloat16, backward: bool = False, upcast: bool = False
) -> ByteCounter:
    """Mean softmax cross-entropy of logits [N, V]; `upcast` converts them to float32 first."""
    logits = torch.empty(N, V, dtype=dtype, device="meta", requires_grad=backward)
    target = torch.empty(N, dtype=torch.int64, device="meta")
    with ByteCounter("meta") as counter:
        loss = F.cross_entropy(logits.float() if upcast else logits, target)
        if backward:
            loss.backward()
    return counter


def adam(
    n_params: int,
    dtype: torch.dtype = torch.float32,
    foreach: bool = True,
    fused: bool = False,
    decoupled: bool = False,
) -> ByteCounter:
    """One step of Adam, or of AdamW where `decoupled`, on one tensor; `fused` outranks `foreach`."""

    def step(count: int, device: str, only: str | None) -> ByteCounter:
        param = torch.zeros(count, dtype=dtype, device=device, requires_grad=True)
        param.grad = torch.zeros_like(param)
        optimizer_class = torch.optim.AdamW if decoupled else torch.optim.Adam
        optimizer = optimizer_class([param], foreach=foreach and not fused, fused=fused)
        # The first step also creates the state.
        optimizer.step()
        with ByteCounter(only) as counter:
            optimizer.step()
        return counter

    if not fused:
        return step(n_params, "meta", "meta")
    # torch refuses meta tensors here. Bytes are linear in the size: two small steps on the CPU give the law.
    small, large = 64, 128
    counter = ByteCounter()
    for a, b in zip(step(small, "cpu", None).rows, step(large, "cpu", None).rows, strict=True):
        read, written = (
            one + (n_params - small) * (two - one) // (large - small)
            for one, two in ((a.read, b.read), (a.written, b.written))
        )
        counter.rows.append(Row(a.op, read, written))
    return counter
