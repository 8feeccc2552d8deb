"""What the two players of a GAN minimise, an example at a time.

    discriminator: mean of l_D(D(x_i), D(G(z_i)))        generator: mean of l_G(D(x_i), D(G(z_i)))

with logits D, large for real images x_i. softplus(a) = log(1 + e^a) is -log of the sigmoid of -a.
"""

from typing import Protocol

import jax

from diffusion_jax.types import Array


class Loss(Protocol):
    """Losses f32[n] of the two players from logits f32[n] of real and of generated images.

    `margin` f32[n] is positive where the discriminator takes the real image for a real one.
    """

    def discriminator(self, real: Array, fake: Array) -> Array: ...  # noqa: D102

    def generator(self, real: Array, fake: Array) -> Array: ...  # noqa: D102

    def margin(self, real: Array, fake: Array) -> Array: ...  # noqa: D102


class NonSaturating:
    """l_D = softplus(-real) + softplus(fake), l_G = softplus(-fake) (Goodfellow et al. 2014, eq. 1 and section 3).

    l_D is least where the logit is log p(x) / q(x), of the density p of real images and q of generated ones.
    """

    def discriminator(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return jax.nn.softplus(-real) + jax.nn.softplus(fake)

    def generator(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return jax.nn.softplus(-fake)

    def margin(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return real


class Hinge:
    """l_D = max(0, 1 - real) + max(0, 1 + fake), l_G = -fake (Lim & Ye 2017; Miyato et al. 2018, eq. 16 and 17)."""

    def discriminator(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return jax.nn.relu(1.0 - real) + jax.nn.relu(1.0 + fake)

    def generator(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return -fake

    def margin(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return real


class LeastSquares:
    """l_D = (real - 1)^2 / 2 + fake^2 / 2, l_G = (fake - 1)^2 / 2 (Mao et al. 2017, eq. 9)."""

    def discriminator(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return 0.5 * (real - 1.0) ** 2 + 0.5 * fake**2

    def generator(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return 0.5 * (fake - 1.0) ** 2

    def margin(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return real - 0.5


class Wasserstein:
    """l_D = fake - real, l_G = -fake (Arjovsky et al. 2017, eq. 3), for a discriminator that is held 1-Lipschitz.

    What holds it is for others to say: `gradient_penalty`, or spectral normalisation. The logits' zero means nothing.
    """

    def discriminator(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return fake - real

    def generator(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return -fake

    def margin(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return real - fake


class Relativistic:
    """l_D = softplus(fake - real), l_G = softplus(real - fake): RpGAN (Jolicoeur-Martineau 2019; Huang et al. 2024, 2).

    Real image i is paired with generated image i. It asks which of the two is the real one, and so no image lies beyond
    the reach of the generator's gradient because its own logit is small.
    """

    def discriminator(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return jax.nn.softplus(fake - real)

    def generator(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return jax.nn.softplus(real - fake)

    def margin(self, real: Array, fake: Array) -> Array:  # noqa: D102
        return real - fake


LOSSES = {
    "non_saturating": NonSaturating,
    "hinge": Hinge,
    "least_squares": LeastSquares,
    "wasserstein": Wasserstein,
    "relativistic": Relativistic,
}
