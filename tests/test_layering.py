"""The import direction of the package: every file may use its own layer and the layers granted to it, and no other."""

import ast
from pathlib import Path

import pytest


PACKAGE = "hf_weightgen"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE
ROOT_FILES = {"__init__.py", "__main__.py"}  # the public names and the start of the CLI: they may reach everything

GRANTED = {
    "weights": "",
    "targets": "weights",
    "hub": "",
    "zoo": "weights targets hub",
    "models": "weights targets",
    "components": "weights targets models",
    "training": "weights targets zoo models",
    "pipelines": "weights targets hub models components",
    "evaluation": "weights targets hub zoo pipelines",
    "cli": "weights targets hub zoo pipelines evaluation",
}
LAYERS = {layer: set(granted.split()) for layer, granted in GRANTED.items()}
THE_ROOT = "the package root"


def imported_modules(tree: ast.AST, package: list[str]):
    """Yields (line, dotted name) of all that a module of `package` imports, wherever in the file it does so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*start, node.module] if node.module else start)
            # `from package import name`: the name may be a module, so it is part of the path
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                name = node.args[0].value
                climbs = len(name) - len(name.lstrip("."))
                start = package[: len(package) + 1 - climbs] if climbs else []
                yield node.lineno, ".".join([*start, name.lstrip(".")])


def offences(file: str, source: str) -> list[str]:
    """One sentence for each import of `file`, a path below the package, that points the wrong way."""
    *folders, name = file.split("/")
    layer = folders[0] if folders else name.removesuffix(".py")
    if layer not in LAYERS:
        return [f"{file}: {layer!r} is no known layer; name it in GRANTED, with the layers that it may import."]
    found = []
    for line, module in imported_modules(ast.parse(source, file), [PACKAGE, *folders]):
        root, *inner = module.split(".")
        if root != PACKAGE:
            continue
        target = inner[0] if inner and inner[0] in LAYERS else THE_ROOT
        if target != layer and target not in LAYERS[layer]:
            allowed = ", ".join(sorted(LAYERS[layer])) or "nothing else of the package"
            found.append(f"{file}:{line}: {layer} imports {target} ({module}); it may import {allowed}.")
    return found


def source_files() -> list[str]:
    files = (path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
    return sorted(set(files) - ROOT_FILES)


@pytest.mark.parametrize("file", source_files())
def test_imports_point_downwards(file):
    found = offences(file, (SOURCE / file).read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


def test_the_source_is_found():
    assert "weights/layout.py" in source_files()


def test_no_two_layers_may_import_each_other():
    below: set[str] = set()
    remaining = dict(LAYERS)
    while remaining:
        free = {layer for layer, granted in remaining.items() if granted <= below}
        assert free, f"These layers go round in a circle: {sorted(remaining)}"
        below |= free
        remaining = {layer: granted for layer, granted in remaining.items() if layer not in free}


@pytest.mark.parametrize(
    ("file", "source", "reached"),
    [
        ("weights/new.py", "import hf_weightgen.targets.functional", "targets"),
        ("weights/deep/new.py", "from ...models import layers", "models"),
        ("targets/new.py", "from ..zoo.schema import row_to_state_dict", "zoo"),
        ("hub.py", "from .weights.layout import Layout", "weights"),
        ("zoo/new.py", "from ..models.layers import pool", "models"),
        ("models/new.py", "def f():\n    from ..zoo import schema", "zoo"),
        ("models/new.py", "if TYPE_CHECKING:\n    from ..training.loop import train", "training"),
        ("models/new.py", "from ..components import WeightVAE", "components"),
        ("training/new.py", "from .. import pipelines", "pipelines"),
        ("training/new.py", "import torch, hf_weightgen.evaluation as e", "evaluation"),
        ("pipelines/new.py", "import_module('hf_weightgen.training.loop')", "training"),
        ("pipelines/new.py", "importlib.import_module('..zoo', __package__)", "zoo"),
        ("evaluation/new.py", "from ..components import WeightVAE", "components"),
        ("components.py", "from .pipelines import D2NWGPipeline", "pipelines"),
        ("cli.py", "from .training.loop import train", "training"),
        ("cli.py", "from . import __version__", THE_ROOT),
        ("targets/new.py", "from hf_weightgen import WeightTokenizer", THE_ROOT),
        ("targets/new.py", "import hf_weightgen", THE_ROOT),
        ("targets/new.py", "from ..extras import thing", THE_ROOT),
        ("extras/new.py", "import torch", "'extras' is no known layer"),
        ("things.py", "import torch", "'things' is no known layer"),
    ],
)
def test_a_planted_violation_is_found(file, source, reached):
    (sentence,) = offences(file, source)
    assert file in sentence
    assert reached in sentence.split(";")[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("weights/new.py", "import torch\nfrom .layout import Layout\nfrom . import lora"),
        ("weights/new.py", "import hf_weightgen.weights.lora\nfrom hf_weightgen.weights import Layout"),
        ("zoo/new.py", "from ..hub import publish\nfrom ..targets.tasks import TASKS"),
        ("pipelines/new.py", "from .. import components\nimport_module('..models', __package__)"),
        ("hub.py", "import hf_weightgen_other\nfrom huggingface_hub import HfApi"),
        ("cli.py", "def evaluate():\n    from .evaluation import accuracy"),
    ],
)
def test_what_is_granted_passes(file, source):
    assert not offences(file, source)
