"""What importing the package loads, costs and changes; each measured in a Python of its own."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "mambavision"
EXTRAS = (
    "jsonargparse",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "pyarrow",
    "tensorboard",
    "timm",
    "torchmetrics",
    "transformers",
    "yaml",
)
# Module -> the first package of an extra that it asks for.
NEEDED = {
    "mambavision.data.device": "timm",
    "mambavision.data.transforms": "timm",
    "mambavision.engine.evaluate": "torchmetrics",
    "mambavision.engine.logs": "tensorboard",
    "mambavision.engine.plots": "matplotlib",
    "mambavision.measure.plots": "matplotlib",
    "mambavision.engine.step": "timm",
    "mambavision.engine.train": "timm",
    "mambavision.integrations.huggingface": "transformers",
    "mambavision.integrations.huggingface.auto_classes": "transformers",
    "mambavision.integrations.huggingface.configuration": "transformers",
    "mambavision.integrations.huggingface.image_processing": "transformers",
    "mambavision.integrations.huggingface.modeling": "transformers",
    "mambavision.integrations.timm": "timm",
}

PREAMBLE = """
import json, sys, time
def packages(before=()):
    own = {name.split(".")[0] for name in set(sys.modules) - set(before)}
    return sorted(name for name in own if name not in sys.stdlib_module_names and name != "__main__")
"""


def python(script, *options):
    """What a script prints as JSON, in a fresh interpreter."""
    command = [sys.executable, *options, "-c", PREAMBLE + script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@cache
def with_torch():
    """Imports of the package after `import torch`: what they add, and seconds."""
    return python(
        """
import torch
if torch.__version__ < "2.7":  # loads it with the first operation that is registered
    import torch.fx.experimental.symbolic_shapes
before, started = set(sys.modules), time.perf_counter()
import mambavision
bare, bare_seconds = packages(before), time.perf_counter() - started
from mambavision import create_model
seconds = time.perf_counter() - started
print(json.dumps({"bare": bare, "create_model": packages(before), "bare_seconds": bare_seconds, "seconds": seconds,
                  "triton": sorted(name for name in set(sys.modules) - before if "triton" in name),
                  "cuda": torch.cuda.is_initialized()}))
"""
    )


def test_the_bare_import_loads_nothing_else():
    before = python("print(json.dumps(packages()))")  # what the environment itself loads, for editable installs
    assert set(python("import mambavision; print(json.dumps(packages()))")) - set(before) == {"mambavision"}


def test_create_model_loads_torch_and_safetensors_alone():
    assert with_torch()["bare"] == ["mambavision"]
    more = {"torch"} if torch.__version__ < "2.7" else set()  # loads parts of itself with the first operation
    assert set(with_torch()["create_model"]) == {"mambavision", "safetensors"} | more
    assert with_torch()["triton"] == []  # nor does torch on our behalf


def test_cuda_is_not_initialised():
    assert with_torch()["cuda"] is False


def test_the_import_costs_less_than_a_fifth_of_a_second():
    measured = [with_torch()]
    while (
        min(run["seconds"] for run in measured) >= 0.2 and len(measured) < 3
    ):  # another process may have been in the way
        with_torch.cache_clear()
        measured.append(with_torch())
    assert min(run["seconds"] for run in measured) < 0.2
    assert min(run["bare_seconds"] for run in measured) < 0.02


def test_no_global_setting_changes():
    before, after = python(
        """
import locale, logging, multiprocessing, os, random, signal, warnings
import numpy, torch, torchvision
from PIL import Image, ImageFile

def settings():
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "grad mode": [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()],
        "autocast": [torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")],
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic],
        "cudnn": [torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark],
        "matmul precision": torch.get_float32_matmul_precision(),
        "flush denormal": float(torch.tensor(1e-310, dtype=torch.float64) * 1.0),
        "print options": str(torch._tensor_str.PRINT_OPTS),
        "safe globals": len(torch.serialization.get_safe_globals()),
        "seeds": [torch.initial_seed(), torch.get_rng_state().sum().item(), hash(random.getstate()),
                  int(numpy.random.get_state()[1].sum())],
        "pillow": [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES],
        "warnings": [str(entry) for entry in warnings.filters],
        "logging": [str(logging.root.handlers), logging.root.level, logging.root.disabled, logging.root.manager.disable,
                    str(logging.getLogger("mambavision").handlers), logging.getLogger("mambavision").level],
        "process": [dict(os.environ), os.getcwd(), sys.path, sys.getrecursionlimit(), str(sys.excepthook)],
        "numpy": str(numpy.geterr()),
        "locale": locale.setlocale(locale.LC_ALL),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
    }

before = settings()
import mambavision.__init__
from mambavision import MambaVisionConfig, Predictor, create_model, list_models
import mambavision.cli, mambavision.ops, mambavision.inference.preprocess, mambavision.models.complexity
print(json.dumps([before, settings()]))
"""
    )
    assert {name: after[name] for name in after if after[name] != before[name]} == {}


def test_every_module_imports_with_the_core_dependencies_alone():
    """All but those that extras are for; these fail for what their extra brings and for nothing else."""
    modules = {
        ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
        if path.name != "__main__.py"  # it runs the command line
    }
    failures = python(
        f"""
import importlib
class WithoutExtras:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {EXTRAS!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [WithoutExtras(finder) for finder in sys.meta_path]
failures = {{}}
for name in {sorted(modules)!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        failures[name] = error.name.split(".")[0]
print(json.dumps(failures))
"""
    )
    assert failures == NEEDED
