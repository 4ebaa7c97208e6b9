"""The built-in reward `instruction_following`: verifiable constraints on a text, in IFEval's format.

Kinds of constraint of your own register in a module that `rewards.modules` names:

    from rewards.instruction import Response, Verdict, instruction

    @instruction("my:haiku")
    def haiku(response: Response, lines: int = 3) -> Verdict:
        found = len(response.text.splitlines())
        return found == lines or f"{found} lines, {lines} wanted"
"""

from rewards.instruction import checkers as _checkers  # noqa: F401  importing it registers IFEval's 25 instructions
from rewards.instruction.registry import Verdict, ids, instruction
from rewards.instruction.response import Response
from rewards.instruction.reward import instruction_following

__all__ = ["Response", "Verdict", "ids", "instruction", "instruction_following"]
