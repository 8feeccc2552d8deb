"""Plugs: one string names a row of a table and its options."""

import math

import pytest

from diffusion_jax import plugs
from diffusion_jax.errors import UserError


def row(*, size: int = 3, rate: float = 0.5, name: str = "x", axes: tuple = (), given: str = ""):
    if rate < 0:
        raise ValueError("rate must not be negative")
    return size, rate, name, axes, given


def between(*, low: float = -math.inf, high: float = math.inf):
    return low, high


TABLE = {"row": row, "dit-s/2": row}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("row", (3, 0.5, "x", (), "")),
        (" row ( size = 4 ) ", (4, 0.5, "x", (), "")),
        ("row(rate=1)", (3, 1.0, "x", (), "")),
        ("row(name='a,b(c)',axes=(1,(2,)))", (3, 0.5, "a,b(c)", (1, (2,)), "")),
        ("dit-s/2()", (3, 0.5, "x", (), "")),
    ],
)
def test_strings_become_calls(text, expected):
    assert plugs.build("f", text, TABLE) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("between(high=inf)", (-math.inf, math.inf)),
        ("between(low=-inf,high=2.0)", (-math.inf, 2.0)),
        ("between(low=inf)", (math.inf, math.inf)),
        ("between(high=1e400)", (-math.inf, math.inf)),
    ],
)
def test_infinity_may_be_written_where_it_is_what_is_left_out(text, expected):
    assert plugs.build("f", text, {"between": between}) == expected
    assert plugs.build("f", "row(name='inf')", TABLE)[2] == "inf"


def test_rows_are_joined_by_a_plus():
    table = TABLE | {"between": between}
    assert plugs.build_all("f", " between(high=2.0) + row + between", table) == (
        (-math.inf, 2.0),
        (3, 0.5, "x", (), ""),
        (-math.inf, math.inf),
    )
    assert plugs.build_all("f", " ", table) == ()


@pytest.mark.parametrize("texts", ["row+", "+row", "row++row", "+"])
def test_a_plus_without_a_name_is_refused_with_what_was_typed(texts):
    with pytest.raises(UserError) as caught:
        plugs.build_all("sample.rules", texts, TABLE)
    assert f"sample.rules = {texts!r}" in str(caught.value)


def test_the_program_gives_arguments_that_the_user_cannot():
    assert plugs.build("f", "row", TABLE, given="program")[-1] == "program"
    with pytest.raises(UserError, match="no option 'given'"):
        plugs.build("f", "row(given='user')", TABLE, given="program")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rwo", "did you mean 'row'"),
        ("row(sise=1)", "no option 'sise'; did you mean 'size'"),
        ("row(size=1.5)", "must be of type int"),
        ("row(size=True)", "must be of type int"),
        ("row(rate='a')", "must be of type float"),
        ("row(rate=-1)", "rate must not be negative"),
        ("row(rate=inf)", "option 'rate' of row = inf: must be finite"),
        ("row(rate=-1e400)", "option 'rate' of row = -inf: must be finite"),
        ("row(size=inf)", "must be of type int"),
        ("row(rate=nan)", "write a name"),
        ("row(3)", "write a name"),
        ("row(size=open('x'))", "write a name"),
        ("row(size=1", "write a name"),
        ("", "write a name"),
        ("a b", "write a name"),
    ],
)
def test_what_is_wrong_is_said_with_the_field(text, sentence):
    with pytest.raises(UserError) as caught:
        plugs.build("train.thing", text, TABLE)
    assert "train.thing" in str(caught.value)
    assert sentence in str(caught.value)


def test_a_missing_option_is_named():
    with pytest.raises(UserError, match="needs the option 'must'"):
        plugs.build("f", "r", {"r": lambda must: must})
