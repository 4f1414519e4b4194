"""The errors that users see: a request that cannot be met, and numbers that are not finite."""

from collections.abc import Sequence


class UserError(Exception):
    """A request that cannot be met. The message names the value, the allowed values and a remedy."""


class NonFiniteError(Exception):
    """A weight, fit or loss is NaN or infinite. The message names the matrix or the batch."""


def require_choice(setting: str, value: object, allowed: Sequence[object]) -> None:
    """Raise UserError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UserError(f"{setting}={value} is not known; allowed: {', '.join(map(str, allowed))}")


def require_positive(setting: str, value: float) -> None:
    """Raise UserError unless `value` is a number above zero."""
    if not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{setting}={value} must be above 0")


def require_fraction(setting: str, value: float) -> None:
    """Raise UserError unless `value` is a number from 0 and below 1."""
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"{setting}={value} must be a fraction, from 0 and below 1")


def require_integer(setting: str, value: object, least: int) -> None:
    """Raise UserError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{setting}={value} must be a whole number from {least}")


def require_at_least_zero(setting: str, value: float) -> None:
    """Raise UserError unless `value` is a number that is zero or above."""
    if not isinstance(value, int | float) or not value >= 0:
        raise UserError(f"{setting}={value} must be 0 or more")
