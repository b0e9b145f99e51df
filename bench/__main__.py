"""The command line: `python -m dlgpu.bench`, installed as `dlgpu-bench`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, as `dlgpu-bench --help` lists them."""
    try:
        import click  # noqa: F401
    except ImportError:
        print("dlgpu-bench: error: click is not installed; pip install dlgpu[bench]", file=sys.stderr)
        return 2
    from .cli import bench

    status: int = bench.main(arguments, prog_name="dlgpu-bench", standalone_mode=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
