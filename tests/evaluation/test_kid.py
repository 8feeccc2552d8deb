import numpy as np
import pytest

from diffusion_jax.evaluation import bootstrap, kid


def naive(x, y):
    k = lambda a, b: (float(np.dot(a, b)) / len(a) + 1.0) ** 3
    n, m = len(x), len(y)
    same_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    same_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return same_x + same_y - 2.0 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_equals_the_double_loop(generator):
    x, y = generator.normal(size=(13, 4)), generator.normal(size=(9, 4)) + 0.5
    assert kid.distance(x, y) == pytest.approx(naive(x, y))


def test_blocks_do_not_matter(generator, monkeypatch):
    x, y = generator.normal(size=(13, 4)), generator.normal(size=(9, 4))
    whole = kid.distance(x, y)
    monkeypatch.setattr(kid, "_BLOCK", 4)
    assert kid.distance(x, y) == pytest.approx(whole)


def test_has_mean_zero_for_the_same_law(generator):
    values = np.array([kid.distance(*generator.normal(size=(2, 30, 5))) for _ in range(2000)])
    assert abs(values.mean()) < 4.0 * values.std() / np.sqrt(len(values))
    assert (values < 0.0).any()


def test_counts_are_repetitions_without_pairs_of_an_image_with_itself(generator):
    x, y = generator.normal(size=(6, 3)), generator.normal(size=(5, 3))
    k = kid.kernel
    i, j = np.array([0, 0, 2, 5, 5, 5]), np.array([1, 1, 2, 3])
    differ = lambda index: index[:, None] != index[None]
    expected = k(x[i], x[i])[differ(i)].mean() + k(y[j], y[j])[differ(j)].mean() - 2.0 * k(x[i], y[j]).mean()
    found = kid.weighted(x, y, bootstrap.counts(i[None], 6), bootstrap.counts(j[None], 5))
    np.testing.assert_allclose(found, [expected])


def test_sees_a_difference(generator):
    x, y = generator.normal(size=(2, 300, 8))
    assert kid.distance(x, y + 1.0) > 1.0 > 10 * abs(kid.distance(x, y))
