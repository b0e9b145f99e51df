"""`make sweep`: every reachable configuration compiled for every capability. Hours of compilation on two cores, so no part of
`make test`; run it with the oldest supported Triton too, whose spills differ."""

from __future__ import annotations

import pytest

from test_compile import CAPABILITIES, compile_cases, faults


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_machine_code_of_everything(capability: int) -> None:
    wrong = {}
    for case in compile_cases(str(capability), "--all", timeout=6 * 3600):
        if found := faults(case):
            wrong[case["name"]] = found
    assert not wrong
