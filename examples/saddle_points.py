"""Saddle points: a small net led to one and off it along the negative eigenvector; the minimum ratio over many runs.

Data: the synthetic curve y = sin(2 x). The minimum ratio is the share of positive eigenvalues of the Hessian.
"""

from __future__ import annotations

from pathlib import Path

import course
import matplotlib.pyplot as plt
import numpy as np
import torch

import dlgpu
from dlgpu.diagnostics import CriticalPoint, critical_point

DECAY = 0.003


class Curve:
    """A net of 3 hidden units and its loss: mean squared error + DECAY |theta|^2, which keeps minima apart."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, scale: float = 1.0) -> None:
        self.x, self.y = x, y
        self.model = dlgpu.nn.MLP([1, 3, 1], "tanh").to(x.device)
        with torch.no_grad():
            for p in self.model.parameters():
                p *= scale

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        decay = sum(p.square().sum() for p in self.model.parameters())
        return dlgpu.functional.mse_loss(output, target) + DECAY * decay

    def descend(self, steps: int) -> list[float]:
        """The loss before each step of gradient descent with momentum."""
        optimizer = dlgpu.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss(self.model(self.x), self.y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    def seek_critical(self, steps: int) -> CriticalPoint:
        """Minimizes |gradient|^2 instead of the loss, by double backward: ends at whatever critical point is near."""
        optimizer = dlgpu.optim.Adam(self.model.parameters(), lr=0.03)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = self.loss(self.model(self.x), self.y)
            grads = torch.autograd.grad(loss, list(self.model.parameters()), create_graph=True)
            sum(g.square().sum() for g in grads).backward()
            optimizer.step()
            schedule.step()
        return self.look(0.01)

    def look(self, gradient_tolerance: float = 1e-3) -> CriticalPoint:
        return critical_point(self.model, self.loss, (self.x, self.y), gradient_tolerance=gradient_tolerance)

    @torch.no_grad()
    def move(self, direction: dict[str, torch.Tensor], distance: float) -> float:
        """Moves the parameters; the loss there."""
        for name, p in self.model.named_parameters():
            p += distance * direction[name]
        return self.loss(self.model(self.x), self.y).item()


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        runs = 6 if args.quick else 24
        x = torch.linspace(-1, 1, 64)[:, None].to(args.device)
        y = torch.sin(2 * x)

        # Where all is zero every gradient is, since the targets' mean is.
        net = Curve(x, y, scale=0.0)
        stuck = net.descend(100)
        saddle = net.look()
        print(saddle)
        way = saddle.escape_direction
        reach = np.linspace(-1.5, 1.5, 61)
        slices = [net.move(way, reach[0]), *(net.move(way, gap) for gap in np.diff(reach))]
        net.move(way, -reach[-1] + 0.1)
        freed = net.descend(300)
        print(
            f"loss {stuck[-1]:.3f} at the saddle, {freed[0]:.3f} beside it, {freed[-1]:.3f} after 300 steps from there"
        )

        points = []
        for run in range(runs):
            # From near zero, from a few steps of training, from many.
            net = Curve(x, y, scale=0.3 if run % 3 == 0 else 1.0)
            net.descend((0, 60, 300)[run % 3])
            points.append(net.seek_critical(300))
        kinds = {kind: [p for p in points if p.kind == kind] for kind in ("saddle", "minimum", "undecided")}
        print({kind: len(found) for kind, found in kinds.items()})

        course.claim(
            "gradient descent does not leave the saddle",
            stuck[-1] > 0.999 * stuck[0] and saddle.kind == "saddle",
        )
        course.claim("a step along the negative eigenvector lowers the loss", freed[0] < saddle.loss)
        course.claim("and from there it falls to a tenth", freed[-1] < 0.1 * saddle.loss)
        low, high = ([p.minimum_ratio for p in points if (p.loss < 0.3) == side] for side in (True, False))
        print(
            f"mean minimum ratio {np.mean(low):.2f} where the loss is low, {np.mean(high):.2f} where it is high"
        )
        course.claim(
            "over many runs, low loss goes with a higher minimum ratio", np.mean(low) > np.mean(high) + 0.05
        )
        course.claim("no minimum has a high loss", not any(p.loss > 0.3 for p in kinds["minimum"]))
        return course.save(plot(stuck, freed, reach, slices, kinds), args, "saddle_points")


def plot(stuck: list, freed: list, reach: np.ndarray, slices: list, kinds: dict) -> plt.Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4), layout="constrained")
    left.plot(reach, slices)
    left.plot(0, stuck[-1], "ko", label="saddle")
    left.set(xlabel="distance along the negative eigenvector", ylabel="loss", title="The way off the saddle")
    left.legend()
    middle.plot(stuck, lw=2, label="at the saddle")
    middle.plot(range(100, 100 + len(freed)), freed, "--", lw=2, label="after 0.1 along the eigenvector")
    middle.set(xlabel="step of gradient descent", ylabel="loss", ylim=(0, None), title="Gradient descent")
    middle.legend()
    for (kind, points), marker in zip(kinds.items(), ("o", "*", "x"), strict=True):
        # Shaken a little: many runs end at the same point.
        ratios = [p.minimum_ratio + 0.03 * (i / max(len(points) - 1, 1) - 0.5) for i, p in enumerate(points)]
        losses = [p.loss for p in points]
        right.plot(ratios, losses, marker, ms=8, alpha=0.6, label=f"{kind} ({len(points)} runs)")
    right.set(
        xlabel="minimum ratio",
        ylabel="loss",
        xlim=(0.5, 1.05),
        ylim=(0, 0.75),
        title="Where runs end that make the gradient small",
    )
    right.legend(loc="center left")
    return figure


if __name__ == "__main__":
    main()
