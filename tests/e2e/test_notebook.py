"""The notebook runs as it is published, and its published outputs are small and of one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "platform" / "examples" / "corpus_to_decision.ipynb"
_MAX_BYTES = 300_000


def test_the_published_outputs_are_small_and_of_one_run() -> None:
    text = NOTEBOOK.read_text()
    assert len(text) < _MAX_BYTES
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert "/site-packages/" not in text


@pytest.mark.slow("every step on Ray, on a real encoder")
def test_the_notebook_runs_to_its_decision(ray_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PROMPTS", "80")
    monkeypatch.setenv("RAY_ADDRESS", ray_address)  # in the place of a Ray of its own
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False).execute()
    (decided,) = (output["text"] for output in notebook.cells[-1].outputs)
    assert decided.count("gemini-2.5-pro") >= 3  # with its P(correct) in each decision
    assert not list(tmp_path.iterdir())
