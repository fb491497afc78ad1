"""The CUDA C++ kernel: compiled on the machine that runs it, kept in Triton's cache, loaded and launched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import torch
from cuda.bindings import driver, nvrtc
from triton.runtime.cache import get_cache_manager

from mambavision.ops.conv3x3.hopper.plan import CHUNK, Definitions

# `sm_90a` is Hopper with the instructions that later generations do not have.
OPTIONS = ("--gpu-architecture=sm_90a", "--std=c++17")
MAPS = 1024  # that are kept; making one takes some microseconds


def checked(result: tuple[Any, ...]) -> Any:
    """What a function of CUDA returned, behind its status.

    Raises:
        RuntimeError: the status is an error's.
    """
    status, *values = result
    if int(status):
        raise RuntimeError(f"CUDA answered {status.name}.")
    return values[0] if len(values) == 1 else tuple(values)


def multiply_add(n: int, kind: str) -> str:
    """The function `wgmma` of `kernel.cu` for n columns of `bf16` or `f16`: C++ wants each register named."""
    count = n // 2
    registers = ", ".join(f"%{i}" for i in range(count))
    operands = ", ".join(f'"+f"(sums[{i}])' for i in range(count))
    return f"""
__device__ __forceinline__ void wgmma(
    float (&sums)[{count}], unsigned long long left, unsigned long long right, int keep) {{
  asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} "
      "{{{registers}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}"
      : {operands} : "l"(left), "l"(right), "r"(keep));
}}
"""


def source(defined: Definitions) -> str:
    """`kernel.cu` with its constants and the function that it asks for."""
    values = dict(defined)
    lines = [f"#define {name} {value}" for name, value in defined]
    function = multiply_add(values["N"], "bf16" if values["BFLOAT16"] else "f16")
    kernel = (files(__package__) / "kernel.cu").read_text(encoding="utf-8")
    return "\n".join([*lines, function, kernel])


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
            raise RuntimeError(f"CUDA's compiler refuses kernel.cu:\n{log.rstrip(bytes(1)).decode()}")
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
def kernel(defined: Definitions, shared_bytes: int, device: int) -> Any:
    """The function `conv3x3` with its constants, loaded on a GPU."""
    code = compiled(source(defined))
    with on(device):
        module = checked(driver.cuModuleLoadData(code))
        function = checked(driver.cuModuleGetFunction(module, b"conv3x3"))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        checked(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    return function


def try_out(device: int) -> None:
    """Compile and load a kernel that does nothing; raises what goes wrong."""
    code = compiled('extern "C" __global__ void nothing() {}')
    with on(device):
        checked(driver.cuModuleUnload(checked(driver.cuModuleLoadData(code))))


@lru_cache(maxsize=MAPS)
def pixels_map(
    address: int,
    sizes: tuple[int, int, int, int],
    strides: tuple[int, int, int],
    stride: int,
    rows: int,
    dtype: torch.dtype,
) -> Any:
    """How the copy unit gathers pixels.

    Args:
        address: of the first element.
        sizes: channels, columns, rows and pictures of the map.
        strides: from column to column, row to row and picture to picture, in elements.
        stride: of the convolution.
        rows: pixels a copy.
        dtype: of the elements, bfloat16 or float16.
    """
    # The stride of a dimension of size 1 may be anything, but for the copy unit.
    steps = [step if many > 1 else sizes[0] for many, step in zip(sizes[1:], strides, strict=True)]
    return checked(
        driver.cuTensorMapEncodeIm2col(
            _kind(dtype),
            len(sizes),
            address,
            [driver.cuuint64_t(many) for many in sizes],
            [driver.cuuint64_t(2 * step) for step in steps],
            [-1, -1],  # where the top left tap is for the first pixel, and for the last
            [-1, -1],
            CHUNK,
            rows,
            [driver.cuuint32_t(step) for step in (1, stride, stride, 1)],
            *_manner(),
        )
    )


@lru_cache(maxsize=MAPS)
def weight_map(address: int, columns: int, channels: int, row: int, n: int, dtype: torch.dtype) -> Any:
    """How the copy unit reads n rows of a weight (columns, 9, channels), `row` elements from one to the next."""
    return checked(
        driver.cuTensorMapEncodeTiled(
            _kind(dtype),
            3,
            address,
            [driver.cuuint64_t(many) for many in (channels, 9, columns)],
            [driver.cuuint64_t(2 * step) for step in (channels, row)],
            [driver.cuuint32_t(many) for many in (CHUNK, 1, n)],
            [driver.cuuint32_t(1)] * 3,
            *_manner(),
        )
    )


def _kind(dtype: torch.dtype) -> Any:
    kinds = driver.CUtensorMapDataType
    return kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == torch.bfloat16 else kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16


def _manner() -> tuple[Any, ...]:
    """What both maps say last: no interleaving, lines swizzled, whole lines pairwise, zeros beyond the tensor."""
    return (
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )


def start(
    function: Any, blocks: int, threads: int, shared_bytes: int, stream: int, arguments: Sequence[tuple[Any, Any]]
) -> None:
    """Launch on a stream of the current GPU; each argument with its type of C, or None where it knows its own."""
    values, types = zip(*arguments, strict=True)
    checked(driver.cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared_bytes, stream, (values, types), 0))
