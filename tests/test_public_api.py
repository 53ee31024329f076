"""The public names: all there, declared once for type checkers, and loaded only when they are asked for."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import hf_weightgen


ROOT = Path(__file__).parents[1]


def declared_for_type_checkers() -> dict[str, str]:
    """Public name -> module, as the `if TYPE_CHECKING:` block imports it."""
    tree = ast.parse(Path(hf_weightgen.__file__).read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", None) == "TYPE_CHECKING"]
    return {alias.name: node.module for block in blocks for node in block.body for alias in node.names}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("name", hf_weightgen.__all__)
def test_public_name_is_importable_and_lives_where_declared(name):
    value = getattr(hf_weightgen, name)
    if name != "__version__":
        assert value is getattr(importlib.import_module(f"hf_weightgen.{declared_for_type_checkers()[name]}"), name)


def test_the_three_lists_agree():
    assert declared_for_type_checkers() == hf_weightgen._MODULE_OF
    assert sorted(hf_weightgen.__all__) == sorted(["__version__", *hf_weightgen._MODULE_OF])
    assert set(hf_weightgen.__all__) <= set(dir(hf_weightgen))


def test_unknown_name_is_an_attribute_error_that_lists_the_public_names():
    with pytest.raises(AttributeError, match="'WeightGenPipelin'.*'WeightGenPipeline'"):
        hf_weightgen.WeightGenPipelin  # noqa: B018


def test_star_import_needs_no_extra():
    namespace = {}
    exec("from hf_weightgen import *", namespace)
    assert set(hf_weightgen.__all__) <= set(namespace)


@pytest.mark.parametrize("module", ["hf_weightgen", "hf_weightgen.cli"])
def test_import_and_dir_load_no_heavy_library(module):
    heavy = "{'torch', 'transformers', 'diffusers', 'datasets', 'numpy', 'peft', 'huggingface_hub'}"
    assert run_python(f"import sys, {module}; dir({module}); print(sorted({heavy} & set(sys.modules)))") == "[]\n"


def test_help_loads_no_heavy_library():
    code = (
        "import sys; sys.argv = ['hf-weightgen', '--help']\n"
        "from hf_weightgen.cli import main\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print(sorted({'torch', 'transformers', 'diffusers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    output = run_python(code)
    assert "generate" in output and output.endswith("[]\n")


def test_the_package_declares_its_types():
    assert (Path(hf_weightgen.__file__).parent / "py.typed").exists()


def test_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["offline"], *extras["test"], *extras["demo"], *extras["lm-eval"]]
    wanted = {re.split(r"[\[<>=]", requirement)[0] for requirement in asked} - {"hf-weightgen"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line and not line.startswith("#")}
    assert {name.lower() for name in wanted} <= pinned
