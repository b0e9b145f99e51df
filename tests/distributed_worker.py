"""One of several processes of tests/test_distributed.py: `python distributed_worker.py RANK WORLD FOLDER`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import dlgpu

STEPS, BATCH, MICRO = 3, 16, 2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        dlgpu.nn.MLP([8, 12, 6], activation="gelu"),
        dlgpu.nn.LayerNorm(6),
        dlgpu.nn.SwiGLU(6, 4),
        dlgpu.nn.Linear(6, 3, activation="tanh"),
    ).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(STEPS, BATCH, 8, generator=generator).double(), torch.arange(BATCH) % 3


def train(model: nn.Module, rank: int, world: int, accumulate: bool) -> list[torch.Tensor]:
    """Steps on every world-th sample; with `accumulate` in micro-batches, of which the last alone synchronizes."""
    optimizer = dlgpu.optim.AdamW(model.parameters(), lr=0.1, max_grad_norm=0.5)
    xs, t = data()
    t = t[rank::world]
    for x in xs[:, rank::world]:
        optimizer.zero_grad()
        parts = list(zip(x.chunk(MICRO), t.chunk(MICRO), strict=True)) if accumulate else [(x, t)]
        for part, classes in parts[:-1]:
            with model.no_sync():
                (dlgpu.functional.cross_entropy(model(part), classes) / len(parts)).backward()
        part, classes = parts[-1]
        (dlgpu.functional.cross_entropy(model(part), classes) / len(parts)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def refusals() -> list[str]:
    """What DTensors are told."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    w = DTensor.from_local(torch.ones(3, 8), mesh, [Replicate()])
    parameter = nn.Parameter(w)
    parameter.grad = w.clone()
    found = []
    for call in (
        lambda: dlgpu.functional.linear(torch.ones(2, 8), w),
        lambda: dlgpu.functional.relu(w),
        lambda: dlgpu.optim.SGD([parameter], lr=0.1).step(),
    ):
        try:
            call()
            found.append("ran")
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}")
    return found


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    with dlgpu.use_backend("fallback"):
        found = {
            "whole": train(DistributedDataParallel(network()), rank, world, accumulate=False),
            "accumulated": train(DistributedDataParallel(network()), rank, world, accumulate=True),
            "refusals": refusals(),
        }
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
