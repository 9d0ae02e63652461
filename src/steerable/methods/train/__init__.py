"""Vectors learned by gradient; `steerable train rl` is `rl.train_rl`. Needs the extra `steerable[train]`."""

import logging

# transformers imports it where it is installed, and on a CPU it then warns of a kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
