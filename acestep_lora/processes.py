"""Several processes that are one run: which of them this is."""

import os

_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Variables of Lightning, torchrun and Slurm; the first process of all is 0 in each that is set."""


def is_first() -> bool:
    """Whether this process is the one that writes files and speaks to the user, known before any trainer exists."""
    return all(os.environ.get(name, "0") == "0" for name in _RANKS)
