"""`dlgpu-bench run --module PKG:FUNCTION`: is *your* model faster?

The function is imported and called, so this runs your code. It takes no arguments (or `batch`, if --batch is given) and
returns the model and what a training step feeds it:

    (model, inputs)                  the loss is the output if it is a scalar, else the mean of its squares
    (model, inputs, loss_fn)         the loss is loss_fn(output)
    {"model": ..., "inputs": ...}    and if wanted: "loss_fn"; "targets", given to loss_fn after the output; "optimizer", a
                                     function of the parameters (torch.optim.Adam unless given)

inputs: a tensor, a tuple of positional arguments or a dict of named ones. loss_fn: a module, such as
torch.nn.CrossEntropyLoss(), or a function; one of torch.nn.functional's gives way to dlgpu.functional's of that name. The
model is copied; what you returned stays as it is.

Compared are training steps (gradients to None, forward, loss, backward, optimizer) of the model as it is, compiled by
torch.compile, and with dlgpu's layers, losses and optimizer through `dlgpu.convert`: all of them, the layers and losses alone,
the optimizer alone, which tells what each part gained. Before anything is timed all of them train side by side from equal
state, and their losses must agree.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

import dlgpu

from . import memory
from .environment import Others, UsageError, one_line
from .environment import crowded as crowded_by
from .harness import Stop, interleaved
from .report import timing_row
from .suite import Context, Job
from .tables import verdict
from .timers import sees_waiting, timer_for

__all__ = ["Subject", "agreement", "jobs", "load"]

Row = dict[str, Any]

AS_IS, COMPILED, ALL = "as it is", "compiled", "dlgpu"
LAYERS, OPTIMIZER = "dlgpu's layers", "dlgpu's optimizer"
STEPS = 5
# Of the loss, in roundings of the dtype. Steps magnify what rounding makes of the first: an optimizer such as Adam gives a
# gradient of 1e-12 and one of -1e-12 whole steps in opposite directions. Float16 and bfloat16 round each layer's output.
_ROUNDINGS = {torch.float64: 1e4, torch.float32: 1e3, torch.bfloat16: 8, torch.float16: 32}


@dataclasses.dataclass(frozen=True)
class Subject:
    """What the user's function returned."""

    model: torch.nn.Module
    inputs: Any
    loss_fn: Callable[..., Any] | None = None
    targets: tuple[Any, ...] = ()
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam

    def to(self, device: str, dtype: torch.dtype | None) -> Subject:
        def move(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return x.to(device, dtype if x.is_floating_point() else None)

        loss_fn = self.loss_fn
        if isinstance(loss_fn, torch.nn.Module):
            loss_fn = copy.deepcopy(loss_fn).to(device, dtype)
        return dataclasses.replace(
            self,
            model=copy.deepcopy(self.model).to(device, dtype),
            inputs=tree_map(move, self.inputs),
            targets=tree_map(move, self.targets),
            loss_fn=loss_fn,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the first parameter."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)


def load(spec: str, batch: int | None = None) -> Subject:
    """Imports PKG:FUNCTION, calls it and checks what it returns. Runs the user's code.

    Raises:
        UsageError: there is no such module or function, it fails, or it returns something else.
    """
    where = f"--module {spec}"
    name, _, attribute = spec.partition(":")
    if not name or not attribute:
        raise UsageError(f"{where}: expected PKG:FUNCTION, such as my.models:make_model")
    # Users' modules lie where they call this from; a script's own path does not have it.
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(f"{where}: there is no module {error.name}, here or installed") from None
        raise UsageError(f"{where}: importing {name} needs {error.name}, which is not installed") from None
    except (Exception, SystemExit) as error:
        raise UsageError(f"{where}: importing {name} failed: {one_line(error)}") from None
    finally:
        if here in sys.path:
            sys.path.remove(here)
    try:
        function = module
        for part in attribute.split("."):
            function = getattr(function, part)
    except AttributeError:
        raise UsageError(f"{where}: {name} has no {attribute}") from None
    if not callable(function) or isinstance(function, torch.nn.Module):
        kind = type(function).__name__
        raise UsageError(f"{where}: {attribute} is a {kind}, expected a function that makes a model")
    try:
        made = function() if batch is None else function(batch=batch)
    except (Exception, SystemExit) as error:
        raise UsageError(f"{where}: {attribute}() failed: {one_line(error)}") from None
    return _subject(where, made)


def _subject(where: str, made: Any) -> Subject:
    if isinstance(made, Mapping):
        fields = {field.name for field in dataclasses.fields(Subject)}
        if unknown := sorted(map(str, made.keys() - fields)):
            raise UsageError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(fields))}")
        if missing := sorted({"model", "inputs"} - made.keys()):
            raise UsageError(f"{where}: the returned dict lacks {missing[0]!r}")
        given = dict(made)
    elif isinstance(made, tuple) and len(made) in (2, 3):
        given = dict(zip(("model", "inputs", "loss_fn"), made, strict=False))
    else:
        raise UsageError(
            f"{where}: returned {type(made).__name__}, expected (model, inputs), (model, inputs, loss_fn) or a dict"
        )
    if not isinstance(given["model"], torch.nn.Module):
        kind = type(given["model"]).__name__
        raise UsageError(f"{where}: the model is a {kind}, expected a torch.nn.Module")
    targets = given.get("targets", ())
    given["targets"] = tuple(targets) if isinstance(targets, (tuple, list)) else (targets,)
    for key in ("loss_fn", "optimizer"):
        if given.get(key) is None:
            given.pop(key, None)
        elif not callable(given[key]):
            raise UsageError(f"{where}: {key} is a {type(given[key]).__name__}, expected something to call")
    subject = Subject(**given)
    if not any(p.requires_grad for p in subject.model.parameters()):
        raise UsageError(f"{where}: the model has no parameters to train")
    if subject.targets and subject.loss_fn is None:
        raise UsageError(f"{where}: targets need a loss_fn")
    return subject


class Step:
    """A training step of a subject's own copy of the model: call it; `loss` is the last one's."""

    def __init__(
        self,
        subject: Subject,
        layers: bool = False,
        optimizer: bool = False,
        compiled: bool = False,
        dropout: bool = True,
    ) -> None:
        self.model = copy.deepcopy(subject.model)
        self.loss_fn: Any = copy.deepcopy(subject.loss_fn)
        self.inputs, self.targets = subject.inputs, subject.targets
        if not dropout:
            for module in self.model.modules():
                if isinstance(module, torch.nn.modules.dropout._DropoutNd):
                    module.p = 0.0
        self.conversions: list[dlgpu.Conversion] = []
        if layers:
            self.conversions.append(dlgpu.convert(self.model))
            self.loss_fn = self._converted(self.loss_fn)
        self.optimizer = subject.optimizer(self.model.parameters())
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer(parameters) gave a {type(self.optimizer).__name__}")
        if optimizer:
            # Of a model without layers: the optimizer alone.
            self.conversions.append(dlgpu.convert(torch.nn.Identity(), optimizer=self.optimizer))
        self._forward: Callable[..., Any] = (
            torch.compile(self.model, dynamic=False) if compiled else self.model
        )
        self.loss: torch.Tensor | None = None

    def _converted(self, loss_fn: Any) -> Any:
        if isinstance(loss_fn, torch.nn.Module):
            self.conversions.append(dlgpu.convert(loss_fn))
            return loss_fn
        name = getattr(loss_fn, "__name__", "")
        return getattr(dlgpu.functional, name, loss_fn) if loss_fn is getattr(F, name, self) else loss_fn

    def forward(self) -> torch.Tensor:
        """The loss."""
        given = self.inputs
        if isinstance(given, Mapping):
            output = self._forward(**given)
        else:
            output = self._forward(*(given if isinstance(given, (tuple, list)) else (given,)))
        if self.loss_fn is not None:
            loss = self.loss_fn(output, *self.targets)
        elif isinstance(output, torch.Tensor):
            loss = output if not output.dim() else output.float().square().mean()
        else:
            raise TypeError(
                f"the model gives a {type(output).__name__}, of which only a loss_fn can make a loss"
            )
        if not isinstance(loss, torch.Tensor) or loss.dim():
            raise TypeError("the loss is no scalar tensor")
        return loss

    def __call__(self) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = self.forward()
        self.loss.backward()
        self.optimizer.step()
        return self.loss


def losses(step: Step, count: int, seed: int) -> list[float]:
    """Of so many steps, each with random numbers of its own, the same for everybody."""
    found = []
    for number in range(count):
        torch.manual_seed(seed + number)
        found.append(float(step().detach()))
    return found


def agreement(own: Sequence[float], others: Sequence[float], dtype: torch.dtype) -> str:
    """Where the losses of two that train side by side are further apart than rounding explains, or ""."""
    for number, (a, b) in enumerate(zip(own, others, strict=True)):
        allowed = _ROUNDINGS.get(dtype, 1e3) * torch.finfo(dtype).eps * max(abs(a), 1e-3)
        # `not <=`, so that NaN differs; two that are both NaN or infinite train alike.
        if not abs(a - b) <= allowed and not (a == b or (a != a and b != b)):
            return f"step {number + 1}: loss {b:.7g}, the model as it is has {a:.7g}, allowed is a difference of {allowed:.2g}"
    return ""


def jobs(
    spec: str,
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (),
    seed: int = 0,
    steps: int = STEPS,
    batch: int | None = None,
    compiled: bool = True,
) -> list[Job]:
    """The comparison, for each dtype (the model's own unless some are named).

    Raises:
        UsageError: see `load`; or the first step fails.
    """
    # The model's random weights.
    torch.manual_seed(seed)
    subject = load(spec, batch)
    found = []
    for dtype in dtypes or (None,):
        try:
            moved = subject.to(device, dtype)
            Step(moved)()
        except (Exception, SystemExit) as error:
            raise UsageError(f"--module {spec}: a training step as it is failed: {one_line(error)}") from None
        comparison = _Comparison(spec, moved, device, seed, steps, compiled)
        # Not the user's names: titles go into the file.
        found.append(Job("module", "a training step", comparison, weight=1, fixed_s=30))
    return found


@dataclasses.dataclass(frozen=True)
class _Case:
    """What a timing row tells of a module: nothing by name, for that is the user's."""

    dtype_name: str
    shape: Mapping[str, int]
    op: str = "module"
    passes: str = "step"
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """All variants of one subject: made, held to each other, timed."""

    spec: str
    subject: Subject
    device: str
    seed: int
    steps: int
    compiled: bool

    def variants(self) -> dict[str, Callable[..., Step]]:
        found: dict[str, Callable[..., Step]] = {
            ALL: lambda dropout=True: Step(self.subject, True, True, dropout=dropout),
            AS_IS: lambda dropout=True: Step(self.subject, dropout=dropout),
            LAYERS: lambda dropout=True: Step(self.subject, layers=True, dropout=dropout),
            OPTIMIZER: lambda dropout=True: Step(self.subject, optimizer=True, dropout=dropout),
        }
        if self.compiled:
            found[COMPILED] = lambda dropout=True: Step(self.subject, compiled=True, dropout=dropout)
        return found

    def __call__(self, context: Context, share: float) -> Iterator[Row]:
        context.console.line(f"Running the code of {self.spec}, training {self.steps} steps side by side")
        able = self.variants()
        yield from self._verified(context, able)
        if AS_IS not in able:
            return
        for conversion in able[ALL]().conversions if ALL in able else ():
            context.console.line(str(conversion))
        calls = {name: make() for name, make in able.items()}
        names = list(calls)
        wanted = [(ALL, AS_IS), (ALL, COMPILED), (LAYERS, AS_IS), (OPTIMIZER, AS_IS), (COMPILED, AS_IS)]
        pairs = [pair for pair in wanted if set(pair) <= set(names)]
        if not pairs:
            return
        # On a GPU too by the host's clock: what a step takes is what the user waits for.
        timer, timer_name, cache = timer_for(self.device, "host", "hot" if self.device == "cuda" else "")
        others = Others()
        results = interleaved(
            list(calls.values()),
            stop=Stop(budget_s=share),
            timer=timer,
            seed=self.seed,
            progress=lambda number, part: context.progress(part),
            pairs=[(names.index(a), names.index(b)) for a, b in pairs],
        )
        crowd = others.cores()
        costs = {name: self._costs(step) for name, step in calls.items()}
        rows = []
        for (a, b), result in zip(pairs, results, strict=True):
            about: dict[str, Any] = {
                f"{key}_{side}_bytes": costs[name][key]
                for side, name in (("a", a), ("b", b))
                for key in ("peak_memory", "saved")
            }
            about |= {"timer": timer_name, "cache": cache}
            about["crowded"] = result.crowded if sees_waiting() else crowded_by(crowd)
            rows.append(timing_row("module", self._case(), a, b, self.device, result, crowd, **about))
        yield from rows
        for line in summary(rows):
            context.console.line(line)

    def _case(self) -> _Case:
        parameters = sum(p.numel() for p in self.subject.model.parameters())
        return _Case(str(self.subject.dtype).removeprefix("torch."), {"parameters": parameters})

    def _costs(self, step: Step) -> dict[str, int | None]:
        fed = (x for x in tree_leaves((step.inputs, step.targets)) if isinstance(x, torch.Tensor))
        there = itertools.chain(step.model.parameters(), step.model.buffers(), fed)
        return {
            "peak_memory": memory.peak_bytes(step, self.device),
            "saved": memory.saved_bytes(step.forward, there),
        }

    def _verified(self, context: Context, able: dict[str, Callable[..., Step]]) -> Iterator[Row]:
        """Trains the variants side by side, without dropout, whose numbers are everybody's own; those that do not run or do
        not agree leave `able`."""
        own = losses(able[AS_IS](dropout=False), self.steps, self.seed)
        again = losses(able[AS_IS](dropout=False), self.steps, self.seed + 1000)
        random = agreement(own, again, self.subject.dtype)
        if random:
            yield self._row(
                "skipped", reason="losses not compared: the model draws random numbers of its own"
            )
        for name in [name for name in able if name != AS_IS]:
            try:
                found = losses(able[name](dropout=False), self.steps, self.seed)
            except Exception as error:
                del able[name]
                yield self._row("absent", provider=name, reason=f"does not run here: {one_line(error)}"[:300])
                continue
            if not random and (difference := agreement(own, found, self.subject.dtype)):
                del able[name]
                yield self._row("wrong", provider=name, detail=difference)
        if not random:
            shown = ", ".join(f"{loss:.6g}" for loss in own)
            context.console.line(f"Losses of {self.steps} steps, the same for all to rounding: {shown}")

    def _row(self, kind: str, **about: Any) -> Row:
        return {"section": "module", "kind": kind, "title": "a training step", **about}


def summary(rows: Sequence[Row]) -> list[str]:
    """Which parts gained, in lines."""
    says = {
        (ALL, AS_IS): "dlgpu, all of it, against the model as it is",
        (ALL, COMPILED): "dlgpu, all of it, against torch.compile",
        (LAYERS, AS_IS): "dlgpu's layers and losses alone, against the model as it is",
        (OPTIMIZER, AS_IS): "dlgpu's optimizer alone, against the model as it is",
    }
    found = ["Speed, above 1 is faster:"]
    for row in rows:
        if (row["a"], row["b"]) in says:
            times = f"{1 / row['ratio']:.2f}x ({1 / row['high']:.2f} to {1 / row['low']:.2f})"
            found.append(f"  {times:<22}  {verdict(row):<9}  {says[row['a'], row['b']]}")
    return found
