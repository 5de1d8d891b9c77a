"""A procedural music source: `song(seed)` composes and plays a short piece and says exactly what it is.

Synthesised by nothing but numpy, so what it makes is CC0. The nano model is trained on it; one style with its own
instrument and groove (`HELD_OUT`) is kept apart for the demo songs.
"""

from procedural.compose import Note, Score, compose
from procedural.play import play
from procedural.styles import HELD_OUT, STYLES
from procedural.truth import Truth, describe

__all__ = ["HELD_OUT", "STYLES", "Note", "Score", "Truth", "compose", "describe", "play", "song"]


def song(seed: int, rate: int = 16000, style: str | None = None, seconds: tuple[float, float] = (9, 13)):
    """-> audio [samples, 2] float32 with peak 0.9 at most, and its Truth. The same seed gives the same song.

    style: a name of STYLES, or HELD_OUT; None draws one of STYLES. seconds: shortest and longest; a bar may exceed it.
    """
    score = compose(seed, style, seconds)
    return play(score, seed, rate), describe(score, seed)
