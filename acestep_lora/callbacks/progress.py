"""Lightning's rich progress bar, plain text where the output is not a terminal."""

import sys

from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar


def progress_bar(refresh_rate: int = 10) -> ProgressBar:
    """A bar with rate and remaining time; redrawing costs a device synchronisation, hence every few steps only."""
    if sys.stdout.isatty():
        return RichProgressBar(refresh_rate=refresh_rate)
    return TQDMProgressBar(refresh_rate=max(refresh_rate, 50))
