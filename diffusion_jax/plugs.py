"""Plugs: a config picks an implementation with a string, `"ddim(eta=0.5)"` or plainly `"heun"`.

One string holds the choice and its options, so that a sweep is a list of strings, one flag changes both, and an option
that the chosen implementation does not have cannot linger unread: it is an error.
"""

import ast
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from diffusion_jax.errors import UserError

T = TypeVar("T")
SCALARS = (int, float, bool, str)
_FORM = re.compile(r"^\s*([\w./-]+)\s*(?:\((.*)\))?\s*$", re.DOTALL)


class _Infinity(ast.NodeTransformer):
    """Makes the bare word `inf`, which Python's literals lack, the number."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(math.inf) if node.id == "inf" else node


def suggest(word: str, known: Iterable[str]) -> str:
    """`"did you mean 'heun'? Known: ddim, euler, heun"`: the tail of every sentence about an unknown name."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + "Known: " + (", ".join(known) or "none")


def parse(field: str, text: str) -> tuple[str, dict[str, Any]]:
    """Split `"name(option=value, ...)"` into the name and its options (Python literals, and `inf`).

    Raises:
      UserError: naming `field`, where `text` does not have that form.
    """
    match = _FORM.match(text) if isinstance(text, str) else None
    try:
        if not match:
            raise ValueError
        name, arguments = match.groups()
        call = ast.parse(f"f({arguments or ''})", mode="eval").body
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError
        return name, {keyword.arg: ast.literal_eval(_Infinity().visit(keyword.value)) for keyword in call.keywords}
    except (ValueError, SyntaxError, AttributeError):
        raise UserError(f"{field} = {text!r}: write a name, or name(option=value, ...).") from None


def build(field: str, text: str, table: Mapping[str, Callable[..., T]], **given: Any) -> T:
    """Build what `text` names in `table`; `given` are arguments that come from the program, not from the user.

    A row gets those of `given` that its signature names.

    Raises:
      UserError: naming `field`, for an unknown name, an unknown option, a wrong type, or a value that the
        implementation refuses with a `ValueError`.
    """
    name, options = parse(field, text)
    if name not in table:
        raise UserError(f"{field} = {text!r}: there is no {name!r}; {suggest(name, table)}.")
    maker = table[name]
    return call(field, maker, options, label=name, **given)


def build_all(field: str, texts: str, table: Mapping[str, Callable[..., T]]) -> tuple[T, ...]:
    """Build each of the rows that `"interval(high=2.0) + rescaled"` names, in their order; none for an empty string."""
    rows = re.split(r"\+(?![^(]*\))", texts) if texts.strip() else []
    if not all(text.strip() for text in rows):
        raise UserError(f"{field} = {texts!r}: write a name on each side of a +.")
    return tuple(build(field, text, table) for text in rows)


def call(field: str, maker: Callable[..., T], options: Mapping[str, Any], *, label: str, **given: Any) -> T:
    """Call `maker(**options, **given)` after checking the options' names and types against its signature.

    A number must be finite, but for an option that is infinite where it is left out.
    """
    parameters = inspect.signature(maker).parameters
    known = [key for key in parameters if key not in given and key != "self"]
    checked = {}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"{field}: {label} has no option {key!r}; {suggest(key, known)}.")
        checked[key] = coerce(f"{field}: option {key!r} of {label}", value, _kind(parameters[key]))
        if _infinite(checked[key]) and not _infinite(parameters[key].default):
            raise UserError(f"{field}: option {key!r} of {label} = {checked[key]}: must be finite.")
    missing = [k for k in known if k not in checked and parameters[k].default is inspect.Parameter.empty]
    if missing:
        raise UserError(f"{field}: {label} needs the option {missing[0]!r}.")
    try:
        return maker(**checked, **{key: value for key, value in given.items() if key in parameters})
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{field}: {label}: {error}.") from None


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and math.isinf(value)


def _kind(parameter: inspect.Parameter) -> Any:
    """The type a parameter asks for: its annotation where that is a plain type, else its default's."""
    if parameter.annotation in SCALARS:
        return parameter.annotation
    return type(parameter.default) if type(parameter.default) in SCALARS else parameter.annotation


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, as tuples, all the way down."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def coerce(field: str, value: Any, hint: Any) -> Any:
    """Return `value` as the annotated type (an int serves as a float, a list as a tuple).

    Raises:
      UserError: naming `field`, where it is of another type.
    """
    kind = getattr(hint, "__origin__", hint)
    if kind is tuple and isinstance(value, list):
        return _tuples(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (int, float, bool, str, tuple, dict):
        wrong = not isinstance(value, kind) or (kind is int and isinstance(value, bool))
        if wrong:
            raise UserError(f"{field} = {value!r}: must be of type {kind.__name__}, not {type(value).__name__}.")
    return value
