"""Files with a bit that has flipped."""

from __future__ import annotations


def flipped(content: bytes, bit: int) -> bytes:
    """The same but for one bit."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
