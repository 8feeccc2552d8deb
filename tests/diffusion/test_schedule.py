"""Schedules against closed forms, published values and finite differences."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import expit

from diffusion_jax import plugs
from diffusion_jax.diffusion.schedule import SCHEDULES, Learned, first_time, logsnr, with_derivatives
from diffusion_jax.errors import UserError
from tests.schedules import EVERY, build

VARIANCE_PRESERVING = [name for name in EVERY if name not in ("ve", "edm", "rectified_flow", "resolution_shifted")]
OPTIONS = [
    "shifted(of='vp_linear(beta_max=10.0)',logsnr=-2.0)",
    "shifted(of='edm',logsnr=1.0)",
    "resolution_shifted(of='cosine',shift=0.5)",
    "resolution_shifted(of='scaled_linear',shift=1.6)",
    "zero_terminal_snr(of='cosine_discrete')",
    "sigmoid(start=0.0,end=3.0,tau=0.3)",
    "sigmoid(tau=0.7)",
    "ddpm_linear(steps=40,beta_max=0.016)",
    "scaled_linear(steps=100)",
    "cosine_discrete(steps=4000)",
    "zero_terminal_snr(of='ddpm_linear(steps=250)')",
    *(f"zero_terminal_snr(of='{of}')" for of in ("vp_linear", "sigmoid")),
    "zero_terminal_snr(of='resolution_shifted(of=\\'vp_linear\\')')",
]
TEXTS = [*EVERY, *OPTIONS]


# ------------------------------------------------------------------------------------------ closed forms


def vp_linear(t):
    """alpha = exp(-1/2 integral of beta), beta(t) = 0.1 + 19.9 t (Song et al. 2021, eq. 32-33), by quadrature."""
    alpha = np.exp(-0.5 * quad(lambda u: 0.1 + (20.0 - 0.1) * u, 0.0, t)[0])
    return alpha, np.sqrt(1.0 - alpha**2)


def cosine(t):
    """An angle that grows linearly up to where the log-SNR is -20 (Nichol & Dhariwal 2021, eq. 17)."""
    end = np.pi / 2 - np.arctan(np.exp(-10.0))
    return np.sqrt(1.0 - np.sin(end * t) ** 2), np.sin(end * t)


def sigmoid(t):
    """gamma(t) of Chen 2023, algorithm 1, with its clipping at 1e-9; alpha^2 = gamma."""
    start, end, tau = -3.0, 3.0, 1.0
    gamma = (expit(end / tau) - expit((t * (end - start) + start) / tau)) / (expit(end / tau) - expit(start / tau))
    gamma = np.clip(gamma, 1e-9, 1.0)
    return np.sqrt(gamma), np.sqrt(1.0 - gamma)


def ve(t):
    """The variance that dx = sqrt(d s^2 / dt) dw adds up (Song et al. 2021, eq. 30), by quadrature."""
    rate = np.log(50.0 / 0.01)
    return 1.0, np.sqrt(quad(lambda u: 2.0 * rate * (0.01 * np.exp(rate * u)) ** 2, 0.0, t, epsrel=1e-12)[0])


def shifted(t):
    """logsnr = logsnr of cosine + 2 ln(64 / 256), variance preserving (Hoogeboom et al. 2023, section 3.1)."""
    alpha, sigma = cosine(t)
    with np.errstate(divide="ignore"):
        moved = 2.0 * np.log(alpha / sigma) + 2.0 * np.log(64 / 256)
    return np.sqrt(expit(moved)), np.sqrt(expit(-moved))


def resolution_shifted(t):
    """t' = 3 t / (1 + 2 t) on the straight path (Esser et al. 2024, eq. 23)."""
    moved = 3.0 * t / (1.0 + 2.0 * t)
    return 1.0 - moved, moved


CLOSED_FORMS = {
    "vp_linear": vp_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "gvp": lambda t: (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)),  # Ma et al. 2024, section 2.1
    "ve": ve,
    "edm": lambda t: (1.0, 80.0 * t),  # Karras et al. 2022, Table 1
    "rectified_flow": lambda t: (1.0 - t, t),  # Liu et al. 2022, eq. 1
    "shifted": shifted,
    "resolution_shifted": resolution_shifted,
}


def running_product(betas):
    """alpha-bar_k as Ho et al. 2020 define it below their eq. 4, one factor after the other."""
    bars, bar = [], 1.0
    for beta in betas:
        bar *= 1.0 - beta
        bars.append(bar)
    return np.array(bars)


def cosine_bars(steps=1000):
    """Nichol & Dhariwal 2021, eq. 17, and beta clipped at 0.999."""
    f = lambda k: np.cos((k / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return running_product([min(1.0 - f(k) / f(k - 1), 0.999) for k in range(1, steps + 1)])


def stretched(bars):
    """Lin et al. 2023, algorithm 1: the square roots are moved to end in 0, then stretched to begin as before."""
    root = np.sqrt(bars)
    first, last = root[0], root[-1]
    root = root - last
    return (root * (first / (first - last))) ** 2


BARS = {
    # Ho et al. 2020, section 4: from 1e-4 to 0.02 in 1000 steps
    "ddpm_linear": lambda: running_product([1e-4 + k * (0.02 - 1e-4) / 999 for k in range(1000)]),
    # Stable Diffusion's configuration: the square roots from that of 0.00085 to that of 0.012
    "scaled_linear": lambda: running_product(
        [(0.00085**0.5 + k * (0.012**0.5 - 0.00085**0.5) / 999) ** 2 for k in range(1000)]
    ),
    "cosine_discrete": cosine_bars,
    "zero_terminal_snr": lambda: stretched(BARS["scaled_linear"]()),
}
"""name -> (alpha-bar_1, ..., alpha-bar_1000)."""


def test_every_schedule_has_its_paper_here():
    assert set(CLOSED_FORMS) | set(BARS) == set(SCHEDULES)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_form(name, x64):
    schedule = build(name)
    for t in (0.0, 1e-3, 0.1, 0.37, 0.5, 0.9, 1.0):
        got = schedule.alpha(jnp.float64(t)), schedule.sigma(jnp.float64(t))
        digits = 2e-8 if name == "sigmoid" else 1e-9  # ours ends in 1e-9 smoothly, where Chen's clips
        np.testing.assert_allclose(got, CLOSED_FORMS[name](t), rtol=digits, atol=1e-12)


@pytest.mark.parametrize("name", BARS)
def test_discrete_steps(name, x64):
    """Step k of 1000 is at t = k / 1000, to 11 digits; in float32 as near as t itself is told, 6e-8."""
    schedule, bars = build(name), BARS[name]()
    for dtype, digits in ((jnp.float64, 1e-11), (jnp.float32, 1e-6)):
        t = jnp.arange(1, 1001).astype(dtype) / 1000
        np.testing.assert_allclose(schedule.alpha(t), np.sqrt(bars), rtol=digits, atol=0.2 * digits)
        np.testing.assert_allclose(schedule.sigma(t), np.sqrt(1.0 - bars), rtol=digits)


def scaled(low, high, steps):
    """Betas from `low` to `high`, 1000 / T times as large (openai/improved-diffusion, `get_named_beta_schedule`)."""
    return 1000 / steps * (low + np.arange(steps) * (high - low) / (steps - 1))


IN_STEPS = {
    "ddpm_linear(steps={})": lambda steps: running_product(scaled(1e-4, 0.02, steps)),
    # the squares of Stable Diffusion's line
    "scaled_linear(steps={})": lambda steps: running_product(
        1000 / steps * (0.00085**0.5 + np.arange(steps) * (0.012**0.5 - 0.00085**0.5) / (steps - 1)) ** 2
    ),
    "cosine_discrete(steps={})": lambda steps: cosine_bars(steps),
    "zero_terminal_snr(of='ddpm_linear(steps={})')": lambda steps: stretched(
        running_product(scaled(1e-4, 0.02, steps))
    ),
}
"""text of T steps -> (alpha-bar_1, ..., alpha-bar_T)."""


@pytest.mark.parametrize("steps", [50, 100, 250, 500, 1000, 4000])
@pytest.mark.parametrize("text", IN_STEPS)
def test_other_numbers_of_steps(text, steps, x64):
    schedule, bars = build(text.format(steps)), IN_STEPS[text](steps)
    t = jnp.arange(1.0, steps + 1) / steps
    np.testing.assert_allclose(schedule.alpha(t), np.sqrt(bars), rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(schedule.sigma(t), np.sqrt(1.0 - bars), rtol=1e-10)


@pytest.mark.parametrize("name", ["ddpm_linear", "scaled_linear"])
def test_fewer_steps_keep_the_noise_at_the_end(name, x64):
    """-ln(alpha-bar_T) is the sum of the betas and half that of their squares: the first stays, the other is small."""
    whole = np.log(bar(name, 1000))
    for steps in (100, 250, 500, 4000):
        few = 2.0 * np.log(float(build(f"{name}(steps={steps})").alpha(jnp.float64(1.0))))
        np.testing.assert_allclose(few, whole, rtol=0.08)


@pytest.mark.parametrize(("text", "largest"), [("ddpm_linear(steps=20)", "1"), ("scaled_linear(steps=6)", "2")])
def test_betas_of_one_and_more_are_refused(text, largest):
    """1000 / 20 0.02 = 1: a step that leaves nothing of the image; and 1000 / 6 0.012 = 2."""
    with pytest.raises(UserError, match=rf"beta_max must stay below 1, not be {largest}\."):
        build(text)


@pytest.mark.parametrize("name", BARS)
def test_between_the_steps_lies_what_lies_between(name, x64):
    schedule, bars = build(name), np.append(1.0, BARS[name]())
    between = np.asarray(schedule.alpha((jnp.arange(1000.0) + 0.3) / 1000))
    assert np.all(between < np.sqrt(bars[:-1]))
    assert np.all(between > np.sqrt(bars[1:]))


# ------------------------------------------------------------------------------------------ published values


def bar(name, k):
    """alpha-bar_k of 1000."""
    return float(build(name).alpha(jnp.float64(k / 1000))) ** 2


def test_published_ends_of_the_discrete_schedules(x64):
    """alpha-bar_1000 from the papers' betas, as peers' tables hold it; Ho et al. 2020, section 4, call it KL ~ 1e-5."""
    np.testing.assert_allclose(bar("ddpm_linear", 1000), 4.03583e-5, rtol=2e-6)
    np.testing.assert_allclose(bar("scaled_linear", 1000), 0.0046601, rtol=2e-5)
    np.testing.assert_allclose(bar("cosine_discrete", 1000), 2.42877e-9, rtol=4e-6)
    assert bar("zero_terminal_snr", 1000) == 0.0


def test_published_sigmas_of_stable_diffusion(x64):
    """sigma / alpha from 0.029167 to 14.61464: the range that samplers in Karras's terms are given for it."""
    schedule, t = build("scaled_linear"), jnp.float64([0.001, 1.0])
    np.testing.assert_allclose(schedule.sigma(t) / schedule.alpha(t), [0.029167, 14.61464], rtol=1e-5)


def test_published_end_of_the_vp_schedule():
    """Karras et al. 2022 give sigma_max = 152 for Song's VP (their appendix C.1: 152.167 = sqrt(exp(10.05) - 1))."""
    schedule = build("vp_linear")
    np.testing.assert_allclose(schedule.sigma(jnp.float32(1.0)) / schedule.alpha(jnp.float32(1.0)), 152.167, rtol=1e-5)


def test_published_noise_label_of_edm():
    """c_noise = ln(sigma) / 4 (Karras et al. 2022, Table 1)."""
    label = build("edm").label(jnp.float32([0.002, 0.5, 1.0, 80.0]) / 80.0)
    np.testing.assert_allclose(label, np.log([0.002, 0.5, 1.0, 80.0]) / 4.0, atol=1e-6)


# ------------------------------------------------------------------------------------------ relations


def test_ddpm_in_many_steps_is_the_vp_sde(x64):
    """Song et al. 2021, appendix B: beta_k = beta(k / T) / T, of which 1000 / T 1e-4 is 0.1 / T; off by O(1 / T)."""
    t, limit = jnp.linspace(0.1, 1.0, 10), build("vp_linear")
    errors = []
    for steps in (1000, 4000):
        discrete = build(f"ddpm_linear(steps={steps})")
        errors.append(np.abs(np.log(discrete.alpha(t) / limit.alpha(t))).max())
    assert errors[0] < 0.05
    np.testing.assert_allclose(errors[0] / errors[1], 4.0, rtol=0.02)


@pytest.mark.parametrize("shift", [0.5, 1.7, 3.0])
def test_resolution_shift_of_rectified_flow_is_a_shift_of_its_logsnr(shift, x64):
    """Esser et al. 2024, section 5.3.2: by -2 ln(s)."""
    t, schedule = jnp.linspace(0.01, 0.99, 30), build(f"resolution_shifted(of='rectified_flow',shift={shift})")
    np.testing.assert_allclose(
        logsnr(schedule, t), logsnr(build("rectified_flow"), t) - 2.0 * np.log(shift), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "shifted"])
def test_shifted_adds_to_the_logsnr_of_any_schedule(name, x64):
    t = jnp.linspace(0.01, 0.99, 30)
    schedule = build(f"shifted(of='{name}',logsnr=-1.5)")
    np.testing.assert_allclose(logsnr(schedule, t), logsnr(build(name), t) - 1.5, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=1e-12)


def test_zero_terminal_snr_keeps_the_first_step(x64):
    np.testing.assert_allclose(bar("zero_terminal_snr", 1), bar("scaled_linear", 1), rtol=1e-14)


@pytest.mark.parametrize("name", ["vp_linear", "cosine", "sigmoid"])
def test_zero_terminal_snr_of_a_continuous_schedule(name, x64):
    """Lin et al. 2023, algorithm 1, between alpha = 1 at the start, where it stays, and alpha(1), which becomes 0."""
    t, of, schedule = jnp.linspace(0.0, 1.0, 101), build(name), build(f"zero_terminal_snr(of='{name}')")
    alpha, end = np.asarray(of.alpha(t)), float(of.alpha(jnp.float64(1.0)))
    np.testing.assert_allclose(schedule.alpha(t), (alpha - end) / (1.0 - end), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=1e-12)


def test_zero_terminal_snr_of_many_steps_is_that_of_their_limit(x64):
    """Off by O(1 / T), as the steps themselves are off the VP-SDE."""
    t, limit = jnp.linspace(0.1, 0.9, 9), build("zero_terminal_snr(of='vp_linear')").alpha
    errors = []
    for steps in (1000, 4000):
        discrete = build(f"zero_terminal_snr(of='ddpm_linear(steps={steps})')")
        errors.append(np.abs(np.log(discrete.alpha(t) / limit(t))).max())
    assert errors[0] < 0.05
    np.testing.assert_allclose(errors[0] / errors[1], 4.0, rtol=0.02)


@pytest.mark.parametrize("name", ["vp_linear", "shifted"])
def test_zero_terminal_snr_ends_in_nothing_in_float32(name):
    """Never below it, which has no log-SNR; and alpha keeps its slope there, by which `velocity` tells the image."""
    schedule = build(f"zero_terminal_snr(of='{name}')")
    for curve in (schedule.alpha, jax.jit(schedule.alpha)):
        for count in (3, 1001):
            assert 0.0 <= float(curve(jnp.linspace(0.5, 1.0, count))[-1]) < 1e-7
    slope = jax.jvp(schedule.alpha, (jnp.float32(1.0),), (jnp.float32(1.0),))[1]
    assert float(slope) < -0.01


def test_zero_terminal_snr_of_nothing_left_changes_nothing(x64):
    t = jnp.linspace(0.0, 1.0, 50)
    for name in ("gvp", "zero_terminal_snr"):
        text = f"zero_terminal_snr(of='{name}')"
        np.testing.assert_allclose(build(text).alpha(t), build(name).alpha(t), rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------------------ the interface


@pytest.fixture(params=[*EVERY, *(pytest.param(text, marks=pytest.mark.slow) for text in OPTIONS)])
def schedule(request):
    return build(request.param)


def test_data_at_the_start(schedule):
    np.testing.assert_allclose(schedule.alpha(jnp.float32(0.0)), 1.0, rtol=1e-6)
    assert float(schedule.sigma(jnp.float32(0.0))) == 0.0


def test_signal_falls_and_noise_prevails_at_the_end(schedule, x64):
    """The most signal is left by scaled_linear, log-SNR -5.36, which is what Lin et al. 2023 mend."""
    ratio = np.asarray(logsnr(schedule, jnp.linspace(0.0, 1.0, 501)))
    assert ratio[0] == np.inf
    assert np.all(np.diff(ratio[1:]) < 0.0)
    assert ratio[-1] < -4.0


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_is_preserved(name, x64):
    schedule, t = build(name), jnp.linspace(0.0, 1.0, 997)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=1e-12)


def test_time_inverts_logsnr(schedule, x64):
    t = jnp.concatenate([jnp.float64([0.0, 1e-6, 1e-4]), jnp.linspace(0.001, 1.0, 200)])
    np.testing.assert_allclose(schedule.time(logsnr(schedule, t)), t, rtol=1e-8, atol=1e-14)


def test_time_inverts_logsnr_in_float32(schedule):
    t = jnp.linspace(0.001, 1.0, 200)
    np.testing.assert_allclose(schedule.time(logsnr(schedule, t)), t, rtol=2e-5)


def test_first_time_is_where_the_noise_is_a_thousandth(schedule, x64):
    t = first_time(schedule).astype(jnp.float64)
    np.testing.assert_allclose(schedule.sigma(t) / schedule.alpha(t), 1e-3, rtol=1e-5)


def test_derivatives_are_the_slopes_of_the_curves(schedule, x64):
    """At times between the discrete steps: at a step the line has a corner."""
    t, h = (jnp.arange(10.0, 990.0, 20.0) + 0.37) / 1000, 1e-6
    alpha, sigma, d_alpha, d_sigma = with_derivatives(schedule, t)
    np.testing.assert_allclose(alpha, schedule.alpha(t), rtol=1e-12)
    np.testing.assert_allclose(sigma, schedule.sigma(t), rtol=1e-12)
    for curve, slope in ((schedule.alpha, d_alpha), (schedule.sigma, d_sigma)):
        np.testing.assert_allclose(slope, (curve(t + h) - curve(t - h)) / (2.0 * h), rtol=1e-6, atol=1e-8)


def test_finite_from_pure_noise_to_the_image(schedule):
    """In float32: the curves from 0 to 1, and their derivatives from the first time to 1."""
    t = jnp.concatenate([first_time(schedule)[None], jnp.linspace(0.001, 1.0, 100)])
    for value in (schedule.alpha(t), schedule.sigma(t), *with_derivatives(schedule, t)):
        assert np.all(np.isfinite(np.asarray(value)))
    assert np.all(np.asarray(schedule.alpha(t)) >= 0.0)
    assert float(schedule.time(jnp.float32(jnp.inf))) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_dtype_is_that_of_the_time(schedule, dtype, x64):
    t = jnp.linspace(0.1, 0.9, 3, dtype=dtype)
    for value in (schedule.alpha(t), schedule.sigma(t), schedule.label(t), schedule.time(logsnr(schedule, t))):
        assert value.dtype == dtype


def test_label_tells_times_apart(schedule):
    label = np.asarray(schedule.label(jnp.linspace(float(first_time(schedule)), 1.0, 200)))
    assert np.all(np.isfinite(label))
    assert np.all(np.diff(label) > 0.0)
    assert np.abs(label).max() < 3.0  # "of order 1": ln(80) / 4 is 1.1, and the first time's -1.7


def test_methods_are_elementwise(schedule):
    t = jnp.linspace(0.1, 0.9, 6)
    for method in (schedule.alpha, schedule.sigma, schedule.label, lambda t: schedule.time(logsnr(schedule, t))):
        whole = np.asarray(method(t.reshape(2, 3))).reshape(-1)
        np.testing.assert_allclose(whole, [float(method(each)) for each in t], rtol=1e-6)


def test_equal_options_make_equal_schedules():
    """A schedule is a value: it may be a static argument of a jitted function."""
    texts = [text for text in TEXTS if text != "learned"]  # which holds arrays
    for text in texts:
        assert build(text) == build(text)
        assert hash(build(text)) == hash(build(text))
    assert len({build(text) for text in texts}) == len(texts)


def test_gradients_pass_through_the_tables_in_reverse():
    for name in ("scaled_linear", "sigmoid", "learned"):
        schedule = build(name)
        slope = jax.grad(lambda t, s=schedule: s.alpha(t) + s.time(logsnr(s, t)))(jnp.float32(0.6004))
        d_alpha = jax.jvp(schedule.alpha, (jnp.float32(0.6004),), (jnp.float32(1.0),))[1]
        np.testing.assert_allclose(slope, d_alpha + 1.0, rtol=1e-4)  # time(logsnr(t)) = t


@pytest.mark.parametrize(
    "text",
    [
        "vp_linear(beta_min=0.0)",
        "vp_linear(beta_min=20.0,beta_max=0.1)",
        "vp_linear(beta_max=1e30)",
        "cosine(logsnr_min=1.0)",
        "edm(sigma_max=-1.0)",
        "ve(sigma_min=60.0)",
        "sigmoid(tau=0.0)",
        "sigmoid(start=1.0,end=0.0)",
        "ddpm_linear(beta_max=1.5)",
        "ddpm_linear(steps=20)",
        "scaled_linear(steps=1)",
        "cosine_discrete(beta_max=1.0)",
        "resolution_shifted(shift=0.0)",
        "shifted(logsnr=1e9)",
        "sigmoid(start=-3000.0)",
        "sigmoid(start=1e9,end=1000000001.0,tau=1e9)",
        "ddpm_linear(beta_max=0.5)",
        "cosine_discrete(steps=10000000)",
    ],
)
def test_impossible_options_are_refused_by_name(text):
    with pytest.raises(UserError, match=text.split("(")[0]):
        plugs.build("family.schedule", text, SCHEDULES)


EXTREMES = [sign * 10.0**power for sign in (1.0, -1.0) for power in (-300, -9, -3, 3, 9, 300)]
FLOATS = [
    (name, option)
    for name, row in (SCHEDULES | {"learned": Learned}).items()
    for option, parameter in inspect.signature(row).parameters.items()
    if isinstance(parameter.default, float)
]


@pytest.mark.parametrize(("name", "option"), FLOATS)
def test_every_number_is_refused_by_name_or_makes_finite_curves(name, option):
    """In float32, whose largest number is exp(88.7); and no number that is not one."""
    table, t = SCHEDULES | {"learned": Learned}, jnp.linspace(0.0, 1.0, 11)
    for value in ("inf", "-inf", "1e400"):
        with pytest.raises(UserError, match=rf"family.schedule: option '{option}' of {name} = -?inf: must be finite"):
            plugs.build("family.schedule", f"{name}({option}={value})", table)
    for value in EXTREMES:
        try:
            schedule = plugs.build("family.schedule", f"{name}({option}={value})", table)
        except UserError as error:
            assert f"family.schedule: {name}" in str(error)  # noqa: PT017
            continue
        times = lambda schedule: schedule.time(jnp.linspace(-20.0, 30.0, 5))
        if name == "learned":
            schedule = schedule.bind(schedule.init(jax.random.key(0)))
            times = lambda schedule: t  # found by bisection: between 0 and 1 whatever the curve
        alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
        for curve in (alpha, sigma, schedule.label(t[1:]), times(schedule)):
            assert np.all(np.isfinite(np.asarray(curve)))
        assert np.all(sigma[1:] > 0.0)
        assert np.all(alpha >= 0.0)


@pytest.mark.parametrize("of", ["edm", "ve", "rectified_flow", "resolution_shifted", "ve(sigma_max=0.02)"])
def test_a_schedule_without_an_alpha_to_stretch_is_refused_with_the_reason(of):
    with pytest.raises(UserError) as caught:
        plugs.build("family.schedule", f"zero_terminal_snr(of='{of}')", SCHEDULES)
    assert str(caught.value) == (
        f"family.schedule: zero_terminal_snr: of = '{of}': alpha must fall from 1 to near 0 with "
        "alpha^2 + sigma^2 = 1, as it does in vp_linear, ddpm_linear, scaled_linear, cosine, cosine_discrete, "
        "sigmoid, gvp, shifted, zero_terminal_snr."
    )


def test_an_unknown_row_in_a_wrapper_is_named():
    with pytest.raises(UserError, match=r"family.schedule.*'of' = 'cosin'.*did you mean 'cosine'"):
        build("shifted(of='cosin')")


@pytest.mark.parametrize("text", ["shifted(of='learned')", "resolution_shifted(of='learned(hidden=8)')"])
def test_a_learned_schedule_is_not_wrapped(text):
    """The sentence says what to do instead, not that there is no such row."""
    with pytest.raises(UserError, match=r"family.schedule: \w*shifted: of = 'learned.*learned\(logsnr_max"):
        plugs.build("family.schedule", text, SCHEDULES)
