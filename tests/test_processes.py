"""What a process asks of Linux and of Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mode.processes import before_ending, spin_briefly
from tests.waiting import LONG

#: Prints the flags of the mapping that a tensor of 64 MB lies in.
FLAGS_OF_A_TENSOR = """
from mode.processes import use_huge_pages
use_huge_pages()
import torch
tensor = torch.ones(2**24)
address, inside = tensor.data_ptr(), False
for line in open("/proc/self/smaps"):
    begin, _, end = line.split()[0].partition("-")
    if end:
        inside = int(begin, 16) <= address < int(end, 16)
    elif inside and line.startswith("VmFlags:"):
        print(line)
"""


#: Ends at signals, after it has written a file; with a second argument, which takes so long that it is not waited for.
ENDING = """
import sys, threading
from mode.processes import before_ending, ending_at_signals
def last():
    open(sys.argv[1], "a").write("last")
    if sys.argv[2:]:
        threading.Event().wait()
with ending_at_signals("told"), before_ending(last, 0.2 if sys.argv[2:] else 1000.0):
    print("there", flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize("stuck", [[], ["stuck"]])
def test_what_is_to_be_done_before_an_end_is_done_once_and_not_waited_for_without_end(
    tmp_path: Path, stuck: list[str]
) -> None:
    note = tmp_path / "note"
    command = [sys.executable, "-c", ENDING, str(note), *stuck]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LONG)
    assert (process.returncode, said, note.read_text()) == (143, "told\n", "last")


def test_elsewhere_signals_do_what_they_did() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with before_ending(lambda: None, 1.0):
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    spin_briefly()
    assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.delenv("OMP_WAIT_POLICY")
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    spin_briefly()
    assert os.environ["GOMP_SPINCOUNT"] == "10000"


def test_cycles_are_looked_for_rarely_and_not_more_often_than_the_user_has_said() -> None:
    code = "import gc, sys; from mode.processes import collect_rarely; gc.set_threshold(int(sys.argv[1])); "
    code += "collect_rarely(); print(gc.get_threshold()[0])"
    for given, expected in (("700", "10000"), ("50000", "50000")):
        done = subprocess.run([sys.executable, "-c", code, given], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this kernel has no huge pages")
@pytest.mark.parametrize(("setting", "expected"), [(None, True), ("0", False)], ids=["default", "switched off"])
def test_large_tensors_ask_for_huge_pages_unless_the_user_says_no(setting: str | None, expected: bool) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    if setting is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = setting
    done = subprocess.run(
        [sys.executable, "-c", FLAGS_OF_A_TENSOR], env=environment, capture_output=True, text=True, check=True
    )
    assert "VmFlags:" in done.stdout
    assert ("hg" in done.stdout.split()) == expected
