"""The index's account of any shards, without writing an index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mode.data.shards.index import IndexReport, scan_shards
from mode.data.shards.manifest import build_manifest
from mode.params import IndexParams, SourceParams


def verify(paths: Sequence[str], root: Path, check_images: bool = True) -> IndexReport:
    """Read shards as `build_index` does and account for everything that is not a pair.

    Args:
        paths: tars, folders or globs of tars, or tables (with the columns `image` and `caption`).
        root: folder that relative paths start from.
        check_images: decode every image.

    Returns:
        The account; `report.bad` is the number of problems.

    Raises:
        ModeError: a path is none of these.
    """
    report = IndexReport()
    manifests = [build_manifest(SourceParams(shards=path), root) for path in paths]
    for manifest in manifests:
        for scanned in scan_shards(manifest, root, IndexParams(check_images=check_images)):
            report.add(scanned.scan)
    return report
