"""Vectors learned by gradient; `steerable train rl` is `rl.train_rl`. Needs the extra `steerable[train]`."""
