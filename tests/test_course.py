"""The course's classifier on real data: scikit-learn's handwritten digits, 64-256-256-10, batches of 64, Adam, a fifth of the
samples held out."""

import functools
import itertools

import pytest
import torch

import dlgpu
from tolerance import assert_accurate

BATCH = 64
SEEDS = range(5)


@functools.cache
def digits():
    """Training and test images as float64 [n, 64] in [0, 1], and labels."""
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.model_selection import train_test_split

    images, labels = datasets.load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.2, stratify=labels, random_state=0)
    return tuple(torch.from_numpy(part) for part in split)


def classifier(library, dtype, device):
    """The network, its loss and its optimizer, from torch or from dlgpu; the same numbers after the same seed."""
    sizes = [64, 256, 256, 10]
    layers = []
    for i, o in itertools.pairwise(sizes):
        last = o == 10
        if library is dlgpu:
            layers.append(dlgpu.nn.Linear(i, o, activation=None if last else "relu"))
        else:
            layers += [torch.nn.Linear(i, o), *([] if last else [torch.nn.ReLU()])]
    model = torch.nn.Sequential(*layers).to(device, dtype)
    return model, library.nn.CrossEntropyLoss(), library.optim.Adam(model.parameters())


def train(library, seed, device, dtype=torch.float32, epochs=30, steps=None):
    """(losses of the first `steps` steps, accuracy on the held-out samples); all steps without a number, and the accuracy of
    whole runs only."""
    torch.manual_seed(seed)
    model, criterion, optimizer = classifier(library, dtype, device)
    x, x_test, y, y_test = (t.to(device, dtype if t.is_floating_point() else None) for t in digits())
    order = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(epochs):
        # The last batch of an epoch is a partial one, of 29.
        for rows in torch.randperm(len(x), generator=order).split(BATCH):
            if len(losses) == steps:
                break
            optimizer.zero_grad()
            loss = criterion(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    if steps is not None:
        return torch.stack(losses), None
    with torch.no_grad():
        correct = (model(x_test).argmax(1) == y_test).double().mean().item()
    return torch.stack(losses), correct


def test_held_out_accuracy(device):
    """At least 96.5%, and within half a point of torch trained alike: the mean of five seeds."""
    ours, theirs = (sum(train(lib, seed, device)[1] for seed in SEEDS) / len(SEEDS) for lib in (dlgpu, torch))
    assert ours >= 0.965
    assert abs(ours - theirs) <= 0.005


def test_the_loss_follows_float64(device):
    """Over the first 100 steps float32 is no further from float64's curve than twice torch's own float32 is."""
    runs = [(dlgpu, torch.float32), (torch, torch.float64), (torch, torch.float32)]
    found, truth, expected = (
        torch.cat([train(lib, seed, device, dtype, steps=100)[0] for seed in SEEDS]) for lib, dtype in runs
    )
    assert len(found) == 500
    assert_accurate(found, truth, expected)


def test_the_kernels_give_the_same_losses(device, launches):
    """Three steps by the kernels themselves, the optimizer's too."""
    with dlgpu.use_backend("triton"):
        found, _ = train(dlgpu, 0, device, steps=3)
    truth, expected = (train(torch, 0, device, dtype, steps=3)[0] for dtype in (torch.float64, torch.float32))
    assert_accurate(found, truth, expected)
    expected_kernels = {"_linear_kernel", "_cross_entropy_bwd_kernel", "_multi_tensor_kernel"}
    assert expected_kernels <= {name for name, *_ in launches}


@pytest.mark.slow
def test_ten_seeds_of_accuracy(device):
    """The same over other seeds, and each run by itself no worse than two points below torch's."""
    for seed in range(100, 110):
        ours, theirs = (train(lib, seed, device)[1] for lib in (dlgpu, torch))
        assert ours >= max(0.95, theirs - 0.02)
