"""Numbers as a person reads them."""

import math


def number(value: float, metric: str) -> str:
    if not math.isfinite(value):
        return "infinite"
    if metric.endswith("_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if metric != "perplexity":
        return f"{value:.4f}"
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e9 else f"{value:.3e}"


def with_error(value: float, metric: str, error: float | None) -> str:
    """A figure and, if it is known, its standard error with two significant digits: `20.62 +- 1.3`."""
    figure = number(value, metric)
    if error is None:
        return figure
    if not 0 < error < 1e6:
        return f"{figure} +- {error:.2g}"
    digits = 1 - math.floor(math.log10(error))
    return f"{figure} +- {round(error, digits):,.{max(digits, 0)}f}"


def millions(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def size(count: float) -> str:
    """A number of bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def flop(count: float) -> str:
    size = next((size for size in (15, 12, 9, 6) if count >= 10**size), 0)
    return f"{count / 10**size:.1f} {dict(zip((15, 12, 9, 6, 0), ('P', 'T', 'G', 'M', ''), strict=True))[size]}FLOP"


def duration(seconds: float) -> str:
    if seconds < 0.01:
        return "less than 0.01 s"
    if seconds < 90:
        return f"about {seconds:.0f} s" if seconds >= 9.5 else f"about {seconds:.1g} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
