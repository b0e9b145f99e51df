"""What a call costs besides the GPU's time: memory, what forward keeps for backward, the host's part, the first call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch

__all__ = ["first_call", "host_seconds", "peak_bytes", "saved_bytes"]

# Fewer launches than a stream queues before the host has to wait.
_QUEUED = 50


def saved_bytes(forward: Callable[[], object], inputs: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd holds from `forward` until backward: each storage once, those of `inputs` not, which are there
    anyway. Of a storage that is held in part, all counts: it cannot be freed."""
    known = {x.untyped_storage()._cdata for x in inputs}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # The storages are kept, so that none is counted under the identity of one that is gone.
        held[storage._cdata] = storage
        # Not itself: an output that holds itself is never freed.
        return tensor.detach()

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Until it is returned, the graph lives.
        result = forward()
    del result
    return sum(storage.nbytes() for identity, storage in held.items() if identity not in known)


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    """The most memory allocated during a call, above what was allocated before it, results included.

    None on a CPU, where it is not measured: NumPy's and torch's allocators do not know of each other, and what the process
    takes from the system depends on what they kept from earlier calls.
    """
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return max(0, torch.cuda.max_memory_allocated() - before)


def host_seconds(
    function: Callable[[], object],
    synchronize: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The host's part of a call: until it returns, with the GPU's queue empty before and never full."""
    taken = []
    for _ in range(_QUEUED):
        synchronize()
        start = clock()
        function()
        taken.append(clock() - start)
    synchronize()
    return sorted(taken)[len(taken) // 2]


def first_call(
    function: Callable[[], object],
    synchronize: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds of a call that was never made before, compilation included: cold if the compilers' caches are."""
    start = clock()
    function()
    synchronize()
    return clock() - start
