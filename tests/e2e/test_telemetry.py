"""Nothing that the project is made with tells its maker of its use: every address that is asked for is recorded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.calls import Calls
from tests.e2e.conftest import REPOSITORY

pytestmark = pytest.mark.e2e

#: Libraries' own settings and what makes them think that they are being tested.
FORGOTTEN = ("DO_NOT_TRACK", "PREFECT", "MLFLOW", "DVC_", "GRADIO", "HF_", "CI", "PYTEST", "MODE_")

USES = {
    # Prefect tells of its use where it is imported in a terminal.
    "flows": """
import sys
sys.stdin.isatty = sys.stdout.isatty = sys.stderr.isatty = lambda: True
import flows.pipeline, flows.add_expert, flows.evaluate, flows.experiment, flows.train_expert, flows.ui
""",
    "app": """
from unittest.mock import MagicMock
from mode.app import application, build
application(build(MagicMock()))
""",
    "tracking": """
from pathlib import Path
from mode.tracking.runs import Tracker
with Tracker(Path("mlruns")).run("seed", role="seed") as run:
    run.log(1, {"train/loss": 1.0})
""",
    "MLflow's page": "from pathlib import Path; from mode.tracking.serving import page_app; page_app(Path('mlruns'))",
    "embedders": "import mode.embedding.transformers, mode.embedding.open_clip, transformers, huggingface_hub",
    "dvc": """
import subprocess, sys
from pathlib import Path
Path("dvc.yaml").write_text("stages: {one: {cmd: echo 1 > one, outs: [one]}}")
dvc = lambda *words: subprocess.run([sys.executable, "-m", "dvc", *words], check=True)
dvc("init", "--no-scm", "--quiet")
Path(".dvc/config").write_text((Path(REPOSITORY) / ".dvc/config").read_text() + "    no_scm = true\\n")
dvc("repro")
""",
    "the hook itself": "import urllib.request; urllib.request.urlopen('http://tell.example/')",
}


@pytest.mark.parametrize("use", USES)
def test_nobody_is_told(use: str, tmp_path: Path) -> None:
    calls = Calls(tmp_path / "calls")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FORGOTTEN)}
    path = f"{calls.settings['PYTHONPATH']}{os.pathsep}{REPOSITORY}"
    environment = kept | calls.settings | {"PYTHONPATH": path, "PREFECT_HOME": str(tmp_path / "prefect")}
    command = [sys.executable, "-c", f"REPOSITORY = {str(REPOSITORY)!r}\n{USES[use]}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if use == "the hook itself":
        assert calls.hosts() == ["tell.example"]
    else:
        assert done.returncode == 0, done.stderr
        assert calls.hosts() == []
