"""New projects: what is written, what is refused, and how a project follows an upgraded mode."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import open_clip
import pytest
import yaml
from PIL import Image

import mode
from mode.cli import main
from mode.clip.model import build_model, save_model
from mode.data.glyphs.dataset import write_glyph_shards
from mode.errors import ModeError
from mode.params import GlyphParams, ImageParams, load_params
from mode.stages import run_stage
from mode.stages.starting import PRESETS, new_project, project_pipeline, start_project, upgrade_project
from mode.stages.version import Version, checksum_of, checksum_of_code, code_name
from tests.conftest import CAPTIONS, MODEL
from tests.killing import KILL, end_at

REPOSITORY = Path(__file__).parents[2]
PIPELINE = (REPOSITORY / "dvc.yaml").read_text()


def write_tar(path: Path, label: str, text: str) -> None:
    """A tar with one image, of whose members one is `0.LABEL` with this text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(path, "w") as tar:
        for name, content in (("0.png", image.getvalue()), (f"0.{label}", text.encode())):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def write_task(folder: Path) -> None:
    """Shards in `FOLDER/shards` and a task in `FOLDER/chess`, of one image each."""
    write_tar(folder / "shards/0.tar", "txt", "a king")
    write_tar(folder / "chess/test/0.tar", "cls", "1")
    (folder / "chess/test/nshards.txt").write_text("1")
    (folder / "chess/classnames.txt").write_text("king\nqueen\n")
    (folder / "chess/zeroshot_classification_templates.txt").write_text("a {c}\n")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with shards and a task in `my`."""
    write_task(tmp_path / "my")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(folder: str = "new", preset: str = "demo", **more: Any) -> Path:
    start_project(Path(folder), preset, **more)
    return Path(folder)


def on_data(preset: str, folder: str = "new") -> Path:
    seed = "ViT-B-16:laion2b_s34b_b88k" if preset == "finetune" else None
    return start(folder, preset, shards="my/shards", tasks=["my/chess"], seed_model=seed)


def everything(folder: Path) -> dict[str, bytes]:
    """Path -> content of all files but git's."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and ".git" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which `mode init` refuses, having written nothing."""
    before = everything(Path()), sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as ended:
        main(["init", *arguments])
    assert ended.value.code == 1
    assert (everything(Path()), sorted(Path().rglob("*"))) == before
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


# The presets.


def test_the_demo_is_this_repository_s(here: Path) -> None:
    root = start()
    for name in (
        "params.yaml",
        "prefect.yaml",
        "leakage.json",
        "arrivals.json",
        ".gitignore",
        ".dvcignore",
        ".dvc/config",
    ):
        assert (root / name).read_bytes() == (REPOSITORY / name).read_bytes(), name
    flows = {path.name: path.read_bytes() for path in (REPOSITORY / "flows").glob("*.py")}
    assert {path.name: path.read_bytes() for path in (root / "flows").iterdir()} == flows
    assert {"runs.py", "experiment.py"} <= set(flows)
    watch = yaml.safe_load((root / "watch.yaml").read_text())
    assert watch == {
        "generated": ["base"],
        "watched": [],
        "watched_tasks": [],
        "tasks_from": "mode-version.yaml",
        "watched_seed": [],
        "seed_from": "data/names.txt",
        "clustered": ["base"],
        "assigned": {"base": "base"},
    }


def test_the_demo_brings_the_experiments_that_need_no_other_data(here: Path) -> None:
    ours = {path.name: path for path in (REPOSITORY / "experiments").glob("*.yaml")}
    built_in = {name for name, path in ours.items() if "data" not in yaml.safe_load(path.read_text())}
    assert {"length.yaml", "table5.yaml"} <= built_in < set(ours)
    brought = {path.name: path.read_bytes() for path in (start() / "experiments").iterdir()}
    assert brought == {name: ours[name].read_bytes() for name in built_in}
    assert not (on_data("paper-b16", "other") / "experiments").exists()


@pytest.mark.parametrize(
    ("preset", "model"), [("paper-b16", "ViT-B-16-quickgelu"), ("paper-b32", "ViT-B-32-quickgelu")]
)
def test_the_paper_s_numbers(here: Path, preset: str, model: str) -> None:
    params = load_params(on_data(preset) / "params.yaml")
    assert (params.model.name, params.model.tokenizer) == (model, "model")
    assert model in open_clip.list_models()
    assert (params.image.size, params.image.crop_scale, params.image.flip, params.image.shift) == (224, 0.9, False, 0)
    embedding, clustering, training = params.embedding, params.clustering, params.training
    assert (embedding.kind, embedding.pooling) == ("transformers", "pooler")
    assert embedding.name == "princeton-nlp/sup-simcse-bert-base-uncased"
    assert (clustering.strategy, clustering.fine, clustering.coarse) == ("two-level", 1024, 4)
    assert (clustering.balance, clustering.sample) == (1.15, 100_000_000)
    assert list(params.experts) == [f"expert-{n}" for n in range(4)]
    assert (training.epochs, training.seed_epochs) == (32, 27)
    assert training.epochs * (training.epoch_samples or 0) == 12_800_000_000
    assert (training.batch_size, training.lr, training.warmup, training.schedule) == (32_768, 5e-4, 2_000, "cosine")
    assert (training.betas, training.eps, training.weight_decay) == ((0.9, 0.98), 1e-6, 0.2)
    assert (training.clip_norm, training.precision) == (None, "amp")
    assert params.branch.outside_share == 0.02
    routing = params.routing
    assert (routing.kind, routing.bandwidth, routing.divisor, routing.protocol) == ("paper", 0.2, 8.0, "paper")
    assert params.index.drop_leaked


def test_a_pretrained_seed(here: Path) -> None:
    params = load_params(on_data("finetune") / "params.yaml")
    seed, training = params.seed, params.training
    assert (seed.pretrained, seed.name, seed.weights) == (True, "ViT-B-16", "laion2b_s34b_b88k")
    assert (params.model.name, params.model.config) == (None, None)
    assert not {"size", "mean", "std", "interpolation", "resize_mode"} & params.image.model_fields_set  # the seed's own
    assert (params.embedding.kind, params.embedding.made_from) == ("seed", "models/seed")
    # Ten thousand pairs are enough: the shortest training is longer than its warm-up.
    assert (training.epoch_samples, training.seed_epochs) == (None, 0)
    assert training.epochs * 10_000 // training.batch_size > 2 * training.warmup
    assert params.clustering.fine <= 10_000 // 32


@pytest.mark.parametrize(
    ("given", "name", "weights"),
    [
        ("hf-hub:timm/ViT-B-16-SigLIP", "hf-hub:timm/ViT-B-16-SigLIP", None),
        ("local-dir:my/model", "local-dir:{here}/my/model", None),
        ("my/model", "local-dir:{here}/my/model", None),
        ("ViT-B-32:openai", "ViT-B-32", "openai"),
        ("ViT-B-32:my/clip.pt", "ViT-B-32", "{here}/my/clip.pt"),
        ("my/model/open_clip_config.json:my/clip.pt", "{here}/my/model/open_clip_config.json", "{here}/my/clip.pt"),
    ],
)
def test_seeds_as_people_name_them(here: Path, given: str, name: str, weights: str | None) -> None:
    (here / "my/model").mkdir()
    (here / "my/model/open_clip_config.json").touch()
    (here / "my/clip.pt").touch()
    root = start("new", "finetune", shards="my/shards", tasks=["my/chess"], seed_model=given)
    seed = load_params(root / "params.yaml").seed
    assert (seed.name, seed.weights) == (name.format(here=here), weights and weights.format(here=here))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_all_sections_and_its_comments(here: Path, preset: str) -> None:
    content = (on_data(preset) / "params.yaml").read_text()
    assert yaml.safe_load(content).keys() == yaml.safe_load((REPOSITORY / "params.yaml").read_text()).keys()
    file = PRESETS[preset].file
    source = REPOSITORY / file if preset == "demo" else REPOSITORY / "src/mode/presets" / file
    comments = [re.findall(r"# .*", text) for text in (content, source.read_text())]
    assert comments[0] == comments[1]
    assert len(content.splitlines()) == len(source.read_text().splitlines()) + 1  # a list of tasks


def test_shards_and_tasks_are_entered_and_watched(here: Path) -> None:
    root = on_data("paper-b32")
    params = load_params(root / "params.yaml")
    assert params.sources["base"].shards == str(here / "my/shards")
    assert params.evaluation.tasks == [str(here / "my/chess")]
    assert yaml.safe_load((root / "watch.yaml").read_text()) == {
        "generated": [],
        "watched": ["base"],
        "watched_tasks": ["tasks"],
        "tasks_from": "data/tasks-manifest.json",
        "watched_seed": [],
        "seed_from": "data/names.txt",
        "clustered": ["base"],
        "assigned": {"base": "base"},
    }


def test_paths_inside_the_project_are_its_own(here: Path) -> None:
    params = load_params(start(".", "demo", shards="my/*/0.tar", tasks=["./my/chess"], force=True) / "params.yaml")
    assert params.sources["base"].shards == "my/*/0.tar"
    assert params.evaluation.tasks == ["my/chess"]


def test_a_fine_tuning_runs_from_end_to_end(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages in DVC's order, up to the ensemble: built-in shards as one's own, a tiny model as a pretrained one."""
    write_glyph_shards(GlyphParams(pairs=64, shard_pairs=32), here / "pairs", 0)
    save_model(here / "clip", build_model(MODEL, ImageParams(size=32), CAPTIONS, 0), {})
    root = start("new", "finetune", shards="pairs", tasks=["my/chess"], seed_model="clip")
    monkeypatch.chdir(root)
    root = Path.cwd()
    content = yaml.safe_load((root / "params.yaml").read_text())
    content["training"] |= {"batch_size": 8, "warmup": 2, "precision": "fp32", "epochs": 1}
    content["clustering"] |= {"fine": 4, "coarse": 2}
    content["experts"] = {f"expert-{n}": {"source": "base", "cluster": n} for n in range(2)}
    content["machine"] |= {"device": "cpu", "workers": 0}
    (root / "params.yaml").write_text(yaml.safe_dump(content))
    watch = yaml.safe_load((root / "watch.yaml").read_text())
    assert (watch["watched_seed"], watch["seed_from"]) == (["seed"], "data/seed-manifest.json")
    order = ["data base", "watch-tasks", "tasks", "index base", "watch-seed", "seed", "embedder", "embed base"]
    order += ["cluster base", "assign base", "dense", "dense-long", "expert expert-0", "expert expert-1", "ensemble"]
    for stage in order:
        name, _, key = stage.partition(" ")
        run_stage(name, key or None, root, root / "params.yaml")
    assert mode.load("models").adapt(["king", "queen"]).weights.keys() == {"expert-0", "expert-1"}
    assert json.loads((root / "models/seed/card.json").read_text())["cost"] == "given"


# dvc.yaml.


def test_the_pipeline_is_this_repository_s_but_for_code() -> None:
    """Read without any of the code that writes it."""
    ours, theirs = yaml.safe_load(PIPELINE), yaml.safe_load(project_pipeline(PIPELINE))
    assert (theirs["vars"], list(theirs["stages"])) == (ours["vars"], list(ours["stages"]))
    seen = set()
    for name, stage in ours["stages"].items():
        other = theirs["stages"][name]
        assert stage.get("foreach") == other.get("foreach")
        stage, other = stage.get("do", stage), other.get("do", other)
        code = [dep for dep in stage["deps"] if dep.startswith("src/mode/")]
        assert code, name
        [keys] = (other["params"].pop()["mode-version.yaml"],)
        assert keys == ["code." + dep[len("src/mode/") :].split(".py")[0] for dep in code]
        assert other.pop("deps", []) == [dep for dep in stage.pop("deps") if dep not in code]
        assert other.pop("params") == stage.pop("params", [])
        assert other == stage
        seen |= set(code)
    # Every folder or module that is named is one of this package.
    assert all((REPOSITORY / dep).exists() for dep in seen)
    assert all(checksum_of_code(code_name(dep) or "") for dep in seen)


def test_the_comments_stay() -> None:
    text = project_pipeline(PIPELINE)
    assert "# Shards of the built-in data, and the manifest that lists them." in text
    assert "src/mode" not in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]


# What is refused.


def finetune(seed: str) -> list[str]:
    return ["new", "--preset", "finetune", "--seed-model", seed, "--shards", "my/shards", "--tasks", "my/chess"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new", "--preset", "clip"], "no preset is called 'clip' (there are: demo,"),
        (["new", "--preset", "a\nb\x1b[2J"], r"no preset is called 'a\nb\x1b[2J'"),
        (["new", "--preset", "paper-b16"], "preset 'paper-b16': no shards given (give it with --shards)"),
        (["new", "--preset", "paper-b16", "--shards", "my/shards"], "no tasks given (give it with --tasks)"),
        (["new", "--shards", "nowhere"], "nowhere: no such file or folder"),
        (["new", "--shards", "my/chess/*.parquet"], "my/chess/*.parquet: no file matches"),
        (["new", "--shards", "$(touch\nplanted)"], "no such file or folder"),
        (["new", "--shards", ""], "an empty name"),
        (["new", "--tasks", "my/shards"], "classnames.txt"),
        (["new", "--tasks", "my/chess", "--tasks", "nowhere"], "nowhere: no such task folder"),
        (["new", "--tasks", "my/chess", "--tasks", "my/chess"], "two tasks are called 'chess'"),
        (["new", "--seed-model", "my/chess"], "preset 'demo' trains its own seed"),
        (finetune("my/chess"), "my/chess: not a model folder: it has no open_clip_config.json"),
        (finetune("hf-hub:x; y/z"), "'hf-hub:x; y/z' is no name on a hub (write hf-hub:ORG/NAME)"),
        (finetune("hf-hub:one"), "'hf-hub:one' is no name on a hub"),
        (finetune("ViT-B-16"), "'ViT-B-16' is no folder, and an architecture alone has no weights"),
        (finetune("ViT-B-16:nowhere.pt"), "nowhere.pt: no such file"),
        (finetune("ViT-B-16:nothing"), "open_clip has no weights 'nothing' of ViT-B-16 (it has openai,"),
        (finetune("ViT-X:openai"), "open_clip has no architecture 'ViT-X'"),
        (finetune("$(touch\nx):openai"), r"open_clip has no architecture '$(touch\nx)'"),
        (["."], ".: not empty: my (name a new folder"),
        (["my/shards/0.tar"], "my/shards/0.tar: not a folder"),
        (["new", "--upgrade", "--shards", "my/shards"], "--upgrade leaves params.yaml as it is"),
        (["new", "--upgrade"], "new/mode-version.yaml: no such file (`mode init FOLDER` starts a project)"),
    ],
)
def test_bad_input_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refusal(capsys, *arguments)


def test_a_terminal_is_asked(here: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mode.cli", "init", "new", "--preset", "paper-b32"]
    try:
        os.write(ours, b"my/shards\nmy/chess\n")
        done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, check=True)
    finally:
        os.close(ours)
        os.close(theirs)
    assert "Shards (a folder of tars, a glob, URLs, a table): " in done.stdout
    assert "    cd new\n    dvc repro  " in done.stdout
    params = load_params(Path("new/params.yaml"))
    assert params.sources["base"].shards == str(here / "my/shards")
    assert params.evaluation.tasks == [str(here / "my/chess")]


# Where a project is made.


def test_a_folder_with_git_and_an_environment_is_welcome(here: Path) -> None:
    (here / "new/.venv").mkdir(parents=True)
    subprocess.run(["git", "init", "--quiet", "new"], check=True)
    inode = (here / "new").stat().st_ino
    root = start()
    assert load_params(root / "params.yaml")
    assert (root / ".venv").is_dir()
    assert root.stat().st_ino == inode  # it may be somebody's current folder
    assert not [path for path in root.iterdir() if path.name.startswith(".mode")]


def test_a_project_in_a_repository_gets_none_of_its_own(here: Path) -> None:
    assert (start("alone") / ".git").is_dir()
    subprocess.run(["git", "init", "--quiet", "outer"], check=True)
    assert not (start("outer/new") / ".git").exists()
    assert not list(here.glob(".*"))


def test_without_git_dvc_is_told_so(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    root = start()
    assert not (root / ".git").exists()
    assert "no_scm = true" in (root / ".dvc/config").read_text()


def test_force_replaces_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "new/flows").mkdir(parents=True)
    (here / "new/flows/mine.py").write_text("mine")
    assert "new: flows there already" in refusal(capsys, "new", "--force")
    (here / "new/flows").rename(here / "new/data")  # which a stage would empty
    assert "new: data there already" in refusal(capsys, "new", "--force")
    (here / "new/data").rename(here / "new/mine")
    assert "new: not empty: mine" in refusal(capsys, "new")
    root = start(force=True)
    assert (root / "mine/mine.py").read_text() == "mine"
    assert load_params(root / "params.yaml")
    assert "new: not empty: .dvc, .dvcignore, .gitignore and 11 more" in refusal(capsys, "new")
    assert "there already" in refusal(capsys, "new", "--force")


@pytest.mark.parametrize("is_there", [False, True])
def test_killed_anywhere_and_given_again(here: Path, is_there: bool) -> None:
    def make(folder: Path) -> None:
        with new_project(folder, force=False) as new:
            (new / "flows").mkdir()
            for name in ("dvc.yaml", "flows/ui.py", "params.yaml"):
                (new / name).write_text(name)

    code, step = -1, 0
    while code:
        step += 1
        folder = here / f"killed-{step}"
        if is_there:
            (folder / ".venv").mkdir(parents=True)
        code = end_at(step, "files", KILL, lambda folder=folder: make(folder))  # type: ignore[misc]
        assert code in (0, -KILL)
        if not (folder / "params.yaml").is_file():  # not done yet: half a project has no parameters
            make(folder)
        found = {name: content.decode() for name, content in everything(folder).items()}
        assert found == {name: name for name in ("dvc.yaml", "flows/ui.py", "params.yaml")}
    assert step > 10


# An upgrade.


def test_of_the_same_mode_there_is_nothing_to_do(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(start())
    with pytest.raises(SystemExit) as ended:
        main(["init", "new", "--upgrade"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "the project is of mode 0.1.0 already\n"
    assert everything(Path("new")) == before


def make_older(root: Path) -> None:
    """As if the project had been made by a mode of other trainings and another dvc.yaml."""
    recorded = Version.load(root / "mode-version.yaml")
    (root / "dvc.yaml").write_text("older")
    (root / "flows/gone.py").write_text("gone")
    files = {
        **recorded.files,
        **{name: checksum_of((root / name).read_text()) for name in ("dvc.yaml", "flows/gone.py")},
    }
    Version("0.0.9", {**recorded.code, "training": "0", "attic": "1"}, files).save(root / "mode-version.yaml")


def test_a_stage_of_another_mode_stops_with_one_line(here: Path) -> None:
    root = start()
    make_older(root)
    before = everything(root)
    with pytest.raises(ModeError) as refused:
        run_stage("data", "base", root, root / "params.yaml")
    assert str(refused.value).startswith(
        "mode-version.yaml: this project is of mode 0.0.9, 0.1.0 is installed (other code: training, attic) (`mode init"
    )
    assert everything(root) == before


def test_an_upgrade_brings_what_a_new_project_has(here: Path) -> None:
    root = start()
    wanted = everything(root)
    make_older(root)
    text = (root / "params.yaml").read_text()
    lacking = text.replace(text[text.index("branch:") : text.index("baselines:")], "").replace("lr: 0.002", "lr: 0.003")
    (root / "params.yaml").write_text(lacking)
    done = upgrade_project(root)
    assert (done.before, done.after, done.code, done.sections) == ("0.0.9", "0.1.0", ["training", "attic"], ["branch"])
    assert done.files == ["dvc.yaml", "flows/gone.py"]
    found = everything(root)
    assert found.pop("params.yaml").decode() == lacking.rstrip() + "\n\nbranch: {}\n"
    assert load_params(root / "params.yaml").branch.outside_share == 0.02
    assert found == {name: content for name, content in wanted.items() if name != "params.yaml"}


def test_what_was_edited_is_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = start()
    make_older(root)
    (root / "flows/ui.py").write_text("mine")
    assert refusal(capsys, "new", "--upgrade").startswith("error: edited here: flows/ui.py (keep")
    upgrade_project(root, force=True)
    assert (root / "flows/ui.py").read_bytes() == (REPOSITORY / "flows/ui.py").read_bytes()


@pytest.mark.parametrize("text", ["", "[1]", "version: 1\ncode: {}\n", "version: a\ncode: {a: [1]}\n", "a: b", "{"])
def test_a_version_that_is_none_is_one_line(here: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    root = start()
    (root / "mode-version.yaml").write_text(text)
    assert "mode-version.yaml: not as `mode init` writes it" in refusal(capsys, "new", "--upgrade")


def test_a_checksum_knows_code_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mode.stages.version.PACKAGE", tmp_path)
    (tmp_path / "clip/__pycache__").mkdir(parents=True)
    (tmp_path / "clip/model.py").write_text("a")
    first = checksum_of_code("clip")
    assert re.fullmatch("sha256:[0-9a-f]{16}", first)
    (tmp_path / "clip/__pycache__/model.pyc").write_text("compiled")
    assert checksum_of_code("clip") == first
    (tmp_path / "clip/model.py").write_text("b")
    assert checksum_of_code("clip") != first
    assert checksum_of_code("attic") == checksum_of_code("clip/attic") == ""
