"""Train ACE-Step 1.5 adapters on your own songs."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported, before a command begins
