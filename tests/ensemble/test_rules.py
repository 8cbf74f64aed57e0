"""Routing: the rules against numbers worked by hand, their properties, and the calibration of the temperature."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_matrix
from scipy.special import softmax

from mode.ensemble.rules import (
    Nearest,
    calibrate_evidence,
    calibrate_factors,
    calibrate_temperature,
    calibrated_weights,
    class_distances,
    keep_share,
    keep_top,
    largest_first,
    log_densities,
    paper_posteriors,
    paper_weights,
    partial_captions,
    published_posteriors,
    published_weights,
    uniform_weights,
    word_scores,
)
from mode.errors import ModeError

NAMES = ("base-0", "base-1", "photos-0")


def nearest(rows: list[list[float]]) -> Nearest:
    return Nearest(NAMES[: len(rows[0])], np.array(rows))


def distances(max_classes: int = 30) -> st.SearchStrategy[np.ndarray]:
    """[classes, 3 experts], all different from 0 so that scaling them loses nothing."""
    shapes = st.tuples(st.integers(1, max_classes), st.just(3))
    return arrays(np.float64, shapes, elements=st.floats(0.01, 2.0))


class TestClassDistances:
    def test_nearest_centre_of_each_expert(self) -> None:
        conditions = {"a": np.array([[3.0, 4.0], [0.0, 1.0]]), "b": np.array([[-2.0, 0.0]])}
        found = class_distances(np.array([[0.0, 0.0], [3.0, 4.0]]), conditions)
        assert found.experts == ("a", "b")
        np.testing.assert_allclose(found.distances, [[1.0, 2.0], [0.0, math.hypot(5, 4)]])

    @pytest.mark.parametrize("classes", [0, 1, 4095, 4096, 4097])
    def test_equals_the_full_matrix(self, classes: int) -> None:
        random = np.random.default_rng(classes)
        vectors = random.normal(size=(classes, 3)).astype(np.float32)
        conditions = {"a": random.normal(size=(1, 3)), "b": random.normal(size=(5, 3)).astype(np.float16)}
        naive = np.stack(
            [
                np.linalg.norm(vectors[:, None, :] - centres[None], axis=2).min(axis=1)
                for centres in conditions.values()
            ],
            1,
        )
        np.testing.assert_allclose(class_distances(vectors, conditions).distances, naive, atol=1e-6)

    def test_a_class_on_a_centre_is_at_distance_zero_not_nan(self) -> None:
        vectors = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32)
        assert class_distances(vectors, {"a": vectors}).distances.max() < 1e-6


class TestPublished:
    """The formula of reference-facts.md: p = softmax(w / 8)."""

    @pytest.mark.parametrize(
        ("classes", "weight"), [(10, 0.262), (100, 0.383), (210, 0.552), (220, 0.367), (1000, 0.254)]
    )
    def test_all_classes_on_one_of_four_experts(self, classes: int, weight: float) -> None:
        """What the published code gives at a distance of 0.6: nearly uniform, and not even rising with the classes."""
        rows = np.full((classes, 4), 0.9)
        rows[:, 2] = 0.6
        found = published_weights(Nearest(("a", "b", "c", "d"), rows))
        assert found["c"] == pytest.approx(weight, abs=5e-4)
        assert found["a"] == found["b"] == found["d"] == pytest.approx((1 - found["c"]) / 3)

    def test_by_hand_with_fewer_than_ten_classes(self) -> None:
        """L = 4, so a = exp(0.5 - 2) = 0.22313 and b = 5; three classes go to the first expert, one to the second."""
        found = published_weights(nearest([[0.5, 0.9, 0.9], [0.6, 0.9, 0.9], [0.7, 0.9, 0.9], [0.9, 0.4, 0.9]]))
        a = math.exp(-1.5)
        w = [
            math.exp((a - 0.5) * 5) + math.exp((a - 0.6) * 5) + math.exp((a - 0.7) * 5),  # 0.2505 + 0.1519 + 0.0921
            math.exp((a - 0.4) * 5),
            0.0,  # no class: still in the softmax
        ]
        total = sum(math.exp(x / 8) for x in w)
        assert list(found.values()) == pytest.approx([math.exp(x / 8) / total for x in w])

    def test_divisor_one_sharpens(self) -> None:
        rows = [[0.5, 0.9, 0.9]] * 12
        w = 12 * math.exp(-2.5)
        found = published_weights(nearest(rows), divisor=1.0)
        assert found["base-0"] == pytest.approx(math.exp(w) / (math.exp(w) + 2))

    def test_an_expert_in_the_middle_without_a_class_shifts_no_weight(self) -> None:
        """The published code sizes the weights by occurring clusters but indexes them by number."""
        found = published_weights(nearest([[0.5, 0.9, 0.8]] * 10 + [[0.8, 0.9, 0.4]] * 10))
        assert found["photos-0"] > found["base-0"] > found["base-1"]

    @given(distances(), st.floats(0.5, 10.0))
    def test_every_class_as_a_task_of_its_own(self, rows: np.ndarray, divisor: float) -> None:
        found = published_posteriors(Nearest(NAMES, rows), divisor)
        alone = [list(published_weights(Nearest(NAMES, row[None]), divisor).values()) for row in rows]
        np.testing.assert_allclose(found, np.reshape(alone, (-1, 3)), rtol=1e-12)


class TestPaper:
    def test_by_hand(self) -> None:
        """Sums of exp(-d^2 / 2) over 2 classes x centres, then the softmax."""
        vectors = np.array([[0.0, 0.0], [1.0, 0.0]])
        conditions = {"a": np.array([[0.0, 0.0], [0.0, 1.0]]), "b": np.array([[3.0, 0.0]])}
        a = 1 + math.exp(-1 / 2) + math.exp(-1 / 2) + math.exp(-2 / 2)
        b = math.exp(-9 / 2) + math.exp(-4 / 2)
        found = paper_weights(vectors, conditions, bandwidth=2.0)
        assert found == pytest.approx({"a": 1 / (1 + math.exp(b - a)), "b": 1 / (1 + math.exp(a - b))})

    def test_many_classes_do_not_overflow(self) -> None:
        vectors = np.zeros((10_000, 2))
        found = paper_weights(vectors, {"a": np.zeros((1, 2)), "b": np.ones((1, 2))})
        assert found == pytest.approx({"a": 1.0, "b": 0.0})

    def test_every_class_as_a_task_of_its_own(self) -> None:
        """More classes than are taken at once."""
        random = np.random.default_rng(0)
        vectors = random.normal(size=(4100, 3))
        conditions = {name: random.normal(size=(count, 3)) for name, count in zip(NAMES, (1, 5, 2), strict=True)}
        found = paper_posteriors(vectors, conditions, bandwidth=0.7)
        assert found.shape == (4100, 3)
        for row in (0, 17, 4095, 4096, 4099):
            alone = paper_weights(vectors[row : row + 1], conditions, bandwidth=0.7)
            assert list(found[row]) == pytest.approx(list(alone.values()))


class TestCalibrated:
    def test_by_hand(self) -> None:
        """Two classes, temperature 0.5: softmax of -2 d^2, then the mean."""
        found = calibrated_weights(nearest([[0.5, 1.0], [1.0, 0.8]]), temperature=0.5)
        first = 1 / (1 + math.exp(-2 * (1.0 - 0.25)))
        second = 1 / (1 + math.exp(-2 * (0.64 - 1.0)))
        assert found == pytest.approx({"base-0": (first + second) / 2, "base-1": 1 - (first + second) / 2})

    def test_share_of_classes_when_cold_and_uniform_when_hot(self) -> None:
        rows = nearest([[0.5, 0.9, 0.9], [0.4, 0.9, 0.9], [0.9, 0.9, 0.3], [0.9, 0.2, 0.3]])
        assert list(calibrated_weights(rows, 1e-6).values()) == pytest.approx([0.5, 0.25, 0.25])
        assert list(calibrated_weights(rows, 1e6).values()) == pytest.approx([1 / 3] * 3, abs=1e-5)

    def test_no_class_is_uniform(self) -> None:
        empty = Nearest(NAMES, np.empty((0, 3)))
        assert calibrated_weights(empty, 1.0) == uniform_weights(NAMES)
        assert list(published_weights(empty).values()) == pytest.approx([1 / 3] * 3)

    @given(distances(), st.floats(0.01, 100.0), st.floats(0.01, 10.0))
    def test_rescaled_distances_change_nothing(self, rows: np.ndarray, scale: float, temperature: float) -> None:
        plain = calibrated_weights(Nearest(NAMES, rows), temperature)
        scaled = calibrated_weights(Nearest(NAMES, rows * scale), temperature * scale**2)
        assert list(scaled.values()) == pytest.approx(list(plain.values()), abs=1e-9)

    @given(distances(), st.integers(2, 5))
    def test_classes_repeated_change_nothing(self, rows: np.ndarray, times: int) -> None:
        plain = calibrated_weights(Nearest(NAMES, rows), 0.3)
        repeated = calibrated_weights(Nearest(NAMES, np.tile(rows, (times, 1))), 0.3)
        assert list(repeated.values()) == pytest.approx(list(plain.values()))

    @given(distances(), st.integers(0, 2), st.floats(0.1, 0.9))
    def test_nearer_classes_raise_an_expert(self, rows: np.ndarray, expert: int, factor: float) -> None:
        nearer = rows.copy()
        nearer[:, expert] *= factor
        before = calibrated_weights(Nearest(NAMES, rows), 0.5)[NAMES[expert]]
        assert calibrated_weights(Nearest(NAMES, nearer), 0.5)[NAMES[expert]] >= before - 1e-12


@given(distances(), st.permutations(range(3)), st.sampled_from(["published", "calibrated"]))
def test_weights_are_a_distribution_that_follows_the_names(rows: np.ndarray, order: list[int], rule: str) -> None:
    def weigh(names: tuple[str, ...], columns: np.ndarray) -> dict[str, float]:
        found = Nearest(names, columns)
        return published_weights(found) if rule == "published" else calibrated_weights(found, 0.4)

    rows = rows + np.array([0, 1e-6, 2e-6])  # no ties: those go by order
    plain = weigh(NAMES, rows)
    assert sum(plain.values()) == pytest.approx(1)
    assert min(plain.values()) >= 0
    permuted = weigh(tuple(NAMES[i] for i in order), rows[:, order])
    for name in NAMES:
        assert permuted[name] == pytest.approx(plain[name])


@given(st.integers(0, 2**32 - 1), st.permutations(range(3)))
def test_paper_weights_are_a_distribution_that_follows_the_names(seed: int, order: list[int]) -> None:
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(7, 4))
    conditions = {name: random.normal(size=(size, 4)) for name, size in zip(NAMES, (1, 3, 2), strict=True)}
    plain = paper_weights(vectors, conditions)
    assert sum(plain.values()) == pytest.approx(1)
    permuted = paper_weights(vectors, {NAMES[i]: conditions[NAMES[i]] for i in order})
    for name in NAMES:
        assert permuted[name] == pytest.approx(plain[name])


def test_experts_of_equal_weight_stay_in_the_given_order() -> None:
    assert largest_first({"b": 0.25, "a": 0.5, "c": 0.25}) == ["a", "b", "c"]


class TestKeep:
    WEIGHTS = {"a": 0.1, "b": 0.4, "c": 0.1, "d": 0.4}  # noqa: RUF012

    def test_by_hand(self) -> None:
        assert keep_top(self.WEIGHTS, 1) == {"a": 0, "b": 1, "c": 0, "d": 0}  # the first of equals
        assert keep_top(self.WEIGHTS, 3) == pytest.approx({"a": 1 / 9, "b": 4 / 9, "c": 0, "d": 4 / 9})
        assert keep_top(self.WEIGHTS, 9) == pytest.approx(self.WEIGHTS)
        assert keep_share(self.WEIGHTS, 0.0) == {"a": 0, "b": 1, "c": 0, "d": 0}
        assert keep_share(self.WEIGHTS, 0.4) == {"a": 0, "b": 1, "c": 0, "d": 0}
        assert keep_share(self.WEIGHTS, 0.41) == pytest.approx({"a": 0, "b": 0.5, "c": 0, "d": 0.5})
        assert keep_share(self.WEIGHTS, 1.0) == pytest.approx(self.WEIGHTS)

    @given(st.lists(st.floats(0.001, 1), min_size=1, max_size=8), st.floats(0, 1))
    def test_the_fewest_that_reach_the_share(self, raw: list[float], share: float) -> None:
        weights = {str(number): value / sum(raw) for number, value in enumerate(raw)}
        kept = [name for name, weight in keep_share(weights, share).items() if weight > 0]
        assert sum(weights[name] for name in kept) >= share - 1e-6
        fewer = sorted(weights.values(), reverse=True)[: len(kept) - 1]
        assert sum(fewer) < share or len(kept) == 1

    def test_senseless_numbers(self) -> None:
        with pytest.raises(ModeError, match="at least one expert"):
            keep_top(self.WEIGHTS, 0)
        with pytest.raises(ModeError, match="from 0 to 1"):
            keep_share(self.WEIGHTS, -0.1)


def experts_captions(seed: int, counts: tuple[int, ...] = (40, 7, 1)) -> dict[str, np.ndarray]:
    """Unit vectors of three experts' captions, float16, each around a direction of its own."""
    random = np.random.default_rng(seed)
    found = {}
    for name, count in zip(NAMES, counts, strict=True):
        captions = random.normal(size=(1, 5)) + random.normal(scale=0.7, size=(count, 5))
        found[name] = (captions / np.linalg.norm(captions, axis=1, keepdims=True)).astype(np.float16)
    return found


def evidence_posteriors(vectors: np.ndarray, evidence: dict[str, np.ndarray], temperature: float) -> np.ndarray:
    """p(expert | class), the experts equally likely beforehand."""
    return np.asarray(softmax(log_densities(vectors, evidence, temperature), axis=1))


def naive_posteriors(vectors: np.ndarray, evidence: dict[str, np.ndarray], temperature: float) -> list[list[float]]:
    """The formula as it stands, pair by pair."""
    rows = []
    for vector in vectors.tolist():
        densities = [
            sum(math.exp(-(math.dist(vector, caption) ** 2) / temperature) for caption in captions) / len(captions)
            for captions in ([[float(x) for x in row] for row in each] for each in evidence.values())
        ]
        rows.append([density / sum(densities) for density in densities])
    return rows


class TestEvidence:
    def test_by_hand(self) -> None:
        """One class at 0; captions at 0 and 1 against 1 and 2: means (1 + 1/e) / 2 and (1/e + e^-4) / 2."""
        evidence = {"a": np.array([[0.0], [1.0]]), "b": np.array([[1.0], [2.0]])}
        a, b = (1 + math.exp(-1)) / 2, (math.exp(-1) + math.exp(-4)) / 2
        np.testing.assert_allclose(evidence_posteriors(np.zeros((1, 1)), evidence, 1.0), [[a / (a + b), b / (a + b)]])

    def test_many_captions_near_a_class_outweigh_one(self) -> None:
        """Both experts know the word, one of them as one of its hundred: the nearest centre sees no difference."""
        word, other = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
        evidence = {"one": np.concatenate([word, np.repeat(other, 99, axis=0)]), "all": np.repeat(word, 10, axis=0)}
        nearest_only = class_distances(word, evidence).distances
        assert nearest_only[0, 0] == nearest_only[0, 1]
        assert evidence_posteriors(word, evidence, 0.1)[0, 1] == pytest.approx(100 / 101)

    @pytest.mark.parametrize("classes", [0, 1, 255, 256, 257])
    def test_equals_the_formula(self, classes: int) -> None:
        evidence, vectors = experts_captions(0), np.random.default_rng(1).normal(size=(classes, 5)).astype(np.float32)
        found = evidence_posteriors(vectors, evidence, 0.3)
        assert found.shape == (classes, 3)
        np.testing.assert_allclose(found, np.reshape(naive_posteriors(vectors, evidence, 0.3), (-1, 3)), atol=1e-6)

    @given(st.integers(0, 2**32 - 1), st.floats(1e-4, 1e4), st.permutations(range(3)))
    def test_a_distribution_that_follows_the_names(self, seed: int, temperature: float, order: list[int]) -> None:
        evidence, vectors = experts_captions(seed), np.random.default_rng(seed).normal(size=(4, 5))
        found = evidence_posteriors(vectors, evidence, temperature)
        np.testing.assert_allclose(found.sum(axis=1), 1)
        assert found.min() >= 0
        permuted = evidence_posteriors(vectors, {NAMES[i]: evidence[NAMES[i]] for i in order}, temperature)
        np.testing.assert_allclose(permuted, found[:, order])

    @given(st.integers(0, 2**32 - 1), st.floats(0.01, 100.0), st.integers(2, 4))
    def test_scale_and_a_larger_sample_change_nothing(self, seed: int, scale: float, times: int) -> None:
        evidence, vectors = experts_captions(seed), np.random.default_rng(seed).normal(size=(4, 5))
        plain = evidence_posteriors(vectors, evidence, 0.4)
        scaled = {name: each.astype(np.float64) * scale for name, each in evidence.items()}
        np.testing.assert_allclose(evidence_posteriors(vectors * scale, scaled, 0.4 * scale**2), plain, atol=1e-9)
        larger = {**evidence, NAMES[1]: np.tile(evidence[NAMES[1]], (times, 1))}
        np.testing.assert_allclose(evidence_posteriors(vectors, larger, 0.4), plain, atol=1e-9)

    @given(st.integers(0, 2**32 - 1), st.integers(0, 2), st.floats(0.01, 3.0), st.floats(0.0, 1.0))
    def test_a_caption_nearer_than_the_others_never_lowers_a_weight(
        self, seed: int, expert: int, temperature: float, step: float
    ) -> None:
        evidence, vector = experts_captions(seed), np.random.default_rng(seed).normal(size=(1, 5))
        captions = evidence[NAMES[expert]].astype(np.float64)
        nearest = captions[np.linalg.norm(captions - vector, axis=1).argmin()]
        joined = {**evidence, NAMES[expert]: np.concatenate([captions, nearest + step * (vector - nearest)])}
        before, after = (evidence_posteriors(vector, each, temperature)[0, expert] for each in (evidence, joined))
        assert after >= before - 1e-9


class TestCalibratedEvidence:
    def parts(self) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Captions with noise, as if words were missing."""
        evidence = experts_captions(3, (60, 60, 60))
        owners, rows = np.repeat(np.arange(3), 60), np.tile(np.arange(60), 3)
        whole = np.concatenate([*evidence.values()]).astype(np.float64)
        return whole + np.random.default_rng(4).normal(scale=0.3, size=whole.shape), evidence, owners, rows

    def test_is_the_best_on_a_grid_with_each_caption_left_out(self) -> None:
        partial, evidence, owners, rows = self.parts()

        def likelihood(temperature: float) -> float:
            total = 0.0
            for vector, owner, row in zip(partial, owners, rows, strict=True):
                others = {**evidence, NAMES[owner]: np.delete(evidence[NAMES[owner]], row, axis=0)}
                total += math.log(evidence_posteriors(vector[None], others, temperature)[0, owner])
            return total / len(partial)

        found, densities = calibrate_evidence(partial, evidence, owners, rows)
        posteriors = softmax(densities, axis=1)[np.arange(len(owners)), owners]
        assert np.log(posteriors).mean() == pytest.approx(likelihood(found), abs=1e-4)
        assert likelihood(found) >= max(likelihood(t) for t in np.geomspace(0.01, 10, 16)) - 1e-4

    @given(st.floats(0.1, 10))
    def test_scales_with_squared_distance(self, scale: float) -> None:
        partial, evidence, owners, rows = self.parts()
        scaled = {name: each.astype(np.float64) * scale for name, each in evidence.items()}
        plain, _ = calibrate_evidence(partial, evidence, owners, rows)
        assert calibrate_evidence(partial * scale, scaled, owners, rows)[0] == pytest.approx(plain * scale**2, rel=0.05)

    @pytest.mark.parametrize("counts", [(1, 1, 1), (2, 1, 3)])
    def test_few_captions_give_a_usable_temperature(self, counts: tuple[int, ...]) -> None:
        evidence = experts_captions(5, counts)
        whole = np.concatenate([*evidence.values()])
        rows = np.concatenate([np.arange(count) for count in counts])
        found, _ = calibrate_evidence(whole, evidence, np.repeat(np.arange(3), counts), rows)
        assert math.isfinite(found)
        assert found > 0


class TestWords:
    COUNTS, SIZES = np.array([[50, 0], [10, 30]]), np.array([100, 100])

    def test_by_hand(self) -> None:
        """Rates 0.5 and 0.1, mean 0.3: the first word has (50 + 30) / 200 and (10 + 30) / 200; the second 15, 45."""
        found = word_scores(csr_matrix([[1, 0], [1, 1], [0, 0]]), self.COUNTS, self.SIZES)
        one, two = np.log([0.4, 0.2]), np.log([15 / 200, 45 / 200])
        np.testing.assert_allclose(found, [one, one + two, [0, 0]])

    def test_a_caption_is_left_out_of_its_own_experts_counts(self) -> None:
        found = word_scores(csr_matrix([[1, 0]]), self.COUNTS, self.SIZES, owners=np.array([0]))
        np.testing.assert_allclose(found, [[math.log((49 + 30) / 199), math.log(40 / 200)]])

    @given(st.integers(0, 2**32 - 1))
    def test_more_captions_with_a_word_never_lower_its_experts_weight(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        sizes = random.integers(2, 500, 3)
        counts = random.integers(0, sizes[:, None], (3, 4))
        used = csr_matrix([[1.0, 0, 0, 0]])
        more = counts + np.array([[1, 0, 0, 0], [0] * 4, [0] * 4])
        before, after = (softmax(word_scores(used, each, sizes), axis=1)[0, 0] for each in (counts + 1, more + 1))
        assert after >= before - 1e-12

    def test_factors_that_made_the_owners_are_found(self) -> None:
        random = np.random.default_rng(0)
        densities, words = random.normal(size=(2, 20_000, 3)) * 2
        odds = softmax(0.8 * densities + 0.3 * words, axis=1)
        owners = (random.random((20_000, 1)) > odds.cumsum(axis=1)).sum(axis=1)
        assert calibrate_factors(densities, words, owners) == pytest.approx((0.8, 0.3), abs=0.05)
        assert calibrate_factors(densities, -words, owners)[1] == pytest.approx(0, abs=1e-6)  # never against them


class TestTemperature:
    def test_recovers_the_temperature_that_made_the_labels(self) -> None:
        """Labels drawn from softmax(-d^2 / 0.3): the maximum-likelihood estimate is consistent."""
        random = np.random.default_rng(0)
        rows = random.uniform(0.2, 1.2, size=(20_000, 4))
        odds = np.exp(-(rows**2) / 0.3)
        cumulative = (odds / odds.sum(axis=1, keepdims=True)).cumsum(axis=1)
        assigned = (random.random((20_000, 1)) > cumulative).sum(axis=1)
        assert calibrate_temperature(rows, assigned) == pytest.approx(0.3, rel=0.05)

    def test_is_the_best_on_a_fine_grid(self) -> None:
        random = np.random.default_rng(1)
        rows = random.uniform(0.5, 1.0, size=(200, 3))
        assigned = np.where(random.random(200) < 0.7, rows.argmin(axis=1), random.integers(0, 3, 200))

        def likelihood(temperature: float) -> float:
            logits = -(rows**2 - (rows**2).min(axis=1, keepdims=True)) / temperature
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            return float(logits[np.arange(200), assigned].mean())

        found = calibrate_temperature(rows, assigned)
        assert likelihood(found) >= max(likelihood(t) for t in np.geomspace(1e-3, 1e2, 2000)) - 1e-9

    @given(st.floats(1e-3, 1e3))
    def test_scales_with_squared_distance(self, scale: float) -> None:
        random = np.random.default_rng(2)
        rows = random.uniform(0.5, 1.0, size=(50, 3))
        assigned = random.integers(0, 3, 50)
        assigned[:40] = rows[:40].argmin(axis=1)
        plain = calibrate_temperature(rows, assigned)
        assert calibrate_temperature(rows * scale, assigned) == pytest.approx(plain * scale**2, rel=1e-3)

    def test_without_any_doubt_it_ends_at_the_cold_bound(self) -> None:
        rows = np.random.default_rng(3).uniform(0.5, 1.0, size=(50, 3))
        found = calibrate_temperature(rows, rows.argmin(axis=1))
        assert 0 < found < 0.01 * (rows.min(axis=1) ** 2).mean()

    @pytest.mark.parametrize("rows", [np.zeros((4, 3)), np.full((4, 3), 0.7), np.ones((1, 1))])
    def test_degenerate_distances_give_a_usable_temperature(self, rows: np.ndarray) -> None:
        found = calibrate_temperature(rows, np.zeros(len(rows), np.int64))
        assert math.isfinite(found)
        assert found > 0


class TestPartialCaptions:
    def test_keeps_order_and_about_half(self) -> None:
        captions = [" ".join(f"w{i}" for i in range(20))] * 200
        partial = partial_captions(captions, random_seed=1)
        kept = [[int(word[1:]) for word in caption.split()] for caption in partial]
        assert all(words == sorted(set(words)) for words in kept)
        assert np.mean([len(words) for words in kept]) == pytest.approx(10, abs=0.5)
        assert len({tuple(words) for words in kept}) > 190

    def test_seeded(self) -> None:
        captions = ["a black dog runs", "two men play chess"] * 10
        assert partial_captions(captions, 3) == partial_captions(captions, 3) != partial_captions(captions, 4)

    def test_something_always_stays(self) -> None:
        assert partial_captions(["dog"] * 50, 0) == ["dog"] * 50
        assert set(partial_captions(["black dog"] * 50, 0, kept=0.0)) == {"black", "dog"}
        assert partial_captions(["", "  "], 0) == ["", "  "]
