"""What a call costs besides the GPU's time: memory, what forward keeps for backward, the host's part, the first call."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar
from unittest import mock

import torch

__all__ = ["first_call", "fresh_compilers", "host_seconds", "peak_bytes", "saved_bytes"]

Call = TypeVar("Call", bound=Callable[[], object])

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
    bind: Callable[[], Call],
    synchronize: Callable[[], object],
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Call, float]:
    """What `bind` makes, and the seconds that this and its first call take: where backward is timed, binding runs forward,
    and compiles it. Under `fresh_compilers` that is cold compile time."""
    start = clock()
    bound = bind()
    bound()
    synchronize()
    return bound, clock() - start


@contextlib.contextmanager
def fresh_compilers() -> Iterator[None]:
    """Triton's and torch.compile's caches, on disk and in this process, are empty; those on disk come back afterwards. What
    was compiled before stays in use where it is held, and is compiled again where it is looked up."""
    import torch._dynamo
    from torch._inductor.utils import clear_caches

    kernels = [known for known in gc.get_objects() if type(known).__name__ == "JITFunction"]
    for kernel in kernels:
        # Compiled kernels by device; also those of other libraries.
        getattr(kernel, "device_caches", {}).clear()
    torch._dynamo.reset()
    with tempfile.TemporaryDirectory(prefix="dlgpu-bench-", ignore_cleanup_errors=True) as folder:
        places = {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": os.path.join(folder, "triton")}
        clear_caches()
        try:
            with mock.patch.dict(os.environ, places):
                yield
        finally:
            # They hold the names of files that are about to go.
            clear_caches()
