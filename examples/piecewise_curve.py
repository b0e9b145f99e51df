"""A curve as a constant plus a sum of sigmoids, then of ReLUs; deep against wide; where deeper stops helping.

y = b + sum_i c_i sigmoid(b_i + w_i x) is a network with one hidden layer: each sigmoid, or pair of ReLUs, is one slope
between two levels. All data here is synthetic.
"""

from __future__ import annotations

from pathlib import Path

import course
import matplotlib.pyplot as plt
import torch

import dlgpu

CORNERS = torch.tensor(
    [[-1.0, 0.2], [-0.6, 0.9], [-0.2, 0.7], [0.1, -0.8], [0.5, -0.3], [0.8, 0.6], [1.0, 0.5]]
)
UNITS = (1, 2, 4, 8, 16)
DEPTHS = (1, 2, 3, 4, 6)


def piecewise(x: torch.Tensor) -> torch.Tensor:
    """The curve through CORNERS, straight between them."""
    right = torch.searchsorted(CORNERS[:, 0].contiguous(), x.contiguous()).clamp(1, len(CORNERS) - 1)
    (x0, y0), (x1, y1) = CORNERS[right - 1].unbind(-1), CORNERS[right].unbind(-1)
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def teeth(x: torch.Tensor) -> torch.Tensor:
    """A saw of 8 teeth between -1 and 1: four folds, one inside the other, so 16 straight pieces."""
    for _ in range(4):
        x = 1 - 2 * x.abs()
    return x


def fit(
    sizes: list[int], activation: str, x: torch.Tensor, y: torch.Tensor, steps: int, lr: float = 0.03
) -> torch.nn.Module:
    """A network trained with all rows in each step."""
    model = dlgpu.nn.MLP(sizes, activation)
    with torch.no_grad():
        # Steps and kinks spread evenly over [-1, 1], facing either way; the deeper layers start as He et al. propose.
        slope = (12.0 if activation == "sigmoid" else 1.5) * (-1.0) ** torch.arange(sizes[1])
        model[0].weight.copy_(slope[:, None])
        model[0].bias.copy_(-slope * torch.linspace(-1, 1, sizes[1] + 2)[1:-1])
        for layer in [m for m in model if hasattr(m, "weight")][1:-1]:
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    model.to(x.device)
    optimizer = dlgpu.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        dlgpu.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def error(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Root mean squared error."""
    return dlgpu.functional.mse_loss(model(x), y).sqrt().item()


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        steps, units, depths, runs = (
            (500, UNITS[::4], DEPTHS[::4], 1) if args.quick else (1500, UNITS, DEPTHS, 2)
        )
        x = torch.linspace(-1, 1, 256)[:, None]
        y, x = piecewise(x).to(args.device), x.to(args.device)
        # Two ReLUs make one slope between two levels, as one sigmoid does.
        counts = [("sigmoid", k) for k in units] + [("relu", 2 * k) for k in units]
        fits = {(a, k): fit([1, k, 1], a, x, y, steps) for a, k in counts}
        sums = {key: error(model, x, y) for key, model in fits.items()}
        for key, value in sums.items():
            print(f"{key[1]:3} {key[0]} units: error {value:.3f}")

        saw = teeth(x)
        shapes = {"deep": [1, 16, 16, 16, 1], "wide": [1, 200, 1]}
        # A quarter of the deep nets are caught on the way: the best of five. Wide ones hardly differ.
        tries = {"deep": 5, "wide": 1}
        rivals = {n: [fit(shapes[n], "relu", x, saw, 1500, 0.01) for _ in range(tries[n])] for n in shapes}
        parameters = {name: count(models[0]) for name, models in rivals.items()}
        saws = {name: min(error(model, x, saw) for model in models) for name, models in rivals.items()}
        print(f"saw of 8 teeth: {saws}, parameters {parameters}")

        # Few and noisy rows to learn from, many without noise to be judged by.
        few = torch.rand(40, 1) * 2 - 1
        noisy = (piecewise(few) + 0.25 * torch.randn(40, 1)).to(args.device)
        few = few.to(args.device)
        curves = {}
        for depth in depths:
            models = [fit([1, *[32] * depth, 1], "relu", few, noisy, 600, 0.01) for _ in range(runs)]
            pairs = [(error(m, few, noisy), error(m, x, y)) for m in models]
            curves[depth] = [sum(column) / runs for column in zip(*pairs, strict=True)]
            print(f"depth {depth}: training error {curves[depth][0]:.3f}, unseen {curves[depth][1]:.3f}")

        course.claim(
            "16 sigmoids have an eighth of the error of one", 8 * sums["sigmoid", 16] < sums["sigmoid", 1]
        )
        course.claim("32 ReLUs have a quarter of the error of two", 4 * sums["relu", 32] < sums["relu", 2])
        course.claim(
            "no more parameters, deep: at most half the error of wide", saws["deep"] < 0.5 * saws["wide"]
        )
        train, unseen = zip(*curves.values(), strict=True)
        course.claim("the deepest fits its training rows better than the shallowest", train[-1] < train[0])
        course.claim("and yet it is not the best on unseen ones", unseen[-1] > 1.1 * min(unseen))
        return course.save(plot(x, y, fits, saws, parameters, curves), args, "piecewise_curve")


def plot(x, y, fits, saws, parameters, curves) -> plt.Figure:
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12, 4), width_ratios=[4, 2, 3], layout="constrained"
    )
    left.plot(x.cpu(), y.cpu(), "k-", lw=3, alpha=0.3, label="curve")
    for (activation, units), style in ((("sigmoid", 1), ":"), (("sigmoid", 16), "--"), (("relu", 32), "-.")):
        left.plot(
            x.cpu(),
            fits[activation, units](x).detach().cpu(),
            style,
            label=f"{units} {activation}" + "s" * (units > 1),
        )
    left.set(xlabel="x", ylabel="y", title="A constant plus a sum of units")
    left.legend()
    names = [f"{name}\n{parameters[name]} parameters" for name in saws]
    middle.bar_label(middle.bar(names, list(saws.values()), color=["C0", "C1"]), fmt="%.3f")
    middle.set(ylabel="root mean squared error", title="A saw of 8 teeth")
    train, unseen = zip(*curves.values(), strict=True)
    right.plot(list(curves), train, "o-", label="40 noisy training rows")
    right.plot(list(curves), unseen, "s--", label="unseen, without noise")
    right.set(
        xlabel="hidden layers of 32 ReLUs",
        ylabel="root mean squared error",
        title="Deeper stops helping",
        ylim=(0, None),
    )
    right.legend()
    return figure


if __name__ == "__main__":
    main()
