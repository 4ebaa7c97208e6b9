"""The tags round the reasoning of a completion, as the chat templates of EXAONE and others write them."""

import re

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
_REASONING = re.compile(r"<think>(.*?)(?:</think>|\Z)", re.DOTALL)


def thinks(completion: str) -> bool:
    """Whether the completion has a reasoning block with something in it; a block cut off by the length limit counts."""
    block = _REASONING.search(completion)
    return block is not None and bool(block.group(1).strip())
