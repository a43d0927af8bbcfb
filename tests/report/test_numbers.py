"""Numbers on the page."""

import pytest

from fisherscope.report.numbers import p_value, percent, short, signed, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0, "0"), (7.0, "7"), (1234567, "1,234,567"), (0.2, "0.200"), (12.345, "12.3"),
        (123.4, "123"),
        (1234.5, "1,234"), (1.234e-7, "1.23e−7"), (-2e8, "−2.00e8"), (float("nan"), "–"), (None, "–"),
        (float("inf"), "∞"), (True, "yes"), (-3, "−3"),
    ],
)  # fmt: skip
def test_short(value, text):
    """Three significant digits, whole numbers whole, a real minus sign."""
    assert short(value) == text


def test_other_forms():
    """Cosines have signs, shares percent signs, tiny p-values a bound, sizes a unit."""
    assert (signed(-0.25), signed(float("nan"))) == ("−0.250", "–")
    assert (percent(0.1234), percent(None)) == ("12.3%", "–")
    assert (p_value(0.0), p_value(0.05)) == ("< 1e−99", "0.0500")
    assert (size(10), size(3 << 20)) == ("10 B", "3.0 MiB")
