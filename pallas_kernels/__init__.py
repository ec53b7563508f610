"""Operations on arrays: one folder per op, `reference.py` in it is the op's meaning. Knows jax, and nothing of ours."""
