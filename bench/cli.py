"""The commands of `dlgpu-bench`: a table of names, each imported when it is called, and one line for every error.

A command is a `click.Command` in a module of its own, called `command` there unless the table names it. It returns its exit
status; None is 0. What it cannot do it raises as `UsageError`: one line, status 2.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from .environment import UsageError

__all__ = ["COMMANDS", "EXIT_STATUS", "Amount", "Names", "bench", "unknown"]

# Name -> (module, or module:attribute; what it does). Reading order.
COMMANDS: dict[str, tuple[str, str]] = {
    "quick": ("suite", "What this machine can tell in 3 minutes; the same as no command."),
    "run": ("run", "Ops, shapes and rivals of your choice, or your own model (--module)."),
    "model": ("model", "What a GPU could do at most, from counted bytes; no GPU needed."),
    "gpu": ("gpu_run", "All that needs an NVIDIA GPU: tests, checkers, tuned tiles, timings, counters."),
    "show": ("show", "A results file as a table, Markdown, CSV or one HTML page with plots."),
    "compare": ("compare", "Two results files: what became faster or slower, and whether that is too much."),
    "report": ("published", "Write README's figures and plots from bench/results/."),
    "explain": ("explain", "What an op computes, moves and launches, and what its kernels become on a GPU."),
    "ceilings": ("ceilings", "What this machine reaches: copies, matrix products, calls."),
    "audit": ("audit", "Plant cheats in the benchmark, and see that it catches each."),
    "list": ("listing", "The ops, their shapes and options, and who they can be compared with."),
    "env": ("listing:env", "This machine and its software, as results files record it."),
    "tune": ("tune", "Measure tiles on this NVIDIA GPU and write a table of the fastest."),
}
# What a write to a disk without room fails with.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EXIT_STATUS = """\b
Exit status: 0 ok, 1 slower (compare), 2 cannot be done as asked, 3 wrong results,
4 too noisy (compare), 130 after Ctrl-C, with the results up to there kept.
"""


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is none of `known`: it lists them, likely ones first."""
    names = list(known)
    close = difflib.get_close_matches(name, names, 3, 0.5)
    rest = f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"
    return UsageError(f"unknown {what} {name!r}; {rest}")


class Amount(click.FloatRange):
    """A number in a range, which NaN is in none of."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is no number", param, ctx)
        return number


class Names(click.ParamType):
    """Names separated by commas."""

    name = "name,..."

    def __init__(self, known: Iterable[str] = ()) -> None:
        self._known = tuple(known)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(filter(None, (part.strip() for part in value.split(","))))
        if not names:
            self.fail("names nothing", param, ctx)
        for name in names:
            if self._known and name not in self._known:
                self.fail(f"{name!r} is not one of {', '.join(self._known)}", param, ctx)
        return names


class _Group(click.Group):
    """Imports a command when it is asked for, and says every error in one line on standard error."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        found: click.Command = getattr(
            importlib.import_module(f"dlgpu.bench.{module}"), attribute or "command"
        )
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, says) for name, (_, says) in COMMANDS.items()])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] not in ("--help", "-h")):
            args = ["quick", *args]
        elif not args[0].startswith("-") and args[0] not in COMMANDS:
            raise unknown("command", args[0], COMMANDS)
        return super().parse_args(ctx, args)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        # An option of them all, wherever it stands.
        traceback = "--traceback" in given
        given = [argument for argument in given if argument != "--traceback"]
        extra["obj"] = {"traceback": traceback}
        status = 0
        try:
            status = super().main(given, prog_name, complete_var, False, **extra) or 0
        except (UsageError, click.ClickException) as error:
            if traceback:
                raise
            status = 2
            _say(error.format_message() if isinstance(error, click.ClickException) else str(error))
        except (KeyboardInterrupt, click.Abort):
            status = 130
            print("dlgpu-bench: interrupted", file=sys.stderr)
        except BrokenPipeError:
            # The reader went away (| head). Python would complain again when it flushes at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 1
        except ImportError as error:
            if traceback or not error.name or error.name.startswith("dlgpu"):
                raise
            status = 2
            _say(f"{error.name.partition('.')[0]} is not installed; pip install dlgpu[bench]")
        except Exception as error:
            if traceback:
                raise
            status = 2
            if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
                # Of a file with a name its writer has said more.
                _say(f"cannot write to standard output: {error.strerror}")
            else:
                _say(f"a bug: {type(error).__name__}: {error} (--traceback shows where)")
        if standalone_mode:
            sys.exit(status)
        return status


def _say(text: str) -> None:
    line = " ".join(text.split())
    print(f"dlgpu-bench: error: {line}", file=sys.stderr)


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    help="Compares dlgpu with torch and others on this machine: what they take, and the bytes they move.\n\n"
    "With no command: the quick suite for this machine, then the report (see `dlgpu-bench quick --help`).",
    epilog=EXIT_STATUS + "\n--traceback, anywhere: an error is shown with its traceback.",
)
def bench() -> None:
    pass
