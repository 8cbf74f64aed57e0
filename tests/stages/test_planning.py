"""`mode plan`: what it plans, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mode.cli import main
from mode.data.glyphs.dataset import write_glyph_shards, write_glyph_tasks
from mode.data.shards.index import build_index
from mode.data.shards.manifest import build_manifest
from mode.errors import ModeError
from mode.evaluation.tasks import open_task
from mode.params import GlyphParams, IndexParams, SourceParams
from mode.planning.account import Plan
from mode.planning.rates import Measured
from mode.planning.shape import shape_of
from mode.stages.planning import EVALUATION_IMAGES, EVALUATION_TEXTS, Asked, count_of, plan_project
from tests.small import VIT

PARAMS = {
    "sources": {"base": {"shards": "glyphs"}},
    "experts": {"expert-0": {"cluster": 0}, "expert-1": {"cluster": 1}},
    "glyphs": {"pairs": 5_000},
    "model": VIT.model_dump(exclude_none=True),
    "image": {"size": 16},
    "clustering": {"fine": 8, "coarse": 2},
    "training": {"epoch_samples": 320, "epochs": 4, "seed_epochs": 2, "batch_size": 32, "warmup": 0},
    "machine": {"device": "cpu", "threads": 1},
}
A100S = Asked(gpu="a100", gpus=8, nodes=4)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which nothing has run."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(root: Path, asked: Asked | None = None) -> Plan:
    return plan_project(root, root / "params.yaml", asked or Asked())


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error that `mode plan` fails with."""
    with pytest.raises(SystemExit) as ended:
        main(["plan", *arguments])
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def write_data(root: Path) -> None:
    """Shards of 300 pairs, their manifest and index."""
    shards = root / "data/shards/base"
    write_glyph_shards(GlyphParams(pairs=300, shard_pairs=150), shards, random_seed=0, workers=1)
    manifest = build_manifest(SourceParams(shards="data/shards/base"), root)
    manifest.save(shards / "manifest.json")
    build_index(manifest, root, root / "data/index/base", IndexParams(), 1)


def list_shards(root: Path, shards: str) -> None:
    """A project of these shards, with its manifest."""
    (root / "params.yaml").write_text(yaml.safe_dump({**PARAMS, "sources": {"base": {"shards": shards}}}))
    listed = root / "data/shards/base/manifest.json"
    listed.parent.mkdir(parents=True, exist_ok=True)
    build_manifest(SourceParams(shards=shards), root).save(listed)


def test_without_options_it_is_the_project(root: Path) -> None:
    planned = plan(root)
    assert planned.pairs == {"base": 5_000}  # that will be drawn
    assert (planned.device, planned.nodes, planned.devices_per_node) == ("cpu", 1, 1)
    samples = {stage.stage: stage.samples for stage in planned.stages if stage.samples}
    assert samples == {
        "seed": 640,
        "dense": 640,
        "dense-long": 1_280,
        "expert@expert-0": 640,
        "expert@expert-1": 640,
    }


def test_files_that_are_there_are_counted(root: Path) -> None:
    write_data(root)
    planned = plan(root)
    assert planned.pairs == {"base": 300}
    disk = {stage.stage: stage.disk_bytes for stage in planned.stages}
    assert disk["data@base"] == sum(tar.stat().st_size for tar in (root / "data/shards/base").glob("*.tar"))
    assert disk["index@base"] == pytest.approx(
        sum(file.stat().st_size for file in (root / "data/index/base").rglob("*") if file.is_file())
    )
    assert planned.rates["index_bytes_per_pair"].source == "files of this project"
    more = plan(root, Asked(pairs="3k"))
    assert {stage.stage: stage.disk_bytes for stage in more.stages}["data@base"] == pytest.approx(
        10 * disk["data@base"]
    )


@pytest.mark.parametrize("content", ['["data/tasks/a"', '{"a": 1}', "[1]", ""])
def test_a_damaged_list_of_tasks_is_one_line(root: Path, content: str) -> None:
    (root / "data/tasks").mkdir(parents=True)
    (root / "data/tasks/tasks.json").write_text(content)
    with pytest.raises(ModeError, match=r"tasks.json: damaged: not a list of folders \(dvc repro --force tasks\)"):
        plan(root)


def test_images_and_texts_of_tasks_that_are_given_are_counted_before_they_are_listed(root: Path) -> None:
    write_glyph_tasks(GlyphParams(test_images=1), root / "own", 0)
    given = sorted(f"own/{folder.name}" for folder in (root / "own").iterdir())[:2]
    tasks = [open_task(root / folder) for folder in given]
    images = sum(len(task.images) for task in tasks)
    texts = sum(len(task.classes) * len(task.templates) for task in tasks)
    assert texts > images > 0
    (root / "rates.yaml").write_text("model_start_seconds: 0\ndecode_images_per_core_second: 1.0e+18")

    def hours(tasks: list[str], asked: int | None = None) -> float:
        (root / "params.yaml").write_text(yaml.safe_dump({**PARAMS, "evaluation": {"tasks": tasks}}))
        planned = plan(root, Asked(evaluation_images=asked, rates=root / "rates.yaml"))
        return {stage.stage: stage.hours for stage in planned.stages}["evaluate"]

    model = shape_of(VIT, 16)
    image, text = model.flops_per_image, model.flops_per_text
    elsewhere = EVALUATION_IMAGES * image + EVALUATION_TEXTS * text
    assert hours([*given, "not/there"]) / hours(given) == pytest.approx(elsewhere / (images * image + texts * text))
    assert hours(given, 3 * images) == pytest.approx(3 * hours(given))


def test_measurements_are_used_and_named_and_a_persons_rates_come_first(root: Path) -> None:
    flops = plan(root).flops_per_pair
    Measured("cpu", flops, {"training_samples_per_second": 64.0, "image_bytes": 8.0}).save(root / ".mode/rates.json")
    planned = plan(root)
    assert planned.rates["training_samples_per_second"].source == "measured here"
    assert {stage.stage: stage.hours for stage in planned.stages}["seed"] == pytest.approx(17.5 / 3600)  # its start 7.5
    (root / "mine.yaml").write_text("image_bytes: 9")
    given = plan(root, Asked(rates=root / "mine.yaml")).rates["image_bytes"]
    assert (given.value, given.source) == (9.0, str(root / "mine.yaml"))
    # On other machines, and of other projects, nothing is known.
    assert plan(root, A100S).rates["training_samples_per_second"].value is None
    assert plan(root, replace(A100S, preset="demo")).rates["image_bytes"].value == 25_000.0


def test_other_numbers_in_place_of_the_projects(root: Path) -> None:
    asked = replace(A100S, pairs="1M", model="ViT-B-32", experts=3, settings=["training.epochs=5"])
    planned = plan(root, asked)
    assert (planned.model, planned.pairs, planned.devices_of_seed) == ("ViT-B-32", {"base": 10**6}, 32)
    assert planned.flops_per_pair == pytest.approx(44.1e9, rel=0.01)  # at 224 pixels
    assert [stage.stage for stage in planned.stages if stage.samples] == [
        *("seed", "dense", "dense-long"),
        *(f"expert@expert-{number}" for number in range(3)),
    ]


def test_the_papers_numbers_where_there_is_no_project(tmp_path: Path) -> None:
    planned = plan_project(tmp_path, tmp_path / "params.yaml", replace(A100S, pairs="400M"))
    by_name = {stage.stage: stage for stage in planned.stages}
    assert by_name["seed"].samples == pytest.approx(27 * 400e6, rel=1e-5)
    assert by_name["expert@expert-3"].samples == pytest.approx(5 * 400e6, rel=1e-4)
    # 10,700 A100 hours are 12.8 billion samples of OpenCLIP's ViT-B/16: 9,030 the seed's.
    assert by_name["seed"].device_hours == pytest.approx(9_030, rel=0.02)


@pytest.mark.parametrize(
    ("text", "count"),
    [("1", 1), ("400M", 400_000_000), ("2.5B", 2_500_000_000), ("40 k", 40_000), ("1_000,000", 10**6)],
)
def test_counts(text: str, count: int) -> None:
    assert count_of(text) == count


@pytest.mark.parametrize("text", ["0", "0M", "-5", "many", "", "1e9", "nan", "4MM", "٣"])
def test_what_is_no_count_is_refused(text: str) -> None:
    with pytest.raises(ModeError, match="is no number of pairs"):
        count_of(text)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--pairs", "0"],
            "error: --pairs: '0' is no number of pairs (a whole number above 0, or such as 400M or 2.5B)",
        ),
        (
            ["--gpu", "v100"],
            "error: --gpu: no GPU is known as 'v100' (there are a100, h100, h200, cpu; another one takes --peak",
        ),
        (["--preset", "paper"], "error: no preset is called 'paper' (there are: demo, finetune, paper-b16, paper-b32)"),
        (["--preset", "paper-b16"], "error: source 'base': nothing says how many pairs it has"),
        (["--model", "ViT-Z"], "error: model.name: open_clip knows no model 'ViT-Z'"),
        (["--set", "epochs"], "error: --set: 'epochs' is no KEY=VALUE"),
        (["--set", "training.epoch=3"], "error: params.yaml: training.epoch: unknown parameter"),
        (["--rates", "none.yaml"], "error: none.yaml: no such file"),
        (["--gpus-per-training", "2"], "error: 2 devices for one training, but there are 1"),
        (["--experts", "9"], "error: params.yaml: sources.base: coarse (9) exceeds fine (8) of glyphs"),
        (["--price", "inf"], "error: --price: inf is no number to plan with (give a finite one)"),
        (["--memory", "inf"], "error: --memory: inf is no number to plan with (give a finite one)"),
        (["--peak-tflops", "5"], "error: --peak-tflops: of which GPU? (name it with --gpu NAME)"),
        (["--gpu-memory", "40"], "error: --gpu-memory: of which GPU? (name it with --gpu NAME)"),
        (
            ["--gpu-memory", "inf", "--gpu", "a100"],
            "error: --gpu-memory: inf is no number to plan with (give a finite one)",
        ),
        (["--measure"], "error: "),
    ],
)
def test_faults_are_one_line(root: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert fails(capsys, *arguments).startswith(said)


def test_json_goes_to_standard_output_and_is_the_plan(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "--json", "--price", "2"])
    assert ended.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert Plan.model_validate_json(printed.out) == plan(root, Asked(price=2.0))
    assert {"stages", "disk_bytes", "hours", "bottleneck", "rates"} <= json.loads(printed.out).keys()


def test_the_table_is_text(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan"])
    printed = capsys.readouterr().out
    assert "expert@expert-1" in printed
    assert "docs/scaling.md: published by others" in printed
    assert "\x1b" not in printed


def test_another_gpu_takes_its_peak(root: Path) -> None:
    planned = plan(root, Asked(gpu="B200", peak_tflops=2_250.0, gpus=2))
    assert (planned.device, planned.devices_of_seed) == ("b200", 2)
    rate = 2 * 0.13 * 2_250e12 / planned.flops_per_pair
    [seed] = [stage for stage in planned.stages if stage.stage == "seed"]
    assert seed.phases[-1]["GPUs"] == pytest.approx(640 / rate / 3600)


class TestPairsThatNothingHasCounted:
    """Shards that are listed, and not yet indexed."""

    @pytest.fixture
    def listed(self, root: Path) -> Path:
        """Tars of 300 pairs that are somebody's own."""
        write_glyph_shards(GlyphParams(pairs=300, shard_pairs=150), root / "own", random_seed=0, workers=1)
        list_shards(root, "own")
        return root

    def test_they_are_estimated_from_what_was_measured(self, listed: Path) -> None:
        with pytest.raises(ModeError, match="source 'base': nothing says how many pairs it has"):
            plan(listed)
        size = sum(path.stat().st_size for path in (listed / "own").glob("*.tar"))
        Measured("cpu", 1e6, {"image_bytes": size / 400, "captions_per_image": 1.5}).save(listed / ".mode/rates.json")
        planned = plan(listed)
        assert planned.pairs == {"base": 600}
        [note] = planned.notes
        assert note.startswith("pairs of base are estimated from its shards, as if all were like the first")
        assert plan(listed, Asked(pairs="5k")).pairs == {"base": 5_000}
        assert plan(listed, Asked(pairs="5k")).notes == []

    def test_of_a_table_nothing_is_measured_before_they_are_said(
        self, listed: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (listed / "few.csv").write_text("image,caption\na.png,a king\n")
        list_shards(listed, "few.csv")
        assert "nothing says how many pairs it has" in fails(capsys, "--measure")
