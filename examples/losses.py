"""Losses: squared, Huber and absolute error with outliers; BCE, hinge, cross-entropy and KL on the same classification.

Data: a synthetic line with outliers; scikit-learn's breast cancer set, 569 tumours with 30 measurements each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import course
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split

import dlgpu
from dlgpu import functional as F

SLOPE, START = 2.0, 1.0
REGRESSION = {
    "squared error": F.mse_loss,
    "Huber, delta 1": lambda y, t: F.huber_loss(y, t, delta=1.0),
    "absolute error": F.l1_loss,
}


def two_classes(t: torch.Tensor) -> torch.Tensor:
    """The distribution that is certain of class t."""
    return torch.eye(2, device=t.device)[t]


# Loss -> (number of outputs, the loss of outputs and classes 0 or 1).
CLASSIFICATION: dict[str, tuple[int, Callable[..., torch.Tensor]]] = {
    "BCE": (1, lambda z, t: F.binary_cross_entropy_with_logits(z[:, 0], t.to(z.dtype))),
    "hinge": (1, lambda z, t: F.hinge_loss(z[:, 0], 2 * t.to(z.dtype) - 1)),
    "cross-entropy": (2, F.cross_entropy),
    "KL divergence": (2, lambda z, t: F.kl_div(F.log_softmax(z, -1), two_classes(t), reduction="batchmean")),
}


def fit(
    model: torch.nn.Module, loss_fn: Callable, x: torch.Tensor, t: torch.Tensor, steps: int
) -> torch.nn.Module:
    """Adam with all rows in each step and a falling learning rate."""
    optimizer = dlgpu.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model(x), t).backward()
        optimizer.step()
        schedule.step()
    return model


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        steps = 250 if args.quick else 1000
        x = torch.linspace(-2, 2, 60)[:, None]
        y = START + SLOPE * x + 0.3 * torch.randn(60, 1)
        # A sensor that fails above 1: eight readings stand still far below.
        broken = torch.arange(60)[x[:, 0] > 1][-8:]
        y[broken] = -8 + 0.3 * torch.randn(8, 1)
        x, y = x.to(args.device), y.to(args.device)
        lines = {}
        for name, loss_fn in REGRESSION.items():
            model = fit(dlgpu.nn.Linear(1, 1).to(x.device), loss_fn, x, y, steps)
            lines[name] = model.weight.item(), model.bias.item()
            print(
                f"{name}: slope {lines[name][0]:.2f} (true {SLOPE}), intercept {lines[name][1]:.2f} (true {START})"
            )

        rows, classes = load_breast_cancer(return_X_y=True)
        parts = train_test_split(rows, classes, test_size=0.3, stratify=classes, random_state=args.seed)
        rows, unseen = (torch.tensor(part, dtype=torch.float32) for part in parts[:2])
        mean, spread = rows.mean(0), rows.std(0)
        rows, unseen = ((part - mean) / spread for part in (rows, unseen))
        rows, unseen = rows.to(args.device), unseen.to(args.device)
        t, unseen_t = (torch.tensor(part, device=args.device) for part in parts[2:])
        accuracy = {}
        for name, (outputs, loss_fn) in CLASSIFICATION.items():
            # The same weights to start from; two outputs are 0 and the one.
            model = dlgpu.nn.Linear(30, outputs).to(rows.device)
            torch.nn.init.zeros_(model.weight)
            z = fit(model, loss_fn, rows, t, steps // 4)(unseen)
            found = z.argmax(1) if outputs == 2 else (z[:, 0] > 0).long()
            accuracy[name] = (found == unseen_t).double().mean().item()
            print(f"{name}: {accuracy[name]:.1%} of {len(unseen)} unseen tumours right")

        off = {name: abs(slope - SLOPE) for name, (slope, _) in lines.items()}
        course.claim("outliers turn the squared error's slope by more than 1", off["squared error"] > 1)
        course.claim(
            "Huber's by less, absolute error's by least", off["absolute error"] < off["Huber, delta 1"] < 1
        )
        z = 3 * torch.randn(64, 2, device=args.device)
        classes = torch.randint(2, (64,), device=args.device)
        pairs = [CLASSIFICATION[name][1](z, classes).item() for name in ("cross-entropy", "KL divergence")]
        course.claim("KL of certain targets is cross-entropy", abs(pairs[0] - pairs[1]) < 1e-5 * pairs[0])
        one = CLASSIFICATION["BCE"][1](z[:, 1:] - z[:, :1], classes).item()
        course.claim("BCE of a difference of logits is cross-entropy", abs(pairs[0] - one) < 1e-5 * one)
        course.claim("all four are right on 93% of unseen tumours", min(accuracy.values()) > 0.93)
        return course.save(plot(x, y, lines, accuracy), args, "losses")


def plot(x: torch.Tensor, y: torch.Tensor, lines: dict, accuracy: dict) -> plt.Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.5, 4), layout="constrained")
    margin = torch.linspace(-3, 3, 121, device=x.device)
    x, y = x.cpu(), y.cpu()
    left.plot(x, y, "k.", alpha=0.5, label="data, 8 outliers")
    left.plot(x, START + SLOPE * x, color="0.7", lw=4, label="true line", zorder=0)
    for (name, (slope, start)), style in zip(lines.items(), ("-", "--", ":"), strict=True):
        left.plot(x, start + slope * x, style, label=name)
    left.set(xlabel="x", ylabel="y", title="A line, with outliers (synthetic)")
    left.legend(loc="lower left")
    ones = torch.ones_like(margin)
    curves = {
        "squared error": F.mse_loss(margin, ones, reduction="none"),
        "hinge": F.hinge_loss(margin, ones, reduction="none"),
        "BCE": F.binary_cross_entropy_with_logits(margin, ones, reduction="none"),
    }
    for (name, values), style in zip(curves.items(), ("-", "--", ":"), strict=True):
        middle.plot(margin.cpu(), values.cpu(), style, lw=2, label=name)
    middle.set(
        xlabel="margin: output x class (-1 or 1)", ylabel="loss", ylim=(-0.1, 6), title="What an answer costs"
    )
    middle.legend(loc="upper right")
    bars = right.barh(list(accuracy), [100 * value for value in accuracy.values()], color="C0")
    right.bar_label(bars, fmt="%.1f%%", padding=3)
    right.set(
        xlabel="accuracy on unseen tumours [%]",
        xlim=(0, 115),
        title="The same classification by four losses",
    )
    right.invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
