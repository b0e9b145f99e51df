"""Optimizers on a rugged, badly scaled surface, drawn as paths; warm-up and decay of the learning rate.

Data: none; the surface is synthetic, a valley 1000 times as steep across as along, with ripples. Its gradient comes with
noise, as from small batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import course
import matplotlib.pyplot as plt
import numpy as np
import torch

import dlgpu

# Name -> an optimizer of the parameters.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: dlgpu.optim.SGD(p, lr=0.015),
    "momentum": lambda p: dlgpu.optim.SGD(p, lr=0.015, momentum=0.9),
    "Adagrad": lambda p: dlgpu.optim.Adagrad(p, lr=0.5),
    "RMSProp": lambda p: dlgpu.optim.RMSprop(p, lr=0.05, alpha=0.9),
    "Adam": lambda p: dlgpu.optim.Adam(p, lr=0.1),
}
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))


def surface(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """0.1 x^2 / 2 + 100 y^2 / 2 and ripples along x; its minimum is 0, at the origin."""
    return 0.05 * x**2 + 50 * y**2 + 0.025 * (1 - torch.cos(4 * x))


def descend(
    make: Callable, start: torch.Tensor, steps: int, noise: float, rate: Callable | None = None
) -> np.ndarray:
    """The points [steps + 1, 2] that an optimizer visits; `rate` scales its learning rate by step."""
    point = torch.nn.Parameter(start.clone())
    optimizer = make([point])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate) if rate is not None else None
    path = [point.detach().cpu().numpy().copy()]
    for _ in range(steps):
        optimizer.zero_grad()
        surface(*point).backward()
        point.grad += noise * torch.randn(2).to(point.device)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        path.append(point.detach().cpu().numpy().copy())
    return np.array(path)


def losses(path: np.ndarray) -> np.ndarray:
    return surface(*torch.from_numpy(path).T).numpy()


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        steps = 300
        start = (torch.tensor([-4.0, 0.8]) + 0.1 * torch.randn(2)).to(args.device)
        paths = {name: descend(make, start, steps, 0.02) for name, make in OPTIMIZERS.items()}
        for name, path in paths.items():
            print(f"{name}: at {path[-1].round(2)} after {steps} steps, loss {losses(path)[-1]:.4f}")

        # Adam from near the minimum, with ten times the noise. Its first steps are as long as its rate, whatever the slope is.
        schedules = {
            "constant": lambda step: 1.0,
            "decay": lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)),
            "warm-up and decay": lambda step: (
                min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
            ),
        }
        near, runs = torch.tensor([-0.5, 0.0], device=args.device), 4 if args.quick else 10
        curves = {}
        for name, rate in schedules.items():
            found = [
                descend(lambda p: dlgpu.optim.Adam(p, lr=0.3), near, steps, 0.2, rate) for _ in range(runs)
            ]
            curves[name] = np.mean([losses(path) for path in found], 0)
            print(
                f"{name}: highest loss {curves[name].max():.2f}, last {curves[name][-20:].mean():.4f}, mean of {runs} runs"
            )

        along = {name: abs(path[-20:, 0].mean()) for name, path in paths.items()}
        course.claim(
            "SGD, held back by the steep direction, is not halfway along the flat one", along["SGD"] > 2
        )
        rest = [distance for name, distance in along.items() if name != "SGD"]
        course.claim("momentum and the adaptive rates have three quarters behind them", max(rest) < 1)
        course.claim(
            "momentum and Adam roll through the ripples", max(along["momentum"], along["Adam"]) < 0.4
        )
        ends = {name: curve[-20:].mean() for name, curve in curves.items()}
        decayed = max(ends["decay"], ends["warm-up and decay"])
        course.claim("decay ends at a quarter of a constant rate's loss", decayed < 0.25 * ends["constant"])
        highest = {name: curve.max() for name, curve in curves.items()}
        course.claim(
            "warm-up halves the first excursion", highest["warm-up and decay"] < 0.5 * highest["decay"]
        )
        return course.save(plot(paths, curves), args, "optimizers")


def plot(paths: dict, curves: dict) -> plt.Figure:
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 4.2), width_ratios=[5, 4, 4], layout="constrained"
    )
    x, y = torch.meshgrid(torch.linspace(-5, 2, 141), torch.linspace(-1.1, 1.1, 111), indexing="xy")
    shades = left.contourf(
        x,
        y,
        surface(x, y),
        levels=np.geomspace(0.02, 60, 18),
        cmap="Greys",
        norm="log",
        extend="both",
        alpha=0.25,
    )
    figure.colorbar(shades, ax=left, label="loss", ticks=[0.1, 1, 10], format="%g")
    for (name, path), style in zip(paths.items(), STYLES, strict=True):
        left.plot(path[:, 0], path[:, 1], linestyle=style, lw=1.5, label=name)
        middle.plot(losses(path), linestyle=style, lw=1.5, label=name)
    left.plot(0, 0, "k*", ms=12)
    left.set(
        xlabel="x (curvature 0.1, ripples)",
        ylabel="y (curvature 100)",
        xlim=(-5, 2),
        ylim=(-1.1, 1.1),
        title="Paths; the star is the minimum",
    )
    left.legend(loc="lower right")
    middle.set(yscale="log", xlabel="step", ylabel="loss", title="Five optimizers")
    middle.set_ylim(top=3e3)
    middle.legend(loc="upper right", ncols=2)
    for (name, curve), style in zip(curves.items(), STYLES, strict=False):
        right.plot(curve, linestyle=style, lw=1.5, label=name)
    right.set(yscale="log", xlabel="step", ylabel="mean loss", title="Adam by schedule, noisy gradient")
    right.legend(loc="upper right")
    return figure


if __name__ == "__main__":
    main()
