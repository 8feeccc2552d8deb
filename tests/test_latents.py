"""Walks in latents, on toys whose decoders and encoders are known in closed form, and on the diffusion family."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import families, latents, rng
from diffusion_jax.errors import UserError
from diffusion_jax.types import Family, ImageSpec, Latent

SHAPE = (2, 3, 1)
WIDTH = 6
MATRIX = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)) + 3.0 * np.eye(WIDTH)
SHIFTS = np.random.default_rng(1).normal(size=(4, *SHAPE))  # one a label


pytestmark = pytest.mark.usefixtures("quick_compilation")


def toy(noise=0.0):
    """image = A z + shift of the label + noise e, with e drawn in decoding; encoding draws noise of its own."""
    shift = lambda condition: jnp.asarray(SHIFTS, jnp.float32)[condition["label"]]
    dot = lambda matrix, x: (x.reshape(-1, WIDTH) @ jnp.asarray(matrix.T, jnp.float32)).reshape(-1, *SHAPE)
    drawn = lambda keys, place: noise * rng.normal(rng.fold(keys, place), SHAPE)
    return Latent(
        shape=SHAPE,
        draw=lambda keys, options: options * rng.normal(rng.fold(keys, 0), SHAPE),
        decode=lambda weights, z, keys, label, options: dot(MATRIX, z) + shift(label) + drawn(keys, 1),
        encode=lambda weights, x, keys, label, options: dot(np.linalg.inv(MATRIX), x - shift(label)) + drawn(keys, 2),
    )


def identity():
    """The image is the latent; there is no label."""
    return Latent(
        shape=SHAPE,
        draw=lambda keys, options: options * rng.normal(rng.fold(keys, 0), SHAPE),
        decode=lambda weights, z, keys, condition, options: z,
        encode=lambda weights, image, keys, condition, options: image,
    )


def generate(latent, keys, condition):
    """As the contract of `Latent` has it."""
    return latent.decode({}, latent.draw(keys, 1.5), keys, condition, 1.5)


def run(walk, latent, inputs, count, seed=0):
    """The images of the sampler's keys, at temperature 1.5."""
    keys = rng.sample_keys(jnp.uint32(seed), jnp.arange(count))
    return jax.jit(lambda keys, inputs: latents.WALKS[walk](latent, {}, keys, inputs, 1.5))(keys, inputs)


def pictures(count, seed=5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, *SHAPE)), jnp.float32)


# ------------------------------------------------------------------------------------------ there and back


def test_reconstruction_where_the_encoder_is_the_inverse():
    image, label = pictures(3), jnp.asarray([0, 3, 1])
    np.testing.assert_allclose(run("reconstruct", toy(), {"image": image, "label": label}, 3), image, atol=1e-5)
    assert not np.allclose(run("reconstruct", toy(0.1), {"image": image, "label": label}, 3), image, atol=0.05)


def test_translation_moves_by_the_difference_of_the_labels():
    image, source, target = pictures(3), jnp.asarray([0, 3, 1]), jnp.asarray([2, 3, 0])
    inputs = {"image": image, "source_label": source, "label": target}
    moved = image + (SHIFTS[target] - SHIFTS[source]).astype(np.float32)
    np.testing.assert_allclose(run("translate", toy(), inputs, 3), moved, atol=1e-5)


def test_encoding_and_decoding_draw_different_noise():
    """With A = 1 and one stream for both, the reconstruction would be the image plus twice one noise."""
    draws = lambda keys: rng.normal(keys, SHAPE)
    latent = Latent(
        shape=SHAPE,
        draw=lambda keys, options: draws(keys),
        decode=lambda weights, z, keys, condition, options: z - draws(keys),
        encode=lambda weights, image, keys, condition, options: image + draws(keys),
    )
    image = jnp.zeros((400, *SHAPE))
    np.testing.assert_allclose(np.var(run("reconstruct", latent, {"image": image}, 400)), 2.0, rtol=0.15)


# ------------------------------------------------------------------------------------------ between two ends


@pytest.mark.parametrize("shape", [(9,), (3, 3, 1)])
def test_slerp_ends_and_norms(shape):
    a, b = jax.random.normal(jax.random.key(0), (2, 4, *shape))
    flat = lambda x: np.asarray(x, np.float64).reshape(4, -1)
    norm = lambda x: np.linalg.norm(flat(x), axis=1)
    b = b * (norm(a) / norm(b)).reshape(4, *(1 for _ in shape)).astype(np.float32)
    np.testing.assert_allclose(latents.slerp(a, b, 0.0), a, atol=1e-6)
    np.testing.assert_allclose(latents.slerp(a, b, 1.0), b, atol=1e-6)
    for share in (0.2, 0.5, 0.9):
        between = latents.slerp(a, b, share)
        np.testing.assert_allclose(norm(between), norm(a), rtol=1e-6)
        angle = lambda u, v: np.arccos(np.sum(flat(u) * flat(v), axis=1) / norm(u) / norm(v))
        np.testing.assert_allclose(angle(a, between), share * angle(a, b), rtol=1e-5)  # at equal speed
        assert np.all(norm((1 - share) * a + share * b) < 0.99 * norm(a))  # the straight line's
    own = latents.slerp(a, b, jnp.asarray([0.0, 0.2, 0.5, 0.9]))
    for i, share in enumerate((0.0, 0.2, 0.5, 0.9)):
        np.testing.assert_allclose(own[i], latents.slerp(a, b, share)[i], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_slerp_of_equal_and_opposite_latents_is_finite(dtype):
    a = jax.random.normal(jax.random.key(0), (2, 3, 3, 1), dtype)
    np.testing.assert_allclose(latents.slerp(a, a, 0.3).astype(jnp.float32), a.astype(jnp.float32), rtol=2e-2)
    assert np.all(np.isfinite(latents.slerp(a, -a, 0.3).astype(jnp.float32)))
    assert latents.slerp(a, -a, 0.3).dtype == dtype


def test_slerp_with_nothing_is_finite():
    """A posterior that is its prior has a mean of exactly 0."""
    a = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
    assert np.all(np.isfinite(latents.slerp(a, 0.0 * a, 0.3)))
    np.testing.assert_array_equal(latents.slerp(0.0 * a, 0.0 * a, 0.3), 0.0 * a)


SHARES = jnp.asarray([0.0, 0.25, 0.75, 1.0])


def along_the_arc(first, second, share):
    """Shoemake 1985 for one pair, in NumPy."""
    theta = np.arccos(np.sum(first * second) / np.linalg.norm(first) / np.linalg.norm(second))
    return (np.sin((1 - share) * theta) * first + np.sin(share * theta) * second) / np.sin(theta)


def test_between_seeds_the_ends_are_what_is_generated():
    """With noise in decoding, too, which on the way is that of the nearer end; the temperature counts."""
    latent, label = toy(0.3), jnp.asarray([2] * 4)
    inputs = {"first": jnp.uint32(7), "second": jnp.uint32(8), "share": SHARES, "label": label}
    got = run("interpolate_seeds", latent, inputs, 4)
    ends = [rng.sample_keys(jnp.uint32(seed), jnp.arange(1)) for seed in (7, 8)]
    alone = jnp.concatenate([generate(latent, end, {"label": label[:1]}) for end in ends])
    np.testing.assert_allclose(got[jnp.asarray([0, 3])], alone, rtol=1e-5, atol=1e-6)
    first, second = (np.asarray(latent.draw(end, 1.5)[0], np.float64).ravel() for end in ends)
    for i, end in ((1, ends[0]), (2, ends[1])):
        noise = 0.3 * np.asarray(rng.normal(rng.fold(end, 1), SHAPE)[0])
        expected = (MATRIX @ along_the_arc(first, second, float(SHARES[i]))).reshape(SHAPE) + SHIFTS[2] + noise
        np.testing.assert_allclose(got[i], expected, rtol=1e-4, atol=1e-4)


def test_between_images_the_ends_are_their_reconstructions():
    """Of an encoder and a decoder that draw noise, by the same seed; the middle is the arc's between exact latents.

    Each end is encoded under its own label, and each frame decoded under the one that it is given.
    """
    image, labels = pictures(2), jnp.asarray([1, 3])
    first, second = (jnp.broadcast_to(each, (4, *SHAPE)) for each in image)
    inputs = {"first": first, "second": second, "share": SHARES, "label": jnp.repeat(labels, 2), "seed": jnp.uint32(3)}
    inputs |= {"first_label": jnp.full(4, 1), "second_label": jnp.full(4, 3)}
    alone = run("reconstruct", toy(0.3), {"image": image, "label": labels}, 2, seed=3)
    got = run("interpolate_images", toy(0.3), inputs, 4, seed=3)
    np.testing.assert_allclose(got[jnp.asarray([0, 3])], alone, rtol=1e-5, atol=1e-6)
    inverse = np.linalg.inv(MATRIX)
    shifted = zip(np.asarray(image, np.float64), SHIFTS[labels], strict=True)
    of_ends = [inverse @ (each - shift).ravel() for each, shift in shifted]
    expected = (MATRIX @ along_the_arc(*of_ends, 0.25)).reshape(SHAPE) + SHIFTS[1]
    np.testing.assert_allclose(run("interpolate_images", toy(), inputs, 4)[1], expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------ along one dimension


def test_a_traversal_changes_its_dimension_and_nothing_else():
    """Of image 0 of the seed, then of the given images; an index into the flattened latent."""
    dimension, value = jnp.asarray([0, 4, 4, 5]), jnp.asarray([-3.0, 0.0, 2.5, 1.0])
    inputs = {"index": jnp.asarray([0, 0, 1, 1]), "dimension": dimension, "value": value, "seed": jnp.uint32(9)}
    drawn = generate(identity(), rng.sample_keys(jnp.uint32(9), jnp.asarray([0, 0, 1, 1])), {})
    for image, more in ((drawn, {}), (pictures(4), {"image": pictures(4)})):
        expected = np.array(image).reshape(4, WIDTH)
        expected[np.arange(4), dimension] = value
        got = run("traverse", identity(), inputs | more, 4)
        np.testing.assert_allclose(got, expected.reshape(4, *SHAPE), rtol=1e-6)


@pytest.mark.parametrize("given", [False, True], ids=["seed", "image"])
def test_along_a_traversal_nothing_else_is_drawn_anew(given):
    """image = A z + ...: so two values of dimension d lie A[:, d] (b - a) apart, whatever else has been drawn."""
    inputs = {
        "index": jnp.zeros(4, jnp.int32),
        "dimension": jnp.full(4, 2),
        "value": jnp.asarray([-1.0, 0.0, 1.0, 2.0]),
        "seed": jnp.uint32(9),
        "label": jnp.asarray([3] * 4),
    }
    if given:
        inputs["image"] = jnp.broadcast_to(pictures(1), (4, *SHAPE))
    got = np.asarray(run("traverse", toy(0.3), inputs, 4)).reshape(4, WIDTH)
    np.testing.assert_allclose(np.diff(got, axis=0), np.tile(MATRIX[:, 2], (3, 1)), atol=1e-5)


# ------------------------------------------------------------------------------------------ families


def family_with(latent):
    return Family(name="toyish", players=(), init=None, generate=None, sampling=None, latent=latent)


def test_a_family_without_latent_or_encoder_is_refused_by_name():
    one_way = Latent(shape=SHAPE, draw=identity().draw, decode=identity().decode)
    assert latents.latent_of(family_with(one_way), "--edit", "interpolate", encodes=False) is one_way
    with pytest.raises(UserError, match=r"^--edit = 'translate': the family toyish has no encoder.*\.$"):
        latents.latent_of(family_with(one_way), "--edit", "translate", encodes=True)
    with pytest.raises(UserError, match=r"^--workdir = 'x': the family toyish has no latent"):
        latents.latent_of(family_with(None), "--workdir", "x", encodes=False)


@pytest.fixture(scope="module")
def diffusion():
    """(family, weights drawn at random, options): a network whose output is not 0."""
    section = {"name": "diffusion", "network": "dit(patch=4,width=16,depth=1,heads=2)"}
    family = families.build(section, ImageSpec(size=8, channels=1, num_classes=3), "float32")
    generator = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(0.2 * generator.normal(size=leaf.shape), leaf.dtype)
    weights = jax.tree.map(draw, jax.eval_shape(family.init, jax.random.key(0))[0])
    return family, weights, family.sampling({"steps": 100, "threshold": "none", "temperature": 0.7})


def test_diffusions_latent_is_the_noise_that_generation_begins_with(diffusion):
    """generate == decode(draw) to the bit, in programs of their own, and encode leads back to the noise."""
    family, weights, options = diffusion
    latent, condition = family.latent, {"label": jnp.asarray([0, 2, 1, 0])}
    keys = rng.sample_keys(jnp.uint32(4), jnp.arange(4))
    z = jax.jit(latent.draw)(keys, options)
    assert z.shape == (4, *latent.shape)
    np.testing.assert_allclose(np.std(z), 0.7, rtol=0.15)
    images = jax.jit(latent.decode)(weights, z, keys, condition, options)
    np.testing.assert_array_equal(images, jax.jit(family.generate)(weights, keys, condition, options))
    inside = jnp.clip(0.5 * images, -1.0, 1.0)
    again = jax.jit(latent.encode)(weights, inside, keys, condition, options)
    back = jax.jit(latent.decode)(weights, again, keys, condition, options)
    np.testing.assert_allclose(back, inside, atol=0.01)
