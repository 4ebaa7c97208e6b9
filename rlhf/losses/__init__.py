"""ADVANTAGE -> LOSS: pure functions of tensors. `B` rows, `T` tokens; every [B, T] is aligned with `token_ids`."""
