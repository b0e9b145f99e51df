"""Activations: gradients that vanish in deep sigmoid nets, ReLUs that die, and what helps.

Data: scikit-learn's handwritten digits, 8 x 8 pixels.
"""

from __future__ import annotations

from pathlib import Path

import course
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import dlgpu
from dlgpu.diagnostics import GradientReport, dead_relu_share, gradient_norms

DEEP = {"sigmoid": False, "tanh": False, "relu": False, "sigmoid + batch norm": True}
# Name -> (activation, batch norm before it).
REMEDIES = {
    "relu": ("relu", False),
    "leaky relu": ("leaky_relu", False),
    "gelu": ("gelu", False),
    "relu + batch norm": ("relu", True),
}


def network(activation: str, hidden: int, norm: bool) -> torch.nn.Sequential:
    """64 inputs, `hidden` layers of 64 units, 10 classes."""
    layers: list[torch.nn.Module] = []
    for _ in range(hidden):
        if norm:
            layers += [dlgpu.nn.Linear(64, 64), dlgpu.nn.BatchNorm1d(64, activation=activation)]
        else:
            layers.append(dlgpu.nn.Linear(64, 64, activation=activation))
        if activation != "sigmoid":
            torch.nn.init.kaiming_normal_(layers[-2 if norm else -1].weight)
        else:
            torch.nn.init.xavier_normal_(layers[-2 if norm else -1].weight)
    return torch.nn.Sequential(*layers, dlgpu.nn.Linear(64, 10))


def first_gradients(name: str, x: torch.Tensor, y: torch.Tensor) -> GradientReport:
    """The gradients of a fresh net of 12 hidden layers, its linear layers only."""
    model = network(name.partition(" ")[0], 12, DEEP[name]).to(x.device)
    dlgpu.functional.cross_entropy(model(x), y).backward()
    return gradient_norms(torch.nn.ModuleList(m for m in model if isinstance(m, torch.nn.Linear)))


def train(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> list[float]:
    """The share of right answers during training by Adam, every ten steps."""
    optimizer = dlgpu.optim.Adam(model.parameters(), lr=0.003)
    right = []
    for step in range(steps):
        rows = torch.randint(len(x), (128,), device=x.device)
        optimizer.zero_grad()
        logits = model(x[rows])
        dlgpu.functional.cross_entropy(logits, y[rows]).backward()
        optimizer.step()
        if step % 10 == 0:
            right.append((logits.argmax(1) == y[rows]).double().mean().item())
    return right


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        pixels, labels = load_digits(return_X_y=True)
        x = torch.tensor(pixels / 16, dtype=torch.float32, device=args.device)
        y = torch.tensor(labels, device=args.device)
        reports = {name: first_gradients(name, x, y) for name in DEEP}
        for name, report in reports.items():
            print(f"{name}: {report.verdict} ({report.reason})")

        accuracy, dead = {}, {}
        for name, (activation, norm) in REMEDIES.items():
            model = network(activation, 2, norm).to(x.device)
            with torch.no_grad():
                # As one step that was far too large may leave it: every sum far below zero.
                model[0].bias -= 3
            before = dead_relu_share(model, x) if activation == "relu" else None
            accuracy[name] = train(model, x, y, 200 if args.quick else 400)
            if before is not None:
                dead[name] = before.share, dead_relu_share(model, x).share
            print(f"{name}: accuracy at the end {accuracy[name][-1]:.2f}, dead share {dead.get(name)}")

        course.claim("gradients vanish in the deep sigmoid net", reports["sigmoid"].verdict == "vanishing")
        rest = [report.verdict for name, report in reports.items() if name != "sigmoid"]
        course.claim("and in none of the others", set(rest) == {"healthy"})
        first = {name: report.layers[0].rms for name, report in reports.items()}
        course.claim("ReLU's first gradient is 1000 times sigmoid's", first["relu"] > 1000 * first["sigmoid"])
        course.claim("ReLUs that are all dead stay so: no better than chance", max(accuracy["relu"]) < 0.3)
        course.claim("half of them were dead at first, all of one layer", dead["relu"][0] >= 0.5)
        others = [min(accuracy[name][-3:]) for name in REMEDIES if name != "relu"]
        course.claim("leaky ReLU, GELU and batch norm learn from the same start", min(others) > 0.6)
        return course.save(plot(reports, accuracy), args, "activations")


def plot(reports: dict, accuracy: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    styles = ("o-", "s--", "^-.", "d:")
    for (name, report), style in zip(reports.items(), styles, strict=True):
        layers = range(1, len(report.layers) + 1)
        left.plot(layers, [layer.rms for layer in report.layers], style, label=name)
    left.set(
        yscale="log",
        xlabel="layer, from the input",
        ylabel="RMS gradient",
        title="12 hidden layers, before training",
    )
    left.legend()
    for (name, values), style in zip(accuracy.items(), styles, strict=True):
        right.plot(range(0, 10 * len(values), 10), values, style[1:], label=name)
    right.set(
        xlabel="step",
        ylabel="accuracy on the batch",
        ylim=(0, 1.05),
        title="First layer's biases shifted by -3",
    )
    right.legend(loc="center right")
    return figure


if __name__ == "__main__":
    main()
