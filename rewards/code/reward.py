"""The built-in reward `code`: does the program in the final answer pass the record's tests?

The program is the last closed code block after the last `</think>`. `metadata.tests` says what it must do; its forms
are described in `rewards.code.suites`. It runs in a sandbox whose tier a self-test has proven; without one the reward
fails, unless `allow_unsafe` is set.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rewards.code import suites
from rewards.code.extract import PYTHON, last_block
from rewards.code.grade import Options, grade
from rewards.code.launch import MIB, Limits, Tier
from rewards.code.tiers import self_test
from rewards.registry import RewardInput, Score, reward
from rlhf.errors import ConfigError, DataError

_log = logging.getLogger(__name__)


@reward("code")
def code(  # noqa: PLR0913 each is a parameter in the configuration
    sample: RewardInput,
    *,
    partial_credit: bool = False,
    float_tolerance: float = 1e-9,
    strict_sequences: bool = False,
    command: Sequence[str] | None = None,
    suffix: str = ".txt",
    wall_s: float = 8.0,
    test_s: float = 4.0,
    memory_mib: int = 512,
    allow_unsafe: bool = False,
) -> Score:
    """1.0 when every test passes, else 0.0; with `partial_credit` the share of tests that pass.

    `command` runs programs of another language on stdin tests, for example ["node", "{source}"] with `suffix: .js`.
    Raises DataError for a record whose tests are broken, ConfigError where no sandbox tier holds.
    """
    tests = suites.parse(sample.metadata)
    if command and not all(isinstance(test, suites.ProgramTest) for test in tests):
        raise DataError("metadata.tests: must be stdin tests when the reward has a command. Only programs run by it.")
    source = last_block(sample.final, None if command else PYTHON)
    tier = _tier(allow_unsafe)
    if source is None:
        return Score(0.0, "no closed code block at the end of the final answer", {f"tier_{tier.value}": 1.0})
    limits = Limits(wall_s=wall_s, test_s=test_s, memory_bytes=memory_mib * MIB)
    options = Options(float_tolerance, strict_sequences, not partial_credit, (suffix, *command) if command else ())
    result = grade(source, tests, limits, options, tier)
    value = result.passed_fraction if partial_credit else float(result.passed)
    parts = {"passed_fraction": result.passed_fraction, "elapsed_s": result.elapsed_s, f"tier_{tier.value}": 1.0}
    return Score(value, result.summary(), parts)


def _tier(allow_unsafe: bool) -> Tier:
    try:
        return self_test()
    except ConfigError as refused:
        if not allow_unsafe:
            raise
        _log.warning("rewards.code runs foreign code WITHOUT a sandbox (allow_unsafe): %s", refused)
        return Tier.UNSAFE
