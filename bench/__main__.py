"""The command line: `python -m dlgpu.bench`, installed as `dlgpu-bench`.

Exit status: 0, 2 for what cannot be done (bad usage, no usable GPU, an unwritable folder, a part that failed), 3 when some
result was wrong, 130 after Ctrl-C, with the rows up to there kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .environment import UsageError, choose_device, describe, find_gpu, header
from .report import Console, Results
from .suite import SECTIONS, Context, plan, run
from .tune import add_arguments, command

__all__ = ["main"]

DEFAULT_BUDGET_S = 150.0
QUICK_BUDGET_S = 60.0
SEED = 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # One line, where argparse would print the usage too.
        raise UsageError(f"{message} (--help shows what there is)")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = _Parser(
        prog="dlgpu-bench",
        description="Compares dlgpu with torch on this machine: on a CPU the NumPy fallback's speed and the bytes that a "
        "GPU would move, on an NVIDIA GPU the fused kernels' throughput.",
        epilog="`dlgpu-bench tune linear` measures tiles instead: see `dlgpu-bench tune --help`.",
    )
    found.add_argument(
        "suite",
        nargs="?",
        choices=("quick", "gpu"),
        default="quick",
        help="gpu: only what needs a GPU; default: quick",
    )
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    found.add_argument(
        "--out",
        type=Path,
        default=Path("bench-results"),
        metavar="DIR",
        help="where results go; default: %(default)s",
    )
    found.add_argument(
        "--budget",
        type=_positive,
        metavar="SECONDS",
        help=f"about how long it may take; default: {DEFAULT_BUDGET_S:.0f}",
    )
    found.add_argument("--quick", action="store_true", help=f"the same as --budget {QUICK_BUDGET_S:.0f}")
    found.add_argument(
        "--only", action="append", choices=SECTIONS, default=[], help="only this section; may be given again"
    )
    found.add_argument(
        "--traceback", action="store_true", help="let an unexpected error end the run, with its traceback"
    )
    return found


def tune_parser() -> argparse.ArgumentParser:
    """The command line of `tune`."""
    found = _Parser(
        prog="dlgpu-bench tune",
        description="Measures the tiles there are for a layer's products on this NVIDIA GPU, and writes a table of the "
        "fastest, which goes into kernels/tuned/.",
    )
    add_arguments(found)
    return found


def _benchmark(options: argparse.Namespace) -> int:
    console = Console()
    gpu = find_gpu()
    only = tuple(options.only) or (("ceilings", "gpu") if options.suite == "gpu" else ())
    wanted = "cuda" if options.suite == "gpu" and options.device == "auto" else options.device
    device, why = choose_device(wanted, gpu)
    if device == "cpu" and (needs := {"ceilings", "gpu"} & set(only)):
        raise UsageError(
            f"--only {sorted(needs)[0]}: that section needs an NVIDIA GPU, and the device is the CPU"
        )
    environment = describe(device, why, gpu)
    console.line(header(environment))
    budget = options.budget or (QUICK_BUDGET_S if options.quick else DEFAULT_BUDGET_S)
    arguments = {
        "suite": options.suite,
        "device": options.device,
        "budget_s": budget,
        "only": list(only),
        "seed": SEED,
    }
    results = Results(options.out, arguments, environment)
    context = Context(device, SEED, console, results.rows)
    try:
        with console.progress():
            run(plan(device, only), context, results, budget, options.traceback)
    except KeyboardInterrupt:
        results.finish("interrupted")
        console.line(f"\nInterrupted: {len(results.rows)} rows are kept in {results.json_path}")
        return 130
    except UsageError:
        raise
    except BaseException:
        results.finish("failed")
        raise
    return _finish(console, results)


def _finish(console: Console, results: Results) -> int:
    kinds = [row["kind"] for row in results.rows]
    status = 3 if "wrong" in kinds else 2 if "error" in kinds else 0
    results.finish("failed" if status else "complete")
    if any(row.get("crowded") for row in results.rows):
        console.line("\nOther work kept the cores busy: in rows that say so, the times are the scheduler's.")
    console.line(f"\nResults: {results.json_path} and {results.markdown_path}")
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if given[:1] == ["tune"]:
            return command(tune_parser().parse_args(given[1:]))
        return _benchmark(parser().parse_args(given))
    except UsageError as error:
        print(f"dlgpu-bench: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away (| head). Python would complain again when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
