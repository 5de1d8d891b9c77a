"""Songs -> sidecars: every provider is asked what is missing, and each answer is saved before the next question.

policy, for all fields or field by field:
    fill       asks for what is missing
    check      the same, and compares what a person wrote with the answer; a disagreement is a problem in the table
    overwrite  the same, and replaces what the song's JSON holds, unless a person has reviewed it

What a provider has answered it is not asked again, so that an interrupted run goes on where it was. Other files than
the JSON are the user's: what they say is never replaced, only compared.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from acestep_lora.annotate import lyrics, record
from acestep_lora.annotate.provider import Answer, Line, Provider, ProviderDown, ProviderError
from acestep_lora.annotate.record import Record
from acestep_lora.data import fields, sidecars
from acestep_lora.data.track import Scan, Track
from acestep_lora.errors import UserError

POLICIES = ("fill", "check", "overwrite")
COMPARED = ("bpm", "keyscale", "timesignature", "language", "lyrics")
LIKENESS = 0.8  # a transcript that shares fewer words with the given lyrics is a problem
BPM_TOLERANCE = 0.04  # as in MIREX's tempo task
OCTAVES = ((2.0, " (double)"), (0.5, " (half)"), (1.5, " (3/2)"), (2 / 3, " (2/3)"))


@dataclass
class Report:
    """What a run did.

    Attributes:
        asked: provider -> calls; filled: provider -> songs it had something to say about.
        failed: track id -> why it was left out, by a provider or by all.
        remarks: track id -> what is worth knowing.
    """

    asked: Counter = field(default_factory=Counter)
    filled: Counter = field(default_factory=Counter)
    failed: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    remarks: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def onto(self, scan: Scan) -> Scan:
        """The scan with failures, remarks and disagreements among the problems of its tracks."""
        tracks = []
        for track in scan.tracks:
            more = (*self.failed.get(track.id, ()), *self.remarks.get(track.id, ()), *disagreements(track))
            tracks.append(replace(track, problems=(*track.problems, *more)))
        return replace(scan, tracks=tracks)


@dataclass(frozen=True)
class Annotator:
    """policy: one of POLICIES, or field -> one of them; a field without one is filled."""

    policy: str | Mapping[str, str] = "fill"

    def __post_init__(self) -> None:
        policies = self.policy if isinstance(self.policy, Mapping) else {"caption": self.policy}
        for name, policy in policies.items():
            if policy not in POLICIES or name not in sidecars.NORMALISE:
                raise UserError(f"policy {name}={policy} is not a field with one of {', '.join(POLICIES)}.")

    def questions(self, provider: Provider, track: Track) -> dict[str, str]:
        """What to ask about a song: field -> "fill", "overwrite" or "check"; {} for nothing.

        Raises UserError for a JSON that cannot be read.
        """
        saved, known = record.read(track.path), known_fields(track)
        if "lyrics" in provider.fields and "lyrics" in known:
            known.add("language")  # not worth a transcription
        questions = {}
        for name in provider.fields:
            policy = self.policy.get(name, "fill") if isinstance(self.policy, Mapping) else self.policy
            questions[name] = _question(name, policy if name in known else None, provider, track, saved)
        return {name: question for name, question in questions.items() if question}

    def run(self, providers: list[Provider], scan: Callable[[], Scan]) -> Report:
        """Ask one provider after the other, so that one local model is in memory at a time; empties `providers`.

        `scan` reads the songs anew for each of them, because one may use what another has found.
        """
        report = Report()
        while providers:
            provider = providers.pop(0)
            for track in progress(scan().tracks, provider.name):
                try:
                    self._ask(provider, track, report)
                except ProviderDown as error:
                    report.failed[track.id].append(f"{provider.name} stopped here: {error}")
                    break
                except ProviderError as error:
                    report.failed[track.id].append(f"{provider.name}: {error}")
                except (UserError, OSError) as error:  # its audio or its JSON: the same for every provider
                    report.failed[track.id] += [str(error)] * (str(error) not in report.failed[track.id])
        return report

    def _ask(self, provider: Provider, track: Track, report: Report) -> None:
        questions = self.questions(provider, track)
        if questions:
            report.asked[provider.name] += 1
            answer = provider.annotate(track)
            report.remarks[track.id] += answer.problems
            write = add_structure if "structure" in questions else save
            report.filled[provider.name] += write(provider, track, answer, questions)

    def paid_calls(self, providers: list[Provider], scan: Scan) -> dict[str, list[Track]]:
        """Provider -> the songs that it would be asked about and that may cost money."""
        paid = [provider for provider in providers if provider.paid]
        return {provider.name: [track for track in scan.tracks if self.questions(provider, track)] for provider in paid}


def _question(name: str, policy: str | None, provider: Provider, track: Track, saved: Record) -> str | None:
    """What to do about one field; `policy` None is for one that nothing is known of."""
    mine, reviewed = {"provider": provider.name, "version": provider.version}.items(), saved.is_reviewed(name)
    if mine <= saved.provenance(name).items():
        return None  # asked before, even if it did not know
    if policy is None:
        return None if reviewed else "fill"
    if name not in sidecars.NORMALISE:
        return None
    in_json = saved.value(name) is not None and saved.value(name) == getattr(track, name)
    checked = mine <= saved.check(name).items()
    if policy == "overwrite" and in_json and not reviewed:
        return None if checked and saved.check(name).get("value") is None else "overwrite"
    persons = reviewed or not in_json or not saved.provenance(name)
    return "check" if policy != "fill" and persons and name in COMPARED and not checked else None


def known_fields(track: Track) -> set[str]:
    """The fields that are said somewhere. A song that is said to be an instrumental has all about lyrics, too."""
    known = {name for name in ("genre", "bpm", "keyscale", "timesignature") if getattr(track, name)}
    known |= {"caption"} if track.has_caption else set()
    known |= {"language"} if track.language != "unknown" else set()
    if track.is_instrumental:
        return known | ({"lyrics", "lines", "language", "structure"} if _is_said(track) else {"structure"})
    known |= {"structure"} if lyrics.has_tags(track.lyrics) else set()
    return known | {"lyrics"} | ({"lines"} if fits(record.read_lines(track.path), track.lyrics) else set())


def _is_said(track: Track) -> bool:
    """Whether an instrumental was called one, rather than nothing said of lyrics."""
    here = {sidecars.nfc(path.name): path for path in track.path.parent.iterdir() if path.is_file()}
    for claim in sidecars.read_claims(track.path.stem, here)[0]:
        with suppress(ValueError):  # a value that cannot be used says nothing
            if claim.field in ("lyrics", "is_instrumental") and sidecars.NORMALISE[claim.field](claim.value):
                return True
    return False


def fits(lines: Iterable[Line], text: str) -> bool:
    """Whether timed lines are those of the lyrics; a chorus that is written once may be timed more often."""
    rows = {tuple(lyrics.words(row)) for row in text.splitlines()}
    return {tuple(lyrics.words(line.text)) for line in lines} | {()} == rows | {()}


def save(provider: Provider, track: Track, answer: Answer, questions: Mapping[str, str]) -> bool:
    """Write beside the song what an answer says to `Annotator.questions`, if it says anything."""
    source = {"kind": provider.kind, "provider": provider.name, "version": provider.version}
    saved, values, provenance, checks = record.read(track.path), {}, {}, {}
    for name in [name for name in questions if name in sidecars.NORMALISE]:
        value = answer.values.get(name)
        entry = source | ({"confidence": round(answer.confidence[name], 3)} if name in answer.confidence else {})
        if value is None and not provider.paid:
            continue  # asking again costs nothing
        if questions[name] == "check" or (value is None and saved.value(name) is not None):
            checks[name] = {"value": value} | entry
        else:
            provenance[name] = entry
            values |= {} if value is None else {name: value}
    lines = answer.lines
    if lines and "lyrics" not in values:
        timed = fits(record.read_lines(track.path), track.lyrics)
        lines = () if timed else lines if fits(lines, track.lyrics) else lyrics.align(track.lyrics, lines)
    if something := bool(provenance or checks or lines):
        record.save(track.path, values, provenance=provenance, checks=checks, lines=lines)
    return something


def add_structure(provider: Provider, track: Track, answer: Answer, questions: Mapping[str, str]) -> bool:
    """Put tagged lyrics where the lyrics are. Raises ProviderError, and keeps them, if any word differs."""
    tagged, saved = str(answer.values["lyrics"]), record.read(track.path)
    if lyrics.plain(tagged) != lyrics.plain(track.lyrics):
        raise ProviderError("changed the words, so that its tags were not taken.")
    entry = {"kind": provider.kind, "provider": provider.name, "version": provider.version}
    values, provenance, reviewed = {}, {"structure": entry}, ()
    if saved.value("lyrics") == track.lyrics:
        values = {"lyrics": tagged}
        provenance |= {"lyrics": saved.provenance("lyrics")} if saved.provenance("lyrics") else {}
        reviewed = ("lyrics",) if saved.is_reviewed("lyrics") else ()
    else:
        record.replace(record.beside(track.path, ".lyrics.txt"), f"{tagged}\n".encode())
    record.save(track.path, values, provenance=provenance, reviewed=reviewed)
    return True


def disagreements(track: Track) -> list[str]:
    """Where a provider that checked a person's values says something else; [] for a JSON that cannot be read."""
    try:
        saved = record.read(track.path)
    except UserError:
        return []  # the scan has told of it
    found = []
    for name in COMPARED:
        check, mine = saved.check(name), getattr(track, name)
        if mine and check.get("value") is not None and (remark := _difference(name, mine, check["value"])):
            sure = f", and is {check['confidence']:.0%} sure" if isinstance(check.get("confidence"), float) else ""
            found.append(f"{name}: {check.get('provider')} {remark}{sure}")
    return found


def _difference(name: str, mine: object, theirs: object) -> str | None:
    try:
        theirs = sidecars.NORMALISE[name](theirs)
    except ValueError:
        theirs = None  # somebody wrote into "checks"
    if theirs is None:
        return None
    if name == "lyrics":
        share = lyrics.overlap(mine, theirs)
        return f"hears {share:.0%} of the words given" if share < LIKENESS else None
    if name == "keyscale" and isinstance(theirs, str):
        same = [(fields.pitch_class(tonic), scale) for tonic, scale in (str(key).split() for key in (mine, theirs))]
        return f"says {theirs}, not {mine}" if same[0] != same[1] else None
    if name == "bpm":
        ratio = theirs / mine
        if abs(ratio - 1) <= BPM_TOLERANCE:
            return None
        octave = next((word for factor, word in OCTAVES if abs(ratio / factor - 1) <= BPM_TOLERANCE), "")
        return f"says {theirs}{octave}, not {mine}"
    return f"says {theirs}, not {mine}" if theirs != mine else None


def unreviewed(tracks: Iterable[Track], name: str) -> list[Track]:
    """The tracks whose value of a field is a provider's that no person has reviewed."""
    found = []
    for track in tracks:
        with suppress(UserError):  # the scan has told of a JSON that cannot be read
            saved = record.read(track.path)
            machines = saved.provenance(name).get("kind") in sidecars.MACHINE and not saved.is_reviewed(name)
            found += [track] * (machines and saved.value(name) == getattr(track, name))
    return found


class _Rate(ProgressColumn):
    def render(self, task) -> Text:
        return Text(f"{60 * task.speed:.1f} songs/min" if task.speed else "")


def progress(tracks: list[Track], title: str) -> Iterator[Track]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    with Progress(*columns) as bar:
        yield from bar.track(tracks, description=title)
