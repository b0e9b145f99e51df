"""Hand-written Triton kernels for training fully connected networks: fused linear + activation, softmax cross-entropy and
multi-tensor Adam, with a NumPy fallback on the CPU.

>>> import torch, dlgpu
>>> layer = dlgpu.nn.Linear(64, 10, activation="relu")
>>> dlgpu.functional.cross_entropy(layer(torch.zeros(2, 64)), torch.tensor([1, 2])).shape
torch.Size([])

Importing makes no CUDA call, and works without Triton.
"""

from dlgpu import diagnostics, functional, nn, optim
from dlgpu._convert import Conversion, convert
from dlgpu._dispatch import Explanation, available_backends, debug, explain, use_backend
from dlgpu._version import __version__
from dlgpu.kernels.tuning import tune

__all__ = [
    "Conversion",
    "Explanation",
    "__version__",
    "available_backends",
    "convert",
    "debug",
    "diagnostics",
    "explain",
    "functional",
    "nn",
    "optim",
    "tune",
    "use_backend",
]
