"""The kernels for Hopper GPUs on the host: their CUDA C++ compiled by a C++ compiler; see `hopper_emulator.h`."""

import ctypes
import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import types
from contextlib import nullcontext
from pathlib import Path

import torch

HEADER = Path(__file__).with_name("hopper_emulator.h")
# Of an instruction, by what its text has; the first that fits.
INSTRUCTIONS = {
    "mbarrier.init": "barrier_init",
    "expect_tx": "barrier_expect",
    "mapa.shared::cluster": "barrier_arrive",
    "mbarrier.try_wait": "barrier_wait",
    "barrier.cluster": "cluster_sync",
    "bar.sync": "bar_sync",
    "bar.arrive": "bar_arrive",
    "wgmma.fence": "wgmma_fence",
    "wgmma.commit_group": "wgmma_commit",
    "wgmma.wait_group": "wgmma_wait",
    "im2col": "copy_pixels",
    "multicast::cluster": "copy_weights",
    "cp.async.bulk.tensor.4d.shared::cluster.global.tile": "copy_head",
    "ex2.approx": "exp2",
    "tanh.approx": "tanh",
    "rcp.approx": "reciprocal",
    "cvt.f32.f16": "widen_f16",
    "cvt.rn.f16x2": "narrow_f16",
    "cvt.rn.bf16x2": "narrow_bf16",
    "e4m3x2": "narrow_e4m3",
    # What changes no result here.
    "setmaxnreg": "nothing",
    "fence.mbarrier_init": "nothing",
    "prefetch": "nothing",
}
STRING = r'"(?:[^"\\]|\\.)*"'


class Fault(AssertionError):
    """A kernel did what none may do."""


def _split(text, separator):
    """`text` at the separators outside of strings and parentheses."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"{STRING}|[()\[\]{{}}]|{re.escape(separator)}", text):
        token = match.group()
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif token == separator and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def _end(text, start):
    """Behind the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.finditer(rf"{STRING}|[()]", text[start:]):
        depth += {"(": 1, ")": -1}.get(match.group(), 0)
        if depth == 0:
            return start + match.end()
    raise ValueError("a parenthesis is not closed")


def called(text):
    """`text` with calls of functions for its assembly."""
    parts, at = [], 0
    for match in re.finditer(r"\basm(?: volatile)?\(", text):
        end = _end(text, match.end() - 1)
        template, *sections = _split(text[match.end() : end - 1].replace("::", ": :"), ":")
        instruction = "".join(re.findall(STRING, template))
        # `::` inside of the template was not an empty section, and is found nowhere else.
        instruction = instruction.replace(": :", "::").replace('"', "")
        name = next((name for part, name in INSTRUCTIONS.items() if part in instruction), None)
        if name is None and instruction.strip():  # without an instruction, a compiler is kept from moving something
            raise LookupError(f"Nothing stands for the instruction: {instruction}")
        name = name or "nothing"
        operands = [operand for section in sections[:2] for operand in _split(section, ",") if operand.strip()]
        values = [re.fullmatch(rf"\s*{STRING}\s*\((.*)\)\s*", operand, re.DOTALL).group(1) for operand in operands]
        parts += [text[at : match.start()], f"ptx_{name}({', '.join(values) if name != 'nothing' else ''})"]
        at = end
    return "".join([*parts, text[at:]])


def multiply_add(name, n, kind, *, behind_registers=False):
    """What stands for `mambavision.ops.hopper.build.multiply_add`."""
    left = "const unsigned (&left)[4]" if behind_registers else "unsigned long long left"
    element = {"bf16": "Bf16", "f16": "F16", "e4m3": "E4m3"}[kind]
    return f"""
inline void {name}(float (&sums)[{n // 2}], {left}, unsigned long long right, int keep) {{
  gpu::multiply_add<gpu::{element}>(sums, {n}, left, right, keep);
}}
"""


@functools.cache
def _compiled(text, folder):
    """The function that runs a kernel of this source."""
    name = re.findall(r'extern "C"[^;{]*?(\w+)\(\s*const __grid_constant__', text)[0]
    text = re.sub(
        r"extern __shared__ unsigned char (\w+)\[\];",
        r"unsigned char* \1 = dynamic_shared();",
        text,
    )
    text = re.sub(r"__shared__ (\w+) (\w+)\[(.*?)\];", r"\1* \2 = gpu::declared<\1>(__LINE__, \3);", text)
    text = f"""#include "{HEADER}"
{called(text)}
extern "C" const char* run(
    void** arguments, unsigned blocks, unsigned together, unsigned threads, unsigned bytes, unsigned seed, int late) {{
  return gpu::launch({name}, arguments, blocks, together, threads, bytes, seed, late);
}}
"""
    stem = Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
    source, library = stem.with_suffix(".cpp"), stem.with_suffix(".so")
    source.write_text(text)
    command = [*compiler(), "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-o", library, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The C++ compiler refuses the source:\n{done.stderr[:3000]}")
    run = ctypes.CDLL(str(library)).run
    run.restype = ctypes.c_char_p
    return run


def compiler():
    """The command of a C++ compiler, without arguments where there is none."""
    return shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "")


class Map(ctypes.Structure):
    """`gpu::Map` of the header."""

    _fields_ = [
        ("address", ctypes.c_uint64),
        ("sizes", ctypes.c_uint64 * 4),
        ("steps", ctypes.c_uint64 * 3),
        ("rank", ctypes.c_uint32),
        ("bytes_each", ctypes.c_uint32),
        ("line", ctypes.c_uint32),
        ("pixels", ctypes.c_uint32),
        ("box", ctypes.c_uint32 * 4),
        ("stride", ctypes.c_uint32),
        ("lower", ctypes.c_int32 * 2),
        ("upper", ctypes.c_int32 * 2),
    ]


class Driver:
    """The driver's functions that describe tensors to the copy unit."""

    def __init__(self, driver):
        kinds, swizzles = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle
        self.bytes_each = {int(kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8): 1}
        self.lines = {
            int(swizzles.CU_TENSOR_MAP_SWIZZLE_32B): 32,
            int(swizzles.CU_TENSOR_MAP_SWIZZLE_64B): 64,
            int(swizzles.CU_TENSOR_MAP_SWIZZLE_128B): 128,
        }

    def _map(self, made, kind, rank, address, sizes, steps, swizzle):
        assert address.value % 16 == 0
        assert all(step % 16 == 0 for step in steps)
        there = Map.from_address(ctypes.addressof(made._obj))
        there.address, there.rank = address.value, rank.value
        there.sizes[: rank.value], there.steps[: rank.value - 1] = list(sizes), list(steps)
        there.bytes_each, there.line = self.bytes_each.get(kind.value, 2), self.lines[swizzle.value]
        return there

    def cuTensorMapEncodeIm2col(
        self, made, kind, rank, address, sizes, steps, lower, upper, channels, pixels, strides, _, swizzle, *__
    ):
        there = self._map(made, kind, rank, address, sizes, steps, swizzle)
        assert channels.value * there.bytes_each == there.line
        there.pixels, there.stride = pixels.value, strides[1]
        there.lower[:], there.upper[:] = list(lower), list(upper)
        return 0

    def cuTensorMapEncodeTiled(self, made, kind, rank, address, sizes, steps, box, _, __, swizzle, *___):
        there = self._map(made, kind, rank, address, sizes, steps, swizzle)
        assert box[0] * there.bytes_each == there.line
        assert all(each <= 256 for each in box)
        there.box[: rank.value] = list(box)
        return 0


def emulate(monkeypatch, folder, *, processors=4, seed=0, late=False):
    """Have the operators of `mambavision.ops.hopper` run on CPU tensors, as on a GPU of few multiprocessors."""
    from mambavision.ops.hopper import attention_op, build, product_op

    def kernel(name, defined, shared_bytes, device):  # noqa: ARG001  (the signature of the one it stands for)
        return _compiled(build.source(name, defined), str(folder)), dict(defined).get("CLUSTER", 1)

    def start(function, blocks, threads, shared_bytes, stream, arguments):  # noqa: ARG001
        run, together = function
        assert blocks % together == 0
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        fault = run(addresses, blocks, together, threads, shared_bytes, seed, int(late))
        if fault:
            raise Fault(fault.decode())

    driver = Driver(build.driver)
    monkeypatch.setattr(build, "multiply_add", multiply_add)
    monkeypatch.setattr(build, "_library", lambda: driver)
    monkeypatch.setattr(build, "kernel", kernel)
    monkeypatch.setattr(build, "start", start)
    monkeypatch.setattr(build, "on", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: types.SimpleNamespace(cuda_stream=0))
    for module in (product_op, attention_op):
        monkeypatch.setattr(module, "processors", lambda _: processors)
    for made in (build.pixels_map, build.weight_map, build.heads_map):  # by another driver
        made.cache_clear()
