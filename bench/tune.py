"""Measures the tiles of the linear products and of memory-bound kernels on this GPU and writes a table for kernels/tuned/.

Tuning a product by itself misleads: what it leaves in the caches is another's start. So a layer's products are chosen one
after the other, each by the time of forward and backward together; so are the kernels of other ops. Before anything is
measured, processes of their own compile every candidate, which needs no GPU: what spills registers or takes too much shared
memory drops out, and Triton's cache holds the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch

import dlgpu
from dlgpu.kernels import _triton, configs, linear, tuning
from dlgpu.kernels.activations import ACTIVATIONS, lookup, saved_for_backward

from .cases import OPS, STEP
from .cases._base import Bound
from .cli import Amount
from .environment import PACKAGE, UsageError, choose_device, cores, describe, find_gpu
from .launches import Launched, Limits, dry_run
from .measure import Case

__all__ = ["CASES", "Layer", "command", "prune", "prune_rules", "tune_linear", "tune_rules"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# M x N x K: large to small depth, and a layer of an MLP of width 1024.
SHAPES = (
    "8192x8192x8192",
    "8192x14336x4096",
    "8192x8192x1024",
    "16384x4096x512",
    "65536x1024x256",
    "16384x1024x1024",
)
# Memory-bound ops, and the shapes and options at which the tiles of their kernels are measured. Rows are no part of a key:
# there are so many that a call takes a few hundred microseconds, in which the host has launched all of it. An optimizer has
# fewer parameters than elsewhere: it keeps its first step's layout, so that each tile has parameters and states of its own.
CASES: Mapping[str, Sequence[tuple[str | Mapping[str, int], Mapping[str, Any]]]] = {
    "cross_entropy": [
        (shape, options)
        for options in ({}, {"grad_in_forward": True})
        for shape in ({"N": 2048, "V": 128256}, "h200-llama2")
    ],
    "softmax": [("h200-llama2", {})],
    "layer_norm": [({"M": 32768, "N": 4096}, {}), ({"M": 8192, "N": 16384}, {})],
    "adam": [({"n": 1 << 26, "tensors": 1}, {})],
    "mse_loss": [("h200-large", {})],
    "activation": [("h200-ffn", {})],
}
# All of them at once.
MEMORY_BOUND = "memory-bound"
BUDGET_S = 480.0
# A product is about a third of the time that is scored.
JOINT_GAIN = tuning.GAIN / 4
JOINT_ROUNDS = 31
WORKERS = 16
COMPILE_TIMEOUT_S = 240.0
SLOPE = 0.01

Say = Callable[[str], object]
# (key, tile) -> whether it is worth measuring.
Pruned = set[tuple[tuning.LinearKey, tuning.Tile]]


@dataclasses.dataclass(frozen=True)
class Layer:
    """act(x w^T + b), x [M, K] and w [N, K]."""

    M: int
    N: int
    K: int
    activation: str | None
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Settings:
    """How much is measured; a rehearsal takes as little as exercises everything."""

    candidates: int | None = None
    gain: float = tuning.GAIN
    joint_gain: float = JOINT_GAIN
    rounds: int = tuning.ROUNDS
    joint_rounds: int = JOINT_ROUNDS
    screening: int = tuning.SCREENING
    finalists: int = tuning.FINALISTS
    refined: int = tuning.REFINED


REHEARSAL = Settings(candidates=2, rounds=1, joint_rounds=1, screening=1, finalists=1, refined=1)

Call = Callable[[], Sequence[torch.Tensor | None]]


def _calls(layer: Layer, device: torch.device) -> Iterator[tuple[str, Call]]:
    """(what is scored, the call) of a layer, on launchers, since backward's products must run in this thread: forward and
    backward, evaluation, and the gradient of a layer that lies above another."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).mul_(scale).to(layer.dtype)

    M, N, K, act = layer.M, layer.N, layer.K, layer.activation
    x, w, b, dy = normal(M, K), normal(N, K, scale=K**-0.5), normal(N), normal(M, N)
    saves = saved_for_backward(act, SLOPE)

    def step() -> Sequence[torch.Tensor | None]:
        y, z = linear.linear_fwd(x, w, b, act, SLOPE, saves == "z")
        saved = {"y": y, "z": z}.get(saves or "")
        return y, *linear.linear_bwd(dy, x, w, saved, act, SLOPE, (True, True, True))

    yield "fwd+bwd", step
    yield "alone", lambda: linear.linear_fwd(x, w, b, act, SLOPE, False)[:1]
    if saves is not None:
        beneath = lookup(act).eager(normal(M, K), SLOPE) if saves == "y" else normal(M, K)
        yield "alone", lambda: linear.linear_dgrad(dy, w, beneath, act, SLOPE, True)


class _Asked(dict[Any, Any]):
    """Tiles, none at first, and a note of whose was asked for."""

    def __init__(self, tiles: Mapping[Any, Any] = {}) -> None:
        super().__init__(tiles)
        self.keys_asked: list[Any] = []

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self.keys_asked:
            self.keys_asked.append(key)
        return super().get(key, default)


def _keys(call: Call, where: tuning.Table) -> list[tuning.LinearKey]:
    """The products that a call launches, in order."""
    asked = _Asked()
    with tuning.forced(where, asked):
        call()
    return asked.keys_asked


def _candidates(key: tuning.LinearKey, where: tuning.Table, most: int | None) -> tuple[tuning.Tile, ...]:
    """configs.py's choice and others; of a few only, its smallest rival."""
    found = tuning.candidates(where.limits, key)
    if most is None:
        return found
    rivals = [tile for tile in found[1:] if isinstance(tile, configs.MatmulTile)]
    return (
        found[0],
        *sorted(rivals, key=lambda tile: tile.block_m * tile.block_n * tile.block_k)[: most - 1],
    )


def tune_linear(
    layers: Sequence[Layer],
    where: tuning.Table,
    timer: tuning.Timer,
    out: Path,
    about: Mapping[str, str],
    *,
    settings: Settings = Settings(),
    budget_s: float = BUDGET_S,
    say: Say = print,
) -> int:
    """Measures the products of some layers and writes the table as each is chosen; what `out` holds of this card already
    stays and is not measured again. Gives the number of products left for another run."""
    start = time.monotonic()
    tiles, entries = _earlier(out, where, say)
    wanted: dict[tuning.LinearKey, None] = {}
    for layer in layers:
        for _, call in _calls(layer, where.device):
            wanted |= dict.fromkeys(_keys(call, where))
    todo = {key: _candidates(key, where, settings.candidates) for key in wanted if key not in tiles}
    say(f"compiling {sum(map(len, todo.values()))} candidates of {len(todo)} products")
    dropped = prune(todo, where.limits)
    say(f"{len(dropped)} spill registers or take too much shared memory")
    for layer in layers:
        for scored, call in _calls(layer, where.device):
            joint = scored == "fwd+bwd"
            for key in _keys(call, where):
                if key in tiles or time.monotonic() - start > budget_s:
                    continue

                def run(tile: tuning.Tile, key: tuning.LinearKey = key, call: Call = call) -> Any:
                    with tuning.forced(where, {**tiles, key: tile}), torch.no_grad():
                        return call()

                found = tuning.choose(
                    run,
                    [tile for i, tile in enumerate(todo[key]) if i == 0 or (key, tile) not in dropped],
                    timer,
                    gain=settings.joint_gain if joint else settings.gain,
                    rounds=settings.joint_rounds if joint else settings.rounds,
                    screening=settings.screening,
                    finalists=settings.finalists,
                    refined=settings.refined,
                )
                tiles[key] = found.tile
                entries.append(tuning.entry(key, found.tile, found, scored))
                tuning.write(out, tuning.document(where.card, where.limits[0], entries, **about))
                say(_line(key, found, scored))
    return sum(key not in tiles for key in wanted)


def _earlier(
    out: Path, where: tuning.Table, say: Say
) -> tuple[dict[tuning.Key, tuning.Tile], list[dict[str, Any]]]:
    """The tiles and the entries that are there and of use."""
    tiles = tuning.read(out, where.card, where.limits)
    if not tiles:
        return {}, []
    say(f"{len(tiles)} tiles are in {out.name} already")
    return tiles, [value for value in json.loads(out.read_bytes())["entries"] if _key(value, where) in tiles]


@contextlib.contextmanager
def _in_use(where: tuning.Table, tiles: Mapping[Any, Any]) -> Iterator[_Asked]:
    """Within the block these tiles are those of `where`'s device, in every thread, of which autograd's backward has its own; a
    note of what was asked for."""
    asked = _Asked(tiles)
    table = dataclasses.replace(where, tiles=asked)
    with mock.patch.dict(tuning._tables, {where.device: table}), dlgpu.use_backend("triton"):
        yield asked


def _rules_asked(case: Case, limits: Limits) -> list[tuning.RuleKey]:
    """The rules that a case's launches ask for their tiles, in order, without launching anything."""
    meta = tuning.Table("", limits, torch.device("meta"))
    with _in_use(meta, {}) as asked:
        dry_run(case.without_memory("dlgpu"), limits)
    # What `dry_run` binds asks too, and an optimizer lays out its tensors at the first step.
    return [key for key in asked.keys_asked if isinstance(key, tuning.RuleKey)]


def _trial(
    case: Case,
    key: tuning.RuleKey,
    where: tuning.Table,
    tiles: Mapping[Any, Any],
    calls: dict[tuning.Tile | None, Bound],
    asked: set[Any],
) -> tuning.Run:
    """A case's call as a function of the tile of a key, with other tiles as they are; adds to `calls` what is called, and to
    `asked` what it asked for."""

    def run(tile: tuning.Tile) -> Sequence[torch.Tensor | None]:
        with _in_use(where, {**tiles, key: tile}) as noted:
            # An optimizer keeps its first step's layout, and with it the tile.
            which = tile if case.passes == STEP else None
            if which not in calls:
                calls[which] = case.bind(case.described.functions["dlgpu"], 0)
            results = [t.detach() for t in calls[which]()]
        asked.update(noted.keys_asked)
        return results

    return run


def tune_rules(
    cases: Sequence[Case],
    where: tuning.Table,
    timer: tuning.Timer,
    out: Path,
    about: Mapping[str, str],
    *,
    settings: Settings = Settings(),
    budget_s: float = BUDGET_S,
    say: Say = print,
) -> int:
    """`tune_linear` for the memory-bound kernels of some cases, each tile chosen by the time of the whole call. Gives the
    number of tiles left for another run."""
    start = time.monotonic()
    tiles, entries = _earlier(out, where, say)
    todo: dict[tuning.RuleKey, tuple[Case, Sequence[tuning.Tile]]] = {}
    for case in cases:
        for key in _rules_asked(case, where.limits):
            if key not in tiles:
                todo.setdefault(key, (case, tuning.candidates(where.limits, key)[: settings.candidates]))
    say(f"compiling {sum(len(found) for _, found in todo.values())} candidates of {len(todo)} tiles")
    dropped = prune_rules(todo, where.limits, budget_s / 2)
    say(f"{len(dropped)} spill registers or take too much shared memory")
    for case in cases:
        step = case.passes == STEP
        calls: dict[tuning.Tile | None, Bound] = {}
        for key in [key for key, (own, _) in todo.items() if own is case]:
            if time.monotonic() - start > budget_s:
                break
            found = todo[key][1]
            asked: set[Any] = set()
            choice = tuning.choose(
                _trial(case, key, where, tiles, calls, asked),
                [tile for i, tile in enumerate(found) if i == 0 or (key, tile) not in dropped],
                timer,
                gain=settings.gain if step else settings.joint_gain,
                rounds=settings.rounds if step else settings.joint_rounds,
                screening=settings.screening,
                finalists=settings.finalists,
                refined=0,
            )
            if key not in asked:
                raise RuntimeError(f"{case.title} did not ask for {key.rule}")
            if step:
                calls.clear()
            tiles[key] = choice.tile
            entries.append(tuning.entry(key, choice.tile, choice, case.passes))
            tuning.write(out, tuning.document(where.card, where.limits[0], entries, **about))
            arguments = ", ".join(str(a).removeprefix("torch.") for a in key.arguments)
            say(f"{key.rule}({arguments}): {choice.tile}; {_times(choice, case.passes)}")
    return sum(key not in tiles for key in todo)


def _key(value: Any, where: tuning.Table) -> tuning.Key | None:
    try:
        return tuning.parse(value, where.limits)[0]
    except tuning.BadError:
        return None


def _line(key: tuning.LinearKey, found: tuning.Choice, scored: str) -> str:
    """One line for people."""
    kind = "dW" if key.split else f"{key.activation}'" if key.gradient else key.activation or "plain"
    layout = f"{'T' if key.a_t else 'N'}{'T' if key.b_t else 'N'}"
    tile = found.tile
    what = (
        f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"
        if isinstance(tile, configs.MatmulTile)
        else "cuBLAS"
    )
    z = " with z" if key.saves_z else ""
    return f"{key.M}x{key.N}x{key.K} {layout} {kind}{z}: {what}; {_times(found, scored)}"


def _times(found: tuning.Choice, scored: str) -> str:
    return f"{1e6 * found.best_s[1]:.1f} us {scored}, {found.ratio:.3f} of the default's {1e6 * found.default_s[1]:.1f}"


def prune(
    todo: Mapping[tuning.LinearKey, Sequence[tuning.Tile]], limits: Sequence[int], workers: int = WORKERS
) -> Pruned:
    """The candidates whose machine code spills registers or takes more shared memory than there is. One that could not be
    looked at in time is none of them."""
    tasks = [
        (key, tile) for key, tiles in todo.items() for tile in tiles if isinstance(tile, configs.MatmulTile)
    ]
    # Kernels with descriptors know nothing of sizes: one binary serves many shapes.
    groups: dict[Any, list[tuple[tuning.LinearKey, tuning.Tile]]] = {}
    for key, tile in tasks:
        same = key if key.split or not tile.tma else key._replace(M=0, N=0, K=0)
        groups.setdefault((same, dataclasses.replace(tile, reason="")), []).append((key, tile))
    found: Pruned = set()
    members = list(groups.values())
    for i in _bad([{"entry": tuning.entry(*same[0])} for same in members], limits, workers, 12):
        found |= set(members[i])
    return found


def prune_rules(
    todo: Mapping[tuning.RuleKey, tuple[Case, Sequence[tuning.Tile]]],
    limits: Sequence[int],
    timeout_s: float = COMPILE_TIMEOUT_S,
    workers: int = WORKERS,
) -> set[tuple[tuning.RuleKey, tuning.Tile]]:
    """`prune` for the kernels of a case. configs.py's own choices, the first, are not looked at."""
    tasks, lines = [], []
    for key, (case, tiles) in todo.items():
        about = {name: getattr(case, name) for name in ("op", "shape", "passes", "options")}
        about["dtype"] = case.dtype_name
        tasks += [(key, tile) for tile in tiles[1:]]
        lines += [{"entry": tuning.entry(key, tile), "case": about} for tile in tiles[1:]]
    return {tasks[i] for i in _bad(lines, limits, workers, 4, min(timeout_s, COMPILE_TIMEOUT_S))}


def _bad(
    tasks: Sequence[Mapping[str, Any]],
    limits: Sequence[int],
    workers: int,
    each: int,
    timeout_s: float = COMPILE_TIMEOUT_S,
) -> list[int]:
    """The numbers of the tasks that are not worth measuring.

    Args:
        each: that many tasks at least a process: starting one takes as long as a few compilations.
    """
    count = max(1, min(workers, cores(), -(-len(tasks) // each)))
    answers: dict[int, bool] = {}
    numbered = [{"i": i, **task} for i, task in enumerate(tasks)]
    threads = [
        threading.Thread(target=_worker, args=(numbered[first::count], limits, answers, timeout_s))
        for first in range(count)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [i for i, good in answers.items() if not good]


def _worker(
    tasks: Sequence[Mapping[str, Any]], limits: Sequence[int], answers: dict[int, bool], timeout_s: float
) -> None:
    """Has a process look at some candidates; answers: number -> whether it is worth measuring."""
    if not tasks:
        return
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = [p for p in (environment.get("PYTHONPATH"), str(PACKAGE.parent)) if p]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": "", "DLGPU_TUNE": "0"}
    lines = map(json.dumps, tasks)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "dlgpu.bench.tune", *map(str, limits)],
            input="\n".join(lines),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            timeout=timeout_s,
            env=environment,
            check=False,
        )
        said = done.stdout
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else late.stdout or ""
    # The last line of a process that was ended may be half a one.
    for line in said.splitlines(keepends=True):
        if line.endswith("\n"):
            answer = json.loads(line)
            answers[answer["i"]] = answer["good"]


class _Driver:
    """Stands for the driver of a GPU of some capability: as much of it as a launch asks for that only compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


def examine(key: tuning.LinearKey, tile: tuning.Tile, limits: Sequence[int]) -> bool:
    """Whether the GEMM's machine code for a tile spills nothing and fits; for a process whose kernels are not interpreted.

    It is compiled the way that a launch is, so that the launch finds it in Triton's cache.
    """
    from triton.runtime.driver import driver

    from . import machine_code

    compiled: list[Any] = []

    def compile_only(kernel: Any, grid: Any, *args: Any, **meta: Any) -> None:
        compiled.append(kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **meta))

    def empty(rows: int, columns: int, transposed: bool = False) -> torch.Tensor:
        shape = (columns, rows) if transposed else (rows, columns)
        t = torch.empty(shape, dtype=key.dtype, device="meta")
        return t.t() if transposed else t

    where = tuning.Table("", (limits[0], limits[1], limits[2]), torch.device("meta"))
    a, b = empty(key.M, key.K, key.a_t), empty(key.K, key.N, key.b_t)
    forward = not (key.split or key.gradient)
    driver.set_active(_Driver(limits[0]))
    with (
        mock.patch.multiple(linear, launch=compile_only, device_limits=lambda device: where.limits),
        mock.patch.object(linear, "matmul_precision", return_value=key.precision),
        tuning.forced(where, {key: tile}),
    ):
        linear._product(
            a,
            b,
            bias=empty(1, key.N)[0] if forward and key.b_t else None,
            saved=empty(key.M, key.N) if key.gradient else None,
            activation=key.activation,
            save_z=key.saves_z,
            sums=key.gradient,
            split=key.split,
        )
    code = machine_code.read(compiled[0], limits[0])
    return not code.spills and code.shared_bytes <= limits[1]


def examine_rule(case: Case, key: tuning.RuleKey, tile: tuning.Tile, limits: Limits) -> bool:
    """Whether the kernels that a case launches otherwise with a tile spill nothing and fit; as `examine`."""
    from triton.runtime.driver import driver

    from . import machine_code

    where = tuning.Table("", limits, torch.device("meta"))
    seen: set[str] = set()
    good = True

    def new(launch: Launched) -> bool:
        # Now, while meta tensors have addresses: their alignment is part of what is compiled.
        name = repr((launch.kernel, machine_code.signature_of(launch.kernel, launch.args), launch.options))
        first = name not in seen
        seen.add(name)
        return first

    def compiled(launch: Launched) -> None:
        nonlocal good
        if good and new(launch):
            found = launch.kernel.warmup(
                grid=launch.grid, **{"enable_fp_fusion": True, **launch.args, **launch.options}
            )
            code = machine_code.read(found, limits[0])
            good = not code.spills and code.shared_bytes <= limits[1]

    driver.set_active(_Driver(limits[0]))
    for tiles, spy in (({}, new), ({key: tile}, compiled)):
        with _in_use(where, tiles):
            dry_run(case.without_memory("dlgpu"), limits, warm=case.passes == STEP, spy=spy)
    return good


def _good(task: Mapping[str, Any], limits: Limits) -> bool:
    key, tile = tuning.parse(task["entry"], limits)
    if isinstance(key, tuning.LinearKey):
        return examine(key, tile, limits)
    about = {**task["case"]}
    about |= {"described": OPS[about.pop("op")], "dtype": getattr(torch, about["dtype"])}
    return examine_rule(Case(**about), key, tile, limits)


def main(arguments: Sequence[str]) -> None:
    """The process that `prune` starts: candidates on standard input, one a line, answers on standard output."""
    capability, shared_memory, multiprocessors = map(int, arguments)
    limits = (capability, shared_memory, multiprocessors)
    # Compilers print, too.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            good = _good(task, limits)
        except Exception:
            # What does not compile is not worth a GPU's time.
            good = False
        print(json.dumps({"i": task["i"], "good": good}), file=answers, flush=True)


class _List(click.ParamType):
    """Values separated by commas."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if not isinstance(value, str):
            return list(value)
        try:
            return [self._parse(part) for part in value.split(",")]
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"must be MxNxK, got {text!r}")
    M, N, K = map(int, parts)
    if min(M, N, K) < 1:
        raise ValueError(f"must be positive sizes, got {text!r}")
    return M, N, K


def _activation(text: str) -> str | None:
    if text != "none" and text not in ACTIVATIONS:
        raise ValueError(f"got {text!r}, expected none, {', '.join(ACTIVATIONS)}")
    return None if text == "none" else text


@dataclasses.dataclass(frozen=True)
class Options:
    """The command line's."""

    op: str
    shapes: list[tuple[int, int, int]] | None
    dtype: str | None
    activations: list[str | None] | None
    out: Path | None
    budget: float
    rehearse: bool


@click.command("tune")
@click.argument("op", type=click.Choice(("linear", *CASES, MEMORY_BOUND)))
@click.option("--shapes", type=_List("MxNxK,...", _shape), help=f"Of linear; default: {','.join(SHAPES)}.")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), help="Default: bf16, of adam fp32.")
@click.option("--activations", type=_List("NAME,...", _activation), help="Of linear; default: relu,gelu.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The table, gone on with if it is there; default: bench-results/<card>.json.",
)
@click.option(
    "--budget",
    type=Amount(min=0, min_open=True),
    default=BUDGET_S,
    show_default=True,
    metavar="SECONDS",
    help="Nothing new is begun after it.",
)
@click.option(
    "--rehearse",
    is_flag=True,
    help="Without a GPU: the same code at tiny sizes, interpreted, two tiles each; its table is of no use.",
)
def command(**options: Any) -> int:
    """Measures the tiles there are for the kernels of an op, such as a layer's products, on this NVIDIA GPU, and writes a
    table of the fastest, which goes into kernels/tuned/. `memory-bound` is all ops but linear."""
    return tune(Options(**options))


def tune(options: Options, say: Say = print) -> int:
    """Runs `tune`; gives the exit status.

    Raises:
        UsageError: no usable GPU, or the table cannot be written, or an option is another op's.
    """
    if options.op != "linear" and (options.shapes or options.activations):
        raise UsageError("tune: --shapes and --activations are for linear")
    if options.rehearse:
        return _rehearse(options, say)
    gpu = find_gpu()
    if gpu is None:
        raise UsageError("tune: no NVIDIA GPU was found here (--rehearse runs the same code without one)")
    device, why = choose_device("cuda", gpu)
    if _triton.INTERPRETED:
        raise UsageError("tune: TRITON_INTERPRET is set, and interpreted kernels have no speed to speak of")
    where = _this_card()
    about = _about(describe(device, why, gpu))
    out = options.out or Path("bench-results") / f"{tuning.slug(where.card)}.json"
    timer = tuning.EventTimer(where.device)
    return _run(options, where, timer, out, about, say, Settings(), options.budget)


def _this_card() -> tuning.Table:
    device = torch.device("cuda", torch.cuda.current_device())
    return tuning.Table(torch.cuda.get_device_name(device), _triton.device_limits(device), device)


def _about(environment: Mapping[str, Any]) -> dict[str, str]:
    """What a table says of its making: no host, user or path."""
    git = environment["git"] or {"commit": "unknown", "modified": False}
    return {
        "dlgpu": environment["dlgpu"],
        "torch": environment["torch"],
        "cuda": environment["torch_cuda"] or "none",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": f"{git['commit']}{', modified' if git['modified'] else ''}",
    }


def _run(
    options: Options,
    where: tuning.Table,
    timer: tuning.Timer,
    out: Path,
    about: Mapping[str, str],
    say: Say,
    settings: Settings,
    budget_s: float,
) -> int:
    measured: dict[str, Any] = {"settings": settings, "budget_s": budget_s, "say": say}
    try:
        if options.op == "linear":
            left = tune_linear(_layers(options), where, timer, out, about, **measured)
        else:
            left = tune_rules(_cases(options), where, timer, out, about, **measured)
    except OSError as error:
        raise UsageError(f"tune: cannot write {out} ({error.strerror})") from error
    say(f"{out}: " + (f"{left} tiles are left for another run" if left else "complete"))
    return 0


def _dtype(options: Options, op: str) -> torch.dtype:
    return DTYPES[options.dtype or ("fp32" if op == "adam" else "bf16")]


def _layers(options: Options) -> list[Layer]:
    shapes, activations = [_shape(text) for text in SHAPES], ["relu", "gelu"]
    if options.rehearse:
        shapes, activations = [(24, 16, 40)], ["gelu"]
    return [
        Layer(*shape, activation, _dtype(options, "linear"))
        for shape in options.shapes or shapes
        for activation in options.activations or activations
    ]


def _cases(options: Options) -> list[Case]:
    found = []
    for name in CASES if options.op == MEMORY_BOUND else (options.op,):
        op, dtype = OPS[name], _dtype(options, name)
        shapes = [(op.shapes[s] if isinstance(s, str) else s, given) for s, given in CASES[name]]
        if options.rehearse:
            from .laws import PROBES

            probes = (*PROBES[name].fit, *PROBES[name].held_out)
            shapes = [(min((p.shape for p in probes), key=lambda shape: math.prod(shape.values())), {})]
        device = "cpu" if options.rehearse else "cuda"
        found += [Case(op, shape, op.passes[-1], dtype, given, device) for shape, given in shapes]
    return found


def _rehearse(options: Options, say: Say) -> int:
    if not _triton.INTERPRETED:
        # The choice is made when kernels are defined: a process of its own.
        arguments = [sys.executable, "-m", "dlgpu.bench", "tune", options.op, "--rehearse"]
        arguments += [] if options.dtype is None else ["--dtype", options.dtype]
        arguments += [] if options.out is None else ["--out", str(options.out)]
        if options.shapes:
            arguments += ["--shapes", ",".join("x".join(map(str, shape)) for shape in options.shapes)]
        if options.activations:
            arguments += ["--activations", ",".join(name or "none" for name in options.activations)]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(arguments, env=environment, check=False, timeout=600).returncode

    def timer(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    device = torch.device("cpu")
    where = tuning.Table("Triton's interpreter", _triton.device_limits(device), device)
    about = _about(describe("cpu", "a rehearsal", None))
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "rehearsal.json"
        status = _run(options, where, timer, out, about, say, REHEARSAL, 600.0)
        if not tuning.read(out, where.card, where.limits):
            raise RuntimeError("the rehearsal's table cannot be read")
    return status


if __name__ == "__main__":
    main(sys.argv[1:])
