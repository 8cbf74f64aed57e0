"""What came of an experiment: its rows, and what may be said of each comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mode.errors import ModeError
from mode.experiments.definition import Compared, Experiment, Of
from mode.experiments.findings import Findings
from mode.experiments.statistics import Difference, Summary, difference, summary
from mode.experiments.table import COSTS
from mode.roles import DENSE

#: Whether the ordering that was expected (the paper's, mostly) is found; empty: none was.
Ordering = Literal["holds", "does not hold", "undecided", "not measured", ""]


@dataclass(frozen=True)
class Line:
    """A row.

    Attributes:
        label: what the definition calls it.
        of: run and arm.
        figures: by metric.
        samples, flops, seconds: of training in all, from nothing; the mean over random seeds, NaN where not known.
        models: image encoders that an image goes through; likewise.
    """

    label: str
    of: Of
    figures: dict[str, Summary]
    samples: float
    flops: float
    seconds: float
    models: float

    @property
    def seeds(self) -> int:
        """Random seeds that it was measured with."""
        return max(each.seeds for each in self.figures.values())


@dataclass(frozen=True)
class Claim:
    """A comparison by one metric."""

    compared: Compared
    metric: str
    difference: Difference

    @property
    def ordering(self) -> Ordering:
        """Whether what was expected is found: `undecided` unless the interval lies on one side of 0."""
        word = self.difference.word
        if not self.compared.expect:
            return ""
        if word in ("undecided", "not measured"):
            return word
        return "holds" if word == self.compared.expect else "does not hold"


@dataclass(frozen=True)
class Chapter:
    """An experiment with its results.

    Attributes:
        name: of its files.
        definition, table: what these hold.
        lines: in the definition's order.
        claims: each comparison by each metric.
    """

    name: str
    definition: Experiment
    table: Findings
    lines: list[Line]
    claims: list[Claim]

    @property
    def dense(self) -> Line | None:
        """The row that costs are multiples of: the first of a dense model."""
        return next((line for line in self.lines if line.of.arm == DENSE.name), None)

    @property
    def measured_lines(self) -> list[Line]:
        """Rows that there is a figure of."""
        return [line for line in self.lines if line.seeds]

    @property
    def measured_claims(self) -> list[Claim]:
        """Comparisons of which both rows have figures."""
        return [claim for claim in self.claims if claim.difference.pairs]

    @property
    def seeds(self) -> list[int]:
        """Random seeds that there are results of."""
        return sorted({int(seed) for seed in self.table.frame["random_seed"]})


def work_out(name: str, definition: Experiment, table: Findings) -> Chapter:
    """Rows and comparisons of an experiment. Raises `ModeError` if there is no metric or one is not clear."""
    if not definition.metrics:
        raise ModeError(f"experiment '{name}' has no metrics", "`metrics: [zero-shot]`")
    figures = {
        (label, metric): table.figures(of, definition.measured(metric))
        for label, of in definition.rows.items()
        for metric in definition.metrics
    }
    lines = [
        Line(
            label,
            of,
            {metric: summary(figures[label, metric]) for metric in definition.metrics},
            *(table.cost(of, column) for column in COSTS),
        )
        for label, of in definition.rows.items()
    ]
    claims = [
        Claim(compared, metric, difference(figures[compared.row, metric], figures[compared.than, metric]))
        for compared in definition.compare
        for metric in compared.metrics or definition.metrics
    ]
    return Chapter(name, definition, table, lines, claims)
