"""Vectors, adapters and weights learned by gradient. Needs the extra `steerable[train]`; the commands are in `jobs`."""

import logging
from typing import Literal

Method = Literal["bias", "adaptive", "lora", "tinylora", "full"]
"""What is trained; see `parameters`."""

# transformers imports it where it is installed, and on a CPU it then warns of a kernel that nothing here uses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
