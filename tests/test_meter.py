"""The traffic meter, held to kernels whose traffic is known, and to planted faults."""

import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from dlgpu.bench.meter import TrafficMeter
from dlgpu.kernels import _triton

N, BLOCK = 1000, 256
GRID = (triton.cdiv(N, BLOCK),)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, REPEAT: tl.constexpr = 1):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    for _ in tl.static_range(REPEAT):
        x = tl.load(x_ptr + offs, mask=mask)
    tl.store(y_ptr + offs, x, mask=mask)


@triton.jit
def _shift_kernel(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, tl.load(x_ptr + offs + shift, mask=mask), mask=mask)


@triton.jit
def _read_own_result_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(x_ptr + offs, offs.to(tl.float32), mask=mask)
    tl.store(x_ptr + offs, tl.load(x_ptr + offs, mask=mask) + 1.0, mask=mask)


@triton.jit
def _pointer_table_kernel(table_ptr, numel, BLOCK: tl.constexpr):
    ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    offs = tl.arange(0, BLOCK)
    mask = offs < numel
    tl.store(ptr + offs, tl.load(ptr + offs, mask=mask) * 2.0, mask=mask)


@triton.jit
def _descriptor_kernel(x_desc, y_desc, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    y_desc.store([row, 0], x_desc.load([row, 0]))


@triton.jit
def _atomic_kernel(x_ptr, total_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.atomic_add(total_ptr, tl.sum(x))


@triton.jit
def _rows_kernel(x_ptr, y_ptr, stride_x, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + row * n + offs, tl.load(x_ptr + row * stride_x + offs, mask=mask), mask=mask)


@triton.jit
def _halves_kernel(x_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(x_ptr.to(tl.pointer_type(tl.int16)) + offs, tl.zeros((BLOCK,), tl.int16), mask=offs < n)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_copy_law(dtype):
    x, y = torch.ones(N, dtype=dtype), torch.zeros(N, dtype=dtype)
    with TrafficMeter() as meter:
        _copy_kernel[GRID](x, y, N, BLOCK=BLOCK)
    (launch,) = meter.launches
    nbytes = N * x.element_size()
    assert torch.equal(x, y)
    assert (launch.kernel, launch.grid) == ("_copy_kernel", (4, 1, 1))
    assert (launch.loads, launch.stores, launch.atomics) == (nbytes, nbytes, 0)
    assert (launch.compulsory_reads, launch.compulsory_writes) == (nbytes, nbytes)
    assert launch.clean
    assert launch.seconds > 0
    assert (launch.args["x_ptr"].loads, launch.args["x_ptr"].compulsory) == (nbytes, nbytes)
    assert (launch.args["y_ptr"].loads, launch.args["y_ptr"].requested) == (0, nbytes)


def test_an_extra_pass_is_requested_but_not_compulsory():
    x, y = torch.ones(N), torch.zeros(N)
    with TrafficMeter() as meter:
        _copy_kernel[GRID](x, y, N, BLOCK=BLOCK, REPEAT=3)
        _copy_kernel[GRID](x, y, N, BLOCK=BLOCK)
    assert [launch.requested for launch in meter.launches] == [4 * 4 * N, 2 * 4 * N]
    assert [launch.compulsory for launch in meter.launches] == [2 * 4 * N, 2 * 4 * N]
    assert meter.total() == meter.total("compulsory") == 4 * 4 * N
    assert meter.total("requested") == 6 * 4 * N


def test_a_byte_written_first_is_not_a_compulsory_read():
    x = torch.zeros(N)
    with TrafficMeter() as meter:
        _read_own_result_kernel[GRID](x, N, BLOCK=BLOCK)
    (launch,) = meter.launches
    assert (launch.compulsory_reads, launch.compulsory_writes, launch.requested) == (0, 4 * N, 12 * N)
    assert launch.clean


def test_stray_access_within_the_storage():
    storage = torch.zeros(N + 8)
    y = torch.zeros(N)
    with TrafficMeter() as meter:
        _shift_kernel[GRID](storage[4 : N + 4], y, N, 2, BLOCK=BLOCK)
        _shift_kernel[GRID](storage[4 : N + 4], y, N, -2, BLOCK=BLOCK)
        _shift_kernel[GRID](storage, y, N, 2, BLOCK=BLOCK)
    assert [launch.stray for launch in meter.launches] == [8, 8, 0]
    assert meter.launches[0].loads == 4 * N
    assert meter.launches[0].args["x_ptr"].compulsory == 4 * (N - 2)


def test_stray_access_between_the_rows_of_a_view():
    x, y = torch.zeros(4, 16)[:, :10], torch.zeros(4, 12)
    with TrafficMeter() as meter:
        _rows_kernel[(4,)](x, y, 16, 10, BLOCK=16)
        _rows_kernel[(4,)](x, y, 16, 12, BLOCK=16)
    # The last row's two are beyond the view.
    assert [launch.stray for launch in meter.launches] == [0, 4 * 2 * 4]


def test_write_conflict():
    x, y = torch.ones(N), torch.zeros(N)
    with TrafficMeter() as meter:
        _copy_kernel[(4, 2)](x, y, N, BLOCK=BLOCK)
    (launch,) = meter.launches
    assert (launch.write_conflicts, launch.read_after_write, launch.stray) == (4 * N, 0, 0)
    assert not launch.clean


@pytest.mark.parametrize("shift", [-1, 1])
def test_read_after_write_between_programs_in_either_order(shift):
    x = torch.zeros(N + 2)
    with TrafficMeter() as meter:
        _shift_kernel[GRID](x[1:], x[1:], N, shift, BLOCK=BLOCK)
        _shift_kernel[GRID](x[1:], x[1:], N, 0, BLOCK=BLOCK)
    # At each of the three borders between programs, one element.
    assert [launch.read_after_write for launch in meter.launches] == [3 * 4, 0]
    assert [launch.write_conflicts for launch in meter.launches] == [0, 0]


def test_pointer_table_needs_watched_tensors():
    params = [torch.ones(40), torch.ones(40)]
    table = torch.tensor([p.data_ptr() for p in params])
    with TrafficMeter() as blind, TrafficMeter(extra=params[:1]) as meter:
        _pointer_table_kernel[(2,)](table, 40, BLOCK=64)
        meter.watch(params[1:], name="late")
        _pointer_table_kernel[(2,)](table, 40, BLOCK=64)
    nbytes = 2 * 40 * 4
    assert [launch.stray for launch in blind.launches] == [2 * nbytes, 2 * nbytes]
    assert [launch.stray for launch in meter.launches] == [nbytes, 0]
    assert meter.launches[1].compulsory == 2 * nbytes + 16
    assert meter.launches[1].args["watched[0]"].compulsory == nbytes
    assert meter.launches[1].args["late[0]"].compulsory == nbytes


def test_tensor_descriptors():
    x, y = torch.ones(16, 16), torch.zeros(16, 16)
    with TrafficMeter() as meter:
        _descriptor_kernel[(2,)](*(TensorDescriptor.from_tensor(t, [8, 16]) for t in (x, y)), ROWS=8)
    (launch,) = meter.launches
    assert torch.equal(x, y)
    assert (launch.compulsory, launch.requested, launch.clean) == (2 * 1024, 2 * 1024, True)
    assert launch.args["y_desc"].compulsory_writes == 1024


def test_atomics_read_and_write_and_do_not_conflict():
    x, total = torch.ones(N), torch.zeros(1)
    with TrafficMeter() as meter:
        _atomic_kernel[GRID](x, total, N, BLOCK=BLOCK)
    (launch,) = meter.launches
    assert total.item() == N
    assert (launch.atomics, launch.requested) == (16, 4 * N + 32)
    assert (launch.compulsory_reads, launch.compulsory_writes) == (4 * N + 4, 4)
    assert launch.clean


def test_accesses_narrower_than_the_elements():
    x = torch.ones(10)
    with TrafficMeter() as meter:
        _halves_kernel[(1,)](x, 5, BLOCK=8)
    assert (meter.launches[0].stores, meter.launches[0].compulsory_writes) == (10, 10)


def _hooks():
    executor = interpreter.GridExecutor
    return interpreter._interpreter, executor.__call__, executor._init_args_hst


def test_everything_is_restored_after_an_error():
    x = torch.zeros(4)
    before = _hooks()
    meter = TrafficMeter()
    with pytest.raises(ZeroDivisionError), TrafficMeter(), meter:
        raise ZeroDivisionError
    with meter:
        # A grid of four dimensions is refused inside the launch.
        with pytest.raises(AssertionError):
            _copy_kernel[(1, 1, 1, 1)](x, x, 4, BLOCK=4)
        with pytest.raises(RuntimeError, match="already metering"):
            meter.__enter__()
        _copy_kernel[(1,)](x, x, 4, BLOCK=4)
    assert [launch.args["x_ptr|y_ptr"].compulsory for launch in meter.launches] == [32]
    assert _hooks() == before


def test_compiled_kernels_are_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), TrafficMeter():
        pass


@triton.jit
def _count_kernel(y_ptr, n):
    count = 0
    for _ in range(n * 2):
        count += 1
    tl.store(y_ptr, count)


@pytest.mark.skipif(not _triton.INTERPRETED, reason="compiled kernels need no mending")
def test_a_range_up_to_a_computed_number(monkeypatch):
    """With NumPy 2.4 Triton 3.6's interpreter refuses it, as here, and a machine with that pair could meter nothing."""
    patch = interpreter._patch_lang_tensor

    def refusing(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int([self.handle.data]))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", refusing)
    y = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(InterpreterError):
        _count_kernel[(1,)](y, 3)
    _triton._mend_range()
    _count_kernel[(1,)](y, 3)
    assert y.item() == 6
