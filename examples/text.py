"""Structured output: a text, letter by letter. A character model learns from what ships with Python, and writes lines.

Data: the reference in pydoc_data.topics, which `help()` shows. Each letter is predicted from the 16 before it: an embedding,
an MLP, and `linear_cross_entropy`, which never stores all logits.
"""

from __future__ import annotations

import math
import textwrap
from pathlib import Path
from pydoc_data.topics import topics

import course
import matplotlib.pyplot as plt
import torch

import dlgpu

PAST, WIDTH = 16, 24


class CharacterModel(torch.nn.Module):
    """The letters before, as vectors side by side, to 256 features; `table` turns them into a logit a letter."""

    def __init__(self, letters: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(letters, WIDTH)
        self.mlp = dlgpu.nn.MLP([PAST * WIDTH, 256, 256], "relu", "relu")
        self.table = torch.nn.Parameter(0.05 * torch.randn(letters, 256))

    def forward(self, before: torch.Tensor) -> torch.Tensor:
        return self.mlp(self.embedding(before).flatten(1))

    def loss(self, before: torch.Tensor, letter: torch.Tensor) -> torch.Tensor:
        return dlgpu.functional.linear_cross_entropy(self(before), self.table, letter)


def bits_of_pairs(train: torch.Tensor, unseen: torch.Tensor, letters: int) -> tuple[float, float]:
    """Bits a letter of the unseen text, by counted letters and by counted pairs of letters."""
    pairs = torch.bincount(train[:-1] * letters + train[1:], minlength=letters**2).view(letters, letters)
    pairs = pairs.double() + 0.1
    singles = pairs.sum(0) / pairs.sum()
    conditional = pairs / pairs.sum(1, keepdim=True)
    return (
        -singles[unseen[1:]].log2().mean().item(),
        -conditional[unseen[:-1], unseen[1:]].log2().mean().item(),
    )


@torch.no_grad()
def write(model: CharacterModel, alphabet: list[str], start: torch.Tensor, length: int) -> str:
    """Draws one letter after the other, a little bolder than the model is."""
    written = start.tolist()
    for _ in range(length):
        features = model(torch.tensor([written[-PAST:]], device=start.device))
        probability = dlgpu.functional.softmax(dlgpu.functional.linear(features, model.table) / 0.7, dim=-1)
        written.append(int(torch.multinomial(probability[0].cpu(), 1)))
    return "".join(alphabet[i] for i in written[PAST:])


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        text = "\n".join(
            " ".join(line.split()) for topic in sorted(topics) for line in topics[topic].splitlines()
        )
        text = "".join(letter if " " <= letter <= "~" or letter == "\n" else "?" for letter in text)
        alphabet = sorted(set(text))
        number = {letter: i for i, letter in enumerate(alphabet)}
        letters = torch.tensor([number[letter] for letter in text], device=args.device)
        train, unseen = letters[: len(letters) * 9 // 10], letters[len(letters) * 9 // 10 :]
        single, pair = bits_of_pairs(train.cpu(), unseen.cpu(), len(alphabet))

        model = CharacterModel(len(alphabet)).to(args.device)
        steps = 300 if args.quick else 2000
        optimizer = dlgpu.optim.Adam(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        windows, test = train.unfold(0, PAST + 1, 1), unseen.unfold(0, PAST + 1, 1)[::5]
        curve = {}
        for step in range(1, steps + 1):
            batch = windows[torch.randint(len(windows), (256,), device=args.device)]
            optimizer.zero_grad()
            model.loss(batch[:, :-1], batch[:, -1]).backward()
            optimizer.step()
            schedule.step()
            if step % (steps // 10) == 0:
                with torch.no_grad():
                    curve[step] = model.loss(test[:, :-1], test[:, -1]).item() / math.log(2)
        print(f"{len(text)} letters of {len(alphabet)} kinds; bits a letter on the unseen tenth:")
        print(f"counted letters {single:.2f}, counted pairs {pair:.2f}, network {curve[steps]:.2f}")
        sample = write(model, alphabet, unseen[:PAST], 150 if args.quick else 700)
        print(sample)

        course.claim(
            "the network predicts unseen text better than counted pairs do", curve[steps] < pair - 0.1
        )
        course.claim(
            "what it writes has spaces, as words do",
            0.08 < sum(sample.count(c) for c in " \n") / len(sample) < 0.35,
        )
        return course.save(plot(curve, single, pair, sample), args, "text")


def plot(curve: dict, single: float, pair: float, sample: str) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    left.plot(list(curve), list(curve.values()), "o-", label="network, 16 letters before")
    left.axhline(single, color="0.3", ls=":", label="counted letters")
    left.axhline(pair, color="C1", ls="--", label="counted pairs")
    left.set(xlabel="step", ylabel="cross-entropy on unseen text [bits a letter]", ylim=(0, None))
    left.set_title("Python's reference, letter by letter")
    left.legend(loc="lower left")
    lines = [part for line in sample.splitlines() for part in textwrap.wrap(line, 76) or [""]]
    right.text(0, 1, "\n".join(lines[:20]).replace("$", r"\$"), family="monospace", fontsize=8, va="top")
    right.set(xticks=[], yticks=[], title="What the network writes")
    right.axis("off")
    return figure


if __name__ == "__main__":
    main()
