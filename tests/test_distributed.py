"""DistributedDataParallel on this machine alone: two processes give what one gives; gradients accumulate under no_sync."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlgpu
from distributed_worker import network, train
from tolerance import assert_same_bits

WORLD = 2
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each process found."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    folder = tmp_path_factory.mktemp("distributed")
    environment = {
        **os.environ,
        # Nothing leaves the machine.
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "distributed_worker.py"), str(rank), str(WORLD), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(WORLD)
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, "\n".join(outputs)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("how", ["whole", "accumulated"])
def test_two_processes_give_what_one_gives(results, how):
    """Bit for bit alike among themselves; to rounding what one process makes of the whole batch."""
    assert_same_bits(results[0][how], results[1][how])
    with dlgpu.use_backend("fallback"):
        alone = train(network(), 0, 1, accumulate=False)
        other = train(network(), 0, WORLD, accumulate=False)
    for found, expected, half in zip(results[0][how], alone, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(found, half, rtol=1e-3)


def test_dtensors_are_refused(results):
    linear, relu, step = results[0]["refusals"]
    assert "dlgpu.linear.default got mixed torch.Tensor and DTensor" in linear
    assert "Operator dlgpu.activation.default does not have a sharding strategy registered" in relu
    assert "SGD: a parameter (DTensor on cpu) has no memory to write to" in step
