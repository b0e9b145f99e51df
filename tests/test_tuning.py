"""Tuned tables: what is read, what is ignored, which comes first, what is measured and when; no time is judged here."""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import dlgpu
from conftest import DEVICE
from dlgpu.bench import __main__ as cli
from dlgpu.bench import machine_code
from dlgpu.bench import tune as bench_tune
from dlgpu.kernels import _triton, configs, linear, tuning
from tolerance import assert_conforms

ROOT = Path(__file__).resolve().parents[1]
CARD = "NVIDIA Test 9000"
LIMITS = (90, 227 * 1024, 132)
CUDA = torch.device("cuda", 0)
HERE = torch.empty(0, device=DEVICE).device

KEY = tuning.linear_key(
    dtype=torch.bfloat16,
    precision="ieee",
    a_t=False,
    b_t=True,
    M=8192,
    N=4096,
    K=1024,
    activation="gelu",
    saves_z=True,
    gradient=False,
    aligned=True,
    aligned_out=True,
    split=False,
)
DW = KEY._replace(a_t=True, b_t=False, M=1024, N=256, K=8192, activation=None, saves_z=False, split=True)
TILES = tuning.candidates(LIMITS, KEY)
DEFAULT, OTHER, CUBLAS = TILES[0], TILES[-2], TILES[-1]


def bare(tile):
    return dataclasses.replace(tile, reason="")


def table_of(entries, **changes):
    return tuning.document(CARD, LIMITS[0], entries) | changes


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """Nobody's own tables, and none of this test's for the next one."""
    monkeypatch.setenv("DLGPU_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_tables", {})
    monkeypatch.setattr(tuning, "_warned", set())
    monkeypatch.setattr(tuning, "_enabled", False)
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "shipped")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that only tuning sees."""
    monkeypatch.setattr(tuning, "INTERPRETED", False)
    monkeypatch.setattr(tuning, "device_limits", lambda device: LIMITS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    monkeypatch.setattr(tuning, "_capturing", lambda device: False)


@contextlib.contextmanager
def injected(monkeypatch, tiles=(), enabled=False):
    """A table in use where the tests run."""
    where = tuning.Table(CARD, _triton.device_limits(HERE), HERE, dict(tiles))
    with monkeypatch.context() as patch:
        patch.setitem(tuning._tables, HERE, where)
        patch.setattr(tuning, "_enabled", enabled)
        patch.setattr(tuning, "_may_tune", lambda device: True)
        yield where


# What is read.


def test_the_three_sources(gpu, tmp_path):
    """The user's table comes before the shipped one, that before configs.py; each says so."""
    shipped, own = tuning.SHIPPED / "nvidia-test-9000.json", tuning.user_path(CARD)
    assert (
        own
        == tmp_path / "cache" / f"nvidia-test-9000-triton-{_triton.triton.__version__.replace('.', '-')}.json"
    )
    assert tuning.table(CUDA) is None
    tuning.write(shipped, table_of([tuning.entry(KEY, OTHER), tuning.entry(DW, CUBLAS)]))
    # Read once, at the first product.
    assert tuning.table(CUDA) is None
    tuning._tables.clear()
    found = tuning.table(CUDA)
    assert {key: bare(tile) for key, tile in found.tiles.items()} == {KEY: bare(OTHER), DW: bare(CUBLAS)}
    assert found.linear(KEY).reason == f"tuned on {CARD}, from the table shipped with dlgpu"
    tuning.write(own, table_of([tuning.entry(KEY, TILES[3])]))
    tuning._tables.clear()
    found = tuning.table(CUDA)
    assert found.linear(KEY) == dataclasses.replace(
        TILES[3], reason=f"tuned on {CARD}, from the user's table"
    )
    assert bare(found.linear(DW)) == bare(CUBLAS)
    assert found.linear(KEY._replace(N=128)) is None


def test_no_table_costs_one_look_up(monkeypatch, launches):
    launches.dry = True
    monkeypatch.setattr(tuning, "linear_key", None)
    if not _triton.INTERPRETED:
        monkeypatch.setattr(tuning, "_open", lambda device: None)
    x = torch.randn(64, 64, device=DEVICE)
    for _ in range(2):
        linear.linear_fwd(x, x, None, "gelu", 0.0, True)
    assert tuning._tables == {HERE: None}


def test_no_table_costs_a_rule_one_look_up(monkeypatch, launches):
    launches.dry = True
    monkeypatch.setattr(tuning, "RuleKey", None)
    if not _triton.INTERPRETED:
        monkeypatch.setattr(tuning, "_open", lambda device: None)
    x = torch.randn(64, 64, device=DEVICE)
    with dlgpu.use_backend("triton"):
        for _ in range(2):
            dlgpu.functional.softmax(x, 1)
    assert tuning._tables == {HERE: None}


@pytest.mark.skipif(not _triton.INTERPRETED, reason="a GPU has tables")
def test_interpreted_kernels_ask_no_table(monkeypatch):
    tuning.write(tuning.SHIPPED / "nvidia-test-9000.json", table_of([tuning.entry(KEY, OTHER)]))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: CARD)
    dlgpu.tune(True)
    for device in (CUDA, HERE, torch.device("meta")):
        assert tuning.table(device) is None


def test_every_allowed_choice_survives_the_file(tmp_path):
    path = tmp_path / "table.json"
    choices = [*TILES, *(r for t in TILES[:-1] for r in configs.linear_refinements(t))]
    for tile in choices:
        entries = [tuning.entry(KEY, tile, tuning.Choice(tile, (1e-3,) * 3, (0.9e-3,) * 3, 0.9), "fwd+bwd")]
        tuning.write(path, table_of(entries, dlgpu="0", torch="2", cuda="13", date="2026-01-01", commit="c"))
        assert tuning.read(path, CARD, LIMITS) == {KEY: bare(tile)}
    assert json.loads(path.read_text())["entries"][0]["best_us"] == [900.0] * 3


def changed(**changes):
    return tuning.entry(KEY, OTHER) | changes


def changed_tile(**changes):
    return changed(tile=tuning.entry(KEY, OTHER)["tile"] | changes)


BAD_ENTRIES = {
    "no object": [],
    "unknown field": changed(note="fast"),
    "missing field": {k: v for k, v in changed().items() if k != "split"},
    "op": changed(op="softmax"),
    "dtype": changed(dtype="float64"),
    "dtype's type": changed(dtype=16),
    "precision": changed(precision="tf32x3"),
    "activation": changed(activation="mish"),
    "size 0": changed(N=0),
    "huge size": changed(N=1 << 40),
    "size's type": changed(N=4096.0),
    "a bool for a size": changed(N=True),
    "an int for a bool": changed(saves_z=1),
    "no bucket": changed(M=8191),
    "tile's name": changed(tile="cudnn"),
    "tile's type": changed(tile=[128, 128]),
    "tile's unknown field": changed_tile(maxnreg=32),
    "tile's missing field": changed(
        tile={k: v for k, v in tuning.entry(KEY, OTHER)["tile"].items() if k != "num_warps"}
    ),
    "no candidate": changed_tile(block_m=96),
    "too many stages": changed_tile(num_stages=7),
    "a negative group": changed_tile(group_m=-8),
    "another kernel": changed_tile(tma=False),
    "a string for an int": changed_tile(num_warps="4"),
    "a bool for an int": changed_tile(subtiles=True),
    "times": changed(best_us=["<b>", 1.0, 2.0]),
    "times' type": changed(best_us="fast"),
}


@pytest.mark.parametrize("bad", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_bad_entry_is_ignored(tmp_path, bad):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table_of([bad, tuning.entry(DW, CUBLAS), bad])))
    with pytest.warns(RuntimeWarning, match=r"table\.json: 2 of 3 entries ignored; entry 0: ") as said:
        assert tuning.read(path, CARD, LIMITS) == {DW: bare(CUBLAS)}
    assert len(said) == 1
    # Once a file; and nothing of the file or its folder.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuning.read(path, CARD, LIMITS)
    assert str(tmp_path) not in str(said[0].message)
    assert "<b>" not in str(said[0].message)


GOOD = [tuning.entry(KEY, OTHER)]
BAD_FILES = {
    "empty": b"",
    "not JSON": b"{",
    "not UTF-8": b'{"schema": "\xff"}',
    "another thing": b"[]",
    "nested too deep": b"[" * 100_000,
    "an integer of a million digits": b'{"schema": 1' + b"0" * 1_000_000 + b"}",
    "too large": b" " * (tuning.MAX_BYTES + 1),
    "schema": json.dumps(table_of(GOOD, schema="dlgpu-tuned/2")).encode(),
    "card": json.dumps(table_of(GOOD, card="NVIDIA Test 9001")).encode(),
    "capability": json.dumps(table_of(GOOD, capability=100)).encode(),
    "unknown field": json.dumps(table_of(GOOD, host="here")).encode(),
    "entries' type": json.dumps(table_of(GOOD) | {"entries": {}}).encode(),
    "no entries": json.dumps({k: v for k, v in table_of(GOOD).items() if k != "entries"}).encode(),
    "too many entries": json.dumps(table_of([{}] * (tuning.MAX_ENTRIES + 1))).encode(),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_ignored(gpu, tmp_path, content):
    path = tuning.user_path(CARD)
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match="ignored, ") as said:
        assert tuning.table(CUDA) is None
    assert len(said) == 1
    assert str(tmp_path) not in str(said[0].message)


def test_a_table_of_another_triton_is_somebody_elses(gpu):
    tuning.write(tuning.SHIPPED / "nvidia-test-9000.json", table_of(GOOD, triton="3.0.0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.table(CUDA) is None


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_no_regular_file_is_ignored(tmp_path, make):
    make(tmp_path / "table.json")
    with pytest.warns(RuntimeWarning, match="no regular file"):
        assert tuning.read(tmp_path / "table.json", CARD, LIMITS) == {}


def test_a_bad_table_changes_nothing(gpu, monkeypatch):
    """The plan of a product with a table of nonsense is that without any."""
    x = torch.empty(8192, 1024, dtype=torch.bfloat16, device="meta")
    w = torch.empty(4096, 1024, dtype=torch.bfloat16, device="meta")
    before = linear.linear_tiles(x, w, "gelu", True)
    monkeypatch.setattr(tuning, "_tables", {})
    path = tuning.user_path(CARD)
    path.parent.mkdir()
    path.write_text(json.dumps(table_of(list(BAD_ENTRIES.values()))))
    with pytest.warns(RuntimeWarning):
        found = tuning._open(CUDA)
    assert found is None
    assert linear.linear_tiles(x, w, "gelu", True) == before


def test_where_the_users_file_is(monkeypatch, tmp_path):
    name = tuning.user_path(CARD).name
    assert tuning.user_path("../../etc/passwd").parent == tmp_path / "cache"
    monkeypatch.delenv("DLGPU_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.user_path(CARD) == tmp_path / "dlgpu" / name
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for relative in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert tuning.user_path(CARD) == tmp_path / "home" / ".cache" / "dlgpu" / name
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert tuning.user_path(CARD) == tmp_path / "local" / "dlgpu" / name
    monkeypatch.delenv("LOCALAPPDATA")
    assert tuning.user_path(CARD) is None


# Of memory-bound kernels.

RULE = tuning.RuleKey("softmax_tile", (torch.bfloat16, 40000, False, True))
VARIANT = tuning.candidates(LIMITS, RULE)[-1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rule_keys():
    """Of every rule, with long rows and short."""
    widths = (1, 5, 50, 1000, 1024, 4096, 8192, 8200, 9001, 16384, 32000, 32768, 40000, 128256)
    either = (False, True)
    choices = {
        "capability": (80, 90, 100, 120),
        "dtype": DTYPES,
        "C": widths,
        "matrices": (1, 2),
        "itemsize": (2, 4),
    }
    for rule in tuning.RULES:
        names = tuning._kinds(rule)
        for arguments in itertools.product(*(choices.get(name, either) for name in names)):
            yield tuning.RuleKey(rule, arguments)


def width(tile):
    return tile.lanes * tile.vector if isinstance(tile, configs.RowTile) else tile.block_n


def elements(tile):
    return tile.block if isinstance(tile, configs.FlatTile) else tile.block_m * width(tile)


def test_variants():
    """A row that a program holds whole stays whole, one that goes by steps does not become so: kernels are compiled for
    either, with what they read."""
    counts = set()
    for key in rule_keys():
        found = tuning.candidates(LIMITS, key)
        default, C = tuning.RULES[key.rule](*key.arguments), key.named().get("C")
        assert found[0] == default
        assert len(found) == len(set(found))
        for tile in found:
            assert type(tile) is type(default)
            for name in tuning._fields_of(tile):
                value = getattr(tile, name)
                assert value >= 1
                assert getattr(default, name) / value in (0.5, 1, 2)
                assert value & (value - 1) == 0
            assert tile.num_warps <= 32
            assert elements(tile) / tile.num_warps <= 2 * elements(default) / default.num_warps
            if C is None:
                assert (tile.block % tile.vector, tile.vector) == (0, default.vector)
            else:
                assert (width(tile) >= C) == (width(default) >= C)
                assert width(tile) == width(default) or tile.block_m == default.block_m
            if isinstance(tile, configs.StripTile):
                assert tile.rows == tile.block_m
        counts.add(len(found))
    assert min(counts) > 2
    assert max(counts) == 8


def test_every_variant_survives_the_file(tmp_path):
    path = tmp_path / "table.json"
    for key in itertools.islice(rule_keys(), 0, None, 23):
        for tile in tuning.candidates(LIMITS, key):
            choice = tuning.Choice(tile, (1e-3,) * 3, (0.9e-3,) * 3, 0.9)
            tuning.write(path, table_of([tuning.entry(KEY, OTHER), tuning.entry(key, tile, choice, "step")]))
            assert tuning.read(path, CARD, LIMITS) == {KEY: bare(OTHER), key: tile}


def changed_rule(arguments=None, tile=None, **changes):
    found = tuning.entry(RULE, VARIANT) | changes
    found["arguments"] = found["arguments"] | (arguments or {})
    found["tile"] = found["tile"] | (tile or {})
    return found


BAD_RULES = {
    "no such rule": changed_rule(rule="dropout_tile"),
    "what is no rule": changed_rule(rule="variants"),
    "rule's type": changed_rule(rule=["softmax_tile"]),
    "another rule's arguments": changed_rule(rule="logsumexp_tile"),
    "both kinds": changed_rule(op="linear"),
    "unknown field": changed_rule(note="fast"),
    "no arguments": {k: v for k, v in changed_rule().items() if k != "arguments"},
    "arguments' type": changed_rule() | {"arguments": [1]},
    "unknown argument": changed_rule({"N": 5}),
    "dtype": changed_rule({"dtype": "float64"}),
    "dtype's type": changed_rule({"dtype": 16}),
    "size 0": changed_rule({"C": 0}),
    "a negative size": changed_rule({"C": -1}),
    "huge size": changed_rule({"C": 1 << 31}),
    "a bool for a size": changed_rule({"C": True}),
    "a float for a size": changed_rule({"C": 40000.0}),
    "an int for a bool": changed_rule({"aligned": 1}),
    "another tile's field": changed_rule(tile={"block": 8}),
    "no field": changed_rule() | {"tile": {"num_warps": 4}},
    "tile's type": changed_rule() | {"tile": "cublas"},
    "another width": changed_rule(tile={"lanes": 8192}),
    "another vector": changed_rule(tile={"vector": 4}),
    "four times the warps": changed_rule(tile={"num_warps": 8}),
    "a negative number": changed_rule(tile={"block_m": -1}),
    "a bool for an int": changed_rule(tile={"block_m": True}),
    "a string for an int": changed_rule(tile={"lanes": "512"}),
    "a reason": changed_rule(tile={"reason": "<b>"}),
    "times": changed_rule(best_us=["<b>", 1.0, 2.0]),
}


@pytest.mark.parametrize("bad", BAD_RULES.values(), ids=BAD_RULES)
def test_a_bad_entry_of_a_rule_is_ignored(tmp_path, bad):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table_of([bad, tuning.entry(RULE, VARIANT)])))
    with pytest.warns(RuntimeWarning, match=r"table\.json: 1 of 2 entries ignored; entry 0: ") as said:
        assert tuning.read(path, CARD, LIMITS) == {RULE: VARIANT}
    assert len(said) == 1
    assert "<b>" not in str(said[0].message)


def test_an_entry_for_another_size_is_for_no_other():
    """The other way round: whoever asks for what no entry is for gets the rule's own choice."""
    where = tuning.Table(CARD, LIMITS, CUDA, {RULE: VARIANT})
    rule, arguments = configs.softmax_tile, RULE.arguments
    with bench_tune._in_use(where, where.tiles):
        assert tuning.tile(CUDA, rule, *arguments) is VARIANT
        for i, other in enumerate((torch.float16, 40001, True, False)):
            given = (*arguments[:i], other, *arguments[i + 1 :])
            assert tuning.tile(CUDA, rule, *given) == rule(*given)
    assert tuning.tile(HERE, rule, *arguments) == rule(*arguments)


D = dlgpu.functional


def target(C):
    return torch.arange(3, device=DEVICE) % C


# The rules, and calls of theirs: ours, torch's, and the shape of the first operand, or dtype too.
CALLS = {
    "activation_tile": (D.gelu, F.gelu, (3, 1500)),
    "cross_entropy_tile": (
        lambda x: D.cross_entropy(x, target(x.shape[1])),
        lambda x: F.cross_entropy(x, target(x.shape[1])),
        (3, 50),
        (3, 9001),
    ),
    "cross_entropy_grad_tile": (
        lambda x: D.cross_entropy(x, target(x.shape[1]), grad_in_forward=True),
        lambda x: F.cross_entropy(x, target(x.shape[1])),
        (3, 48),
        (3, 33000),
    ),
    "layer_norm_bwd_tile layer_norm_tile": (
        lambda x: D.layer_norm(x, x.shape[1:], x[0]),
        lambda x: F.layer_norm(x, x.shape[1:], x[0]),
        (3, 50),
        (1, 33000),
    ),
    "logsumexp_tile": (lambda x: D.logsumexp(x, 1), lambda x: x.logsumexp(1), (3, 50), (3, 9001)),
    "loss_tile": (lambda x: D.mse_loss(x, x * 0.5), lambda x: F.mse_loss(x, x * 0.5), (3, 1500)),
    "multi_margin_tile": (
        lambda x: D.multi_margin_loss(x.float(), target(x.shape[1])),
        lambda x: F.multi_margin_loss(x if x.dtype is torch.float64 else x.float(), target(x.shape[1])),
        (3, 50),
        (3, 9001),
    ),
    "softmax_tile": (lambda x: D.softmax(x, 1), lambda x: x.softmax(1), (3, 50), (3, 33000)),
}


def taken(tile):
    """The part of a tile that every launch is given."""
    return getattr(tile, "block", None) or tile.block_m, tile.num_warps


def given(launch):
    meta = launch[3]
    return meta.get("BLOCK", meta.get("BLOCK_M")), meta["num_warps"]


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize(
    ("rules", "ours", "theirs", "shape"),
    [(name, ours, theirs, shape) for name, (ours, theirs, *shapes) in CALLS.items() for shape in shapes],
    ids=lambda value: value if isinstance(value, str) else str(value[1]) if isinstance(value, tuple) else "",
)
def test_any_variant_is_as_accurate(launches, number, rules, ours, theirs, shape):
    """By way of a table, whose tiles are those of the launches."""
    x = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
    where = tuning.Table(CARD, _triton.device_limits(HERE), HERE)
    with bench_tune._in_use(where, {}) as asked:
        ours(leaf := x.clone().requires_grad_()).float().sum().backward()
    assert leaf.grad is not None
    assert {key.rule for key in asked.keys_asked} == set(rules.split())
    tiles = {}
    for key in asked.keys_asked:
        found = tuning.candidates(where.limits, key)
        tiles[key] = found[number % len(found)]
    del launches[:]
    with bench_tune._in_use(where, tiles):
        assert_conforms(ours, theirs, (x,))
    # The kernels of the rules, beside which there are those that add up.
    own = [entry for entry in launches if entry[0].endswith(("_fwd_kernel", "_bwd_kernel", "_grad_kernel"))]
    assert set(map(given, own)) == set(map(taken, tiles.values()))


@pytest.mark.parametrize("number", range(1, 8))
@pytest.mark.parametrize("odd", [0, 1], ids=["aligned", "unaligned"])
def test_any_variant_steps_as_well(launches, number, odd):
    # Unaligned, each element has an address of its own.
    p, g = (torch.randn(3001 + odd, device=DEVICE)[odd:] for _ in range(2))
    where = tuning.Table(CARD, _triton.device_limits(HERE), HERE)
    key = tuning.RuleKey("optimizer_tile", (4, not odd))
    found = tuning.candidates(where.limits, key)
    tile = found[number % len(found)]
    ours, theirs = p.clone(), p.clone().requires_grad_()
    if odd:
        ours = torch.cat([p[:1], p])[1:]
    ours.requires_grad_()
    ours.grad, theirs.grad = torch.cat([g[:1], g])[1:] if odd else g.clone(), g.clone()
    with bench_tune._in_use(where, {key: tile}) as asked:
        dlgpu.optim.SGD([ours], lr=0.1).step()
    torch.optim.SGD([theirs], lr=0.1).step()
    assert asked.keys_asked == [key]
    assert [given(entry) for entry in launches if entry[0] == "_multi_tensor_kernel"] == [taken(tile)]
    torch.testing.assert_close(ours, theirs)


def test_explain_says_so_of_rules(monkeypatch):
    """Every kernel's tile that a table may hold is shown with where it is from."""
    where = tuning.Table(CARD, _triton.device_limits(HERE), HERE)
    shown = set()
    for C in (40, 41, 48, 1001):
        x = torch.randn(3, C, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        calls = [
            ("gelu", (x,), {}),
            ("softmax", (x, 1), {}),
            ("logsumexp", (x, 1), {}),
            ("layer_norm", (x, (C,)), {}),
            ("cross_entropy", (x, target(C)), {}),
            ("cross_entropy", (x, x.detach().softmax(1)), {}),
            ("cross_entropy", (x, target(C)), {"grad_in_forward": True}),
            ("cross_entropy", (x, target(C)), {"grad_in_forward": True, "ignore_index": 1}),
            ("cross_entropy", (x, target(C)), {"grad_in_forward": True, "label_smoothing": 0.1}),
            ("mse_loss", (x, x), {}),
            ("multi_margin_loss", (x, target(C)), {}),
            ("adam", ([x.detach()],), {}),
        ]
        for name, arguments, given in calls:
            with bench_tune._in_use(where, {}) as asked:
                before = dlgpu.explain(name, *arguments, **given).steps
            if name != "adam":
                with bench_tune._in_use(where, {}) as launched:
                    getattr(dlgpu.functional, name)(*arguments, **given).sum().backward()
                assert set(asked.keys_asked) == set(launched.keys_asked), name
            tiles = {}
            for key in asked.keys_asked:
                tile = tuning.candidates(where.limits, key)[1]
                tiles[key] = dataclasses.replace(tile, reason=f"tuned on {CARD}, from here")
            with injected(monkeypatch, tiles), dlgpu.use_backend("triton"):
                after = dlgpu.explain(name, *arguments, **given).steps
            assert len(before) == len(after)
            for (kernel, said), (_, tuned) in zip(before, after, strict=True):
                assert "tuned" not in said
                assert (f", tuned on {CARD}, from here" in tuned) == ("Tile(" in said), kernel
                assert "reason" not in tuned
            shown |= {key.rule for key in tiles}
    assert shown == set(tuning.RULES)


# What is written.


def stored(where, key, tile=OTHER):
    tuning._store(where, key, tuning.Choice(tile, (1.0,) * 3, (0.9,) * 3, 0.9))


def test_the_users_table_grows_and_is_replaced(tmp_path):
    where = tuning.Table(CARD, LIMITS, CUDA)
    path = tuning.user_path(CARD)
    stored(where, KEY)
    stored(where, DW, CUBLAS)
    stored(where, KEY, DEFAULT)
    assert tuning.read(path, CARD, LIMITS) == {KEY: bare(DEFAULT), DW: bare(CUBLAS)}
    assert len(json.loads(path.read_text())["entries"]) == 2
    assert path.parent.stat().st_mode & 0o77 == 0
    # A file that is no use is written anew; bad entries do not stay.
    path.write_text(json.dumps(table_of([*BAD_ENTRIES.values(), tuning.entry(DW, CUBLAS)])))
    stored(where, KEY)
    assert tuning.read(path, CARD, LIMITS) == {KEY: bare(OTHER), DW: bare(CUBLAS)}
    path.write_text("{")
    stored(where, KEY)
    assert tuning.read(path, CARD, LIMITS) == {KEY: bare(OTHER)}


def test_an_interrupted_write_leaves_the_old_table(monkeypatch):
    where = tuning.Table(CARD, LIMITS, CUDA)
    stored(where, DW, CUBLAS)
    path = tuning.user_path(CARD)
    old = path.read_bytes()

    def interrupt(source, target):
        # All of it is there by now.
        assert KEY in tuning.read(Path(source), CARD, LIMITS)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            stored(where, KEY)
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_one_warning(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DLGPU_CACHE_DIR", str(tmp_path / "file" / "below"))
    where = tuning.Table(CARD, LIMITS, CUDA)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        stored(where, KEY)
        stored(where, DW, CUBLAS)
    assert len(said) == 1
    assert "could not be written" in str(said[0].message)


WRITER = """
import os, sys
import torch
from dlgpu.kernels import tuning
from test_tuning import CARD, CUDA, KEY, LIMITS, OTHER, stored
assert not tuning._tables, "a table was read at import"
where = tuning.Table(CARD, LIMITS, CUDA)
print("ready", flush=True)
sys.stdin.readline()
if sys.argv[1] == "killed":
    os.replace = lambda source, target: os._exit(9)
for i in range(15):
    stored(where, KEY._replace(N=128 * (1 + i + 100 * int(sys.argv[2]))))
"""


def test_writers_at_once_never_corrupt_the_table():
    where = tuning.Table(CARD, LIMITS, CUDA)
    stored(where, DW, CUBLAS)
    path = tuning.user_path(CARD)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, kind, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number, kind in enumerate(("whole", "whole", "killed"))
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    seen = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(writer.poll() is None for writer in writers):
            assert DW in tuning.read(path, CARD, LIMITS)
            seen += 1
        found = tuning.read(path, CARD, LIMITS)
    assert seen > 0
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0, 9]
    # At least the last of one of them, and none of the one that was killed.
    numbers = [key.N // 128 - 1 for key in found if key != DW]
    assert {14, 114} & set(numbers)
    assert all(number < 200 for number in numbers)


# What is measured, and when.


def test_off_unless_asked_for(gpu, monkeypatch):
    assert tuning.table(CUDA) is None
    dlgpu.tune()
    assert tuning.table(CUDA) == tuning.Table(CARD, LIMITS, CUDA)
    asked = []
    monkeypatch.setattr(tuning, "_tune_linear", lambda *args: asked.append(args) or OTHER)
    where = tuning.table(CUDA)
    assert where.linear(KEY, 8000) is OTHER
    # `explain` launches nothing, and an empty batch needs nothing.
    assert where.linear(KEY) is None
    assert where.linear(KEY, 0) is None
    dlgpu.tune(False)
    assert where.linear(KEY, 8000) is None
    assert [args[1:] for args in asked] == [(KEY, 8000)]


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True), ("yes", None), ("2", None)]
)
def test_the_variable(monkeypatch, value, expected):
    if value is None:
        monkeypatch.delenv("DLGPU_TUNE", raising=False)
    else:
        monkeypatch.setenv("DLGPU_TUNE", value)
    if expected is None:
        with pytest.raises(ValueError, match="DLGPU_TUNE"):
            tuning._default()
    else:
        assert tuning._default() is expected


class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_when_nothing_may_be_measured(gpu, monkeypatch):
    assert tuning._may_tune(CUDA)
    assert not tuning._may_tune(torch.device("cpu"))
    with Watch():
        assert not tuning._may_tune(CUDA)
    for owner, name, value in (
        (tuning, "_capturing", True),
        (torch.compiler, "is_compiling", True),
        (tuning, "INTERPRETED", True),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, (lambda *args: True) if callable(getattr(owner, name)) else value)
            assert not tuning._may_tune(CUDA)
    assert tuning._may_tune(CUDA)


def test_capture_is_asked_of_the_tensors_device(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: len(entered) == 1)
    assert tuning._capturing(CUDA)
    assert entered == [CUDA]


def test_interpreted_kernels_are_never_measured(monkeypatch):
    if not _triton.INTERPRETED:
        pytest.skip("kernels are compiled here")
    monkeypatch.setattr(tuning, "choose", None)
    dlgpu.tune(True)
    x = torch.randn(8, 16)
    with dlgpu.use_backend("triton"):
        dlgpu.functional.linear(x, x)
    assert tuning._tables == {HERE: None}


def count_choices(monkeypatch, tile=1):
    """Stands for the measuring; the products measured."""
    counted = []

    def choose(run, tiles, timer, **options):
        run(tiles[tile])
        counted.append(tiles)
        return tuning.Choice(tiles[tile], (2.0,) * 3, (1.0,) * 3, 0.5)

    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(tuning, "_timer", lambda device: None)
    return counted


def test_a_batch_of_the_same_bucket_measures_and_compiles_nothing(monkeypatch, launches):
    launches.dry = True
    counted = count_choices(monkeypatch)
    w = torch.randn(72, 80, dtype=torch.bfloat16, device=DEVICE)
    with injected(monkeypatch, enabled=True) as where:
        for batches, measured in (((65, 512, 100, 65), 3), ((513, 4096), 6), ((64, 1), 9), ((4097,), 12)):
            specializations = {}
            for M in batches:
                x = torch.randn(M, 80, dtype=torch.bfloat16, device=DEVICE)
                dz = torch.randn(M, 72, dtype=torch.bfloat16, device=DEVICE)
                del launches[:]
                linear.linear_fwd(x, w, None, "gelu", 0.0, True)
                linear.linear_dgrad(dz, w)
                linear.linear_wgrad(dz, x)
                # The first batch measures them; the last launches are the call's own.
                for name, _, _, meta in [launch for launch in launches if launch[0] != "_sum_kernel"][-1:]:
                    meta = {k: v for k, v in meta.items() if k != "SPLIT"}
                    specializations.setdefault(name, []).append(meta)
            assert all(found == [found[0]] * len(batches) for found in specializations.values())
            assert len(counted) == measured
        assert len(where.tiles) == 12
        # What a later process would find.
        assert tuning.read(tuning.user_path(CARD), CARD, where.limits) == {
            key: bare(tile) for key, tile in where.tiles.items()
        }
        assert all(tile.reason == f"tuned on {CARD}, in this process" for tile in where.tiles.values())


def test_one_thread_measures(monkeypatch):
    started, go = threading.Event(), threading.Event()
    found = []

    def choose(run, tiles, timer, **options):
        run(DEFAULT)
        found.append("measured")
        started.set()
        assert go.wait(30)
        return tuning.Choice(OTHER, (2.0,) * 3, (1.0,) * 3, 0.5)

    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(tuning, "_timer", lambda device: None)
    monkeypatch.setattr(tuning, "trial", lambda *args: lambda tile: setattr(tuning._local, "hits", 1))
    monkeypatch.setattr(tuning._local, "hits", 0)
    with injected(monkeypatch, enabled=True) as where:
        first = threading.Thread(target=lambda: found.append(where.linear(KEY, 10)))
        first.start()
        assert started.wait(30)
        # Others do not wait: they go by configs.py meanwhile.
        others = [threading.Thread(target=lambda: found.append(where.linear(KEY, 10))) for _ in range(4)]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join(30)
        assert found == ["measured", None, None, None, None]
        go.set()
        first.join(30)
        assert bare(found[-1]) == bare(OTHER)
        assert bare(where.linear(KEY, 10)) == bare(OTHER)
        assert found.count("measured") == 1


@pytest.mark.parametrize("error", [RuntimeError("no"), torch.OutOfMemoryError("no")])
def test_a_failure_is_one_warning_and_the_default(monkeypatch, error):
    tried = []

    def choose(*args, **options):
        tried.append(1)
        raise error

    monkeypatch.setattr(tuning, "choose", choose)
    monkeypatch.setattr(tuning, "_timer", lambda device: None)
    x, w, b = (torch.randn(*s, dtype=torch.bfloat16, device=DEVICE) for s in ((8, 16), (8, 16), (8,)))
    with injected(monkeypatch, enabled=True), pytest.warns(RuntimeWarning, match="not be tuned") as said:
        found = [linear.linear_fwd(x, w, b, "relu", 0.0, False)[0] for _ in range(2)]
    assert len(said) == len(tried) == 1
    for y in found:
        assert torch.equal(y, linear.linear_fwd(x, w, b, "relu", 0.0, False)[0])
    assert not tuning.user_path(CARD).exists()


PRODUCTS = {
    "forward": KEY._replace(M=64, N=24, K=40),
    "forward, odd": KEY._replace(M=64, N=25, K=41, aligned=False, aligned_out=False),
    "forward, one element off": KEY._replace(M=64, N=24, K=40, aligned=False),
    "forward, transposed": KEY._replace(M=64, N=24, K=40, a_t=True, b_t=False),
    "float32": KEY._replace(dtype=torch.float32, M=64, N=24, K=40, activation=None, saves_z=False),
    "dX": KEY._replace(M=64, N=24, K=40, b_t=False, activation=None, saves_z=False),
    "dZ beneath": KEY._replace(M=64, N=24, K=40, b_t=False, activation="silu", saves_z=False, gradient=True),
    "dZ beneath, one off": KEY._replace(
        M=64, N=24, K=40, b_t=False, activation="silu", saves_z=False, gradient=True, aligned_out=False
    ),
    "dW": DW._replace(M=24, N=40, K=64),
}


@pytest.mark.parametrize("key", PRODUCTS.values(), ids=PRODUCTS)
def test_a_trial_runs_the_product_of_its_key(monkeypatch, launches, key):
    """On operands of its own, in this thread only, and the caller's random numbers stay as they are."""
    launches.dry = True
    before = torch.get_rng_state()
    with injected(monkeypatch) as where:
        run = tuning.trial(key, 40, where)
        tiles = tuning.candidates(where.limits, key)
        for tile in tiles[:3]:
            hits = tuning._local.hits
            del launches[:]
            run(tile)
            assert tuning._local.hits == hits + 1
            if isinstance(tile, configs.MatmulTile):
                meta = launches[0][3]
                assert (meta["BLOCK_M"], meta["BLOCK_N"], meta["num_stages"]) == (
                    tile.block_m,
                    tile.block_n,
                    tile.num_stages,
                )
    assert tuning._local.forced is None
    assert torch.equal(torch.get_rng_state(), before)


# The choice itself, by a clock that only calls move.


class Race:
    """Tiles with costs; a round's noise is common to its calls or not."""

    def __init__(self, costs, noise=lambda round, tile: 1.0):
        self.costs, self.noise = costs, noise
        self.order = []
        self.current = None

    def run(self, tile):
        self.current = bare(tile)
        if (cost := self.cost(tile)) is None:
            raise RuntimeError("does not compile")
        return (torch.full((8,), float("nan")) if cost == "wrong" else torch.ones(8),)

    def cost(self, tile):
        return next((cost for other, cost in self.costs if bare(other) == bare(tile)), 2.0)

    def timer(self, function):
        function()
        self.order.append(self.current)
        return self.cost(self.current) * self.noise(len(self.order), self.current)

    def choose(self, tiles=TILES, **options):
        return tuning.choose(self.run, tiles, self.timer, **options)


def test_the_fastest_is_chosen():
    found = Race([(DEFAULT, 1.0), (OTHER, 0.9), (TILES[4], 0.95)]).choose()
    assert found == tuning.Choice(OTHER, (1.0,) * 3, (0.9,) * 3, 0.9)
    assert Race([(DEFAULT, 1.0), (CUBLAS, 0.9)]).choose().tile is CUBLAS


def test_a_refinement_is_chosen():
    best = configs.linear_refinements(OTHER)[1]
    assert best.group_m == 16
    assert Race([(DEFAULT, 1.0), (OTHER, 0.99), (best, 0.9)]).choose().tile == best


@pytest.mark.parametrize("cost", [0.985, 1.0, 1.1])
def test_less_than_2_percent_is_nothing(cost):
    found = Race([(DEFAULT, 1.0), (OTHER, cost)]).choose()
    assert found.tile is DEFAULT
    assert found.ratio == 1.0
    better = Race([(DEFAULT, 1.0), (OTHER, 0.985)]).choose(gain=0.01)
    assert better.tile is OTHER


def test_noise_is_no_gain():
    """Faster than configs.py's choice in three rounds of five, slower in two."""
    pattern = itertools.cycle((1.0, 1.0, 1.5, 1.0, 1.5))

    def noise(count, tile):
        return next(pattern) if tile == bare(OTHER) else 1.0

    race = Race([(DEFAULT, 1.0), (OTHER, 0.8)], noise)
    assert race.choose([DEFAULT, OTHER], screening=5, refined=0).tile is DEFAULT
    pattern = itertools.cycle((1.0, 1.0, 1.0, 1.0, 1.5))
    found = race.choose([DEFAULT, OTHER], screening=5, refined=0)
    assert found.tile is OTHER
    assert found.best_s == (0.8, 0.8, 0.8)


def test_rounds_are_interleaved():
    race = Race([(DEFAULT, 1.0)])
    race.choose(TILES[:4], screening=3, rounds=5, finalists=4, refined=0)
    rounds = [race.order[i : i + 4] for i in range(0, len(race.order), 4)]
    assert len(rounds) == 8
    assert all(set(order) == set(map(bare, TILES[:4])) for order in rounds)
    assert len(set(map(tuple, rounds))) > 1


@pytest.mark.parametrize("broken", [None, "wrong"])
def test_what_does_not_work_is_never_measured(broken):
    race = Race([(DEFAULT, 1.0), (OTHER, broken), (TILES[4], 0.9)])
    assert race.choose().tile is TILES[4]
    assert bare(OTHER) not in race.order


def test_what_cannot_be_measured_raises():
    with pytest.raises(RuntimeError, match="does not compile"):
        Race([(DEFAULT, None)]).choose()

    class OutOfMemory(Race):
        def run(self, tile):
            if tile is OTHER:
                raise torch.OutOfMemoryError
            return super().run(tile)

    with pytest.raises(torch.OutOfMemoryError):
        OutOfMemory([(DEFAULT, 1.0)]).choose()


def test_the_event_timer(monkeypatch):
    """The cache is overwritten before the first event, and the call is between the two."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return 2.5

    size = {}
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=1 << 20)
    )
    monkeypatch.setattr(
        torch,
        "empty",
        lambda n, **options: size.update(n=n) or types.SimpleNamespace(zero_=lambda: log.append("flush")),
    )
    timer = tuning.EventTimer(CUDA)
    assert timer(lambda: log.append("call")) == 2.5e-3
    assert log == ["flush", "event", "call", "event", "wait"]
    assert size["n"] >= 3 << 20


# The candidates.


@pytest.mark.parametrize("capability", machine_code.CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_candidates(capability, dtype):
    memory = machine_code.shared_memory_limit(capability)
    for M, N, K in ((8192, 4096, 4096), (8192, 1024, 256), (40, 4096, 512), (3000, 50, 200), (1, 1, 1)):
        for flags in (
            {},
            {"gradient": True},
            {"split": True},
            {"aligned_out": False},
            {"aligned": False, "aligned_out": False},
            {"precision": "tf32"},
            {"k_major": False},
        ):
            args = (capability, memory, dtype, M, N, K, "gelu", True)
            found = configs.linear_candidates(*args, **flags)
            assert found[0] == configs.linear_tile(*args, **flags)
            assert len(found) == len({bare(tile) for tile in found}) <= 30
            assert sum(isinstance(tile, configs.CuBlas) for tile in found) == 1
            for tile in found:
                if isinstance(tile, configs.CuBlas):
                    continue
                # At least the operands' pipeline, once for each block of a multiprocessor. Only matrix instructions
                # that read shared memory themselves need the last stage too.
                stages = tile.num_stages - (not tile.tma or capability == 120)
                pipeline = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize * stages
                assert tile is found[0] or pipeline * tile.programs < memory
                assert tile.tma == (
                    dtype is torch.bfloat16 and capability >= 90 and flags.get("aligned", True)
                )
                # Loops over parts, and over one tile at a time, cannot be flattened.
                assert not (tile.flatten and (flags.get("split") or not tile.tma))
            if not flags.get("split"):
                same = (*args[:3], configs.row_bucket(M), *args[4:])
                assert configs.linear_candidates(*same, **flags) == found


INJECTED = range(0, len(tuning.candidates((90, 227 * 1024, 4), KEY)), 4)


@pytest.mark.parametrize("number", INJECTED)
def test_any_choice_is_as_accurate(monkeypatch, number):
    """Candidates of each of a layer's products, by way of a table."""
    x, w, b = (
        torch.randn(*shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((66, 72), (136, 72), (136,))
    )
    where = tuning.Table(CARD, _triton.device_limits(HERE), HERE)

    def ours(x, w, b):
        return dlgpu.functional.linear(x, w / 8, b, activation="gelu")

    def step():
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        with dlgpu.use_backend("triton"):
            y = ours(*leaves)
        y.backward(torch.ones_like(y))

    # Backward too runs in this thread, on the CPU.
    keys = bench_tune._keys(step, where) if _triton.INTERPRETED else []
    if not keys:
        pytest.skip("autograd has its own threads here; test_linear.py has every tile")
    assert len(keys) == 3
    chosen = {key: (found := tuning.candidates(where.limits, key))[number % len(found)] for key in keys}
    with injected(monkeypatch, chosen), dlgpu.use_backend("triton"):
        assert_conforms(ours, lambda x, w, b: F.gelu(F.linear(x, w / 8, b)), (x, w, b))


def test_explain_says_so(monkeypatch):
    x = torch.randn(8, 16, dtype=torch.bfloat16, device=DEVICE)
    w = torch.randn(24, 16, dtype=torch.bfloat16, device=DEVICE)
    where = tuning.Table(CARD, _triton.device_limits(HERE), HERE)
    asked = bench_tune._keys(lambda: linear.linear_tiles(x, w, "gelu", True) and (), where)
    assert len(asked) == 3
    tiles = {}
    for key, pick in zip(asked, (1, 2, -1), strict=True):
        tile = tuning.candidates(where.limits, key)[pick]
        tiles[key] = dataclasses.replace(tile, reason=f"tuned on {CARD}, from the user's table")
    # It launches nothing, so it measures nothing.
    monkeypatch.setattr(tuning, "_tune_linear", None)
    with injected(monkeypatch, enabled=True), dlgpu.use_backend("triton"):
        assert "tuned" not in str(dlgpu.explain("linear", x, w, activation="gelu"))
    with injected(monkeypatch, tiles, enabled=True), dlgpu.use_backend("triton"):
        steps = dlgpu.explain("linear", x, w.requires_grad_(), activation="gelu").steps
    said = [what for name, what in steps if "tuned on" in what]
    assert len(said) == 3
    assert all(f"tuned on {CARD}, from the user's table" in what for what in said)
    assert any(name.startswith("cuBLAS") for name, what in steps)


# The command.


def test_without_a_gpu_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(bench_tune, "find_gpu", lambda: None)
    assert cli.main(["tune", "linear"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("dlgpu-bench: error: tune: no NVIDIA GPU was found here")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing argument"),
        (["dropout"], "'dropout' is not one of 'linear', 'cross_entropy'"),
        (["softmax", "--shapes", "8x8x8"], "are for linear"),
        (["adam", "--activations", "relu"], "are for linear"),
        (["linear", "--shapes", "8x8"], "must be MxNxK"),
        (["linear", "--shapes", "8x0x8"], "must be positive sizes"),
        (["linear", "--activations", "mish"], "expected none, relu"),
        (["linear", "--dtype", "fp8"], "'fp8' is not one of"),
    ],
)
def test_bad_usage_is_one_line(arguments, message, capsys):
    assert cli.main(["tune", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def rehearse(out, *arguments):
    return cli.main(["tune", "linear", "--rehearse", "--out", str(out), *arguments])


@pytest.mark.skipif(not _triton.INTERPRETED, reason="a rehearsal is for machines without a GPU")
def test_the_rehearsal(monkeypatch, tmp_path, capsys):
    """From the arguments to a table that is read again, the candidates compiled on the way."""
    out = tmp_path / "new" / "table.json"
    assert rehearse(out, "--shapes", "8x16x24") == 0
    said = capsys.readouterr().out
    assert "compiling 10 candidates of 5 products" in said
    assert said.endswith(f"{out}: complete\n")
    table = json.loads(out.read_text())
    assert {entry["scored"] for entry in table["entries"]} == {"fwd+bwd", "alone"}
    assert all(len(entry["best_us"]) == len(entry["default_us"]) == 3 for entry in table["entries"])
    assert set(table) == {"schema", "card", "capability", "triton", "entries"} | set(tuning._ABOUT)
    where = tuning.Table("Triton's interpreter", _triton.device_limits(HERE), HERE)
    found = tuning.read(out, where.card, where.limits)
    assert [(key.M, key.N, key.K) for key in found] == [
        (64, 16, 24),  # y with z
        (64, 24, 16),  # dX
        (16, 24, 64),  # dW
        (64, 16, 24),  # y alone
        (64, 24, 16),  # dZ beneath
    ]
    # Again: what is there is not measured again.
    before = out.read_bytes()
    monkeypatch.setattr(tuning, "choose", None)
    assert rehearse(out, "--shapes", "33x16x24") == 0
    assert out.read_bytes() == before
    # A table that cannot be written is one line.
    monkeypatch.undo()
    monkeypatch.setattr(bench_tune, "prune", lambda todo, limits: set())
    assert rehearse(out / "below", "--shapes", "8x16x24", "--activations", "none") == 2
    assert "tune: cannot write" in capsys.readouterr().err


def test_a_stopped_run_keeps_what_it_measured(monkeypatch, tmp_path):
    if not _triton.INTERPRETED:
        pytest.skip("a GPU's table is not for a test to make")
    out = tmp_path / "table.json"
    where = tuning.Table(CARD, _triton.device_limits(HERE), HERE)
    layers = [bench_tune.Layer(8, 16, 24, "relu", torch.bfloat16)]
    monkeypatch.setattr(bench_tune, "prune", lambda todo, limits: set())
    measured = []

    def choose(run, tiles, timer, **options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(tiles[1])
        return tuning.Choice(tiles[1], (2.0,) * 3, (1.0,) * 3, 0.5)

    monkeypatch.setattr(tuning, "choose", choose)
    with pytest.raises(KeyboardInterrupt):
        bench_tune.tune_linear(layers, where, time.perf_counter, out, {}, say=lambda line: None)
    assert len(tuning.read(out, CARD, where.limits)) == 2
    # Nor does one out of time begin anything.
    monkeypatch.setattr(tuning, "choose", None)
    left = bench_tune.tune_linear(
        layers, where, time.perf_counter, out, {}, budget_s=-1.0, say=lambda line: None
    )
    assert left == 2
    assert len(measured) == 2


@pytest.mark.skipif(not _triton.INTERPRETED, reason="a rehearsal is for machines without a GPU")
def test_the_rehearsal_of_memory_bound_kernels(monkeypatch, tmp_path, capsys):
    """Of every op, beside a table of products; what is there stays and is not measured again."""
    out = tmp_path / "table.json"
    where = tuning.Table("Triton's interpreter", _triton.device_limits(HERE), HERE)
    product = tuning.entry(KEY, CUBLAS)
    tuning.write(out, tuning.document(where.card, where.limits[0], [product]))
    examined = []

    def bad(tasks, limits, workers, each, timeout_s):
        examined.extend(tasks)
        return []

    monkeypatch.setattr(bench_tune, "_bad", bad)
    assert cli.main(["tune", "memory-bound", "--rehearse", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "1 tiles are in table.json already" in said
    assert "compiling 16 candidates of 8 tiles" in said
    assert said.endswith(f"{out}: complete\n")
    found = tuning.read(out, where.card, where.limits)
    rules = [key.rule for key in found if isinstance(key, tuning.RuleKey)]
    assert rules == [
        "cross_entropy_tile",
        "softmax_tile",
        "softmax_tile",
        "layer_norm_tile",
        "layer_norm_bwd_tile",
        "optimizer_tile",
        "loss_tile",
        "activation_tile",
    ]
    assert found[KEY] == bare(CUBLAS)
    entries = json.loads(out.read_text())["entries"]
    assert entries[0] == product
    assert {entry.get("scored") for entry in entries[1:]} == {"fwd+bwd", "step"}
    # A candidate of each was to be compiled, and each can be read where that is done.
    assert len(examined) == 8
    for task in examined:
        key, tile = tuning.parse(task["entry"], where.limits)
        assert tile == tuning.candidates(where.limits, key)[1]
        assert task["case"]["op"] in bench_tune.CASES
    before = out.read_bytes()
    monkeypatch.setattr(tuning, "choose", None)
    assert cli.main(["tune", "softmax", "--rehearse", "--out", str(out)]) == 0
    assert out.read_bytes() == before
    assert tuning._tables.get(HERE) is None


def rule_cases(*names):
    return [c for name in names for c in bench_tune._cases(options_of(name, rehearse=True))]


def options_of(op, rehearse=False):
    return bench_tune.Options(op, None, None, None, None, 1.0, rehearse)


def test_a_stopped_run_of_rules_keeps_what_it_measured(monkeypatch, tmp_path):
    if not _triton.INTERPRETED:
        pytest.skip("a GPU's table is not for a test to make")
    out = tmp_path / "table.json"
    where = tuning.Table(CARD, _triton.device_limits(HERE), HERE)
    cases = rule_cases("softmax", "activation")
    monkeypatch.setattr(bench_tune, "_bad", lambda *args: [0])
    measured = []

    def choose(run, tiles, timer, **options):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(tiles)
        run(tiles[-1])
        return tuning.Choice(tiles[-1], (2.0,) * 3, (1.0,) * 3, 0.5)

    monkeypatch.setattr(tuning, "choose", choose)
    run = functools.partial(
        bench_tune.tune_rules, cases, where, time.perf_counter, out, {}, say=lambda line: None
    )
    with pytest.raises(KeyboardInterrupt):
        run()
    found = tuning.read(out, CARD, where.limits)
    assert [key.rule for key in found] == ["softmax_tile", "softmax_tile"]
    # What was chosen, in place of the rules' own; what spills was no choice.
    assert [tiles[-1] for tiles in measured] == list(found.values())
    first, second = (tuning.candidates(where.limits, key) for key in found)
    assert measured == [[first[0], *first[2:]], list(second)]
    # Nor does one out of time begin anything.
    monkeypatch.setattr(tuning, "choose", None)
    assert run(budget_s=-1.0) == 1


@pytest.mark.skipif(not _triton.INTERPRETED, reason="cases of a rehearsal")
def test_a_trial_runs_on_its_tile(launches):
    """Each time, whatever ran before; beside the tiles that are chosen already."""
    where = tuning.Table(CARD, _triton.device_limits(HERE), HERE)
    for case in rule_cases("softmax", "layer_norm", "adam", "mse_loss"):
        keys = bench_tune._rules_asked(case, where.limits)
        chosen = {key: tuning.candidates(where.limits, key)[-1] for key in keys[:-1]}
        tiles, asked = tuning.candidates(where.limits, keys[-1]), set()
        run = bench_tune._trial(case, keys[-1], where, chosen, {}, asked)
        run(tiles[0])
        run(tiles[1])
        for tile in (tiles[0], tiles[1], tiles[0]):
            del launches[:]
            results = run(tile)
            assert not any(t.requires_grad for t in results)
            assert {taken(t) for t in (*chosen.values(), tile)} <= set(map(given, launches))
            others = {taken(t) for t in tiles} - {taken(tile)}
            assert others.isdisjoint(given(e) for e in launches if e[0].startswith("_multi_tensor"))
        assert asked == set(keys)


def test_a_trial_that_runs_another_kernel_is_none(monkeypatch, tmp_path):
    if not _triton.INTERPRETED:
        pytest.skip("a GPU's table is not for a test to make")
    where = tuning.Table(CARD, _triton.device_limits(HERE), HERE)
    other = tuning.RuleKey("loss_tile", (torch.bfloat16,))
    monkeypatch.setattr(bench_tune, "_rules_asked", lambda case, limits: [other])
    monkeypatch.setattr(bench_tune, "_bad", lambda *args: [])
    with pytest.raises(RuntimeError, match="did not ask for loss_tile"):
        bench_tune.tune_rules(
            rule_cases("activation"),
            where,
            lambda call: call() and 1.0,
            tmp_path / "table.json",
            {},
            settings=bench_tune.REHEARSAL,
            say=lambda line: None,
        )


def test_what_is_measured_on_a_gpu():
    """Every case asks for tiles that none before it did, and for those of the card that is meant."""
    seen = set()
    for case in bench_tune._cases(options_of("memory-bound")):
        keys = set(bench_tune._rules_asked(case, LIMITS))
        assert keys - seen
        seen |= keys
    assert {key.rule for key in seen} == tuning.RULES.keys() - {"logsumexp_tile", "multi_margin_tile"}
    # Whole vectors, no option, and the limits of the card.
    assert tuning.RuleKey("cross_entropy_grad_tile", (90, torch.bfloat16, 32000, True, False)) in seen
    assert tuning.RuleKey("optimizer_tile", (4, True)) in seen


def test_spilling_variants_are_dropped():
    """As of products: two rows of 32000 columns at once are more than registers hold, one in twice the threads is not."""
    (case,) = (
        c
        for c in bench_tune._cases(options_of("cross_entropy"))
        if c.options["grad_in_forward"] and c.shape["V"] == 32000
    )
    (key,) = bench_tune._rules_asked(case, LIMITS)
    default, *others = tuning.candidates(LIMITS, key)
    good = next(t for t in others if (t.block_m, t.num_warps) == (1, 32))
    spills = next(t for t in others if (t.block_m, t.num_warps) == (2, 16))
    todo = {key: (case, [default, good, spills])}
    assert bench_tune.prune_rules(todo, LIMITS, workers=1) == {(key, spills)}


def test_spilling_candidates_are_dropped():
    """The compiled code is what decides: 128 x 256 in one piece spills with a derivative in the epilogue."""
    key = KEY._replace(b_t=False, saves_z=False, gradient=True)
    good = tuning.candidates(LIMITS, key)[0]
    spills = next(
        tile
        for tile in tuning.candidates(LIMITS, key)
        if isinstance(tile, configs.MatmulTile) and (tile.block_n, tile.subtiles) == (256, 1)
    )
    # No table may hold it.
    huge = dataclasses.replace(good, num_stages=9)
    found = bench_tune.prune({key: [huge, good, spills, CUBLAS]}, LIMITS, workers=1)
    assert found == {(key, spills), (key, huge)}
