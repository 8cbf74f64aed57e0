from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mode.data.shards.verify import verify
from mode.errors import ModeError

Make = Callable[..., list[tuple[str, bytes]]]


def test_good_shards_have_no_problems_and_bad_ones_are_listed(
    tmp_path: Path, pair: Make, tar_bytes: Callable[..., bytes]
) -> None:
    (tmp_path / "good.tar").write_bytes(tar_bytes(pair("a") + pair("b")))
    report = verify(["good.tar"], tmp_path)
    assert (report.bad, report.pairs, report.images, report.bad_share) == (0, 2, 2, 0.0)
    (tmp_path / "bad.tar").write_bytes(
        tar_bytes([*pair("a"), ("b.jpg", b"no image"), ("b.txt", b"x"), ("c.txt", b"x")])
    )
    report = verify(["*.tar"], tmp_path)
    assert report.counts == {"undecodable-image": 1, "caption-without-image": 1}
    assert (report.bad, report.pairs, report.bad_share) == (2, 3, 0.4)
    assert [(problem.file, problem.key) for problem in report.problems] == [("bad.tar", "b"), ("bad.tar", "c")]
    assert verify(["*.tar"], tmp_path, check_images=False).bad == 1


def test_nothing_good_is_reported_not_raised(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_bytes(b"\x01" * 2000)
    report = verify(["bad.tar"], tmp_path)
    assert (report.counts, report.pairs, report.bad_share) == ({"damaged-tar": 1}, 0, 1.0)
    with pytest.raises(ModeError, match=r"nowhere\.tar"):
        verify(["nowhere.tar"], tmp_path)
