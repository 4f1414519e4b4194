"""`python -m analysis.execute [FOLDER]`: run every notebook, in place or into a folder, without a browser."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).with_name("notebooks")


def execute(notebook: Path, target: Path) -> None:
    """Run one notebook from its own folder, with the code of this tree, and write it with its outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed. The message names the cell.
    """
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(content, timeout=600, resources={"metadata": {"path": str(notebook.parent)}})
    client.execute(env=os.environ | {"PYTHONPATH": str(NOTEBOOKS.parent.parent)})
    for cell in content.cells:
        cell.metadata.pop("execution", None)  # times of day, and warnings with paths of this machine, are not results
        if "outputs" in cell:
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    nbformat.write(content, target)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOKS
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        print(path.name, flush=True)
        execute(path, folder / path.name)
