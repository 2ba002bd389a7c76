"""The notebooks are valid, were executed from top to bottom, and call the public API as it is; `make docs` executes them."""

import ast
import inspect
import json

import pytest

import pgpo_lightning
from tests.support import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def code_of(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_they_are_there():
    assert {path.name for path in NOTEBOOKS} == {"quickstart.ipynb", "own_verifier.ipynb"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_their_outputs_are_of_one_execution_without_an_error(path):
    cells = code_of(path)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert any("held-out" in "".join(output.get("text", "")) for output in outputs)
    assert not any(str(ROOT) in json.dumps(output) or "/tmp/" in json.dumps(output) for output in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_their_code_calls_the_public_api_as_it_is(path):
    tree = ast.parse("\n".join("".join(cell["source"]) for cell in code_of(path)))
    imported = {
        alias.asname or alias.name: getattr(pgpo_lightning, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "pgpo_lightning"
        for alias in node.names
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    checked = 0
    for call in calls:
        if call.func.id in imported:
            given = {keyword.arg: None for keyword in call.keywords}
            inspect.signature(imported[call.func.id]).bind(*call.args, **given)  # raises at an unknown or missing one
            checked += 1
    assert checked >= 5
