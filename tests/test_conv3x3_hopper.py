"""The convolution for Hopper GPUs: how it is cut, that it compiles anywhere, and on such a GPU its results."""

import sys
import threading

import pytest
import torch

from mambavision.ops.conv3x3 import aligned_rows, conv3x3, weight_of_rows
from op_checks import DEVICE, gapped, random, require_triton

require_triton()

from mambavision.ops import launch  # noqa: E402  (Triton is not everywhere)
from mambavision.ops.conv3x3 import triton_op as conv3x3_op  # noqa: E402
from mambavision.ops.conv3x3.hopper import cuda_op  # noqa: E402
from mambavision.ops.conv3x3.hopper.plan import ACTIVATIONS, definitions, plan  # noqa: E402

TYPES = (torch.bfloat16, torch.float16)
HOPPER = DEVICE == "cuda" and cuda_op.fault(0) is None


def on_hopper(test):
    """Mark a test as one for such a GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not HOPPER, reason="needs a GPU of the Hopper generation")(test))


@pytest.mark.parametrize("columns", [112, 128, 160, 192, 200, 208, 216, 256, 392, 400, 512, 784, 1568, 3136, 6272])
def test_a_plan_covers_all_columns_and_fits_the_gpu(columns):
    cut = plan(columns)
    tiles = -(-columns // cut.n)
    assert cut.n % 8 == 0
    assert columns <= tiles * cut.n < columns + 8 * tiles
    assert cut.teams * cut.members == 2
    assert cut.parts * cut.n // 2 <= 208  # sums in a thread's 240 registers
    assert cut.stages >= 3
    assert cut.shared_bytes <= 227 * 1024


def test_every_plan_leaves_room_for_its_barriers():
    for columns in range(112, 8192, 8):
        cut = plan(columns)
        assert cut.shared_bytes + 2 * 8 * cut.stages <= 227 * 1024
        assert cut.threads == 384


@pytest.mark.parametrize(
    ("columns", "channels", "activation", "residual", "bfloat16"),
    [(208, 208, "gelu_tanh", 0, 1), (256, 128, "none", 1, 0), (200, 48, "relu", 0, 1)],
)
def test_the_source_compiles(columns, channels, activation, residual, bfloat16, tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings", "12.0")
    from mambavision.ops.conv3x3.hopper import build

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    defined = definitions(columns, channels, dtype=torch.bfloat16 if bfloat16 else torch.float16, stride=1, bias=True,
                          residual=bool(residual), activation=activation)  # fmt: skip
    text = build.source(defined)
    code = build.compiled(text)
    assert code[:4] == b"\x7fELF"
    assert [path.read_bytes() for path in tmp_path.rglob("kernel.cubin")] == [code]
    monkeypatch.setattr(build.nvrtc, "nvrtcCreateProgram", None)
    assert build.compiled(text) == code  # as it was kept
    with pytest.raises(TypeError):
        build.compiled(text + "\n")


def test_the_compilers_complaint_is_shown(tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings", "12.0")
    from mambavision.ops.conv3x3.hopper import build

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pytest.raises(RuntimeError, match='identifier "nonsense" is undefined'):
        build.compiled("int x = nonsense;")
    with pytest.raises(RuntimeError, match="NVRTC_ERROR_INVALID_INPUT"):
        build.checked((build.nvrtc.nvrtcResult.NVRTC_ERROR_INVALID_INPUT,))


def test_a_cache_that_takes_nothing_is_no_error(monkeypatch):
    pytest.importorskip("cuda.bindings", "12.0")
    from mambavision.ops.conv3x3.hopper import build

    class Full:
        def get_file(self, _):
            return None

        def put(self, *_):
            raise OSError("no space left")

    monkeypatch.setattr(build, "get_cache_manager", lambda _: Full())
    assert build.compiled('extern "C" __global__ void nothing() {}')[:4] == b"\x7fELF"


class TestFault:
    """On a GPU of the generation, whatever is missing is said, and the kernel is not taken."""

    @pytest.fixture(autouse=True)
    def hopper(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def fault(self):
        return cuda_op.fault.__wrapped__(0)

    def test_no_bindings(self, monkeypatch):
        monkeypatch.delitem(sys.modules, "mambavision.ops.conv3x3.hopper.build", raising=False)
        monkeypatch.delattr("mambavision.ops.conv3x3.hopper.build", raising=False)
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.warns(UserWarning, match="through Triton.*pip install cuda-bindings"):
            assert "cuda-bindings" in self.fault()

    @pytest.mark.parametrize(
        "error", [RuntimeError("CUDA answered no"), OSError("no such library"), AttributeError("x")]
    )
    def test_something_goes_wrong(self, error, monkeypatch):
        pytest.importorskip("cuda.bindings", "12.0")

        def fail(_):
            raise error

        monkeypatch.setattr("mambavision.ops.conv3x3.hopper.build.try_out", fail)
        with pytest.warns(UserWarning, match=str(error)):
            assert self.fault() == f"{type(error).__name__}: {error}"

    def test_nothing_does(self, monkeypatch):
        pytest.importorskip("cuda.bindings", "12.0")
        monkeypatch.setattr("mambavision.ops.conv3x3.hopper.build.try_out", lambda _: None)
        assert self.fault() is None

    @pytest.mark.parametrize("capability", [(8, 9), (10, 0), (12, 0)])
    def test_other_generations_hear_nothing(self, capability, monkeypatch, recwarn):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert "Hopper" in self.fault()
        assert not recwarn

    def test_amd(self, monkeypatch, recwarn):
        monkeypatch.setattr(torch.version, "cuda", None)
        assert "Hopper" in self.fault()
        assert not recwarn


def test_types_that_do_not_fit_are_refused():
    x, weight = torch.zeros(1, 16, 4, 4, dtype=torch.float16), torch.zeros(112, 16, 3, 3, dtype=torch.float16)
    for bias, residual in ((torch.zeros(112), None), (None, torch.zeros(1, 112, 4, 4))):
        with pytest.raises(TypeError, match="must be of the map's type"):
            cuda_op.conv3x3(x, weight, bias, residual, 1, "none")


@pytest.mark.parametrize("shape", [(2, 16, 1, 1), (1, 16, 5, 1), (1, 16, 1, 6), (2, 16, 3, 4)])
def test_what_the_copy_unit_cannot_read_is_copied(shape):
    x = channels_last(torch.randn(shape).half())
    assert cuda_op._readable(x) is x
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(shape[0], *shape[2:], 16).permute(0, 3, 1, 2)
    expanded = torch.randn(1, 1, 1, 16).half().permute(0, 3, 1, 2).expand(shape)
    for other in (shifted.copy_(x), expanded):
        found = cuda_op._readable(other)
        assert torch.equal(found, other)
        assert found.stride(1) == 1
        assert found.data_ptr() % 16 == 0
        assert all(found.stride(dim) % 8 == 0 for dim in (0, 2, 3) if shape[dim] > 1)
        assert found is not other or max(shape[0], *shape[2:]) == 1
    rows = torch.zeros(112 * 160 + 1, dtype=x.dtype)[1:].view(112, 160)  # a weight with gaps, shifted
    found = cuda_op._readable(weight_of_rows(rows, 16))
    assert found.stride() == (144, 1, 48, 16)


def test_other_devices_are_not_served():
    x = torch.zeros(1, 128, 8, 8, dtype=torch.bfloat16)
    assert not cuda_op.serves(x, torch.zeros(128, 128, 3, 3, dtype=x.dtype), None, None, "none")


def test_a_measured_choice_holds_only_where_the_kernel_serves(monkeypatch):
    """Else a bias of another type, for which the kernel is no candidate, would be read by it."""
    asked = []
    monkeypatch.setattr(conv3x3_op, "is_large", lambda *_: True)
    monkeypatch.setattr(cuda_op, "serves", lambda x, _, bias, *__: bias.dtype == x.dtype)
    monkeypatch.setattr(conv3x3_op, "choose", lambda key, tiles, _: (asked.append((key, tiles[0])), tiles[-1])[1])
    x, weight = channels_last(random(1, 16, 5, 5, dtype=torch.float16)), random(16, 16, 3, 3, dtype=torch.float16)
    for dtype in (torch.float16, torch.float32):
        conv3x3_op.launch(x, weight, random(16, dtype=dtype), None, 1, "none")
    (one, first), (other, second) = asked
    assert one != other
    assert first == conv3x3_op.HOPPER != second


def check(actual, usual, truth, gelu=False):
    """At most twice as far from float64 as PyTorch in the same type; GELU may be 6e-5 off."""
    assert actual.shape == usual.shape
    assert actual.dtype == usual.dtype
    allowed = 2 * (usual.double() - truth).norm() + (6e-5 if gelu else 1e-6) * truth.numel() ** 0.5
    assert (actual.double() - truth).norm() <= allowed


def wide(*tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@on_hopper
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize(
    ("batch", "channels", "columns", "height", "width", "stride", "bias", "residual"),
    [
        (1, 8, 112, 1, 1, 1, True, True),  # a single pixel
        (2, 80, 160, 9, 7, 2, False, False),  # columns for 20 blocks, two chunks of channels
        (3, 208, 208, 15, 13, 1, True, True),  # a last chunk of 16 channels
        (2, 400, 392, 6, 31, 1, True, False),  # two tiles of columns, the last not full, an odd number of blocks
        (1, 24, 256, 40, 33, 1, True, True),  # one team
        (4, 64, 208, 31, 29, 2, True, False),
    ],
)
def test_convolutions(dtype, activation, batch, channels, columns, height, width, stride, bias, residual, poisoned):
    x = channels_last(random(batch, channels, height, width, dtype=dtype))
    weight = random(columns, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5)
    bias = random(columns, dtype=dtype) if bias else None
    shape = (batch, columns, -(-height // stride), -(-width // stride))
    residual = random(*shape, dtype=dtype) if residual else None
    truth = conv3x3(*wide(x, weight, bias), residual=wide(residual)[0], stride=stride, activation=activation)
    usual = conv3x3(x, weight, bias, residual=residual, stride=stride, activation=activation, backend="reference")
    for laid_out in (weight, weight_of_rows(aligned_rows(weight, 2), channels)):
        found = cuda_op.conv3x3(x, laid_out, bias, residual, stride, activation)
        assert found.is_contiguous(memory_format=torch.channels_last)
        check(found, usual, truth, gelu=activation.startswith("gelu"))


@on_hopper
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    ("channels", "columns", "side", "stride", "residual"),
    [(208, 208, 56, 1, True), (400, 400, 28, 1, True), (64, 208, 112, 2, False), (400, 784, 28, 2, False),
     (160, 160, 28, 1, True), (256, 256, 28, 1, True)],
)  # fmt: skip
def test_convolutions_at_the_sizes_of_the_networks(dtype, channels, columns, side, stride, residual, poisoned):
    """Repeated, since a race would show now and then only; more tiles than the GPU has processors."""
    x = channels_last(random(24, channels, side, side, dtype=dtype))
    weight = random(columns, channels, 3, 3, dtype=dtype, scale=(9 * channels) ** -0.5)
    bias = random(columns, dtype=dtype)
    arguments = {"residual": x if residual else None, "stride": stride, "activation": "gelu_tanh"}
    usual = conv3x3(x, weight, bias, backend="reference", **arguments)
    truth = conv3x3(*wide(x, weight, bias), **{**arguments, "residual": wide(arguments["residual"])[0]})
    assert conv3x3_op.is_large(usual.numel() // columns, columns)
    found = [cuda_op.conv3x3(x, weight, bias, arguments["residual"], stride, "gelu_tanh") for _ in range(5)]
    check(found[0], usual, truth, gelu=True)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.equal(
        conv3x3_op.conv3x3(x, weight, bias, arguments["residual"], stride, "gelu_tanh"), found[0]
    )  # by rule


@on_hopper
def test_views_with_gaps_and_unaligned_ones(poisoned):
    dtype = torch.bfloat16
    wider = channels_last(random(2, 72, 8, 9, dtype=dtype))
    weight = random(120, 32, 3, 3, dtype=dtype, scale=0.06)
    bias, residual = random(120, dtype=dtype), random(2, 128, 8, 9, dtype=dtype)
    memory = random(120 * 9 * 32 + 1, dtype=dtype)[1:]
    shifted = memory.copy_(weight.permute(0, 2, 3, 1).reshape(-1)).view(120, 3, 3, 32).permute(0, 3, 1, 2)
    for x in (wider[:, :32], wider[:, 1:33], wider[:, 40:], wider[:, :32].contiguous(), wider[:, :32].transpose(2, 3)):
        more = residual[:, :120] if x.shape[3] == 9 else residual[:, :120].transpose(2, 3)
        truth = conv3x3(*wide(x, weight, bias), residual=more.double())
        usual = conv3x3(x, weight, bias, residual=more, backend="reference")
        for other in (weight, shifted):
            check(cuda_op.conv3x3(x, other, gapped(bias), more, 1, "none"), usual, truth)


@on_hopper
def test_nan_and_infinity_come_through():
    x = torch.ones(1, 64, 30, 30, dtype=torch.bfloat16, device=DEVICE)
    x[0, :, 5, 5], x[0, 3, 20, 20] = float("nan"), float("inf")
    weight = torch.ones(112, 64, 3, 3, dtype=torch.bfloat16, device=DEVICE)
    for activation in ACTIVATIONS:
        y = cuda_op.conv3x3(channels_last(x), weight, None, None, 1, activation)
        assert y[0, :, 4:7, 4:7].isnan().all()
        assert (y[0, :, 19:22, 19:22] == float("inf")).all()
        assert y.isfinite().sum() == 112 * (900 - 18)


@on_hopper
def test_it_is_an_operator_that_compiles_and_records():
    dtype = torch.bfloat16
    x, weight = channels_last(random(2, 16, 9, 8, dtype=dtype)), random(112, 16, 3, 3, dtype=dtype, scale=0.1)
    torch.library.opcheck(cuda_op.conv3x3, (x, weight, None, None, 2, "relu"))

    def function(x):
        return cuda_op.conv3x3(x, weight, None, None, 1, "gelu_tanh") * 2

    expected = function(x)
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = function(x)
    x.zero_()
    graph.replay()
    assert recorded.count_nonzero() == 0


@on_hopper
def test_it_is_compiled_beforehand(monkeypatch):
    from mambavision.ops.conv3x3.hopper import build

    x, weight = channels_last(random(1, 24, 5, 5, dtype=TYPES[0])), random(176, 24, 3, 3, dtype=TYPES[0])
    asked = []
    monkeypatch.setattr(build, "kernel", lambda *arguments: asked.append(arguments))
    with launch.precompiling():
        cuda_op.conv3x3(x, weight, None, None, 1, "none")
        cuda_op.conv3x3(x, weight, None, None, 1, "none")
        assert not asked
    assert len(asked) == 1


@on_hopper
def test_a_thread_that_never_used_the_gpu_compiles_and_launches():
    x, weight = channels_last(random(1, 32, 5, 5, dtype=TYPES[0])), random(184, 32, 3, 3, dtype=TYPES[0])
    results = []
    thread = threading.Thread(target=lambda: results.append(cuda_op.conv3x3(x, weight, None, None, 1, "none")))
    thread.start()
    thread.join()
    assert torch.equal(results[0], cuda_op.conv3x3(x, weight, None, None, 1, "none"))
