"""Hot numerics: one operator, one truth in plain torch, faster twins behind the same signature."""
