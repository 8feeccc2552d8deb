"""The two ways in which a command ends early, and the status with which it does."""


class UserError(Exception):
    """Bad input. The message is one sentence: the field, its value, and what would be right. Exit status 2."""

    status = 2


class RunError(Exception):
    """A run that was asked for correctly and cannot go on (a diverged loss). Exit status 1."""

    status = 1


def require(ok: bool, field: str, value: object, rule: str) -> None:
    """Raise `UserError` naming `field` and `value` unless `ok`; `rule` says what would be right."""
    if not ok:
        raise UserError(f"{field} = {value!r}: {rule}.")
