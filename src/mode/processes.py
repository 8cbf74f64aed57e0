"""What a process asks of Linux: to end with its parent, to adopt orphans, to give its tensors huge pages.

Other systems have no `prctl`; there an orphan runs to its end.
"""

from __future__ import annotations

import os
import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent() -> None:
    """Get SIGTERM when the parent ends, however it ends: a killed `dvc` must not leave its stage running."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def use_huge_pages() -> None:
    """Have torch ask for huge pages for tensors of 2 MB and more, unless the environment decides otherwise.

    On a CPU activations are allocated anew in every step; in pages of 4 kB the faults take up to a tenth of the time of
    training and prediction (docs/performance.md). Has to come before torch's first large tensor. Where Linux is told
    never to give huge pages (`/sys/kernel/mm/transparent_hugepage/enabled`), it changes nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)
