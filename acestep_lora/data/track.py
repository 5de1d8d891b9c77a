"""Songs and what is known of them: a scan of folders, upstream's dataset.json both ways, and the table of both."""

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import soundfile
from rich.table import Table
from rich.text import Text

from acestep_lora.data import fields, sidecars
from acestep_lora.data.audio import probe
from acestep_lora.data.fields import INSTRUMENTAL, line, show
from acestep_lora.data.sidecars import Claim, file_key, nfc
from acestep_lora.errors import UserError
from acestep_lora.hashes import write_atomic

# By name only; the decoder goes by content. libsndfile's headerless formats cannot be told from other files.
AUDIO_SUFFIXES = {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw", ".mat4", ".mat5"}
AUDIO_SUFFIXES |= set(".opus .oga .aif .aifc .snd .m4a .aac .wma .webm .mka .mp4".split())
TAG_POSITIONS = ("prepend", "append", "replace")
_DATASET_JSON_BYTES, _MOST_SAMPLES = 128 << 20, 100_000

Problems = list[tuple[Path, str]]


@dataclass(frozen=True)
class Track:
    """A song. Values are in the form inference takes; `None`, "" and "unknown" mean not known.

    Attributes:
        id: path below the scanned folder, NFC, "/"-separated; unique in a scan and the same on every machine.
        lyrics: `[Instrumental]` for a song without words.
        duration: seconds by the file's header until the song is decoded; 0.0 if the header does not tell.
        repeat: how often the song counts in an epoch.
        has_caption: False if the caption is made from the file name.
        original: field -> what was written, where that is not the normal form.
        problems: what was wrong in the annotations and which of two that differ won; the song is used all the same.
    """

    id: str
    path: Path
    caption: str = ""
    genre: str = ""
    lyrics: str = INSTRUMENTAL
    bpm: int | None = None
    keyscale: str = ""
    timesignature: str = ""
    language: str = "unknown"
    duration: float = 0.0
    custom_tag: str = ""
    tag_position: str = "prepend"
    prompt_override: str | None = None
    repeat: int = 1
    has_caption: bool = True
    original: dict[str, object] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def is_instrumental(self) -> bool:
        return self.lyrics == INSTRUMENTAL

    def prompt(self, text: str) -> str:
        """A caption or genre with the trigger tag, as upstream's `get_full_caption` places it."""
        tag = self.custom_tag
        placed = {"prepend": f"{tag}, {text}", "append": f"{text}, {tag}", "replace": tag}[self.tag_position]
        return placed if tag and text else tag or text


@dataclass(frozen=True)
class Scan:
    """Tracks by id, the files that are none with the reason, and what a dataset.json says for all of its songs."""

    tracks: list[Track]
    problems: Problems
    genre_ratio: int = 0  # percent of prompts
    custom_tag: str = ""
    tag_position: str = "prepend"


def scan(dir: str | os.PathLike | Iterable, **options) -> Scan:
    """Every audio file below a folder, or a list of folders or {"dir": path, "repeat": n}, with its sidecars.

    Hidden files and folders are left out. With several folders an id begins with the folder's name. The options are
    those of `settle`. Raises UserError for a folder that is not there.
    """
    roots = [_folder(entry) for entry in ([dir] if isinstance(dir, str | os.PathLike) else dir)]
    tracks, problems = [], []
    for root, repeat in roots:
        prefix = f"{root.name}/" if len(roots) > 1 else ""
        tracks += [replace(track, repeat=track.repeat * repeat) for track in _scan_folder(root, prefix, problems)]
    return settle(Scan(tracks, problems), **options)


def _folder(entry: object) -> tuple[Path, int]:
    entry = entry if isinstance(entry, Mapping) else {"dir": entry}
    if set(entry) - {"repeat"} != {"dir"}:
        raise UserError(f"dataset.dir entry {entry} is not a folder and not like {{dir: /music/mine, repeat: 2}}.")
    root = Path(os.path.abspath(Path(str(entry["dir"])).expanduser()))
    if not root.is_dir():
        raise UserError(f"dataset.dir {str(root)!r} is not a folder: give the folder that holds the songs.")
    try:
        return root, fields.repeat(entry.get("repeat")) or 1
    except ValueError as error:
        raise UserError(f"dataset.dir {str(root)!r}: repeat {error}.") from error


def settle(
    found: Scan,
    *,
    custom_tag: str = "",
    tag_position: str | None = None,
    all_instrumental: bool = False,
    require_caption: bool = False,
) -> Scan:
    """The scan with unique ids and with what the caller decides for all songs.

    Tag and position go before a dataset.json's, a song's own tag before both; `all_instrumental` overrides lyrics;
    `require_caption` turns songs without a caption into problems.
    """
    position = tag_position or found.tag_position
    if position not in TAG_POSITIONS:
        raise UserError(f"tag_position {position!r} is none of {', '.join(TAG_POSITIONS)}.")
    tracks, problems, taken = [], list(found.problems), Counter()
    for track in sorted(found.tracks, key=lambda track: (track.id, track.path)):
        taken[track.id] += 1
        id = track.id if taken[track.id] == 1 else f"{track.id}-{taken[track.id]}"
        if require_caption and not track.has_caption:
            problems.append((track.path, "has no caption, and dataset.require_caption is set"))
            continue
        if all_instrumental:
            track = replace(track, lyrics=INSTRUMENTAL, language="unknown")
        tag = track.custom_tag or line(custom_tag) or found.custom_tag
        tracks.append(replace(track, id=id, custom_tag=tag, tag_position=position))
    return replace(found, tracks=tracks, problems=problems)


def _walk(root: Path, problems: Problems) -> Iterator[list[Path]]:
    """The visible files of every folder, sorted; a linked folder, which may lead anywhere, is told and not entered."""
    unreadable: list[OSError] = []
    for folder, subfolders, names in os.walk(root, onerror=unreadable.append):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        links = [path for name in subfolders if (path := Path(folder, name)).is_symlink()]
        problems += [(path, "is a link to a folder and not followed: list it in dataset.dir") for path in links]
        yield [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    problems += [(Path(error.filename), f"cannot be read ({error.strerror})") for error in unreadable]


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES


def fault(path: Path) -> str | None:
    """Why a file cannot be a track by its name or kind; whether it decodes is for the decoder to say."""
    if fields.clean(str(path)) != str(path):
        return "has a name with control characters or invalid Unicode: rename it"
    if not os.path.isfile(path):
        return "is a broken link or not a regular file"
    return None if os.path.getsize(path) else "is empty (0 bytes)"


def _scan_folder(root: Path, prefix: str, problems: Problems) -> list[Track]:
    tracks, songs, tables = [], [], {}
    for paths in _walk(root, problems):
        files = {nfc(path.name): path for path in paths if os.path.isfile(path)}
        here = [path for path in paths if _is_audio(path)]
        songs += here
        problems += _orphans(files, {nfc(path.stem) for path in here})
        for path in (path for path in files.values() if path.suffix.lower() == ".csv"):
            tables[path], remarks = sidecars.read_csv(path)
            problems += [(path, remark) for remark in remarks]
        for path in here:
            if reason := fault(path):
                problems.append((path, reason))
                continue
            claims, remarks = sidecars.read_claims(path.stem, files)
            for table, rows in tables.items():
                claims += rows.get(file_key(path.name), []) if path.is_relative_to(table.parent) else []
            tracks.append(_track(path, nfc(prefix + path.relative_to(root).as_posix()), claims, remarks))
    for table, rows in tables.items():
        known = {file_key(path.name) for path in songs if path.is_relative_to(table.parent)}
        if missing := [show(name) for name in rows if name not in known]:
            problems.append((table, f"rows without a song here ({len(missing)}): {', '.join(missing[:3])}"))
    return tracks


def _orphans(files: Mapping[str, Path], stems: set[str]) -> Problems:
    """Lyrics and captions without a song; other text and JSON files may be anything."""
    return [
        (path, "belongs to no audio file")
        for name, path in files.items()
        for suffix in (".lyrics.txt", ".lyrics.json", ".caption.txt", ".lrc")
        if name.endswith(suffix) and name.removesuffix(suffix) not in stems
    ]


def _track(path: Path, id: str, claims: list[Claim], remarks: Iterable[str] = ()) -> Track:
    values, original, problems = sidecars.resolve(claims)
    has_caption, duration = "caption" in values, probe(path)
    values.setdefault("caption", line(path.stem.replace("_", " ").replace("-", " ")) or line(path.stem))
    problems = (*remarks, *problems)
    return Track(
        id=id, path=path, has_caption=has_caption, duration=duration, original=original, problems=problems, **values
    )


def read_dataset_json(path: str | os.PathLike, **options) -> Scan:
    """The songs of a dataset in upstream's schema (`serialization.py`), a bare list, or an object of `samples` only.

    Paths are looked up as written, then below the file's folder, by as much of their end as exists there. The dataset's
    `all_instrumental` changes nothing: upstream sets it by default, and samples say it themselves. The options are
    those of `settle`. Raises UserError if the file is no dataset; a bad sample is a problem.
    """
    path = Path(os.path.abspath(Path(path).expanduser()))
    samples, found = _read_document(path)
    for number, sample in enumerate(samples, start=1):
        audio = _locate(path.parent, sample) if isinstance(sample, dict) else None
        reason = f"{show(sample)} names no audio file" if audio is None else fault(audio)
        if reason:
            found.problems.append((path, f"sample {number}: {reason}"))
            continue
        record = sidecars.canonical(sample)
        if record.get("custom_tag") == found.custom_tag:
            del record["custom_tag"]
        claims = [Claim(name, value, path.name, ".json") for name, value in record.items()]
        parts = audio.relative_to(path.parent).parts if audio.is_relative_to(path.parent) else audio.parts[-2:]
        track = _track(audio, nfc("/".join(parts)), claims)
        found.tracks.append(replace(track, has_caption=track.has_caption and sample.get("labeled") is not False))
    return settle(found, **options)


def _read_document(path: Path) -> tuple[list, Scan]:
    """The samples as written, and a scan without tracks."""
    try:
        text, remarks = sidecars.read_text(path, _DATASET_JSON_BYTES)
        document = sidecars.parse_json(text)
        document = document if isinstance(document, dict) else {"samples": document}
        samples, metadata = document.get("samples"), document.get("metadata") or {}
        if not isinstance(samples, list) or not isinstance(metadata, dict):
            raise ValueError("it is not in upstream's schema, an object of metadata and a list of samples")
        if len(samples) > _MOST_SAMPLES:
            raise ValueError(f"it holds {len(samples)} samples, more than {_MOST_SAMPLES}: split it")
        settings = {
            "custom_tag": fields.caption(metadata.get("custom_tag")) or "",
            "tag_position": metadata.get("tag_position") or "prepend",
            "genre_ratio": fields.percent(metadata.get("genre_ratio")) or 0,
        }
    except (OSError, ValueError) as error:
        raise UserError(f"dataset.json {str(path)!r} cannot be used: {error}.") from error
    return samples, Scan([], [(path, remark) for remark in remarks], **settings)


def _locate(folder: Path, sample: Mapping) -> Path | None:
    """The audio file of a sample; a dataset that moved, also from Windows, is found by the ends of its paths."""
    for name in (sample.get("audio_path"), sample.get("filename")):
        if not isinstance(name, str) or not name:
            continue
        parts = name.replace("\\", "/").split("/")[-32:]
        for end in (name, *("/".join(parts[start:]) for start in range(len(parts)))):
            for form in ("NFC", "NFD"):
                path = Path(os.path.normpath(folder / unicodedata.normalize(form, end)))
                if _is_audio(path) and os.path.isfile(path):
                    return path
    return None


def write_dataset_json(
    tracks: list[Track], path: str | os.PathLike, *, name: str = "untitled_dataset", genre_ratio: int = 0
) -> None:
    """Write upstream's schema, with absolute paths, which its app needs; the same tracks give the same bytes."""
    tags = {track.custom_tag for track in tracks}
    metadata = {
        "name": name,
        "custom_tag": tags.pop() if len(tags) == 1 else "",
        "tag_position": tracks[0].tag_position if tracks else "prepend",
        "num_samples": len(tracks),
        "all_instrumental": all(track.is_instrumental for track in tracks),
        "genre_ratio": genre_ratio,
    }
    document = {"metadata": metadata, "samples": [_sample(track) for track in tracks]}
    write_atomic(Path(path), json.dumps(document, indent=2, ensure_ascii=False).encode(errors="backslashreplace"))


def _sample(track: Track) -> dict[str, object]:
    return {
        "id": hashlib.sha256(track.id.encode()).hexdigest()[:8],
        "audio_path": str(track.path.absolute()),
        "filename": track.path.name,
        **{name: getattr(track, name) for name in sidecars.NORMALISE},
        "raw_lyrics": "" if track.is_instrumental else track.lyrics,
        "formatted_lyrics": "",
        "duration": int(track.duration),
        "labeled": track.has_caption,
    }


def table(found: Scan) -> Table:
    """One row per song, then one per file that is none."""
    minutes = sum(track.duration for track in found.tracks) / 60
    rows = Table(title=f"{len(found.tracks)} songs, {minutes:.1f} min", title_justify="left")
    for column in ("song", "duration", "caption", "lyrics", "BPM", "key", "signature", "language", "problems"):
        rows.add_column(column, overflow="fold")
    for track in found.tracks:
        cells = (
            track.id,
            f"{track.duration:.1f} s" if track.duration else "?",
            "yes" if track.has_caption else "file name",
            "instrumental" if track.is_instrumental else "yes",
            str(track.bpm or ""),
            track.keyscale,
            track.timesignature,
            track.language,
            "; ".join(track.problems),
        )
        rows.add_row(*(Text(line(cell)) for cell in cells))
    rows.add_section()
    for path, reason in found.problems:
        rows.add_row(Text(line("/".join(path.parts[-2:])), style="red"), *[""] * 7, Text(line(reason), style="red"))
    return rows
