"""Editing, on Gaussian data whose flow, conditionals and ideal denoiser are known in closed form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families, latents, plugs, rng
from diffusion_jax.diffusion import editing
from diffusion_jax.diffusion.editing import Walk
from diffusion_jax.diffusion.grids import GRIDS
from diffusion_jax.diffusion.schedule import SCHEDULES
from diffusion_jax.diffusion.solvers import SOLVERS
from diffusion_jax.diffusion.solvers.base import solve
from diffusion_jax.types import Denoised, ImageSpec, Latent

pytestmark = pytest.mark.usefixtures("quick_compilation")

NAMES = ("vp_linear", "edm", "rectified_flow")
KARRAS = "karras(sigma_max=60)"
MEAN, COVARIANCE = np.array([0.2, -0.1]), np.array([[0.25, 0.27], [0.27, 0.36]])  # two pixels, of correlation 0.9


def two_pixels(schedule, mean=MEAN, covariance=COVARIANCE):
    """The ideal denoiser of images [1,2,1] drawn from N(mean, covariance), in every dtype; mean [2], or [n,2]."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t).astype(x.dtype), schedule.sigma(t).astype(x.dtype)
        C, m = jnp.asarray(covariance, x.dtype), jnp.asarray(mean, x.dtype).reshape(-1, 2)
        off = x.reshape(-1, 2) - alpha * m
        whitened = jnp.linalg.solve(alpha**2 * C + sigma**2 * jnp.eye(2, dtype=x.dtype), off.T).T
        x0 = m + alpha * whitened @ C
        return Denoised(x0.reshape(x.shape), sigma * whitened.reshape(x.shape))

    return denoise


def schedule_of(name):
    return plugs.build("schedule", name, SCHEDULES)


def walk_of(name, steps, solver="heun", grid=KARRAS, denoise=two_pixels, dtype=None):
    schedule = schedule_of(name)
    times = plugs.build("grid", grid, GRIDS)(schedule, jnp.int32(steps)).astype(dtype or jnp.result_type(float))
    return Walk(denoise(schedule), schedule, plugs.build("solver", solver, SOLVERS), times, jnp.asarray(steps))


def keys_of(n, seed=0):
    return rng.example_keys(jax.random.key(seed), jnp.arange(n))


def noise_of(keys, image):
    """What edits begin with."""
    return rng.normal(rng.fold(keys, 99), image.shape[1:], image.dtype)


def images(*pixels):
    return jnp.asarray(pixels).reshape(-1, 1, 2, 1)


def standardised(pixels):
    """How many standard deviations from the mean along the covariance's axes: what the flow keeps."""
    values, axes = np.linalg.eigh(COVARIANCE)
    return (np.asarray(pixels).reshape(-1, 2) - MEAN) @ axes / np.sqrt(values)


def flow(name, pixels, t, mean=MEAN, start=None):
    """Where the flow of N(mean, COVARIANCE) takes data to at t, or x at `start` to at t = 0: axis by axis by stds."""
    schedule, (values, axes) = schedule_of(name), np.linalg.eigh(COVARIANCE)
    alpha, sigma = (float(c(jnp.asarray(t if start is None else start))) for c in (schedule.alpha, schedule.sigma))
    growth = np.sqrt(alpha**2 * values + sigma**2) / np.sqrt(values)
    if start is None:
        return alpha * mean + ((pixels - mean) @ axes * growth) @ axes.T
    return mean + ((pixels - alpha * mean) @ axes / growth) @ axes.T


# ------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("name", NAMES)
def test_encode_is_the_flow_up_and_decode_the_flow_down(name, x64):
    """By the closed-form map of a Gaussian's flow; Heun at 200 steps."""
    walk, image, keys = walk_of(name, 200), images(0.5, 0.9, -0.6, 0.1, 0.2, -0.1), keys_of(3)
    sigma = float(walk.schedule.sigma(walk.times[0]))
    expected = flow(name, np.asarray(image).reshape(-1, 2), walk.times[0]) / sigma
    noise = jax.jit(lambda i: editing.encode(walk, i, keys))(image)
    np.testing.assert_allclose(np.asarray(noise).reshape(-1, 2), expected, atol=5e-3)
    back = jax.jit(lambda i: editing.decode(walk, i, keys))(jnp.asarray(expected).reshape(image.shape))
    np.testing.assert_allclose(back, image, atol=2e-3)


@pytest.mark.parametrize("name", ["vp_linear", "rectified_flow"])
def test_encode_then_decode_converges_at_the_solvers_order(name, x64):
    """Twice the steps: half of Euler's error. A quarter of Heun's at most: up and down, its errors nearly cancel.

    Data of deviations 0.7 and 0.8, so that the error of the grid's lowest stop, (sigma / std)^2, is the smallest.
    """
    image, keys = images(0.5, 0.9, -0.6, 0.1), keys_of(2)
    wide = lambda schedule: two_pixels(schedule, MEAN, np.diag([0.5, 0.7]))

    def up_and_down(solver, times, steps):
        walk = walk_of(name, 1, denoise=wide)._replace(solver=solver, times=times, steps=steps)
        return editing.decode(walk, editing.encode(walk, image, keys), keys)

    for solver, least, most in (("euler", 1.8, 2.2), ("heun", 3.6, 10.0)):
        images_of = [jax.jit(up_and_down)(*walk_of(name, n, solver)[2:]) for n in (20, 40, 80)]
        errors = [float(jnp.abs(got - image).max()) for got in images_of]
        ratios = np.divide(errors[:-1], errors[1:])
        assert np.all((least < ratios) & (ratios < most)), errors


SHIFT = np.array([0.5, -0.3])


def latent_of(name, steps, grid=KARRAS):
    """What images of label l, drawn from N(MEAN + l SHIFT, COVARIANCE), are made from."""

    def walk(condition):
        mean = MEAN + np.asarray(condition.get("label", [0]))[:, None] * SHIFT
        return walk_of(name, steps, grid=grid, denoise=lambda schedule: two_pixels(schedule, mean))

    return Latent(
        shape=(1, 2, 1),
        draw=lambda keys, options: rng.normal(keys, (1, 2, 1)),
        decode=lambda weights, z, keys, condition, options: editing.decode(walk(condition), z, keys),
        encode=lambda weights, image, keys, condition, options: editing.encode(walk(condition), image, keys),
    )


@pytest.mark.parametrize("name", NAMES)
def test_translate_moves_by_the_shift_of_the_means(name, x64):
    """Two labels with N(m_1, C) and N(m_2, C): the flow up under one and down under the other.

    x_T = alpha m_1 + growth (image - m_1), and m_2 + (x_T - alpha m_2) / growth = image + (m_2 - m_1)(1 - alpha/growth)
    """
    latent, labels = latent_of(name, 100), {"source_label": np.zeros(2), "label": np.ones(2)}
    pixels = np.array([[0.5, 0.9], [-0.6, 0.1]])
    run = jax.jit(lambda image: latents.translate(latent, {}, keys_of(2), {"image": image} | labels, {}))
    got = run(images(*pixels.ravel()))
    top = walk_of(name, 100).times[0]
    expected = flow(name, flow(name, pixels, top), None, MEAN + SHIFT, start=top)
    np.testing.assert_allclose(np.asarray(got).reshape(-1, 2), expected, atol=5e-3)
    np.testing.assert_allclose(expected - pixels, [SHIFT, SHIFT], atol=0.05)  # alpha / growth is next to nothing


def test_interpolating_images_passes_from_one_to_the_other(x64):
    """Images that are equally far from the mean, counted in deviations, stay so all along the arc.

    At alpha(1) = 0 the noise of an image is its standardised form, rotated, so that the norm that slerp keeps is that.
    """
    latent = latent_of("rectified_flow", 200, "uniform")
    values, axes = np.linalg.eigh(COVARIANCE)
    first, second = (images(*np.tile(MEAN + 1.2 * np.sqrt(values[i]) * axes[:, i], 3)) for i in (0, 1))
    inputs = {"first": first, "second": second, "seed": np.uint32(0), "share": jnp.asarray([0.0, 1.0, 0.5])}
    got = jax.jit(lambda inputs: latents.interpolate_images(latent, {}, keys_of(3), inputs, {}))(inputs)
    np.testing.assert_allclose(got[:2], jnp.stack([first[0], second[0]]), atol=2e-3)
    np.testing.assert_allclose(standardised(got[2])[0], 1.2 * np.sqrt([0.5, 0.5]), atol=1e-2)


# ------------------------------------------------------------------------------------------ from part of the way


def test_the_grid_begins_at_the_strength_exactly(x64):
    times = jnp.zeros(1001).at[:6].set(jnp.asarray([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]))
    for start, expected in (
        (1.0, [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]),
        (0.8, [0.8, 0.6, 0.4, 0.2, 0.0]),
        (0.7, [0.7, 0.6, 0.4, 0.2, 0.0]),
        (0.1, [0.1, 0.0]),
    ):
        got, steps = editing.begin_at(times, jnp.int32(5), start)
        np.testing.assert_array_equal(got[: int(steps) + 1], expected)
        assert not np.any(got[int(steps) :])
    got, steps = editing.begin_at(0.5 * times, jnp.int32(5), 0.9)  # above the grid's own start
    np.testing.assert_array_equal(got, 0.5 * times)
    assert steps == 5


@pytest.mark.parametrize("name", NAMES)
def test_strength_zero_and_one(name, x64):
    """0 returns the image; 1 is plain sampling to the bit, but for what the schedule leaves of the image in x."""
    walk, image, keys = walk_of(name, 10, grid="uniform"), images(0.5, 0.9, -0.6, 0.1), keys_of(2)
    run = jax.jit(lambda strength: editing.vary(walk, image, strength, noise_of(keys, image), keys))
    np.testing.assert_allclose(run(0.0), image, atol=1e-12)
    np.testing.assert_allclose(run(1e-4), image, atol=0.05)
    noise = noise_of(keys, image)
    one = walk.times[0]
    left = walk.schedule.alpha(one) * image
    plain = jax.jit(lambda x: solve(*walk, x, keys))(left + walk.schedule.sigma(one) * noise)
    np.testing.assert_allclose(run(1.0), plain, rtol=1e-9)
    if name == "rectified_flow":
        assert float(jnp.abs(left).max()) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_vary_has_the_closed_form_mean_and_covariance(name, x64):
    """SDEdit by the flow: out = m + G (alpha (image - m) + sigma z), G = C^1/2 (alpha^2 C + sigma^2)^-1/2.

    So its mean is m + alpha G (image - m), and its covariance sigma^2 G^2. 2048 samples, 4 standard errors.
    """
    n, pixels = 2048, np.array([0.9, 0.1])
    walk = walk_of(name, 60)
    image, keys = jnp.broadcast_to(images(*pixels), (n, 1, 2, 1)), keys_of(n)
    run = jax.jit(lambda strength: editing.vary(walk, image, strength, noise_of(keys, image), keys))
    values, axes = np.linalg.eigh(COVARIANCE)
    for ratio in (0.3, 1.0, 4.0):
        t = walk.schedule.time(jnp.asarray(-2.0 * np.log(ratio)))
        alpha, sigma = float(walk.schedule.alpha(t)), float(walk.schedule.sigma(t))
        gain = axes * np.sqrt(values / (alpha**2 * values + sigma**2)) @ axes.T
        got = np.asarray(run(t)).reshape(n, 2)
        covariance = sigma**2 * gain @ gain
        error = np.sqrt(np.diag(covariance) / n)
        np.testing.assert_array_less(np.abs(got.mean(0) - MEAN - alpha * gain @ (pixels - MEAN)), 4 * error + 2e-3)
        np.testing.assert_allclose(np.cov(got.T), covariance, atol=4 * np.sqrt(2 / n) * covariance.max() + 2e-3)


# ------------------------------------------------------------------------------------------ part of the pixels


KNOWN = 0.9
POSTERIOR_MEAN = MEAN[1] + COVARIANCE[0, 1] / COVARIANCE[0, 0] * (KNOWN - MEAN[0])  # of the right pixel: 0.656
POSTERIOR_VARIANCE = COVARIANCE[1, 1] - COVARIANCE[0, 1] ** 2 / COVARIANCE[0, 0]  # 0.0684


@functools.cache
def inpainting(n):
    """(solver, times, steps, resamplings) -> images [n,2], the left pixel known; compiled once for all of them."""
    schedule = SCHEDULES["rectified_flow"]()
    image = jnp.broadcast_to(images(KNOWN, 7.0), (n, 1, 2, 1))
    known = jnp.broadcast_to(jnp.asarray([True, False]).reshape(1, 1, 2, 1), image.shape)

    @jax.jit
    def run(solver, times, steps, resamplings):
        walk = Walk(two_pixels(schedule), schedule, solver, times, steps)
        return editing.inpaint(walk, image, known, noise_of(keys_of(n), image), keys_of(n), resamplings).reshape(n, 2)

    return run


def moments(times, variance, resamplings):
    """Mean and variance of the right pixel after `inpaint`, from the papers' steps in NumPy.

    One step of DDPM, x_s = alpha_s x0 + sqrt(r) sigma_s eps + noise (Ho et al. 2020), is affine in x_t; the left pixel
    is alpha_s y + sigma_s z, drawn anew, and so independent of the right one: two numbers say it all.
    """
    schedule, C = SCHEDULES["rectified_flow"](), COVARIANCE
    at = lambda c: [float(c(jnp.float64(t))) for t in times]
    alpha, sigma = at(schedule.alpha), at(schedule.sigma)
    mean, spread = np.zeros(2), np.full(2, sigma[0] ** 2)
    for i in range(len(times) - 1):
        a_t, s_t, a_s, s_s = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        r = (a_t * s_s / (a_s * s_t)) ** 2
        noise = np.sqrt(1 - r) * {0.0: s_s, 1.0: s_t}[variance] * (s_s > 0)
        precision = np.linalg.inv(a_t**2 * C + s_t**2 * np.eye(2))
        slope = (a_s * a_t * C + np.sqrt(r) * s_s * s_t * np.eye(2)) @ precision
        for j in range(resamplings if s_s > 0 else 1):
            if j:
                mean, spread = a_t / a_s * mean, (a_t / a_s) ** 2 * spread + s_t**2 - (a_t / a_s * s_s) ** 2
            after = a_s * MEAN + slope @ (mean - a_t * MEAN)
            mean = np.array([a_s * KNOWN, after[1]])
            spread = np.array([s_s**2, slope[1] ** 2 @ spread + noise**2])
    return mean[1], spread[1]


def grid_of(steps, grid=KARRAS):
    """The stops of the walks below."""
    return np.asarray(walk_of("rectified_flow", steps, grid=grid).times[: steps + 1])


def sampled(variance, steps, resamplings, n=1024, grid=KARRAS):
    """Mean and variance of the right pixel over n samples."""
    walk = walk_of("rectified_flow", steps, f"ddpm(variance={variance})", grid)
    got = np.asarray(inpainting(n)(walk.solver, walk.times, walk.steps, jnp.asarray(resamplings)))
    np.testing.assert_array_equal(got[:, 0], KNOWN)
    return got[:, 1].mean(), got[:, 1].var()


@pytest.mark.parametrize(
    ("variance", "steps", "resamplings", "grid"),
    [(1.0, 30, 1, KARRAS), (1.0, 30, 4, KARRAS), (0.0, 12, 3, KARRAS), (0.0, 6, 12, "uniform")],
)
def test_inpainting_has_the_moments_of_the_papers_steps(variance, steps, resamplings, grid, x64):
    """1024 samples, 4 standard errors. The long last step of the uniform grid would show if it were repeated."""
    expected_mean, expected_variance = moments(grid_of(steps, grid), variance, resamplings)
    mean, variance = sampled(variance, steps, resamplings, grid=grid)
    assert abs(mean - expected_mean) < 4 * np.sqrt(expected_variance / 1024)
    np.testing.assert_allclose(variance, expected_variance, rtol=4 * np.sqrt(2 / 1024))


def test_many_resamplings_approach_the_conditional(x64):
    """E and Var of the right pixel given the left one, (0.656, 0.0684), by the recursion that the test above confirms.

    Plain replacement stays more than a deviation off in the mean, and at nearly twice the variance, however many steps
    there are. With the smaller of DDPM's variances many resamplings find the mean, but make the spread too small.
    """
    off = lambda mean: abs(mean - POSTERIOR_MEAN) / np.sqrt(POSTERIOR_VARIANCE)
    errors = [off(moments(grid_of(30), 1.0, resamplings)[0]) for resamplings in (1, 4, 16, 64, 1000)]
    assert np.all(np.diff(errors) < 0.0)
    mean, variance = moments(grid_of(30), 1.0, 1000)
    assert off(mean) < 0.01
    np.testing.assert_allclose(variance, POSTERIOR_VARIANCE, rtol=0.01)
    for steps in (30, 300):
        mean, variance = moments(grid_of(steps), 1.0, 1)
        assert off(mean) > 1.0
        assert variance > 1.8 * POSTERIOR_VARIANCE
    mean, variance = moments(grid_of(30), 0.0, 1000)
    assert off(mean) < 0.01
    assert variance < 0.8 * POSTERIOR_VARIANCE


def test_samples_of_the_conditional(x64):
    """512 samples within 4 standard errors of the analytic conditional, and those of plain replacement far outside."""
    error = np.sqrt(POSTERIOR_VARIANCE / 512)
    mean, variance = sampled(1.0, 20, 40, 512)
    assert abs(mean - POSTERIOR_MEAN) < 4 * error
    assert abs(variance / POSTERIOR_VARIANCE - 1.0) < 4 * np.sqrt(2 / 512)
    mean, variance = sampled(1.0, 20, 1, 512)
    assert abs(mean - POSTERIOR_MEAN) > 15 * error
    assert abs(variance / POSTERIOR_VARIANCE - 1.0) > 8 * np.sqrt(2 / 512)


@pytest.mark.parametrize(
    ("name", "solver"),
    [("vp_linear", "ddpm"), ("edm", "heun"), ("rectified_flow", "ddpm"), ("rectified_flow", "dpmpp_2m")],
)
def test_known_pixels_are_kept_and_the_others_finite(name, solver):
    """To the bit, with one mask an image and channel; what stands in the unknown pixels is not looked at."""
    walk = walk_of(name, 5, solver, "uniform", dtype=jnp.float32)
    image = jax.random.normal(jax.random.key(3), (3, 1, 2, 1))
    known = jnp.asarray([True, False, False, True, True, True]).reshape(3, 1, 2, 1)
    run = jax.jit(
        lambda image: editing.inpaint(walk, image, known, noise_of(keys_of(3), image), keys_of(3), jnp.int32(2))
    )
    got = run(image)
    np.testing.assert_array_equal(got[known], image[known])
    assert np.all(np.isfinite(got))
    assert not np.any(got[~known] == image[~known])
    np.testing.assert_array_equal(run(jnp.where(known, image, 9.0)), got)


# ------------------------------------------------------------------------------------------ the machine


def test_strengths_resamplings_steps_and_seeds_do_not_compile_again():
    traces, walk = [], walk_of("cosine", 4, "ddpm", "uniform", dtype=jnp.float32)
    image, known = images(0.5, 0.9, -0.6, 0.1), jnp.asarray([True, False] * 2).reshape(2, 1, 2, 1)

    @jax.jit
    def run(times, steps, strength, resamplings, keys):
        traces.append(1)
        of = walk._replace(times=times, steps=steps)
        return editing.vary(of, image, strength, noise_of(keys, image), keys), editing.inpaint(
            of, image, known, noise_of(keys, image), keys, resamplings
        )

    results = []
    for steps, strength, resamplings, seed in (
        (4, 0.5, 1, 0),
        (4, 0.5, 1, 0),
        (4, 0.7, 2, 0),
        (6, 0.7, 2, 0),
        (6, 0.7, 2, 1),
    ):
        times = GRIDS["uniform"]()(walk.schedule, jnp.int32(steps))
        results.append(run(times, jnp.int32(steps), jnp.float32(strength), jnp.int32(resamplings), keys_of(2, seed)))
    assert len(traces) == 1
    np.testing.assert_array_equal(results[0], results[1])
    for before, after in itertools.pairwise(results[1:]):
        assert not np.allclose(before[0], after[0])
        assert not np.allclose(before[1], after[1])


def test_an_image_depends_on_its_own_row_and_key():
    walk = walk_of("cosine", 4, "ddpm", "uniform", dtype=jnp.float32)
    known = jnp.asarray([True, False] * 3).reshape(3, 1, 2, 1)

    @jax.jit
    def run(image, keys):
        return editing.vary(walk, image, 0.6, noise_of(keys, image), keys), editing.inpaint(
            walk, image, known, noise_of(keys, image), keys, 2
        )

    keys, image = keys_of(3), images(0.5, 0.9, -0.6, 0.1, 0.5, 0.9)
    whole = run(image, keys)
    others = run(image.at[0].set(5.0), keys.at[0].set(jax.random.key(7)))
    for a, b in zip(whole, others, strict=True):
        np.testing.assert_allclose(a[1:], b[1:], rtol=1e-5)
        assert not np.allclose(a[0], a[2])  # same image, other keys


@pytest.mark.parametrize("edit", ["img2img", "inpaint"])
def test_an_edit_draws_other_noise_than_the_sampler_by_the_same_seed(edit, monkeypatch):
    """By its own noise a sample would be led back to itself: no variation."""
    drawn = {}
    monkeypatch.setattr(editing, "vary", lambda walk, image, strength, noise, keys: drawn.update(edit=noise) or image)
    monkeypatch.setattr(editing, "inpaint", lambda walk, image, known, noise, *rest: drawn.update(edit=noise) or image)
    section = {"name": "diffusion", "network": "dit(width=32,depth=1,heads=2)"}
    family = families.build(section, ImageSpec(size=8, channels=1, num_classes=0), "float32")
    monkeypatch.setattr(editing, "decode", lambda walk, noise, keys: drawn.update(sample=noise) or noise)
    weights, keys = jax.jit(family.init)(jax.random.key(0))[0], rng.example_keys(jax.random.key(0), jnp.arange(2))
    options, image = family.sampling({}), jnp.zeros((2, 8, 8, 1))
    inputs = {"image": image, "strength": jnp.float32(0.5), "known": image > 0.0, "resamplings": jnp.int32(1)}
    family.edits[edit](weights, keys, inputs, options)
    family.generate(weights, keys, {}, options)
    assert abs(np.corrcoef(np.ravel(drawn["edit"]), np.ravel(drawn["sample"]))[0, 1]) < 0.4
