"""Notebooks as pages of the site, and `python docs/_site/notebooks.py`, which executes them and keeps their outputs.

The notebooks in docs/notebooks hold the outputs of their last execution, which GitHub and Read the Docs show. `make docs`
executes them anew (EXECUTE_NOTEBOOKS), so that a notebook that no longer runs is an error.
"""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "docs" / "notebooks"
INDENT = 1  # as in the files


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every notebook, and its pictures."""
    from mkdocs.structure.files import File  # here, because the notebooks can be executed without it

    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = executed(path) if os.environ.get("EXECUTE_NOTEBOOKS") else json.loads(path.read_text("utf-8"))
        pictures: list[bytes] = []
        text = "\n\n".join(_blocks(notebook, path.stem, pictures))
        text += f"\n\nThis page is a notebook: [{path.name}]({path.name}).\n"
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for number, picture in enumerate(pictures, start=1):
            files.append(File.generated(config, f"notebooks/{path.stem}-{number}.png", content=picture))
    return files


def executed(path: Path) -> Any:
    """Return a notebook with the outputs of a new kernel, whose working folder is a temporary one.

    What libraries write to the error stream (progress bars, warnings) is left out.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("language_info", None)  # the version of Python that happened to run it
    return json.loads(nbformat.writes(notebook))


def _blocks(notebook: Any, name: str, pictures: list[bytes]) -> Iterator[str]:
    """Yield the cells as Markdown, and add their pictures to a list."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source.replace(".ipynb)", ".md)")
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                pictures.append(base64.b64decode("".join(data["image/png"])))
                yield f"![output of the cell above]({name}-{len(pictures)}.png)"
            elif text := "".join(data.get("text/plain", "")).strip("\n"):
                yield f"```text\n{text}\n```"


def main() -> None:
    """Execute all notebooks, and write their outputs into them."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        text = json.dumps(executed(path), indent=INDENT, ensure_ascii=False)
        path.write_text(f"{text}\n", encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
