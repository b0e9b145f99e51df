"""Linear regression, y = b + w x: tomorrow's births from those of the last 1, 7, 28 or 56 days.

Data: live births a day in the United States, 2000 to 2003, which have a strong weekly rhythm (data/us_births.csv names its
source). The model is fitted to 2000 to 2002; 2003 is the year it has not seen.
"""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import course
import matplotlib.pyplot as plt
import numpy as np
import torch

import dlgpu

DAYS = (1, 7, 28, 56)
FILE = Path(__file__).parent / "data" / "us_births.csv"


def load() -> tuple[np.ndarray, np.ndarray]:
    """Dates and births a day."""
    with FILE.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    dates = np.array([row["date"] for row in rows], dtype="datetime64[D]")
    return dates, np.array([float(row["births"]) for row in rows], dtype=np.float32)


def fit(x: torch.Tensor, y: torch.Tensor, steps: int) -> torch.nn.Module:
    """The line with the least squared error, found by Adam with all rows in each step and a falling learning rate."""
    model = dlgpu.nn.Linear(x.shape[1], 1).to(x.device)
    optimizer = dlgpu.optim.Adam(model.parameters(), lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        dlgpu.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        steps = 600 if args.quick else 4000
        dates, births = load()
        mean, spread = births[dates < np.datetime64("2003-01-01")].mean(), births.std()
        scaled = torch.from_numpy((births - mean) / spread).to(args.device)
        # The same days are predicted whatever the number of past days is.
        first = max(DAYS)
        y = scaled[first:, None]
        train = torch.from_numpy(dates[first:] < np.datetime64("2003-01-01")).to(args.device)
        errors, predictions = {}, {}
        for days in DAYS:
            # Row i holds the births of the `days` days before day first + i.
            x = scaled.unfold(0, days, 1)[first - days : -1]
            model = fit(x[train], y[train], steps)
            with torch.no_grad():
                predicted = model(x)
            off = (predicted - y)[:, 0] * float(spread)
            errors[days] = [off[rows].square().mean().sqrt().item() for rows in (train, ~train)]
            predictions[days] = predicted[:, 0].cpu().numpy() * spread + mean
            print(f"{days:3} days: error {errors[days][0]:6.0f} in 2000-2002, {errors[days][1]:6.0f} in 2003")

        course.claim("a week of past days halves the error of one day", errors[7][1] < 0.5 * errors[1][1])
        course.claim(
            "more days always fit the training years better",
            all(errors[a][0] > errors[b][0] for a, b in itertools.pairwise(DAYS)),
        )
        gain = [errors[a][1] - errors[b][1] for a, b in itertools.pairwise(DAYS)]
        course.claim(
            "in the unseen year, all that a second month adds is a twentieth of what the first week did",
            gain[2] < 0.05 * gain[0],
        )
        return course.save(
            plot(dates[first:], births[first:], predictions, errors), args, "linear_regression"
        )


def plot(dates: np.ndarray, births: np.ndarray, predictions: dict, errors: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[2, 3], layout="constrained")
    at = np.arange(len(DAYS))
    for shift, column, label in ((-0.2, 0, "2000-2002, trained on"), (0.2, 1, "2003, unseen")):
        heights = [errors[days][column] for days in DAYS]
        bars = left.bar(at + shift, heights, 0.4, label=label, color=("C0", "C4")[column])
        left.bar_label(bars, fmt="%.0f", fontsize=7)
    left.set(
        xticks=at,
        xticklabels=DAYS,
        xlabel="past days used as features",
        ylabel="root mean squared error [births]",
    )
    left.set_title("Error by number of features")
    left.legend()
    weeks = (dates >= np.datetime64("2003-03-01")) & (dates < np.datetime64("2003-04-12"))
    right.plot(dates[weeks], births[weeks] / 1000, "k-", lw=2.5, alpha=0.35, label="births")
    for days, style in ((1, ":"), (28, "--")):
        right.plot(
            dates[weeks],
            predictions[days][weeks] / 1000,
            style,
            label=f"predicted from {days} day" + "s" * (days > 1),
        )
    right.set(xlabel="day of 2003", ylabel="births a day [thousands]", title="Six weeks of the unseen year")
    right.xaxis.set_major_formatter(plt.matplotlib.dates.DateFormatter("%d %b"))
    right.set_ylim(top=16)
    right.legend(loc="upper center", ncols=3)
    return figure


if __name__ == "__main__":
    main()
