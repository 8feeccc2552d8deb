"""What the changes of images must leave as it is, what they do exactly, and what ADA's controller does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import plugs
from diffusion_jax.adversarial import augment
from diffusion_jax.adversarial.augment import AUGMENTATIONS, POLICIES
from diffusion_jax.errors import UserError

ALL = ("ada", "diffaugment")


pytestmark = pytest.mark.usefixtures("quick_compilation")


def built(text):
    return plugs.build("family.augmentation", text, AUGMENTATIONS)


@functools.cache
def changing(text):
    return jax.jit(built(text))


def images(n=6, size=8, channels=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (n, size, size, channels)), jnp.float32)


def keys(n=6, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def many(change, image, n=64):
    """What a change of one image makes of it by n keys: [n,H,W,C]."""
    return np.asarray(jax.jit(jax.vmap(lambda key: change(image, key)))(keys(n)))


# ------------------------------------------------------------------------------------------ all of them


@pytest.mark.parametrize(("text", "channels"), [("ada", 3), ("ada", 1), ("diffaugment", 3)])
def test_p_0_is_the_identity_to_the_bit(text, channels):
    x = images(channels=channels)
    np.testing.assert_array_equal(changing(text)(x, keys(), jnp.float32(0.0)), x)


@pytest.mark.parametrize("text", ALL)
def test_each_image_is_changed_by_its_own_key_alone(text):
    x, order = images(), np.array([3, 1, 5, 0, 2, 4])
    changed = changing(text)(x, keys(), jnp.float32(1.0))
    assert np.mean([np.allclose(a, b) for a, b in zip(changed, x, strict=True)]) < 0.5
    np.testing.assert_allclose(changing(text)(x[order], keys()[order], jnp.float32(1.0)), changed[order], atol=1e-6)
    same = changing(text)(jnp.stack([x[0]] * 6), keys(), jnp.float32(1.0))
    assert len(np.unique(np.asarray(same).reshape(6, -1), axis=0)) > 3


@pytest.mark.parametrize("text", ALL)
def test_gradients_pass_through(text):
    """T is affine in the image: what its derivative says of a finite change is exact; and it reaches every image."""
    x, direction, weight = images(seed=1), images(seed=2), images(seed=3)
    change = lambda x: changing(text)(x, keys(), jnp.float32(1.0))
    towards = jax.grad(lambda x: jnp.sum(weight * change(x)))(x)
    difference = change(x + direction) - change(x)
    np.testing.assert_allclose(jnp.sum(towards * direction), jnp.sum(weight * difference), rtol=1e-4)
    assert np.all(np.abs(towards).max((1, 2, 3)) > 0.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ada(target=1.0)", "target"),
        ("ada(images=0)", "images"),
        ("ada(start=1.5)", "start"),
        ("ada(blit=False,geometry=False,color=False)", "one of blit, geometry and color"),
        ("diffaugment(policy='colour')", "policy must be of color"),
        ("diffaugment(start=-1.0)", "start"),
        ("adda", "did you mean 'ada'"),
    ],
)
def test_impossible_augmentations_are_refused(text, says):
    with pytest.raises(UserError, match=says):
        built(text)


# ------------------------------------------------------------------------------------------ DiffAugment


def test_brightness_adds_one_number():
    x = images()[0]
    added = many(augment.brightness, x) - np.asarray(x)
    np.testing.assert_allclose(added, added[:, :1, :1, :1] * np.ones_like(added), atol=1e-6)
    assert -0.5 <= added.min() < -0.3 < 0.3 < added.max() < 0.5


def test_saturation_keeps_a_pixels_mean_and_contrast_the_images():
    x = np.asarray(images()[0], np.float64)
    rows = ((augment.saturation, -1, (0.0, 2.0)), (augment.contrast, (0, 1, 2), (0.5, 1.5)))
    for change, axes, (least, most) in rows:
        changed, mean = many(change, images()[0]), x.mean(axes, keepdims=True)
        per_image = tuple(axis + 1 for axis in axes) if isinstance(axes, tuple) else axes
        np.testing.assert_allclose(changed.mean(per_image, keepdims=True) - mean, 0.0, atol=1e-6)
        factors = np.sum((changed - mean) * (x - mean), (1, 2, 3)) / np.sum((x - mean) ** 2)
        np.testing.assert_allclose(changed - mean, factors[:, None, None, None] * (x - mean), atol=1e-5)
        assert least <= factors.min() < least + 0.2 < most - 0.2 < factors.max() <= most


@pytest.mark.parametrize(("size", "most"), [(4, 1), (7, 1), (12, 2), (16, 2), (28, 4)])
def test_translation_is_a_shift_by_up_to_an_eighth_into_zeros(size, most):
    """By -most to most, down and right, cut out of an image with a rim of zeros. 7 / 8, 12 / 8 and 28 / 8 round up."""
    x, count = images(size=size)[0], 2 * most + 1
    padded = np.pad(x, ((most, most), (most, most), (0, 0)))
    places = [(i, j) for i in range(count) for j in range(count)]
    shifts = {padded[i : i + size, j : j + size].tobytes(): (i, j) for i, j in places}
    seen = {shifts[changed.tobytes()] for changed in many(augment.translation, x, n=300)}
    for axis in (0, 1):
        assert {place[axis] for place in seen} == set(range(count))


@pytest.mark.parametrize(("size", "least", "most"), [(4, 1, 2), (7, 2, 4), (8, 2, 4), (28, 7, 14)])
def test_cutout_takes_one_rectangle_of_up_to_half_of_each_side(size, least, most):
    x = images(size=size)[0]
    changed = many(augment.cutout, x, n=300)
    kept = (changed == np.asarray(x)).all(-1)
    assert np.all((changed == 0.0).all(-1) | kept)
    heights, widths = (~kept).any(2).sum(1), (~kept).any(1).sum(1)
    np.testing.assert_array_equal(heights * widths, (~kept).sum((1, 2)))  # all of a rectangle
    for sides in (heights, widths):
        assert (sides.min(), sides.max()) == (least, most)  # an outermost centre leaves half of it outside


def test_policies_are_applied_together():
    """With cutout and translation alone, pixels are as they were, or 0."""
    x = images()
    changed = np.asarray(jax.jit(built("diffaugment(policy='translation,cutout')"))(x, keys(), jnp.float32(1.0)))
    assert np.all(np.isin(changed, np.append(np.asarray(x).ravel(), 0.0)))
    assert set(POLICIES) == {"color", "translation", "cutout"}


# ------------------------------------------------------------------------------------------ ADA's blitting and geometry


def test_quarter_turns():
    """NumPy's; four of them are the identity."""
    x = images()[0]
    for quarters in range(4):
        np.testing.assert_array_equal(augment.turned(x, jnp.int32(quarters)), np.rot90(x, quarters))
    again = x
    for _ in range(4):
        again = augment.turned(again, jnp.int32(1))
    np.testing.assert_array_equal(again, x)


@pytest.mark.parametrize("shift", [(0, 0), (1, 0), (-2, 1), (0, -1)])
def test_whole_shifts_move_pixels_exactly(shift):
    """And mirror the image at its outer pixels, as np.pad does."""
    x, (down, right) = images()[0], shift
    padded = np.pad(x, ((2, 2), (2, 2), (0, 0)), mode="reflect")
    expected = padded[2 - down : 10 - down, 2 - right : 10 - right]
    np.testing.assert_array_equal(augment.shifted(x, jnp.int32(shift)), expected)
    read = augment.resampled(x, jnp.eye(2), jnp.float32(shift))
    np.testing.assert_allclose(read, expected, atol=1e-6)


def test_blitting_moves_pixels_and_changes_none():
    """Turned and mirrored, an image keeps its mean and all its pixels. What is shifted in is one of them, too."""
    x = images()[0]
    blitted = many(lambda x, key: augment.blitted(x, key, jnp.float32(1.0)), x, n=200)
    assert np.all(np.isin(blitted, np.asarray(x)))
    symmetries = [np.rot90(m, k) for m in (np.asarray(x), np.asarray(x)[:, ::-1]) for k in range(4)]
    whole = [image for image in blitted if np.array_equal(np.sort(image.ravel()), np.sort(np.asarray(x).ravel()))]
    np.testing.assert_allclose(np.mean(whole, (1, 2, 3)), np.mean(x), atol=1e-6)
    found = {i for image in whole for i, other in enumerate(symmetries) if np.array_equal(image, other)}
    assert found == set(range(8))


def test_a_turn_by_resampling_is_a_turn_of_the_pixels():
    """By 90 degrees about the centre, up to rounding; and turns add up."""
    x = images()[0]
    quarter = augment.resampled(x, augment.turn(jnp.float32(np.pi / 2)), jnp.zeros(2))
    expected = [np.rot90(x, k) for k in (1, 3)]
    assert min(np.abs(quarter - e).max() for e in expected) < 1e-5
    one, two = jnp.float32(0.4), jnp.float32(1.1)
    np.testing.assert_allclose(augment.turn(one) @ augment.turn(two), augment.turn(one + two), atol=1e-6)


def test_resampling_is_exact_on_a_ramp():
    """Bilinear reading of a + b y + c x, with y and x from the centre, at any place within the image."""
    y, x = np.mgrid[:9, :9] - 4.0
    ramp = jnp.asarray(0.3 + 0.1 * y - 0.2 * x, jnp.float32)[..., None]
    to_source = np.array([[0.5, 0.2], [-0.1, 0.6]])
    shift = np.array([0.3, -0.7])
    source = np.einsum("ij,jhw->ihw", to_source, np.stack([y, x]) - shift[:, None, None])
    read = augment.resampled(ramp, jnp.asarray(to_source, jnp.float32), jnp.asarray(shift, jnp.float32))
    inside = np.all(np.abs(source) <= 4.0, axis=0)
    np.testing.assert_allclose(
        np.asarray(read)[inside, 0], (0.3 + 0.1 * source[0] - 0.2 * source[1])[inside], atol=1e-5
    )
    assert np.mean(inside) > 0.8


def test_the_share_of_images_that_geometry_leaves():
    """Scale, stretch, shift and a turn, each with p: (1 - p)^4 of the images are as they were."""
    n, p, x = 3000, 0.2, images(size=4, channels=1)[0]
    warped = many(lambda x, key: augment.warped(x, key, jnp.float32(p)), x, n)
    share = np.mean(np.all(warped == np.asarray(x), axis=(1, 2, 3)))
    assert abs(share - 0.8**4) < 4 * np.sqrt(0.8**4 * (1 - 0.8**4) / n)


# ------------------------------------------------------------------------------------------ ADA's colour


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_stays_grey_and_differences_keep_their_shape(channels):
    """Brightness, contrast and inverted luma are affine in a grey image; hue and saturation leave it."""
    grey = jnp.repeat(images(channels=1)[0], channels, axis=-1)
    changed = many(lambda x, key: augment.recoloured(x, key, jnp.float32(1.0)), grey)
    np.testing.assert_allclose(changed, np.repeat(changed[..., :1], channels, -1), atol=1e-5)
    x = np.asarray(grey)[..., 0].ravel()
    for image in changed:
        slope, offset = np.polyfit(x, image[..., 0].ravel(), 1)
        np.testing.assert_allclose(slope * x + offset, image[..., 0].ravel(), atol=1e-5)
    slopes = [np.polyfit(x, image[..., 0].ravel(), 1)[0] for image in changed]
    assert min(slopes) < -0.5 < 0.5 < max(slopes)


def test_hue_is_a_rotation_about_grey():
    """Orthogonal, of determinant 1, grey stays; a third of a circle exchanges the channels; angles add up."""
    turn = np.asarray(augment.hue(jnp.float32(0.7)), np.float64)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(turn), 1.0, atol=1e-6)
    np.testing.assert_allclose(turn @ np.ones(3), np.ones(3), atol=1e-6)
    third = np.asarray(augment.hue(jnp.float32(2 * np.pi / 3)))
    np.testing.assert_allclose(third, np.roll(np.eye(3), 1, axis=0), atol=1e-6)
    np.testing.assert_allclose(augment.hue(jnp.float32(1.4)), turn @ turn, atol=1e-6)


# ------------------------------------------------------------------------------------------ ADA's controller


def steps(ada, signal, count, batch=20):
    """p after each step on logits of which E sign is signal(p): the share of positive ones is (1 + signal) / 2."""
    control, seen = augment.begin(ada), []
    for step in range(count):
        control = ada.adapt(control, jnp.int32(step))
        positive = round(batch * (1.0 + signal(float(control.p))) / 2.0)
        logits = jnp.where(jnp.arange(batch) < positive, 2.5, -0.5)
        control = augment.observe(control, logits)
        seen.append(float(control.p))
    return np.array(seen)


def test_p_rises_under_overfitting_at_the_speed_that_is_asked_for():
    """r_t = 1 throughout: from 0 to 1 in `images` images, by steps of `every`; and no further."""
    seen = steps(built("ada(images=400,every=4)"), lambda p: 1.0, 40)
    expected = np.minimum(np.arange(40) // 4 * 80 / 400, 1.0)
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_p_falls_where_nothing_is_overfitted():
    seen = steps(built("ada(images=400,every=2,start=0.5)"), lambda p: 0.0, 40)
    np.testing.assert_allclose(seen, np.maximum(0.5 - np.arange(40) // 2 * 40 / 400, 0.0), atol=1e-6)


@pytest.mark.parametrize("target", [0.6, 0.2])
def test_p_settles_where_the_signal_meets_the_target(target):
    """r_t = 1 - p, which augmentation lowers: p ends within one move of 1 - target."""
    seen = steps(built(f"ada(images=2000,every=2,target={target})"), lambda p: 1.0 - p, 200, batch=40)
    assert np.all(np.abs(seen[-40:] - (1.0 - target)) <= 2 * 80 / 2000 + 1e-6)


def test_r_t_is_the_mean_sign():
    control = augment.observe(augment.begin(built("ada")), jnp.float32([3.0, -0.1, 0.2, 5.0]))
    control = augment.observe(control, jnp.float32([-3.0, -0.1, -0.2, -5.0]))
    np.testing.assert_allclose(control.overfitting, (3 - 1 - 4) / 8)
