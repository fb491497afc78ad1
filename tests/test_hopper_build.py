"""How the kernels for Hopper GPUs are compiled, handed to the driver, and found to run or not; on any machine."""

import ctypes
import sys
from importlib.resources import files

import pytest
import torch

from hopper_checks import require_bindings

pytest.importorskip("triton", "3.3")  # whose cache the kernels are kept in
from mambavision.ops.hopper import availability  # noqa: E402


def test_its_lines_are_as_long_as_pythons():
    for name in ("primitives.cuh", "product.cu", "attention.cu"):
        source = (files("mambavision.ops.hopper") / name).read_text(encoding="utf-8")
        assert max(map(len, source.splitlines())) <= 120


def test_the_compilers_complaint_is_shown(tmp_path, monkeypatch):
    require_bindings()
    from mambavision.ops.hopper import build

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match='identifier "nonsense" is undefined'):
        build.compiled("int x = nonsense;")
    with pytest.raises(RuntimeError, match="NVRTC_ERROR_INVALID_INPUT"):
        build.checked((build.nvrtc.nvrtcResult.NVRTC_ERROR_INVALID_INPUT,))


def test_a_cache_that_takes_nothing_is_no_error(monkeypatch):
    require_bindings()
    from mambavision.ops.hopper import build

    class Full:
        def get_file(self, _):
            return None

        def put(self, *_):
            raise OSError("no space left")

    monkeypatch.setattr(build, "get_cache_manager", lambda _: Full())
    assert build.compiled('extern "C" __global__ void nothing() {}')[:4] == b"\x7fELF"


def test_what_is_handed_to_the_driver_is_aligned_and_arrives(monkeypatch):
    require_bindings()
    from mambavision.ops.hopper import build

    class Driver:
        def __getattr__(self, name):
            def encode(map_of, kind, rank, address, sizes, steps, *more):
                memory = ctypes.addressof(map_of._obj)
                assert memory % 64 == 0  # as CUDA asks
                ctypes.memset(memory, rank.value, 128)
                asked.append((name, address.value, list(sizes), list(steps), *map(list, more[:2]), more[-3].value))
                return 0

            return encode

    asked = []
    monkeypatch.setattr(build, "_library", Driver)
    maps = [
        build.pixels_map.__wrapped__(4096, (24, 7, 1, 3), (32, 5, 700), 3, 2, 128, 64, torch.bfloat16) for _ in range(9)
    ]
    maps.append(build.weight_map.__wrapped__(512, (24, 9, 112), (32, 304), 112, 32, torch.float8_e4m3fn))
    build.pixels_map.__wrapped__(4096, (24, 300, 1, 1), (32, 32, 32), 1, 1, 128, 128, torch.bfloat16)
    assert asked[0][:4] == ("cuTensorMapEncodeIm2col", 4096, [24, 7, 1, 3], [64, 48, 1400])
    assert asked[0][4:6] == ([-1, -1], [-1, -1])  # where the first tap is, and what the last leaves
    assert asked[-1][4:6] == ([0, 0], [0, 0])
    assert asked[-2][:4] == ("cuTensorMapEncodeTiled", 512, [24, 9, 112], [32, 304])
    assert [each[-1] for each in asked[-3:]] == [2, 1, 3]  # the swizzles of 64, 32 and 128 bytes

    def launch_kernel(*arguments):
        *_, at, extra = arguments
        addresses = (ctypes.c_void_p * 4).from_address(at)
        assert bytes((ctypes.c_byte * 128).from_address(addresses[0])) == b"\x04" * 128
        assert bytes((ctypes.c_byte * 128).from_address(addresses[1])) == b"\x03" * 128
        assert ctypes.c_void_p.from_address(addresses[2]).value == 2**40
        assert ctypes.c_int.from_address(addresses[3]).value == 77
        assert extra == 0
        return (0,)

    monkeypatch.setattr(build.driver, "cuLaunchKernel", launch_kernel)
    build.start(None, 1, 384, 1, 0, [maps[0], maps[-1], ctypes.c_void_p(2**40), ctypes.c_int(77)])
    monkeypatch.setattr(build, "_library", lambda: type("Refusing", (), {"cuTensorMapEncodeTiled": lambda *_: 1}))
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        build.weight_map.__wrapped__(512, (24, 9, 112), (32, 304), 112, 128, torch.float16)


class TestFault:
    """On a GPU of the generation, whatever is missing is said, and the kernel is not taken."""

    @pytest.fixture(autouse=True)
    def hopper(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def fault(self):
        return availability._fault.__wrapped__(0)

    def test_no_bindings(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "mambavision.ops.hopper.build", raising=False)
        monkeypatch.delattr("mambavision.ops.hopper.build", raising=False)
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.warns(UserWarning, match="through other kernels.*pip install cuda-bindings"):
            assert "cuda-bindings" in self.fault()

    @pytest.mark.parametrize(
        "error", [RuntimeError("CUDA answered no"), OSError("no such library"), AttributeError("x")]
    )
    def test_something_goes_wrong(self, error, monkeypatch):
        require_bindings()

        def fail(_):
            raise error

        monkeypatch.setattr("mambavision.ops.hopper.build.try_out", fail)
        with pytest.warns(UserWarning, match=str(error)):
            assert self.fault() == f"{type(error).__name__}: {error}"

    def test_nothing_does(self, monkeypatch):
        require_bindings()
        monkeypatch.setattr("mambavision.ops.hopper.build.try_out", lambda _: None)
        assert self.fault() is None

    @pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
    def test_other_generations_hear_nothing(self, capability, monkeypatch, recwarn):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert "Hopper" in self.fault()
        assert not recwarn

    def test_compilers_take_the_answer_and_trace_nothing(self, monkeypatch):
        require_bindings()
        monkeypatch.setattr("mambavision.ops.hopper.build.try_out", lambda _: None)
        monkeypatch.setattr(availability, "_fault", availability._fault.__wrapped__)
        compiled = torch.compile(lambda x: x + (availability.fault(0) is None), fullgraph=True, backend="eager")
        assert compiled(torch.zeros(1)) == 1

    def test_amd(self, monkeypatch, recwarn):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "Hopper" in self.fault()
        assert not recwarn
