from concurrent.futures import ThreadPoolExecutor

import numpy as np

from diffusion_jax.data import order


def test_every_epoch_is_another_permutation():
    size = 101
    stream = order.examples(3, 0, 5 * size, size).reshape(5, size)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(size), (5, 1)))
    assert len({tuple(epoch) for epoch in stream}) == 5
    assert not np.array_equal(stream[0], np.arange(size))


def test_a_batch_is_the_same_alone_and_in_a_run():
    batch, size = 7, 20  # batches straddle epochs
    run = order.examples(0, 0, 100 * batch, size).reshape(100, batch)
    for step in (0, 2, 3, 50, 99):
        np.testing.assert_array_equal(order.examples(0, step * batch, batch, size), run[step])


def test_all_examples_come_equally_often_in_whole_epochs_and_almost_in_between():
    count = np.bincount(order.examples(1, 0, 64 * 1000, 1198), minlength=1198)
    assert count.sum() == 64_000
    assert count.max() - count.min() <= 1


def test_a_batch_may_be_larger_than_the_data_set():
    count = np.bincount(order.examples(1, 5, 64, 10), minlength=10)
    assert count.sum() == 64
    assert count.max() - count.min() <= 2


def test_seeds_differ_and_places_are_spread_evenly():
    size = 64
    firsts = [order.examples(seed, 0, 8, size) for seed in range(2000)]
    assert len({tuple(first) for first in firsts}) == 2000
    count = np.bincount(np.concatenate(firsts), minlength=size)  # 250 each expected, deviation about 15
    assert np.abs(count - 250).max() < 80


def test_threads_agree_and_cannot_change_the_cached_order():
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: order.permutation(9, 4, 50_000), range(8)))
    assert all(answer is answers[0] for answer in answers)
    assert not answers[0].flags.writeable
    assert order.examples(2**31 - 1, 2**40, 3, 1000).dtype == np.int32


def test_the_order_is_that_of_the_published_generator():
    """The words for counter 0 are Philox 4x64-10's in Random123's known answers; NumPy counts up before it draws."""
    before = np.full(4, 2**64 - 1, np.uint64)
    words = np.random.Philox(key=np.zeros(2, np.uint64), counter=before).random_raw(4)
    assert [f"{word:x}" for word in words] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]
    words = np.random.Philox(key=np.array([3, 2], np.uint64)).random_raw(50)
    np.testing.assert_array_equal(order.permutation(3, 2, 50), sorted(range(50), key=lambda i: words[i]))
