"""Who writes down what is sung: LRC files, Whisper, Scribe, Gemini and ACE-Step's own transcriber.

What they hear has mistakes: it stays marked as a transcriber's until a person has reviewed it. A song in which nobody
is heard becomes `[Instrumental]`.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from pydantic import BaseModel
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from acestep_lora.annotate import lyrics, omni, record
from acestep_lora.annotate.provider import Answer, Line, ProviderDown, ProviderError, loading
from acestep_lora.annotate.remote import ElevenLabs, Gemini, OpenAI
from acestep_lora.data import audio, fields, sidecars
from acestep_lora.data.track import Track
from acestep_lora.hardware import Hardware

# OpenAI's reference calls a segment silent if both thresholds are passed; on silence Whisper invents text.
NO_SPEECH, LOW_LOGPROB = 0.6, -1.0
REPEATS = 6  # the same line so often in a row is rather a model that is stuck than a song
# Temperatures and thresholds of Whisper's reference implementation; unlike its default, a window starts without the
# text of the one before, because lyrics repeat, and a mistake would, too.
DECODING = {
    "return_timestamps": True,
    "return_segments": True,
    "condition_on_prev_tokens": False,
    "temperature": (0.0, 0.2, 0.4, 0.6, 0.8, 1.0),
    "compression_ratio_threshold": 1.35,
    "logprob_threshold": LOW_LOGPROB,
    "no_speech_threshold": NO_SPEECH,
}
_ISO_639_3 = dict(
    pair.split(":")
    for pair in """ara:ar aze:az ben:bn bul:bg cat:ca ces:cs dan:da deu:de ell:el eng:en spa:es fas:fa fil:tl fin:fi
    fra:fr heb:he hin:hi hrv:hr hat:ht hun:hu ind:id isl:is ita:it jpn:ja kor:ko lat:la lit:lt msa:ms nep:ne nld:nl
    nor:no pan:pa pol:pl por:pt ron:ro rus:ru san:sa slk:sk srp:sr swe:sv swa:sw tam:ta tel:te tha:th tgl:tl tur:tr
    ukr:uk urd:ur vie:vi zho:zh cmn:zh""".split()
)


def language_code(name: str | None, text: str = "") -> str | None:
    """A language by its code (ja, jpn, ja-JP) or English name, else by the script of the text; None if unknown."""
    name = (name or "").strip().lower()
    try:
        known = fields.language(TO_LANGUAGE_CODE.get(name) or _ISO_639_3.get(name) or name)
    except ValueError:
        known = None
    return known or lyrics.language_of(text)


def _answer(
    text: str, language: str | None, lines: Sequence[Line] = (), confidence: dict[str, float] | None = None
) -> Answer:
    if not lyrics.words(text):
        return Answer({"lyrics": fields.INSTRUMENTAL})
    rows = lyrics.plain(text).splitlines()
    stuck = next((row for i, row in enumerate(rows) if rows[i : i + REPEATS] == [row] * REPEATS), None)
    problems = (f"lyrics: {fields.show(stuck)} is repeated {REPEATS} times or more",) * (stuck is not None)
    values = {"lyrics": text.strip(), "language": language_code(language, text)}
    return Answer(values, confidence or {}, tuple(lines), problems)


def _text(lines: Sequence[Line]) -> str:
    return "\n".join(line.text for line in lines)


def _probability(logprobs: Sequence[float | None]) -> dict[str, float]:
    known = [min(0.0, logprob) for logprob in logprobs if logprob is not None]
    return {"lyrics": round(math.exp(fmean(known)), 3)} if known else {}


class Lrc:
    """Line times, and the language where header or script tell it, of the .lrc beside the song; it needs no model."""

    kind, name, version, paid = "transcriber", "lrc", "1", False
    fields = ("lines", "language")

    def annotate(self, track: Track) -> Answer:
        path = record.beside(track.path, ".lrc")
        if not path.is_file():
            return Answer({})
        try:
            text, remarks = sidecars.read_text(path)
        except (OSError, ValueError) as error:
            raise ProviderError(f"{path.name}: {error}.") from error
        lines, language = lyrics.parse_lrc(fields.clean(text))
        known = language_code(language, _text(lines))
        return Answer({"language": known}, lines=lines, problems=tuple(f"{path.name}: {remark}" for remark in remarks))


@dataclass
class WhisperLocal:
    """A Whisper checkpoint, folder or hub id, on this machine; long songs by its own sequential algorithm.

    language: code of what is sung; None detects it in the first 30 s.
    """

    model: str
    hardware: Hardware
    language: str | None = None
    kind, name, paid = "transcriber", "whisper_local", False
    fields = ("lyrics", "language")

    @property
    def version(self) -> str:
        return Path(self.model).name

    @cached_property
    def _parts(self):
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        with loading(self.model):
            model = WhisperForConditionalGeneration.from_pretrained(
                self.model, dtype=self.hardware.dtype, use_safetensors=True
            )
            processor = WhisperProcessor.from_pretrained(self.model)
        if not {"is_multilingual", "no_timestamps_token_id"} <= vars(model.generation_config).keys():
            advice = "copy that of the Whisper model it was made from"
            raise ProviderDown(f"model {self.model!r} has no generation_config.json of Whisper: {advice}.")
        return model.to(self.hardware.device).eval(), processor

    def annotate(self, track: Track) -> Answer:
        samples = audio.mono(track.path, omni.RATE)
        segments, language = self._hear(samples)
        seconds, decode = len(samples) / omni.RATE, self._parts[1].tokenizer.decode
        phrases = [
            Line(
                float(segment["start"]),
                min(seconds, float(segment["end"])),
                fields.clean(decode(segment["tokens"].tolist(), skip_special_tokens=True)),
            )
            for segment in segments
            if segment["start"] < seconds  # the last window is padded, and what is heard there is made up
        ]
        lines = [line for phrase in phrases for line in lyrics.break_lines(lyrics.spread(phrase))]
        return _answer(_text(lines), language, lines)

    @torch.inference_mode()
    def _hear(self, samples: np.ndarray) -> tuple[list[dict], str]:
        """Segments with start, end and tokens, and the language; the same for the same samples."""
        model, processor = self._parts
        long = len(samples) > processor.feature_extractor.n_samples
        heard = processor(
            samples,
            sampling_rate=omni.RATE,
            return_tensors="pt",
            return_attention_mask=True,
            truncation=not long,
            padding="longest" if long else "max_length",
        ).to(model.device, model.dtype)
        language, options = self.language or "en", {}
        if model.generation_config.is_multilingual:
            if self.language is None:
                token = model.detect_language(heard.input_features[..., :3000])
                language = processor.tokenizer.convert_ids_to_tokens(int(token[0])).strip("<|>")
            options = {"language": language, "task": "transcribe"}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = model.generate(**heard, **options, **DECODING)
        return found["segments"][0], language


class _Word(BaseModel):
    word: str
    start: float
    end: float


class _Segment(BaseModel):
    text: str
    start: float
    end: float
    avg_logprob: float | None = None
    no_speech_prob: float | None = None

    def is_silent(self) -> bool:
        return (self.no_speech_prob or 0.0) > NO_SPEECH and (self.avg_logprob or 0.0) < LOW_LOGPROB


class _Transcript(BaseModel):
    language: str | None = None
    segments: list[_Segment]
    words: list[_Word] | None = None


@dataclass
class _Transcriber:
    """paid: set it to false for a server of your own."""

    paid: bool
    kind, fields = "transcriber", ("lyrics", "language")

    @property
    def version(self) -> str:
        return self.service.model


@dataclass
class WhisperAPI(_Transcriber):
    """OpenAI's transcription endpoint with whisper-1, or any compatible server."""

    service: OpenAI
    language: str | None = None
    name = "whisper_api"

    def annotate(self, track: Track) -> Answer:
        options = {"language": self.language} if self.language else {}
        answer = self.service.transcribe(
            track.path,
            _Transcript,
            response_format="verbose_json",
            timestamp_granularities=["word", "segment"],
            **options,
        )
        segments = [segment for segment in answer.segments if not segment.is_silent()]
        lines = [line for segment in segments for line in _segment_lines(segment, answer.words or [])]
        confidence = _probability([segment.avg_logprob for segment in segments])
        return _answer(_text(lines), answer.language, lines, confidence)


def _segment_lines(segment: _Segment, words: list[_Word]) -> tuple[Line, ...]:
    """The words have times but no punctuation, the segment has it."""
    inside = [Line(w.start, w.end, w.word) for w in words if segment.start <= (w.start + w.end) / 2 <= segment.end]
    pieces = lyrics.units(segment.text, inside)
    return lyrics.break_lines(pieces or lyrics.spread(Line(segment.start, segment.end, segment.text)))


class _ScribeWord(BaseModel):
    text: str
    type: str
    start: float | None = None
    end: float | None = None
    logprob: float | None = None


class _Scribe(BaseModel):
    language_code: str | None = None
    language_probability: float | None = None
    words: list[_ScribeWord]


@dataclass
class Scribe(_Transcriber):
    """ElevenLabs' transcription, with a time for each word."""

    service: ElevenLabs
    language: str | None = None
    name = "elevenlabs"

    def annotate(self, track: Track) -> Answer:
        options = {"language_code": self.language} if self.language else {}
        answer = self.service.transcribe(
            track.path, _Scribe, timestamps_granularity="word", tag_audio_events=False, **options
        )
        pieces: list[Line] = []
        for part in answer.words:
            if part.type == "spacing" and pieces:
                pieces[-1] = pieces[-1]._replace(text=pieces[-1].text + part.text)
            elif part.type == "word" and part.start is not None:
                pieces.append(Line(part.start, part.end, part.text))
        lines = lyrics.break_lines(pieces)
        confidence = _probability([part.logprob for part in answer.words if part.type == "word"])
        if answer.language_probability is not None:
            confidence["language"] = answer.language_probability
        return _answer(_text(lines), answer.language_code, lines, confidence)


class _Lyrics(BaseModel):
    language: str
    lyrics: str


@dataclass
class GeminiTranscriber(_Transcriber):
    """Lyrics with structure tags, without times; `service` is Gemini, or an OpenAI-compatible model that can hear."""

    service: Gemini | OpenAI
    prompt: str
    name: str = "gemini"

    def annotate(self, track: Track) -> Answer:
        answer = self.service.ask(self.prompt, _Lyrics, track.path)
        return _answer(answer.lyrics, answer.language)


@dataclass
class AceStepTranscriber(_Transcriber):
    """ACE-Step's transcriber, in a local folder (`omni.Omni`) or behind an OpenAI-compatible server."""

    service: omni.Omni | OpenAI
    prompt: str
    name = "acestep_transcriber"

    def annotate(self, track: Track) -> Answer:
        """Its answer, by the model card: `# Languages`, a code, `# Lyrics`, and lyrics with structure tags."""
        text = self.service.say(self.prompt, track.path)
        parts = re.fullmatch(r"\s*# Languages?\s*\n(.*?)\n\s*# Lyrics?\s*\n(.*)", text, re.DOTALL)
        if not parts:
            raise ProviderError(f"acestep_transcriber wrote {fields.show(text)} instead of languages and lyrics.")
        return _answer(parts[2], parts[1].split()[0] if parts[1].split() else None)
