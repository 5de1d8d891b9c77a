"""BPM, key and time signature of songs, estimated on this machine by `tempo` and `key`."""

import tempfile
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from acestep_lora.annotate import key, tempo
from acestep_lora.annotate.provider import Answer, ProviderError
from acestep_lora.data import fields
from acestep_lora.data.audio import AudioError, probe, spool
from acestep_lora.data.track import Track

HIGH = 0.8  # a confidence above it can be relied on: over 95 % of such answers were right (docs/log.md)
LONGEST = 120  # seconds, from the middle: introductions and endings mislead
SHORTEST = 2  # seconds
ENOUGH = 20  # seconds, of the shortest music that the models were fitted on
SILENCE = 1e-4  # of full scale: the range of nearly all samples
SAME_TEMPO = 0.04  # ratio; what listeners tap differs by as much


def estimate(samples: np.ndarray) -> Answer:
    """What is heard in samples at `tempo.RATE`, [n] or [n, channels]; what cannot be told is left out.

    "bpm" is to 0.1 and counts quarter notes, in 6/8 dotted quarters. "timesignature" is "3", "4" or "6"; music in 2/4
    is called "4". Confidences are probabilities, lowered in proportion for less than `ENOUGH` seconds.
    """
    signal = _mono(samples)
    seconds = len(signal) / tempo.RATE
    if seconds < SHORTEST or np.ptp(np.percentile(signal, [1, 99])) < SILENCE:
        return Answer({})
    values, confidence = {}, {}
    if beat := tempo.estimate(signal):
        values |= {"bpm": beat.bpm, "timesignature": beat.metre}
        confidence |= {"bpm": beat.confidence, "timesignature": beat.metre_confidence}
    if tonality := key.estimate(signal, tempo.RATE):
        values["keyscale"], confidence["keyscale"] = tonality
    return Answer(values, {name: chance * min(1, seconds / ENOUGH) for name, chance in confidence.items()})


def _mono(samples: np.ndarray) -> np.ndarray:
    """The mean of the channels, or the first where they cancel each other, as with one of them inverted."""
    if samples.ndim == 1:
        return samples
    mean, first = samples.mean(axis=1), samples[:, 0]
    return first if mean.std() < 0.1 * first.std() else mean


def alternatives(bpm: float) -> tuple[int, ...]:
    """Half and double the tempo, which a listener may tap as well, as far as `fields.bpm` has them."""
    return tuple(round(other) for other in (bpm / 2, bpm * 2) if 30 <= other <= 300)


def agrees(field: str, estimated: object, annotated: object) -> bool:
    """Whether an annotation may be true beside the estimate, both in the normal form of `fields`.

    "bpm": within 4 %, or so of half or double. "keyscale": the same key, however spelt, or the relative one.
    "timesignature": the same, or both of 2/4 and 4/4.
    """
    return _AGREE[field](estimated, annotated)


def _same_tempo(estimated: float, annotated: float) -> bool:
    return any(abs(estimated * factor / annotated - 1) <= SAME_TEMPO for factor in (0.5, 1, 2))


def _scale(keyscale: str) -> int:
    """Tonic of the major key with the same notes, in semitones above C."""
    name, mode = keyscale.split()
    return (fields.pitch_class(name) + 3 * (mode == "minor")) % 12


_AGREE = {
    "bpm": _same_tempo,
    "keyscale": lambda estimated, annotated: _scale(estimated) == _scale(annotated),
    "timesignature": lambda estimated, annotated: estimated == annotated or {estimated, annotated} == {"2", "4"},
}


@dataclass(frozen=True)
class TempoKey:
    """The estimator as a provider; it reads at most the middle `LONGEST` seconds into memory."""

    kind: ClassVar[str] = "estimator"
    name: ClassVar[str] = "estimate"
    version: ClassVar[str] = "1"
    fields: ClassVar[tuple[str, ...]] = ("bpm", "keyscale", "timesignature")
    paid: ClassVar[bool] = False

    def annotate(self, track: Track) -> Answer:
        end = max(LONGEST, (probe(track.path) + LONGEST) / 2)
        try:
            with (
                tempfile.TemporaryDirectory() as folder,
                spool(track.path, tempo.RATE, folder, max_duration=end) as song,
            ):
                start = max(0, song.frames - LONGEST * tempo.RATE)
                answer = estimate(song.read(start))
        except AudioError as error:
            raise ProviderError(str(error)) from error
        values = {name: round(value) if name == "bpm" else value for name, value in answer.values.items()}
        return Answer(values, answer.confidence)
