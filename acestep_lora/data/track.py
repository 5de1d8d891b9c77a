"""Songs and what is known of them: a scan of folders, upstream's dataset.json both ways, and the table of both."""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import soundfile
from rich.table import Table
from rich.text import Text

from acestep_lora.data import sidecars
from acestep_lora.data.audio import probe
from acestep_lora.data.fields import INSTRUMENTAL, caption, line, repeat, show
from acestep_lora.data.sidecars import Claim, nfc
from acestep_lora.errors import UserError

# By name only; the decoder goes by content. libsndfile's headerless formats cannot be told from other files.
AUDIO_SUFFIXES = frozenset(
    {f".{name.lower()}" for name in soundfile.available_formats()} - {".raw", ".mat4", ".mat5"}
    | {".opus", ".oga", ".aif", ".aifc", ".snd"}
    | {".m4a", ".aac", ".wma", ".webm", ".mka", ".mp4"}  # by PyAV
)
TAG_POSITIONS = ("prepend", "append", "replace")
_DATASET_JSON_BYTES = 256 << 20


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
        sources: field -> name of the file that gave it.
        disagreements: which source won over which, for fields that several give differently.
        problems: what was wrong with the annotations; the song is used all the same.
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
    is_instrumental: bool = True
    custom_tag: str = ""
    tag_position: str = "prepend"
    prompt_override: str | None = None
    repeat: int = 1
    has_caption: bool = True
    original: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    disagreements: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    def prompt(self, text: str) -> str:
        """A caption or genre with the trigger tag, as upstream's `get_full_caption` places it."""
        if not self.custom_tag:
            return text
        if not text or self.tag_position == "replace":
            return self.custom_tag
        parts = (self.custom_tag, text) if self.tag_position == "prepend" else (text, self.custom_tag)
        return ", ".join(parts)


@dataclass(frozen=True)
class Scan:
    """Tracks by id, the files that are none with the reason, and a dataset.json's share of genre prompts in percent."""

    tracks: list[Track]
    problems: list[tuple[Path, str]]
    genre_ratio: int = 0


def scan(
    dir: str | os.PathLike | Iterable,
    *,
    custom_tag: str = "",
    tag_position: str | None = None,
    all_instrumental: bool = False,
    require_caption: bool = False,
) -> Scan:
    """Every audio file below a folder, or a list of folders or {"dir": path, "repeat": n}, with its sidecars.

    Hidden files and folders are left out. With several folders an id begins with the folder's name. A song's own
    `custom_tag` goes before the one given here; `all_instrumental` overrides lyrics; `require_caption` turns songs
    without a caption into problems. Raises UserError for a folder that is not there.
    """
    folders = [_folder(entry) for entry in ([dir] if isinstance(dir, str | os.PathLike) else dir)]
    build = partial(
        _track, custom_tag=custom_tag, tag_position=_position(tag_position), all_instrumental=all_instrumental
    )
    tracks, problems = [], []
    prefixes: set[str] = set()
    for root, times in folders:
        prefix = f"{_unique(nfc(Path(os.path.abspath(root)).name), prefixes)}/" if len(folders) > 1 else ""
        tracks += _scan_folder(root, prefix, times, build, problems)
    return _captioned(Scan(tracks, problems), require_caption)


def _folder(entry: object) -> tuple[Path, int]:
    entry = {"dir": entry} if isinstance(entry, str | os.PathLike) else entry
    if not isinstance(entry, Mapping) or not {"dir"} <= set(entry) <= {"dir", "repeat"}:
        raise UserError(f"dataset.dir entry {entry} is neither a folder nor like {{dir: /music/mine, repeat: 2}}.")
    root = Path(entry["dir"]).expanduser()
    if not root.is_dir():
        raise UserError(f"dataset.dir {str(root)!r} is not a folder: give the folder that holds the songs.")
    try:
        return root, repeat(entry.get("repeat", 1)) or 1
    except ValueError as error:
        raise UserError(f"dataset.dir {str(root)!r}: repeat {error}.") from error


def _position(name: str | None) -> str:
    if name not in (None, *TAG_POSITIONS):
        raise UserError(f"tag_position {name!r} is none of {', '.join(TAG_POSITIONS)}.")
    return name or "prepend"


def _unique(name: str, taken: set[str]) -> str:
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}-{count}"
    taken.add(candidate)
    return candidate


def _captioned(found: Scan, required: bool) -> Scan:
    if not required:
        return found
    refused = [track for track in found.tracks if not track.has_caption]
    problems = [(track.path, "has no caption, and dataset.require_caption is set") for track in refused]
    kept = [track for track in found.tracks if track.has_caption]
    return replace(found, tracks=kept, problems=found.problems + problems)


# ---------------------------------------------------------------- folders


def _walk(root: Path, problems: list[tuple[Path, str]]) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder with its regular files, sorted; a linked folder only if it overlaps none already met."""
    entered = [Path(os.path.realpath(root))]

    def enter(folder: str, name: str) -> bool:
        path = Path(folder, name)
        target = Path(os.path.realpath(path))
        if name.startswith(".") or target == Path(os.path.realpath(folder), name):
            return not name.startswith(".")
        if any(target.is_relative_to(other) or other.is_relative_to(target) for other in entered):
            problems.append((path, "links to a folder that is scanned anyway, or to one around it: not followed"))
            return False
        entered.append(target)
        return True

    def unreadable(error: OSError) -> None:
        problems.append((Path(error.filename), f"cannot be read ({error.strerror})"))

    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=unreadable):
        subfolders[:] = [name for name in sorted(subfolders) if enter(folder, name)]
        paths = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
        broken = [path for path in paths if _is_audio(path) and not os.path.isfile(path)]
        problems += [(path, "is a broken link" if path.is_symlink() else "is not a regular file") for path in broken]
        yield Path(folder), [path for path in paths if os.path.isfile(path)]


def _is_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES


def _fault(path: Path) -> str | None:
    """Why an audio file cannot be a track; whether it decodes is for the decoder to say."""
    try:
        str(path).encode("utf-8")
        return "is empty (0 bytes)" if path.stat().st_size == 0 else None
    except UnicodeEncodeError:
        return "has a name that is not valid Unicode: rename it"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _scan_folder(root: Path, prefix: str, times: int, build, problems: list[tuple[Path, str]]) -> list[Track]:
    folders = list(_walk(root, problems))
    sheets = [sheet for _, paths in folders for sheet in _sheets(root, paths, problems)]
    tracks, taken = [], set()
    for _, paths in folders:
        files = {nfc(path.name): path for path in paths}
        songs = [path for path in paths if _is_audio(path)]
        problems += _orphans(files, {nfc(path.stem) for path in songs})
        for path in songs:
            if fault := _fault(path):
                problems.append((path, fault))
                continue
            claims, remarks = sidecars.read_claims(path.stem, files)
            claims += [claim for sheet in sheets for claim in sheet.claims(path)]
            name = _unique(prefix + nfc(path.relative_to(root).as_posix()), taken)
            track = build(path, name, claims, remarks)
            tracks.append(replace(track, repeat=track.repeat * times))
    problems += [(sheet.path, sheet.unused()) for sheet in sheets if sheet.unused()]
    return sorted(tracks, key=lambda track: track.id)


def _orphans(files: Mapping[str, Path], stems: set[str]) -> list[tuple[Path, str]]:
    """Lyrics and captions without a song; other text and JSON files may be anything."""
    return [
        (path, "belongs to no audio file")
        for name, path in files.items()
        for suffix in (".lyrics.txt", ".caption.txt", ".lrc")
        if name.endswith(suffix) and name.removesuffix(suffix) not in stems
    ]


@dataclass(frozen=True)
class _Sheet:
    """A CSV table; it speaks of the songs of its folder and below, by file name or by relative path."""

    root: Path
    path: Path
    rows: Mapping[str, tuple[int, dict[str, object]]]
    used: set[str] = field(default_factory=set)

    def claims(self, song: Path) -> list[Claim]:
        folder = self.path.parent
        if not song.is_relative_to(folder):
            return []
        names = (song.name, song.relative_to(self.root).as_posix(), song.relative_to(folder).as_posix())
        keys = [key for key in dict.fromkeys(map(sidecars.file_key, names)) if key in self.rows]
        self.used.update(keys)
        source = self.path.relative_to(self.root).as_posix()
        return [Claim(name, value, source, ".csv") for key in keys for name, value in self.rows[key][1].items()]

    def unused(self) -> str:
        """A remark on the rows that name no song."""
        missing = [f"{show(key)} (line {number})" for key, (number, _) in self.rows.items() if key not in self.used]
        more = ", ..." if len(missing) > 3 else ""
        return f"rows without a song here ({len(missing)}): {', '.join(missing[:3])}{more}" if missing else ""


def _sheets(root: Path, paths: list[Path], problems: list[tuple[Path, str]]) -> Iterator[_Sheet]:
    for path in paths:
        if path.suffix.lower() != ".csv":
            continue
        try:
            rows, remarks = sidecars.read_csv(path)
        except (OSError, ValueError) as error:
            problems.append((path, str(error)))
            continue
        problems += [(path, remark) for remark in remarks]
        yield _Sheet(root, path, rows)


def _track(
    path: Path,
    id: str,
    claims: list[Claim],
    remarks: list[str],
    *,
    custom_tag: str,
    tag_position: str,
    all_instrumental: bool,
) -> Track:
    found = sidecars.resolve(claims)
    values = {name: value for name, value in found.values.items() if value is not None}
    declared = values.pop("is_instrumental", None)
    contradiction = None if all_instrumental else _contradiction(declared, values.get("lyrics"), values.get("language"))
    if all_instrumental or declared or "lyrics" not in values:
        values["lyrics"] = INSTRUMENTAL
    if all_instrumental or values.get("language") == "instrumental":
        values["language"] = "unknown"
    values["has_caption"] = "caption" in values
    values.setdefault("caption", line(path.stem.replace("_", " ").replace("-", " ")) or line(path.stem))
    values.setdefault("custom_tag", line(custom_tag))
    return Track(
        id=id,
        path=path,
        duration=probe(path),
        is_instrumental=values["lyrics"] == INSTRUMENTAL and declared is not False,
        tag_position=tag_position,
        original=found.original,
        sources=found.sources,
        disagreements=tuple(found.disagreements),
        problems=tuple(remarks + found.problems + [contradiction] * bool(contradiction)),
        **values,
    )


def _contradiction(instrumental: bool | None, lyrics: str | None, language: str | None) -> str | None:
    sung = lyrics not in (None, INSTRUMENTAL)
    if instrumental and sung:
        return "is_instrumental is true: the lyrics are not used"
    if instrumental is False and not sung:
        return "is_instrumental is false but there are no lyrics: trained as [Instrumental]"
    if instrumental is None and lyrics is None and language not in (None, "instrumental"):
        return f"language is {language} but there are no lyrics: trained as [Instrumental]"
    return None


def read_dataset_json(
    path: str | os.PathLike,
    *,
    custom_tag: str = "",
    tag_position: str | None = None,
    all_instrumental: bool = False,
    require_caption: bool = False,
) -> Scan:
    """The songs of a dataset in upstream's schema (`serialization.py`), a bare list, or an object of `samples` only.

    Paths are looked up as written, then below the file's folder, by as much of their end as exists there. A tag or
    tag position given here goes before the dataset's, a sample's own tag before both. The dataset's
    `all_instrumental` changes nothing: upstream sets it by default, and samples say it themselves.
    Raises UserError if the file is no dataset; a bad sample is a problem.
    """
    path = Path(path).expanduser()
    folder = Path(os.path.abspath(path.parent))
    samples, metadata, remark = _read_document(path)
    problems = [(path, remark)] if remark else []

    def setting(name: str, normalise, default):
        try:
            return normalise(metadata[name]) if metadata.get(name) is not None else default
        except (TypeError, ValueError) as error:
            problems.append((path, f"metadata: {error}"))
            return default

    dataset_tag = setting("custom_tag", caption, None)
    position = _position(tag_position or setting("tag_position", _position, None))
    build = partial(
        _track, custom_tag=custom_tag or dataset_tag or "", tag_position=position, all_instrumental=all_instrumental
    )
    tracks, taken = [], set()
    for number, sample in enumerate(samples, start=1):
        audio = _locate(folder, sample) if isinstance(sample, dict) else None
        if audio is None or (fault := _fault(audio)):
            reason = show(sample) + " names no audio file" if audio is None else f"{audio.name} {fault}"
            problems.append((path, f"sample {number}: {reason}"))
            continue
        record = sidecars.canonical(sample)
        if record.get("custom_tag") == metadata.get("custom_tag"):
            record.pop("custom_tag", None)
        claims = [Claim(name, value, path.name, ".json") for name, value in record.items()]
        track = build(audio, _unique(_name(audio, folder), taken), claims, [])
        tracks.append(replace(track, has_caption=track.has_caption and sample.get("labeled") is not False))
    found = Scan(sorted(tracks, key=lambda track: track.id), problems, setting("genre_ratio", _percent, 0))
    return _captioned(found, require_caption)


def _read_document(path: Path) -> tuple[list, dict, str | None]:
    try:
        text, remark = sidecars.read_text(path, _DATASET_JSON_BYTES)
        document = sidecars.parse_json(text)
    except (OSError, ValueError) as error:
        raise UserError(f"dataset.json {str(path)!r} cannot be read: {error}.") from error
    samples = document.get("samples") if isinstance(document, dict) else document
    if not isinstance(samples, list):
        raise UserError(f"dataset.json {str(path)!r} holds no list of samples: give a file in upstream's schema.")
    metadata = document.get("metadata") if isinstance(document, dict) else None
    return samples, metadata if isinstance(metadata, dict) else {}, remark


def _percent(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise ValueError(f"genre_ratio {show(value)} is not a number from 0 to 100")
    return round(value)


def _locate(folder: Path, sample: Mapping) -> Path | None:
    """The audio file of a sample; a dataset that moved, also from Windows, is found by the ends of its paths."""
    for name in (sample.get("audio_path"), sample.get("filename")):
        if not isinstance(name, str) or not name:
            continue
        parts = name.replace("\\", "/").split("/")[-32:]
        for end in (name, *("/".join(parts[start:]) for start in range(len(parts)))):
            for form in (end, nfc(end), unicodedata.normalize("NFD", end)):
                path = Path(os.path.normpath(folder / form))
                if _is_audio(path) and os.path.isfile(path):
                    return path
    return None


def _name(audio: Path, folder: Path) -> str:
    """An id that does not depend on where the dataset lies: below the JSON's folder, else the last two parts."""
    parts = audio.relative_to(folder).parts if audio.is_relative_to(folder) else audio.parts[-2:]
    return nfc("/".join(parts))


def write_dataset_json(
    tracks: list[Track],
    path: str | os.PathLike,
    *,
    name: str = "untitled_dataset",
    genre_ratio: int = 0,
    created_at: str | None = None,
) -> None:
    """Write upstream's schema, with absolute paths, which its app needs; the same tracks give the same bytes.

    `created_at` is an ISO time; the extra key `repeat` is written where it is not 1 (upstream ignores it).
    """
    tags = {track.custom_tag for track in tracks}
    metadata = {
        "name": name,
        "custom_tag": tags.pop() if len(tags) == 1 else "",
        "tag_position": tracks[0].tag_position if tracks else "prepend",
        **({"created_at": created_at} if created_at else {}),
        "num_samples": len(tracks),
        "all_instrumental": all(track.is_instrumental for track in tracks),
        "genre_ratio": genre_ratio,
    }
    document = {"metadata": metadata, "samples": [_sample(track) for track in tracks]}
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _sample(track: Track) -> dict[str, object]:
    return {
        "id": hashlib.sha256(track.id.encode()).hexdigest()[:8],
        "audio_path": str(track.path.absolute()),
        "filename": track.path.name,
        **{name: getattr(track, name) for name in sidecars.NORMALISE if name != "repeat" or track.repeat != 1},
        "raw_lyrics": "" if track.lyrics == INSTRUMENTAL else track.lyrics,
        "formatted_lyrics": "",
        "duration": int(track.duration),
        "labeled": track.has_caption,
    }


# ---------------------------------------------------------------- table


def table(found: Scan) -> Table:
    """One row per song, then one per file that is none."""
    seconds = sum(track.duration for track in found.tracks)
    rows = Table(title=f"{len(found.tracks)} songs, {_clock(seconds)}", title_justify="left")
    for column in ("song", "duration", "caption", "lyrics", "BPM", "key", "signature", "language", "problems"):
        rows.add_column(column, overflow="fold")
    for track in found.tracks:
        cells = (
            track.id,
            _clock(track.duration) if track.duration else "?",
            "yes" if track.has_caption else "file name",
            "instrumental" if track.lyrics == INSTRUMENTAL else "yes",
            str(track.bpm or ""),
            track.keyscale,
            track.timesignature,
            track.language,
            "; ".join(track.problems + track.disagreements),
        )
        rows.add_row(*(Text(line(cell)) for cell in cells))
    rows.add_section()
    for path, reason in found.problems:
        rows.add_row(Text(line("/".join(path.parts[-2:])), style="red"), *[""] * 7, Text(line(reason), style="red"))
    return rows


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
