"""A folder of songs under review: what a page shows of a song, and what becomes of a person's edits.

A form carries the version of the files it was read from, so several windows can be open. What is typed and not saved is
kept as a draft; `record` writes what is saved, as a person's word, which beats every other source at the next scan.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from acestep_lora import pictures
from acestep_lora.annotate import record
from acestep_lora.annotate.lyrics import align
from acestep_lora.annotate.provider import Answer, Line, Provider
from acestep_lora.annotate.report import remarks, signature
from acestep_lora.conditioning import TEXT2MUSIC, Conditioning
from acestep_lora.data import fields, sidecars
from acestep_lora.data.track import AUDIO_SUFFIXES, Scan, Track, scan, settle, write_dataset_json
from acestep_lora.errors import UserError
from acestep_lora.hashes import digest

HEAD = ("song", "state", "remarks")


class Refused(UserError):
    """A form with values that cannot be used."""


class Form(NamedTuple):
    """A song's fields as they are typed, and the version of the files they were read from."""

    song: str = ""
    version: str = ""
    caption: str = ""
    genre: str = ""
    lyrics: str = ""
    bpm: str = ""
    keyscale: str = ""
    timesignature: str = ""
    language: str = ""
    is_instrumental: bool = False
    prompt_override: str = ""
    custom_tag: str = ""

    def typed(self, values: Mapping[str, object]) -> "Form":
        """The form with fields in their normal form filled in."""
        texts = {name: value if isinstance(value, bool) else str(value or "") for name, value in values.items()}
        if texts.get("timesignature"):
            texts["timesignature"] = signature(texts["timesignature"])
        return self._replace(**texts)

    def values(self) -> dict[str, object]:
        """The fields in their normal form; raises Refused with a reason for each that has none."""
        values, reasons = {}, []
        for name in FIELDS:
            try:
                values[name] = sidecars.NORMALISE[name](getattr(self, name))
            except ValueError as error:
                reasons.append(f"{name} {error}")
        if reasons:
            raise Refused("; ".join(reasons))
        return values

    def edits(self, before: "Form") -> dict[str, object]:
        """The fields that differ from another form's, as typed."""
        return {name: getattr(self, name) for name in FIELDS if getattr(self, name) != getattr(before, name)}


FIELDS = Form._fields[2:]


class Settings(NamedTuple):
    """What holds for the whole dataset: trigger tag, its position, percent of draws that use the genre."""

    custom_tag: str = ""
    tag_position: str = "prepend"
    genre_ratio: int = 0

    def settle(self, scan: Scan) -> Scan:
        return settle(scan, custom_tag=self.custom_tag, tag_position=self.tag_position)


class Review:
    """A dataset open for review.

    Args:
        dirs: as `track.scan` takes them.
        tokenizer: the text encoder's; a call gives `input_ids`.
        providers: name -> how to make it, which is done at its first use.
        output: where `write_dataset` writes.
    """

    def __init__(
        self,
        dirs: str | Path | Iterable,
        conditioning: Conditioning,
        tokenizer: Callable,
        providers: Mapping[str, Callable[[], Provider]],
        output: Path,
    ) -> None:
        self.dirs, self.conditioning, self.tokenizer, self.output = dirs, conditioning, tokenizer, output
        self.providers = {name: lru_cache(make) for name, make in providers.items()}
        self.drafts: dict[str, Form] = {}
        self._read: dict[str, Form] = {}  # version -> the form as it was read
        self._heard: dict[str, tuple[Line, ...]] = {}  # song -> a transcriber's lines
        self._scanning = threading.Lock()
        self.rescan()

    def rescan(self) -> None:
        with self._scanning:  # or a slow scan would put back what was there before a save
            self.scan = scan(self.dirs)
            self.tracks = {track.id: track for track in self.scan.tracks}

    def track(self, song: str) -> Track:
        if song not in self.tracks:
            raise UserError(f"{song!r} is no song of this folder any more: choose another one.")
        return self.tracks[song]

    # ------------------------------------------------------------ looking

    def rows(self) -> list[list[str]]:
        """A row per song under `HEAD`, those with remarks first."""
        rows = []
        for track in self.scan.tracks:
            state = "unsaved" if track.id in self.drafts else "reviewed" if self.is_reviewed(track) else ""
            rows.append([track.id, state, "; ".join(remarks(track))])
        return sorted(rows, key=lambda row: not row[2])

    def is_reviewed(self, track: Track) -> bool:
        """Whether a person has checked every field."""
        try:
            found = record.read(track.path)
        except UserError:
            return False
        return all(found.is_reviewed(name) for name in FIELDS if name != "lyrics" or not track.is_instrumental)

    def file(self, song: str) -> Path | None:
        """A song's audio file; None for what is no song, and for a link to what is no audio file."""
        path = self.tracks[song].path if song in self.tracks else None
        return path if path and path.resolve().suffix.lower() in AUDIO_SUFFIXES else None

    # ------------------------------------------------------------ editing

    def open(self, song: str) -> Form:
        """The draft of a song, or what its files say."""
        return self.drafts.get(song) or self.read(song)

    def read(self, song: str) -> Form:
        """What the files of a song say. Raises UserError if its JSON is broken."""
        track = self.track(song)
        form = Form(song).typed({name: getattr(track, name) for name in FIELDS})
        form = form._replace(
            caption=track.caption if track.has_caption else "", lyrics="" if track.is_instrumental else track.lyrics
        )
        form = form._replace(version=digest(record.read(track.path).digest, *form))
        self._read[form.version] = form
        return form

    def before(self, form: Form) -> Form:
        """A form as it was before anybody typed; empty if that is not known, so that nothing typed is lost."""
        return self._read.get(form.version, Form())

    def keep(self, form: Form) -> None:
        """Keep what is typed until it is saved or discarded."""
        self.drafts.pop(form.song, None)
        if form.song in self.tracks and form.edits(self.before(form)):
            self.drafts[form.song] = form

    def discard(self, form: Form) -> Form:
        self.drafts.pop(form.song, None)
        self._heard.pop(form.song, None)
        self.rescan()
        return self.read(form.song)

    def save(self, form: Form, reviewed: bool = False) -> Form:
        """Write the edits, or with `reviewed` every field, as a person's; the song as it is read back.

        Raises Refused for values that cannot be used, and record.Conflict if a file of the song is not as the form was
        read; nothing is written then.
        """
        values, edited = form.values(), form.edits(self.before(form))
        if form.is_instrumental and edited.get("lyrics"):
            raise Refused("instrumental is ticked, so these lyrics would not be used: untick it or empty them.")
        # Lyrics that are hidden because a song is instrumental are not emptied by reviewing it.
        names = [name for name in FIELDS if name in edited or reviewed and (name != "lyrics" or values[name])]
        self.rescan()
        path, found, now = self.track(form.song).path, record.read(self.track(form.song).path), self.read(form.song)
        if now.version != form.version:
            theirs = [f"{name} is now {fields.show(value)}" for name, value in now.edits(self.before(form)).items()]
            raise record.Conflict(f"{form.song} was changed on disk meanwhile: {', '.join(theirs) or 'see the file'}.")
        lines = ()
        if "lyrics" in names:  # corrected words keep the times of what was heard
            lines = align(values["lyrics"] or "", self._heard.get(form.song) or record.read_lines(path))
        record.save(path, {name: values[name] for name in names}, reviewed=True, lines=lines, expected=found.digest)
        return self.discard(form)

    def merge(self, form: Form) -> Form:
        """The edits of a form on top of what the files say now, not saved yet."""
        self.rescan()
        merged = self.read(form.song)._replace(**form.edits(self.before(form)))
        self.keep(merged)
        return merged

    def ask(self, form: Form, name: str) -> tuple[Form, Answer]:
        """What a provider says of a song, put into its form and not saved. Raises ProviderError."""
        if name not in self.providers:
            raise UserError(f"there is no provider {name!r}; choose one of {', '.join(self.providers)}.")
        answer = self.providers[name]().annotate(self.applied(form, Settings()))
        values = {field: sidecars.NORMALISE[field](value) for field, value in answer.values.items() if field in FIELDS}
        if "lyrics" in values:
            values["is_instrumental"] = values["lyrics"] == fields.INSTRUMENTAL
            values["lyrics"] = "" if values["is_instrumental"] else values["lyrics"]
            self._heard[form.song] = answer.lines
        form = form.typed(values)
        self.keep(form)
        return form, answer

    # ------------------------------------------------------------ what the model will see

    def applied(self, form: Form, settings: Settings) -> Track:
        """The track that a form describes, under the settings. Raises Refused."""
        track = self.track(form.song)
        values = {name: value for name, value in form.values().items() if value is not None}
        if values.pop("is_instrumental"):
            values.pop("lyrics", None)
        values = {"caption": "" if track.has_caption else track.caption} | values
        described = Track(track.id, track.path, duration=track.duration, **values)
        return settings.settle(Scan([described], [])).tracks[0]

    def preview(self, form: Form, settings: Settings) -> str:
        """The exact prompts and lyrics, how often each is drawn, and tokens against limits. Raises Refused."""
        track, words, parts = self.applied(form, settings), self.conditioning, []

        def count(text: str) -> int:
            return len(self.tokenizer(text).input_ids)

        def add(title: str, full: str, fitted: str, limit: int) -> None:
            cut = "" if full == fitted else ": too long, the end is left out"
            parts.append(f"--- {title}, {count(full)} of {limit} tokens{cut} ---\n{fitted}")

        ratio = {"caption": 0, "genre": 100}.get(track.prompt_override, settings.genre_ratio) if track.genre else 0
        for name, text, share in (("caption", track.caption, 100 - ratio), ("genre", track.genre, ratio)):
            if share:
                kept = words.fit_caption(track, text, TEXT2MUSIC, track.duration, count)
                prompts = [words.prompt(track, text, TEXT2MUSIC, track.duration) for text in (text, kept)]
                add(f"{name}, in {share} % of the draws", *prompts, words.text_tokens)
        fitted = replace(track, lyrics=words.fit_lyrics(track, count))
        add("lyrics", words.lyrics(track), words.lyrics(fitted), words.lyric_tokens)
        return "\n\n".join(parts)

    # ------------------------------------------------------------ the whole dataset

    def write_dataset(self, settings: Settings) -> Path:
        """Write what is saved as a dataset.json; a file in its place is first copied as `record` does."""
        if self.drafts:
            raise UserError(f"there are unsaved edits of {', '.join(sorted(self.drafts))}: save or discard them first.")
        self.rescan()
        if self.output.is_file():
            record.keep(self.output)
        tracks = settings.settle(self.scan).tracks
        write_dataset_json(tracks, self.output, name=self.output.parent.name, genre_ratio=settings.genre_ratio)
        return self.output


@lru_cache(maxsize=64)
def picture(path: Path) -> bytes:
    """PNG of waveform and mel spectrogram. Raises AudioError."""
    return pictures.draw(path, width=1000, bands=80).png
