"""A style and a seed -> a score: every note and stroke with its time."""

from dataclasses import dataclass, field

import numpy as np

from procedural.instruments import INSTRUMENTS
from procedural.styles import ALL, STEPS, STEPS_PER_BEAT, STYLES, Style

TONICS = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
HIGHEST = 69  # A4: what lies above is not among nano's coefficients
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}


@dataclass(frozen=True)
class Note:
    """start and length in seconds, pitch as a MIDI note, loudness in (0, 1]."""

    instrument: str
    start: float
    length: float
    pitch: int
    loudness: float


@dataclass(frozen=True)
class Stroke:
    drum: str
    start: float
    loudness: float


@dataclass
class Score:
    """sections: (name, start in seconds); chords: (start, end, pitch classes), one to a bar."""

    style: str
    bpm: int
    tonic: int
    mode: str
    lead: str
    chord_instrument: str
    bass: str
    bars: int
    notes: list[Note] = field(default_factory=list)
    strokes: list[Stroke] = field(default_factory=list)
    sections: list[tuple[str, float]] = field(default_factory=list)
    chords: list[tuple[float, float, tuple[int, ...]]] = field(default_factory=list)

    @property
    def metre(self) -> str:
        return ALL[self.style].metre

    @property
    def step(self) -> float:
        """Seconds of a grid step."""
        return 60 / self.bpm / STEPS_PER_BEAT[self.metre]

    @property
    def bar(self) -> float:
        return self.step * STEPS[self.metre]

    @property
    def duration(self) -> float:
        """Seconds, with a second to ring out."""
        return self.bars * self.bar + 1.0

    def time(self, bar: int, step: int) -> float:
        """Where a step of the grid sounds: swing makes every second eighth late."""
        late = ALL[self.style].swing * (step % 4 == 2)
        return bar * self.bar + (step + late) * self.step

    def pitch(self, degree: int, octave: int) -> int:
        """MIDI note of a scale degree, counted from 0 and going on beyond the octave."""
        octaves, step = divmod(degree, 7)
        return 12 * (octave + octaves + 1) + self.tonic + SCALES[self.mode][step]


def _strokes(pattern: str) -> list[tuple[int, float, int]]:
    """(step, loudness, steps until the next stroke or the end of the bar)."""
    steps = [i for i, mark in enumerate(pattern) if mark != "."]
    ends = [*steps[1:], len(pattern)]
    return [(i, 1.0 if pattern[i] == "X" else 0.7, end - i) for i, end in zip(steps, ends, strict=True)]


def _nearest(pitch: int, centre: float) -> int:
    """The octave of `pitch` that lies nearest to `centre`."""
    return pitch + 12 * round((centre - pitch) / 12)


def _within(pitch: int, instrument: str) -> int:
    timbre = INSTRUMENTS[instrument]
    while pitch < timbre.low:
        pitch += 12
    while pitch > timbre.high:
        pitch -= 12
    return pitch


def _accompany(score: Score, style: Style, bar: int, root: int, pattern: str, rng: np.random.Generator) -> None:
    """Chords, close together around middle C; an arpeggio plays their notes one after another."""
    centre = rng.normal(60, 1)
    tones = sorted(_nearest(score.pitch(root + step, 4), centre) for step in (0, 2, 4))
    tones = [_within(tone, score.chord_instrument) for tone in tones]
    for number, (step, loudness, steps) in enumerate(_strokes(pattern)):
        played = [(tones + [tones[0] + 12])[(0, 1, 2, 3, 2, 1)[number % 6]]] if style.arpeggio else tones
        for tone in played:
            length = min(steps, 16) * score.step * 0.95
            score.notes.append(Note(score.chord_instrument, score.time(bar, step), length, tone, 0.5 * loudness))


def _bass(score: Score, bar: int, root: int, pattern: str, rng: np.random.Generator) -> None:
    low = _within(_nearest(score.pitch(root, 2), 38), score.bass)
    for number, (step, loudness, steps) in enumerate(_strokes(pattern)):
        fifth = 7 if number % 4 == 3 and rng.random() < 0.5 else 0
        start, length = score.time(bar, step), steps * score.step * 0.9
        score.notes.append(Note(score.bass, start, length, low + fifth, 0.8 * loudness))


def _melody(score: Score, bar: int, root: int, pattern: str, degree: int, rng: np.random.Generator) -> int:
    """A walk along the scale that lands on a chord tone at the start of the bar -> the last degree."""
    for number, (step, loudness, steps) in enumerate(_strokes(pattern)):
        degree += int(rng.choice((-2, -1, -1, 0, 1, 1, 2)))
        if number == 0:  # to the nearest of root, third and fifth
            degree = min(
                (root + k + 7 * o for k in (0, 2, 4) for o in (-2, -1, 0, 1, 2)), key=lambda d: abs(d - degree)
            )
        degree = int(np.clip(degree, -3, 9))
        octave = 4 if score.tonic < 6 else 3
        tone = _within(score.pitch(degree, octave), score.lead)
        tone -= 12 * (tone > HIGHEST)
        score.notes.append(Note(score.lead, score.time(bar, step), steps * score.step * 0.95, tone, loudness))
    return degree


def _drum(score: Score, bar: int, drums: dict[str, str]) -> None:
    for drum, pattern in drums.items():
        for step, loudness, _ in _strokes(pattern):
            score.strokes.append(Stroke(drum, score.time(bar, step), loudness))


def _sections(bars: int, rng: np.random.Generator) -> list[str]:
    """A name per bar: an intro without melody now and then, verse, chorus, and a last bar that rings."""
    intro = int(bars >= 4 and rng.random() < 0.4)
    body = bars - intro - 1
    verse = (body + 1) // 2
    return ["intro"] * intro + ["verse"] * verse + ["chorus"] * (body - verse) + ["outro"]


def compose(seed: int, style: str | None, seconds: tuple[float, float]) -> Score:
    rng = np.random.default_rng([seed, 1])
    drawn = str(rng.choice(list(STYLES)))
    style = style or drawn
    table = ALL[style]
    bpm = int(rng.choice(table.bpm))
    lead = str(rng.choice(table.leads))
    chords = str(rng.choice(table.chord_instruments))
    if lead in table.chord_instruments and rng.random() < 0.4:
        chords = lead
    score = Score(
        style=style,
        bpm=bpm,
        tonic=int(rng.integers(12)),
        mode="minor" if rng.random() < table.minor else "major",
        lead=lead,
        chord_instrument=chords,
        bass=str(rng.choice(table.basses)),
        bars=0,
    )
    score.bars = max(2, round((rng.uniform(*seconds) - 1.0) / score.bar))
    _fill(score, table, rng)
    return score


def _fill(score: Score, style: Style, rng: np.random.Generator) -> None:
    def pick(patterns):
        return patterns[int(rng.integers(len(patterns)))]

    progression = [int(degree) - 1 for degree in pick(style.progressions).split()]
    chords, bass, drums = pick(style.chords), pick(style.bass), pick(style.drums)
    motifs = {"verse": (pick(style.rhythms), pick(style.rhythms)), "chorus": (pick(style.rhythms), pick(style.rhythms))}
    degree, ring = int(rng.integers(0, 5)), "X" + "." * (STEPS[score.metre] - 1)
    names = _sections(score.bars, rng)
    for bar, name in enumerate(names):
        root = 0 if name == "outro" else progression[bar % len(progression)]
        if bar == 0 or name != names[bar - 1]:
            score.sections.append((name, bar * score.bar))
        classes = tuple(score.pitch(root + step, 4) % 12 for step in (0, 2, 4))
        score.chords.append((bar * score.bar, (bar + 1) * score.bar, classes))
        outro = name == "outro"
        _accompany(score, style, bar, root, ring if outro else chords, rng)
        _bass(score, bar, root, ring if outro else bass, rng)
        if name != "intro":
            degree = _melody(score, bar, root, ring if outro else motifs[name][bar % 2], degree, rng)
        if not outro:
            _drum(score, bar, drums)
    score.notes.sort(key=lambda note: note.start)
    score.strokes.sort(key=lambda stroke: stroke.start)
