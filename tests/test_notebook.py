"""The comparison notebook runs on a store that a job and an analysis wrote, and shows their figures beside
the paper's.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient
from recorded import recorded_results

from pipelines.analyse.job import analyse
from pipelines.results.report import report

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_it_rebuilds_the_papers_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    results = recorded_results(tmp_path / "results.parquet")
    report(results, tmp_path, store)
    analyse([results], tmp_path / "analysis", store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    notebook = nbformat.read(FOLDER / "comparison.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "it is stored without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    shown = "\n".join(output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
    for words in ("s2t-local", "paper 0.5B", "Agree@1", "paper 1.5B", "tokens vs takeover"):
        assert words in shown
    accuracy = pd.read_csv(tmp_path / "policies.csv").set_index("policy")["accuracy"]
    assert f"{100 * accuracy['s2t-local']:.1f} [" in shown


def test_the_papers_tables_are_whole() -> None:
    paper = pd.read_csv(FOLDER.parent / "pipelines" / "paper" / "paper_tables.csv", dtype={"table": str})
    first = paper[paper["table"] == "1"].pivot_table(index=["slm", "benchmark"], columns="method", values="value")
    assert first.shape == (14, 12)
    maths = ["GSM8k", "MATH500", "OlympiadBench", "AIME25"]
    for slm in ("0.5B", "1.5B"):
        averages = first.loc[slm].loc[maths].mean()
        # The paper rounds; one column (1.5B Distil, S2T-Local) is the mean of unrounded figures.
        assert first.loc[slm].loc["Math Avg."].to_numpy() == pytest.approx(averages.to_numpy(), abs=0.16)
