"""What bounds the cross-entropy kernels: instruction counts from the machine code, against the document and memory."""

from test_compile import compile_cases, document

# An H200, as the document says: multiprocessors times cycles a second, and bytes a second.
CYCLES, BANDWIDTH = 132 * 1.7e9, 4.3e12


def test_memory_is_the_bound_and_the_document_says_so() -> None:
    """docs/cross_entropy.md's table is what the machine code has; but with a soft cap no instructions outlast the memory."""
    text = document("cross_entropy.md")
    (found,) = compile_cases("--cross-entropy")
    assert len(found) == 14
    for name, (instructions, special, moved) in found.items():
        times = instructions / (128 * CYCLES), special / (16 * CYCLES), moved / BANDWIDTH
        cells = [f"{instructions:.1f}", f"{special:.2f}", f"{moved:d}", *(f"{1e12 * t:.2f}" for t in times)]
        assert f"| {name} | {' | '.join(cells)} |" in text
        issue, function, memory = times
        if "soft cap" not in name:
            assert function < memory
            # Forward with label smoothing is within 15% of it.
            assert issue < memory * (1.15 if name == "bf16, label smoothing, forward" else 1)
