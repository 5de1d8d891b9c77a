"""Captions: by rule from what can be measured, or by models that listen.

None of them is asked for BPM or key, which models make up: those are `tempo_key`'s. Every caption leaves room for tag
and metas in the text encoder's 256 tokens.
"""

import math
import re
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, Field

from acestep_lora.annotate.omni import Omni
from acestep_lora.annotate.provider import Answer, ProviderDown, ProviderError
from acestep_lora.annotate.remote import Gemini, OpenAI
from acestep_lora.conditioning import COVER, TEXT2MUSIC, Conditioning
from acestep_lora.data.audio import spool
from acestep_lora.data.sidecars import NORMALISE
from acestep_lora.data.track import Track

TokenCount = Callable[[str], int]

# ---------------------------------------------------------------- what every caption goes through

INFERENCE = Conditioning()
# As long as metas get: what is not known yet may be found later.
LONGEST = {"bpm": 300, "keyscale": "G# minor", "timesignature": "4"}
LONGEST_SECONDS = 6000.0
MADE_UP = re.compile(r"\b\d{2,3} ?(?i:BPM)\b|\b[A-G](?:[#♯b♭]|[ -](?:sharp|flat))?[ -](?:major|minor)\b")


def estimate_tokens(text: str) -> int:
    """As a rule more tokens than Qwen's tokenizer makes of a text: one per four letters, two per sign beyond ASCII.

    Its vocabulary has most English words; it takes digits one by one, and a space with the word after it.
    """
    words = sum(-(-len(word) // 4) for word in re.findall(r"[A-Za-z]+", text))
    return 1 + words + len(re.findall(r"[!-@[-`{-~\n]", text)) + 2 * sum(ord(sign) > 127 for sign in text)


@cache
def token_count(base: str | Path | None) -> TokenCount:
    """Counts as the tokenizer in a base model's folder does, with the end-of-text it adds; None: `estimate_tokens`."""
    if base is None:
        return estimate_tokens
    from transformers import AutoTokenizer

    places = [Path(base).expanduser() / place for place in ("", "tokenizer", "Qwen3-Embedding-0.6B")]
    folder = next((place for place in places if (place / "tokenizer.json").is_file()), None)
    if folder is None:
        raise ProviderDown(f"base={base} holds no tokenizer.json: give the folder of a base model, or null.")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return lambda text: len(tokenizer(text).input_ids)


def checked(track: Track, said: Mapping[str, object], count: TokenCount) -> Answer:
    """The Answer for what was said of a song: normal forms, texts that fit, and a remark on whatever is doubtful.

    Raises ProviderError when there is no caption in it.
    """
    known = {name: getattr(track, name) or longest for name, longest in LONGEST.items()}
    whole, instruction = replace(track, **known), max(TEXT2MUSIC, COVER, key=count)
    values, problems = {}, []
    for name, text in said.items():
        try:
            value = NORMALISE[name](text)
        except ValueError as error:
            problems.append(f"{name} {error}")
            continue
        if value and name in ("caption", "genre"):
            values[name] = INFERENCE.fit_caption(whole, value, instruction, LONGEST_SECONDS, count)
            if values[name] != value:
                problems.append(f"{name} shortened to fit the text encoder's {INFERENCE.text_tokens} tokens")
            told = {track.keyscale.lower(), f"{track.bpm} bpm"}
            if made_up := [words for words in MADE_UP.findall(values[name]) if words.lower() not in told]:
                problems.append(f"{name} speaks of {made_up[0]}, which nobody measured: check it")
        elif value:
            values[name] = value
    if not values.get("caption"):
        raise ProviderError(f"{track.path.name!r} was given no caption.")
    return Answer(values, problems=tuple(problems))


# ---------------------------------------------------------------- by rule


class Sound(NamedTuple):
    """loudness: RMS in dBFS; dynamics: dB between the 10th and the 95th percentile of what is not silent; brightness:
    spectral centroid in Hz, loud frames counting more; attack: percussive share of the energy [0, 1], by median
    filtering (Fitzgerald 2010).
    """

    loudness: float
    dynamics: float
    brightness: float
    attack: float


RATE, WINDOW, HOP = 22_050, 2048, 1024  # Hz and samples
SILENCE = -70  # dBFS
SECONDS = 60  # from the middle of a song
# Feature -> (upper bounds, the words between them). In the middle, where most music lies, nothing is said. The bounds
# come from rendered scores and field knowledge of masters, not from a listening test.
WORDS = {
    "tempo": ((80, 115, 150), ("slow", "mid-tempo", "fast", "very fast")),  # BPM
    "loudness": ((-24, -13), ("quiet", "", "loud")),
    "brightness": ((1200, 2200), ("dark", "", "bright")),
    "attack": ((0.06, 0.18), ("soft, sustained sounds", "", "sharp, percussive attacks")),
    "dynamics": ((6, 15), ("a steady level", "", "wide dynamics")),
}


def measure(samples: np.ndarray, rate: int) -> Sound:
    """What is heard in mono samples [n], which are louder than SILENCE."""
    import librosa

    spectrum = np.abs(librosa.stft(samples, n_fft=WINDOW, hop_length=HOP))
    energy = (spectrum**2).sum(axis=0)
    centroid = librosa.feature.spectral_centroid(S=spectrum, sr=rate)[0]
    percussive = librosa.decompose.hpss(spectrum)[1]
    level = librosa.amplitude_to_db(librosa.feature.rms(y=samples, frame_length=WINDOW, hop_length=HOP)[0], top_db=None)
    quiet, loud = np.percentile(level[level > SILENCE], [10, 95])
    return Sound(
        loudness=20 * math.log10(np.sqrt(np.mean(samples**2))),
        dynamics=float(loud - quiet),
        brightness=float(np.average(centroid, weights=energy)),
        attack=float((percussive**2).sum() / energy.sum()),
    )


def describe(sound: Sound, track: Track) -> str:
    """One or two sentences. Tempo, key and whether there are vocals are what the track says, not what is heard."""
    measured = sound._asdict() | ({"tempo": track.bpm} if track.bpm else {})
    word = {name: WORDS[name][1][bisect_right(WORDS[name][0], value)] for name, value in measured.items()}
    adjectives = [word[name] for name in ("tempo", "loudness", "brightness") if word.get(name)]
    kind = "instrumental piece" if track.is_instrumental else "song with vocals"
    first = " ".join(filter(None, ["A", ", ".join(adjectives), kind, track.keyscale and f"in {track.keyscale}"]))
    rest = " and ".join(word[name] for name in ("attack", "dynamics") if word[name])
    first = re.sub(r"^A (?=[aeiou])", "An ", first)
    return f"{first}. It has {rest}." if rest else f"{first}."


@dataclass
class RuleBased:
    """A plain caption from measured features: offline, in no time, always the same. It invents nothing."""

    kind, name, version, paid = "captioner", "rule_based", "1", False
    fields = ("caption",)

    def annotate(self, track: Track) -> Answer:
        with tempfile.TemporaryDirectory() as folder, spool(track.path, RATE, folder) as song:
            start = max(0, song.frames - SECONDS * RATE) // 2
            samples = song.read(start, start + SECONDS * RATE).mean(axis=1)
        if np.sqrt(np.mean(samples**2)) < 10 ** (SILENCE / 20):
            raise ProviderError(f"{track.path.name!r} is silent in its middle, or its channels cancel each other.")
        return checked(track, {"caption": describe(measure(samples, RATE), track)}, estimate_tokens)


# ---------------------------------------------------------------- by models that listen


class Description(BaseModel):
    """What a model is asked about a song; the descriptions are part of the question."""

    caption: str = Field(
        description="Two to four English sentences, at most 100 words: style, mood, instruments and how they are "
        "played, the voice, the production, how the song develops. No title, artist, tempo, key or quoted words."
    )
    genre: str = Field(description="One to four genres, separated by commas.")
    has_vocals: bool = Field(description="Whether anybody sings, raps or speaks.")


@dataclass
class _Listener:
    """A model of `service`, asked with `prompt`.

    Attributes:
        paid: set it to false for a server of your own.
        base: folder of a base model, whose tokenizer then counts; None estimates.
    """

    service: Gemini | OpenAI | Omni
    prompt: str
    paid: bool
    base: str | None
    kind = "captioner"

    def __post_init__(self) -> None:
        self.count = token_count(self.base)

    @property
    def version(self) -> str:
        return self.service.model


@dataclass
class ApiCaptioner(_Listener):
    """Gemini, or an OpenAI-compatible model that can hear, in structured output."""

    name: str
    fields = ("caption", "genre")

    def annotate(self, track: Track) -> Answer:
        said = self.service.ask(self.prompt, Description, track.path)
        answer = checked(track, {"caption": said.caption, "genre": said.genre}, self.count)
        if said.has_vocals != track.is_instrumental:
            return answer
        heard = "a voice, but the song has no lyrics" if said.has_vocals else "no voice, but the song has lyrics"
        return replace(answer, problems=(*answer.problems, f"{self.name} hears {heard}"))


class AceStepCaptioner(_Listener):
    """acestep-captioner, in a local folder (`Omni`) or behind an OpenAI-compatible server: prose, mostly long."""

    name, fields = "acestep_captioner", ("caption",)

    def annotate(self, track: Track) -> Answer:
        return checked(track, {"caption": self.service.say(self.prompt, track.path)}, self.count)
