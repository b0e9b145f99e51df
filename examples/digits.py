"""Image recognition: handwritten digits by softmax, with batches from one image to all: updates, time and accuracy.

Data: scikit-learn's 1,797 scans of 8 x 8 pixels, a fifth of them held out.
"""

from __future__ import annotations

import time
from pathlib import Path

import course
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import dlgpu

FULL = 1437
BATCHES = (1, 8, 64, 512, FULL)


def train(
    data: tuple[torch.Tensor, ...], batch: int, epochs: int, seed: int
) -> tuple[list[float], list[float]]:
    """(accuracy on the held-out images after each epoch, seconds each epoch took)."""
    x, unseen, y, unseen_y = data
    torch.manual_seed(seed)
    model = dlgpu.nn.MLP([64, 64, 10], "relu").to(x.device)
    loss_fn, optimizer = dlgpu.nn.CrossEntropyLoss(), dlgpu.optim.Adam(model.parameters(), lr=2e-3)
    accuracy, seconds = [], []
    for _ in range(epochs):
        start = time.perf_counter()
        for rows in torch.randperm(len(x), device=x.device).split(batch):
            optimizer.zero_grad()
            loss_fn(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            # Reading the number waits for the device, so the epoch's time is whole.
            accuracy.append((model(unseen).argmax(1) == unseen_y).double().mean().item())
        seconds.append(time.perf_counter() - start)
    return accuracy, seconds


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(
            pixels / 16, labels, train_size=FULL, stratify=labels, random_state=args.seed
        )
        x, unseen = (torch.tensor(part, dtype=torch.float32, device=args.device) for part in parts[:2])
        y, unseen_y = (torch.tensor(part, device=args.device) for part in parts[2:])
        batches, epochs = ((1, 64, FULL), 2) if args.quick else (BATCHES, 10)
        found = {batch: train((x, unseen, y, unseen_y), batch, epochs, args.seed) for batch in batches}
        middle = {batch: sorted(seconds)[epochs // 2] for batch, (_, seconds) in found.items()}
        for batch, (accuracy, _) in found.items():
            updates = -(-FULL // batch)
            print(
                f"batch {batch:4}: {updates:4} updates an epoch, {middle[batch]:.3f} s, accuracy {accuracy[-1]:.3f}"
            )
        course.claim(
            "an epoch of single images takes 10 times as long as one of all", middle[1] > 10 * middle[FULL]
        )
        course.claim(
            "after as many epochs, batches of 64 are far ahead of the full batch",
            found[64][0][-1] > found[FULL][0][-1] + 0.1,
        )
        if not args.quick:
            course.claim("batches of 64 recognize 90% of unseen digits", found[64][0][-1] > 0.9)
        return course.save(plot(found, middle), args, "digits")


def plot(found: dict, middle: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    sizes = list(found)
    left.plot(sizes, [1000 * middle[batch] for batch in sizes], "o-", label="time an epoch [ms]")
    left.plot(sizes, [-(-FULL // batch) for batch in sizes], "s--", label="updates an epoch")
    left.set(xscale="log", yscale="log", xlabel="batch size [images]", ylabel="milliseconds, or updates")
    left.set(title="What an epoch of 1,437 images costs", xticks=sizes, xticklabels=sizes)
    left.minorticks_off()
    left.legend()
    styles = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
    for (batch, (accuracy, _)), style in zip(found.items(), styles, strict=False):
        name = f"{batch}, full" if batch == FULL else str(batch)
        right.plot(range(1, len(accuracy) + 1), accuracy, linestyle=style, lw=2, label=f"batch {name}")
    right.set(
        xlabel="epoch", ylabel="accuracy on held-out images", ylim=(0, 1.02), title="Accuracy by batch size"
    )
    right.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    main()
