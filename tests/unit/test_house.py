"""The shape of the package: where files stand, how long they are, and what a newcomer sees of a module."""

import ast
import inspect
import pydoc

import lightning as L
import pytest

from pgpo_lightning.modules import OnPolicyModule
from tests.support import ROOT
from tests.support.helpers import MODULES

HOOKS = (
    "training_step",
    "validation_step",
    "test_step",
    "predict_step",
    "configure_model",
    "configure_optimizers",
    "on_save_checkpoint",
    "on_load_checkpoint",
)


def python_files():
    folders = ("pgpo_lightning", "callbacks", "tests", "benchmarks", "docs")
    return {path.resolve() for folder in folders for path in (ROOT / folder).rglob("*.py")}


def test_no_file_is_over_400_lines():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in python_files()}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}
    assert len(lengths) > 250


def test_the_root_of_the_package_holds_rooms_alone():
    package = ROOT / "pgpo_lightning"
    assert {path.name for path in package.iterdir() if path.is_file()} == {"__init__.py", "py.typed"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_a_chain_of_two_classes_whose_hooks_stand_in_one_file(module):
    chain = [cls for cls in module.__mro__ if issubclass(cls, L.LightningModule) and cls is not L.LightningModule]
    assert chain == [module, OnPolicyModule]
    assert [name for name in HOOKS if name in vars(module)] == []
    files = {inspect.getsourcefile(inspect.unwrap(getattr(module, name))) for name in HOOKS}
    assert [file.removeprefix(f"{ROOT}/") for file in files] == ["pgpo_lightning/modules/on_policy.py"]


@pytest.mark.parametrize("module", [*MODULES, OnPolicyModule])
def test_help_shows_and_explains_every_argument(module):
    parameters = list(inspect.signature(module.__init__).parameters.values())[1:]
    assert not [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert len(parameters) <= 23
    text = pydoc.render_doc(module, renderer=pydoc.plaintext)
    for parameter in parameters:
        assert parameter.annotation is not parameter.empty
        assert text.count(f"\n |      {parameter.name}: ") == 1, parameter.name


def test_what_is_a_gpu_is_decided_in_one_place():
    """Another comparison would take no GPU of another type for one, and would not be seen by the tests on a pretended GPU."""
    found = []
    for folder in ("pgpo_lightning", "callbacks"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
                compared += node.keys if isinstance(node, ast.Dict) else []
                texts = [part.value for part in compared if isinstance(part, ast.Constant)]
                if "cuda" in texts or (isinstance(node, ast.Attribute) and node.attr == "is_cuda"):
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []
