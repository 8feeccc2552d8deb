"""One step of each stochastic solver as its paper writes it, in NumPy, for Gaussian data.

Each is (x, t, s, z, recall) -> x at s: z are the standard normals drawn on the way, one a row; `recall` is a dictionary
that is empty at the first step and that a step may keep things in. Beside the code under test, and not made of it: the
schedule's curves alone are ours.
"""

import numpy as np

from tests.contracts.closed_form import GAUSSIAN, curves

MEAN, STD = GAUSSIAN[0][0], GAUSSIAN[1][0]


def ideal(name):
    """(x, t) -> (x0, eps) for the Gaussian data, in NumPy."""

    def denoise(x, t):
        alpha, sigma = curves(name, t)
        off = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return MEAN + alpha * STD**2 * off, sigma * off

    return denoise


def ho(name, v):
    """Ho et al. 2020, algorithm 2, with the variance of Nichol & Dhariwal 2021, eq. 15."""

    def step(x, t, s, z, recall):
        bar_t, bar_s = curves(name, t)[0] ** 2, curves(name, s)[0] ** 2
        alpha, beta = bar_t / bar_s, 1.0 - bar_t / bar_s
        mean = (x - beta / np.sqrt(1.0 - bar_t) * ideal(name)(x, t)[1]) / np.sqrt(alpha)
        if s == 0.0:
            return mean
        posterior = (1.0 - bar_s) / (1.0 - bar_t) * beta
        return mean + np.sqrt(np.exp(v * np.log(beta) + (1.0 - v) * np.log(posterior))) * z[0]

    return step


def song_ddim(name, eta):
    """Song, Meng & Ermon 2021, eq. 12 with the sigma of their eq. 16, in their alpha, which is our alpha^2."""

    def step(x, t, s, z, recall):
        bar_t, bar_s = curves(name, t)[0] ** 2, curves(name, s)[0] ** 2
        eps = ideal(name)(x, t)[1]
        sigma = eta * np.sqrt((1.0 - bar_s) / (1.0 - bar_t)) * np.sqrt(1.0 - bar_t / bar_s)
        x0 = (x - np.sqrt(1.0 - bar_t) * eps) / np.sqrt(bar_t)
        return np.sqrt(bar_s) * x0 + np.sqrt(1.0 - bar_s - sigma**2) * eps + sigma * z[0]

    return step


def kingma(name):
    """Kingma et al. 2021, appendix A: q(z_s | z_t, x) at the predicted x, for any schedule."""

    def step(x, t, s, z, recall):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = curves(name, t), curves(name, s)
        a, variance = alpha_t / alpha_s, sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        mean = a * sigma_s**2 / sigma_t**2 * x + alpha_s * variance / sigma_t**2 * ideal(name)(x, t)[0]
        return mean + np.sqrt(variance) * sigma_s / sigma_t * z[0]

    return step


def crowson(name, eta):
    """k-diffusion's sample_euler_ancestral, in sigma of alpha = 1: x / alpha and sigma / alpha."""

    def step(x, t, s, z, recall):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = curves(name, t), curves(name, s)
        here, there = sigma_t / alpha_t, sigma_s / alpha_s
        up = min(there, eta * np.sqrt(there**2 * (here**2 - there**2) / here**2))
        down = np.sqrt(there**2 - up**2)
        slope = (x / alpha_t - ideal(name)(x, t)[0]) / here
        return alpha_s * (x / alpha_t + (down - here) * slope + up * z[0])

    return step


def lu(name):
    """Lu et al. 2022b, SDE-DPM-Solver++(2M), in h = lambda_s - lambda_t."""

    def step(x, t, s, z, recall):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = curves(name, t), curves(name, s)
        x0 = ideal(name)(x, t)[0]
        if s == 0.0:
            return alpha_s * x0
        h = np.log(alpha_s / sigma_s) - np.log(alpha_t / sigma_t)
        slope = (x0 - recall["x0"]) / (recall["h"] / h) if recall else 0.0
        recall.update(x0=x0, h=h)
        decay = -np.expm1(-2.0 * h)
        mean = sigma_s / sigma_t * np.exp(-h) * x + alpha_s * decay * x0 + 0.5 * alpha_s * decay * slope
        return mean + sigma_s * np.sqrt(decay) * z[0]

    return step


def song(name, snr=0.0, corrections=0):
    """Song et al. 2021, algorithms 2 (alpha = 1) and 3 (variance preserving), with their last step denoising.

    The corrector is algorithm 4's, with the ratio of the norms of z and of the score at sigma.
    """

    def score(x, t):
        return -ideal(name)(x, t)[1] / curves(name, t)[1]

    def step(x, t, s, z, recall):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = curves(name, t), curves(name, s)
        if s == 0.0:
            return (x + sigma_t**2 * score(x, t)) / alpha_t  # Tweedie's formula
        if name == "edm":
            gained = sigma_t**2 - sigma_s**2
            x = x + gained * score(x, t) + np.sqrt(gained) * z[0]
        else:
            beta = 1.0 - (alpha_t / alpha_s) ** 2
            x = (2.0 - np.sqrt(1.0 - beta)) * x + beta * score(x, t) + np.sqrt(beta) * z[0]
        for j in range(1, corrections + 1):
            size = 2.0 * (snr * sigma_s) ** 2
            x = x + size * score(x, s) + np.sqrt(2.0 * size) * z[j]
        return x

    return step


def ma(name, diffusion):
    """Ma et al. 2024: dx = v dt - w/2 score dt + sqrt(w) dw backwards, w = diffusion sigma; on straight schedules.

    Their v dt is d_alpha x0 + d_sigma eps; their time is sigma for rectified flow, and here for alpha = 1.
    """

    def step(x, t, s, z, recall):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = curves(name, t), curves(name, s)
        x0, eps = ideal(name)(x, t)
        moved = x + (alpha_s - alpha_t) * x0 + (sigma_s - sigma_t) * eps
        if s == 0.0:
            return moved
        w, passed = diffusion * sigma_t, sigma_t - sigma_s
        return moved + 0.5 * w * (-eps / sigma_t) * passed + np.sqrt(w * passed) * z[0]

    return step


def karras(name, churn, s_min, s_max, s_noise):
    """Karras et al. 2022, algorithm 2, for alpha = 1 and sigma = 80 t."""

    def step(x, t, s, z, recall):
        here, there = 80.0 * t, 80.0 * s
        gamma = churn if s_min <= here <= s_max else 0.0
        higher = here + gamma * here
        x = x + np.sqrt(higher**2 - here**2) * s_noise * z[0]
        d = (x - ideal(name)(x, higher / 80.0)[0]) / higher
        end = x + (there - higher) * d
        if there == 0.0:
            return end
        d_end = (end - ideal(name)(end, s)[0]) / there
        return x + (there - higher) * (0.5 * d + 0.5 * d_end)

    return step
