"""Model bias, optimization failure, overfitting and mismatch on one task, told apart by `fit_report`, and remedies.

Data: scikit-learn's handwritten digits. The validation images of the mismatch are the same images, upside down.
"""

from __future__ import annotations

from pathlib import Path

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import KFold, train_test_split

import dlgpu
from dlgpu.diagnostics import fit_report
from dlgpu.nn import MLP

LOW = 0.25
LABELS = {
    "train_loss": "training",
    "val_loss": "validation",
    "larger_train_loss": "training, larger net",
    "smaller_train_loss": "training, smaller net",
    "holdout_loss": "held out, same kind",
}
Data = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def loss_of(model: torch.nn.Module, data: Data) -> float:
    model.eval()
    loss = dlgpu.functional.cross_entropy(model(data[0]), data[1]).item()
    model.train()
    return loss


def train(
    model: torch.nn.Module, data: Data, others: dict[str, Data], epochs: int, decay: float = 0.0
) -> dict[str, list[float]]:
    """The losses after each epoch, for `fit_report`."""
    model.to(data[0].device)
    optimizer = dlgpu.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=decay)
    history: dict[str, list[float]] = {name: [] for name in ("train_loss", *others)}
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0]), device=data[0].device).split(len(data[0]) // 16):
            optimizer.zero_grad()
            dlgpu.functional.cross_entropy(model(data[0][rows]), data[1][rows]).backward()
            optimizer.step()
        for name, part in {"train_loss": data, **others}.items():
            history[name].append(loss_of(model, part))
    return history


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        pixels, digit = load_digits(return_X_y=True)
        parts = train_test_split(pixels / 16, digit, train_size=1000, stratify=digit, random_state=args.seed)
        x, unseen_x = (torch.tensor(part, dtype=torch.float32, device=args.device) for part in parts[:2])
        y, unseen_y = (torch.tensor(part, device=args.device) for part in parts[2:])
        full, unseen = (x, y), (unseen_x, unseen_y)
        turned = (unseen_x.flip(1), unseen_y)
        few = x[:100], y[:100].clone()
        # A fifth of the few labels are wrong.
        few[1][:20] = (few[1][:20] + torch.randint(1, 10, (20,), device=args.device)) % 10
        epochs = 30 if args.quick else 40

        histories = {}
        # One unit in the middle cannot tell ten classes apart; a wider net shows that it can be done.
        good = train(MLP([64, 64, 10], "relu"), full, {"val_loss": unseen}, epochs)
        histories["model bias"] = train(MLP([64, 1, 10], "relu"), full, {"val_loss": unseen}, epochs)
        histories["model bias"]["larger_train_loss"] = good["train_loss"]
        # Twelve sigmoid layers do no better than chance, where one of ReLUs does well.
        histories["optimization"] = train(
            MLP([64, *[32] * 12, 10], "sigmoid"), full, {"val_loss": unseen}, epochs // 2
        )
        histories["optimization"]["smaller_train_loss"] = good["train_loss"]
        parts = {"val_loss": unseen, "holdout_loss": unseen}
        histories["overfitting"] = train(MLP([64, 256, 10], "relu"), few, parts, 2 * epochs)
        parts = {"val_loss": turned, "holdout_loss": unseen}
        histories["mismatch"] = train(MLP([64, 64, 10], "relu"), full, parts, epochs)
        histories["good fit"] = good
        reports = {name: fit_report({**history, "target_loss": LOW}) for name, history in histories.items()}
        for name, report in reports.items():
            print(f"made to show {name}:\n{report}")

        remedies = {}
        for name, dropout, decay in (("none", 0, 0), ("dropout 0.5", 0.5, 0), ("weight decay", 0, 2)):
            model = MLP([64, 256, 10], "relu", dropout=dropout)
            remedies[name] = train(model, few, {"val_loss": unseen}, 2 * epochs, decay)
        last = {name: history["val_loss"][-1] for name, history in remedies.items()}
        last["early stopping"] = min(remedies["none"]["val_loss"])
        print("validation loss:", {name: round(value, 2) for name, value in last.items()})

        folds = KFold(3 if args.quick else 5, shuffle=True, random_state=args.seed)
        widths = (1, 4, 64)
        scores = {width: [] for width in widths}
        for width in widths:
            for inside, outside in folds.split(x.cpu()):
                a, b = (torch.tensor(rows, device=args.device) for rows in (inside, outside))
                history = train(MLP([64, width, 10], "relu"), (x[a], y[a]), {"val_loss": (x[b], y[b])}, 8)
                scores[width].append(history["val_loss"][-1])
        best = min(widths, key=lambda width: np.mean(scores[width]))
        print(
            "cross-validation:",
            {width: f"{np.mean(s):.2f} +- {np.std(s):.2f}" for width, s in scores.items()},
        )

        course.claim("fit_report names each trouble", all(r.verdict == name for name, r in reports.items()))
        helped = max(value for name, value in last.items() if name != "none") < last["none"]
        course.claim("each remedy has a lower validation loss than none", helped)
        course.claim("cross-validation chooses the widest of the three", best == max(widths))
        return course.save(plot(histories, remedies, scores), args, "generalization")


def plot(histories: dict, remedies: dict, scores: dict) -> plt.Figure:
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 7), layout="constrained")
    for axis, name in zip(axes.flat, ("model bias", "optimization", "overfitting", "mismatch"), strict=False):
        # In overfitting the validation images are held-out ones of the same kind: one curve.
        shown = [
            key for key in LABELS if key in histories[name] and (name, key) != ("overfitting", "holdout_loss")
        ]
        for key, style in zip(shown, ("-", "--", ":"), strict=False):
            curve = histories[name][key]
            axis.plot(range(1, len(curve) + 1), curve, style, lw=2, label=LABELS[key])
        axis.axhline(LOW, color="k", lw=0.8, label="counts as low")
        axis.set(xlabel="epoch", ylabel="cross-entropy [nats]", ylim=(0, 5), title=f"Diagnosed: {name}")
        axis.legend(loc="best")
    for (name, history), style in zip(remedies.items(), ("-", "--", ":"), strict=True):
        axes[1, 1].plot(range(1, len(history["val_loss"]) + 1), history["val_loss"], style, lw=2, label=name)
    stop = int(np.argmin(remedies["none"]["val_loss"]))
    axes[1, 1].plot(stop + 1, remedies["none"]["val_loss"][stop], "k*", ms=11, label="early stopping")
    axes[1, 1].set(xlabel="epoch", ylabel="validation loss [nats]", ylim=(0, None), title="Remedies")
    axes[1, 1].legend(loc="lower right", ncols=2)
    means, spreads = zip(*((np.mean(s), np.std(s)) for s in scores.values()), strict=True)
    axes[1, 2].bar([str(width) for width in scores], means, yerr=spreads, capsize=5)
    axes[1, 2].set(
        xlabel="hidden units", ylabel="validation loss [nats]", title="Cross-validation, folds' spread"
    )
    return figure


if __name__ == "__main__":
    main()
