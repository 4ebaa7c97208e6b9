"""ADVANTAGE -> LOSS: pure functions of tensors. `B` rows, `T` tokens; every [B, T] array is aligned with `token_ids`."""
