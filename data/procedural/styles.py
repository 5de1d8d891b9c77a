"""Styles as tables: tempi, metre, harmony and grooves on a grid of steps.

A bar of 4/4 has 16 steps (sixteenths), of 3/4 12 and of 6/8 12 (sixteenths). In a pattern `X` is an accent, `x` a
plain stroke, `.` nothing. Chord progressions are degrees of the scale, one to a bar.

The tempi of what nano is trained on are near simple multiples of the speeds at which its rotary embedding turns: 119.4
times a minute at the fastest, and 3/4 as fast from one frequency to the next.
"""

from dataclasses import dataclass

LEADS = ("piano", "guitar", "organ", "strings", "flute", "trumpet", "synth", "bells")
CHORDS = ("piano", "guitar", "organ", "strings", "synth")
STEPS = {"4/4": 16, "3/4": 12, "6/8": 12}
STEPS_PER_BEAT = {"4/4": 4, "3/4": 4, "6/8": 6}  # the beat that BPM counts: a quarter, in 6/8 a dotted quarter


@dataclass(frozen=True)
class Style:
    """bpm, chords, bass, rhythms: what to choose from; drums: choices, each a pattern per drum."""

    metre: str
    bpm: tuple[int, ...]
    progressions: tuple[str, ...]
    chords: tuple[str, ...]
    bass: tuple[str, ...]
    rhythms: tuple[str, ...]
    drums: tuple[dict[str, str], ...]
    moods: tuple[str, ...]
    swing: float = 0.0  # share of a step by which every second eighth is late
    minor: float = 0.5  # probability
    arpeggio: bool = False
    leads: tuple[str, ...] = LEADS
    chord_instruments: tuple[str, ...] = CHORDS
    basses: tuple[str, ...] = ("plucked bass", "synth bass")


STYLES = {
    "ambient": Style(
        metre="4/4",
        bpm=(67, 76),
        progressions=("1 4", "1 6", "6 4 1 5", "1 3 4 4", "4 1"),
        chords=("X...............", "X.......x......."),
        bass=("X...............",),
        rhythms=("X.......x.......", "X...........x...", "....X.......x...", "X.....x.....x..."),
        drums=({"kick": "X.......X.......", "hat": "X...X...X...X..."},),
        moods=("calm", "dreamy", "spacious", "soft"),
        minor=0.4,
    ),
    "waltz": Style(
        metre="3/4",
        bpm=(101, 113, 119, 134, 151, 159),
        progressions=("1 4 5 1", "1 6 2 5", "1 5 1 4", "4 1 5 1"),
        chords=("....x...x...",),
        bass=("X...........", "X.......x..."),
        rhythms=("X...x...x...", "X.......x...", "X...x.x.x...", "X.....x.x...", "X..........."),
        drums=(
            {"kick": "X...........", "hat": "....x...x..."},
            {"kick": "X...........", "snare": "....x...x...", "hat": "X...x...x..."},
        ),
        moods=("elegant", "playful", "graceful", "sentimental"),
        minor=0.35,
    ),
    "folk": Style(
        metre="6/8",
        bpm=(67, 76, 85),
        progressions=("1 5 6 4", "1 4 1 5", "6 4 1 5", "1 1 4 5"),
        chords=("X.x.x.x.x.x.",),
        bass=("X.....x.....",),
        rhythms=("X...x.X...x.", "X.x.x.X.....", "X.....x.....", "X...x.x.x.x.", "X.x.x.X...x."),
        drums=(
            {"kick": "X...........", "snare": "......x....."},
            {"kick": "X.....X.....", "clap": "......X.....", "shaker": "X.x.x.X.x.x."},
        ),
        moods=("gentle", "warm", "pastoral", "tender"),
        minor=0.4,
        arpeggio=True,
    ),
    "rock": Style(
        metre="4/4",
        bpm=(101, 113, 119, 134, 151),
        progressions=("1 4 5 4", "6 4 1 5", "1 5 4 4", "1 7 4 1"),
        chords=("X.x.x.x.X.x.x.x.", "X...x...X...x...", "X..x..x.X..x..x."),
        bass=("X.x.x.x.X.x.x.x.", "X...x...x...x..."),
        rhythms=("X.x.x...X...x...", "X...x.x.x...x...", "X.......X.x.x...", "X..x..x.X......."),
        drums=(
            {"kick": "X.......X.x.....", "snare": "....X.......X...", "hat": "X.x.X.x.X.x.X.x."},
            {"kick": "X.....x.X.......", "snare": "....X.......X...", "hat": "X...X...X...X..."},
            {"kick": "X.......X.......", "snare": "....X.......X..x", "tom": "..............xx"},
        ),
        moods=("driving", "energetic", "bold", "raw"),
    ),
    "house": Style(
        metre="4/4",
        bpm=(113, 119, 134),
        progressions=("1 6 4 5", "6 5 4 4", "1 1 6 6", "4 5 6 6"),
        chords=("..x...x...x...x.", "..x..x....x..x.."),
        bass=("..x...x...x...x.", "X.xxX.xxX.xxX.xx"),
        rhythms=("X..x..x...x.x...", "X.....x.X.....x.", "X..x..X..x..X...", "..x.x...X.x....."),
        drums=(
            {"kick": "X...X...X...X...", "hat": "..x...x...x...x.", "clap": "....X.......X..."},
            {"kick": "X...X...X...X...", "hat": "x.x.x.x.x.x.x.x.", "clap": "....X.......X..."},
        ),
        moods=("pulsing", "bright", "hypnotic", "upbeat"),
        minor=0.65,
        basses=("synth bass",),
    ),
    "lofi": Style(
        metre="4/4",
        bpm=(76, 85, 90),
        progressions=("2 5 1 6", "1 6 2 5", "4 3 2 1", "6 2 5 1"),
        chords=("X......x..x.....", "X.........x....."),
        bass=("X......x..x.....", "X.......x.....x."),
        rhythms=("X...x...X.....x.", "..x...x.X.......", "X.....x...x.....", "X.x...X...x.x..."),
        drums=(
            {"kick": "X......x..x.....", "snare": "....X.......X...", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "X.........x.....", "snare": "....X.......X...", "shaker": "x.x.x.x.x.x.x.x."},
        ),
        moods=("mellow", "lazy", "nostalgic", "cosy"),
        swing=0.35,
        minor=0.6,
        basses=("plucked bass",),
    ),
    "chiptune": Style(
        metre="4/4",
        bpm=(134, 151, 159),
        progressions=("1 5 6 4", "6 4 1 5", "1 4 5 5", "1 7 6 5"),
        chords=("xxxxxxxxxxxxxxxx", "x.x.x.x.x.x.x.x."),
        bass=("X...x...X...x...", "X.x.X.x.X.x.X.x."),
        rhythms=("X.x.x.x.X...x...", "X...X...x.x.x.x.", "X.....x.X.....x.", "X.x.X.x.X......."),
        drums=(
            {"kick": "X.......X.......", "snare": "....X.......X...", "hat": "x.x.x.x.x.x.x.x."},
            {"kick": "X...X...X...X...", "snare": "....X.......X..."},
        ),
        moods=("playful", "frantic", "cheerful", "retro"),
        arpeggio=True,
        basses=("synth bass",),
    ),
}

HELD_OUT = "calypso"
"""The style that pre-training never hears: its own instrument, its own drums, a 3+3+2 groove."""

_CALYPSO = Style(
    metre="4/4",
    bpm=(96, 104, 112, 120),
    progressions=("1 4 5 1", "1 1 5 5", "4 1 5 1", "1 2 5 1"),
    chords=("...x..x....x..x.", "..xx..x...xx..x."),
    bass=("X..x..x.X..x..x.", "X.....x.X.....x."),
    rhythms=("X..x..x.X..x..x.", "X..X..X.x.x.x...", "..x.x..xX..x..x.", "X..x..X........."),
    drums=(
        {"conga": "X..x..x.X..x..xx", "cowbell": "X...x.x.X...x.x.", "shaker": "x.xxx.xxx.xxx.xx"},
        {"conga": "X..X..x.x.x.X.x.", "cowbell": "X.x.x.x.X.x.x.x.", "kick": "X.....x.X.....x."},
    ),
    moods=("sunny", "joyful", "breezy", "festive"),
    minor=0.0,
    leads=("steel drum",),
    chord_instruments=("steel drum",),
    basses=("plucked bass",),
)

ALL = STYLES | {HELD_OUT: _CALYPSO}
