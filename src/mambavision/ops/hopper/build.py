"""The CUDA C++ kernels: compiled on the machine that runs them, kept in Triton's cache, loaded and launched."""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from triton.runtime.cache import get_cache_manager

from mambavision.ops.hopper.plan import LAST_LINES, LINE, Definitions

# `sm_90a` is Hopper with the instructions that later generations do not have.
OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17")
MAPS = 1024  # that are kept; making one takes some microseconds
MAP_BYTES, MAP_ALIGNMENT = 128, 128


def checked(result: tuple[Any, ...]) -> Any:
    """What a function of CUDA returned, behind its status.

    Raises:
        RuntimeError: the status is an error's.
    """
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA answered {status.name}.")
    return values[0] if len(values) == 1 else tuple(values)


def multiply_add(name: str, n: int, kind: str, *, behind_registers: bool = False) -> str:
    """A C++ function sums (64, n) += left right, or = where `keep` is 0; in C++ each register has to be named.

    Args:
        name: of the function.
        n: columns, a multiple of 8.
        kind: of the operands, `bf16`, `f16` or `e4m3`.
        behind_registers: whether left is in registers, and right with its columns side by side, not its inner index.
    """
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    step = 32 if kind == "e4m3" else 16
    if behind_registers:
        parameter, left, layouts = "const unsigned int (&left)[4]", 4, ", 1"
        operand, given = (
            f"{{{', '.join(f'%{count + i}' for i in range(4))}}}",
            ", ".join(f'"r"(left[{i}])' for i in range(4)),
        )
    else:
        parameter, left = "unsigned long long left", 1
        operand, given, layouts = f"%{count}", '"l"(left)', "" if kind == "e4m3" else ", 0, 0"  # 8 bits have one only
    return f"""
__device__ __forceinline__ void {name}(
    float (&sums)[{count}], {parameter}, unsigned long long right, int keep) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + left + 1}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{n}k{step}.f32.{kind}.{kind} "
      "{{{registers}}}, {operand}, %{count + left}, p, 1, 1{layouts};\\n}}"
      : {sums} : {given}, "l"(right), "r"(keep));
}}
"""


def source(name: str, defined: Definitions) -> str:
    """The file `name`.cu with its constants and the functions that it asks for."""
    values = dict(defined)
    kind = "e4m3" if values.get("FLOAT8") else "bf16" if values["BFLOAT16"] else "f16"
    if name == "product":
        functions = [multiply_add("wgmma", values["N"], kind)]
    else:
        functions = [
            multiply_add("score_first", values["FIRST"], kind),
            multiply_add("score_rest", values["KEYS"] - values["FIRST"], kind),
            multiply_add("weigh", values["WIDTH"], kind, behind_registers=True),
        ]
    texts = [(files(__package__) / file).read_text(encoding="utf-8") for file in ("primitives.cuh", f"{name}.cu")]
    return "\n".join([*(f"#define {constant} {value}" for constant, value in defined), *functions, *texts])


def compiled(text: str) -> bytes:
    """Machine code of a source, from Triton's cache where it is there.

    Raises:
        RuntimeError: the compiler refuses it; the message is the compiler's.
    """
    version = checked(nvrtc.nvrtcVersion())
    kept = get_cache_manager(hashlib.sha256(repr((OPTIONS, version, text)).encode()).hexdigest())
    found = kept.get_file("kernel.cubin")
    if found is not None:
        with open(found, "rb") as file:
            return file.read()
    program = checked(nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], []))
    try:
        status, *_ = nvrtc.nvrtcCompileProgram(program, len(OPTIONS), [option.encode() for option in OPTIONS])
        if int(status):
            log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program)))
            checked(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"CUDA's compiler refuses a kernel:\n{log.rstrip(bytes(1)).decode()}")
        code = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program)))
        checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    with suppress(OSError):  # a full disk: the next process compiles it again
        kept.put(bytes(code), "kernel.cubin")
    return bytes(code)


@cache
def _context(device: int) -> Any:
    """Of a GPU, the one that PyTorch uses."""
    return checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(device))))


@contextmanager
def on(device: int) -> Iterator[None]:
    """Have the thread work on a GPU, also one that has not asked PyTorch for anything yet."""
    checked(driver.cuCtxPushCurrent(_context(device)))
    try:
        yield
    finally:
        checked(driver.cuCtxPopCurrent())


@cache
def kernel(name: str, defined: Definitions, shared_bytes: int, device: int) -> Any:
    """The function `name` of the file of that name, with its constants, loaded on a GPU."""
    code = compiled(source(name, defined))
    with on(device):
        module = checked(driver.cuModuleLoadData(code))
        function = checked(driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def try_out(device: int) -> None:
    """Go the way of the kernel with one that does nothing; raises what goes wrong."""
    code = compiled('extern "C" __global__ void nothing() {}')
    with on(device):
        checked(driver.cuModuleUnload(checked(driver.cuModuleLoadData(code))))
        address = checked(driver.cuMemAlloc(128))  # PyTorch's may be no memory, while it traces
        for line in LAST_LINES:
            pixels_map(int(address), (8, 1, 1, 1), (8, 8, 8), 3, 1, 128, line, torch.float16)
            weight_map(int(address), (8, 9, 8), (8, 72), 8, line, torch.float16)
        checked(driver.cuMemFree(address))


@lru_cache(maxsize=MAPS)
def pixels_map(
    address: int,
    sizes: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    size: int,
    stride: int,
    rows: int,
    line: int,
    dtype: torch.dtype,
) -> Any:
    """How the copy unit gathers pixels.

    Args:
        address: of the first element.
        sizes: channels, columns, rows and pictures of the map.
        strides: from column to column, row to row and picture to picture, in elements.
        size: rows and columns of taps; as many zeros as centre them are around the map.
        stride: of the convolution.
        rows: pixels a copy.
        line: bytes of channels a copy.
        dtype: of the elements.
    """
    # The stride of a dimension of size 1 may be anything, but for the copy unit.
    steps = [step if many > 1 else sizes[0] for many, step in zip(sizes[1:], strides, strict=True)]
    return _tensor_map(
        "cuTensorMapEncodeIm2col",
        address,
        sizes,
        steps,
        line,
        dtype,
        (ctypes.c_int * 2)(*[-(size // 2)] * 2),  # where the top left tap is for the first pixel, and for the last
        (ctypes.c_int * 2)(*[size // 2 - size + 1] * 2),
        ctypes.c_uint32(line // dtype.itemsize),
        ctypes.c_uint32(rows),
        (ctypes.c_uint32 * 4)(1, stride, stride, 1),
    )


@lru_cache(maxsize=MAPS)
def weight_map(
    address: int,
    sizes: tuple[int, int, int],
    strides: tuple[int, int],
    n: int,
    line: int,
    dtype: torch.dtype,
) -> Any:
    """How the copy unit reads n rows of a weight.

    Args:
        address: of the first element.
        sizes: channels, taps and columns of the weight.
        strides: from tap to tap and from column to column, in elements.
        n: columns a copy.
        line: bytes of channels a copy.
        dtype: of the elements.
    """
    return _tensor_map(
        "cuTensorMapEncodeTiled",
        address,
        sizes,
        strides,
        line,
        dtype,
        (ctypes.c_uint32 * 3)(line // dtype.itemsize, 1, n),
        (ctypes.c_uint32 * 3)(1, 1, 1),
    )


@lru_cache(maxsize=MAPS)
def heads_map(address: int, sizes: tuple[int, int, int, int], tokens: int, dtype: torch.dtype) -> Any:
    """How the copy unit reads some tokens of a head, in lines of 128 bytes with zeros behind what is there.

    Args:
        address: of the first element.
        sizes: channels of a head, heads, tokens of a window and windows, which lie without gaps.
        tokens: a copy.
        dtype: of the elements.
    """
    channels, heads, length, _ = sizes
    return _tensor_map(
        "cuTensorMapEncodeTiled",
        address,
        sizes,
        (channels, heads * channels, length * heads * channels),
        LINE,
        dtype,
        (ctypes.c_uint32 * 4)(LINE // dtype.itemsize, 1, tokens, 1),
        (ctypes.c_uint32 * 4)(1, 1, 1, 1),
    )


@cache
def _library() -> Any:
    """The driver. NVIDIA's Python package puts maps where Python objects lie, which is not aligned as CUDA asks."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _tensor_map(
    function: str, address: int, sizes: Sequence[int], steps: Sequence[int], line: int, dtype: torch.dtype, *shape: Any
) -> Any:
    """A description for the copy unit: lines swizzled, fetched in pairs, zeros beyond the tensor."""
    kinds = driver.CUtensorMapDataType
    kind = {
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.float8_e4m3fn: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    }[dtype]
    swizzles = driver.CUtensorMapSwizzle
    manner = (
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        {
            32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
            64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
            128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
        }[line],
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    memory = (ctypes.c_byte * (MAP_BYTES + MAP_ALIGNMENT))()
    made = (ctypes.c_byte * MAP_BYTES).from_buffer(memory, -ctypes.addressof(memory) % MAP_ALIGNMENT)
    status = getattr(_library(), function)(
        ctypes.byref(made),
        ctypes.c_int(int(kind)),
        ctypes.c_uint32(len(sizes)),
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * len(sizes))(*sizes),
        (ctypes.c_uint64 * len(steps))(*(dtype.itemsize * step for step in steps)),
        *shape,
        *(ctypes.c_int(int(each)) for each in manner),
    )
    checked((driver.CUresult(status),))
    return made


def start(function: Any, blocks: int, threads: int, shared_bytes: int, stream: int, arguments: Sequence[Any]) -> None:
    """Launch on a stream of the current GPU, with arguments of `ctypes`."""
    addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    at = ctypes.addressof(addresses)
    checked(driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, at, 0))
