"""Who may import whom. The rules are two tables; an import that neither allows, and a rule that nothing uses, fails."""

import ast
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mambavision"

# Part of the package -> what of the package it may import: a module, or a package with all its modules. Everything may
# import `config` and `files`, and every part its own modules. Imports inside functions and for type checkers count too.
ALLOWED = {
    "__init__": {"factory", "inference.predictor"},  # the public names, on first use
    "__main__": {"cli"},
    "integrations": {"factory", "layers", "models", "weights"},
    "cli": {"__init__", "engine", "export", "factory", "data.folder", "inference", "measure", "models", "weights"},
    "engine": {"data", "factory", "inference.predictor", "inference.preprocess", "models.classifier", "weights"},
    "data": {"inference.images", "inference.picture_files"},
    "export": {"inference", "models", "ops"},
    "measure": {"factory", "inference.cudnn", "inference.fuse", "inference.optimization", "layers", "models"},
    "inference": {"factory", "layers", "models", "ops"},
    "factory": {"models", "weights"},
    "models": {"layers"},
    "layers": {"ops"},
    "ops": set(),
    "weights": set(),
    "files": set(),
    "config": set(),
}

# Package from elsewhere -> where it may be imported. Those of the first table are installed with ours, those of the
# second by an extra.
CORE = {
    "torch": {
        "factory",
        "weights",
        "ops",
        "layers",
        "models",
        "inference",
        "data",
        "engine",
        "integrations",
        "measure",
        "export",
    },
    "numpy": {"inference", "data", "engine", "export.pictures"},
    "torchvision": {"inference", "data"},
    "PIL": {"inference", "data", "export.pictures"},
    "safetensors": {"weights"},
    "huggingface_hub": {"weights.fetching"},
    "rich": {"cli", "engine"},
}
WITH_TORCH = {"triton": {"ops"}, "cuda": {"ops.hopper.build"}}  # PyTorch brings them where they run
IF_THERE = {"mamba_ssm": {"ops.selective_scan.mamba_ssm"}}  # to compare with, by those who have it
EXTRA = {
    "timm": {"data", "engine", "integrations.timm", "measure.subjects"},
    "torchmetrics": {"engine.evaluate"},
    "matplotlib": {"engine.plots", "measure.plots"},
    "torch.utils.tensorboard": {"engine.logs"},
    "jsonargparse": {"cli.train"},
    "onnx": {"export.onnx", "export.openvino"},
    "onnxruntime": {"export.onnx"},
    "onnxscript": {"export.onnx", "export.openvino"},
    "openvino": {"export.openvino"},
    "executorch": {"export.executorch"},
    "torchao": {"export.executorch"},
    "pyarrow": {"inference.features"},
    "transformers": {"integrations.huggingface"},
}
PLACES = CORE | WITH_TORCH | IF_THERE | EXTRA
# Declared because a package of these tables works better with it, imported nowhere.
UNIMPORTED = {"accelerate"}
# Installed with another one of them.
BROUGHT = {"torchao"}
# Settings are read by tools that never load torch, and by the command line before it does.
STANDARD_LIBRARY_ONLY = ("config", "data.config", "engine.config")


@dataclass(frozen=True)
class Import:
    importer: str  # module, without `mambavision.`
    target: str  # module as it is written, of our package without `mambavision.`
    ours: bool
    at_import: bool  # runs when the importer is imported


def module_name(path):
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def read_imports(module, tree):
    """Every import of a module; `from package import module` is an import of that module."""
    found = []

    def visit(node, at_import):
        if isinstance(node, ast.Import):
            found.extend(resolve(alias.name, None, at_import) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively: write the whole name"
            for alias in node.names:
                assert alias.name != "*", f"{module} imports everything from {node.module}: name what it needs"
                found.append(resolve(node.module, alias.name, at_import))
        else:
            inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
                isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            )
            for child in ast.iter_child_nodes(node):
                visit(child, at_import and not inside)

    def resolve(name, attribute, at_import):
        ours = name.split(".")[0] == "mambavision"
        target = name.removeprefix("mambavision").lstrip(".") if ours else name
        if ours and attribute is not None and (inner := f"{target}.{attribute}".lstrip(".")) in MODULES:
            target = inner
        return Import(module, target or "__init__" if ours else target, ours, at_import)

    visit(tree, True)
    return found


IMPORTS = [entry for module, path in MODULES.items() for entry in read_imports(module, ast.parse(path.read_text()))]
OURS = [entry for entry in IMPORTS if entry.ours]
FOREIGN = [entry for entry in IMPORTS if not entry.ours and entry.target.split(".")[0] not in sys.stdlib_module_names]


def lies_in(module, place):
    return module == place or module.startswith(f"{place}.")


def part_of(module):
    return module.split(".")[0]


def rule_for(target):
    """The longest name of the two tables that a foreign import falls under."""
    return max((name for name in PLACES if lies_in(target, name)), key=len, default=None)


def test_every_part_has_its_rule():
    assert {part_of(module) for module in MODULES} == set(ALLOWED)


def test_imports_run_one_way():
    forbidden = [
        f"{entry.importer} imports {entry.target}"
        for entry in OURS
        if part_of(entry.importer) != part_of(entry.target)
        and entry.target not in ("config", "files")
        and not any(lies_in(entry.target, allowed) for allowed in ALLOWED[part_of(entry.importer)])
    ]
    assert not forbidden


@pytest.mark.parametrize(("part", "allowed"), [(part, name) for part in ALLOWED for name in sorted(ALLOWED[part])])
def test_what_is_allowed_is_used(part, allowed):
    assert any(part_of(entry.importer) == part and lies_in(entry.target, allowed) for entry in OURS)


def test_only_the_module_that_runs_the_package_imports_the_command_line():
    importers = {entry.importer for entry in OURS if lies_in(entry.target, "cli") and part_of(entry.importer) != "cli"}
    assert importers == {"__main__"}


def test_there_are_no_cycles():
    """Among what runs on import; a module also runs the packages it lies in."""
    edges = {module: set() for module in MODULES}
    for entry in OURS:
        if entry.at_import:
            parts = entry.target.split(".")
            packages = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
            own = {package for package in packages if lies_in(entry.importer, package) and package != entry.target}
            edges[entry.importer] |= packages - own
    assert find_cycle(edges) == []


def find_cycle(edges):
    """One cycle of a graph {node: successors} as the list of its nodes, the first one again at the end; or none."""
    finished = set()

    def walk(node, path):
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in finished:
            for target in sorted(edges[node]):
                if cycle := walk(target, [*path, node]):
                    return cycle
            finished.add(node)
        return []

    return next((cycle for node in edges if (cycle := walk(node, []))), [])


def test_cycles_are_found():
    assert find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_packages_from_elsewhere_are_imported_in_their_places():
    misplaced = [
        f"{entry.importer} imports {entry.target}"
        for entry in FOREIGN
        if (name := rule_for(entry.target)) is None or not any(lies_in(entry.importer, where) for where in PLACES[name])
    ]
    assert not misplaced


@pytest.mark.parametrize(("name", "place"), [(n, place) for n, places in PLACES.items() for place in places])
def test_every_place_of_a_package_from_elsewhere_uses_it(name, place):
    assert any(rule_for(entry.target) == name and lies_in(entry.importer, place) for entry in FOREIGN)


def test_packages_from_elsewhere_are_declared():
    text = (ROOT / "pyproject.toml").read_text()
    declared = text[text.index("\ndependencies = [") : text.index("[project.optional-dependencies]")]
    extras = text[text.index("[project.optional-dependencies]") : text.index("[project.scripts]")]
    in_extras = re.findall(r"^(?:train|huggingface|embed|export|openvino|executorch) = (.*)$", extras, re.MULTILINE)
    assert set(re.findall(r'"([\w-]+)', declared)) == {{"PIL": "pillow"}.get(name, name) for name in CORE}
    found = set(re.findall(r'"([\w-]+)', " ".join(in_extras)))
    assert found - UNIMPORTED - {"mambavision"} == {name.split(".")[-1] for name in EXTRA} - BROUGHT


def test_settings_need_the_standard_library_alone():
    assert not [entry for entry in FOREIGN if entry.importer in STANDARD_LIBRARY_ONLY]
    for entry in OURS:
        if entry.importer in STANDARD_LIBRARY_ONLY:
            assert entry.target in STANDARD_LIBRARY_ONLY


def test_commands_import_what_is_heavy_inside_their_functions():
    early = [entry for entry in OURS + FOREIGN if entry.at_import and lies_in(entry.importer, "cli")]
    assert {entry.target for entry in early} == {"__init__", "cli.arguments"}


@pytest.mark.parametrize(
    ("module", "source", "target", "ours", "at_import"),
    [
        ("ops.new", "import triton", "triton", False, True),
        ("ops.new", "def f():\n    import triton.language as tl", "triton.language", False, False),
        ("ops.new", "try:\n    import triton\nexcept ImportError:\n    pass", "triton", False, True),
        ("models.new", "from mambavision import __version__", "__init__", True, True),
        ("models.new", "from mambavision import cli", "cli", True, True),
        ("models.new", "from mambavision.cli import train", "cli.train", True, True),
        ("models.new", "import mambavision.engine.step", "engine.step", True, True),
        ("models.new", "if TYPE_CHECKING:\n    from mambavision.factory import create_model", "factory", True, False),
    ],
)
def test_imports_are_read_wherever_they_stand(module, source, target, ours, at_import):
    assert read_imports(module, ast.parse(source)) == [Import(module, target, ours, at_import)]


@pytest.mark.parametrize("source", ["from torch import *", "from . import step", "from .step import TrainingStep"])
def test_star_and_relative_imports_are_refused(source):
    with pytest.raises(AssertionError, match="imports"):
        read_imports("engine.new", ast.parse(source))
