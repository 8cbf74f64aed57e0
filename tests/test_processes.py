"""What a process asks of Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
