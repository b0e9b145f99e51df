"""Speech: which vowel is spoken in each frame, with neighbouring frames as features.

Data: synthetic. Vowels are synthesized by their formants: pulses at the pitch of a voice through resonances at the averages
of five American English vowels (Peterson and Barney, 1952), with noise. A frame of 25 ms starts every 10 ms.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import course
import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.signal import lfilter

import dlgpu

RATE, FRAME, HOP = 8000, 200, 80
# Its standard deviation, of the voice's.
NOISE = 2.0
# First to third formant of men's voices, Hz.
VOWELS = {
    "i": (270, 2290, 3010),
    "e": (530, 1840, 2480),
    "a": (730, 1090, 2440),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
}
CONTEXT = (0, 1, 2, 4, 8)


def speak(rng: np.random.Generator, vowels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log spectrum of each frame, vowel of each frame) of vowels spoken one after the other by one voice."""
    pitch, tract = rng.uniform(90, 220), rng.uniform(0.9, 1.15)
    sound, spoken = [], []
    state = [np.zeros(2) for _ in range(3)]
    for vowel in vowels:
        samples = int(rng.uniform(0.12, 0.25) * RATE)
        pulses = np.diff(np.floor(np.arange(samples + 1) * pitch * rng.uniform(0.95, 1.05) / RATE))
        for i, formant in enumerate(list(VOWELS.values())[vowel]):
            # A resonance: two poles at the formant, 80 to 160 Hz wide.
            radius, angle = np.exp(-np.pi * (80 + 40 * i) / RATE), 2 * np.pi * formant * tract / RATE
            poles = [1, -2 * radius * np.cos(angle), radius**2]
            pulses, state[i] = lfilter([sum(poles)], poles, pulses, zi=state[i])
        # Equally loud, so that loudness does not tell them apart.
        sound.append(pulses / pulses.std())
        spoken.append(np.full(samples, vowel))
    wave = np.concatenate(sound)
    wave += NOISE * wave.std() * rng.standard_normal(len(wave))
    starts = np.arange(0, len(wave) - FRAME, HOP)
    frames = wave[starts[:, None] + np.arange(FRAME)] * np.hamming(FRAME)
    power = np.abs(np.fft.rfft(frames, 256)) ** 2
    # 32 bands of 125 Hz.
    bands = np.log(power[:, :128].reshape(len(power), 32, 4).mean(-1))
    return bands - bands.mean(), np.concatenate(spoken)[starts + FRAME // 2]


def corpus(rng: np.random.Generator, utterances: int) -> list[tuple[np.ndarray, np.ndarray]]:
    return [speak(rng, rng.integers(len(VOWELS), size=8)) for _ in range(utterances)]


def features(spoken: list, context: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Each frame with `context` frames on both sides, the ends repeated."""
    rows = [
        np.lib.stride_tricks.sliding_window_view(
            np.pad(bands, ((context, context), (0, 0)), "edge"), 2 * context + 1, 0
        )
        for bands, _ in spoken
    ]
    x = np.concatenate(rows).reshape(-1, 32 * (2 * context + 1)).astype(np.float32)
    y = np.concatenate([vowels for _, vowels in spoken])
    return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)


def train(x: torch.Tensor, y: torch.Tensor, epochs: int) -> torch.nn.Module:
    model = dlgpu.nn.MLP([x.shape[1], 64, len(VOWELS)], "relu").to(x.device)
    optimizer = dlgpu.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), device=x.device).split(128):
            optimizer.zero_grad()
            dlgpu.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model


def main(argv: list[str] | None = None) -> Path:
    with course.lesson(__doc__, argv) as args:
        rng = np.random.default_rng(args.seed)
        contexts, size, epochs = ((0, 4), 40, 6) if args.quick else (CONTEXT, 100, 10)
        spoken, unseen = corpus(rng, size), corpus(rng, 40)
        accuracy = {}
        for context in contexts:
            model = train(*features(spoken, context, args.device), epochs)
            x, y = features(unseen, context, args.device)
            with torch.no_grad():
                accuracy[context] = (model(x).argmax(1) == y).double().mean().item()
            print(f"{2 * context + 1:2} frames: {accuracy[context]:.1%} of {len(y)} unseen frames right")
        course.claim("one frame is far better than chance, 20%", accuracy[0] > 0.5)
        course.claim(
            "four neighbours on each side take away 40% of the errors",
            1 - accuracy[4] < 0.6 * (1 - accuracy[0]),
        )
        return course.save(plot(unseen[0], accuracy), args, "speech")


def plot(utterance: tuple[np.ndarray, np.ndarray], accuracy: dict) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[3, 2], layout="constrained")
    bands, vowels = utterance
    shown = left.imshow(
        bands.T, origin="lower", aspect="auto", cmap="cividis", extent=(0, len(bands) * HOP / RATE, 0, 4)
    )
    figure.colorbar(shown, ax=left, label="log power")
    left.grid(False)
    edges = np.flatnonzero(np.diff(vowels, prepend=-1, append=-1))
    for start, end in itertools.pairwise(edges):
        left.axvline(start * HOP / RATE, color="w", lw=1)
        left.text((start + end) / 2 * HOP / RATE, 4.08, list(VOWELS)[vowels[start]], ha="center")
    left.set(xlabel="time [s]", ylabel="frequency [kHz]")
    left.set_title("Synthetic vowels, one voice", pad=18)
    right.plot([2 * c + 1 for c in accuracy], [100 * a for a in accuracy.values()], "o-")
    right.set(
        xlabel="frames seen at once", ylabel="unseen frames right [%]", title="Frames by vowel, unseen voices"
    )
    return figure


if __name__ == "__main__":
    main()
