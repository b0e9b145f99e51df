"""The description of an op, from which timing, byte counting, verification and the reports all work.

A new op is one `Op` in one file of this folder: a function of its inputs for each library that offers it. Passes, torch.compile,
unfused bytes (on meta tensors), the metered bytes of the kernels (in the interpreter) and float64 truth follow from that.
"""

from __future__ import annotations

import dataclasses
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
        "dlgpu" and "eager" (torch's own unfused operations) always; others where they offer the op.
    options: name -> the choices there are, the default first, such as {"activation": ("gelu", "relu", ...)}.
    dtypes: the default first.
    passes: FORWARD, BACKWARD, BOTH; or STEP alone.
    flops: (shape, passes) -> floating-point operations of the products, None where there are none.
    upstream: (inputs, output, make) -> the upstream gradient; None draws a normal one (1 for a scalar).
    jumps: results jump where rounding flips a sign, so they are held to float64's as a whole and not element by element.
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

    def defaults(self) -> dict[str, Any]:
        """The default of each option."""
        return {name: choices[0] for name, choices in self.options.items()}


class Bound:
    """The call without arguments that is timed: it does `passes` of an op on inputs of its own and returns the results.

    The gradients come from torch.autograd.grad: adding into .grad would be a pass of its own. For BACKWARD alone the graph is
    built before, and kept; what is called is its backward.

    inputs: the function's arguments by name.
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
        self._leaves = [x for x in self.tensors() if x.requires_grad]
        self._dy: torch.Tensor | None = None
        self._y: torch.Tensor | None = None
        if passes == FORWARD:
            for leaf in self._leaves:
                leaf.requires_grad_(False)
        elif passes != STEP:
            y = function(**self.inputs)
            self._dy = self._upstream(self.inputs, y, make)
            if passes == BACKWARD:
                self._y = y

    def tensors(self) -> list[torch.Tensor]:
        """Those among the inputs, in lists too."""
        return [x for x in tree_leaves(self.inputs) if isinstance(x, torch.Tensor)]

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
            return torch.autograd.grad(self._y, self._leaves, self._dy, retain_graph=True)
        y = self.function(**self.inputs)
        return (y, *torch.autograd.grad(y, self._leaves, self._dy))

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
        if self._dy is None:
            return
        y = self.function(**self.inputs)
        with torch.no_grad():
            self._dy.copy_(self._upstream(fresh, y, make))
        if self.passes == BACKWARD:
            self._y = y


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
