"""Who ends whom: processes that must not outlive their parent, and parents that adopt what is left (Linux only).

Other systems have no `prctl`; there an orphan runs to its end.
"""

from __future__ import annotations

import signal
import sys

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def die_with_parent() -> None:
    """Get SIGTERM when the parent ends, however it ends: a killed `dvc` must not leave its stage running."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)
