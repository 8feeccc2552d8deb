import numpy as np
import pytest

from diffusion_jax.evaluation import neighbours
from diffusion_jax.evaluation.precision_recall import inside, precision_recall


def naive_inside(points, others, k):
    result = []
    for p in points:
        found = False
        for i, o in enumerate(others):
            to_others = sorted(np.linalg.norm(o - q) for j, q in enumerate(others) if j != i)
            found = found or np.linalg.norm(p - o) <= to_others[k - 1]
        result.append(found)
    return np.array(result)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_equals_the_loops(generator, k, monkeypatch):
    monkeypatch.setattr(neighbours, "_BLOCK", 7)
    made, real = generator.normal(size=(25, 2)) * 1.5, generator.normal(size=(30, 2))
    precise, recalled = precision_recall(made, real, k)
    np.testing.assert_array_equal(precise, naive_inside(made, real, k))
    np.testing.assert_array_equal(recalled, naive_inside(real, made, k))
    assert 0.0 < precise.mean() < 1.0


def test_identical_sets_are_perfect(generator):
    x = generator.normal(size=(50, 4))
    assert [inside.mean() for inside in precision_recall(x, x)] == [1.0, 1.0]


def test_disjoint_sets_share_nothing(generator):
    x = generator.normal(size=(50, 4))
    assert [inside.mean() for inside in precision_recall(x, x + 100.0)] == [0.0, 0.0]


def test_a_dropped_mode_costs_recall_only(generator):
    modes = lambda n, centres: generator.normal(size=(n, 2)) * 0.5 + generator.choice(centres, n)[:, None]
    real, all_modes, one_mode = modes(400, [0.0, 20.0]), modes(400, [0.0, 20.0]), modes(400, [0.0])
    full, dropped = ([x.mean() for x in precision_recall(made, real)] for made in (all_modes, one_mode))
    assert dropped[0] > 0.9 * full[0]
    assert dropped[1] < 0.6 * full[1]


def test_inside_of_a_known_ball():
    others = np.array([[0.0], [1.0], [2.0], [3.0]])  # radii to the third neighbour: 3, 2, 2, 3
    np.testing.assert_array_equal(inside(np.array([[-3.0], [-3.1], [6.0], [6.1]]), others), [True, False, True, False])


def test_nearest(generator):
    a, b = generator.normal(size=(11, 3)), generator.normal(size=(17, 3))
    expected = np.linalg.norm(a[:, None] - b[None], axis=-1).min(1)
    np.testing.assert_allclose(neighbours.nearest(a, b), expected)
