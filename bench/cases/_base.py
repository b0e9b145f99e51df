"""The description of an op, from which timing, byte counting, verification and the reports all work.

A new op is one `Op` in one file of this folder: a function of its inputs for each library that offers it. Passes,
torch.compile, unfused bytes (on meta tensors), the metered bytes of the kernels (in the interpreter) and float64 truth follow
from that.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

__all__ = ["BACKWARD", "BOTH", "FORWARD", "STEP", "Bound", "Inputs", "Make", "Op", "Shape", "bind"]

FORWARD, BACKWARD, BOTH, STEP = "fwd", "bwd", "fwd+bwd", "step"

Shape = Mapping[str, int]
# An op's tensors by name, and what else its function takes.
Inputs = dict[str, Any]
Outputs = Sequence[torch.Tensor]


class Kept(dict[str, Any]):
    """Where a function keeps, among its inputs, what it makes at the first step and needs at the next: an optimizer. No input
    itself: torch's pytrees, which know the tensors of a plain dict, see nothing in it."""


class NotOffered(Exception):
    """A library does not do this; the message says what it does."""


@dataclasses.dataclass(frozen=True)
class Make:
    """How inputs are made: equal seeds give equal values on one device, rounded to `dtype` first where `wide` is wider.

    device: "meta" makes tensors without memory, for counting bytes.
    """

    device: str
    dtype: torch.dtype
    seed: int = 0
    wide: torch.dtype | None = None

    def __post_init__(self) -> None:
        # The device itself draws: a billion logits take minutes on the host.
        generator = None if self.device == "meta" else torch.Generator(self.device).manual_seed(self.seed)
        object.__setattr__(self, "_generator", generator)

    def normal(self, *shape: int, scale: float = 1.0, grad: bool = True) -> torch.Tensor:
        """Random normal; `grad`: the op is differentiated by it."""
        generator: torch.Generator | None = self._generator  # type: ignore[attr-defined]
        values = torch.randn(*shape, generator=generator, device=self.device, dtype=torch.float32).mul_(scale)
        return values.to(self.dtype).to(self.wide or self.dtype).requires_grad_(grad)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Uniform on [0, 1), not differentiated by."""
        generator: torch.Generator | None = self._generator  # type: ignore[attr-defined]
        values = torch.rand(*shape, generator=generator, device=self.device, dtype=torch.float32)
        return values.to(self.dtype).to(self.wide or self.dtype)

    def classes(self, rows: int, classes: int) -> torch.Tensor:
        """Class indices [rows], int64."""
        generator: torch.Generator | None = self._generator  # type: ignore[attr-defined]
        return torch.randint(0, classes, (rows,), generator=generator, device=self.device)


@dataclasses.dataclass(frozen=True)
class Op:
    """One op.

    name: as in dlgpu.functional, or an optimizer's in small letters.
    source: the file of its kernels.
    equation: in one line.
    shapes: named sizes, each a mapping with the same keys; the first is the default.
    inputs: (shape, how to make tensors, options) -> the arguments of the functions below, by name. Tensors that require a
        gradient are the ones that backward is timed for.
    functions: library -> function of those arguments giving one tensor (or, for an optimizer, the stepped tensors):
        "dlgpu" and "eager" (torch's own unfused operations) always; others where they offer the op. A library of
        `providers.BOUNDS` computes less than the op, such as its products alone.
    options: name -> the choices there are, the default first, such as {"activation": ("gelu", "relu", ...)}.
    dtypes: the default first.
    passes: FORWARD, BACKWARD, BOTH; or STEP alone.
    flops: (shape, passes) -> floating-point operations of the products, None where there are none.
    upstream: (inputs, output, make) -> the upstream gradient; None draws a normal one (1 for a scalar).
    jumps: results jump where rounding flips a sign, so they are held to float64's as a whole and not element by element.
    refuses: library -> (options, passes) -> why the library does not offer that, or None.
    calls: how many calls come before the results are compared: more than one for what has a state.
    verify: (what was bound, its results, passes, options) -> what is wrong with them, or None, for results that no other
        library's can be compared with.
    overwrites: library -> the inputs that it is known to change, and torch is not.
    """

    name: str
    source: str
    equation: str
    shapes: Mapping[str, Shape]
    inputs: Callable[[Shape, Make, Mapping[str, Any]], Inputs]
    functions: Mapping[str, Callable[..., Any]]
    options: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    passes: tuple[str, ...] = (FORWARD, BACKWARD, BOTH)
    flops: Callable[[Shape, str], int] | None = None
    upstream: Callable[[Inputs, torch.Tensor, Make], torch.Tensor] | None = None
    jumps: bool = False
    refuses: Mapping[str, Callable[[Mapping[str, Any], str], str | None]] = dataclasses.field(
        default_factory=dict
    )
    calls: int = 1
    verify: Callable[[Bound, Outputs, str, Mapping[str, Any]], str | None] | None = None
    overwrites: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def defaults(self) -> dict[str, Any]:
        """The default of each option."""
        return {name: choices[0] for name, choices in self.options.items()}


class Bound:
    """The call without arguments that is timed: it does `passes` of an op on inputs of its own and returns the results.

    The gradients come from torch.autograd.grad: adding into .grad would be a pass of its own. For BACKWARD alone the graph is
    built before, and kept; what is called is its backward.

    inputs: the function's arguments by name.
    upstream: the gradient that backward begins with, where there is one.
    """

    def __init__(
        self,
        op: Op,
        function: Callable[..., Any],
        shape: Shape,
        passes: str,
        make: Make,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.op, self.function, self.shape, self.passes = op, function, shape, passes
        self.options = {**op.defaults(), **(options or {})}
        self.make = make
        self.inputs = op.inputs(shape, make, self.options)
        self._leaves = leaves(self.inputs)
        self.upstream: torch.Tensor | None = None
        self._y: torch.Tensor | None = None
        if passes == FORWARD:
            for leaf in self._leaves:
                leaf.requires_grad_(False)
        elif passes != STEP:
            y = function(**self.inputs)
            self.upstream = self._upstream(self.inputs, y, make)
            if passes == BACKWARD:
                self._y = y

    @property
    def call(self) -> Callable[[], Outputs]:
        """This itself, by the name of what it is for."""
        return self

    def tensors(self) -> list[torch.Tensor]:
        """Those among the inputs, in lists too."""
        return [x for x in tree_leaves(self.inputs) if isinstance(x, torch.Tensor)]

    def overwritten(self) -> list[bool]:
        """Of each of the tensors, whether this library is known to change it."""
        names = {
            name
            for library, overwritten in self.op.overwrites.items()
            if self.op.functions[library] is self.function
            for name in overwritten
        }
        return [
            name in names
            for name, value in self.inputs.items()
            for x in tree_leaves(value)
            if isinstance(x, torch.Tensor)
        ]

    def _upstream(self, inputs: Inputs, y: torch.Tensor, make: Make) -> torch.Tensor:
        if self.op.upstream is not None:
            return self.op.upstream(inputs, y, make)
        return make.normal(*y.shape, grad=False).to(y.dtype) if y.dim() else torch.ones_like(y)

    def __call__(self) -> Outputs:
        if self.passes == STEP:
            stepped: Outputs = self.function(**self.inputs)
            return stepped
        if self.passes == FORWARD:
            return (self.function(**self.inputs),)
        if self._y is not None:
            return torch.autograd.grad(self._y, self._leaves, self.upstream, retain_graph=True)
        y = self.function(**self.inputs)
        return (y, *torch.autograd.grad(y, self._leaves, self.upstream))

    def refresh(self, seed: int) -> None:
        """Writes the inputs of another seed into the very same memory, so that what is returned next must be new.

        Raises:
            ValueError: an optimizer's step, whose result depends on all steps before it: bind anew instead.
        """
        if self.passes == STEP:
            raise ValueError("a step's result depends on the steps before it")
        make = dataclasses.replace(self.make, seed=seed)
        fresh = self.op.inputs(self.shape, make, self.options)
        with torch.no_grad():
            for x, new in zip(tree_leaves(self.inputs), tree_leaves(fresh), strict=True):
                if isinstance(x, torch.Tensor):
                    x.copy_(new)
        if self.upstream is None:
            return
        y = self.function(**self.inputs)
        with torch.no_grad():
            self.upstream.copy_(self._upstream(fresh, y, make))
        if self.passes == BACKWARD:
            self._y = y


def leaves(inputs: Inputs) -> list[torch.Tensor]:
    """The tensors that require a gradient, those in lists too."""
    return [x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]


def bind(
    op: Op,
    function: Callable[..., Any],
    shape: Shape,
    passes: str,
    make: Make,
    options: Mapping[str, Any] | None = None,
) -> Bound:
    """`Bound`, by the name of what it is for."""
    return Bound(op, function, shape, passes, make, options)


@functools.cache
def _resolve(path: str) -> Any:
    module, _, attribute = path.partition(":")
    found = importlib.import_module(module)
    for name in attribute.split("."):
        found = getattr(found, name)
    return found


def late(path: str) -> Callable[..., Any]:
    """The function at "module:attribute", imported when it is first called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return _resolve(path)(*args, **kwargs)

    return call


def only(
    option: str, *choices: Any, passes: Sequence[str] = ()
) -> Callable[[Mapping[str, Any], str], str | None]:
    """For `Op.refuses`: offers these choices of an option, and these passes if any are named."""

    def refuses(options: Mapping[str, Any], wanted: str) -> str | None:
        if passes and wanted not in passes:
            return f"offers {', '.join(passes)} only"
        if option and options[option] not in choices:
            return f"offers {option} {', '.join(map(str, choices))} only"
        return None

    return refuses


def products(passes: str, *sizes: tuple[int, int, int]) -> int:
    """Floating-point operations of the M x N x K products of layers: backward takes two for each."""
    return sum(2 * M * N * K for M, N, K in sizes) * {FORWARD: 1, BACKWARD: 2}.get(passes, 3)
