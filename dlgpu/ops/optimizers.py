"""Multi-tensor optimizers: rules, checks, backends and what is kept between steps. The kernels are in
kernels/optimizers.py."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.optim.adagrad import adagrad as eager_adagrad
from torch.optim.adam import adam as eager_adam
from torch.optim.rmsprop import rmsprop as eager_rmsprop
from torch.optim.sgd import sgd as eager_sgd

from dlgpu import _checks, _dispatch
from dlgpu._arrays import to_array, to_tensor
from dlgpu.fallback import optimizers as arrays
from dlgpu.kernels import configs, tuning
from dlgpu.kernels import optimizers as kernels

__all__ = ["ADAGRAD", "ADAM", "ADAMW", "RMSPROP", "SGD", "Cache", "Extras", "Rule", "step"]

State = dict[str, Any]
Group = dict[str, Any]
Tensors = Sequence[torch.Tensor]
MASTER = "master_param"
fused_sgd: Any = torch._fused_sgd_
foreach_add: Any = torch._foreach_add_
below_autograd: Any = torch._C._AutoDispatchBelowAutograd
# torch.nn.utils.clip_grad_norm_ divides by the norm plus this.
CLIP_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one of torch's optimizers steps."""

    name: str  # torch.optim's class
    slots: tuple[str, ...]  # torch's names of the states, three at most
    used: Callable[[Group], tuple[bool, ...]]  # which of them a group keeps
    options: tuple[str, ...]  # a group's numbers, without lr; `betas` counts as beta1 and beta2
    update: Any  # the kernel's JIT function
    hyper: Callable[..., tuple[float, ...]]  # its row of numbers
    arrays: Callable[..., None]  # the NumPy twin
    eager: Callable[..., Any]  # torch's own function
    sparse: str  # the class that takes sparse gradients
    # Whether the counter is in the state_dict. SGD's tells the first step from others, and is kept aside.
    counts: bool = True
    # Whether torch's own function takes counters on a GPU.
    capturable: bool = False


SGD = Rule(
    "SGD",
    ("momentum_buffer",),
    lambda group: (group["momentum"] != 0,),
    ("momentum", "dampening", "weight_decay", "nesterov", "maximize"),
    kernels._sgd_update,
    kernels.sgd_hyper,
    arrays.sgd_step,
    eager_sgd,
    "SGD",
    counts=False,
)
ADAGRAD = Rule(
    "Adagrad",
    ("sum",),
    lambda group: (True,),
    ("lr_decay", "eps", "weight_decay", "maximize"),
    kernels._adagrad_update,
    kernels.adagrad_hyper,
    arrays.adagrad_step,
    eager_adagrad,
    "Adagrad",
)
RMSPROP = Rule(
    "RMSprop",
    ("square_avg", "grad_avg", "momentum_buffer"),
    lambda group: (True, group["centered"], group["momentum"] > 0),
    ("alpha", "eps", "weight_decay", "momentum", "maximize"),
    kernels._rmsprop_update,
    kernels.rmsprop_hyper,
    arrays.rmsprop_step,
    eager_rmsprop,
    "SparseAdam",
    capturable=True,
)
ADAM = Rule(
    "Adam",
    ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    lambda group: (True, True, group["amsgrad"]),
    ("betas", "eps", "weight_decay", "decoupled_weight_decay", "maximize"),
    kernels._adam_update,
    kernels.adam_hyper,
    arrays.adam_step,
    eager_adam,
    "SparseAdam",
    capturable=True,
)
ADAMW = dataclasses.replace(ADAM, name="AdamW")


class Extras(NamedTuple):
    """What torch's optimizers do not have."""

    max_grad_norm: float | None = None
    master_weights: bool = False
    state_dtype: torch.dtype | None = None
    initial: float = 0  # of new states: Adagrad's initial_accumulator_value, which is torch's for all groups

    def has_master(self, param: torch.Tensor) -> bool:
        """Whether the parameter has a float32 master."""
        return self.master_weights and param.dtype.itemsize == 2

    def dtype(self, param: torch.Tensor) -> torch.dtype | None:
        """The dtype of the parameter's states; None leaves torch's, which is the parameter's."""
        if param.dtype is torch.float64:
            return None
        if self.state_dtype is None and self.has_master(param):
            return torch.float32
        return self.state_dtype


class Cache:
    """What an optimizer keeps from step to step: tables, views, and the key that tells whether they still hold."""

    def __init__(self) -> None:
        self.plan: _Plan | None = None
        # What captured graphs read at each replay: it must outlive any plan.
        self.kept: list[Any] = []
        # Of parameters whose counter is not in the state.
        self.counters: dict[torch.Tensor, torch.Tensor] = {}
        self.norm: torch.Tensor | None = None

    def forget(self) -> None:
        """Makes all anew at the next step, except what captured graphs read: states were replaced."""
        self.plan = None
        self.counters = {}


def _backend(rule: Rule, param: torch.Tensor, extras: Extras) -> str:
    """The backend that steps a parameter."""
    plain = extras[:3] == Extras()[:3] and param.dtype is torch.float32
    return _dispatch.choose_backend(param, rule.name.lower() if plain else "optimizer_extra")


def _new_state(rule: Rule, param: torch.Tensor, group: Group, extras: Extras) -> State:
    """Torch's state for a parameter that had none, of a rule that counts. `step` is on the parameter's device where a kernel
    advances it."""
    on_device = _counts_on_device(rule, _backend(rule, param, extras))
    # As torch: float64 steps go with a float64 default, except where they are on the device.
    wide = not on_device and torch.get_default_dtype() is torch.float64
    state: State = {
        "step": torch.zeros(
            (), dtype=torch.float64 if wide else torch.float32, device=param.device if on_device else "cpu"
        )
    }
    for name, used in zip(rule.slots, rule.used(group), strict=True):
        if used:
            state[name] = _new_slot(param, extras)
    return state


def _new_slot(param: torch.Tensor, extras: Extras) -> torch.Tensor:
    return torch.full_like(
        param,
        extras.initial,
        dtype=extras.dtype(param),
        requires_grad=False,
        memory_format=torch.preserve_format,
    )


def _counts_on_device(rule: Rule, backend: str) -> bool:
    return backend == "triton" or (backend == "torch" and rule.capturable)


def step(
    rule: Rule,
    params: Tensors,
    grads: Tensors,
    members: Sequence[int],
    groups: Sequence[Group],
    state: MutableMapping[torch.Tensor, State],
    cache: Cache,
    extras: Extras,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
) -> None:
    """One step of a rule on all parameters, of all groups, in place.

    A plain function, not a dispatcher op: there is no result to trace, what is kept between steps belongs to one
    optimizer, and handing five lists of 1,000 tensors through the dispatcher takes longer than all the rest of a step on
    the host. torch.compile breaks the graph at the optimizer's step.

    Args:
        params, grads: float32, bfloat16, float16 or float64, a gradient of its parameter's shape; any strides, but no
            parameter with overlapping elements. A parameter that is not dense, or a gradient with other strides than
            its parameter, is copied at each step.
        members: the number of each parameter's group.
        groups: of each group, torch's names of the hyper-parameters.
        state: of each parameter, torch's names of the states; made where it is missing. Normalized in place: a step counter
            is moved to the device where a kernel advances it, states to their parameter's strides and to the dtype that
            `extras` says.
        cache: kept by the optimizer; `cache.norm` holds the gradients' norm after a step that clips.
        extras: see dlgpu.optim.
        grad_scale, found_inf: of one element, as torch.amp.GradScaler sets them: gradients are divided by the one, and
            nothing changes where the other is not 0.

    Raises:
        RuntimeError: a sparse gradient, a parameter with overlapping elements, parameters that share memory (kernels only),
            a shape or device that does not fit.
        TypeError: a dtype that does not fit.
        NotImplementedError: complex parameters, numbers other than lr that are tensors on a device.

    Sources: those named in dlgpu.optim.
    """
    if not params:
        return
    used = [rule.used(group) for group in groups]
    plan = cache.plan
    if plan is None or not plan.holds(params, members, used, state, extras):
        cache.plan = None
        plan = cache.plan = _Plan(rule, params, grads, members, groups, used, state, extras, cache)
    hyper = [_hyper(rule, group) for group in groups]
    try:
        found = [part.arrange(grads, hyper) for part in plan.parts]
    except RuntimeError:
        # Of a sparse gradient, which has no strides, say what is wrong.
        for p, g in zip(params, grads, strict=True):
            _check(rule, p, g)
        raise
    plan.refresh_masters()
    sums = None if extras.max_grad_norm is None else _square_sums(plan.parts, found)
    for n, part in enumerate(plan.parts):
        amp = _Amp(
            grad_scale if grad_scale is None else _number_on(part.device, grad_scale),
            found_inf if found_inf is None else _number_on(part.device, found_inf),
            None if sums is None else sums[n],
            0.0 if extras.max_grad_norm is None else float(extras.max_grad_norm),
        )
        part.step(found[n], hyper, amp)
    if sums is not None:
        cache.norm = plan.parts[0].norm
    torch.autograd.graph.increment_version(params)
    plan.versions = [p._version for p, _ in plan.masters]


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


class _Alike:
    """Tells whether tensors have the dtypes, shapes and strides that others had.

    Dynamo's guards look at all of them in one call, which takes a third of the time of two lists of attributes; they look at
    more than that, so what they do not let through may still be alike.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.described = self._describe(tensors)
        self.guards: Any = None

    @staticmethod
    def _describe(tensors: Tensors) -> list[tuple[Any, ...]]:
        # A negative view, as complex numbers' gradients may be, has another sign in memory.
        return [(t.dtype, t.shape, t.stride(), t.is_neg()) for t in tensors]

    def __call__(self, tensors: Tensors) -> bool:
        if self.guards is not None and self.guards.check(*tensors):
            return True
        if self._describe(tensors) != self.described:
            return False
        with contextlib.suppress(AttributeError, TypeError):
            sizes: Any = [list(t.shape) for t in tensors]
            strides: Any = [list(t.stride()) for t in tensors]
            guards = torch._C._dynamo.guards.TensorGuards
            self.guards = guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return True


class _Hyper(NamedTuple):
    """A group's hyper-parameters as numbers; the learning rate also as the tensor it may be, for use on its device."""

    lr: float
    lr_tensor: torch.Tensor | None
    options: dict[str, Any]


class _Amp(NamedTuple):
    """What a part needs to unscale, to clip and to skip, on its device."""

    grad_scale: torch.Tensor | None
    found_inf: torch.Tensor | None
    sums: torch.Tensor | None  # [P]: they add up to the square of the norm of all gradients
    max_norm: float


def _number_on(device: torch.device, t: torch.Tensor) -> torch.Tensor:
    return t.to(device=device, dtype=torch.float32, non_blocking=True)


def _square_sums(parts: Sequence[_Part], grads: Sequence[Tensors]) -> list[torch.Tensor]:
    """For each part, on its device, sums that add up to the square of the norm of all gradients."""
    sums = [part.square_sums(found) for part, found in zip(parts, grads, strict=True)]
    if len(parts) == 1:
        return sums
    totals = [s.sum() for s in sums]
    return [
        torch.stack([t.to(part.device, non_blocking=part.device.type == "cuda") for t in totals])
        for part in parts
    ]


def _hyper(rule: Rule, group: Group) -> _Hyper:
    options: dict[str, Any] = {}
    for name in rule.options:
        value = group[name]
        if name == "betas":
            options["beta1"], options["beta2"] = (
                _number(rule, f"betas[{n}]", b) for n, b in enumerate(value)
            )
        elif name == "decoupled_weight_decay":
            options["decoupled"] = value
        else:
            options[name] = _number(rule, name, value) if isinstance(value, torch.Tensor) else value
    lr = group["lr"]
    if not isinstance(lr, torch.Tensor):
        return _Hyper(float(lr), None, options)
    # Reading a tensor on a device would wait for it.
    return _Hyper(float(lr) if lr.device.type == "cpu" else math.nan, lr, options)


def _number(rule: Rule, name: str, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.device.type != "cpu":
        raise NotImplementedError(
            f"{rule.name}: {name} is a tensor on {value.device}, expected a float; torch.optim.{rule.name} takes one"
        )
    return float(value)


def _check(rule: Rule, p: torch.Tensor, g: torch.Tensor) -> None:
    op = rule.name
    if g.layout is not torch.strided:
        raise RuntimeError(
            f"{op}: a gradient has layout {g.layout}, expected torch.strided; for sparse gradients consider "
            f"torch.optim.{rule.sparse} instead"
        )
    for name, t in (("a parameter", p), ("a gradient", g)):
        if t.is_complex():
            raise NotImplementedError(
                f"{op}: {name} is complex ({t.dtype}); torch.optim.{op} takes complex ones"
            )
        _checks.require_floating(op, name, t)
    _checks.require_device(op, "a gradient", g, p.device, "its parameter")
    _checks.require_shape(op, "a gradient", g, tuple(p.shape))
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise RuntimeError(f"{op}: more than one element of a parameter refers to a single memory location")
    if p.numel() and not p.data_ptr():
        raise RuntimeError(f"{op}: a parameter ({type(p).__name__} on {p.device}) has no memory to write to")


def _layout(p: torch.Tensor) -> tuple[int, ...]:
    """The strides of what belongs to a parameter: its own if it is dense."""
    return torch.empty_like(p, device="meta", memory_format=torch.preserve_format).stride()


def _fits(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether strides mean the same: those of dimensions of size 1 do not count."""
    return 0 in shape or all(n == 1 or x == y for n, x, y in zip(shape, a, b, strict=True))


class _Plan:
    """Which backend steps which parameters, as long as it `holds`."""

    def __init__(
        self,
        rule: Rule,
        params: Tensors,
        grads: Tensors,
        members: Sequence[int],
        groups: Sequence[Group],
        used: Sequence[tuple[bool, ...]],
        state: MutableMapping[torch.Tensor, State],
        extras: Extras,
        cache: Cache,
    ) -> None:
        backends: dict[tuple[torch.device, torch.dtype], str] = {}
        for p, g in zip(params, grads, strict=True):
            _check(rule, p, g)
            if (p.device, p.dtype) not in backends:
                backends[p.device, p.dtype] = _backend(rule, p, extras)
        self.masters: list[tuple[torch.Tensor, torch.Tensor]] = []
        # As torch: a parameter for which nothing is kept has no entry.
        self.states: list[State] = [
            state[p] if rule.counts or any(used[member]) or extras.has_master(p) else {}
            for p, member in zip(params, members, strict=True)
        ]
        shares: dict[tuple[str, torch.device], list[_Entry]] = {}
        with torch.no_grad():
            for i, (p, own, member) in enumerate(zip(params, self.states, members, strict=True)):
                if rule.counts and not own:
                    own.update(_new_state(rule, p, groups[member], extras))
                backend = backends[p.device, p.dtype]
                on_device = _counts_on_device(rule, backend)
                kept = _normalize(rule, p, own, used[member], extras, cache)
                count = _counter(rule, p, own, used[member], on_device, cache)
                master = _master(p, own) if extras.has_master(p) else None
                if master is not None:
                    self.masters.append((p, master))
                dtype = next((t.dtype for t in kept if t is not None), extras.dtype(p) or p.dtype)
                entry = _Entry(i, member, p.detach(), master, kept, dtype, count, _layout(p))
                shares.setdefault((backend, p.device), []).append(entry)
        parts: dict[str, type[_Part]] = {"triton": _KernelPart, "fallback": _ArrayPart, "torch": _TorchPart}
        self.parts = [parts[backend](rule, entries, cache.kept) for (backend, _), entries in shares.items()]
        self.params = list(params)
        self.alike = _Alike(params)
        self.all_states = list(state.values())
        self.key = self._key(members, used, extras)
        self.values = list(chain.from_iterable(map(dict.values, self.states)))
        # Memory can be exchanged within a tensor, by `.data` or `set_`: whoever does that to states does it to the first.
        slot = rule.slots[0]
        self.pointed: list[torch.Tensor] = list(params)
        self.pointed += [own[slot] for own, m in zip(self.states, members, strict=True) if used[m][0]]
        self.addresses = list(map(torch.Tensor.data_ptr, self.pointed))
        # Of the parameters that have masters, after our own last step.
        self.versions: list[int] | None = None

    @staticmethod
    def _key(members: Sequence[int], used: Any, extras: Extras) -> tuple[Any, ...]:
        """What decides on the parts, but for the parameters: their backends too."""
        return members, used, extras.max_grad_norm is None, extras[1:], _dispatch.wanted_backend()

    def holds(
        self,
        params: Tensors,
        members: Sequence[int],
        used: Any,
        state: MutableMapping[torch.Tensor, State],
        extras: Extras,
    ) -> bool:
        """Whether tables and views are still right. Gradients move at every step: each part looks at its own."""
        return (
            _same(params, self.params)
            # A dict in the place of another, or of none.
            and _same(list(state.values()), self.all_states)
            and self._key(members, used, extras) == self.key
            and _same(list(chain.from_iterable(map(dict.values, self.states))), self.values)
            and list(map(torch.Tensor.data_ptr, self.pointed)) == self.addresses
            and self.alike(params)
        )

    def refresh_masters(self) -> None:
        """Takes over what was written into parameters from outside; elsewhere masters keep their extra bits."""
        if not self.masters:
            return
        versions = [p._version for p, _ in self.masters]
        if versions == self.versions:
            return
        before = self.versions or [-1] * len(versions)
        with torch.no_grad():
            for (p, master), old, new in zip(self.masters, before, versions, strict=True):
                if old != new:
                    master.copy_(torch.where(master.to(p.dtype) == p, master, p.float()))


def _normalize(
    rule: Rule, p: torch.Tensor, state: State, used: Sequence[bool], extras: Extras, cache: Cache
) -> tuple[torch.Tensor | None, ...]:
    """Brings states to where the backend wants them: a checkpoint, or another backend, may have left them otherwise."""
    strides = _layout(p)
    dtype = extras.dtype(p)
    found: list[torch.Tensor | None] = []
    for name, use in zip(rule.slots, used, strict=True):
        if not use:
            found.append(None)
            continue
        if not rule.counts and state.get(name) is None:
            state[name] = _new_slot(p, extras)
            cache.counters[p] = torch.zeros(())
        t = state[name]
        _checks.require_device(rule.name, name, t, p.device, "its parameter")
        _checks.require_shape(rule.name, name, t, tuple(p.shape))
        _checks.require_floating(rule.name, name, t)
        if t.dtype is not (dtype or t.dtype) or not _fits(p.shape, t.stride(), strides):
            kept = torch.empty_like(p, dtype=dtype or t.dtype, memory_format=torch.preserve_format)
            state[name] = t = kept.copy_(t)
        if found and found[0] is not None:
            _checks.require_dtype(rule.name, name, t, found[0].dtype, rule.slots[0])
        found.append(t.detach())
    return tuple(found)


def _counter(
    rule: Rule, p: torch.Tensor, state: State, used: Sequence[bool], on_device: bool, cache: Cache
) -> torch.Tensor | None:
    """The parameter's step counter, where the backend wants it; None where nothing needs one."""
    if rule.counts:
        count = state["step"]
    elif any(used):
        # States that come from elsewhere have been stepped.
        count = cache.counters.get(p, 1.0)
    else:
        return None
    if not isinstance(count, torch.Tensor):
        count = torch.tensor(float(count))
    device = p.device if on_device else torch.device("cpu")
    if count.device != device or (on_device and count.dtype is not torch.float32):
        dtype = torch.float32 if on_device else count.dtype
        # A number goes to a device with the launch that fills, a tensor would be copied, and waited for.
        count = (
            torch.full((), count.item(), dtype=dtype, device=device)
            if count.device.type == "cpu"
            else count.to(device=device, dtype=dtype)
        )
    if rule.counts:
        state["step"] = count
    else:
        cache.counters[p] = count
    return count


def _master(p: torch.Tensor, state: State) -> torch.Tensor:
    """The parameter's float32 master, made from it where there is none."""
    strides = _layout(p)
    t = state.get(MASTER)
    if t is None or t.dtype is not torch.float32 or not _fits(p.shape, t.stride(), strides):
        kept = torch.empty_like(
            p, dtype=torch.float32, requires_grad=False, memory_format=torch.preserve_format
        )
        state[MASTER] = t = kept.copy_(p if t is None else t)
    return t.detach()


class _Entry(NamedTuple):
    """One parameter of a part."""

    place: int  # in the lists that `step` is given
    member: int
    param: torch.Tensor
    master: torch.Tensor | None
    states: tuple[torch.Tensor | None, ...]
    state_dtype: torch.dtype  # also of one that has no states: groups with and without share a launch
    step: torch.Tensor | None
    strides: tuple[int, ...]


class _Part:
    """The parameters of one device that one backend steps."""

    def __init__(self, rule: Rule, entries: Sequence[_Entry], kept: list[Any]) -> None:
        self.rule = rule
        self.entries = entries
        self.device = entries[0].param.device
        self.places = [e.place for e in entries]
        # The norm of all gradients, after a step that clips.
        self.norm = torch.empty((), dtype=torch.float32, device=self.device)
        # What is written: the parameter, or a copy of one that is not dense.
        self.targets: list[torch.Tensor] = []
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []
        for e in entries:
            target = e.param
            if not _fits(target.shape, target.stride(), e.strides):
                target = torch.empty_like(target, memory_format=torch.preserve_format)
                self.copies.append((e.param, target))
            self.targets.append(target)
        self.alike = _Alike(self.targets)
        # Of gradients that are laid out unlike their parameter.
        self.buffers: dict[int, torch.Tensor] = {}

    def arrange(self, grads: Tensors, hyper: Sequence[_Hyper]) -> Tensors:
        """This part's gradients, laid out like `targets`."""
        found = grads if len(grads) == len(self.places) else [grads[i] for i in self.places]
        return found if self.alike(found) else [self._arranged(n, g) for n, g in enumerate(found)]

    def _arranged(self, n: int, g: torch.Tensor) -> torch.Tensor:
        e = self.entries[n]
        alike = g.dtype is e.param.dtype and g.shape == e.param.shape and not g.is_neg()
        if alike and _fits(g.shape, g.stride(), e.strides):
            return g
        _check(self.rule, e.param, g)
        if n not in self.buffers:
            self.buffers[n] = torch.empty_like(e.param, memory_format=torch.preserve_format)
        return self.buffers[n].copy_(g.detach())

    def step(self, grads: Tensors, hyper: Sequence[_Hyper], amp: _Amp) -> None:
        """Steps its parameters in place."""
        for p, target in self.copies:
            target.copy_(p)
        self.update(grads, hyper, amp)
        for p, target in self.copies:
            p.copy_(target)

    def square_sums(self, grads: Tensors) -> torch.Tensor:
        """[P], sums that add up to that of the squares of the gradients."""
        raise NotImplementedError

    def update(self, grads: Tensors, hyper: Sequence[_Hyper], amp: _Amp) -> None:
        """Steps `targets`; the gradients are laid out like them."""
        raise NotImplementedError

    def factor(self, amp: _Amp) -> Any:
        """What the gradients are to be multiplied by, None for 1; leaves their norm."""
        factor = None if amp.grad_scale is None else 1 / amp.grad_scale
        if amp.sums is not None:
            norm = amp.sums.sum().sqrt() * (1 if factor is None else factor)
            self.norm.copy_(norm.reshape(()))
            clip = torch.clamp(amp.max_norm / (norm + CLIP_EPS), max=1.0)
            factor = clip if factor is None else factor * clip
        return factor


class _ArrayPart(_Part):
    """The array code, one call a group: on views that are kept, or on float32 copies of 16-bit tensors, block by block."""

    # Elements of 16-bit tensors that are converted at a time.
    CONVERTED = 1 << 16

    def __init__(self, rule: Rule, entries: Sequence[_Entry], kept: list[Any]) -> None:
        super().__init__(rule, entries, kept)
        self.counters = [None if e.step is None else e.step.detach().numpy() for e in entries]
        self.contiguous = [p.is_contiguous() for p in self.targets]
        self.flat = [
            [None if t is None else _flat(t) for t in (p if e.master is None else e.master, *e.states)]
            for p, e in zip(self.targets, entries, strict=True)
        ]
        batches: dict[Any, list[int]] = {}
        for n, (e, tensors) in enumerate(zip(entries, self.flat, strict=True)):
            native = all(t is None or t.dtype in (torch.float32, torch.float64) for t in tensors)
            batches.setdefault((e.member, -1 if native else n), []).append(n)
        # (group, positions among the entries, arrays of parameters and states, None where they must be converted).
        self.batches = [
            (member, where, self._arrays(where) if alone < 0 else None)
            for (member, alone), where in batches.items()
        ]

    def _arrays(self, where: Sequence[int]) -> list[list[Any] | None]:
        """[parameters, states, ...], None for a state that the group does not have."""
        columns = zip(*(self.flat[n] for n in where), strict=True)
        return [None if column[0] is None else [to_array(t) for t in column] for column in columns]

    def _grad(self, n: int, g: torch.Tensor) -> Any:
        return to_array(g).reshape(-1) if self.contiguous[n] else to_array(_flat(g))

    def square_sums(self, grads: Tensors) -> torch.Tensor:
        total = arrays.square_sum([self._grad(n, g) for n, g in enumerate(grads)])
        return to_tensor(np.asarray(total).reshape(1), torch.float64) if isinstance(total, float) else total

    def update(self, grads: Tensors, hyper: Sequence[_Hyper], amp: _Amp) -> None:
        factor = self.factor(amp)
        if amp.found_inf is not None and amp.found_inf.item():
            return
        scale = {} if factor is None else {"factor": float(factor)}
        for member, where, kept in self.batches:
            lr, lr_tensor, options = hyper[member]
            if math.isnan(lr) and lr_tensor is not None:
                # It is a tensor on another device than the parameters, which are here: no way but to wait.
                lr = float(lr_tensor)
            steps = []
            for n in where:
                counter = self.counters[n]
                if counter is None:
                    steps.append(1.0)
                    continue
                # Assignment costs a tenth of the ufunc that += is.
                counter[()] = count = counter.item() + 1
                steps.append(count)
            if kept is None:
                self._converted(where[0], grads[where[0]], steps, {"lr": lr, **options, **scale})
            else:
                found = [self._grad(n, grads[n]) for n in where]
                self.rule.arrays(kept[0], found, *kept[1:], steps, lr=lr, **options, **scale)
        for p, e in zip(self.targets, self.entries, strict=True):
            if e.master is not None:
                p.copy_(e.master)

    def _converted(self, n: int, grad: torch.Tensor, steps: list[float], options: dict[str, Any]) -> None:
        tensors = [*self.flat[n], _flat(grad)]
        for start in range(0, grad.numel(), self.CONVERTED):
            some = [None if t is None else t[start : start + self.CONVERTED] for t in tensors]
            found = [None if t is None else [to_array(t)] for t in some]
            self.rule.arrays(found[0], found[-1], *found[1:-1], steps, **options)
            for t, array in zip(some[:-1], found, strict=False):
                if t is not None and array is not None and t.dtype.itemsize == 2:
                    t.copy_(to_tensor(array[0], t.dtype))


def _flat(t: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor in the order of memory."""
    return t.detach().as_strided((t.numel(),), (1,))


class _KernelPart(_Part):
    """The kernels: tables on the device, immutable once there, made anew when an address or a number has changed."""

    def __init__(self, rule: Rule, entries: Sequence[_Entry], kept: list[Any]) -> None:
        super().__init__(rule, entries, kept)
        self._check_apart()
        self.kept = kept
        tensors, groups = len(entries), max(e.member for e in entries) + 1
        # One upload: the tensors' rows; the addresses of learning rates, an even number of words so far, to keep what
        # follows aligned; the groups' numbers.
        words = tensors * kernels.TABLE_WIDTH
        self.bounds = [words, words + groups + (words + groups) % 2]
        self.host = np.zeros(self.bounds[1] + groups * kernels.HYPER_WIDTH // 2, np.int64)
        self.rows = self.host[:words].reshape(tensors, kernels.TABLE_WIDTH)
        self.lr_addresses = self.host[words : words + groups]
        self.numbers = self.host[self.bounds[1] :].view(np.float32).reshape(groups, kernels.HYPER_WIDTH)
        self.kinds: list[kernels.Kind] = []
        for n, (p, e) in enumerate(zip(self.targets, entries, strict=True)):
            states = [0 if t is None else t.data_ptr() for t in e.states]
            self.rows[n] = [
                p.data_ptr(),
                0,
                0 if e.master is None else e.master.data_ptr(),
                *states,
                *[0] * (3 - len(states)),
                0 if e.step is None else e.step.data_ptr(),
                p.numel(),
                e.member,
            ]
            self.kinds.append((p.dtype, p.dtype, e.state_dtype, e.master is not None))
        self.scalars = torch.empty((tensors, kernels.SCALARS_WIDTH), dtype=torch.float32, device=self.device)
        self.upload = kernels.Uploader(len(self.host), self.device, kept)
        self.recorded = False
        # What is on the device, and what it was made from.
        self.tables: tuple[torch.Tensor, ...] = ()
        self.launches: list[kernels.Launch] = []
        self.partials: torch.Tensor | None = None
        self.addresses: list[int] | None = None
        self.unaligned: list[bool] | None = None
        self.made_from: Any = None
        # Learning rates that are tensors, but not float32 on this device.
        self.converted: dict[int, torch.Tensor] = {}

    def _check_apart(self) -> None:
        # Torch steps them one after the other; programs of one launch have no order.
        end = 0
        for start, size in sorted(
            (p.data_ptr(), p.numel() * p.element_size()) for p in self.targets if p.numel()
        ):
            if start < end:
                name = self.rule.name
                raise RuntimeError(
                    f"{name}: two parameters, or one given twice, share memory; torch.optim.{name} takes such"
                )
            end = start + size

    def arrange(self, grads: Tensors, hyper: Sequence[_Hyper]) -> Tensors:
        found = super().arrange(grads, hyper)
        if self.recorded:
            # What a graph uploads is there when it is replayed, which may never be.
            self.tables, self.unaligned, self.recorded = (), None, False
        addresses = list(map(torch.Tensor.data_ptr, found))
        if addresses != self.addresses or self.unaligned is None:
            self.rows[:, kernels.GRAD_COLUMN] = self.addresses = addresses
            self.tables = ()
            unaligned = kernels.unaligned(self.rows)
            if unaligned != self.unaligned:
                self.launches = kernels.layout(self.rows, self.kinds, self.device, self.kept)
                self.unaligned, self.partials = unaligned, None
        self._set_numbers(hyper)
        if not self.tables:
            words = self.upload(self.host)
            first, second = self.bounds
            self.tables = words[:first], words[first:second], words[second:].view(torch.float32)
            self.recorded = self.upload.capturing()
        return found

    def _set_numbers(self, hyper: Sequence[_Hyper]) -> None:
        count = len(self.lr_addresses)
        lr_addresses = [self._lr_address(member, h) for member, h in enumerate(hyper[:count])]
        numbers = [(0.0 if at else h.lr, h.options) for at, h in zip(lr_addresses, hyper, strict=False)]
        if (lr_addresses, numbers) != self.made_from:
            self.lr_addresses[:] = lr_addresses
            for row, (lr, options) in zip(self.numbers, numbers, strict=True):
                row[:] = self.rule.hyper(lr, **options)
            self.made_from = lr_addresses, numbers
            self.tables = ()

    def _lr_address(self, member: int, h: _Hyper) -> int:
        lr = h.lr_tensor
        if lr is None or (lr.device != self.device and lr.device.type == "cpu"):
            return 0
        if lr.device != self.device or lr.dtype is not torch.float32:
            if member not in self.converted:
                self.converted[member] = torch.empty((), dtype=torch.float32, device=self.device)
            lr = self.converted[member].copy_(lr.detach().reshape(()), non_blocking=True)
        return lr.data_ptr()

    def square_sums(self, grads: Tensors) -> torch.Tensor:
        if self.partials is None:
            sums = kernels.partial_sums(self.launches)
            self.partials = torch.empty(sums, dtype=torch.float32, device=self.device)
        kernels.square_sums(self.tables[0], self.launches, self.partials)
        return self.partials

    def update(self, grads: Tensors, hyper: Sequence[_Hyper], amp: _Amp) -> None:
        table, lr_address, hyper_table = self.tables
        kernels.step(
            self.rule.update,
            table,
            lr_address,
            hyper_table,
            self.scalars,
            self.launches,
            # Those of several parts may be float64.
            partials=None if amp.sums is None else amp.sums.float(),
            norm=None if amp.sums is None else self.norm,
            max_norm=amp.max_norm,
            grad_scale=amp.grad_scale,
            found_inf=amp.found_inf,
        )
        if self.upload.capturing():
            # The graph goes on reading what a later step here may replace.
            self.kept.append((self, self.tables, self.launches, self.partials, hyper, amp))


def _torch_form(rule: Rule, device: torch.device) -> dict[str, bool]:
    """Which of torch's forms: the fastest that it has."""
    if device.type != "cpu":
        return {"foreach": True}
    # RMSprop has no fused form.
    return {"foreach": False} if rule is RMSPROP else {"fused": True}


class _TorchPart(_Part):
    """Torch's own functions: CUDA tensors that the kernels do not take, CPU tensors where they are ahead of NumPy."""

    def __init__(self, rule: Rule, entries: Sequence[_Entry], kept: list[Any]) -> None:
        super().__init__(rule, entries, kept)
        self.form = _torch_form(rule, self.device)
        self.groups = [
            (member, where, self._columns(where))
            for member in sorted({e.member for e in entries})
            if (where := [n for n, e in enumerate(entries) if e.member == member])
        ]
        # Of SGD, by their first entries, groups without momentum, or with buffers that a first step has filled.
        self.started = {
            where[0] for _, where, columns in self.groups if self._direct and columns and not columns[1]
        }
        # Of those, groups without momentum.
        self.plain = set(self.started)

    @property
    def _direct(self) -> bool:
        return not self.rule.counts and "fused" in self.form

    def _columns(self, where: Sequence[int]) -> list[list[torch.Tensor]] | None:
        """[parameters, states, ..., counters] as torch's functions take them; None where dtypes have to be brought in line."""
        entries = [self.entries[n] for n in where]
        dtype = entries[0].param.dtype
        if any(
            e.master is not None or any(t is not None and t.dtype is not dtype for t in (e.param, *e.states))
            for e in entries
        ):
            return None
        states = [
            [t for t in column if t is not None] for column in zip(*(e.states for e in entries), strict=True)
        ]
        return [[self.targets[n] for n in where], *states, [e.step for e in entries if e.step is not None]]

    def square_sums(self, grads: Tensors) -> torch.Tensor:
        return torch.stack([g.detach().double().square().sum() for g in grads])

    def update(self, grads: Tensors, hyper: Sequence[_Hyper], amp: _Amp) -> None:
        factor = self.factor(amp)
        if factor is not None:
            grads = [(g if g.dtype.itemsize > 2 else g.float()).detach() * factor.to(g.device) for g in grads]
        # Torch's functions cannot skip: no way but to wait.
        if amp.found_inf is not None and amp.found_inf.item():
            return
        for member, where, columns in self.groups:
            found = grads if len(where) == len(grads) else [grads[n] for n in where]
            lr, lr_tensor, given = hyper[member]
            if where[0] in self.plain and lr_tensor is None and not given["weight_decay"]:
                # A sum is all there is. Torch's fused kernel takes as long, and longer where it waits for threads or memory.
                assert columns is not None
                with below_autograd():
                    foreach_add(columns[0], found, alpha=lr if given["maximize"] else -lr)
                continue
            options = self._options(where, hyper[member])
            if columns is not None and where[0] in self.started:
                # At once, below autograd: in a small step, what torch's function does around this takes as long.
                fused_sgd(columns[0], found, columns[1], is_first_step=False, **options)
                continue
            with torch.no_grad():
                if columns is None:
                    self._group(where, found, options)
                elif self.rule.counts:
                    self.rule.eager(columns[0], found, *columns[1:], **options, **self.form)
                else:
                    self._uncounted(where, columns, found, options)

    def _options(self, where: Sequence[int], hyper: _Hyper) -> dict[str, Any]:
        lr, lr_tensor, options = hyper
        states = self.entries[where[0]].states
        options = {**options, "lr": lr_tensor if math.isnan(lr) and lr_tensor is not None else lr}
        if "decoupled" in options:
            options["decoupled_weight_decay"] = options.pop("decoupled")
            options["amsgrad"] = states[2] is not None
        if self.rule is RMSPROP:
            options["centered"] = states[1] is not None
        if self.rule.capturable:
            # Step counters on the device, and nothing that waits for it.
            options["capturable"] = self.device.type == "cuda"
        return options

    def _group(self, where: Sequence[int], grads: Tensors, options: dict[str, Any]) -> None:
        entries = [self.entries[n] for n in where]
        params = [
            self.targets[n] if e.master is None else e.master for n, e in zip(where, entries, strict=True)
        ]
        # Torch's functions take one dtype a parameter: where ours differ they get float32 copies.
        columns: list[list[torch.Tensor]] = [[], *[[] for _ in self.rule.slots]]
        back: list[tuple[torch.Tensor, torch.Tensor]] = []
        found = []
        for p, g, e in zip(params, grads, entries, strict=True):
            mixed = any(t is not None and t.dtype is not p.dtype for t in e.states)
            for column, t in zip(columns, (p, *e.states), strict=True):
                if t is not None:
                    column.append(t.float() if mixed else t)
                    back.append((t, column[-1]))
            found.append(g.detach().to(columns[0][-1].dtype))
        if self.rule.counts:
            steps = [e.step for e in entries]
            self.rule.eager(columns[0], found, *columns[1:], steps, **options, **self.form)
        else:
            self._uncounted(where, columns, found, options)
        for t, new in back:
            if t is not new:
                t.copy_(new)
        for n, e in zip(where, entries, strict=True):
            if e.master is not None:
                self.targets[n].copy_(e.master)

    def _uncounted(
        self,
        where: Sequence[int],
        columns: list[list[torch.Tensor]],
        grads: Tensors,
        options: dict[str, Any],
    ) -> None:
        """Torch's SGD starts from buffers of None."""
        entries, kept = [self.entries[n] for n in where], columns[1]
        given = [b if e.step is not None and e.step else None for b, e in zip(kept, entries, strict=False)]
        made = list(given) if kept else [None] * len(entries)
        # The fused form takes all of them or none, and "foreach" adds to the gradients for nesterov.
        self.rule.eager(columns[0], grads, made, **options, foreach=not options["nesterov"])
        # There are none without momentum.
        for buffer, old, new in zip(kept, given, made, strict=False):
            if old is None and new is not None:
                buffer.copy_(new)
        for e in entries:
            if e.step is not None:
                e.step.add_(1)
        if self._direct:
            self.started.add(where[0])


def _explain(
    rule: Rule, params: Iterable[torch.Tensor], **options: Any
) -> tuple[torch.Tensor, Callable[[str], Sequence[tuple[str, str]]], str]:
    tensors = list(params)
    extras = {"max_grad_norm", "master_weights", "state_dtype"} & {*options}
    plain = not extras and tensors[0].dtype is torch.float32

    def steps(backend: str) -> list[tuple[str, str]]:
        if backend == "torch":
            form = ", ".join(f"{k}={v}" for k, v in _torch_form(rule, tensors[0].device).items())
            return [("step", f"{rule.eager.__module__}.{rule.eager.__name__}, {form}")]
        if backend == "fallback":
            return [("step", "in place, block by block; 16-bit tensors through float32 copies")]
        found = [("_prologue_kernel", f"step counters and coefficients of {len(tensors)} tensors")]
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            numels = [t.numel() for t in tensors if t.dtype is dtype]
            tile = tuning.tile(tensors[0].device, configs.optimizer_tile, dtype.itemsize, True)
            chunks = sum(-(-n // tile.block) for n in numels)
            found.append(
                (
                    "_multi_tensor_kernel",
                    f"{tile}; {len(numels)} tensors of {dtype}, {sum(numels)} elements, {chunks} programs",
                )
            )
        return found

    return tensors[0], steps, rule.name.lower() if plain else "optimizer_extra"


for _rule in (SGD, ADAGRAD, RMSPROP, ADAM, ADAMW):
    _dispatch.explains(_rule.name.lower())(functools.partial(_explain, _rule))
