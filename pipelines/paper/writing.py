"""The tables and figures as files and in MLflow: CSV and Markdown of each, PNG and SVG of what is drawn, and one page
of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from pipelines.paper.drawings import Drawing
from pipelines.paper.runs import Given
from pipelines.paper.specs import Spec
from pipelines.paper.tables import Table
from pipelines.results.summary import markdown_table
from pipelines.runtime import tracking as store
from s2t_models.storage import written_to

PAGE, TABLES, FIGURES = "paper.md", "tables", "figures"
#: Rows of a figure's numbers that its Markdown shows; the CSV file has all.
SHOWN = 40

Built = Sequence[tuple[Spec, Table | Drawing]]


def write(job: Given, built: Built) -> str:
    """Write all of it to the job's folder and log it; returns the page."""
    with written_to(job.output) as folder:
        parts = [_head(job)]
        for spec, made in built:
            parts.append(f"## {_title(spec)}\n\n{_write_one(folder, spec, made)}")
        page = "\n\n".join(parts) + "\n"
        (folder / PAGE).write_text(page)
    with store.costs_nothing(f"{job.output} is whole, and the same command logs it"):
        _track(job, built, page)
    return page


def _title(spec: Spec) -> str:
    what = "" if spec.stem.startswith("figure") else "Section " if "." in spec.name else "Table "
    return f"{what}{spec.name}: {spec.title}".replace("figure-", "Figure ")


def _head(job: Given) -> str:
    items = f"{job.items} problems" if job.items else "all problems"
    slm, teacher = job.recipe.slm.path, job.recipe.teacher.path
    return (
        f"# The paper's tables and figures for {job.recipe.name}\n\n"
        f"{slm} with {teacher}; {items} of {', '.join(job.tasks)}, fewer where the matrix says so. "
        "The paper's values are of its own pairs and tasks: they are comparable where both are the same."
    )


def _write_one(folder: Path, spec: Spec, made: Table | Drawing) -> str:
    """The files of one table or figure; returns its Markdown."""
    (folder / TABLES).mkdir(exist_ok=True)
    (folder / FIGURES).mkdir(exist_ok=True)
    rows = made.rows() if isinstance(made, Table) else made.rows
    if rows:
        pd.DataFrame(rows).to_csv(folder / TABLES / f"{spec.stem}.csv", index=False)
    if isinstance(made, Table):
        text = made.markdown()
    else:
        for name, figure in _named(spec, made):
            figure.savefig(folder / FIGURES / f"{name}.png")
            figure.savefig(folder / FIGURES / f"{name}.svg")
        pictures = "\n".join(f"![{name}]({FIGURES}/{name}.png)" for name, _ in _named(spec, made))
        text = "\n\n".join(
            filter(None, [pictures, _numbers(made), *(f"- left open: {line}" for line in made.left_open)])
        )
    text = "\n\n".join(filter(None, [text, spec.note]))
    alone = text.replace(f"({FIGURES}/", f"(../{FIGURES}/")
    (folder / TABLES / f"{spec.stem}.md").write_text(f"# {_title(spec)}\n\n{alone}\n")
    return text


def _named(spec: Spec, made: Drawing) -> Iterator[tuple[str, Figure]]:
    for end, figure in made.figures.items():
        yield f"{spec.stem}-{end}" if end else spec.stem, figure


def _numbers(made: Drawing) -> str:
    if not made.rows:
        return ""
    frame = pd.DataFrame(made.rows[:SHOWN])
    table = markdown_table(
        list(frame.columns), [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    )
    left = len(made.rows) - SHOWN
    return f"{table}\n\n{left} more in the CSV file." if left > 0 else table


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.3g}"
    return str(value)


def _track(job: Given, built: Built, page: str) -> None:
    params = {"recipe": job.recipe.name, "tasks": ",".join(job.tasks), "items": job.items}
    with store.start_run(f"paper {job.recipe.name}", params, {"s2t.stage": "paper"}):
        store.log_text(page, PAGE)
        for spec, made in built:
            store.log_table(made.rows() if isinstance(made, Table) else made.rows, f"{TABLES}/{spec.stem}.json")
        store.log_folder(job.output / TABLES, TABLES)
        if (job.output / FIGURES).is_dir():
            store.log_folder(job.output / FIGURES, FIGURES)
