"""Attacks on the rewards: programs that try to leave the sandbox, texts that try to be paid for nothing."""
