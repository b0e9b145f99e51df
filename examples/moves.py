"""The next move on a small board as classification: nine classes, on games of noughts and crosses that this file plays.

Data: games between a perfect player, who searches to the end, and one who moves at random; every move of the perfect one is
a labelled board. A third of the boards are held out.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

import course
import matplotlib.pyplot as plt
import torch

import dlgpu

LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
# Nine fields: 1 is the player to move, -1 the other, 0 free.
Board = tuple[int, ...]


def free(board: Board) -> list[int]:
    return [i for i in range(9) if board[i] == 0]


def play(board: Board, move: int) -> Board:
    """The board after the move, as the other player sees it."""
    return tuple(-1 if i == move else -field for i, field in enumerate(board))


@functools.cache
def value(board: Board) -> int:
    """1, 0 or -1: what the player to move gets if both play perfectly."""
    if any(all(board[i] == -1 for i in line) for line in LINES):
        return -1
    return max((-value(play(board, move)) for move in free(board)), default=0)


def best_moves(board: Board) -> list[int]:
    return [move for move in free(board) if -value(play(board, move)) == value(board)]


def game(players: tuple, first: int) -> tuple[int, list[tuple[Board, int]]]:
    """(the winner, 0 or 1, or -1 for none; player 0's boards and moves)."""
    board, turn, record = (0,) * 9, first, []
    while free(board):
        move = players[turn](board)
        if turn == 0:
            record.append((board, move))
        board = play(board, move)
        if any(all(board[i] == -1 for i in line) for line in LINES):
            return turn, record
        turn = 1 - turn
    return -1, record


def encode(boards: list[Board], device: str) -> torch.Tensor:
    """18 features: own fields, then the other's."""
    fields = torch.tensor(boards)
    return torch.cat([fields == 1, fields == -1], 1).float().to(device)


@torch.no_grad()
def choose(model: torch.nn.Module, boards: list[Board], device: str) -> list[int]:
    """The free field with the largest logit."""
    taken = torch.tensor(boards, device=device) != 0
    return model(encode(boards, device)).masked_fill(taken, -torch.inf).argmax(1).tolist()


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        rng = random.Random(args.seed)
        anyhow = lambda board: rng.choice(free(board))  # noqa: E731
        games, epochs = (1500, 15) if args.quick else (3000, 40)
        # The first of the best moves, so that a board has one label.
        records = [game((lambda b: best_moves(b)[0], anyhow), i % 2)[1] for i in range(games)]
        labelled = sorted(dict(pair for record in records for pair in record).items())
        rng.shuffle(labelled)
        train, unseen = labelled[len(labelled) // 3 :], [board for board, _ in labelled[: len(labelled) // 3]]
        x = encode([board for board, _ in train], args.device)
        y = torch.tensor([move for _, move in train], device=args.device)

        model = dlgpu.nn.MLP([18, 128, 128, 9], "relu").to(args.device)
        optimizer = dlgpu.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        curves = {"boards of the training games": [], "unseen boards": []}
        for _ in range(epochs):
            for rows in torch.randperm(len(x), device=x.device).split(32):
                optimizer.zero_grad()
                dlgpu.functional.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
            for curve, boards in zip(curves.values(), ([board for board, _ in train], unseen), strict=True):
                moves = choose(model, boards, args.device)
                curve.append(
                    sum(m in best_moves(b) for m, b in zip(moves, boards, strict=True)) / len(boards)
                )
        chance = sum(len(best_moves(board)) / len(free(board)) for board in unseen) / len(unseen)
        found = curves["unseen boards"][-1]
        print(f"{len(train)} boards to learn from, {len(unseen)} unseen")
        print(f"best move on unseen boards {found:.1%}, at random {chance:.1%}")

        network = lambda board: choose(model, [board], args.device)[0]  # noqa: E731
        rounds, results = 100 if args.quick else 300, {}
        for name, player in (("network", network), ("random", anyhow)):
            winners = [game((player, anyhow), i % 2)[0] for i in range(rounds)]
            results[name] = [100 * winners.count(who) / rounds for who in (0, -1, 1)]
            print(f"{name} against random: {results[name]} % won, drawn, lost")
        course.claim(
            "on unseen boards the best move is found far more often than at random",
            found > chance + 0.15,
        )
        course.claim(
            "the network loses a third as often as a random player, or less",
            results["network"][2] < results["random"][2] / 3,
        )
        return course.save(plot(curves, chance, results), args, "moves")


def plot(curves: dict, chance: float, results: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=True):
        left.plot(range(1, len(curve) + 1), [100 * share for share in curve], style, lw=2, label=name)
    left.axhline(100 * chance, color="0.3", ls=":", label="a free field at random")
    left.set(
        xlabel="epoch",
        ylabel="best move found [% of boards]",
        ylim=(0, 102),
        title="Noughts and crosses as classification",
    )
    left.legend(loc="lower right")
    start = [0.0] * len(results)
    # Colours that differ in grey too.
    for i, (outcome, colour) in enumerate((("won", "C0"), ("drawn", "C4"), ("lost", "0.85"))):
        shares = [result[i] for result in results.values()]
        bars = right.barh(list(results), shares, left=start, label=outcome, color=colour, edgecolor="k")
        labels = [f"{share:.0f}%" if share >= 4 else "" for share in shares]
        right.bar_label(bars, labels, label_type="center", color="k" if i else "w", fontweight="bold")
        start = [a + b for a, b in zip(start, shares, strict=True)]
    right.set(xlabel="games against a random player [%]", title="Outcome, by who plays")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    return figure


if __name__ == "__main__":
    main()
