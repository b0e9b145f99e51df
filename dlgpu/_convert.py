"""torch's modules and optimizers become dlgpu's, in place: an object stays the object that it is and changes its class."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils import parametrize

from dlgpu import _checks, nn, optim

__all__ = ["Changed", "Conversion", "Left", "convert"]

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_DEVICES = ("cpu", "cuda", "meta")
# torch's classes with one of the same name in dlgpu.nn, which adds arguments and computes the same without them.
_LAYERS: dict[type, type] = {
    getattr(torch.nn, name): getattr(nn, name)
    for name in nn.__all__
    if name != "Sequential" and issubclass(getattr(nn, name), getattr(torch.nn, name, ()))
}
_ACTIVATIONS = (
    torch.nn.GELU,
    torch.nn.LeakyReLU,
    torch.nn.ReLU,
    torch.nn.SiLU,
    torch.nn.Sigmoid,
    torch.nn.Tanh,
)
_CONVERTED = (*_LAYERS, *_ACTIVATIONS, torch.nn.Sequential)
_OPTIMIZERS: dict[type, type] = {getattr(torch.optim, name): getattr(optim, name) for name in optim.__all__}


@dataclasses.dataclass(frozen=True)
class Changed:
    """A module, or the optimizer, that was converted."""

    name: str  # as in named_modules(), "" for the model itself; "optimizer"
    before: str
    after: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Left:
    """A module, or the optimizer, that was left as it was."""

    name: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Conversion:
    """What `convert` did; print it for a table.

    Attributes:
        model: the converted model: the one that was given, or with inplace=False its copy.
        optimizer: the optimizer that was given, or its copy, converted unless `left` says otherwise; None without one.
        changed: what was converted, in the order of named_modules().
        left: what was not, and why. Modules that only hold others are in neither.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer | None
    changed: tuple[Changed, ...]
    left: tuple[Left, ...]

    def __str__(self) -> str:
        changed = [(c.name or "(model)", c.before, c.after, c.note) for c in self.changed]
        left = [(entry.name or "(model)", entry.kind, entry.reason) for entry in self.left]
        lines = [f"{len(changed)} converted"]
        lines += _columns([("name", "was", "is", "note"), *changed]) if changed else []
        lines += [f"{len(left)} left as they were"]
        lines += _columns([("name", "is", "because"), *left]) if left else []
        return "\n".join(lines)

    __repr__ = __str__


def convert(
    model: torch.nn.Module, inplace: bool = True, *, optimizer: torch.optim.Optimizer | None = None
) -> Conversion:
    """model(x), computed by dlgpu: each module that is exactly one of torch.nn's with a counterpart in dlgpu.nn becomes that.

    Linear, BatchNorm1d, LayerNorm, RMSNorm, Dropout, the losses of dlgpu.nn, and ReLU, LeakyReLU, Sigmoid, Tanh, GELU and
    SiLU, as `dlgpu.nn.Activation`. A torch.nn.Sequential in which a linear layer or a batch norm stands before an activation,
    or linear layers in a row, becomes a `dlgpu.nn.Sequential`, which computes them as one.

    Objects keep their identity and change their class. So state_dict keys, parameters (their optimizers, ties and gradients),
    buffers, `training`, names, and modules that stand in several places or are the model itself all stay as they are.
    Converting again changes nothing more.

    Left as they are, with the reason in the result: subclasses, parametrized, lazy and quantized modules; modules with hooks
    (of forward, backward or state_dict), with a `forward` of their own, compiled ones, and ones with parameters that dlgpu
    does not take; activations with inplace=True, whose input others may read: in a Sequential they are fused all the same.

    Args:
        model: any module; a loss too.
        inplace: False converts a deep copy of the model, and of the optimizer, and changes nothing that was given.
        optimizer: a torch.optim SGD, Adagrad, RMSprop, Adam or AdamW becomes dlgpu.optim's of that name, its param_groups,
            state, hooks and learning-rate schedulers going on. With inplace=False schedulers stay with the original.

    Returns:
        A Conversion: `model`, `optimizer`, what was `changed`, what was `left` and why. It prints as a table.

    Raises:
        TypeError: model is no module, or optimizer no optimizer.

    Dropout draws other numbers than torch's for the same seed; all other results are torch's but for rounding. A model that
    torch.compile has compiled is compiled anew at its next call.

    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Softmax(dim=1))
    >>> convert(net)
    3 converted
      name     was                  is                           note
      (model)  torch.nn.Sequential  dlgpu.nn.Sequential          as one: 0 1
      0        torch.nn.Linear      dlgpu.nn.Linear
      1        torch.nn.ReLU        dlgpu.nn.Activation('relu')
    1 left as they were
      name  is                because
      2     torch.nn.Softmax  dlgpu.nn has none
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}")
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"convert: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not inplace:
        model, optimizer = _copy(model, optimizer)
    names: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    # What a Sequential fuses depends on the others.
    order = sorted(names, key=lambda module: type(module) is torch.nn.Sequential)
    found = {module: _convert_module(module, names[module]) for module in order}
    rows = [row for module in names for row in found[module]]
    if optimizer is not None:
        rows += _convert_optimizer(model, optimizer)
    return Conversion(
        model,
        optimizer,
        tuple(row for row in rows if isinstance(row, Changed)),
        tuple(row for row in rows if isinstance(row, Left)),
    )


def _copy(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None
) -> tuple[torch.nn.Module, torch.optim.Optimizer | None]:
    if optimizer is None:
        return copy.deepcopy(model), None
    # Together, so that the copy steps the copy. What it steps besides the model stays as it is.
    own = set(model.parameters())
    others = {id(p): p for group in optimizer.param_groups for p in group["params"] if p not in own}
    return copy.deepcopy((model, optimizer), others)


def _convert_module(module: torch.nn.Module, names: list[str]) -> list[Changed | Left]:
    kind = type(module)
    if _is_ours(kind):
        return []
    name, before = names[0], _named(kind)
    if kind not in _CONVERTED:
        reason = _no_counterpart(module)
        return [] if reason is None else [Left(name, before, reason)]
    notes = [f"also {', '.join(names[1:])}"] if names[1:] else []
    target: type = nn.Sequential
    extra: dict[str, Any] = {}
    if kind is torch.nn.Sequential:
        runs = nn._fused(module._modules)
        if not runs:
            return []
        notes.append("as one: " + ", ".join(" ".join(run) for run in runs))
    elif kind in _ACTIVATIONS:
        target = nn.Activation
        if (found := nn._activation_of(module)) is not None:
            extra = {"activation": found[0], "negative_slope": found[1]}
    else:
        target = _LAYERS[kind]
        extra = _options(kind)
    reason = _kept_because(module, extra)
    if reason is not None:
        return [Left(name, before, reason)]
    module.__class__ = target
    for option, value in extra.items():
        setattr(module, option, value)
    after = _named(target) + (f"({module.extra_repr()})" if target is nn.Activation else "")
    return [Changed(name, before, after, "; ".join(notes))]


def _is_ours(kind: type) -> bool:
    return any(c.__module__ in (nn.__name__, optim.__name__) for c in kind.__mro__)


def _arguments(kind: type) -> frozenset[str]:
    return frozenset(inspect.signature(kind).parameters)


def _options(kind: type) -> dict[str, Any]:
    """What dlgpu.nn's class has that torch's has not, at its defaults, where it computes what torch's does."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(_LAYERS[kind]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in _arguments(kind)
    }


def _no_counterpart(module: torch.nn.Module) -> str | None:
    """Why a module of another class stays; None for one that only holds others."""
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: call it once first"
    base = next((c for c in _CONVERTED if isinstance(module, c)), None)
    if base is not None:
        return f"it is a subclass of {_named(base)}"
    # A parametrization's own modules belong to what it parametrizes.
    if isinstance(module, torch.nn.Identity) or type(module).__module__.startswith("torch.nn.utils."):
        return None
    holds = isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))
    return "dlgpu.nn has none" if module._parameters or not (module._modules or holds) else None


def _kept_because(module: torch.nn.Module, extra: dict[str, Any]) -> str | None:
    """Why a module of one of torch's classes stays nevertheless."""
    if any(getattr(module, hooks, None) for hooks in _HOOKS):
        return "it has hooks"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    if module._compiled_call_impl is not None:
        return "it is compiled"
    if getattr(module, "qconfig", None) is not None:
        return "it is prepared for quantization"
    if type(module) is torch.nn.GELU and module.approximate not in ("none", "tanh"):
        return f"approximate={module.approximate!r}"
    if type(module) in _ACTIVATIONS and getattr(module, "inplace", False):
        return "inplace=True: others may read what it writes over; fused where it follows a layer in a Sequential"
    taken = [name for name in extra if hasattr(module, name) and name not in _arguments(type(module))]
    if taken:
        return f"it has an attribute {taken[0]!r} of its own"
    hidden = [name for name in ("weight", "bias") if name in module.__dict__]
    if hidden:
        return f"its {hidden[0]} is no parameter"
    for name, t in (*module._parameters.items(), *module._buffers.items()):
        if t is not None and name != "num_batches_tracked" and (why := _untaken(t)):
            return f"its {name} is {why}"
    return None


def _untaken(t: torch.Tensor) -> str | None:
    """What a tensor is that dlgpu does not take."""
    if type(t) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(t).__name__}"
    if t.layout is not torch.strided:
        return str(t.layout)
    if t.device.type not in _DEVICES:
        return f"on {t.device}"
    return None if t.dtype in _checks.FLOATING else str(t.dtype)


def _convert_optimizer(model: torch.nn.Module, optimizer: Any) -> list[Changed | Left]:
    kind = type(optimizer)
    if _is_ours(kind):
        return []
    reason = _optimizer_kept_because(model, optimizer)
    if reason is not None:
        return [Left("optimizer", _named(kind), reason)]
    # A learning-rate scheduler has put torch's step, wrapped to tell that it was called, in the place of the method.
    scheduled = optimizer.__dict__.pop("step", None) is not None
    optimizer.__class__ = _OPTIMIZERS[kind]
    optimizer._set_extras(None, False, None, optimizer.defaults.get("initial_accumulator_value", 0))
    # What groups of an older torch lack; and a class's `step` calls hooks from its first instance on.
    optimizer.__setstate__({})
    if scheduled:
        optimizer.step = _watched_step(optimizer)
    return [Changed("optimizer", _named(kind), _named(type(optimizer)))]


def _optimizer_kept_because(model: torch.nn.Module, optimizer: Any) -> str | None:
    kind = type(optimizer)
    if kind not in _OPTIMIZERS:
        base = next((c for c in _OPTIMIZERS if isinstance(optimizer, c)), None)
        return "dlgpu.optim has none" if base is None else f"it is a subclass of {_named(base)}"
    own = optimizer.__dict__.get("step")
    if own is not None and not hasattr(own, "_wrapped_by_lr_sched"):
        return "its step was replaced"
    groups = optimizer.param_groups
    if optimizer.defaults.get("differentiable") or any(group.get("differentiable") for group in groups):
        return "differentiable=True"
    params = [p for group in groups for p in group["params"]]
    sparse = {id(m.weight) for m in model.modules() if getattr(m, "sparse", False) and hasattr(m, "weight")}
    if any(id(p) in sparse for p in params):
        return "an embedding has sparse gradients"
    return next((f"a parameter is {why}" for p in params if (why := _untaken(p))), None)


def _watched_step(optimizer: Any) -> Any:
    """As torch's schedulers wrap it."""
    reference = weakref.ref(optimizer)
    step = type(optimizer).step

    @functools.wraps(step)
    def watched(*args: Any, **kwargs: Any) -> Any:
        owner: Any = reference()
        owner._opt_called = True
        return step(owner, *args, **kwargs)

    watched._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return watched


def _named(kind: type) -> str:
    """torch.nn.Linear for torch.nn.modules.linear.Linear."""
    package = kind.__module__
    for short, home in (("torch.nn", torch.nn), ("torch.optim", torch.optim)):
        if getattr(home, kind.__name__, None) is kind:
            package = short
    return kind.__qualname__ if package in ("builtins", "__main__") else f"{package}.{kind.__qualname__}"


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
