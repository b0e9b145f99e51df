"""Compiles a Triton kernel for a GPU that is not there, and reads the machine code.

Triton's package carries the assemblers and disassemblers for every capability here, so what a kernel becomes
(registers, spills, widths of memory accesses, matrix instructions, shared memory) can be tested anywhere.

What tl.dot becomes with Triton 3.7.1, by capability (fp16 is the same with 3.6.0):

    7.5                    FFMA: Triton has no matrix instructions for Turing, though its assembler does. Some
                           tiles spill, and int8 does not compile. Kernels without tl.dot are fine.
    8.0, 8.6, 8.9, 12.0    HMMA (bf16, fp16, tf32), IMMA (int8); fp8: QMMA on 8.9 and 12.0, else HMMA
    9.0                    HGMMA (bf16, fp16, tf32), IGMMA (int8), QGMMA (fp8); HMMA where the tile has M < 64
    10.0                   UTCHMMA (bf16, fp16, tf32), UTCQMMA (fp8), IMMA (int8); HMMA where M < 64

float32 with input_precision="ieee" has none: FFMA, or FFMA2 on 10.0. Tensor descriptors become UTMALDG and
UTMASTG from 9.0 on; below that, pointers of unknown alignment, 2 bytes at a time for bf16.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import triton
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction, MockTensor, native_specialize_impl

from dlgpu.kernels._triton import most_registers

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)

# KiB that one block may ask for; the 1 KiB the driver reserves is already taken off.
_SHARED_MEMORY_KIB = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

# What one multiprocessor holds: warps, blocks, and KiB of shared memory. From the table of compute capabilities in the CUDA
# programming guide.
_RESIDENT = {
    75: (32, 16, 64),
    80: (64, 32, 164),
    86: (48, 16, 100),
    89: (48, 24, 100),
    90: (64, 32, 228),
    100: (64, 32, 228),
    120: (48, 24, 100),
}
_REGISTERS = 65536
# A warp's registers are given out in units of so many.
_REGISTER_UNIT = 256

# A descriptor's transfer moves a tile, whatever the lanes do: any number larger than a lane's widest access.
BULK_BITS = 4096

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TOOL_TIMEOUT_S = 120

# An instruction's line: its address, a predicate perhaps, the opcode.
_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)")
# HFMA2.MMA is ordinary half-precision arithmetic.
_MATRIX = re.compile(r"(?:UTC)?[A-Z]*MMA(?:\.|$)")


def shared_memory_limit(capability: int) -> int:
    """Bytes of shared memory that one block can have."""
    _check_capability(capability)
    return _SHARED_MEMORY_KIB[capability] * 1024


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """One kernel as the GPU would run it.

    registers: a thread's.
    stack_bytes: a thread's local memory: 0 unless registers spill or an array is indexed at run time.
    shared_bytes: a block's shared memory.
    tensor_memory_columns: a block's tensor memory (10.0 only), of 512.
    instructions: how often each full opcode, such as "LDG.E.128", stands in the code.
    """

    name: str
    capability: int
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    instructions: Counter[str]

    @property
    def matrix_instructions(self) -> Counter[str]:
        """The tensor-core instructions; see the module's table."""
        return Counter({op: n for op, n in self.instructions.items() if _MATRIX.match(op)})

    @property
    def load_widths(self) -> Counter[int]:
        """How many loads from global memory there are of each width in bits; BULK_BITS for descriptors."""
        return self._widths("LDG", "LDGSTS", "UTMALDG")

    @property
    def store_widths(self) -> Counter[int]:
        """How many stores to global memory there are of each width in bits; BULK_BITS for descriptors."""
        return self._widths("STG", "UTMASTG")

    @property
    def local_loads(self) -> int:
        return self._count("LDL")

    @property
    def local_stores(self) -> int:
        return self._count("STL")

    @property
    def spills(self) -> bool:
        """Whether anything lives in local memory that should be in registers.

        What is written there and never read is a called function's arguments: Triton 3.6's assembler calls one beside each
        transfer of a descriptor on 12.0.
        """
        written = self.stack_bytes or self.local_stores
        return bool(self.local_loads or (written and not self._count("CALL")))

    @property
    def fits(self) -> bool:
        """Whether the GPU has the memory on chip; the compiler does not ask."""
        return self.shared_bytes <= shared_memory_limit(self.capability) and self.tensor_memory_columns <= 512

    @property
    def blocks(self) -> int:
        """How many blocks a multiprocessor holds at once; 0 for a block that it cannot hold."""
        warps, blocks, shared_kib = _RESIDENT[self.capability]
        registers = -(-self.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        # From 8.0 on the driver takes 1 KiB of each block's.
        shared = self.shared_bytes + (1024 if self.capability >= 80 else 0)
        limits = [
            warps // self.num_warps,
            blocks,
            _REGISTERS // max(registers * self.num_warps, 1),
            shared_kib * 1024 // max(shared, 1),
        ]
        if self.tensor_memory_columns:
            limits.append(512 // self.tensor_memory_columns)
        return min(limits) if self.fits else 0

    @property
    def occupancy(self) -> float:
        """Of the warps that a multiprocessor can hold, the share that it does: from registers, shared and tensor memory, not
        from how many blocks there are."""
        return self.blocks * self.num_warps / _RESIDENT[self.capability][0]

    def _count(self, stem: str) -> int:
        return sum(n for op, n in self.instructions.items() if op.split(".")[0] == stem)

    def _widths(self, *stems: str) -> Counter[int]:
        widths: Counter[int] = Counter()
        for op, n in self.instructions.items():
            stem, *modifiers = op.split(".")
            if stem in stems:
                widths[_width(stem, modifiers)] += n
        return widths


class Specialization(TypedDict):
    """The arguments of compile_for that a launch's arguments determine."""

    signature: dict[str, Any]
    constexprs: dict[str, Any]
    divisible_by_16: tuple[str, ...]


def signature_of(kernel: Any, args: Mapping[str, Any]) -> Specialization:
    """How Triton would specialize a launch with these arguments; `compile_for(k, **signature_of(k, args))`.

    The rules are Triton's own: None and an int equal to 1 become constexprs, pointers and ints divisible by
    16 are marked so, unless the kernel says otherwise.

    Args:
        kernel: the @triton.jit function.
        args: by parameter name, a value as launched (a meta tensor will do), or a short form: a torch dtype
            for an aligned pointer to it, a string such as "*bf16" or "i32" for a type taken as it is.
            Parameters with a default may be left out.
    """
    kernel = _compilable(kernel)
    _check_names(kernel, args)
    found = Specialization(signature={}, constexprs={}, divisible_by_16=())
    for param in kernel.params:
        if param.name not in args and not param.has_default:
            raise TypeError(f"{kernel.__name__}: no value for {param.name}")
        value = MockTensor.wrap_dtype(args.get(param.name, param.default))
        if isinstance(value, (tuple, list)):
            raise TypeError(f"{kernel.__name__}: {param.name} is a tuple, write its signature by hand")
        if param.is_constexpr:
            kind, hint = "constexpr", None
        elif isinstance(value, str):
            kind, hint = value, None
        else:
            # Its arguments: is the pointer const, may its value be specialized on, may its alignment.
            kind, hint = native_specialize_impl(
                BaseBackend,
                value,
                param.is_const,
                not param.do_not_specialize,
                not param.do_not_specialize_on_alignment,
            )
            if param.annotation_type:
                # As in a launch: an annotated float or bool is never specialized on, whatever its value.
                unspecialized = param.annotation_type[:2] in ("u1", "fp", "bf")
                kind, hint = param.annotation_type, None if unspecialized else hint
        found["signature"][param.name] = kind
        if kind == "constexpr":
            found["constexprs"][param.name] = value
        elif isinstance(hint, str) and BaseBackend.parse_attr(hint):
            found["divisible_by_16"] += (param.name,)
    return found


def compile_for(
    kernel: Any,
    signature: Mapping[str, Any],
    constexprs: Mapping[str, Any],
    *,
    capability: int,
    num_warps: int = 4,
    num_stages: int = 3,
    divisible_by_16: Iterable[str] = (),
    enable_fp_fusion: bool = True,
    again: bool = False,
    **options: Any,
) -> MachineCode:
    """Compile a kernel for one of CAPABILITIES, with no GPU, and read what came out.

    Args:
        kernel: the @triton.jit function; autotuning and heuristics around it are left out.
        signature: parameter name -> Triton type, such as {"x_ptr": "*bf16", "M": "i32"}, in any order;
            constexprs may be left out.
        constexprs: parameter name -> value. At a launch, None and an int equal to 1 are constexprs too.
            A constexpr parameter's default is used where it is missing.
        divisible_by_16: parameters whose value (a pointer's address) is a multiple of 16; without it there
            are no wide loads.
        again: where registers spill, read what `_triton.launch` compiles from the second time on.
        options: further options of Triton's compiler, such as maxnreg.

    Raises:
        RuntimeError: kernels are interpreted in this process (TRITON_INTERPRET), or a tool fails.
        TypeError, ValueError: the names, or the capability, are not the kernel's, or not known.
    """
    _check_capability(capability)
    kernel = _compilable(kernel)
    divisible = set(divisible_by_16)
    _check_names(kernel, [*signature, *constexprs, *divisible])
    defaults = {p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default}
    constants = defaults | dict(constexprs)
    types = {name: "constexpr" if name in constants else signature.get(name) for name in kernel.arg_names}
    if missing := [name for name, kind in types.items() if kind is None]:
        raise TypeError(f"{kernel.__name__}: no type for {', '.join(missing)}")
    divisible -= constants.keys()
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if name in divisible}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attrs)
    options |= {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    target = GPUTarget("cuda", capability, 32)
    code = read(triton.compile(source, target=target, options=options), capability)
    if again and code.spills and options.get("maxnreg") is None:
        options["maxnreg"] = most_registers(num_warps)
        code = read(triton.compile(source, target=target, options=options), capability)
    return code


def read(compiled: Any, capability: int) -> MachineCode:
    """What is in a kernel that Triton compiled for `capability`."""
    metadata = compiled.metadata
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _run("cuobjdump", "--dump-resource-usage", str(cubin))
        listing = _run("nvdisasm", "-c", str(cubin))
    # One entry a function: a noinline one has its own.
    functions = {name: numbers for name, *numbers in _RESOURCES.findall(resources)}
    instructions = Counter(_OPCODE.findall(listing))
    if metadata.name not in functions or not instructions:
        raise RuntimeError(f"{metadata.name}: could not read the disassemblers' output")
    registers, stack_bytes = map(int, functions[metadata.name])
    return MachineCode(
        name=metadata.name,
        capability=capability,
        num_warps=metadata.num_warps,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", None) or 0,
        instructions=instructions,
    )


def _run(tool: str, *args: str) -> str:
    # For code made by ptxas 12 (below 10.0), nvdisasm 13 warns on stderr about an older format; it reads it.
    done = subprocess.run(
        [str(_TOOLS / tool), *args], capture_output=True, text=True, timeout=_TOOL_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{tool} failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _width(stem: str, modifiers: list[str]) -> int:
    if stem.startswith("UTMA"):
        return BULK_BITS
    for modifier in modifiers:
        if match := re.fullmatch(r"[US]?(8|16|64|128|256)", modifier):
            return int(match[1])
    return 32


def _compilable(kernel: Any) -> JITFunction:
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: compile kernels in a process where it is not")
    while isinstance(kernel, (Autotuner, Heuristics)):
        kernel = kernel.fn
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"{getattr(kernel, '__name__', kernel)!s} is no compilable @triton.jit function: "
            "was TRITON_INTERPRET set when it was defined?"
        )
    return kernel


def _check_capability(capability: int) -> None:
    if capability not in CAPABILITIES:
        raise ValueError(f"capability must be one of {CAPABILITIES}, got {capability}")


def _check_names(kernel: JITFunction, names: Iterable[str]) -> None:
    if unknown := sorted(set(names) - set(kernel.arg_names)):
        raise TypeError(f"{kernel.__name__} has no parameter {', '.join(unknown)}")
