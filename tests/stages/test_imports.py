"""What a stage or command does not import: libraries that it does not use cost each of its runs seconds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.stages.test_training import PARAMS, write_seed

REPOSITORY = Path(__file__).parent.parent.parent
#: Runs `mode COMMAND` for each line of its input, and prints what the process has imported of some libraries by then.
COUNT = """
import json, sys
from mode.cli import main
libraries = json.loads(sys.argv[1])
for command in json.loads(sys.argv[2]):
    try:
        main(command)
    except SystemExit as ended:
        assert not ended.code, command
print(json.dumps(sorted(sys.modules.keys() & libraries)))
"""
#: Each takes a tenth of a second and more.
HEAVY = ("torch", "torchvision", "open_clip", "transformers", "timm", "peft", "mlflow", "matplotlib", "dask")
PREPARATION = ["names", "data base", "tasks", "index base", "embedder", "embed base", "cluster base", "assign base"]


def imported(root: Path, commands: list[str]) -> list[str]:
    """Of the heavy libraries, those that a process has imported after these commands."""
    given = [json.dumps(HEAVY), json.dumps([command.split() for command in commands])]
    done = subprocess.run([sys.executable, "-c", COUNT, *given], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project of the built-in data."""
    root = tmp_path_factory.mktemp("project")
    content = {
        **PARAMS,
        "glyphs": {"pairs": 200, "shard_pairs": 100, "test_images": 1},
        "embedding": {"dimensions": 8},
        "clustering": {"fine": 4, "coarse": 2},
        "routing": {"calibration_captions": 64},
        "evaluation": {"tasks": "glyphs"},
        "machine": {"engine": "local"},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(content))
    for name in ("watch.yaml", "arrivals.json", "leakage.json"):
        shutil.copy(REPOSITORY / name, root / name)
    return root


def test_what_prepares_data_or_opens_no_model_imports_no_library_of_models(project: Path) -> None:
    assert imported(project, [*(f"stage {name}" for name in PREPARATION), "check", "params"]) == []
    write_seed(project)  # its configuration, which is all that the ensemble needs of it
    # For the pixels of images that it keeps, which are JPEGs here.
    assert imported(project, ["stage ensemble"]) == ["torch", "torchvision"]
