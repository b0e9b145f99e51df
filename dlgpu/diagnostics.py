"""Diagnosis of training: do gradients vanish or explode, which ReLUs are dead, what kind of critical point is this, and which
of the four troubles do the losses show.

What these functions find they return as small dataclasses that print readably. They read numbers back from the device, so
they wait for it: they are for looking, not for the training loop's every step.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

__all__ = [
    "CriticalPoint",
    "DeadReLUReport",
    "FitReport",
    "GradientReport",
    "LayerGradient",
    "critical_point",
    "dead_relu_share",
    "fit_report",
    "gradient_norms",
]


@dataclasses.dataclass(frozen=True)
class LayerGradient:
    """The gradient of one layer: a module with parameters of its own."""

    name: str
    norm: float
    # norm / sqrt(number of elements): what layers of different sizes are compared by.
    rms: float


@dataclasses.dataclass(frozen=True)
class GradientReport:
    """The answer of `gradient_norms`; verdict is "healthy", "vanishing" or "exploding"."""

    verdict: str
    reason: str
    total_norm: float
    layers: tuple[LayerGradient, ...]

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"gradients: {self.verdict} ({self.reason}); norm over all layers {self.total_norm:.3g}"]
        lines += [
            f"  {layer.name:<{width}}  norm {layer.norm:.3g}, RMS {layer.rms:.3g}" for layer in self.layers
        ]
        return "\n".join(lines)


def gradient_norms(model: torch.nn.Module, *, ratio: float = 1e-3) -> GradientReport:
    """norm_l = sqrt(sum of g^2 over the parameters of layer l), of the gradients that the last backward left in `.grad`.

    Args:
        model: its layers are the modules with parameters of their own, in order of registration; those without gradients
            are left out.
        ratio: gradients vanish when the first layer's RMS gradient is below `ratio` times the last layer's, or all are
            zero; they explode when it is above 1 / ratio times that, or any is not finite.

    Returns:
        A GradientReport. The RMS, not the norm, is compared: a norm grows with the number of a layer's parameters.

    Raises:
        ValueError: no parameter has a gradient; `ratio` is not between 0 and 1.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010, who compare
    the layers' gradients; the threshold is this library's.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False))
    >>> model[0].weight.grad, model[1].weight.grad = torch.tensor([[3e-6]]), torch.tensor([[4.0]])
    >>> print(gradient_norms(model))
    gradients: vanishing (the RMS in 0 is 7.5e-07 times that in 1); norm over all layers 4
      0  norm 3e-06, RMS 3e-06
      1  norm 4, RMS 4
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio: got {ratio}, expected a number between 0 and 1")
    layers = []
    # Sums of squares, of a parameter that several layers share once. float64, so that no tiny square becomes zero.
    squares = {
        p: float(p.grad.detach().double().square().sum()) for p in model.parameters() if p.grad is not None
    }
    for name, module in model.named_modules():
        params = [p for p in module.parameters(recurse=False) if p in squares]
        if params:
            norm = math.sqrt(sum(squares[p] for p in params))
            count = sum(p.numel() for p in params)
            layers.append(LayerGradient(name or "(model)", norm, norm / math.sqrt(max(count, 1))))
    if not layers:
        raise ValueError("model: no parameter has a gradient; call backward first")
    total = math.sqrt(sum(squares.values()))
    verdict, reason = _judge_gradients(layers, ratio)
    return GradientReport(verdict, reason, total, tuple(layers))


def _judge_gradients(layers: Sequence[LayerGradient], ratio: float) -> tuple[str, str]:
    bad = [layer.name for layer in layers if not math.isfinite(layer.norm)]
    if bad:
        return "exploding", f"not finite in {', '.join(bad)}"
    if all(layer.norm == 0 for layer in layers):
        return "vanishing", "all are zero"
    first, last = layers[0], layers[-1]
    found = first.rms / last.rms if last.rms else math.inf
    reason = f"the RMS in {first.name} is {found:.2g} times that in {last.name}"
    if found < ratio:
        return "vanishing", reason
    return ("exploding" if found > 1 / ratio else "healthy"), reason


@dataclasses.dataclass(frozen=True)
class DeadReLUReport:
    """The answer of `dead_relu_share`."""

    share: float
    # Layer's name -> (dead units, all units).
    layers: dict[str, tuple[int, int]]

    def __str__(self) -> str:
        width = max(len(name) for name in self.layers)
        lines = [f"dead ReLU units: {self.share:.1%}"]
        lines += [f"  {name:<{width}}  {dead} of {units}" for name, (dead, units) in self.layers.items()]
        return "\n".join(lines)


def dead_relu_share(
    model: torch.nn.Module, data: torch.Tensor | Iterable[torch.Tensor | Sequence[torch.Tensor]]
) -> DeadReLUReport:
    """share = units whose ReLU gives 0 on every row of `data` / all ReLU units: such a unit has no gradient and stays so.

    Args:
        model: ReLU units are looked for in torch.nn.ReLU and in layers whose `activation` is "relu"; a unit is an index
            of the last axis (of axis 1 for batch norm), in each of a module's calls. Run in evaluation mode and without
            gradients; its mode is restored.
        data: a batch of inputs, or an iterable of batches; of a batch that is a tuple or a list, the first element.

    Returns:
        A DeadReLUReport.

    Raises:
        ValueError: no ReLU was run, or there are no rows.

    Source: Maas, Hannun and Ng, "Rectifier nonlinearities improve neural network acoustic models", 2013.

    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU())
    >>> model[0].load_state_dict({"weight": torch.tensor([[1.0], [-1.0]]), "bias": torch.tensor([0.0, -9.0])})
    <All keys matched successfully>
    >>> print(dead_relu_share(model, torch.tensor([[-2.0], [5.0]])))
    dead ReLU units: 50.0%
      1  1 of 2
    """
    alive: dict[str, torch.Tensor] = {}
    calls: collections.Counter[str] = collections.Counter()
    rows = 0

    def watch(name: str, axis: int) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            nonlocal rows
            # NaN counts as alive: it is no dead unit that made it.
            fires = torch.atleast_2d(output != 0).movedim(axis, -1).flatten(end_dim=-2)
            rows += len(fires)
            # One ReLU may follow several layers, whose units are not the same.
            calls[name] += 1
            key = name if calls[name] == 1 else f"{name}, call {calls[name]}"
            alive[key] = alive[key] | fires.any(0) if key in alive else fires.any(0)

        return hook

    batches = [data] if isinstance(data, torch.Tensor) else data
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            # Of a module with layers inside, as ReGLU, `activation` is not what comes last.
            leaf = not any(True for _ in module.children())
            if isinstance(module, torch.nn.ReLU) or (leaf and getattr(module, "activation", None) == "relu"):
                axis = 1 if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) else -1
                stack.callback(module.register_forward_hook(watch(name or "(model)", axis)).remove)
        stack.enter_context(_evaluation(model))
        for batch in batches:
            calls.clear()
            model(batch if isinstance(batch, torch.Tensor) else batch[0])
    if not rows:
        raise ValueError("no ReLU was run: the model has none, or data has no rows")
    layers = {name: (int((~units).sum()), units.numel()) for name, units in alive.items()}
    dead, units = (sum(column) for column in zip(*layers.values(), strict=True))
    return DeadReLUReport(dead / units, layers)


@contextlib.contextmanager
def _evaluation(model: torch.nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclasses.dataclass(frozen=True)
class CriticalPoint:
    """The answer of `critical_point`; kind is "minimum", "saddle", "maximum" or "undecided"."""

    kind: str
    reason: str
    loss: float
    gradient_norm: float
    # The extreme eigenvalues of the Hessian.
    smallest: float
    largest: float
    # Positive eigenvalues / all eigenvalues; None where only the extreme ones were computed.
    minimum_ratio: float | None
    # All eigenvalues in ascending order, or None.
    eigenvalues: np.ndarray | None = dataclasses.field(repr=False)
    # Parameter's name -> its part of the unit eigenvector of the smallest eigenvalue, where that is negative.
    escape_direction: dict[str, torch.Tensor] | None = dataclasses.field(repr=False)

    def __str__(self) -> str:
        ratio = "not computed" if self.minimum_ratio is None else f"{self.minimum_ratio:.3g}"
        return (
            f"critical point: {self.kind} ({self.reason})\n"
            f"  loss {self.loss:.4g}, gradient norm {self.gradient_norm:.3g}\n"
            f"  Hessian eigenvalues from {self.smallest:.3g} to {self.largest:.3g}, minimum ratio {ratio}"
        )


def critical_point(
    model: torch.nn.Module,
    loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    data: tuple[torch.Tensor, torch.Tensor],
    *,
    gradient_tolerance: float = 1e-3,
    full_spectrum: int = 512,
) -> CriticalPoint:
    """L(theta + d) = L + g d + d H d / 2: where g is small, the signs of H's eigenvalues say what kind of point theta is.

    All positive: a minimum. Of both signs: a saddle, which the eigenvector u of a negative one leaves downhill, since
    u H u = lambda < 0. All negative: a maximum. An extreme one that is zero: the second derivative does not decide. Products
    H v come from a double backward through the model's own ops, v by v, so H itself is never stored beyond `full_spectrum`.

    Minimum ratio = number of positive eigenvalues / number of eigenvalues: 1 at a minimum, 0 at a maximum. Eigenvalues below
    the threshold for zero do not count as positive.

    Args:
        model: theta are its parameters that require a gradient. Run in evaluation mode, so that the loss is a function (no
            dropout); its mode is restored. Its parameters and their gradients are left alone.
        loss_fn: loss_fn(model(inputs), targets), a scalar, twice differentiable.
        data: (inputs, targets), all rows that the loss is of, in one batch.
        gradient_tolerance: a larger gradient norm makes the point undecided: it is no critical point.
        full_spectrum: for at most so many parameters all eigenvalues are computed, from as many products, and the minimum
            ratio is exact. For more, the two extreme ones come from scipy's Lanczos iteration, and the ratio is None.

    Returns:
        A CriticalPoint. An eigenvalue counts as zero if it is at most sqrt(eps) times the largest in magnitude, eps of the
        parameters' dtype: use float64 for a sharp answer. `escape_direction` points so that the loss falls to first order
        too.

    Raises:
        ImportError: more than `full_spectrum` parameters, and scipy is not installed.
        ValueError: no parameter requires a gradient; the loss is not a scalar, not finite or does not depend on the
            parameters.

    Source: the minimum ratio is that of Hung-yi Lee, "Machine Learning" (2021), lecture "When gradient is small"; its use on
    loss surfaces follows Dauphin et al., arXiv:1406.2572. Products H v: Pearlmutter, 1994.

    >>> class Bowl(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.x = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    ...     def forward(self, scale):
    ...         return scale * self.x**2
    >>> scale = torch.tensor([1.0, -1.0], dtype=torch.float64)
    >>> print(critical_point(Bowl(), lambda output, target: output.sum(), (scale, None)))
    critical point: saddle (eigenvalues of both signs)
      loss 0, gradient norm 0
      Hessian eigenvalues from -2 to 2, minimum ratio 0.5
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not any(p.numel() for _, p in named):
        raise ValueError("model: no parameter requires a gradient")
    with _evaluation(model), torch.enable_grad():
        loss = loss_fn(model(data[0]), data[1])
    scalar = isinstance(loss, torch.Tensor) and not loss.dim()
    if not scalar or not math.isfinite(loss.item()) or not loss.requires_grad:
        raise ValueError(
            f"loss_fn: got {loss}, expected a scalar that is finite and depends on the parameters"
        )
    hessian = _Hessian(loss, [p for _, p in named])
    if hessian.size <= max(full_spectrum, 2):
        matrix = np.stack([hessian @ row for row in np.eye(hessian.size)])
        eigenvalues, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        extremes, lowest = (float(eigenvalues[0]), float(eigenvalues[-1])), vectors[:, 0]
    else:
        eigenvalues = None
        extremes, lowest = _lanczos(hessian)
    smallest, largest = extremes
    zero = math.sqrt(max(torch.finfo(p.dtype).eps for _, p in named)) * max(abs(smallest), abs(largest))
    norm = float(np.linalg.norm(hessian.gradient))
    kind, reason = _judge_curvature(smallest, largest, zero, norm, gradient_tolerance)
    ratio = None if eigenvalues is None else float((eigenvalues > zero).mean())
    direction = None
    if smallest < -zero:
        downhill = -lowest if lowest @ hessian.gradient > 0 else lowest
        direction = dict(zip((name for name, _ in named), hessian.split(downhill), strict=True))
    return CriticalPoint(kind, reason, loss.item(), norm, smallest, largest, ratio, eigenvalues, direction)


class _Hessian:
    """Products of a loss's Hessian with vectors of all its parameters, float64 arrays of [size]."""

    def __init__(self, loss: torch.Tensor, params: Sequence[torch.Tensor]) -> None:
        self._params = params
        self._grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
        self.size = sum(p.numel() for p in params)
        self.gradient = self._flat(self._grads)

    def __matmul__(self, vector: np.ndarray) -> np.ndarray:
        # A gradient that does not depend on the parameters has no graph, and no curvature.
        pairs = [(g, v) for g, v in zip(self._grads, self.split(vector), strict=True) if g.requires_grad]
        if not pairs:
            return np.zeros(self.size)
        grads, vectors = zip(*pairs, strict=True)
        return self._flat(
            torch.autograd.grad(grads, self._params, vectors, retain_graph=True, materialize_grads=True)
        )

    def split(self, vector: np.ndarray) -> list[torch.Tensor]:
        """The parts of a vector, like the parameters."""
        flat = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64))
        parts = flat.split([p.numel() for p in self._params])
        return [part.to(p).view(p.shape) for part, p in zip(parts, self._params, strict=True)]

    @staticmethod
    def _flat(tensors: Sequence[torch.Tensor]) -> np.ndarray:
        return torch.cat([t.detach().reshape(-1).double().cpu() for t in tensors]).numpy()


def _lanczos(hessian: _Hessian) -> tuple[tuple[float, float], np.ndarray]:
    """((smallest, largest) eigenvalue, eigenvector of the smallest)."""
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise ImportError(
            f"critical_point of {hessian.size} parameters needs scipy (the extra `diagnostics`), or "
            f"full_spectrum={hessian.size}"
        ) from error
    # A start of our own: ARPACK draws one, which would make two calls differ.
    start = np.random.default_rng(0).standard_normal(hessian.size)
    if not (hessian @ start).any():
        return (0.0, 0.0), start / np.linalg.norm(start)
    operator = LinearOperator((hessian.size,) * 2, matvec=hessian.__matmul__, dtype=np.float64)
    # Both ends of the spectrum from one Krylov space.
    values, vectors = eigsh(operator, k=2, which="BE", v0=start, tol=1e-6, maxiter=50 * hessian.size)
    order = np.argsort(values)
    return (float(values[order[0]]), float(values[order[-1]])), vectors[:, order[0]]


def _judge_curvature(
    smallest: float, largest: float, zero: float, norm: float, gradient_tolerance: float
) -> tuple[str, str]:
    if not norm <= gradient_tolerance:
        return "undecided", f"not a critical point: the gradient norm is above {gradient_tolerance:.3g}"
    if smallest < -zero and largest > zero:
        return "saddle", "eigenvalues of both signs"
    if smallest > zero:
        return "minimum", "all eigenvalues are positive"
    if largest < -zero:
        return "maximum", "all eigenvalues are negative"
    return "undecided", f"an extreme eigenvalue is zero, within {zero:.1g}"


@dataclasses.dataclass(frozen=True)
class FitReport:
    """The answer of `fit_report`."""

    verdict: str
    evidence: tuple[str, ...]
    advice: str

    def __str__(self) -> str:
        return "\n".join(
            [f"fit: {self.verdict}", *(f"  - {line}" for line in self.evidence), f"  try: {self.advice}"]
        )


_ADVICE = {
    "model bias": "a more flexible model, or more features",
    "optimization": "another optimizer, learning rate or initialization, normalization, a longer run",
    "model bias or optimization": "a smaller and a larger model on the same data: give their training losses too",
    "overfitting": "more data, augmentation, dropout, weight decay, early stopping or a smaller model",
    "mismatch": "training data like the validation data",
    "overfitting or mismatch": "the loss on held-out rows of the training data's own kind: give it as holdout_loss",
    "good fit": "nothing; test once, on data that chose nothing",
    "training loss low": "validation: give val_loss",
}
_CURVES = ("train_loss", "val_loss", "holdout_loss", "smaller_train_loss", "larger_train_loss")


def fit_report(history: Mapping[str, Any], *, margin: float = 0.1) -> FitReport:
    """Training loss high: model bias or optimization. Training loss low and validation loss high: overfitting or mismatch.

    The final loss of a curve is the mean of its last twentieth, of one value at least. High is above `target_loss`; a
    validation loss has to be more than `margin` above the training loss as well. Then

        training loss high    optimization if it is not finite, or a smaller model gets below it by more than `margin`: a
                              larger one could do that too. Model bias if a larger model gets so far below it, or, with no
                              larger one given, a smaller one does not. Else either.
        validation loss high  mismatch if held-out rows of the training data's own kind have a low loss; overfitting if
                              theirs is high too, or the validation loss was low earlier. Else either.

    Args:
        history: of these, all but the first optional; numbers may stand for curves after the first two:
            train_loss          a loss an epoch
            val_loss            a loss an epoch, of the data that counts
            holdout_loss        of held-out rows drawn like the training data
            smaller_train_loss  training loss of a smaller model (or simpler one) on the same data
            larger_train_loss   and of a larger one
            target_loss         the loss that counts as low; a tenth of the first finite training loss if not given
        margin: what counts as a difference, relative.

    Returns:
        A FitReport. verdict: "model bias", "optimization", "model bias or optimization", "overfitting", "mismatch",
        "overfitting or mismatch", "good fit", or "training loss low" if there is no val_loss.

    Raises:
        ValueError: an unknown key, no train_loss, an empty curve, or no target_loss and a negative training loss at first.

    Source: Hung-yi Lee, "Machine Learning" (2021), lecture "General guide"; the thresholds are this library's.

    >>> print(fit_report({"train_loss": [2.0, 0.1, 0.01], "val_loss": [2.0, 0.15, 0.9], "target_loss": 0.2}))
    fit: overfitting
      - training loss 0.01, low: at most 0.2
      - validation loss 0.9, high: above 0.2 and more than 10% above training
      - validation loss was low before: 0.15 in epoch 2 of 3
      try: more data, augmentation, dropout, weight decay, early stopping or a smaller model
    """
    unknown = set(history) - {*_CURVES, "target_loss"}
    if unknown or "train_loss" not in history:
        raise ValueError(
            f"history: got {', '.join(map(str, history))}; expected train_loss, and of "
            f"{', '.join((*_CURVES[1:], 'target_loss'))} what there is"
        )
    curves = {name: _curve(name, history[name]) for name in _CURVES if name in history}
    final = {name: float(curve[-max(1, len(curve) // 20) :].mean()) for name, curve in curves.items()}
    given = "target_loss" in history
    target = float(history["target_loss"]) if given else 0.1 * _first(curves["train_loss"])
    what = f"{target:.3g}" + ("" if given else ", a tenth of the first")
    train = final["train_loss"]
    if not train <= target:
        evidence = [f"training loss {train:.3g}, high: above {what}"]
        verdict = _judge_training(curves["train_loss"], final, margin, evidence)
    else:
        evidence = [f"training loss {train:.3g}, low: at most {what}"]
        verdict = _judge_validation(curves, final, target, margin, evidence)
    return FitReport(verdict, tuple(evidence), _ADVICE[verdict])


def _first(curve: np.ndarray) -> float:
    """The first loss that is a number, NaN if none is."""
    finite = curve[np.isfinite(curve)]
    first = float(finite[0]) if finite.size else math.nan
    if first < 0:
        raise ValueError(f"history: train_loss begins at {first:.3g}, negative: give target_loss")
    return first


def _curve(name: str, values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.tolist()
    elif isinstance(values, Sequence):
        # Losses as a training loop has them may have a graph, or be on a device.
        values = [v.item() if isinstance(v, torch.Tensor) else v for v in values]
    curve = np.atleast_1d(np.asarray(values, dtype=np.float64))
    if curve.ndim != 1 or not curve.size:
        raise ValueError(f"history[{name!r}]: expected one number an epoch, got shape {curve.shape}")
    return curve


def _judge_training(curve: np.ndarray, final: Mapping[str, float], margin: float, evidence: list[str]) -> str:
    train = final["train_loss"]
    if not math.isfinite(train):
        evidence.append("it is not finite: training diverged")
        return "optimization"
    if len(curve) >= 10:
        start = len(curve) - len(curve) // 5
        before = float(curve[start : start + max(1, len(curve) // 20)].mean())
        if train < before - margin * abs(before):
            evidence.append(f"it is still falling: {before:.3g} in epoch {start + 1}")
    below: dict[str, bool] = {}
    for size in ("smaller", "larger"):
        if (other := final.get(f"{size}_train_loss")) is not None:
            if not math.isfinite(other):
                evidence.append(f"a {size} model's training loss is {other}, which says nothing")
                continue
            below[size] = other < train - margin * abs(train)
            evidence.append(
                f"a {size} model's training loss is {other:.3g}"
                + (", lower" if below[size] else ", no lower")
            )
    if below.get("smaller"):
        return "optimization"
    if below.get("larger", "smaller" in below):
        return "model bias"
    return "model bias or optimization"


def _judge_validation(
    curves: Mapping[str, np.ndarray],
    final: Mapping[str, float],
    target: float,
    margin: float,
    evidence: list[str],
) -> str:
    if "val_loss" not in final:
        return "training loss low"

    def high(loss: float) -> bool:
        return not (loss <= target or loss <= final["train_loss"] + margin * abs(final["train_loss"]))

    validation, curve = final["val_loss"], curves["val_loss"]
    if not high(validation):
        evidence.append(f"validation loss {validation:.3g}, low as well")
        return "good fit"
    evidence.append(
        f"validation loss {validation:.3g}, high: above {target:.3g} and more than {margin:.0%} above training"
    )
    if not math.isnan(holdout := final.get("holdout_loss", math.nan)):
        what = "high too" if high(holdout) else "low: the validation data is of another kind"
        evidence.append(f"held-out rows of the training data's own kind: {holdout:.3g}, {what}")
        return "overfitting" if high(holdout) else "mismatch"
    best = int(np.nanargmin(curve)) if not np.isnan(curve).all() else 0
    if not high(float(curve[best])):
        evidence.append(
            f"validation loss was low before: {curve[best]:.3g} in epoch {best + 1} of {len(curve)}"
        )
        return "overfitting"
    return "overfitting or mismatch"
