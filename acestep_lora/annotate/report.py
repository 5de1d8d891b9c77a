"""A folder of songs as one HTML file for people who want no server: what is there, what is missing, how it sounds."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from rich.progress import track as progress

from acestep_lora import pages, pictures
from acestep_lora.annotate.annotator import disagreements, unreviewed
from acestep_lora.data import sidecars
from acestep_lora.data.audio import AudioError
from acestep_lora.data.track import Scan, Track
from acestep_lora.pages import Card, Section

BIN = 10  # beats per minute, and words of a caption


def write_report(scan: Scan, path: Path) -> Path:
    """Write the page; every song is decoded once, for its picture and to find the ones that sound the same."""
    path = Path(path)
    cards, sounds = [], defaultdict(list)
    for track in progress(scan.tracks, "pictures"):
        problems = remarks(track)
        try:
            picture = pictures.draw(track.path)
        except AudioError as error:
            picture, problems = None, [str(error), *problems]
        else:
            sounds[picture.digest].append(track.id)
            problems += picture.problems
        cards.append(_card(track, pages.link(track.path, path), picture, problems))
    cards.sort(key=lambda card: not card.problems)
    sections = [Section("The songs together", histograms=_histograms(scan.tracks))] if scan.tracks else []
    if twins := [ids for ids in sounds.values() if len(ids) > 1]:
        note = "Each line is one recording under several names. Keep one of them, or it counts that many times."
        sections.append(Section("Duplicates", note, table=[("songs",), *((", ".join(ids),) for ids in twins)]))
    if scan.problems:
        rows = [("/".join(file.parts[-2:]), reason) for file, reason in scan.problems]
        sections.append(Section("Left out, and remarks on files", table=[("file", "reason"), *rows]))
    sections.append(Section("Songs", "Those with problems come first.", cards=cards))
    return pages.write_page(path, "Dataset report", _facts(scan, cards), sections)


def _facts(scan: Scan, cards: list[Card]) -> dict[str, str]:
    tracks = scan.tracks
    return {
        "songs": str(len(tracks)),
        "duration": clock(sum(track.duration for track in tracks)),
        "with a caption": str(sum(track.has_caption for track in tracks)),
        "with lyrics": str(sum(not track.is_instrumental for track in tracks)),
        "with problems": str(sum(bool(card.problems) for card in cards)),
        "files left out": str(len(scan.problems)),
    }


def remarks(track: Track) -> list[str]:
    """What is wrong with a song's annotations, what is missing, and what a provider wrote that nobody has reviewed."""
    known = {"caption": track.has_caption, "BPM": track.bpm, "key": track.keyscale, "signature": track.timesignature}
    known["language"] = track.is_instrumental or track.language != "unknown"
    missing = [name for name, value in known.items() if not value]
    unseen = [name for name in sidecars.NORMALISE if unreviewed([track], name)]
    told = [*track.problems, *disagreements(track)]
    told += [f"without {', '.join(missing)}"] * bool(missing) + [f"not reviewed: {', '.join(unseen)}"] * bool(unseen)
    return list(dict.fromkeys(told))


def _card(track: Track, audio: str, picture: pictures.Picture | None, problems: list[str]) -> Card:
    fields = {
        "duration": clock(picture.seconds if picture else track.duration),
        "caption": track.caption if track.has_caption else f"{track.caption} (from the file name)",
        "genre": track.genre,
        "BPM": str(track.bpm or "?"),
        "key": track.keyscale or "?",
        "signature": signature(track.timesignature),
        "language": track.language,
        "lyrics": "instrumental" if track.is_instrumental else f"{len(track.lyrics.splitlines())} lines",
        "trigger tag": track.custom_tag,
    }
    return Card(
        track.id,
        audio=audio,
        picture=picture.png if picture else b"",
        problems=problems,
        fields={name: value for name, value in fields.items() if value},
        texts={} if track.is_instrumental else {"lyrics": track.lyrics},
    )


def _histograms(tracks: list[Track]) -> dict[str, dict[str, int]]:
    words = [len(track.caption.split()) if track.has_caption else None for track in tracks]
    return {
        "language": _counts(track.language for track in tracks if not track.is_instrumental),
        "BPM": _binned(track.bpm for track in tracks),
        "key": _counts(track.keyscale or "?" for track in tracks),
        "signature": _counts(signature(track.timesignature) for track in tracks),
        "words in the caption": _binned(words),
    }


def _counts(labels: Iterable[str]) -> dict[str, int]:
    return dict(Counter(labels).most_common())


def _binned(numbers: Iterable[int | None]) -> dict[str, int]:
    """Counts in ascending bins of `BIN`, the unknown last."""
    counts = Counter(None if number is None else number // BIN * BIN for number in numbers)
    unknown = counts.pop(None, 0)
    bins = {f"{low}-{low + BIN - 1}": counts[low] for low in sorted(counts)}
    return bins | ({"?": unknown} if unknown else {})


def signature(numerator: str) -> str:
    """`6` as musicians write it, 6/8."""
    return f"{numerator}/{8 if numerator == '6' else 4}" if numerator else "?"


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
