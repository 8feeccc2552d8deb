"""The deterministic solvers as their papers write them, in NumPy, for Gaussian data: whole runs, (p, x, times) -> x.

Beside the code under test, and not made of it: `p` is the data under a schedule, whose curves alone are ours.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy import integrate
from scipy.optimize import brentq

from tests.contracts.closed_form import curves


@dataclass(frozen=True)
class Gaussian:
    """N(0.4, 0.5^2) under a schedule: what the papers' formulas are made of, in NumPy."""

    name: str

    def alpha(self, t):
        return curves(self.name, t)[0]

    def sigma(self, t):
        return curves(self.name, t)[1]

    def logsnr(self, t):
        """lambda = log(alpha / sigma), half of our log-SNR; infinite at t = 0."""
        return np.log(self.alpha(t) / self.sigma(t)) if t > 0.0 else np.inf

    def time(self, logsnr):
        return brentq(lambda t: self.logsnr(t) - logsnr, 1e-9, 0.999, xtol=1e-15)

    def eps(self, x, t):
        return self.sigma(t) * (x - self.alpha(t) * 0.4) / (self.alpha(t) ** 2 * 0.25 + self.sigma(t) ** 2)

    def x0(self, x, t):
        return (x - self.sigma(t) * self.eps(x, t)) / self.alpha(t)

    def drift(self, x, t):
        """From the score: dx/dt = f x - g^2 / 2 score, f = alpha' / alpha, g^2 = 2 sigma (sigma' - f sigma)."""
        h = 1e-6
        d_alpha, d_sigma = ((c(t + h) - c(t - h)) / (2 * h) for c in (self.alpha, self.sigma))
        f, score = d_alpha / self.alpha(t), -self.eps(x, t) / self.sigma(t)
        return f * x - self.sigma(t) * (d_sigma - f * self.sigma(t)) * score


def singlestep(step):
    """A whole run of steps that know nothing of each other."""

    def walk(p, x, times):
        for t, s in itertools.pairwise(times):
            x = step(p, x, t, s)
        return x

    return walk


@singlestep
def ddim(p, x, t, s):
    """Song, Meng & Ermon 2021, eq. 12 without noise, for x / alpha as in their eq. 13."""
    ratio = [p.sigma(u) / p.alpha(u) for u in (t, s)]
    return p.alpha(s) * (x / p.alpha(t) + (ratio[1] - ratio[0]) * p.eps(x, t))


@singlestep
def euler(p, x, t, s):
    return x + (s - t) * p.drift(x, t)


@singlestep
def heun(p, x, t, s):
    """Karras et al. 2022, algorithm 1, lines 4 to 8."""
    d = p.drift(x, t)
    end = x + (s - t) * d
    return end if s == 0.0 else x + (s - t) * (d / 2 + p.drift(end, s) / 2)


def in_x0(p, x, t, s, d):
    """Lu et al. 2022b, the step of algorithm 1 and 2 for their D."""
    h = p.logsnr(s) - p.logsnr(t)
    return p.sigma(s) / p.sigma(t) * x - p.alpha(s) * np.expm1(-h) * d


@singlestep
def dpmpp_2s(p, x, t, s):
    """Lu et al. 2022b, algorithm 1, with r = 1/2."""
    if s == 0.0:
        return in_x0(p, x, t, s, p.x0(x, t))
    r, h = 0.5, p.logsnr(s) - p.logsnr(t)
    middle = p.time(p.logsnr(t) + r * h)
    u = p.sigma(middle) / p.sigma(t) * x - p.alpha(middle) * np.expm1(-r * h) * p.x0(x, t)
    return in_x0(p, x, t, s, (1 - 1 / (2 * r)) * p.x0(x, t) + 1 / (2 * r) * p.x0(u, middle))


@singlestep
def dpm_solver_3(p, x, t, s):
    """Lu et al. 2022, algorithm 2."""
    if s == 0.0:
        return in_x0(p, x, t, s, p.x0(x, t))
    r1, r2, h, eps = 1 / 3, 2 / 3, p.logsnr(s) - p.logsnr(t), p.eps(x, t)
    s1, s2 = (p.time(p.logsnr(t) + r * h) for r in (r1, r2))
    u1 = p.alpha(s1) / p.alpha(t) * x - p.sigma(s1) * np.expm1(r1 * h) * eps
    d1 = p.eps(u1, s1) - eps
    u2 = p.alpha(s2) / p.alpha(t) * x - p.sigma(s2) * np.expm1(r2 * h) * eps
    u2 = u2 - p.sigma(s2) * r2 / r1 * (np.expm1(r2 * h) / (r2 * h) - 1) * d1
    d2 = p.eps(u2, s2) - eps
    return p.alpha(s) / p.alpha(t) * x - p.sigma(s) * np.expm1(h) * eps - p.sigma(s) / r2 * (np.expm1(h) / h - 1) * d2


def dpmpp_2m(p, x, times):
    """Lu et al. 2022b, algorithm 2, with order 1 in the last step as in their code (`lower_order_final`)."""
    lam, models = [p.logsnr(t) for t in times], []
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        models.append(p.x0(x, t))
        d = models[-1]
        if i > 0 and s > 0.0:
            r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            d = (1 + 1 / (2 * r)) * models[-1] - 1 / (2 * r) * models[-2]
        x = in_x0(p, x, t, s, d)
    return x


def dpmpp_3m(p, x, times):
    """`multistep_dpm_solver_third_update` of the code of Lu et al. 2022b; its second step without D_2."""
    lam, models = [p.logsnr(t) for t in times], []
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        models.append(p.x0(x, t))
        end = in_x0(p, x, t, s, models[-1])
        if i > 0 and s > 0.0:
            h = lam[i + 1] - lam[i]
            r0 = (lam[i] - lam[i - 1]) / h
            d1 = (models[-1] - models[-2]) / r0
            if i > 1:
                r1 = (lam[i - 1] - lam[i - 2]) / h
                d11 = (models[-2] - models[-3]) / r1
                d2 = (d1 - d11) / (r0 + r1)
                d1 = d1 + r0 / (r0 + r1) * (d1 - d11)
                end = end - p.alpha(s) * ((np.expm1(-h) + h) / h**2 - 0.5) * d2
            end = end + p.alpha(s) * (np.expm1(-h) / h + 1) * d1
        x = end
    return x


def exponential_3m(p, x, times):
    """int e^(u - h) of the polynomial through the last three x0, by quadrature."""
    lam, models = [p.logsnr(t) for t in times], []
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        models.append(p.x0(x, t))
        if s == 0.0:
            return in_x0(p, x, t, s, models[-1])
        h, seen = lam[i + 1] - lam[i], min(i + 1, 3)
        line = np.polyfit(np.array(lam[i + 1 - seen : i + 1]) - lam[i], models[-seen:], seen - 1)
        total = [integrate.quad(lambda u, c=c, h=h: np.exp(u - h) * np.polyval(c, u), 0, h)[0] for c in line.T]
        x = p.sigma(s) / p.sigma(t) * x + p.alpha(s) * np.array(total)
    return x


def unipc(order):
    """Zhao et al. 2023, algorithms 1 and 2 in x0: R_p(h) a_p B(h) = phi_p(h), solved as a matrix, B(h) = e^h - 1.

    h is -h in the formulas for x0. A single difference has a_1 = 1/2. The last stop is not corrected.
    """

    def update(p, x, t, s, model, others):
        """`others`: (lambda, x0) of the other stops that the step looks at."""
        h = p.logsnr(s) - p.logsnr(t)
        end = in_x0(p, x, t, s, model)
        if s == 0.0 or not others:
            return end
        r = np.array([(lam - p.logsnr(t)) / h for lam, _ in others])
        differences = np.array([(m - model) / r_m for (_, m), r_m in zip(others, r, strict=True)])
        hh, b_h, rows, phi = -h, np.expm1(-h), [], np.expm1(-h) / -h - 1
        right, factorial = [], 1
        for i in range(1, len(r) + 1):
            rows.append(r ** (i - 1))
            right.append(phi * factorial / b_h)
            factorial *= i + 1
            phi = phi / hh - 1 / factorial
        a = np.array([0.5]) if len(r) == 1 else np.linalg.solve(np.array(rows), np.array(right))
        return end - p.alpha(s) * b_h * np.einsum("k,kn->n", a, differences)

    def walk(p, x, times):
        seen, corrected = [], x  # seen: (lambda, x0) at the stops so far
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            model = p.x0(x, t)
            if i > 0:
                others = [*seen[-order:-1], (p.logsnr(t), model)]
                corrected = update(p, corrected, times[i - 1], t, seen[-1][1], others)
            seen.append((p.logsnr(t), model))
            x = update(p, corrected, t, s, model, seen[-order:-1])
        return x

    return walk


def adams_bashforth(order):
    """x + int of the polynomial through the last slopes dx/dt, by quadrature (Hairer et al. 1993, III.5)."""

    def walk(p, x, times):
        slopes = []
        for i, (t, s) in enumerate(itertools.pairwise(times)):
            slopes.append(p.drift(x, t))
            seen = min(i + 1, order)
            line = np.polyfit(np.array(times[i + 1 - seen : i + 1]) - t, slopes[-seen:], seen - 1)
            x = x + np.array([np.diff(np.polyval(np.polyint(c), [0.0, s - t]))[0] for c in line.T])
        return x

    return walk


def plms(p, x, times):
    """Liu et al. 2022, section 3: the linear multistep mean of eps, and their transfer part, which is DDIM's step."""
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    seen = []
    for t, s in itertools.pairwise(times):
        seen = [p.eps(x, t), *seen][:4]
        mean = sum(w * e for w, e in zip(weights[len(seen)], seen, strict=True))
        a, b = p.alpha(t) ** 2, p.alpha(s) ** 2
        x = np.sqrt(b) * (x - p.sigma(t) * mean) / np.sqrt(a) + p.sigma(s) * mean
    return x
