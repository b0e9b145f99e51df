"""`compare`: what it calls faster or slower, what it matches with what, and its exit statuses."""

import itertools
import json
import re

import numpy as np
import pytest

import synthetic_results as synthetic
from dlgpu.bench import __main__ as cli
from dlgpu.bench import compare
from dlgpu.bench.compare import Comparison

HOSTILE = "<script>|\n\x1b[2J\u202e`"


def compared(before, after, **more) -> Comparison:
    return compare.compare(synthetic.document(before), synthetic.document(after), **more)


def pair(time_before=1e-3, time_after=1e-3, seed=0, **more):
    """The only change between two rows."""
    (change,) = compared(
        [synthetic.timing(time_a=time_before, seed=2 * seed, **more)],
        [synthetic.timing(time_a=time_after, seed=2 * seed + 1, **more)],
    ).changes
    return change


# The verdict.


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.0, "SAME"), (1.005, "SAME"), (1.2, "SLOWER"), (0.8, "FASTER")]
)
def test_the_verdict(factor, verdict):
    change = pair(time_after=factor * 1e-3, noise=0.005)
    assert change.verdict == verdict
    assert change.low < change.change < change.high
    assert change.change == pytest.approx(factor, rel=0.01)


def test_noise_is_ambiguous_and_so_are_busy_cores():
    assert pair(noise=0.5, pairs=20).verdict == "AMBIGUOUS"
    assert pair(time_after=2e-3, noise=0.001, crowded=True).verdict == "AMBIGUOUS"


def test_microseconds_on_a_cpu_are_ambiguous():
    """Of two runs of the same on one machine, seen: Adam's parallel loops, and torch's, took 25 us more in the second."""
    adam = {"device": "cpu", "noise": 0.005}
    before = synthetic.timing(time_a=64e-6, time_b=182e-6, **adam)
    after = synthetic.timing(time_a=90e-6, time_b=209e-6, seed=1, **adam)
    for a, b, basis in itertools.product((before, after), (before, after), ("auto", "time")):
        (change,) = compared([a], [b], basis=basis).changes
        assert (change.verdict, change.doubt) == (("SAME", "") if a is b else ("AMBIGUOUS", "microseconds"))
    # It may be the baseline that took longer; and not on a GPU; and not any number of them.
    (change,) = compared(
        [synthetic.timing(time_a=2e-3, time_b=60e-6, **adam)],
        [synthetic.timing(time_a=2e-3, time_b=85e-6, **adam)],
    ).changes
    assert (change.verdict, change.doubt) == ("AMBIGUOUS", "microseconds")
    assert pair(64e-6, 90e-6, noise=0.005).verdict == "SLOWER"
    assert pair(64e-6, 110e-6, **adam).verdict == "SLOWER"


def test_the_same_against_the_same_is_never_faster_or_slower():
    changes = [pair(seed=seed, noise=noise) for noise in (0.01, 0.1) for seed in range(150)]
    verdicts = [change.verdict for change in changes]
    assert sum(verdict in ("SAME", "AMBIGUOUS") for verdict in verdicts) >= 0.97 * len(verdicts)
    # And an interval says what it says.
    assert sum(change.low <= 1 <= change.high for change in changes) >= 0.95 * len(changes)


def test_a_slowdown_of_5_percent_is_seen():
    changes = [pair(time_after=1.05e-3, seed=seed, noise=0.02, pairs=120) for seed in range(60)]
    assert sum(change.verdict == "SLOWER" for change in changes) >= 0.9 * len(changes)
    assert sum(change.low <= 1.05 <= change.high for change in changes) >= 0.9 * len(changes)


def test_a_machine_that_became_slower_is_no_change():
    before = [synthetic.timing(time_a=1e-3, time_b=2e-3, noise=0.005, seed=1)]
    after = [synthetic.timing(time_a=1.3e-3, time_b=2.6e-3, noise=0.005, seed=2, drift=0.5)]
    (by_ratio,) = compared(before, after).changes
    assert (by_ratio.basis, by_ratio.verdict) == ("ratio", "SAME")
    (by_time,) = compared(before, after, basis="time").changes
    assert (by_time.basis, by_time.verdict) == ("time", "SLOWER")
    assert by_time.before[0] == pytest.approx(1e-3, rel=0.01)


def test_swapping_the_files_gives_the_reciprocal():
    a, b = synthetic.timing(seed=1), synthetic.timing(time_a=1.1e-3, seed=2)
    (forth,), (back,) = compared([a], [b]).changes, compared([b], [a]).changes
    assert forth.change == pytest.approx(1 / back.change)
    assert (forth.low, forth.high) == pytest.approx((1 / back.high, 1 / back.low))


def test_the_interval_is_that_of_the_formula():
    a = synthetic.timing() | {"ratio": 0.5, "low": 0.4, "high": 0.6}
    b = synthetic.timing() | {"ratio": 0.5, "low": 0.5, "high": 0.5}
    (change,) = compared([a], [b]).changes
    # All of the doubt is A's: from 0.5 / 0.6 to 0.5 / 0.4.
    assert (change.low, change.change, change.high) == pytest.approx((0.5 / 0.6, 1, 0.5 / 0.4))
    (change,) = compared([a], [a]).changes
    assert np.log(change.high) == pytest.approx(np.hypot(np.log(0.6 / 0.5), np.log(0.5 / 0.4)))


# Matching.


@pytest.mark.parametrize(
    "key", ["op", "options", "passes", "shape", "dtype", "a", "device", "cache", "timer"]
)
def test_rows_match_by_all_that_they_time(key):
    other = {"options": {"x": 1}, "shape": {"M": 65, "N": 32}}.get(key, "other")
    row = synthetic.timing()
    found = compared([row], [row | {key: other}])
    assert not found.changes
    assert len(found.only_before) == len(found.only_after) == 1
    # Notes and sections are for people.
    assert len(compared([row], [row | {"note": "x", "section": "y"}]).changes) == 1


def test_another_baseline_leaves_the_time():
    eager, compiled = (synthetic.timing(b=b, seed=i) for i, b in enumerate(("eager", "compile")))
    found = compared([eager, compiled], [compiled])
    assert [(c.basis, c.row["b"]) for c in found.changes] == [("ratio", "compile")]
    assert [row["b"] for row in found.only_before] == ["eager"]
    found = compared([eager], [compiled])
    assert [c.basis for c in found.changes] == ["time"]


def test_the_order_of_names_is_no_difference():
    row = synthetic.timing(shape={"M": 1, "N": 2})
    other = row | {"shape": {"N": 2, "M": 1}}
    assert len(compared([row], [other]).changes) == 1


def test_repeated_rows_match_in_order():
    before = [synthetic.timing(time_a=t, noise=1e-4, seed=i) for i, t in enumerate((1e-3, 2e-3, 4e-3))]
    found = compared(before, before[:2])
    assert [change.change for change in found.changes] == pytest.approx([1, 1])
    assert len(found.only_before) == 1


# The exit status.


def status(before, after, fail_slower=5.0):
    return compared(before, after).status(fail_slower)


def test_exit_statuses():
    same, slower = (synthetic.timing(time_a=t, noise=0.005) for t in (1e-3, 1.2e-3))
    noisy = synthetic.timing(noise=0.5, pairs=20)
    wrong = {"section": "run", "kind": "wrong", "title": "t", "provider": "dlgpu", "detail": "d"}
    assert status([same], [same]) == 0
    assert status([same], [slower]) == 1
    assert status([slower], [same]) == 0
    # Slower for certain, but by less than what was asked for.
    assert status([same], [slower], 50) == 0
    assert status([same], [noisy]) == 4
    assert status([same], [noisy], 1000) == 0
    # A certain slowdown counts for more than doubt about another row, and a wrong result for more than any time.
    other = [row | {"op": "other"} for row in (same, noisy)]
    assert status([same, other[0]], [slower, other[1]]) == 1
    for pair_ in itertools.permutations(([same, wrong], [slower])):
        assert status(*pair_) == 3
    assert status([same], [slower, wrong | {"kind": "impossible"}]) == 3
    # Busy cores hide anything.
    assert status([same], [slower | {"crowded": True}]) == 4
    # Noise matters only where it may hide a slowdown.
    fast = synthetic.timing(time_a=1e-4, noise=0.3, pairs=30)
    assert status([same], [fast]) == 0
    few = [synthetic.timing(time_a=t, noise=0.005, device="cpu") for t in (1e-4, 1.2e-4)]
    assert [status(few[:1], few[1:]), status(few[1:], few[:1])] == [4, 0]
    # A small doubt about the limit itself is no noise.
    assert status([same], [synthetic.timing(time_a=1.05e-3, noise=0.005)]) == 0


def run(capsys, *arguments):
    found = cli.main(["compare", *map(str, arguments)])
    return found, *capsys.readouterr()


@pytest.fixture
def files(tmp_path):
    """Files of one row each, by name."""
    return {
        name: synthetic.write(tmp_path / f"{name}.json", rows)
        for name, rows in {
            "same": [synthetic.timing(noise=0.005)],
            "slower": [synthetic.timing(time_a=1.2e-3, noise=0.005, seed=1)],
            "noisy": [synthetic.timing(noise=0.5, pairs=20)],
            "other": [synthetic.timing("another")],
            "none": [],
            "wrong": [
                {"section": "r", "kind": "wrong", "title": "t", "provider": "dlgpu", "detail": "off by 1"}
            ],
        }.items()
    }


def test_the_command(files, capsys):
    found, out, err = run(capsys, files["same"], files["slower"])
    assert (found, err) == (1, "")
    assert "SLOWER !" in out
    assert "slower: 1 rows by more than 5% (exit status 1)" in out
    assert "1 rows compared: 0 SAME, 0 FASTER, 1 SLOWER, 0 AMBIGUOUS" in out
    assert "ratio to eager" in out
    assert run(capsys, files["same"], files["slower"], "--fail-slower", "25")[0] == 0
    assert run(capsys, files["same"], files["same"])[0] == 0
    assert run(capsys, files["same"], files["noisy"])[0] == 4
    found, out, _ = run(capsys, files["wrong"], files["same"])
    assert found == 3
    assert "A: t: WRONG RESULT of dlgpu, not timed: off by 1" in out
    assert "only in B: synthetic" in out
    assert "time" in run(capsys, files["same"], files["slower"], "--basis", "time")[1]


def test_the_formats(files, capsys, tmp_path):
    _, out, _ = run(capsys, files["same"], files["slower"], "--format", "md")
    assert re.search(r"^\| synthetic fwd\+bwd .*\| SLOWER ! \|$", out, re.MULTILINE)
    found, out, _ = run(capsys, files["same"], files["slower"], "--format", "json")
    document = json.loads(out)
    assert (document["schema"], document["status"], found) == (compare.SCHEMA, 1, 1)
    (row,) = document["rows"]
    assert (row["verdict"], row["basis"], row["op"]) == ("SLOWER", "ratio", "synthetic")
    assert row["low"] < row["change"] < row["high"]
    out_file = tmp_path / "c.md"
    found, out, _ = run(capsys, files["same"], files["slower"], "--format", "md", "--out", out_file)
    assert (found, out) == (1, "")
    assert out_file.read_text().startswith("# dlgpu benchmark: comparison")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["same", "other"], "no timing of the same thing: nothing to compare"),
        (["none", "none"], "nothing to compare"),
        (["same"], "Missing argument"),
        (["same", "missing"], "cannot be read"),
        (["same", "same", "--fail-slower", "much"], "not a valid float"),
        (["same", "same", "--fail-slower", "-1"], "not in the range"),
        (["same", "same", "--fail-slower", "nan"], "is no number"),
        (["same", "same", "--format", "pdf"], "'pdf' is not one of"),
        (["same", "same", "--out", "/dev/null/x"], "cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_one_line(files, capsys, arguments, message):
    given = [files.get(argument, argument) for argument in arguments]
    found, out, err = run(capsys, *given)
    assert (found, out) == (2, "")
    assert err.startswith("dlgpu-bench: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_differences_of_the_machines_are_said(tmp_path, capsys):
    rows = [synthetic.timing()]
    a = synthetic.write(tmp_path / "a.json", rows)
    gpu = {"name": "Another Synthetic GPU", "driver": "0.0", "cuda": "0.0"}
    b = synthetic.write(
        tmp_path / "b.json", rows, torch="9.9", gpu=gpu, source_hash="fedcba", status="interrupted"
    )
    _, out, _ = run(capsys, a, b)
    for text in (
        "differs: torch: 0.0 -> 9.9",
        "differs: gpu: name Synthetic GPU, driver 0.0, cuda 0.0 -> name Another Synthetic GPU",
        "differs: source hash: 0123456789abcdef -> fedcba",
        "from different machines",
        "baselines' own software differs",
        "B is not complete: its status is interrupted",
    ):
        assert text in out
    _, out, _ = run(capsys, a, a)
    assert "same machine, software and source" in out
    assert "differs:" not in out


@pytest.mark.parametrize("width", [30, 60, 80, 140])
def test_the_table_fits_the_terminal(width):
    rows = [synthetic.timing("a_rather_long_name", time_a=t, noise=0.005) for t in (1e-3, 1.2e-3)]
    text = compare.as_table(compared(rows[:1], rows[1:]), ("a", "b"), 5.0, width)
    assert max(map(len, text.splitlines())) <= width
    if width >= 60:
        assert "SLOWER !" in text
        assert "+20." in text or "+19." in text


def test_nothing_of_a_file_is_obeyed():
    row = synthetic.timing(
        HOSTILE, shape={HOSTILE: 1}, options={HOSTILE: HOSTILE}, b=HOSTILE, dtype=HOSTILE, note=HOSTILE
    )
    wrong = {"section": HOSTILE, "kind": "wrong", "title": HOSTILE, "provider": HOSTILE, "detail": HOSTILE}
    before = synthetic.document([row, row | {"op": "only"}, wrong], **{HOSTILE: HOSTILE, "torch": HOSTILE})
    found = compare.compare(before, synthetic.document([row]))
    table = compare.as_table(found, ("a", "b"), 5.0, 100)
    markdown = compare.as_markdown(found, ("a", "b"), 5.0)
    for text in (table, markdown, compare.as_json(found, 5.0)):
        assert all(line.isprintable() for line in text.split("\n"))
    assert "<script" not in markdown
    assert not re.search(r"(?<!\\)`", markdown)
    (line,) = (line for line in markdown.splitlines() if line.startswith("| &lt;script"))
    assert len(re.findall(r"(?<!\\)\|", line)) == len(compare._NAMES) + 1


@pytest.mark.perf
def test_two_runs_on_this_machine(tmp_path, capsys):
    ops = ("linear", "activation", "mse_loss", "kl_div", "layer_norm", "batch_norm", "sgd", "adam")
    files = [tmp_path / f"{name}.json" for name in "ab"]
    for file in files:
        arguments = ["run", *ops, "--shape", "small", "--device", "cpu", "--budget", "12", "--out", str(file)]
        assert cli.main(arguments) == 0
    capsys.readouterr()
    found, out, err = run(capsys, *files, "--format", "json")
    assert found in (0, 1, 4), err
    verdicts = [row["verdict"] for row in json.loads(out)["rows"]]
    # On a busy machine some are skipped: the budget is spent.
    assert len(verdicts) >= len(ops) / 2
    assert sum(verdict in ("SAME", "AMBIGUOUS") for verdict in verdicts) >= 0.9 * len(verdicts), out
