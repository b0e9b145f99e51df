"""The benchmark's own audit: each planted cheat is caught, and it is the audit that fails where one is not."""

import pytest
import torch

from dlgpu.bench import audit, ceilings, measure
from dlgpu.bench.__main__ import main
from dlgpu.bench.providers import Verdict

# Those that a wrong result or an impossible time gives away, however noisy the machine is.
PLAIN = tuple(cheat for cheat in audit.CHEATS if {"wrong", "impossible"} & set(cheat.expected))
TIMED = tuple(cheat for cheat in audit.CHEATS if cheat not in PLAIN)
BEST = {
    ceilings.COPY: 1e10,
    ceilings.CACHED_COPY: 1e10,
    ceilings.matmul_name(torch.float32): 1e10,
}


def test_what_there_is_to_catch():
    assert len(PLAIN) == 7
    assert {"slower"} in [set(cheat.expected) for cheat in TIMED]
    # An honest one is never expected to be refused, nor to win.
    assert set(audit.CHEATS[0].expected) == {"same", "ambiguous", "busy"}


@pytest.mark.parametrize("cheat", PLAIN, ids=lambda cheat: cheat.name)
def test_a_cheat_is_caught(cheat):
    (found,) = audit.audit("cpu", 5.0, (cheat,), best=BEST)
    assert found.right, (found.how, found.detail)
    assert found.how in cheat.expected


@pytest.mark.parametrize(
    ("cheat", "detail"),
    [
        ("overwrites its inputs", "changed its input 0"),
        ("skips a row", "error"),
        ("computes once for each write to its inputs", "/s"),
    ],
)
def test_what_gives_it_away(cheat, detail):
    (found,) = audit.audit("cpu", 5.0, [c for c in PLAIN if c.name == cheat], best=BEST)
    assert detail in found.detail


def test_work_that_goes_on_after_the_call_is_seen_even_if_the_results_were_right(monkeypatch):
    case = audit.case_for("cpu")
    late = []

    class Late:
        """Right at first; whoever looks again finds something else."""

        def __call__(self, *args, **kwargs):
            self.y = audit._honest(*args, **kwargs)
            late.append(self.y)
            return self.y

    monkeypatch.setattr(measure.time, "sleep", lambda seconds: late[-1].add_(1))
    bound = case.bind(Late(), 1)
    verdict = measure.verify(case, bound, measure._Truth.of(case, 1))
    assert not verdict.right
    assert "after the call had returned" in verdict.detail


def test_the_audit_fails_where_the_benchmark_is_blind(monkeypatch, capsys):
    monkeypatch.setattr(audit, "CHEATS", [c for c in PLAIN if c.name == "skips a row"])
    monkeypatch.setattr(audit.audit, "__defaults__", (*audit.audit.__defaults__[:2], audit.CHEATS, BEST))
    assert main(["audit", "--device", "cpu", "--budget", "1"]) == 0
    seeing = capsys.readouterr().out
    assert "wrong       ok" in seeing
    monkeypatch.setattr(measure, "verify", lambda *args: Verdict(True, 0.0, ""))
    assert main(["audit", "--device", "cpu", "--budget", "1"]) == 3
    assert "MISSED" in capsys.readouterr().out


def test_the_budget_must_be_one(capsys):
    assert main(["audit", "--budget", "0"]) == 2
    assert "--budget" in capsys.readouterr().err


@pytest.mark.perf
def test_the_whole_audit_passes():
    found = list(audit.audit("cpu"))
    assert [(outcome.cheat.name, outcome.how) for outcome in found if not outcome.right] == []
