"""The encoded bytes of an index's images."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path

from mode.data.index import PairIndex

#: Files kept open: far below the usual limit of 1,024 a process.
_OPEN_FILES = 128


class ImageFiles:
    """Reads images by row: one `pread` each, files kept open.

    Args:
        index: where the images lie.
        root: folder that relative paths of the index start from.
    """

    def __init__(self, index: PairIndex, root: Path) -> None:
        self._index, self._root = index, root
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, row: int) -> bytes:
        """The encoded image of a pair.

        Raises:
            OSError: the file is gone, or ends before the image does.
        """
        file, length = int(self._index.file[row]), int(self._index.length[row])
        descriptor = self._open.get(file)
        if descriptor is None:
            descriptor = self._open[file] = os.open(self._root / self._index.path(file), os.O_RDONLY)
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(file)
        content = os.pread(descriptor, length, int(self._index.offset[row]))
        if len(content) < length:
            raise OSError(f"{self._index.path(file)}: ends inside an image")
        return content

    def __del__(self) -> None:
        """Close what is open."""
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)
