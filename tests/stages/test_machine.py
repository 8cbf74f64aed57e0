"""Processes that train together on one machine, with the real torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.waiting import LONG, wait_until

LAUNCH = """
import sys
from mode.params import MachineParams
from mode.stages.machine import _launch
_launch(MachineParams(processes=2), "-c", *sys.argv[1:])
"""
#: The first process notes what its launcher tells whoever comes to one of its ports.
VISIT = """
import json, os, sys
from datetime import timedelta
import psutil
import torch.distributed as dist
dist.init_process_group("gloo")
if dist.get_rank() == 0:
    ports = {each.laddr.port for each in psutil.Process(os.getppid()).net_connections() if each.status == "LISTEN"}
    visits = [
        dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=10))
        for port in ports
    ]
    open(sys.argv[1], "w").write(json.dumps([key for visit in visits for key in visit.list_keys()]))
dist.barrier()
dist.destroy_process_group()
"""


#: A process that is told to stop, says so, and writes its checkpoint when it may.
CHECKPOINT = """
import os, signal, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
signal.signal(signal.SIGTERM, lambda *_: (folder / f"told-{rank}").touch())
(folder / f"there-{rank}").touch()
while not (folder / "may").exists():
    time.sleep(0.02)
(folder / f"checkpoint-{rank}").touch()
sys.exit(143)
"""


def launch(temporary: Path, code: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", LAUNCH, code, *arguments]
    return subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)})


def test_who_reaches_a_port_of_processes_finds_nothing_that_is_unpickled(tmp_path: Path) -> None:
    note, temporary = tmp_path / "keys.json", tmp_path / "tmp"
    temporary.mkdir()
    assert launch(temporary, VISIT, str(note)).wait(LONG) == 0
    keys = json.loads(note.read_text())
    assert keys  # how the processes reach each other
    # What torch keeps of their meeting under this name is a pickle, which it reads again every few seconds.
    assert [key for key in keys if key.startswith("torch.rendezvous")] == []
    assert not list(temporary.glob("mode-*"))


def test_processes_that_are_told_to_stop_leave_nothing_of_their_meeting(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    stays = "import sys, threading; open(sys.argv[1], 'w'); threading.Event().wait()"
    process = launch(temporary, stays, str(tmp_path / "there"))
    wait_until((tmp_path / "there").exists)
    assert list(temporary.glob("mode-*"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) == 143
    assert not list(temporary.glob("mode-*"))


def waits(process: int) -> bool:
    """Whether a process has taken its signals and is asleep: looked at ten times."""
    for _ in range(10):
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
        if int(status["SigPnd"], 16) or int(status["ShdPnd"], 16) or not status["State"].startswith("S"):
            return False
        time.sleep(0.02)
    return True


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says what a process does")
def test_told_to_stop_again_and_again_it_waits_for_the_checkpoints(tmp_path: Path) -> None:
    """Whoever stops a tree of processes tells each of them, and again through each parent."""
    process = launch(tmp_path, CHECKPOINT, str(tmp_path))
    wait_until(lambda: len(list(tmp_path.glob("there-*"))) == 2)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: len(list(tmp_path.glob("told-*"))) == 2)
    for number in 3 * (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
        wait_until(lambda: process.poll() is not None or waits(process.pid))
    assert process.poll() is None
    (tmp_path / "may").touch()
    assert process.wait(LONG) == 143
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
