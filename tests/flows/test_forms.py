"""The forms: what they say, and what they refuse."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.exceptions import ParameterTypeError
from prefect.utilities.callables import parameter_schema
from pydantic import ValidationError

from flows.add_expert import add_expert, adding, is_known, part_for
from flows.devices import Machine
from flows.evaluate import evaluate
from flows.experiment import experiment, running
from flows.graph import in_order, make_pipeline
from flows.pipeline import pipeline
from flows.runs import parser
from flows.train_expert import part_for as part_for_experts
from flows.train_expert import train_expert
from mode.cli import main
from mode.errors import ModeError
from mode.params import load_params, parse_params

REPOSITORY = Path(__file__).parents[2]
FLOWS = [pipeline, train_expert, add_expert, evaluate]


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_every_field_of_a_form_says_what_it_is(flow: Any) -> None:
    schema = parameter_schema(flow.fn).model_dump()
    machine = schema["definitions"]["Machine"]
    fields = {**schema["properties"], "machine": machine, **machine["properties"]}
    assert [name for name, field in fields.items() if not field.get("description")] == []


def test_every_field_of_an_experiment_s_form_says_what_it_is() -> None:
    fields = parameter_schema(experiment.fn).model_dump()["properties"]
    assert {*fields} == {"name", "quick", "seeds", "jobs", "data", "anew"}
    assert all(field["description"] for field in fields.values())


@pytest.mark.parametrize("flow", [pipeline, evaluate], ids=lambda flow: flow.name)
def test_form_can_be_sent_as_it_is(flow: Any) -> None:
    assert parameter_schema(flow.fn).model_dump().get("required", []) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"workers": 0},
        {"devices": "gpu"},
        {"devices": [-1]},
        {"retries": -1},
        {"threads": 2},
        {"per_device": 1.5},
        {"engine": "spark"},
        {"engine": "tcp://evil.example:8786"},  # a run's data would go there
        {"gpus_per_training": 0},
        {"nodes_per_training": 0},
        {"scheduler": "pbs"},
        {"slurm": {"partition": "gpu --wrap=id"}},
        {"slurm": {"account": "-evil"}},
        {"slurm": {"qos": "a,b"}},
        {"slurm": {"resources": {"nvme; id": 1}}},
        {"slurm": {"resources": {"nvme": "1;id"}}},
        {"slurm": {"minutes": 0}},
        {"slurm": {"wrap": "id"}},
    ],
)
def test_wrong_machine_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Machine.model_validate(wrong)


@pytest.mark.parametrize(
    ("flow", "wrong"),
    [
        (train_expert, {"experts": []}),
        (train_expert, {"experts": ["../seed"]}),
        (add_expert, {"name": "New Source", "shards": "x"}),
        (add_expert, {"name": "new", "shards": ""}),
        (add_expert, {"name": "new", "shards": "x", "experts": 0}),
        (experiment, {"name": "../length"}),
        (experiment, {"name": "--plan"}),
        (experiment, {"name": "length", "seeds": [-1]}),
        (experiment, {"name": "length", "jobs": 0}),
        (experiment, {"name": "length", "data": {"--keep": "x"}}),
        (experiment, {"name": "length", "data": {"photos": ""}}),
    ],
)
def test_wrong_parameters_are_refused(flow: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterTypeError):
        flow.validate_parameters(wrong)


def test_an_experiment_is_the_command_of_the_shell() -> None:
    module, *arguments = running("variety", True, [0, 2], 3, {"photos": "--keep", "wide": "/a b=c"}, True)
    assert module == "flows.runs"
    options = parser().parse_args(arguments)
    assert (options.name, options.quick, options.seeds, options.jobs) == ("variety", True, [0, 2], 3)
    assert (options.data, options.keep, options.anew) == (["photos=--keep", "wide=/a b=c"], False, True)
    assert running("length", False, [], None, {}, False) == ["flows.runs", "length"]


GRAPH = make_pipeline(
    {
        "seed": [],
        "index@new": [],
        "expert@expert-0": ["seed"],
        "expert@expert-1": ["seed", "index@new"],
        "evaluate": ["expert@expert-0", "expert@expert-1"],
        "report": ["evaluate"],
    }
)


def test_expert_brings_what_it_needs() -> None:
    assert in_order(part_for_experts(GRAPH, ["expert-0"])) == ["seed", "expert@expert-0"]


def test_unknown_expert_is_named() -> None:
    with pytest.raises(ModeError, match=r"'seed'.*expert-0, expert-1"):
        part_for_experts(GRAPH, ["seed"])


def test_new_expert_leaves_the_others_alone() -> None:
    assert set(part_for(GRAPH, ["expert-1"])) == {"seed", "index@new", "expert@expert-1", "evaluate", "report"}


def test_known_source_is_gone_on_with_and_another_refused() -> None:
    content = load_params(REPOSITORY / "params.yaml").model_dump()
    content["sources"]["new"] = {"shards": "a"}
    params = parse_params(content)
    assert is_known(params, "new", "a")
    assert not is_known(params, "newer", "a")
    with pytest.raises(ModeError, match="is there already: a"):
        is_known(params, "new", "b")


def test_deployments_name_the_flows() -> None:
    content = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text(encoding="utf-8"))
    named = {entry["name"]: entry["entrypoint"] for entry in content["deployments"]}
    for flow in [*FLOWS, experiment]:
        path, _, function = named[flow.name].partition(":")
        assert function == flow.fn.__name__
        assert path == f"flows/{Path(str(flow.fn.__code__.co_filename)).name}"
    schedules = [schedule for entry in content["deployments"] for schedule in entry.get("schedules", [])]
    assert schedules
    assert not any(schedule["active"] for schedule in schedules)


@pytest.mark.parametrize("shards", ["--help", "-h", "--params=/nowhere", "--"])
def test_shards_are_never_an_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shards: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    module, *arguments = adding("new", shards, 1)
    assert module == "mode.cli"
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {shards}: ")
