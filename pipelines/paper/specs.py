"""The tables and figures of the paper: what each is called, which runs it reads, and what is known of it beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipelines.analyse.errors import UNLIKELY
from pipelines.paper import drawings
from pipelines.paper.drawings import Drawing
from pipelines.paper.evidence import STATES, Evidence
from pipelines.paper.tables import Table, table
from s2t_models.errors import UserError

OTHER_PAIRS = "The other pairs are a recipe each: run the command for it."


class SpecError(UserError):
    """A table or figure that there is not; the message is one line."""


@dataclass(frozen=True)
class Spec:
    """A table or figure of the paper. `pair` is part of the SLM's name where it is of one pair alone; `note` says what
    a reader must know, and of a figure what the paper says of its own."""

    name: str
    title: str
    reads: tuple[str, ...]
    build: Callable[[Evidence, Spec], Table | Drawing]
    note: str = ""
    pair: str = ""

    @property
    def stem(self) -> str:
        return self.name if self.name.startswith("figure") else f"table-{self.name}"


def _table(name: str, title: str, *reads: str, note: str = "", **options: object) -> Spec:
    def build(evidence: Evidence, spec: Spec) -> Table:
        return table(spec.name, evidence, spec.reads, **options)  # type: ignore[arg-type]

    return Spec(name, title, reads, build, note)


def _figure(
    name: str, title: str, build: Callable[[Evidence], Drawing], *reads: str, note: str = "", pair: str = ""
) -> Spec:
    def of_pair(evidence: Evidence, spec: Spec) -> Drawing:
        path = evidence.runs.given.recipe.slm.path
        if pair.lower() not in path.lower():
            return Drawing(left_open=[f"it is of {pair}, and this recipe's SLM is {path}; run its recipe"])
        drawing = build(evidence)
        drawing.left_open += [evidence.why_no_run(part) for part in reads if not evidence.tasks_of(part)]
        return drawing

    return Spec(f"figure-{name}", title, reads, of_pair, note, pair)


_JUDGE = "MT-Bench is rated by the recipe's own teacher; the paper's judge cannot be had here."
_LOAD = "Seconds are the server's for one question at a time (benchmark.concurrency 1)."
SPECS: tuple[Spec, ...] = (
    _table("1", "Accuracy, %", "main", more=True),
    _table("2", "How the selector agrees with the teacher", "main", down="metric"),
    _table("3", "Tokens and seconds an answer", "latency", note=_LOAD),
    _table("A1", "Sweep of R and beta", "sweep", "sweep-greedy"),
    _table("A2", "R over models", "sweep", "sweep-greedy", note=OTHER_PAIRS),
    _table(
        "A3",
        "S2T and Takeover over K and budget, accuracy, %",
        "budgets",
        note="The paper's budgets are lost; 1, 2, 5, 10 and 20% are what its other tables' figures agree with.",
    ),
    _table(
        "A4",
        "Dynamic candidate sizing",
        "candidates",
        "budgets",
        note="The paper's budgets are lost; its fixed sets have Table A3's accuracies at 1, 2 and 10%.",
    ),
    _table(
        "A5",
        "Beyond maths",
        "beyond",
        note=f"{_JUDGE} The embedded pair, which has arithmetic alone, is asked its longer and its held-out problems.",
        every_task=True,
    ),
    _table(
        "A6",
        "Deviation over seeds, %",
        "seeds",
        note="The paper's figures are lost in the text at hand, and whether its seeds are of decoding or of training: "
        "here each policy is asked with three, and the selector was trained with three. What draws nothing while it "
        "decodes has no deviation of its own.",
    ),
    _table("A7", "Local sufficiency of other pairs, %", "main", STATES, note=OTHER_PAIRS, down="metric"),
    _table("A8", "S2T-Local on Llama, %", "main", STATES, note=OTHER_PAIRS, down="metric"),
    _table("A9", "The selector in detail", "main", down="metric"),
    _table("A10", "Triggers and budgets, accuracy, %", "triggers", "budgets"),
    _table("A11", "Triggers at 1%, %", "triggers", "budgets", STATES),
    _table(
        "A12",
        "Triggers over the budget, %",
        "triggers",
        "budgets",
        STATES,
        note="The paper's budgets are lost: see A3.",
    ),
    _table("A13", "Tokens and seconds an answer, all", "latency", note=_LOAD),
    _table(
        "A14",
        "Seconds an answer over K and budget",
        "local-latency",
        note=f"{_LOAD} Which K the paper's lines are of is lost; they all lie between 9.7 and 10.2.",
    ),
    _table("A15", "Candidates drawn at a temperature with top-p", "candidates", "budgets"),
    _table("D.4", "Training strategies", "main", "ablations", note="The paper describes them without a table."),
    _table(
        "F.6",
        "Answers that agree with the teacher at every step, and others, %",
        "main",
        note="The paper takes both tasks together, on validation problems.",
        down="metric",
        every_task=True,
    ),
    _figure(
        "1",
        "Accuracy and hit rate over K and budget",
        drawings.sufficiency,
        "budgets",
        note="The paper: a 1.5B SLM's top 8 hold the 32B LLM's choice at 95%.",
    ),
    _figure("3", "Rank of the teacher's token", drawings.radial, STATES, note="The paper: over 95% within the top 8."),
    _figure("4", "Probability of what is selected", drawings.probabilities, "budgets", "main"),
    _figure(
        "A1",
        "Rank of the teacher's token, 0.5B",
        drawings.radial,
        STATES,
        pair="Qwen2.5-0.5B",
        note="The paper: over 80% within the top 8.",
    ),
    _figure(
        "A2",
        "Rank of the teacher's token, Gemma 2",
        drawings.radial,
        STATES,
        pair="gemma-2-2b",
        note="The paper: over 80% within the top 8.",
    ),
    _figure(
        "A3",
        "CDF of the teacher's rank",
        drawings.teacher_ranks,
        STATES,
        note="The paper: from 14.1% (Hit@1) to 83.2% (Hit@8) where it is worst, to 96.3% where it is best.",
    ),
    _figure(
        "A4",
        "CDF of the selected rank",
        drawings.chosen_ranks,
        "main",
        note="The paper: within the top 3 often over 80%, and above 70% where it is worst.",
    ),
    _figure(
        "A5",
        "Scores by the teacher's rank",
        drawings.scores,
        "main",
        note="The paper: a median of about 0.9 at rank 1, and near 0 from rank 2 on.",
    ),
    _figure("eq12", "Errors cumulated over steps (Eq. 12)", drawings.errors, "main"),
    _figure(
        "first-wrong",
        "Where wrong answers first go wrong",
        drawings.first_wrongs,
        "main",
        note="Not in the paper. An answer goes wrong at the first token that the teacher gives less than "
        f"{UNLIKELY:.0%}; of the `wrong` ones those are placed that it has `read`.",
    ),
)


def chosen(names: tuple[str, ...]) -> tuple[Spec, ...]:
    """The specs of these names, all without any. Raises SpecError for one that there is not."""
    known = {spec.name.lower(): spec for spec in SPECS}
    for name in names:
        if name.lower() not in known:
            raise SpecError(
                f"--only {name}: there is no such table or figure; there are {', '.join(s.name for s in SPECS)}"
            )
    return tuple(spec for spec in SPECS if not names or spec.name.lower() in {name.lower() for name in names})
