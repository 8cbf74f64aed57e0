"""A supervised command never leaves a process behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.waiting import LONG, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted on Linux only")

#: Writes a file when told to stop, after half a second, as a training writes a checkpoint.
STAGE = """
import os, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
open(sys.argv[1] + ".pid", "w").write(str(os.getpid()))
while not told:
    time.sleep(0.02)
time.sleep(0.5)
open(sys.argv[1], "w").write("checkpoint")
sys.exit(143)
"""

#: Runs a command as the first process of a namespace of its own, as a container does.
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--map-root-user"]


def supervised(code: str, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "flows.supervise", sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env={**os.environ, **settings})


def is_gone(process: int) -> bool:
    """Whether a process has ended; one that its parent has not asked for yet has."""
    try:
        return psutil.Process(process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def started(checkpoint: Path) -> int:
    note = checkpoint.with_name(checkpoint.name + ".pid")
    wait_until(lambda: note.is_file() and note.read_text())
    return int(note.read_text())


@pytest.mark.parametrize("code", [0, 1, 130, 143])
def test_exit_code_is_that_of_the_command(code: int) -> None:
    assert supervised(f"raise SystemExit({code})").wait(LONG) == code


def test_killed_command_gives_the_code_that_a_shell_gives() -> None:
    assert supervised("import os; os.kill(os.getpid(), 9)").wait(LONG) == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_waits_for_the_checkpoint(tmp_path: Path, number: signal.Signals) -> None:
    checkpoint = tmp_path / "checkpoint"
    process = supervised(STAGE, str(checkpoint))
    stage = started(checkpoint)
    process.send_signal(number)
    assert process.wait(LONG) == 143
    assert checkpoint.read_text() == "checkpoint"
    assert is_gone(stage)


def test_stage_whose_dvc_died_still_gets_to_write_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    # A parent that dies of SIGTERM at once, as DVC does, with the stage as its child.
    dvc = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {STAGE!r}, sys.argv[1]]).wait()"
    process = supervised(dvc, str(checkpoint))
    stage = started(checkpoint)
    process.terminate()
    assert process.wait(LONG) == 143
    assert checkpoint.read_text() == "checkpoint"
    assert is_gone(stage)


def test_output_is_passed_on_and_nobody_who_reads_it_stops_no_stage(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    talkative = STAGE.replace(
        "while not told:",
        "while not told:\n    open(sys.argv[1] + '.steps', 'a').write('step'); print('step', flush=True)",
    )
    command = [sys.executable, "-m", "flows.supervise", sys.executable, "-c", talkative, str(checkpoint)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "step\n"
    process.stdout.close()  # as when the flow has been killed
    steps = tmp_path / "checkpoint.steps"
    before = steps.stat().st_size
    wait_until(lambda: steps.stat().st_size > before + 100)
    process.terminate()
    assert process.wait(LONG) == 143
    assert checkpoint.read_text() == "checkpoint"


def test_command_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    note = tmp_path / "deaf"
    deaf = (
        "import os, signal, sys, time; signal.signal(15, signal.SIG_IGN);"
        "open(sys.argv[1] + '.pid', 'w').write(str(os.getpid())); time.sleep(60)"
    )
    process = supervised(deaf, str(note), MODE_STOP_SECONDS="0.3")
    stage = started(note)
    process.terminate()
    assert process.wait(LONG) == 143
    assert is_gone(stage)


@pytest.mark.parametrize("given", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_to_stop_in_that_is_none_is_one_line(tmp_path: Path, given: str) -> None:
    command = [sys.executable, "-m", "flows.supervise", "touch", str(tmp_path / "started")]
    done = subprocess.run(
        command, env=os.environ | {"MODE_STOP_SECONDS": given}, capture_output=True, text=True, check=False
    )
    said = f"error: MODE_STOP_SECONDS: '{given}' is no time (set it to seconds above 0, such as 100)\n"
    assert (done.returncode, done.stderr) == (1, said)
    assert not (tmp_path / "started").exists()


def test_command_ends_with_the_supervisor_s_parent(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; subprocess.Popen([sys.executable, '-m', 'flows.supervise', *sys.argv[1:]]).wait()",
            *(sys.executable, "-c", STAGE, str(checkpoint)),
        ]
    )
    stage = started(checkpoint)
    parent.kill()
    parent.wait()
    wait_until(lambda: is_gone(stage))
    assert checkpoint.read_text() == "checkpoint"


def test_parent_that_has_ended_already_means_that_nothing_is_started(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    note = tmp_path / "note"
    code = "import sys; open(sys.argv[1], 'w')"
    assert supervised(code, str(note), MODE_STARTED_BY=str(gone.pid)).wait(LONG) == 143
    assert not note.exists()


def test_first_process_of_a_container_may_start_one() -> None:
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], check=False).returncode:
        pytest.skip("no namespaces of processes here")
    child = [sys.executable, "-c", "import os; print(*os.environ)"]
    first = (
        "import os, sys; from flows.supervise import supervised; assert os.getpid() == 1;"
        "process = supervised(sys.argv[1:], os.environ, 5, []); print(process.communicate()[0]);"
        "sys.exit(process.returncode)"
    )
    command = [*NAMESPACE, sys.executable, "-c", first, *child]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MODE_STOP_SECONDS" in done.stdout
    assert "MODE_STARTED_BY" not in done.stdout  # which is this supervisor's alone
