"""The notebooks: each runs from its first cell to its last, and is committed as it came out."""

import re
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def said(cell):
    """All text that a cell put out."""
    return "\n".join(str(output.get("text", "")) + "\n".join(
        str(text) for kind, text in output.get("data", {}).items() if kind.startswith("text"))
        for output in cell.outputs)


def test_there_is_one_for_each_part_of_the_paper():
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{i}_" for i in range(1, 7)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_with_its_outputs(path):
    """In one pass from the top, with pictures, without an error or a path of some machine."""
    book = nbformat.read(path, as_version=4)
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" or output.get("name") == "stderr"
                   for cell in cells for output in cell.outputs)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    text = "\n".join(cell.source + said(cell) for cell in cells)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|usr|Users)/", text)
    assert path.stat().st_size < 700_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_are_short_and_define_nothing_of_the_method(path):
    from test_map import CODE

    ours = {name for module in ("farss", "methods", "model") for name in CODE[module]}
    for cell in code_cells(nbformat.read(path, as_version=4)):
        assert len(cell.source.splitlines()) <= 26
        assert not ours & set(re.findall(r"^(?:def|class) (\w+)", cell.source, re.MULTILINE))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    """In a copy of the folder, beside links to all else, so that what a run leaves stays there."""
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for file in REPO.glob("*"):
        if file.name not in ("notebooks", "runs") and not file.name.startswith("."):
            (tmp_path / file.name).symlink_to(file)
    folder = shutil.copytree(REPO / "notebooks", tmp_path / "notebooks")
    book = nbformat.read(folder / path.name, as_version=4)
    nbclient.NotebookClient(book, timeout=600, resources={"metadata": {"path": folder}}).execute()
    assert [bool(cell.outputs) for cell in code_cells(book)] == [
        bool(cell.outputs) for cell in code_cells(nbformat.read(path, as_version=4))]
