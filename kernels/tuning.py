"""Tuned tiles: tables of measured choices that come before configs.py's, and the measuring.

A choice is looked up in the user's own file, then in the table shipped for the card (tuned/), then made by a rule of
configs.py: `configs.linear_tile` for the linear products, one of `RULES` for memory-bound kernels. Both files are JSON of the
schema dlgpu-tuned/1 (tuned/README.md says what is in them). Whatever is in a file, a choice is one of
`configs.linear_candidates` or their refinements, or cuBLAS, or of `configs.variants`: it can change speed, never results
beyond the order of a float32 sum. Nothing is read before the first launch on a GPU, and kernels that are interpreted ask no
table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import inspect
import json
import os
import random
import re
import stat
import statistics
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from . import configs
from ._triton import AVAILABLE, INTERPRETED, device_limits, triton

__all__ = [
    "BadError",
    "Choice",
    "EventTimer",
    "LinearKey",
    "RULES",
    "RuleKey",
    "Table",
    "choose",
    "document",
    "entry",
    "forced",
    "linear_key",
    "parse",
    "read",
    "slug",
    "table",
    "tile",
    "trial",
    "tune",
    "write",
]

LinearTile = configs.MatmulTile | configs.CuBlas
Tile = LinearTile | configs.FlatTile | configs.RowTile | configs.StripTile
T = TypeVar("T")

SCHEMA = "dlgpu-tuned/1"
SHIPPED = Path(__file__).parent / "tuned"
# A full table takes about half of it.
MAX_BYTES = 2 << 20
MAX_ENTRIES = 2000

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


class LinearKey(NamedTuple):
    """What a tuned choice of a product a b, a [M, K] and b [K, N], depends on. The batch (M, with `split` K) is its bucket's
    (`configs.row_bucket`), so that another batch size of the bucket has the same key."""

    dtype: torch.dtype
    precision: str
    a_t: bool
    b_t: bool
    M: int
    N: int
    K: int
    activation: str | None
    saves_z: bool
    gradient: bool
    aligned: bool
    aligned_out: bool
    split: bool


def linear_key(
    dtype: torch.dtype,
    precision: str,
    a_t: bool,
    b_t: bool,
    M: int,
    N: int,
    K: int,
    activation: str | None,
    saves_z: bool,
    gradient: bool,
    aligned: bool,
    aligned_out: bool,
    split: bool,
) -> LinearKey:
    """The key of a product of these sizes."""
    if split:
        K = configs.row_bucket(K)
    else:
        M = configs.row_bucket(M)
    return LinearKey(
        dtype, precision, a_t, b_t, M, N, K, activation, saves_z, gradient, aligned, aligned_out, split
    )


# The rules of configs.py for memory-bound kernels of whose tiles there may be tables. None depends on how many rows there are,
# so that another batch size has the same key.
RULES: Mapping[str, Callable[..., Any]] = {
    rule.__name__: rule
    for rule in (
        configs.activation_tile,
        configs.cross_entropy_grad_tile,
        configs.cross_entropy_tile,
        configs.layer_norm_bwd_tile,
        configs.layer_norm_tile,
        configs.logsumexp_tile,
        configs.loss_tile,
        configs.multi_margin_tile,
        configs.optimizer_tile,
        configs.softmax_tile,
    )
}


class RuleKey(NamedTuple):
    """What a tuned tile of a memory-bound kernel depends on: which of `RULES` would choose it, and all that rule's arguments,
    in order."""

    rule: str
    arguments: tuple[Any, ...]

    def named(self) -> dict[str, Any]:
        """The arguments by name."""
        return dict(zip(_kinds(self.rule), self.arguments, strict=True))


Key = LinearKey | RuleKey


def _kinds(rule: str) -> dict[str, Any]:
    """The types of a rule's arguments, by name; of a dtype its name's."""
    kinds = {"int": int, "bool": bool, "torch.dtype": str}
    return {name: kinds[p.annotation] for name, p in inspect.signature(RULES[rule]).parameters.items()}


def tile(device: torch.device, rule: Callable[..., T], *arguments: Any) -> T:
    """The tuned tile of a memory-bound kernel on a device, else the one that the rule chooses.

    Args:
        rule: one of `RULES`; `arguments` are all of its own, those with a default too.
    """
    where = table(device)
    found: Any = None if where is None else where.tiles.get(RuleKey(rule.__name__, arguments))
    return rule(*arguments) if found is None else found


def candidates(limits: Sequence[int], key: Key) -> tuple[Tile, ...]:
    """What may be chosen for a key on a GPU of these limits (`configs.linear_candidates`, `configs.variants`): configs.py's
    own choice first."""
    if isinstance(key, RuleKey):
        return configs.variants(RULES[key.rule](*key.arguments), key.named().get("C"))
    return configs.linear_candidates(
        limits[0],
        limits[1],
        key.dtype,
        key.M,
        key.N,
        key.K,
        key.activation,
        key.saves_z,
        gradient=key.gradient,
        split=key.split,
        precision=key.precision,
        aligned=key.aligned,
        aligned_out=key.aligned_out,
        k_major=key.b_t and not key.a_t,
    )


def _bare(tile: Tile) -> Tile:
    return dataclasses.replace(tile, reason="")


def _allowed(limits: Sequence[int], key: Key) -> Iterator[Tile]:
    if isinstance(key, LinearKey):
        yield configs.CuBlas("")
    for tile in candidates(limits, key):
        yield _bare(tile)
        if isinstance(tile, configs.MatmulTile):
            yield from map(_bare, configs.linear_refinements(tile))


class BadError(Exception):
    """Why something in a file is not used. Never holds text of the file, which might be anything."""


def _check(condition: bool, reason: str) -> None:
    if not condition:
        raise BadError(reason)


_HEADER = {"schema": str, "card": str, "capability": int, "triton": str, "entries": list}
_ABOUT = {"dlgpu": str, "torch": str, "cuda": str, "date": str, "commit": str}
_KEY = {
    "dtype": str,
    "precision": str,
    "a_t": bool,
    "b_t": bool,
    "M": int,
    "N": int,
    "K": int,
    "activation": (str, type(None)),
    "saves_z": bool,
    "gradient": bool,
    "aligned": bool,
    "aligned_out": bool,
    "split": bool,
}
_RULE = {"rule": str, "arguments": dict, "tile": dict}
_MEASURED = {"scored": str, "default_us": list, "best_us": list, "ratio": float}
_TILE = {
    field.name: {"int": int, "bool": bool, "int | None": (int, type(None))}[str(field.type)]
    for field in dataclasses.fields(configs.MatmulTile)
    if field.name != "reason"
}


def _fields(value: Any, required: Mapping[str, Any], optional: Mapping[str, Any], what: str) -> None:
    """Every required field is there, none is unknown, each has its type (a bool is no int)."""
    _check(type(value) is dict, f"{what} is no object")
    _check(required.keys() <= value.keys(), f"{what} lacks a field")
    _check(value.keys() <= required.keys() | optional.keys(), f"{what} has an unknown field")
    for name, kinds in (*required.items(), *optional.items()):
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        _check(name not in value or type(value[name]) in allowed, f"{what}'s {name} has a wrong type")


def entry(key: Key, tile: Tile, choice: Choice | None = None, scored: str = "alone") -> dict[str, Any]:
    """An entry of a table, as JSON has it."""
    found: dict[str, Any]
    if isinstance(key, RuleKey):
        arguments = key.named()
        found = {"rule": key.rule, "arguments": arguments}
    else:
        arguments = found = {"op": "linear", **key._asdict()}
    if "dtype" in arguments:
        arguments["dtype"] = str(arguments["dtype"]).removeprefix("torch.")
    found["tile"] = (
        "cublas" if isinstance(tile, configs.CuBlas) else {n: getattr(tile, n) for n in _fields_of(tile)}
    )
    if choice is not None:
        found |= {"scored": scored, "ratio": round(choice.ratio, 4)}
        for name, seconds in (("default_us", choice.default_s), ("best_us", choice.best_s)):
            found[name] = [round(1e6 * s, 3) for s in seconds]
    return found


def _fields_of(tile: Tile) -> list[str]:
    return [field.name for field in dataclasses.fields(tile) if field.name != "reason"]


def _parse_rule(value: Any, limits: Sequence[int]) -> tuple[RuleKey, Tile]:
    _fields(value, _RULE, _MEASURED, "it")
    _check(value["rule"] in RULES, "no such rule")
    kinds, given = _kinds(value["rule"]), value["arguments"]
    _fields(given, kinds, {}, "its arguments")
    _check(given.get("dtype", "float32") in _DTYPES, "no such dtype")
    _check(all(0 < given[n] < 1 << 31 for n, kind in kinds.items() if kind is int), "a size is out of range")
    arguments = (_DTYPES[given[n]] if kind is str else given[n] for n, kind in kinds.items())
    key = RuleKey(value["rule"], tuple(arguments))
    allowed = candidates(limits, key)
    _fields(value["tile"], dict.fromkeys(_fields_of(allowed[0]), int), {}, "its tile")
    tile = type(allowed[0])(**value["tile"])
    _check(tile in allowed, "its tile is none of the candidates")
    return key, tile


def parse(value: Any, limits: Sequence[int]) -> tuple[Key, Tile]:
    """The key and tile of an entry.

    Raises:
        BadError: it is not what `entry` makes, or its tile is none of the candidates.
    """
    of_a_rule = type(value) is dict and "rule" in value
    found = _parse_rule(value, limits) if of_a_rule else _parse_linear(value, limits)
    for name in ("default_us", "best_us"):
        _check(all(type(us) in (int, float) for us in value.get(name, ())), f"its {name} has a wrong type")
    return found


def _parse_linear(value: Any, limits: Sequence[int]) -> tuple[LinearKey, Tile]:
    # Which takes its own tile from here.
    from .activations import ACTIVATIONS

    _fields(value, {"op": str, **_KEY, "tile": (dict, str)}, _MEASURED, "it")
    _check(value["op"] == "linear", "no such op")
    _check(value["dtype"] in _DTYPES, "no such dtype")
    _check(value["precision"] in ("ieee", "tf32"), "no such precision")
    _check(value["activation"] in (None, *ACTIVATIONS), "no such activation")
    _check(all(0 < value[name] < 1 << 31 for name in "MNK"), "a size is out of range")
    key = LinearKey(**{name: value[name] for name in _KEY} | {"dtype": _DTYPES[value["dtype"]]})
    _check(key == linear_key(*key), "its batch is no bucket's")
    if isinstance(value["tile"], str):
        _check(value["tile"] == "cublas", "no such tile")
        return key, configs.CuBlas("")
    _fields(value["tile"], _TILE, {}, "its tile")
    tile = configs.MatmulTile(**value["tile"], reason="")
    _check(tile in _allowed(limits, key), "its tile is none of the candidates")
    return key, tile


def _load(path: Path) -> Any:
    """The JSON of a file; None where there is none.

    Raises:
        BadError: it is no regular file, too large, or no JSON.
    """
    try:
        # A pipe would never end.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadError("no regular file")
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BadError("cannot be read") from error
    _check(len(text) <= MAX_BYTES, "too large")
    try:
        return json.loads(text)
    # Nested too deep; not UTF-8, not JSON, an integer of thousands of digits.
    except (RecursionError, ValueError) as error:
        raise BadError("no JSON") from error


def _entries(path: Path, card: str, capability: int) -> list[Any]:
    """The entries of a table for this card and Triton, not looked at yet; empty where there is none, or it is for another
    Triton.

    Raises:
        BadError: as `_load`, or it is no table of this schema, for this card.
    """
    found = _load(path)
    if found is None:
        return []
    _fields(found, _HEADER, _ABOUT, "the table")
    _check(found["schema"] == SCHEMA, "another schema")
    _check(found["card"] == card and found["capability"] == capability, "another card")
    # No mistake: it is somebody else's, and the machine code there may be another.
    if found["triton"] != _triton_version():
        return []
    _check(len(found["entries"]) <= MAX_ENTRIES, "too many entries")
    return list(found["entries"])


# Files of which something was said.
_warned: set[Path] = set()


def _warn(path: Path, what: str) -> None:
    if path not in _warned:
        _warned.add(path)
        # Its name alone: the folder is nobody's business.
        warnings.warn(f"dlgpu: tuned table {path.name}: {what}", RuntimeWarning, stacklevel=2)


def read(path: Path, card: str, limits: Sequence[int]) -> dict[Key, Tile]:
    """The usable choices of a file, for a card of these limits. The rest is ignored, with one warning a file and process."""
    tiles, problems = {}, []
    try:
        entries = _entries(path, card, limits[0])
    except BadError as bad:
        _warn(path, f"ignored, {bad}")
        return {}
    for i, value in enumerate(entries):
        try:
            key, tile = parse(value, limits)
            tiles[key] = tile
        except BadError as bad:
            problems.append(f"entry {i}: {bad}")
    if problems:
        _warn(path, f"{len(problems)} of {len(entries)} entries ignored; {problems[0]}")
    return tiles


def document(
    card: str, capability: int, entries: Sequence[Mapping[str, Any]], **about: str
) -> dict[str, Any]:
    """A table, as JSON has it."""
    return {
        "schema": SCHEMA,
        "card": card,
        "capability": capability,
        "triton": _triton_version(),
        **about,
        "entries": list(entries),
    }


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Writes a table: whole or not at all, whoever else writes or reads it meanwhile.

    Raises:
        OSError: it cannot be written.
    """
    # One entry a line, for people who compare two of them.
    about = {name: value for name, value in table.items() if name != "entries"}
    head = json.dumps({**about, "entries": []}, indent=1).removesuffix("[]\n}")
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # Beside the file, where a rename replaces it at once.
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(f"{head}[\n{lines}\n ]\n}}\n")
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _triton_version() -> str:
    return str(triton.__version__) if AVAILABLE else ""


def slug(name: str) -> str:
    """A card's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:80] or "unknown"


def user_path(card: str) -> Path | None:
    """The user's own table of a card and this Triton; None where there is no home to keep it in."""
    if folder := os.environ.get("DLGPU_CACHE_DIR"):
        home = Path(folder)
    elif sys.platform == "win32":
        if not (folder := os.environ.get("LOCALAPPDATA")):
            return None
        home = Path(folder) / "dlgpu"
    else:
        folder = os.environ.get("XDG_CACHE_HOME", "")
        try:
            # By its specification a relative path there is no path.
            home = (Path(folder) if os.path.isabs(folder) else Path.home() / ".cache") / "dlgpu"
        except RuntimeError:
            return None
    return home / f"{slug(card)}-triton-{slug(_triton_version())}.json"


@dataclasses.dataclass
class Table:
    """The choices in use on one device. given_up: keys whose measuring failed, in this process."""

    card: str
    limits: tuple[int, int, int]
    device: torch.device
    tiles: dict[Key, Any] = dataclasses.field(default_factory=dict)
    given_up: set[LinearKey] = dataclasses.field(default_factory=set)

    def linear(self, key: LinearKey, batch: int | None = None) -> LinearTile | None:
        """The tuned choice of a product; None leaves it to configs.py. With tuning on, an unknown product that is about to
        run on `batch` rows is measured now."""
        if _local.forced is not None:
            _local.hits += key in _local.forced
            return _local.forced.get(key)
        tile: LinearTile | None = self.tiles.get(key)
        if tile is None and batch and _enabled and key not in self.given_up and _may_tune(self.device):
            return _tune_linear(self, key, batch)
        return tile


class _Local(threading.local):
    # In a trial: the tiles under trial, and how often a product asked for one of them.
    forced: Mapping[Any, Any] | None = None
    hits = 0


_local = _Local()
_lock = threading.RLock()
# Of each device so far. None where there is nothing to ask, so that there the usual call costs this one look-up.
_tables: dict[torch.device, Table | None] = {}


def table(device: torch.device) -> Table | None:
    """The choices in use on a device, read at the first call; None where there are none and none are being made."""
    try:
        return _tables[device]
    except KeyError:
        with _lock:
            if device not in _tables:
                _tables[device] = _open(device)
            return _tables[device]


def _open(device: torch.device) -> Table | None:
    if INTERPRETED or device.type != "cuda":
        return None
    card, limits = torch.cuda.get_device_name(device), device_limits(device)
    found = Table(card, limits, device)
    # Later ones come first in use.
    sources = [("the table shipped with dlgpu", SHIPPED / f"{slug(card)}.json")]
    if (own := user_path(card)) is not None:
        sources.append(("the user's table", own))
    for source, path in sources:
        for key, tile in read(path, card, limits).items():
            found.tiles[key] = dataclasses.replace(tile, reason=f"tuned on {card}, from {source}")
    return found if found.tiles or _enabled else None


@contextlib.contextmanager
def forced(where: Table, tiles: Mapping[Any, Any]) -> Iterator[None]:
    """Within the block this thread's products with these keys run on these tiles, others on configs.py's, and nothing is
    tuned. Launchers only: autograd's backward has threads of its own."""
    before = _local.forced
    with _lock:
        if _tables.get(where.device) is None:
            _tables[where.device] = where
    _local.forced = tiles
    try:
        yield
    finally:
        _local.forced = before


# A candidate must be this much faster than configs.py's choice, and faster in three rounds of four.
GAIN = 0.02
# Rounds for a first look at all candidates, how many of them go on, and with refinements, and rounds for the choice.
SCREENING, FINALISTS, REFINED, ROUNDS = 3, 4, 2, 15
# Of the result's RMS: rounding is far below, and one wrong tile far above.
_AGREE = 0.25
# Times the L2 cache that is overwritten before each call.
_FLUSH = 3

Timer = Callable[[Callable[[], object]], float]
Run = Callable[[Tile], Sequence[torch.Tensor | None]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What was chosen. default_s, best_s: seconds of configs.py's choice and of this one: lower quartile, median, upper one.
    ratio: the median over the rounds of this one's time over configs.py's."""

    tile: Tile
    default_s: tuple[float, float, float]
    best_s: tuple[float, float, float]
    ratio: float


def choose(
    run: Run,
    tiles: Sequence[Tile],
    timer: Timer,
    *,
    gain: float = GAIN,
    rounds: int = ROUNDS,
    screening: int = SCREENING,
    finalists: int = FINALISTS,
    refined: int = REFINED,
) -> Choice:
    """The fastest of some tiles, or the first, configs.py's choice, where none is clearly faster.

    Every tile runs once, which compiles it: one that fails to, or whose results are not cuBLAS's (the first's where cuBLAS is
    not among them), drops out. The rest are timed in interleaved rounds, each in random order: all of them in a few, then the
    best, with refinements of the very best, in more.

    Args:
        run: does on a tile what is scored, and gives its results. What it does besides the product is scored too: forward
            with backward, say.
        timer: seconds of a call.
        gain: how much faster than the first a tile must be.
    """
    rng = random.Random(0)
    default = tiles[0]
    judge = next((tile for tile in tiles if isinstance(tile, configs.CuBlas)), default)
    reference = [t if t is None else t.clone() for t in run(judge)]

    def works(tile: Tile) -> bool:
        try:
            found = run(tile)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            if tile is default:
                raise
            return False
        return tile is default or all(map(_agrees, found, reference))

    running = [tile for tile in tiles if works(tile)]
    times = _rounds(run, running, timer, screening, rng)
    medians = [statistics.median(samples) for samples in times]
    ranked = [running[i] for i in sorted(range(len(running)), key=medians.__getitem__)]
    last = [default, *(tile for tile in ranked[:finalists] if tile is not default)]
    for tile in ranked[:refined]:
        if isinstance(tile, configs.MatmulTile):
            last += [other for other in configs.linear_refinements(tile) if works(other)]
    times = _rounds(run, last, timer, rounds, rng)
    best, best_ratio = 0, 1.0
    for i in range(1, len(last)):
        ratios = [t / d for t, d in zip(times[i], times[0], strict=True)]
        _, ratio, high = _quartiles(ratios)
        if ratio <= 1 - gain and high < 1 and ratio < best_ratio:
            best, best_ratio = i, ratio
    return Choice(last[best], _quartiles(times[0]), _quartiles(times[best]), best_ratio)


def _quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    if len(samples) < 2:
        return (samples[0],) * 3
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def _rounds(
    run: Run, tiles: Sequence[Tile], timer: Timer, rounds: int, rng: random.Random
) -> list[list[float]]:
    """Seconds of each tile in each round."""
    times: list[list[float]] = [[] for _ in tiles]
    for _ in range(rounds):
        for i in rng.sample(range(len(tiles)), len(tiles)):
            times[i].append(timer(lambda tile=tiles[i]: run(tile)))  # type: ignore[misc]
    return times


def _agrees(found: torch.Tensor | None, reference: torch.Tensor | None) -> bool:
    """Whether two results differ by no more than rounding might: a guard against a tile that the compiler gets wrong."""
    if found is None or reference is None:
        return found is reference
    scale = reference.float().square().mean().sqrt()
    # `<=`, so that NaN does not agree.
    return bool((found.float() - reference.float()).abs().max() <= _AGREE * scale)


class EventTimer:
    """Seconds of a call by a pair of CUDA events, with the L2 cache overwritten before them: it keeps the GPU busy while the
    host launches the call."""

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(_FLUSH * cache, 1 << 20), dtype=torch.uint8, device=device)

    def __call__(self, function: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def trial(key: LinearKey, batch: int, where: Table) -> Run:
    """A product of a key, on random operands of its own, as a function of the tile.

    Args:
        batch: rows (with `split` the depth) of the operands.
    """
    from . import linear

    M, K = (key.M, batch) if key.split else (batch, key.K)
    # The caller's random numbers stay as they are.
    generator = torch.Generator(where.device).manual_seed(0)

    def matrix(rows: int, columns: int, transposed: bool, aligned: bool, scale: float) -> torch.Tensor:
        odd = 0 if aligned else 1
        values = torch.randn(rows * columns + odd, generator=generator, device=where.device).mul_(scale)
        values = values.to(key.dtype)[odd:]
        return values.view(columns, rows).t() if transposed else values.view(rows, columns)

    a = matrix(M, K, key.a_t, key.aligned, 1.0)
    b = matrix(K, key.N, key.b_t, key.aligned, K**-0.5)
    saved = matrix(M, key.N, False, key.aligned_out, 1.0) if key.gradient else None
    bias = torch.randn(key.N, generator=generator, device=where.device).to(key.dtype)

    def run(tile: Tile) -> Sequence[torch.Tensor | None]:
        with forced(where, {key: tile}), torch.no_grad():
            if key.split:
                return (linear.linear_wgrad(a.t(), b),)
            if key.gradient:
                return linear.linear_dgrad(a, b, saved, key.activation, 0.01, True)
            if key.activation is None and not key.b_t:
                return linear.linear_dgrad(a, b)
            return linear.linear_fwd(a, b.t(), bias, key.activation, 0.01, key.saves_z)

    return run


def _default() -> bool:
    value = os.environ.get("DLGPU_TUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"the environment variable DLGPU_TUNE: got {value!r}, expected 0 or 1")
    return value == "1"


_enabled = _default()
# One at a time in this process: others meanwhile run on configs.py's choice.
_tuning = threading.Lock()


def tune(enabled: bool = True) -> None:
    """With tune(True), the first linear product of a new shape on a GPU measures the tiles there are for it, which takes about
    a minute, most of it compilation; the choice is used from then on and kept in the user's cache folder for later processes.

    Off by default; the environment variable DLGPU_TUNE=1, read when dlgpu is imported, turns it on. A new batch size of the
    same bucket (up to 64, 512, 4096 rows, and more) tunes and compiles nothing. While it measures, the call waits for the GPU
    and takes memory for a copy of its operands. Nothing is measured during CUDA graph capture or tracing. The folder is
    $XDG_CACHE_HOME/dlgpu or ~/.cache/dlgpu (on Windows %LOCALAPPDATA%/dlgpu), or the variable DLGPU_CACHE_DIR. What was chosen
    shows in `dlgpu.explain`.
    """
    global _enabled
    with _lock:
        _enabled = bool(enabled)
        for device in [device for device, found in _tables.items() if found is None]:
            del _tables[device]


def _may_tune(device: torch.device) -> bool:
    """Whether a product that is about to run there may be measured first."""
    return (
        not INTERPRETED
        and device.type == "cuda"
        and not torch.compiler.is_compiling()
        # Fake tensors, and whoever else watches operations.
        and not torch._C._len_torch_dispatch_stack()
        and not _capturing(device)
    )


def _capturing(device: torch.device) -> bool:
    with _on(device):
        return torch.cuda.is_current_stream_capturing()


def _tune_linear(where: Table, key: LinearKey, batch: int) -> LinearTile | None:
    """Measures, remembers and stores the choice for a key; None where it cannot be measured, or is being measured."""
    if not _tuning.acquire(blocking=False):
        return None
    try:
        chosen: LinearTile | None = where.tiles.get(key)
        if chosen is not None:
            return chosen
        try:
            with _on(where.device):
                run, hits = trial(key, batch, where), _local.hits
                found = choose(run, candidates(where.limits, key), _timer(where.device))
            # Operands that turned out to have another key were another product's.
            if _local.hits == hits:
                raise RuntimeError("the trial did not run the product")
        except Exception as error:
            where.given_up.add(key)
            warnings.warn(
                f"dlgpu: a linear product could not be tuned ({type(error).__name__}); its default tile is used",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        where.tiles[key] = dataclasses.replace(found.tile, reason=f"tuned on {where.card}, in this process")
        _store(where, key, found)
        chosen = where.tiles[key]
        return chosen
    finally:
        _tuning.release()


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _timer(device: torch.device) -> Timer:
    return EventTimer(device)


def _store(where: Table, key: LinearKey, choice: Choice) -> None:
    """Adds an entry to the user's table; in place of one with the same key. Of two processes that do so at once, one's may be
    lost; the file is always one of theirs."""
    path = user_path(where.card)
    if path is None:
        return
    entries = []
    with contextlib.suppress(BadError):
        entries = _entries(path, where.card, where.limits[0])
    kept = []
    for value in entries:
        # What cannot be used is not kept.
        with contextlib.suppress(BadError):
            if parse(value, where.limits)[0] != key:
                kept.append(value)
    entries = [*kept, entry(key, choice.tile, choice)][-MAX_ENTRIES:]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    try:
        write(path, document(where.card, where.limits[0], entries, torch=str(torch.__version__), date=date))
    except OSError as error:
        _warn(path, f"could not be written ({type(error).__name__}); the choice holds in this process")
