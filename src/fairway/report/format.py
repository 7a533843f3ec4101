"""Numbers as a reader wants them: four decimals of bits per byte, two digits of a p-value."""

import math
from collections.abc import Callable, Iterable

from fairway.audit.interface import FAIL, PASS

NONE = "–"
_CHECK_TITLES = {"flip": "Flip test", "self_influence": "Self-influence", "null": "Null test"}


def decimals(value: float, places: int) -> str:
    """A number with so many decimals."""
    return NONE if math.isnan(value) else f"{value:.{places}f}".replace("-", "−")


def bits(value: float) -> str:
    """Bits per byte or nats, four decimals."""
    return decimals(value, 4)


def signed(value: float) -> str:
    """A difference in bits or nats, four decimals, always with its sign."""
    if math.isnan(value):
        return NONE
    text = f"{value:+.4f}"
    return "0.0000" if float(text) == 0 else text.replace("-", "−")


def mean_and_std(mean: float, std: float) -> str:
    """`mean ± std`; the mean alone where one seed leaves no standard deviation."""
    return bits(mean) if math.isnan(std) else f"{bits(mean)} ± {bits(std)}"


def interval(low: float, high: float, form: Callable[[float], str] = bits) -> str:
    """`low to high`, in spaces that do not break."""
    return NONE if math.isnan(low) else f"{form(low)}\u00a0to\u00a0{form(high)}"


def probability(p: float, least: float = 0.0) -> str:
    """A p-value with two significant digits; `≤` where it is the least that the method can give."""
    if math.isnan(p):
        return NONE
    if p <= least:
        return f"≤ {probability(least)}"
    p = float(f"{p:.2g}")
    if p < 1e-4:
        mantissa, exponent = f"{p:.1e}".split("e")
        return f"{mantissa} × 10^{int(exponent)}".replace("-", "−")
    return "> 0.99" if p > 0.99 else f"{p:.2g}"


def count(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{int(value):,}"


def compact(value: float, kilo: int = 1000) -> str:
    """At most three digits and a letter: 950, 1.2k, 34k, 5.6M. kilo: 1024 turns 2,048 into 2k."""
    unit = ""
    for larger in ("k", "M", "G"):
        if value < kilo:
            break
        value, unit = value / kilo, larger
    return f"{value:.1f}".removesuffix(".0") + unit if unit and value < 10 else f"{value:.0f}{unit}"


def plural(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def quantity(value: float, unit: str) -> str:
    """Bytes in full, seconds to a tenth."""
    if unit == "bytes":
        return f"{count(value)} bytes"
    return f"{value:,.0f} {unit}" if value.is_integer() else f"{value:,.1f} {unit}"


def joined(words: Iterable[str]) -> str:
    """Nothing, `a`, `a and b`, or `a, b and c`."""
    *first, last = [*words] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def check_title(name: str) -> str:
    """A check's name for people: `claimed_score` becomes `Claimed score`."""
    return _CHECK_TITLES.get(name, name.replace("_", " ").capitalize())


def badge(verdict: str) -> dict[str, str]:
    """A verdict's text, the mark before it, and its style class."""
    mark = {PASS: "✓", FAIL: "✗"}.get(verdict, "○")
    return {"text": verdict, "mark": mark, "style": verdict.lower().replace(" ", "-")}
