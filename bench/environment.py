"""The machine and the software: what a result needs for it to be read later, and which GPU there is.

Nothing that tells whose machine it is: no host name, user, path, remote or environment variable.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dlgpu
from dlgpu._version import __version__
from dlgpu.kernels import _triton

__all__ = [
    "Gpu",
    "Probes",
    "Others",
    "UsageError",
    "crowded",
    "choose_device",
    "describe",
    "find_gpu",
    "header",
    "one_line",
]

_TOOL_TIMEOUT_S = 20
# Not from this file: a checkout has bench/ beside the package, and a link to it inside.
PACKAGE = Path(dlgpu.__file__).resolve().parent
# What a result depends on, in the package.
_SOURCES = (
    "kernels",
    "kernels/tuned",
    "fallback",
    "ops",
    "_dispatch.py",
    "functional.py",
    "nn.py",
    "optim.py",
)


class UsageError(Exception):
    """What the user asked for cannot be done: one line, exit status 2."""


def one_line(error: BaseException) -> str:
    """An error of somebody else's: its type, and the first line of what it says."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:500]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, as far as it could be asked. `cuda` is the newest CUDA version that the driver runs.

    problem, fix: why torch cannot use it and what to do; empty where it can.
    """

    name: str
    driver: str = ""
    cuda: str = ""
    problem: str = ""
    fix: str = ""

    def __str__(self) -> str:
        details = [f"driver {self.driver}" if self.driver else "", f"CUDA {self.cuda}" if self.cuda else ""]
        known = ", ".join(filter(None, details))
        return f"{self.name} ({known})" if known else self.name


def _torch_sees() -> str | None:
    with warnings.catch_warnings():
        # torch warns of what is said here in other words.
        warnings.simplefilter("ignore")
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _from_libcuda() -> dict[str, str]:
    """What the driver's own library says; "error" where it finds no device."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return {}
    found: dict[str, str] = {}
    version, count, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(256)
    if cuda.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
        found["cuda"] = f"{version.value // 1000}.{version.value % 1000 // 10}"
    error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
    if error:
        return {**found, "error": f"cuInit gives error {error}"}
    if count.value and cuda.cuDeviceGetName(name, len(name), 0) == 0:
        found["name"] = name.value.decode(errors="replace")
    return found


def _from_nvidia_smi() -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    outputs = []
    for arguments in (["--query-gpu=name,driver_version", "--format=csv,noheader"], []):
        try:
            done = subprocess.run(
                [tool, *arguments], capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return {}
        outputs.append(done.stdout if done.returncode == 0 else "")
    name, _, driver = (outputs[0].splitlines() or [""])[0].partition(",")
    found = {"name": name.strip(), "driver": driver.strip()}
    if match := re.search(r"CUDA (?:UMD )?Version:\s*([\d.]+)", outputs[1]):
        found["cuda"] = match[1]
    return {key: value for key, value in found.items() if value}


def _from_proc() -> dict[str, str]:
    """The kernel module's own account: there, even where no tool is installed."""
    root = Path("/proc/driver/nvidia")
    found = {}
    try:
        if match := re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)\s", (root / "version").read_text()):
            found["driver"] = match[1]
        for card in sorted((root / "gpus").iterdir()):
            if match := re.search(r"^Model:\s*(.+)$", (card / "information").read_text(), re.MULTILINE):
                found.setdefault("name", match[1].strip())
    except OSError:
        pass
    return found


@dataclasses.dataclass(frozen=True)
class Probes:
    """Where `find_gpu` asks; tests put their own answers here."""

    torch_sees: Callable[[], str | None] = _torch_sees
    torch_version: str = torch.__version__
    torch_cuda: str | None = torch.version.cuda
    nvidia_smi: Callable[[], dict[str, str]] = _from_nvidia_smi
    proc: Callable[[], dict[str, str]] = _from_proc
    libcuda: Callable[[], dict[str, str]] = _from_libcuda
    visible: str | None = dataclasses.field(default_factory=lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))


def find_gpu(probes: Probes | None = None) -> Gpu | None:
    """The NVIDIA GPU of this machine, with what keeps torch from using it; None where there is none, or where
    CUDA_VISIBLE_DEVICES hides them all."""
    probes = probes or Probes()
    name = probes.torch_sees()
    if name is None and probes.visible is not None and probes.visible.strip() in ("", "-1"):
        return None
    library = {} if name else probes.libcuda()
    found = {**library, **probes.proc(), **probes.nvidia_smi()}
    if name:
        return Gpu(name, found.get("driver", ""), found.get("cuda", ""))
    # A library or a module without a device is a driver without a card.
    if "name" not in found:
        return None
    gpu = Gpu(found["name"], found.get("driver", ""), found.get("cuda", ""))
    problem, fix = _diagnose(gpu, probes, library.get("error", ""))
    return dataclasses.replace(gpu, problem=problem, fix=fix)


# Builds that torch publishes, newest first, and the CUDA version that each needs of the driver.
_WHEELS = (("cu130", (13, 0)), ("cu128", (12, 8)), ("cu126", (12, 6)))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _diagnose(gpu: Gpu, probes: Probes, error: str) -> tuple[str, str]:
    if probes.torch_cuda is None:
        # The newest wheels that this driver runs, of those that torch publishes.
        wheel = next((name for name, needs in _WHEELS if _version(gpu.cuda) >= needs), "")
        build = f"'s {wheel} build" if wheel else ""
        version = probes.torch_version.partition("+")[0]
        return (
            f"torch {probes.torch_version} is a build without CUDA",
            f"install one with CUDA: torch {version}{build}, as pytorch.org shows",
        )
    # Minor versions of one major version go together.
    if gpu.cuda and _version(gpu.cuda)[:1] < _version(probes.torch_cuda)[:1]:
        return (
            f"torch {probes.torch_version} needs a driver for CUDA {probes.torch_cuda}, this one ends at {gpu.cuda}",
            "update the NVIDIA driver, or install a torch built for the CUDA version that it runs",
        )
    return (
        f"torch {probes.torch_version} cannot start CUDA" + (f" ({error})" if error else ""),
        "check that nvidia-smi works as this user and, in a container, that it was started with its GPUs (--gpus all)",
    )


def choose_device(wanted: str, gpu: Gpu | None) -> tuple[str, str]:
    """(device, why) for "auto", "cpu" or "cuda".

    Raises:
        UsageError: a GPU that torch cannot use, unless the CPU was asked for; no GPU where one was asked for.
    """
    if wanted == "cpu":
        return "cpu", "as asked" + (f"; {gpu} is left alone" if gpu else "")
    if gpu is None:
        if wanted == "cuda":
            raise UsageError("--device cuda: no NVIDIA GPU was found here")
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset").strip() in ("", "-1")
        return "cpu", "CUDA_VISIBLE_DEVICES hides all GPUs" if hidden else "no NVIDIA GPU here"
    if gpu.problem:
        raise UsageError(f"found {gpu}, but {gpu.problem}; {gpu.fix}; or measure the CPU with --device cpu")
    return "cuda", str(gpu)


@functools.cache
def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.machine()


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Others:
    """How many cores others, other machines on the same host included, keep busy while it lives."""

    def __init__(self) -> None:
        self._at, self._busy, self._own = time.monotonic(), self._jiffies(), time.process_time()

    @staticmethod
    def _jiffies() -> int | None:
        try:
            fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        # All but idle and waiting for disks; nice, interrupts and stolen time included.
        return sum(int(field) for i, field in enumerate(fields) if i not in (3, 4))

    def cores(self) -> float | None:
        """Since it was made; None where the system does not say."""
        now, seconds = self._jiffies(), time.monotonic() - self._at
        if now is None or self._busy is None or seconds <= 0:
            return None
        total = (now - self._busy) / os.sysconf("SC_CLK_TCK")
        return max(0.0, (total - (time.process_time() - self._own)) / seconds)


def crowded(others: float | None) -> bool:
    """Whether others leave fewer cores than torch has threads: then a parallel loop waits for a thread that does not run,
    for milliseconds, and what is timed is the scheduler."""
    return others is not None and others > (os.cpu_count() or 1) - torch.get_num_threads() + 0.25


def _blas_threads() -> int | None:
    """Threads of NumPy's BLAS, where threadpoolctl is there to ask."""
    try:
        import threadpoolctl
    except ImportError:
        return None
    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    found: list[int] = [pool["num_threads"] for pool in pools if "numpy" in pool["filepath"]]
    return found[0] if found else None


def _git(*arguments: str) -> str | None:
    tool = shutil.which("git")
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, "-C", str(PACKAGE.parent), *arguments],
            capture_output=True,
            text=True,
            timeout=_TOOL_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit() -> dict[str, Any] | None:
    """The checkout that the package is run from; None for an installed copy, which may lie in anybody's checkout."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != PACKAGE.parent or not _git("ls-files", "dlgpu/__init__.py"):
        return None
    return {"commit": _git("rev-parse", "HEAD"), "modified": bool(_git("status", "--porcelain"))}


def _source_hash() -> str:
    """One hash over what computes, tables of tiles too: two results with the same one ran the same code."""
    digest = hashlib.sha256()
    for source in _SOURCES:
        path = PACKAGE / source
        for file in sorted([*path.glob("*.py"), *path.glob("*.json")]) if path.is_dir() else [path]:
            digest.update(f"{source}/{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def describe(device: str, why: str, gpu: Gpu | None) -> dict[str, Any]:
    """The `environment` of a result file."""
    return {
        "dlgpu": __version__,
        "source_hash": _source_hash(),
        "git": _commit(),
        "device": device,
        "why": why,
        "gpu": None if gpu is None else {"name": gpu.name, "driver": gpu.driver, "cuda": gpu.cuda},
        "cpu": _cpu_model(),
        "cores": cores(),
        "threads": {"torch": torch.get_num_threads(), "numpy": _blas_threads()},
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _triton.triton.__version__ if _triton.AVAILABLE else None,
        "numpy": np.__version__,
    }


def header(environment: dict[str, Any]) -> str:
    """One line for people."""
    threads = environment["threads"]
    return (
        f"dlgpu {environment['dlgpu']} on {environment['device']} ({environment['why']}), "
        f"torch {environment['torch']}, triton {environment['triton'] or 'absent'}, numpy {environment['numpy']}, "
        f"{threads['torch']} torch and {threads['numpy'] or '?'} NumPy threads on {environment['cores']} cores"
    )
