"""Multi-tensor Adam and AdamW: checks, backends and what is kept between steps. The kernels are in kernels/optimizers.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.optim.adam import adam as eager_adam

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import optimizers as arrays
from dlgpu.kernels import configs
from dlgpu.kernels import optimizers as kernels

__all__ = ["Cache", "adam_step", "new_state"]

State = dict[str, Any]
Group = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Cache:
    """What an optimizer keeps from step to step: tables, views, and the key that tells whether they still hold."""

    def __init__(self) -> None:
        self.plan: _Plan | None = None
        # What captured graphs read at each replay: it must outlive any plan.
        self.kept: list[Any] = []


def new_state(param: torch.Tensor, grad: torch.Tensor, amsgrad: bool) -> State:
    """Torch's state for a parameter that had none. `step` is on the parameter's device where a kernel advances it.

    Raises as adam_step, before there is any state.
    """
    _check(param, grad)
    on_device = _dispatch.choose_backend(param) != "fallback"
    # As torch: float64 steps go with a float64 default, except where they are on the device.
    wide = not on_device and torch.get_default_dtype() is torch.float64
    state: State = {
        "step": torch.zeros(
            (), dtype=torch.float64 if wide else torch.float32, device=param.device if on_device else "cpu"
        )
    }
    for name in MOMENTS[: 2 + amsgrad]:
        state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
    return state


def adam_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    states: Sequence[State],
    members: Sequence[int],
    groups: Sequence[Group],
    cache: Cache,
) -> None:
    """One step of Adam or AdamW on all parameters, of all groups, in place.

        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    with g + wd p for g (L2), or p (1 - lr wd) for p before the update (decoupled), or max(v) over all steps for v (amsgrad).

    A plain function, not a dispatcher op: there is no result to trace, what is kept between steps belongs to one
    optimizer, and handing five lists of 1,000 tensors through the dispatcher takes 0.8 ms, where a whole step on the host
    takes 1.4. torch.compile breaks the graph at the optimizer's step.

    Args:
        params, grads: float32, bfloat16, float16 or float64, a gradient of its parameter's shape; any strides, but no
            parameter with overlapping elements. A parameter that is not dense, or a gradient with other strides than
            its parameter, is copied at each step.
        states: of each parameter, torch's names: step, exp_avg, exp_avg_sq, max_exp_avg_sq. Normalized in place: a step
            counter is moved to the device where a kernel advances it, moments to their parameter's strides.
        members: the number of each parameter's group.
        groups: of each group, torch's names of the hyper-parameters.
        cache: kept by the optimizer.

    Raises:
        RuntimeError: a sparse gradient, a parameter with overlapping elements, parameters that share memory (kernels only),
            a shape or device that does not fit.
        TypeError: a dtype that does not fit.
        NotImplementedError: complex parameters, betas on a device.

    Sources: Kingma and Ba, arXiv:1412.6980; Loshchilov and Hutter, arXiv:1711.05101; amsgrad, Reddi et al.,
    arXiv:1904.09237.
    """
    if not params:
        return
    key = _key(params, states, members, groups)
    plan = cache.plan
    if (
        plan is None
        or plan.key != key
        or any(_dispatch.choose_backend(p) != name for p, name in plan.choices)
    ):
        cache.plan = None
        plan = cache.plan = _Plan(params, grads, states, members, groups, cache.kept)
    for p, g in zip(params, grads, strict=True):
        if g.layout is not torch.strided:
            _check(p, g)
    hyper = [_hyper(group) for group in groups]
    for part in plan.parts:
        part.step(grads, hyper)
    torch.autograd.graph.increment_version(params)


def _key(
    params: Sequence[torch.Tensor], states: Sequence[State], members: Sequence[int], groups: Sequence[Group]
) -> list[Any]:
    """What tables and views depend on. Gradients move at every step: each part looks at its own."""
    amsgrad = [group["amsgrad"] for group in groups]
    key: list[Any] = [
        (
            p.data_ptr(),
            p.numel(),
            p.stride(),
            s["step"].data_ptr(),
            s["exp_avg"].data_ptr(),
            s["exp_avg_sq"].data_ptr(),
        )
        for p, s in zip(params, states, strict=True)
    ]
    if any(amsgrad):
        key += [s["max_exp_avg_sq"].data_ptr() for s, m in zip(states, members, strict=True) if amsgrad[m]]
    return [key, members, amsgrad]


class _Hyper(NamedTuple):
    """A group's hyper-parameters as numbers; the learning rate also as the tensor it may be, for use on its device."""

    lr: float
    lr_tensor: torch.Tensor | None
    numbers: tuple[
        float, float, float, float, bool, bool
    ]  # beta1, beta2, eps, weight decay, decoupled, maximize


def _hyper(group: Group) -> _Hyper:
    lr, betas = group["lr"], group["betas"]
    tensor = lr if isinstance(lr, torch.Tensor) else None
    for n, beta in enumerate(betas):
        if isinstance(beta, torch.Tensor) and beta.device.type != "cpu":
            raise NotImplementedError(
                f"adam: betas[{n}] is a tensor on {beta.device}, expected a float; torch.optim.Adam takes one"
            )
    return _Hyper(
        # Reading a tensor on a device would wait for it.
        float(lr) if tensor is None or tensor.device.type == "cpu" else math.nan,
        tensor,
        (
            float(betas[0]),
            float(betas[1]),
            group["eps"],
            group["weight_decay"],
            group["decoupled_weight_decay"],
            group["maximize"],
        ),
    )


def _check(p: torch.Tensor, g: torch.Tensor) -> None:
    if g.layout is not torch.strided:
        raise RuntimeError(
            f"adam: a gradient has layout {g.layout}, expected torch.strided; for sparse gradients consider "
            "torch.optim.SparseAdam instead"
        )
    for name, t in (("a parameter", p), ("a gradient", g)):
        if t.is_complex():
            raise NotImplementedError(
                f"adam: {name} is complex ({t.dtype}); torch.optim.Adam takes complex ones"
            )
        _checks.require_floating("adam", name, t)
    _checks.require_device("adam", "a gradient", g, p.device, "its parameter")
    _checks.require_shape("adam", "a gradient", g, tuple(p.shape))
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise RuntimeError("adam: more than one element of a parameter refers to a single memory location")
    if p.numel() and not p.data_ptr():
        raise RuntimeError(f"adam: a parameter ({type(p).__name__} on {p.device}) has no memory to write to")


def _layout(p: torch.Tensor) -> tuple[int, ...]:
    """The strides of what belongs to a parameter: its own if it is dense."""
    return torch.empty_like(p, device="meta", memory_format=torch.preserve_format).stride()


def _fits(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether strides mean the same: those of dimensions of size 1 do not count."""
    return 0 in shape or all(n == 1 or x == y for n, x, y in zip(shape, a, b, strict=True))


def _normalize(p: torch.Tensor, state: State, amsgrad: bool, on_device: bool) -> None:
    """Brings state to where the backend wants it: a checkpoint, or another backend, may have left it otherwise."""
    step = state["step"]
    device = p.device if on_device else torch.device("cpu")
    if step.device != device or (on_device and step.dtype is not torch.float32):
        state["step"] = step.to(device=device, dtype=torch.float32 if on_device else step.dtype)
    strides = _layout(p)
    for name in MOMENTS[: 2 + amsgrad]:
        t = state[name]
        _checks.require_device("adam", name, t, p.device, "its parameter")
        _checks.require_shape("adam", name, t, tuple(p.shape))
        _checks.require_floating("adam", name, t)
        _checks.require_dtype("adam", name, t, state["exp_avg"].dtype, "exp_avg")
        if not _fits(p.shape, t.stride(), strides):
            state[name] = torch.empty_like(p, dtype=t.dtype, memory_format=torch.preserve_format).copy_(t)


class _Plan:
    """Which backend steps which parameters, as long as `key` holds."""

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        states: Sequence[State],
        members: Sequence[int],
        groups: Sequence[Group],
        kept: list[Any],
    ) -> None:
        first: dict[tuple[torch.device, torch.dtype], tuple[torch.Tensor, str]] = {}
        for p, g in zip(params, grads, strict=True):
            _check(p, g)
            if (p.device, p.dtype) not in first:
                first[p.device, p.dtype] = p, _dispatch.choose_backend(p)
        # Asked again at each step: the answer may change.
        self.choices = list(first.values())
        shares: dict[tuple[str, torch.device], list[_Entry]] = {}
        with torch.no_grad():
            for i, (p, state, member) in enumerate(zip(params, states, members, strict=True)):
                backend, amsgrad = first[p.device, p.dtype][1], groups[member]["amsgrad"]
                _normalize(p, state, amsgrad, backend != "fallback")
                moments = tuple(state[name] for name in MOMENTS[: 2 + amsgrad])
                entry = _Entry(i, member, p.detach(), moments, state["step"], _layout(p))
                shares.setdefault((backend, p.device), []).append(entry)
        parts: dict[str, type[_Part]] = {"triton": _KernelPart, "fallback": _ArrayPart, "torch": _TorchPart}
        self.parts = [parts[backend](entries, kept) for (backend, _), entries in shares.items()]
        self.key = _key(params, states, members, groups)


class _Entry(NamedTuple):
    """One parameter of a part."""

    place: int  # in the lists that adam_step is given
    member: int
    param: torch.Tensor
    moments: tuple[torch.Tensor, ...]
    step: torch.Tensor
    strides: tuple[int, ...]


class _Part:
    """The parameters of one device that one backend steps."""

    def __init__(self, entries: Sequence[_Entry], kept: list[Any]) -> None:
        self.entries = entries
        self.device = entries[0].param.device
        self.places = [e.place for e in entries]
        self.strides = [e.strides for e in entries]
        self.dtypes = [e.param.dtype for e in entries]
        # What is written: the parameter, or a copy of one that is not dense.
        self.targets: list[torch.Tensor] = []
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for e in entries:
            target = e.param
            if not _fits(target.shape, target.stride(), e.strides):
                target = torch.empty_like(target, memory_format=torch.preserve_format)
                self.copies.append((e.param, target))
            self.targets.append(target)
        # Of gradients that are laid out unlike their parameter.
        self.buffers: dict[int, torch.Tensor] = {}

    def step(self, grads: Sequence[torch.Tensor], hyper: Sequence[_Hyper]) -> None:
        """Steps its parameters in place."""
        found = [grads[i] for i in self.places]
        # Whole lists compare in a third of the time of a loop.
        if [g.stride() for g in found] != self.strides or [g.dtype for g in found] != self.dtypes:
            found = [self._arranged(n, g) for n, g in enumerate(found)]
        for p, target in self.copies:
            target.copy_(p)
        self.update(found, hyper)
        for p, target in self.copies:
            p.copy_(target)

    def _arranged(self, n: int, g: torch.Tensor) -> torch.Tensor:
        e = self.entries[n]
        if g.dtype is e.param.dtype and _fits(g.shape, g.stride(), e.strides):
            return g
        if n not in self.buffers:
            self.buffers[n] = torch.empty_like(e.param, memory_format=torch.preserve_format)
        return self.buffers[n].copy_(g.detach())

    def update(self, grads: Sequence[torch.Tensor], hyper: Sequence[_Hyper]) -> None:
        """Steps `targets`; the gradients are laid out like them."""
        raise NotImplementedError


class _ArrayPart(_Part):
    """The array code, one call a group: on views that are kept, or on float32 copies of 16-bit tensors, one at a time."""

    def __init__(self, entries: Sequence[_Entry], kept: list[Any]) -> None:
        super().__init__(entries, kept)
        self.counters = [e.step.detach().numpy() for e in entries]
        self.contiguous = [p.is_contiguous() for p in self.targets]
        self.flat = [[_flat(t) for t in (p, *e.moments)] for p, e in zip(self.targets, entries, strict=True)]
        native = [all(t.dtype in (torch.float32, torch.float64) for t in tensors) for tensors in self.flat]
        batches: dict[Any, list[int]] = {}
        for n, e in enumerate(entries):
            batches.setdefault((e.member, -1 if native[n] else n), []).append(n)
        # (group, positions among the entries, arrays of parameters and moments, None where they must be converted).
        self.batches = [
            (member, where, self._arrays(where) if alone < 0 else None)
            for (member, alone), where in batches.items()
        ]

    def _arrays(self, where: Sequence[int]) -> list[list[Any]]:
        """[parameters, exp_avgs, exp_avg_sqs, perhaps max_exp_avg_sqs]"""
        return [list(t) for t in zip(*([to_array(t) for t in self.flat[n]] for n in where), strict=True)]

    def _grad(self, n: int, g: torch.Tensor) -> Any:
        return to_array(g).reshape(-1) if self.contiguous[n] else to_array(_flat(g))

    def update(self, grads: Sequence[torch.Tensor], hyper: Sequence[_Hyper]) -> None:
        for member, where, kept in self.batches:
            lr, _, (beta1, beta2, eps, weight_decay, decoupled, maximize) = hyper[member]
            if math.isnan(lr):
                # It is a tensor on another device than the parameters, which are here: no way but to wait.
                lr = float(hyper[member].lr_tensor)
            steps = []
            for n in where:
                counter = self.counters[n]
                # Assignment costs a tenth of the ufunc that += is.
                counter[()] = step = counter.item() + 1
                steps.append(step)
            params, exp_avgs, exp_avg_sqs, *maxima = self._arrays(where) if kept is None else kept
            arrays.adam_step(
                params,
                [self._grad(n, grads[n]) for n in where],
                exp_avgs,
                exp_avg_sqs,
                maxima[0] if maxima else None,
                steps,
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                eps=eps,
                weight_decay=weight_decay,
                decoupled=decoupled,
                maximize=maximize,
            )
            if kept is None:
                found = (params, exp_avgs, exp_avg_sqs, *maxima)
                for t, (array,) in zip(self.flat[where[0]], found, strict=True):
                    if t.dtype.itemsize == 2:
                        t.copy_(to_tensor(array, t.dtype))


def _flat(t: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order of memory."""
    return t.detach().as_strided((t.numel(),), (1,))


class _KernelPart(_Part):
    """The kernels: tables on the device, immutable once there, made anew when an address or a number has changed."""

    def __init__(self, entries: Sequence[_Entry], kept: list[Any]) -> None:
        super().__init__(entries, kept)
        self._check_apart()
        rows = -(-len(entries) // kernels.ROWS) * kernels.ROWS
        self.host = np.zeros((rows, kernels.TABLE_WIDTH), np.int64)
        for n, (p, e) in enumerate(zip(self.targets, entries, strict=True)):
            moments = [t.data_ptr() for t in e.moments]
            self.host[n] = [
                p.data_ptr(),
                0,
                *moments,
                *[0] * (3 - len(moments)),
                p.numel(),
                e.step.data_ptr(),
                e.member,
            ]
        self.kinds = [(e.param.dtype, e.param.dtype, e.moments[0].dtype) for e in entries]
        self.scalars = torch.empty((rows, kernels.SCALARS_WIDTH), dtype=torch.float32, device=self.device)
        self.upload = kernels.Uploader(self.device, kept)
        self.recorded = False
        # The tables, and what they were made from.
        self.table = self.hyper = self.lr_address = torch.empty(0)
        self.launches: list[kernels.Launch] = []
        self.addresses: list[int] | None = None
        self.unaligned: list[bool] | None = None
        self.numbers: Any = None
        # Learning rates that are tensors, but not float32 on this device.
        self.converted: dict[int, torch.Tensor] = {}

    def update(self, grads: Sequence[torch.Tensor], hyper: Sequence[_Hyper]) -> None:
        if self.recorded:
            # These tables are filled when their graph is replayed, which may never be.
            self.addresses = self.unaligned = self.numbers = None
        addresses = [g.data_ptr() for g in grads]
        if addresses != self.addresses:
            self._point(addresses)
        lr_address = [self._lr_address(member, h) for member, h in enumerate(hyper)]
        numbers = [(0.0 if at else h.lr, *h.numbers) for at, h in zip(lr_address, hyper, strict=True)]
        if (lr_address, numbers) != self.numbers:
            self._set(lr_address, numbers)
        kernels.adam_step(self.table, self.lr_address, self.hyper, self.scalars, self.launches)
        self.recorded = self.upload.capturing()
        if self.recorded:
            # The graph goes on reading what a later step here may replace.
            self.upload.kept.append((self, self.table, self.lr_address, self.hyper, self.launches))

    def _check_apart(self) -> None:
        # Torch steps them one after the other; programs of one launch have no order.
        end = 0
        for start, size in sorted(
            (p.data_ptr(), p.numel() * p.element_size()) for p in self.targets if p.numel()
        ):
            if start < end:
                raise RuntimeError(
                    "adam: two parameters, or one given twice, share memory; torch.optim.Adam takes such"
                )
            end = start + size

    def _point(self, addresses: list[int]) -> None:
        self.host[: len(addresses), kernels.GRAD_COLUMN] = addresses
        unaligned = kernels.unaligned(self.host)
        if unaligned != self.unaligned:
            self.launches = kernels.layout(self.host, self.kinds, self.upload)
            self.unaligned = unaligned
        self.table = self.upload("table", self.host.copy())
        self.addresses = addresses

    def _lr_address(self, member: int, h: _Hyper) -> int:
        lr = h.lr_tensor
        if lr is None or (lr.device != self.device and lr.device.type == "cpu"):
            return 0
        if lr.device != self.device or lr.dtype is not torch.float32:
            if member not in self.converted:
                self.converted[member] = torch.empty((), dtype=torch.float32, device=self.device)
            lr = self.converted[member].copy_(lr.detach().reshape(()), non_blocking=True)
        return lr.data_ptr()

    def _set(self, lr_address: list[int], numbers: list[Any]) -> None:
        # One upload: the addresses, an even number of them to keep what follows aligned, then the numbers.
        count = len(numbers)
        even = count + count % 2
        words = np.zeros(even + count * kernels.HYPER_WIDTH // 2 + 1, np.int64)
        words[:count] = lr_address
        rows = np.array([kernels.adam_hyper(*row) for row in numbers], np.float32)
        words[even:].view(np.float32)[: rows.size] = rows.reshape(-1)
        found = self.upload("numbers", words)
        self.lr_address, self.hyper = found[:even], found[even:].view(torch.float32)
        self.numbers = lr_address, numbers


class _TorchPart(_Part):
    """Torch's own: CUDA tensors that the kernels do not take."""

    def step(self, grads: Sequence[torch.Tensor], hyper: Sequence[_Hyper]) -> None:
        for member in sorted({e.member for e in self.entries}):
            entries = [e for e in self.entries if e.member == member]
            lr, lr_tensor, (beta1, beta2, eps, weight_decay, decoupled, maximize) = hyper[member]
            with torch.no_grad():
                eager_adam(
                    [e.param for e in entries],
                    [grads[e.place] for e in entries],
                    [e.moments[0] for e in entries],
                    [e.moments[1] for e in entries],
                    [e.moments[2] for e in entries if len(e.moments) == 3],
                    [e.step for e in entries],
                    foreach=True,
                    # Step counters on the device, and nothing that waits for it.
                    capturable=self.device.type == "cuda",
                    amsgrad=len(entries[0].moments) == 3,
                    beta1=beta1,
                    beta2=beta2,
                    lr=lr if lr_tensor is None or math.isfinite(lr) else lr_tensor,
                    weight_decay=weight_decay,
                    eps=eps,
                    maximize=maximize,
                    decoupled_weight_decay=decoupled,
                )


def _explain(
    params: Iterable[torch.Tensor], **options: Any
) -> tuple[torch.Tensor, Callable[[str], Sequence[tuple[str, str]]]]:
    tensors = list(params)

    def steps(backend: str) -> list[tuple[str, str]]:
        if backend == "torch":
            return [("step", "torch.optim.adam.adam, foreach and capturable")]
        if backend == "fallback":
            return [("step", "in place, block by block; 16-bit tensors through float32 copies")]
        found = [("_adam_prologue_kernel", f"step counters and coefficients of {len(tensors)} tensors")]
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            numels = [t.numel() for t in tensors if t.dtype is dtype]
            tile = configs.adam_tile(dtype.itemsize, True)
            chunks = sum(-(-n // tile.block) for n in numels)
            found.append(
                (
                    "_multi_tensor_kernel",
                    f"{tile}; {len(numels)} tensors of {dtype}, {sum(numels)} elements, {chunks} programs",
                )
            )
        return found

    return tensors[0], steps


for _name in ("adam", "adamw"):
    _dispatch.explains(_name)(_explain)
