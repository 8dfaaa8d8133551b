from __future__ import annotations

import numpy as np
import pytest

from mole_diffusion.errors import InvalidRequest
from mole_diffusion.scoring.intervals import area_under_curve, bootstrap_interval, calibrate_threshold
from mole_diffusion.scoring.report import bystander_share, find_subjects, leak_matrix, report_scenes

# Four windows: left, right, one that holds both, and the background. Candidates: subjects 0, 1 and a plain member 2.
OVERLAPS = np.array([[1, 0, 1, 0], [0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]], dtype=float)
BOTH = [[0.9, 0.3, 0.2], [0.3, 0.9, 0.2], [0.5, 0.5, 0.2], [0.1, 0.1, 0.1]]
TWICE_THE_FIRST = [[0.9, 0.3, 0.2], [0.9, 0.4, 0.2], [0.6, 0.3, 0.2], [0.1, 0.1, 0.1]]
BLENDED = [[0.6, 0.6, 0.2], [0.6, 0.6, 0.2], [0.8, 0.8, 0.2], [0.1, 0.1, 0.1]]
BLANK = [[0.3, 0.3, 0.3]] * 4
PLAIN = [[0.9, 0.3, 0.2], [0.3, 0.7, 0.8], [0.5, 0.5, 0.5], [0.1, 0.1, 0.1]]


def _scores(*scenes: list[list[float]]) -> np.ndarray:
    return np.array(scenes, dtype=float)


def test_two_subjects_in_two_places_are_a_success() -> None:
    found = find_subjects(_scores(BOTH), [(0, 1)], OVERLAPS, 0.6)
    assert found.success.tolist() == [True] and found.places == ((0, 1),) and found.identity == ((0.9, 0.9),)


@pytest.mark.parametrize("scene", [TWICE_THE_FIRST, BLENDED, BLANK, PLAIN])
def test_twins_blends_blanks_and_plain_members_are_none(scene: list[list[float]]) -> None:
    assert find_subjects(_scores(scene), [(0, 1)], OVERLAPS, 0.2).success.tolist() == [False]


def test_the_threshold_is_per_candidate() -> None:
    scores = _scores(BOTH)
    assert not find_subjects(scores, [(0, 1)], OVERLAPS, 0.95).success[0]
    assert find_subjects(scores, [(0, 1)], OVERLAPS, [0.8, 0.8, 9]).success[0]
    assert not find_subjects(scores, [(0, 1)], OVERLAPS, [0.8, 0.95, 0]).success[0]


def test_without_room_for_all_there_is_no_place() -> None:
    found = find_subjects(_scores(BOTH), [(0, 1, 2)], np.ones((4, 4)), 0.0)
    assert found.places == (None,) and not found.success[0] and np.isnan(found.identity[0]).all()


def test_places_have_the_largest_total_as_by_brute_force() -> None:
    generator = np.random.default_rng(0)
    overlaps = generator.random((9, 9))
    overlaps = np.maximum(overlaps, overlaps.T)
    np.fill_diagonal(overlaps, 1)
    for _ in range(20):
        score = generator.random((9, 3))
        best, where = -1.0, None
        for choice in np.ndindex(9, 9, 9):
            if all(overlaps[a, b] <= 0.5 for i, a in enumerate(choice) for b in choice[:i]):
                total = sum(score[w, c] for c, w in enumerate(choice))
                best, where = (total, choice) if total > best else (best, where)
        found = find_subjects(score[None], [(0, 1, 2)], overlaps, 0.0)
        assert found.places[0] == where


def test_leaks_are_counted_where_a_subject_is_sought() -> None:
    leak = leak_matrix(_scores(BOTH, PLAIN, TWICE_THE_FIRST), [(0, 1)] * 3, subjects=2)
    np.testing.assert_allclose(leak, [[1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    assert np.isnan(leak_matrix(_scores(BOTH), [(0,)], subjects=2)[1]).all()


def test_a_bystander_that_looks_like_a_subject_is_noticed() -> None:
    scenes = _scores(
        [[0.9, 0.1, 0.3], [0.2, 0.3, 0.8], [0.4, 0.2, 0.4], [0.1, 0.1, 0.1]],
        [[0.9, 0.1, 0.3], [0.85, 0.3, 0.8], [0.4, 0.2, 0.4], [0.1, 0.1, 0.1]],
    )
    found = find_subjects(scenes, [(0,), (0,)], OVERLAPS, 0.5)
    assert bystander_share(scenes, found, [2, 2], 2, OVERLAPS).tolist() == [False, True]


def test_one_record_of_everything() -> None:
    report = report_scenes(
        _scores(BOTH, BLENDED, BOTH), [(0, 1)] * 3, OVERLAPS, 0.5, names=["robot", "bunny", "person"], subjects=2,
        label="toy", groups=["a", "a", "b"],
    )  # fmt: skip
    assert report.joint.mean == pytest.approx(0.75) and report.joint.groups == 2, "every pair counts the same"
    assert report.success == (True, False, True) and set(report.identity) == {"robot", "bunny"}
    assert report.leak.shape == (2, 3) and report.label == "toy"


def test_shapes_must_agree() -> None:
    with pytest.raises(InvalidRequest, match="B targets"):
        find_subjects(_scores(BOTH), [], OVERLAPS, 0.5)


def test_the_interval_resamples_groups_not_values() -> None:
    generator = np.random.default_rng(1)
    groups = np.repeat(np.arange(8), 50)
    values = np.repeat(generator.normal(size=8), 50) + generator.normal(size=400) * 0.01
    wide = bootstrap_interval(values, list(groups))
    narrow = bootstrap_interval(values, list(range(400)))
    assert wide.groups == 8 and wide.high - wide.low > 3 * (narrow.high - narrow.low)
    assert wide.low <= wide.mean <= wide.high
    assert wide == bootstrap_interval(values, list(groups)), "seeded"
    assert str(wide).startswith(f"{wide.mean:.3f} [")


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        values = np.repeat(generator.normal(size=20), 3)
        interval = bootstrap_interval(values, list(np.repeat(np.arange(20), 3)), samples=400)
        hits += interval.low <= 0 <= interval.high
    assert 85 <= hits <= 99


def test_an_interval_needs_values_and_their_groups() -> None:
    for values, groups in (([], []), ([1.0], []), ([[1.0]], ["a"])):
        with pytest.raises(InvalidRequest):
            bootstrap_interval(values, groups)


def test_the_threshold_separates_what_can_be_separated() -> None:
    calibration = calibrate_threshold([0.8, 0.9, 0.7], [0.1, 0.3, 0.5])
    assert calibration.threshold == pytest.approx(0.6)
    assert (calibration.hit_rate, calibration.false_rate, calibration.auc) == (1, 0, 1)
    mixed = calibrate_threshold([0.4, 0.8, 0.9, 0.2], [0.1, 0.3, 0.5, 0.15])
    assert 0 < mixed.false_rate + 1 - mixed.hit_rate < 0.6 and 0.5 < mixed.auc < 1
    with pytest.raises(InvalidRequest):
        calibrate_threshold([], [0.1])


def test_area_under_the_curve_counts_ties_half() -> None:
    assert area_under_curve([1, 2], [1, 2]) == 0.5
    assert area_under_curve([3, 1], [2]) == 0.5
