"""An experiment as a file, `experiments/NAME.yaml`: runs of one pipeline, and the rows and comparisons made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from mode.errors import ModeError, first_fault, in_one_line
from mode.params import Name, Section

_PLACE = re.compile(r"\{([a-z][a-z0-9_]*)\}")

#: Of an experiment or a run: names of files, of experiments of DVC (which has no `..` in them), and of anchors.
RunName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*(\.[a-z0-9_-]+)*$", max_length=64)]
#: Of a folder, as `{NAME}` stands for it.
DataName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
#: Of a mean over tasks; a comma would make several tasks of it.
MeanName = Annotated[str, Field(pattern=r"^[^,]*[^,\s]$")]
#: How many experts a run may have: a bound on what a definition can ask for by a single number.
Experts = Annotated[int, Field(ge=1, le=1024)]
#: Values in a definition, anchors filled in: some lines of them can stand for more than any memory holds.
MOST_VALUES = 100_000
#: What `--quick` changes unless the definition says: little data, little training.
QUICK = {
    "glyphs.pairs": 600,
    "glyphs.test_images": 2,
    "training.epoch_samples": 64,
    "training.batch_size": 16,
    "training.warmup": 5,
    "clustering.fine": 16,
}
RandomSeed = Annotated[int, Field(ge=0, le=2**32 - 1)]


class Of(NamedTuple):
    """A row: an arm (a model, an average, a variant) of a run."""

    run: str
    arm: str


class Compared(Section):
    """Two rows held against each other, paired by random seed and task."""

    row: str
    """The row of which the comparison says whether it is better."""
    than: str
    """The row that it is held against."""
    paper: str = ""
    """What the paper found, in a few words with its figures."""
    expect: Literal["better", "worse", ""] = ""
    """What the paper's ordering would be; empty: it has none."""
    metrics: list[str] = Field(default=[])
    """Of the experiment's metrics, those by which the two are compared; empty: by each."""


class FigureOf(Section):
    """A figure: a line for each arm over the runs, or a dot for each row."""

    x: dict[str, float] = Field(default={})
    """Run -> its place on the axis; empty: the cost of each row is its place."""
    label: str = ""
    """What the axis shows."""
    lines: dict[str, str] = Field(default={})
    """Name of a line -> its arm, of the run in question."""
    log: bool = False
    """Whether the axis is logarithmic."""


class Run(Section):
    """One run: what it has for itself, beside `set` of the experiment."""

    experts: Experts | None = None
    """So many experts of the source `base`, one per coarse cluster."""
    expert: dict[str, Any] = Field(default={})
    """What each of its experts has beside its cluster, such as `epochs: 10`."""
    only: Annotated[list[Annotated[str, Field(pattern=r"^expert-[0-9]{1,6}$")]], Field(min_length=1)] | None = None
    """Train and route to these experts alone."""
    starts_from: Of | None = None
    """`[RUN, MODEL]`: this run's seed is that model of another run with the same random seed; `merged` is the mean of
    its experts' parameters. Then `training.epochs` counts from there."""
    set: dict[str, Any] = Field(default={})
    """Parameters as `clustering.strategy: random`."""

    @field_validator("starts_from", mode="before")
    @classmethod
    def _starts_from_a_pair(cls, of: object) -> object:
        return Of(*of) if isinstance(of, list) and len(of) == 2 else of

    @field_validator("starts_from")
    @classmethod
    def _starts_from_a_model(cls, of: Of | None) -> Of | None:
        if of is not None:
            TypeAdapter(Name).validate_python(of.arm)  # it names the folder that the model is kept in
        return of


class Quick(Section):
    """What `--quick` changes, to see within minutes that everything works; its figures mean nothing."""

    set: dict[str, Any] = Field(default={})
    """Parameters of every run, over all others."""


class Experiment(Section):
    """A definition; see docs/experiments.md."""

    title: str
    """A few words, for tables and pages."""
    question: str
    """What is to be found out, in one sentence."""
    item: str | None = None
    """Of the paper, such as `Table 5`."""
    note: str = ""
    """What a reader has to know, and no figure of its own."""
    seeds: list[RandomSeed] = Field(default=[0, 1, 2], min_length=1, max_length=1024)
    """Random seeds: each run is made with each."""
    data: dict[DataName, str] = Field(default={})
    """Folders that `--data NAME=FOLDER` has to give -> what they are; `{NAME}` stands for one in values of `set`."""
    experts: Experts | None = None
    """As of a run, for all that do not say."""
    set: dict[str, Any] = Field(default={})
    """Parameters of every run."""
    variants: list[str] = Field(default=[])
    """Arms of `variants.arms`: other ways to use the same models."""
    runs: Annotated[dict[RunName, Run], Field(min_length=1)]
    """The runs."""
    rows: dict[str, Of]
    """Label -> `[RUN, ARM]`: the rows of the table."""
    means: dict[MeanName, Annotated[list[str], Field(min_length=1)]] = Field(default={})
    """Name -> tasks: a mean over many tasks, which `metrics` can have by that name."""
    metrics: list[str] = Field(default=["zero-shot"])
    """Columns: `zero-shot` (the mean over the classification tasks), a task's name, `TASK, TASK, ...` (the mean over
    these), the name of one of `means`, or `TASK METRIC`."""
    compare: list[Compared] = Field(default=[])
    """The claims that are put to the test."""
    figure: FigureOf | None = None
    """Drawn beside the table."""
    quick: Quick = Quick(set=QUICK)

    @field_validator("rows", mode="before")
    @classmethod
    def _rows_are_pairs(cls, rows: object) -> object:
        if not isinstance(rows, Mapping):
            return rows
        return {label: Of(*row) if isinstance(row, list) and len(row) == 2 else row for label, row in rows.items()}

    @field_validator("runs", mode="before")
    @classmethod
    def _runs_may_be_empty(cls, runs: object) -> object:
        return {name: run or {} for name, run in runs.items()} if isinstance(runs, Mapping) else runs

    @field_validator("seeds")
    @classmethod
    def _seeds_are_distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("one is there twice")
        return seeds

    @field_validator("means")
    @classmethod
    def _means_have_names_of_their_own(cls, means: dict[str, list[str]]) -> dict[str, list[str]]:
        if "zero-shot" in means:
            raise ValueError("zero-shot: is the mean over all tasks: another name")
        return means

    @model_validator(mode="after")
    def _rows_and_comparisons_are_of_what_there_is(self) -> Experiment:
        for label, row in self.rows.items():
            if row.run not in self.runs:
                raise ValueError(f"rows.{label}: no run is called '{row.run}'")
        for number, compared in enumerate(self.compare):
            for label in (compared.row, compared.than):
                if label not in self.rows:
                    raise ValueError(f"compare.{number}: no row is called '{label}'")
            for metric in compared.metrics:
                if metric not in self.metrics:
                    raise ValueError(f"compare.{number}: '{metric}' is none of `metrics`")
        for place in self.figure.x if self.figure else ():
            if place not in self.runs:
                raise ValueError(f"figure.x: no run is called '{place}'")
        return self

    @model_validator(mode="after")
    def _runs_stand_on_what_is_above_them(self) -> Experiment:
        known: set[str] = set()
        for name, own in self.runs.items():
            if own.expert and not (own.only or own.experts or self.experts):
                raise ValueError(f"runs.{name}.expert: of which experts? give `experts`, how many, or `only`")
            if own.starts_from and own.starts_from.run not in known:
                raise ValueError(f"runs.{name}: starts from '{own.starts_from.run}', which is no run above it")
            known.add(name)
        return self

    @model_validator(mode="after")
    def _parameters_name_known_folders_and_no_seed(self) -> Experiment:
        given = {"set": self.set, **{f"runs.{name}.set": own.set for name, own in self.runs.items()}}
        for where, values in {**given, "quick.set": self.quick.set}.items():
            unknown = sorted({name for text in _texts(values) for name in _PLACE.findall(text)} - set(self.data))
            if unknown:
                raise ValueError(f"set: {{{unknown[0]}}} stands for a folder, but `data` has no '{unknown[0]}'")
            if "random_seed" in values:
                raise ValueError(f"{where}.random_seed: `seeds` says with which each run is made")
        return self

    def measured(self, metric: str) -> str:
        """What a metric is, the tasks in place of the name of a mean."""
        return ", ".join(self.means.get(metric, [metric]))

    def overrides(
        self, run: str, seed: int, data: Mapping[str, Path], quick: bool = False, seed_model: Path | None = None
    ) -> dict[str, Any]:
        """Parameters that make a run what it is, by dotted key; `experts` is the whole section.

        Args:
            run: its name.
            seed: the random seed.
            data: folders by name.
            quick: with the changes of `--quick`.
            seed_model: folder of the model that the run starts from, if it starts from one.
        """
        own = self.runs[run]
        values: dict[str, Any] = {"random_seed": seed}
        experts = own.experts or self.experts
        if experts:
            values["clustering.coarse"] = experts
        names = own.only or [f"expert-{cluster}" for cluster in range(experts or 0)]
        if names:
            values["experts"] = {name: _expert(name) | own.expert for name in names}
        if self.variants:
            values["variants.arms"] = self.variants
        values |= self.set
        if seed_model is not None:  # which brings its architecture, and has no schedule to go on with
            values |= {"seed": {"from": "pretrained", "name": f"local-dir:{seed_model}"}, "model": {}, "image": {}}
            values |= {"training.seed_epochs": 0}
        values |= own.set | (self.quick.set if quick else {})
        return {key: _filled(value, data) for key, value in values.items()}


def load_experiment(path: Path) -> Experiment:
    """Read and check a definition, `NAME.yaml`.

    Raises:
        ModeError: no such file, a name that is none for an experiment, no YAML, or a key that is unknown, missing or of
            the wrong type.
    """
    try:
        TypeAdapter(RunName).validate_python(path.stem)
    except ValidationError:
        raise ModeError(f"{path}: no name for an experiment", "a-z, 0-9, '.', '_' and '-'") from None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = ", ".join(sorted(each.stem for each in path.parent.glob("*.yaml")))
        raise ModeError(f"no experiment is called '{path.stem}'", f"there are: {there}" if there else "") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, or a date that there is not
        raise ModeError(f"{path}: not valid YAML: {in_one_line(error)}") from None
    except OSError as error:
        raise ModeError(f"{path}: cannot be read: {error.strerror}") from None
    if _is_larger(content, MOST_VALUES):
        raise ModeError(f"{path}: more than {MOST_VALUES:,} values", "anchors in anchors?")
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        raise ModeError(f"{path}: {first_fault(error)}") from None


def _is_larger(content: object, most: int) -> bool:
    """Whether parsed YAML has more values than that, one that is there by an alias counted each time."""
    left, count = [content], 0
    while left and count <= most:
        value = left.pop()
        count += 1
        left += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return count > most


def _expert(name: str) -> dict[str, Any]:
    """`expert-2` of the source `base` has its cluster 2."""
    return {"source": "base", "cluster": int(name.rpartition("-")[2])}


def _filled(value: Any, data: Mapping[str, Path]) -> Any:
    """A value in which every `{name}` is the folder of that name."""
    if isinstance(value, str):
        return _PLACE.sub(lambda found: str(data.get(found[1], found[0])), value)
    if isinstance(value, list):
        return [_filled(each, data) for each in value]
    if isinstance(value, dict):
        return {_filled(key, data): _filled(each, data) for key, each in value.items()}
    return value


def _texts(value: Any) -> list[str]:
    """All texts in a value, keys too."""
    if isinstance(value, str):
        return [value]
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _texts(part)]
