"""The command line: what it answers, and that a fault is one line and a failure."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mode.cli import main
from mode.clip.model import build_model, load_model, save_model
from mode.params import ImageParams, ModelParams, load_params

REPOSITORY = Path(__file__).parent.parent


TINY = ModelParams(
    config={
        "embed_dim": 8,
        "vision_cfg": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    },
    tokenizer="words",
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def change(project: Path, section: str, **values: object) -> None:
    content = yaml.safe_load((project / "params.yaml").read_text())
    content[section] |= values
    (project / "params.yaml").write_text(yaml.safe_dump(content))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on standard error that the command fails with."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def test_params_prints_every_value_with_defaults(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["params"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["training"]["epochs"] == 32
    assert printed["experts"]["expert-0"]["lr"] is None


def test_params_explains_what_it_prints(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["params", "branch.outside_share"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed) == {"branch": {"outside_share": 0.02}}
    assert "  # Share of the pairs *outside* its cluster that an expert also sees.\n  outside_share" in printed
    with pytest.raises(SystemExit):
        main(["params"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    keys = [number for number, line in enumerate(lines) if line and not line.startswith(("#", "-")) and ":" in line]
    own = {"embed_dim", "vision_cfg", "text_cfg"}  # open_clip's configuration explains itself
    unexplained = [lines[n] for n in keys if not lines[n - 1].startswith("#") and not lines[n].endswith(":")]
    assert {line.partition(":")[0] for line in unexplained} <= own | {
        *("image_size", "layers", "width", "head_width", "patch_size", "context_length", "heads")
    }
    assert "branch.share: no such parameter" in fails(capsys, "params", "branch.share")


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("training", {"epochz": 3}, "params.yaml: training.epochz: unknown parameter"),
        ("clustering", {"fine": 2, "coarse": 4}, "clustering: coarse (4) exceeds fine (2)"),
        ("clustering", {"coarse": 2}, "experts.expert-2.cluster: 2, but source 'base' has 2 coarse clusters"),
    ],
)
def test_a_bad_parameter_stops_a_stage_before_it_starts(
    project: Path, capsys: pytest.CaptureFixture[str], section: str, values: dict[str, object], message: str
) -> None:
    change(project, section, **values)
    assert message in fails(capsys, "stage", "data", "base")
    assert not (project / "data").exists()


def test_stages_and_keys_are_checked(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no stage is called 'indx'" in fails(capsys, "stage", "indx")
    assert "stage index needs a key" in fails(capsys, "stage", "index")
    assert "stage seed takes no key" in fails(capsys, "stage", "seed", "base")
    assert "no source is called 'other'" in fails(capsys, "stage", "data", "other")
    assert "no expert is called 'expert-9'" in fails(capsys, "stage", "expert", "expert-9")


def test_in_a_pipeline_dvc_says_which_source_or_expert(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DVC_STAGE", "expert@expert-9")
    assert "no expert is called 'expert-9'" in fails(capsys, "stage", "expert")
    assert "no expert is called 'expert-8'" in fails(capsys, "stage", "expert", "expert-8")
    monkeypatch.setenv("DVC_STAGE", "watch@$(touch planted)")
    assert "no source is called '$(touch planted)'" in fails(capsys, "stage", "data")
    monkeypatch.setenv("DVC_STAGE", "evaluate")
    assert "stage index needs a key" in fails(capsys, "stage", "index")


def test_an_empty_shard_folder_stops_the_stage(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "empty").mkdir()
    change(project, "sources", base={"shards": "empty"})
    line = fails(capsys, "stage", "data", "base")
    assert "empty" in line
    assert not (project / "data/shards/base").exists()


def test_a_table_without_its_column_stops_the_stage(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "pairs.csv").write_text("image,text\na.jpg,a dog\n")
    change(project, "sources", base={"shards": "pairs.csv"})
    line = fails(capsys, "stage", "data", "base")
    assert line == (
        "error: pairs.csv: no column 'caption': it has 'image', 'text' "
        "(--image-column and --caption-column name others, image_column and caption_column in params.yaml)"
    )
    assert not (project / "data/shards/base").exists()


def test_columns_of_a_table_are_named_wherever_a_table_is(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`filepath` and `title`, tab-separated, are open_clip's own."""
    Image.new("RGB", (8, 8)).save(project / "a.png")
    (project / "pairs.tsv").write_text("filepath\ttitle\na.png\ta dog\n")
    named = ("--image-column", "filepath", "--caption-column", "title")
    assert "no column 'image'" in fails(capsys, "verify", "pairs.tsv")
    for command in (
        ["verify", "pairs.tsv"],
        ["init", "new", "--shards", "pairs.tsv"],
        ["add-source", "own", "pairs.tsv"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, *named])
        assert ended.value.code == 0
    assert "1 images, 1 pairs, 0 problems" in capsys.readouterr().out
    expected = {"image_column": "filepath", "caption_column": "title"}
    assert load_params(project / "new/params.yaml").sources["base"].model_dump(include=set(expected)) == expected
    assert load_params(project / "params.yaml").sources["own"].model_dump(include=set(expected)) == expected
    assert "name it with --shards" in fails(capsys, "init", "other", *named)


def test_a_task_without_class_names_stops_before_any_training(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "task/test").mkdir(parents=True)
    (project / "task/dataset_type.txt").write_text("classification")
    (project / "task/test/nshards.txt").write_text("1")
    (project / "task/test/0.tar").write_bytes(b"\0" * 10240)
    change(project, "evaluation", tasks=["task"])
    assert "classnames.txt" in fails(capsys, "stage", "tasks")
    assert not (project / "data/tasks").exists()


def test_watch_yaml_follows_where_the_shards_lie(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mode.stages import run_stage

    change(project, "glyphs", pairs=20, shard_pairs=10)
    run_stage("data", "base", project, project / "params.yaml")
    assert yaml.safe_load((project / "watch.yaml").read_text()) == {"generated": ["base"], "watched": []}
    elsewhere = project / "elsewhere"
    (project / "data/shards/base").rename(elsewhere)
    change(project, "sources", base={"shards": "elsewhere"})
    run_stage("data", "base", project, project / "params.yaml")
    assert yaml.safe_load((project / "watch.yaml").read_text()) == {"generated": [], "watched": ["base"]}
    listed = json.loads((project / "data/shards/base/manifest.json").read_text())
    assert [shard["path"] for shard in listed["shards"]] == ["elsewhere/00000.tar", "elsewhere/00001.tar"]
    assert "2 shards" in capsys.readouterr().out


def test_verify_fails_on_a_damaged_shard_and_passes_on_a_good_one(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mode.data.glyphs.dataset import write_glyph_shards
    from mode.params import GlyphParams

    write_glyph_shards(GlyphParams(pairs=20, shard_pairs=10), project / "shards", 0)
    with pytest.raises(SystemExit) as ended:
        main(["verify", "shards"])
    assert ended.value.code == 0
    damaged = project / "shards/00001.tar"
    damaged.write_bytes(damaged.read_bytes()[:5000])
    with pytest.raises(SystemExit) as ended:
        main(["verify", "shards"])
    assert ended.value.code == 1
    assert "damaged-tar" in capsys.readouterr().out


def test_results_without_an_evaluation_say_what_to_run(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "dvc repro" in fails(capsys, "results")


def test_versions_for_a_report_of_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert said["mode-clip"] == version("mode-clip")
    assert said.keys() == {"mode-clip", "torch", "open_clip_torch", "python"}


def test_help_does_not_import_heavy_libraries() -> None:
    code = (
        "import sys\nfrom mode.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'pandas', 'mlflow', 'sklearn', 'pyarrow', 'numpy'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "dvc repro" in done.stdout


def test_a_source_is_added_and_removed_with_its_expert(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mode.data.glyphs.dataset import write_glyph_shards
    from mode.params import GlyphParams

    before = (project / "params.yaml").read_text()
    write_glyph_shards(GlyphParams(pairs=10, shard_pairs=10), project / "more", 0)
    with pytest.raises(SystemExit) as ended:
        main(["add-source", "more", "more"])
    assert ended.value.code == 0
    assert "added source 'more' with expert-4" in capsys.readouterr().out
    assert yaml.safe_load((project / "watch.yaml").read_text())["watched"] == ["more"]

    (project / "models/expert-4").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        main(["remove-expert", "expert-4"])
    assert ended.value.code == 0
    assert yaml.safe_load((project / "params.yaml").read_text()) == yaml.safe_load(before)
    assert yaml.safe_load((project / "watch.yaml").read_text())["watched"] == []
    assert not (project / "models/expert-4").exists()


def test_a_source_without_shards_changes_no_file(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (project / "params.yaml").read_text()
    assert "nowhere" in fails(capsys, "add-source", "more", "nowhere")
    assert (project / "params.yaml").read_text() == before
    assert not (project / "watch.yaml").exists()


def test_experts_are_ordered_by_a_tasks_words(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mode.data.glyphs.dataset import write_glyph_tasks
    from mode.embedding.lsa import LsaEmbedder
    from mode.ensemble.router import Router
    from mode.params import GlyphParams, RoutingParams

    tasks = project / "data/tasks"
    write_glyph_tasks(GlyphParams(test_images=1), tasks, 0)
    capsys.readouterr()  # its progress
    assert "no saved ensemble" in fails(capsys, "order", "data/tasks/dice")
    (tasks / "tasks.json").write_text(json.dumps(["data/tasks/chess", "data/tasks/dice"]))
    captions = ["white chess king", "black chess queen", "chess pawn", "die face one", "die face six", "a die"] * 5
    embedder = LsaEmbedder.fit(captions, 4, 0)
    conditions = {"expert-0": embedder.encode(["chess king", "queen"]), "expert-1": embedder.encode(["die face"])}
    Router.fit(conditions, embedder, RoutingParams(), captions, 0).save(project / "models/ensemble")
    for task, first in (("chess", "expert-0"), ("dice", "expert-1"), ("data/tasks/dice", "expert-1")):
        with pytest.raises(SystemExit) as ended:
            main(["order", task, "--output", "order.json"])
        assert ended.value.code == 0
        order = json.loads((project / "order.json").read_text())
        assert next(iter(order)) == first
        assert sum(order.values()) == pytest.approx(1)
        assert capsys.readouterr().out.startswith(f"{first}\t")
    assert "no task is called 'cats' (give a task folder, or one of: chess, dice)" in fails(capsys, "order", "cats")
    with pytest.raises(SystemExit) as ended:
        main(["targets", "chess", "data/tasks/dice", "chess"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    classes = [name for task in ("chess", "dice") for name in (tasks / task / "classnames.txt").read_text().split("\n")]
    assert printed == {"targets": [name for name in classes if name]}
    assert "no task is called 'cats'" in fails(capsys, "targets", "chess", "cats")


def test_experiments_are_of_a_project(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(capsys, "experiment", "table5", "--plan").startswith(f"error: {project}: no flows/runs.py (run it in")


def test_check_names_what_is_damaged(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check"])
    assert ended.value.code == 0
    sound = capsys.readouterr().out.splitlines()
    assert "1 of 3: ok: models/ensemble" in sound
    assert sound[-1] == "3 outputs, none damaged"
    path = folder / "models/ensemble/conditions.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["check"])
    assert ended.value.code == 1
    damaged = capsys.readouterr().out.splitlines()
    assert damaged[0].startswith("1 of 3: DAMAGED: models/ensemble/conditions.safetensors: damaged: not the content")
    assert damaged[1:3] == sound[1:3]
    assert damaged[-1] == "3 outputs, 1 damaged"


def test_check_without_any_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["check"])
    assert ended.value.code == 0


def test_a_model_is_fetched_as_a_folder_for_a_seed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `get-model` writes is what a seed is made of where there is no network."""
    save_model(project / "theirs", build_model(TINY, ImageParams(size=32), ["a dog"], 0), {})
    with pytest.raises(SystemExit) as ended:
        main(["get-model", "local-dir:theirs", "here"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("here: local-dir:theirs, open_clip_model.safetensors, SHA-256 ")
    assert load_model(project / "here").card["origin"]["name"] == "local-dir:theirs"
    assert "is there already" in fails(capsys, "get-model", "local-dir:theirs", "here")
    assert "not a model folder" in fails(capsys, "get-model", "local-dir:nowhere", "there")
    assert "brings its own" in fails(capsys, "get-model", "local-dir:theirs", "there", "--weights", "openai")
    assert not (project / "there").exists()
