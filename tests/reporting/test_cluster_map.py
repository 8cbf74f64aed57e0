"""The map of fine clusters: places, sizes and words, and nothing that a caption's words could break."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from mode.reporting.cluster_map import COVERED, LARGEST, SIZE, draw_map, places
from mode.reporting.summary import Cluster, FineCluster


def test_few_centres_lie_along_their_main_axes() -> None:
    line = np.array([[0.0, 0, 0], [0, 4, 0], [0, 1, 0]])
    placed = places(line, random_seed=0)
    assert placed[:, 0] == pytest.approx([0, 1, 0.25])
    assert placed[:, 1] == pytest.approx([0.5, 0.5, 0.5])


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 40])
def test_places_fill_the_unit_square_and_are_the_same_each_time(count: int) -> None:
    centres = np.random.default_rng(count).normal(size=(count, 5)).astype(np.float32)
    placed = places(centres, random_seed=0)
    assert placed.shape == (count, 2)
    assert placed.min() >= 0
    assert placed.max() <= 1
    assert np.array_equal(placed, places(centres, random_seed=0))


def test_groups_that_are_far_apart_stay_apart() -> None:
    rng = np.random.default_rng(0)
    centres = np.concatenate([rng.normal(0, 0.1, (15, 8)), rng.normal(5, 0.1, (15, 8))])
    placed = places(centres, random_seed=0)
    between = np.linalg.norm(placed[:15].mean(axis=0) - placed[15:].mean(axis=0))
    within = max(np.linalg.norm(part - part.mean(axis=0), axis=1).mean() for part in (placed[:15], placed[15:]))
    assert between > 2 * within


def test_a_point_per_fine_cluster_its_area_by_size() -> None:
    fine = [FineCluster(0.0, 0.0, 400, ["<dog>", "cat"]), FineCluster(1.0, 1.0, 100)]
    drawn = ET.fromstring(draw_map([Cluster("base", 0, 500, ["dog"], "expert-0", fine), Cluster("base", 1, 9)]))
    circles = list(drawn.iter("circle"))
    first, second = (float(circle.attrib["r"]) for circle in circles)
    assert first == pytest.approx(2 * second)
    titles = [circle.findtext("title") for circle in circles]
    assert titles == ["expert-0: <dog>, cat (400 captions)", "expert-0: (no words) (100 captions)"]


def test_many_points_leave_room_between_them() -> None:
    def covered(count: int) -> float:
        fine = [FineCluster(0.5, 0.5, 7) for _ in range(count)]
        circles = ET.fromstring(draw_map([Cluster("base", 0, 5, fine=fine)])).iter("circle")
        return sum(math.pi * float(circle.attrib["r"]) ** 2 for circle in circles) / math.prod(SIZE)

    assert covered(4) == pytest.approx(4 * math.pi * LARGEST**2 / math.prod(SIZE))
    assert covered(4_000) == pytest.approx(COVERED, rel=0.05)  # radii are written with one digit


def test_nothing_to_draw() -> None:
    assert draw_map([]) == draw_map([Cluster("base", 0, 5)]) == ""
