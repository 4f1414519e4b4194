"""`python -m tests.cells NOTEBOOK`: run a notebook's cells without a kernel.

It fails where a cell fails, and prints how many cells had an output.
"""

import os
import sys
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config


class Shell(InteractiveShell):
    def enable_gui(self, gui: str | None = None) -> None:
        """Figures are drawn in the output: there is no window to keep alive."""


def run(notebook: Path) -> int:
    cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    os.chdir(notebook.parent)
    shell = Shell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    with_output = 0
    for cell in cells:
        with capture_output() as said:
            result = shell.run_cell(cell)
        result.raise_error()
        with_output += bool(said.stdout or said.outputs)
    return with_output


if __name__ == "__main__":
    print(run(Path(sys.argv[1])))
