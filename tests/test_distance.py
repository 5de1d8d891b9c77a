"""The Fréchet distance against closed forms and scipy, its features, and what it says of real styles."""

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.signal

from acestep_lora.distance import BANDS, Gaussian, describe, features, fit, frechet, log_mel, root

sys.path.insert(0, str(Path(__file__).parent.parent / "data"))
from procedural import HELD_OUT, STYLES, song  # noqa: E402


def covariance(rng: np.random.Generator, size: int, rank: int | None = None) -> np.ndarray:
    factor = rng.normal(size=(size, rank or size))
    return factor @ factor.T


def tone(hertz: float, seconds: float, rate: int, level: float = 0.0) -> np.ndarray:
    return 10 ** (level / 20) * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


# ---------------------------------------------------------------- the distance


def test_in_one_dimension_it_is_that_of_means_and_deviations():
    a, b = Gaussian(np.array([1.0]), np.array([[4.0]])), Gaussian(np.array([-2.0]), np.array([[0.25]]))
    assert frechet(a, b) == pytest.approx((1 + 2) ** 2 + (2 - 0.5) ** 2, rel=1e-12)


def test_commuting_covariances_compare_axis_by_axis():
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    first, second = rng.uniform(0, 9, 6), rng.uniform(0, 9, 6)
    a = Gaussian(np.zeros(6), turn * first @ turn.T)
    b = Gaussian(np.ones(6), turn * second @ turn.T)
    assert frechet(a, b) == pytest.approx(6 + np.sum((np.sqrt(first) - np.sqrt(second)) ** 2), rel=1e-10)


def test_it_agrees_with_scipys_root_of_the_product():
    rng = np.random.default_rng(1)
    for size in (2, 8, 40):
        a = Gaussian(rng.normal(size=size), covariance(rng, size))
        b = Gaussian(rng.normal(size=size), covariance(rng, size))
        product = np.trace(scipy.linalg.sqrtm(a.covariance @ b.covariance).real)
        expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance) - 2 * product
        assert frechet(a, b) == pytest.approx(expected, rel=1e-8)
        assert frechet(b, a) == pytest.approx(frechet(a, b), rel=1e-10)


@pytest.mark.parametrize("rank", [1, 5, 64])
def test_equal_gaussians_are_at_zero_also_where_they_are_flat(rank):
    rng = np.random.default_rng(2)
    flat = covariance(rng, 64, rank) * 1e4
    a = Gaussian(np.ones(64), flat)
    assert 0 <= frechet(a, a) < 1e-9 * np.trace(flat)


def test_scale_shift_and_turn_do_to_it_what_they_do_to_squared_distances():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(50, 4)), rng.normal(2, 3, size=(80, 4))
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    distance = frechet(fit(a), fit(b))
    assert frechet(fit(7 + a @ turn), fit(7 + b @ turn)) == pytest.approx(distance, rel=1e-9)
    assert frechet(fit(3 * a), fit(3 * b)) == pytest.approx(9 * distance, rel=1e-9)


def test_the_root_squares_back():
    flat = covariance(np.random.default_rng(4), 12, 3)
    np.testing.assert_allclose(root(flat) @ root(flat), flat, atol=1e-10)


def test_many_rows_are_not_shrunk_and_few_come_nearer_to_the_truth():
    rng = np.random.default_rng(5)
    truth = covariance(rng, 64) / 64 + np.eye(64)
    draw = np.linalg.cholesky(truth)
    many, few = rng.normal(size=(200_000, 64)) @ draw.T, rng.normal(size=(40, 64)) @ draw.T
    np.testing.assert_allclose(fit(many).covariance, np.cov(many.T, bias=True), atol=2e-2)
    plain = Gaussian(few.mean(0), np.cov(few.T))
    exact = Gaussian(np.zeros(64), truth)
    assert frechet(fit(few), exact) < 0.5 * frechet(plain, exact)


@pytest.mark.parametrize("rows", [np.zeros((1, 3)), np.zeros(3), np.full((4, 2), np.nan)])
def test_what_is_no_distribution_is_refused(rows):
    with pytest.raises(ValueError):
        fit(rows)


# ---------------------------------------------------------------- the features


@pytest.mark.parametrize("rate", [16_000, 24_000, 44_100, 48_000])
def test_levels_are_those_of_the_sound_at_any_rate(rate):
    for level in (0, -20):
        levels = log_mel(tone(1000, 2, rate, level), rate)
        assert levels.shape[1] == BANDS and levels.shape[0] == pytest.approx(2 / 0.032, abs=2)
        assert levels[5:-5].max(axis=1) == pytest.approx(level, abs=4)  # bands overlap, a peak falls between two
    assert log_mel(tone(rate / 4, 1, rate), rate).mean(0).argmax() > log_mel(tone(200, 1, rate), rate).mean(0).argmax()


def test_silence_and_what_is_nearly_silent_are_the_same():
    faint = features(1e-6 * np.random.default_rng(0).normal(size=32_000), 16_000)
    np.testing.assert_array_equal(faint, features(np.zeros(32_000), 16_000))


def test_a_second_gives_a_row_and_channels_are_averaged():
    rng = np.random.default_rng(1)
    for seconds, rows in ((0.02, 1), (0.4, 1), (1.0, 1), (1.9, 1), (3.1, 3), (10.0, 10)):
        audio = 0.1 * rng.normal(size=round(seconds * 16_000))
        found = features(audio, 16_000)
        assert found.shape == (rows, 2 * BANDS) and np.isfinite(found).all()
        np.testing.assert_allclose(features(np.stack([audio, audio]), 16_000), found, rtol=1e-6)


def test_movement_is_told_from_steadiness():
    rng = np.random.default_rng(2)
    steady = 0.1 * rng.normal(size=16_000)
    pulsing = steady * np.repeat([1.0, 0.05] * 4, 2000)
    assert features(pulsing, 16_000)[0, BANDS:].mean() > 3 * features(steady, 16_000)[0, BANDS:].mean()


# ---------------------------------------------------------------- on music


def test_styles_are_told_apart_and_damage_adds_up():
    """Songs of one style are unlike each other, too: it takes several, and tells how far, not which."""
    sets = [[song(seed, 16_000, style)[0].T for seed in range(16)] for style in (*list(STYLES)[:2], HELD_OUT)]
    halves = [(describe(clips[:8], 16_000), describe(clips[8:], 16_000)) for clips in sets]
    table = np.array([[frechet(first, second) for _, second in halves] for first, _ in halves])
    assert np.diag(table).mean() < 0.75 * table[~np.eye(3, dtype=bool)].mean(), table
    for damage in (
        lambda clip, amount: clip + amount * 0.1 * np.random.default_rng(0).normal(size=clip.shape),
        lambda clip, amount: scipy.signal.lfilter([1 - 0.3 * amount], [1, -0.3 * amount], clip),
    ):
        worse = [describe([damage(clip, amount) for clip in sets[0][:8]], 16_000) for amount in (1, 2, 3)]
        distances = [frechet(halves[0][0], damaged) for damaged in worse]
        assert 0 < distances[0] < distances[1] < distances[2], distances
