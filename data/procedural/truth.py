"""What a song is, in numbers and words."""

from dataclasses import dataclass

import numpy as np

from procedural.compose import TONICS, Score

_TEMPO = ((80, "slow"), (112, "mid-tempo"), (141, "fast"), (999, "very fast"))


@dataclass(frozen=True)
class Truth:
    """keyscale as `F# minor`, timesignature as `3/4`; bpm counts quarters, in 6/8 dotted quarters.

    chords: (start, end, pitch classes) in seconds; onsets: seconds, ascending, each moment once;
    sections: (name, start).
    """

    style: str
    bpm: int
    keyscale: str
    timesignature: str
    duration: float
    lead: str
    instruments: tuple[str, ...]
    drums: tuple[str, ...]
    sections: tuple[tuple[str, float], ...]
    chords: tuple[tuple[float, float, tuple[int, ...]], ...]
    onsets: tuple[float, ...]
    caption: str
    genre: str


def _caption(score: Score, mood: str, drums: tuple[str, ...], rng: np.random.Generator) -> str:
    tempo = next(word for limit, word in _TEMPO if score.bpm < limit)
    beat = "no drums" if not drums else f"{' and '.join(drums)}"
    chords = "chords" if score.chord_instrument != score.lead else "chords on the same instrument"
    with_chords = f"{score.chord_instrument} {chords}" if score.chord_instrument != score.lead else chords
    forms = (
        f"{mood} {score.style} piece with {score.lead} melody, {with_chords}, {score.bass} and {beat}",
        f"{score.lead} plays the melody of a {tempo} {score.style} song, {mood}, {with_chords}, {score.bass}, {beat}",
        f"{mood} {tempo} {score.style}, {score.lead} lead, {with_chords}, {score.bass}, {beat}, {score.mode} key",
        f"{score.style}, {score.lead} lead, {mood}",
    )
    caption = forms[int(rng.integers(len(forms)))]
    return caption[0].upper() + caption[1:]


def describe(score: Score, seed: int) -> Truth:
    from procedural.styles import ALL

    rng = np.random.default_rng([seed, 3])
    drums = tuple(sorted({stroke.drum for stroke in score.strokes}))
    mood = str(rng.choice(ALL[score.style].moods))
    onsets = sorted({round(event.start, 3) for event in [*score.notes, *score.strokes]})
    return Truth(
        style=score.style,
        bpm=score.bpm,
        keyscale=f"{TONICS[score.tonic]} {score.mode}",
        timesignature=score.metre,
        duration=score.duration,
        lead=score.lead,
        instruments=tuple(dict.fromkeys((score.lead, score.chord_instrument, score.bass))),
        drums=drums,
        sections=tuple(score.sections),
        chords=tuple(score.chords),
        onsets=tuple(onsets),
        caption=_caption(score, mood, drums, rng),
        genre=f"{score.style}, {score.lead}",
    )
