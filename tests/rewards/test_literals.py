"""Numbers as people write them: what is read, exactly, and what is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest

from rewards.literals import conclude, parse_literal, same_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("-3", -3),
        ("+3", 3),
        ("−3", -3),
        ("007", 7),
        ("1,234,567", 1234567),
        ("1{,}234", 1234),
        (r"1\,234", 1234),
        ("$1,234.50", Fraction("1234.5")),
        (r"\$18.00", 18),
        ("-$5", -5),
        ("18.", 18),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac34", Fraction(3, 4)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        ("2 1/2", Fraction(5, 2)),
        ("-2 1/2", Fraction(-5, 2)),
        ("15%", Fraction(15, 100)),
        (r"15\%", Fraction(15, 100)),
        ("15 percent", Fraction(15, 100)),
        ("1e3", 1000),
        (r"3 \times 10^{5}", 300000),
        (r"3\cdot10^{-2}", Fraction(3, 100)),
        ("18 dollars", 18),
        ("5 miles per hour", 5),
        ("5 cm^2", 5),
        ("5cm", 5),
        (r"5\text{ cm}", 5),
        (r"5 \text{m}", 5),
        (r"5 \text{m}^2", 5),
        (r"28\text{ units}^2", 28),
        (r"\frac{-35}{9}", Fraction(-35, 9)),
        (r"11,\! 111,\! 100", 11111100),
        (r"90^\circ", 90),
        ("90°", 90),
        ("2.5 million dollars", 2500000),
        ("18달러", 18),
        ("x = 18", 18),
        ("**18**", 18),
        ("$18$", 18),
        ("f(3) = 18", 18),
        (r"\angle ABC = 60^\circ", 60),
        (r"AB \approx 7", 7),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"-0.1\overline{6}", Fraction(-1, 6)),
        ("10^{-7}", Fraction(1, 10**7)),
        ("2000_{10}", 2000),
        (r"5\text{ m/s}", 5),
    ],
)
def test_a_plain_number_is_read_exactly(text: str, value: int | Fraction) -> None:
    literal = parse_literal(text)
    assert literal is not None
    assert literal.value == value


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "eighteen", "3 + 4", "2^5", "9^{9^{9^9}}", r"\sqrt{9}", "5!", "1/0", r"\frac{1}{0}", "1,2", "(1,2)"),
        *(
            "5x",
            r"1\frac{-1}{2}",
            "5 x",
            "5i",
            r"4\sqrt(2)",
            "5 or 6",
            "5 or six",
            "5 plus six",
            "18 19",
            "3..4",
            "12,34",
            "__import__('os')",
        ),
        *(
            "5 minus one",
            r"18 \text{ is wrong}",
            r"3\mathrm{i}",
            "2000_3",
            "x^2 = 5",
            "10^{10^{10}}",
            "1e99999",
            "9" * 500,
            "18 a very long unit of many words",
            "2 dozen",
            "1:30",
            "0x10",
            "nan",
            "inf",
        ),
    ],
)
def test_anything_else_is_no_literal(text: str) -> None:
    assert parse_literal(text) is None


@pytest.mark.parametrize(
    ("gold", "given", "same"),
    [
        ("18", "18.0", True),
        ("18", "18.000001", False),
        ("1000000", "1000001", False),
        ("0.5", "1/2", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.333", False),
        ("0.0000001", "0.0000002", False),
        ("10", "10%", False),
        ("0.1", "10%", True),
        ("10%", "10", True),
        ("10%", "0.1", True),
        ("10%", "11", False),
        ("5", "-5", False),
        (r"12\text{ cm}", "12", True),
        ("12", r"12\text{ cm}", True),
        (r"12\text{ cm}", "12 centimeters", True),
        (r"12\text{ cm}", r"12\text{ m}", False),
        ("12 square inches", r"12\text{ in}^2", True),
        ("60 mph", "60 miles per hour", True),
        ("60 mph", "60 km per hour", False),
        (r"\$50", "50 cents", False),
        (r"90^\circ", "90 degrees", True),
        (r"90^\circ", "90 radians", False),
        ("12 apples", "12 pears", True),  # only units of measure are known
    ],
)
def test_numbers_compare_exactly_or_to_a_relative_tolerance(gold: str, given: str, same: bool) -> None:
    gold_literal, given_literal = parse_literal(gold), parse_literal(given)
    assert gold_literal is not None
    assert given_literal is not None
    assert same_number(gold_literal, given_literal) is same


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("3 + 4 = 7", 7),
        (r"P = \frac{3}{12} = \frac{1}{4}", Fraction(1, 4)),
        ("6 = 7", None),
        ("x^2 = 7", None),
        ("x + 1 = 7", None),
        (r"7 = 3 \times 4", None),
        ("= ", None),
    ],
)
def test_an_equation_of_numbers_concludes_its_last_side(text: str, value: int | Fraction | None) -> None:
    literal = conclude(text)
    assert (literal and literal.value) == value


def test_a_percent_sign_may_be_added_when_the_question_speaks_of_percent() -> None:
    gold, given = parse_literal("10"), parse_literal("10%")
    assert gold is not None
    assert given is not None
    assert same_number(gold, given, percent_implied=True)
