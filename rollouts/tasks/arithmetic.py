"""Sums, differences, lists, digits and letters: tasks whose answer is one number, verified by `math`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rollouts.tasks.families import Problem, task_family

_LETTERS = "abcde"

# --- arithmetic -------------------------------------------------------------------------------------------------------


def _operand(digits: int) -> range:
    return range(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def _operands(count: int) -> Callable[[int], tuple[range, ...]]:
    return lambda difficulty: (_operand(difficulty),) * count


def _unordered(*values: object) -> str:
    return ",".join(str(value) for value in sorted(values, key=str))


def _columns(*numbers: int) -> list[list[int]]:
    """Digits of equal places, units first; leading zeros where a number is shorter."""
    width = max(len(str(number)) for number in numbers)
    rows = [f"{number:0{width}d}"[::-1] for number in numbers]
    return [[int(row[place]) for row in rows] for place in range(width)]


def _chain(first: int, sign: str, terms: Sequence[int]) -> str:
    """`15, -, [3, 1] -> 15-3=12-1=11`: one operation at a time, so each result follows from two numbers in sight."""
    written, total = str(first), first
    for term in terms:
        total += term if sign == "+" else -term
        written += f"{sign}{term}={total}"
    return written


def _without_carry(sign: int, *numbers: int) -> str:
    """`+1: 47, 38 -> 75`, `-1: 43, 28 -> 25`: each column on its own, nothing carried or borrowed."""
    digits = [(column[0] + sign * sum(column[1:])) % 10 for column in _columns(*numbers)]
    return str(int("".join(map(str, reversed(digits)))))


def _column_sums(*numbers: int) -> str:
    """`47, 38 -> 7+8=15,1+4=5+3=8`: units first, each column begins with the carry of the one before."""
    steps, carry = [], 0
    for column in _columns(*numbers):
        terms = [carry, *column] if carry else column
        steps.append(_chain(terms[0], "+", terms[1:]))
        carry = (sum(column) + carry) // 10
    return ",".join(steps)


def _column_differences(large: int, small: int) -> str:
    """`43, 28 -> 13-8=5,4-2=2-1=1`: units first, ten borrowed where a column would be negative."""
    steps, borrowed = [], 0
    for top, bottom in _columns(large, small):
        lent = 10 if top - bottom - borrowed < 0 else 0
        steps.append(_chain(top + lent, "-", [bottom, 1] if borrowed else [bottom]))
        borrowed = 1 if lent else 0
    return ",".join(steps)


@task_family("addition", _operands(2))
def _addition(a: int, b: int) -> Problem:
    return Problem(f"{a}+{b}=?", str(a + b), _column_sums(a, b), _unordered(a, b), _without_carry(1, a, b))


@task_family("subtraction", _operands(2))
def _subtraction(a: int, b: int) -> Problem:
    large, small = max(a, b), min(a, b)
    answer, trace = str(large - small), _column_differences(large, small)
    return Problem(f"{large}-{small}=?", answer, trace, f"{large},{small}", _without_carry(-1, large, small))


@task_family("three_term_sum", _operands(3))
def _three_term_sum(a: int, b: int, c: int) -> Problem:
    numbers = (a, b, c)
    question, answer = f"{a}+{b}+{c}=?", str(sum(numbers))
    return Problem(question, answer, _column_sums(*numbers), _unordered(*numbers), _without_carry(1, *numbers))


@task_family("multiplication", _operands(2))
def _multiplication(a: int, b: int) -> Problem:
    parts = [(int(digit) * 10**place) for place, digit in enumerate(str(b)[::-1]) if digit != "0"]
    steps = [f"{a}*{part}={a * part}" for part in parts]
    if len(parts) > 1:
        steps.append("+".join(str(a * part) for part in parts) + f"={a * b}")
    return Problem(f"{a}*{b}=?", str(a * b), ",".join(steps) or f"{a}*0=0", _unordered(a, b))


@task_family("modulo", lambda difficulty: (_operand(difficulty), range(2, 10)))
def _modulo(a: int, b: int) -> Problem:
    below = a - a % b
    return Problem(f"{a}%{b}=?", str(a % b), f"{b}*{a // b}={below},{a}-{below}={a % b}", f"{a},{b}")


@task_family("gcd", lambda difficulty: (range(1, 10**difficulty),) * 2)
def _gcd(a: int, b: int) -> Problem:
    large, small = max(a, b), min(a, b)
    steps, top, bottom = [], large, small
    while bottom:
        steps.append(f"{top}%{bottom}={top % bottom}")
        top, bottom = bottom, top % bottom
    return Problem(f"gcd({a},{b})=?", str(top), ",".join(steps), _unordered(a, b))


# --- lists, digits and letters ----------------------------------------------------------------------------------------


@task_family("maximum", _operands(3))
def _maximum(*values: int) -> Problem:
    listed = ",".join(map(str, values))
    running = ",".join(str(max(values[: count + 1])) for count in range(len(values)))
    return Problem(f"max({listed})=?", str(max(values)), running, _unordered(*values))


@task_family("sort_digits", lambda difficulty: (range(1, 10),) * (difficulty + 1))
def _sort_digits(*digits: int) -> Problem:
    prefixes = ["".join(map(str, sorted(digits[: count + 1]))) for count in range(len(digits))]
    number = "".join(map(str, digits))
    return Problem(f"sort({number})=?", prefixes[-1], ",".join(prefixes), _unordered(*digits))


@task_family("digit_sum", lambda difficulty: (range(1, 10), *(range(10),) * difficulty))
def _digit_sum(*digits: int) -> Problem:
    running = ",".join(str(sum(digits[: count + 1])) for count in range(len(digits)))
    number = "".join(map(str, digits))
    return Problem(f"digits({number})=?", str(sum(digits)), running, _unordered(*digits))


@task_family("count_letter", lambda difficulty: (_LETTERS,) * (2 * difficulty + 3))
def _count_letter(letter: str, *word: str) -> Problem:
    running = "".join(f"{read}{word[: count + 1].count(letter)}" for count, read in enumerate(word))
    question = f"count({letter},{''.join(word)})=?"
    return Problem(question, str(word.count(letter)), running, question)
