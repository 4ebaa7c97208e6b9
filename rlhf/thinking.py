"""The tags round the reasoning of a completion, as the chat templates of EXAONE and others write them."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
