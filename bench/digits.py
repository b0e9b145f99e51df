"""A classifier of scikit-learn's handwritten digits, trained by two libraries side by side on real data.

1,797 scans of 8 x 8 pixels, a fifth of them held out, 64-256-256-10 with ReLU, batches of 64, Adam. All start from the same
weights and see the same batches, so that losses can be compared step by step.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from .cases.training_step import LIBRARIES

__all__ = ["BATCH", "EPOCHS", "SIZES", "Digits", "Trainer", "batches", "load", "side_by_side"]

SIZES = (64, 256, 256, 10)
BATCH = 64
EPOCHS = 30


@dataclasses.dataclass(frozen=True)
class Digits:
    """Pixels in [0, 1], [n, 64] float32, and classes, [n] int64."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor

    def to(self, device: str, dtype: torch.dtype) -> Digits:
        return Digits(
            self.train_x.to(device, dtype),
            self.train_y.to(device),
            self.test_x.to(device, dtype),
            self.test_y.to(device),
        )


def load() -> Digits:
    """The data with a stratified fifth held out, the same every time. Nothing is downloaded: scikit-learn carries it.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    parts = train_test_split(
        (x / 16).astype(np.float32), y.astype(np.int64), test_size=0.2, stratify=y, random_state=0
    )
    train_x, test_x, train_y, test_y = (torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
    return Digits(train_x, train_y, test_x, test_y)


def batches(rows: int, epochs: int, seed: int, batch: int = BATCH) -> Iterator[np.ndarray]:
    """Row numbers of every batch: a fresh shuffle each epoch, the last batch a smaller one."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(rows)
        for start in range(0, rows, batch):
            yield order[start : start + batch]


class Trainer:
    """The network, its optimizer and its data, by one of the `LIBRARIES`."""

    def __init__(
        self,
        library: str,
        data: Digits,
        seed: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.library, self.data = LIBRARIES[library], data.to(device, dtype)
        # torch.nn.Linear's initialization, drawn in float32 on the host: the same for every library, device and dtype.
        generator = torch.Generator().manual_seed(seed)
        self.params: list[torch.Tensor] = []
        for shape in [s for i, o in itertools.pairwise(SIZES) for s in ((o, i), (o,))]:
            fan_in = shape[1] if len(shape) == 2 else self.params[-1].shape[1]
            values = torch.rand(shape, generator=generator).mul_(2).sub_(1).mul_(fan_in**-0.5)
            self.params.append(values.to(device, dtype).requires_grad_())
        self.optimizer = self.library.optimizer(self.params)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.library.logits(x, self.params[::2], self.params[1::2])

    def step(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """One training step; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.library.loss(self.logits(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def rows(self, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        where = torch.from_numpy(index).to(self.data.train_x.device)
        return self.data.train_x[where], self.data.train_y[where]

    def accuracy(self) -> float:
        """The share of held-out digits that are recognized."""
        with torch.no_grad():
            hits = self.logits(self.data.test_x).argmax(1) == self.data.test_y
        return float(hits.float().mean())


def losses(trainer: Trainer, steps: int, seed: int) -> Iterator[float]:
    """The losses of the first steps, each as its step is done."""
    # Lazy: as many epochs as steps are surely enough.
    order = batches(len(trainer.data.train_x), steps, seed)
    for _, index in zip(range(steps), order, strict=False):
        yield float(trainer.step(*trainer.rows(index)))


@dataclasses.dataclass(frozen=True)
class Training:
    """Two trainings on the same batches: the losses of every step, and accuracy on the held-out digits."""

    losses_a: tuple[float, ...]
    losses_b: tuple[float, ...]
    accuracy_a: float
    accuracy_b: float
    epochs: int


def side_by_side(
    a: Trainer,
    b: Trainer,
    epochs: int,
    seed: int,
    epoch_done: Callable[[int, float, float], bool] | None = None,
) -> Training:
    """Trains `a` and `b`, taking turns after each epoch, so that their thread pools seldom meet.

    Args:
        epoch_done: called with the epoch, from 1, and the mean losses of `a` and `b` in it; True ends the training.
    """
    found: tuple[list[float], list[float]] = ([], [])
    rows = len(a.data.train_x)
    order = list(batches(rows, epochs, seed))
    per_epoch = len(order) // epochs
    for epoch in range(epochs):
        part = order[epoch * per_epoch : (epoch + 1) * per_epoch]
        for which, trainer in enumerate((a, b)):
            steps = [trainer.step(*trainer.rows(index)) for index in part]
            found[which].extend(torch.stack(steps).tolist())
        means = [float(np.mean(half[-per_epoch:])) for half in found]
        if epoch_done is not None and epoch_done(epoch + 1, *means):
            break
    return Training(tuple(found[0]), tuple(found[1]), a.accuracy(), b.accuracy(), epoch + 1)
