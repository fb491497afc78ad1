"""Every kernel of the networks, inference and training, compiles for a GPU: the interpreter accepts more than that."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.3")

SOURCE = Path(__file__).parents[1] / "src"

# In a Python of its own: without the interpreter, and with Triton's driver replaced by a description of a GPU.
SCRIPT = """
import contextlib, json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

class Described:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device=None):
        return 0
    def get_active_torch_device(self):
        return torch.device("cpu")
    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}

driver.set_active(Described())
torch.cuda.device = lambda device: contextlib.nullcontext()
CompiledKernel._init_handles = lambda self: None  # nothing is launched

from mambavision import create_model
from mambavision.inference import gpu
from mambavision.inference.fuse import fuse
from mambavision.inference.optimization import finished
from mambavision.ops import launch
from mambavision.ops.backend import Backend

networks = []
for name, batch, float8 in json.loads(sys.argv[1]):
    network = fuse(create_model(name))
    gpu.use_kernels(network, float8=float8)
    networks.append((finished(network, dtype=torch.bfloat16, tune=False), batch))

OPS = ("conv3x3", "conv3x3.float8", "float8", "layer_norm", "linear", "selective_scan", "stem", "token_conv")
for name in OPS:
    __import__(f"mambavision.ops.{name}")
    module = sys.modules[f"mambavision.ops.{name}"]
    for table in ("BACKENDS", "SUM_BACKENDS", "IN_PLACE_BACKENDS", "MOMENTS_BACKENDS"):
        rows = sorted(getattr(module, table, ()), key=lambda row: row.name != "triton")  # the first one is taken
        setattr(module, table, tuple(Backend(row.name, row.function, row.strength, lambda _: None) for row in rows))

names = set()
moments = set()
gpu._added = lambda x, layer, stream: gpu.linear_with_moments(x, layer.weight, layer.bias, residual=stream)
for network, batch in networks:
    for few in (True, False):
        gpu.takes_few = lambda x, few=few: few
        with torch.inference_mode(), launch.precompiling():
            network.forward_features(torch.zeros(batch, 3, *network.config.preprocessing.img_size))
            names |= {key[0].fn.__name__ for key in launch._precompiling.asked}
            for kernel, *known in launch._precompiling.asked:
                if kernel.fn.__name__ == "linear_kernel":
                    settings = dict(pair for pair in known if isinstance(pair, tuple) and isinstance(pair[0], str))
                    moments.add((settings["GIVES_MOMENTS"], settings["PARTS"] > 0))
assert moments == {(True, False), (False, True), (False, False)}, moments

# Batch sizes share their kernels.
from mambavision.ops.conv3x3 import triton_op as conv3x3_op
from mambavision.ops.linear import triton_op as linear_op
from mambavision.ops.tiles import Tile

def asked_for(batch):
    maps = torch.zeros(batch, 64, 9, 7, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, rows = torch.zeros(80, 64, 3, 3, dtype=torch.bfloat16), maps.permute(0, 2, 3, 1).flatten(0, 2)
    with launch.precompiling():
        conv3x3_op.launch(maps, weight, None, None, 1, "none", Tile(64, 64, 64, 4, 4))
        out = torch.zeros(len(rows), 80, dtype=torch.bfloat16)
        linear_op.launch(rows, weight[:, :, 0, 0], None, None, None, 0.0, "none", out, Tile(64, 64, 64, 4, 4))
        keys = set(launch._precompiling.asked)
        launch._precompiling.asked.clear()
    return keys

assert len(asked_for(16)) == 2
assert asked_for(16) == asked_for(129)

# The training's own, as its operators launch them.
from mambavision.ops.add_layer_norm.triton_op import add_layer_norm, add_layer_norm_backward, affine_layer_norm
from mambavision.ops.batch_norm.triton_op import batch_norm, batch_norm_backward
from mambavision.ops.linear_gelu.triton_op import gelu, gelu_backward
from mambavision.ops.selective_scan.triton_op import scan_backward, scan_for_training
from mambavision.ops.token_conv.triton_op import token_conv_backward
from mambavision.ops.window_attention.triton_op import window_attention, window_attention_backward

def random(*shape):
    return torch.randn(*shape, dtype=torch.bfloat16)

with torch.inference_mode(), launch.precompiling():
    qkv, u = random(2, 196, 3 * 320), random(2, 196, 160)
    window_attention_backward(random(2, 196, 320), qkv, *window_attention(qkv, 8, 0.16), 8, 0.16)
    token_conv_backward(random(2, 196, 320)[..., :160], u, torch.randn(160, 3))
    gelu_backward(random(392, 1280), gelu(random(392, 1280), torch.randn(1280)))
    image, affine = random(2, 80, 56, 56).contiguous(memory_format=torch.channels_last), torch.randn(80)
    _, mean, variance = batch_norm(image, affine, affine, random(2), image, 1e-5, "none")
    batch_norm_backward(image, image, affine, affine, None, mean, variance, 1e-5, "gelu_tanh")
    x, weight = random(2, 196, 320), torch.randn(320)
    kind = torch.bfloat16
    y, mean, rate = affine_layer_norm(x, weight, weight, 1e-5, kind)
    add_layer_norm_backward(None, y, x, None, None, None, weight, mean, rate, False, kind, kind)
    for gamma in (None, weight):
        total, y, mean, rate = add_layer_norm(x, x, weight, gamma, random(2), weight, weight, 1e-5, kind)
        add_layer_norm_backward(total, y, total, x, gamma, random(2), weight, mean, rate, True, kind, kind)
    _, _, B, C = random(2, 196, 36).split([10, 10, 8, 8], dim=-1)
    scanned = u, u, torch.randn(160, 8), B, C, torch.randn(160), torch.randn(160)
    scan_backward(u, scan_for_training(*scanned)[1], *scanned)
    names |= {key[0].fn.__name__ for key in launch._precompiling.asked}
print(json.dumps(sorted(names)))
"""


def compiled(*networks):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-c", SCRIPT, json.dumps(networks)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler comes with its Linux builds")
@pytest.mark.slow
def test_the_kernels_of_the_networks_compile_for_a_gpu():
    found = compiled(("mamba_vision_T", 1, False), ("mamba_vision_T", 8, False), ("mamba_vision_T", 8, True))
    assert found == {
        "add_layer_norm_backward_kernel",
        "add_layer_norm_kernel",
        "apply_kernel",
        "attend_backward_kernel",
        "attend_kernel",
        "backward_kernel",
        "column_sums_kernel",
        "conv3x3_kernel",
        "first_conv_kernel",
        "gelu_backward_kernel",
        "gelu_kernel",
        "gradient_kernel",
        "layer_norm_kernel",
        "linear_kernel",
        "mean_kernel",
        "merge_statistics_kernel",
        "merge_sums_kernel",
        "statistics_kernel",
        "stem_kernel",
        "stitch_kernel",
        "sums_kernel",
        "to_float8_kernel",
        "token_conv_backward_kernel",
        "token_conv_kernel",
        "walk_kernel",
    }
