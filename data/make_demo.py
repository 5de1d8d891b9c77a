"""Make data/demo: eight short songs by a small synthesiser, in all five containers, with sidecars of every kind.

    python data/make_demo.py
    python data/make_demo.py --more 16 --out FOLDER     # other songs of the same style, to measure an adapter with

One style (kalimba, music box, soft bass, shaker, sometimes a sung vowel), so that an adapter has something to learn;
tempo, key and metre are exact. The music is the same at every run; of the files, ogg and opus carry a random number.
"""

import argparse
import csv
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile

COMPRESSION = {".mp3": 0.6, ".ogg": 0.6, ".opus": 0.75}  # libsndfile's 0 (best sound) to 1 (smallest)
DEMO = Path(__file__).parent / "demo"
TONICS = {"C": 60, "D": 62, "E": 64, "F": 65, "G": 67, "A": 57, "Bb": 58}  # MIDI notes
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
FORMANTS = {  # Hz, of sung vowels
    "a": (800, 1150, 2900),
    "e": (400, 1700, 2600),
    "i": (350, 2000, 2800),
    "o": (450, 800, 2830),
    "u": (325, 700, 2530),
}
TAIL = 1.3  # seconds to ring out
EIGHTHS = {"3/4": 6, "4/4": 8, "6/8": 6}  # in a bar
BEATS = {"3/4": 2, "4/4": 2, "6/8": 3}  # eighths in a beat
# What a bar repeats: steps of the chord (root, third, fifth, octave) on each eighth, and the eighths of the bass.
FIGURES = {"3/4": ("", "", "12", "", "23", ""), "4/4": tuple("01232321"), "6/8": tuple("012321")}
BASS = {"3/4": (0,), "4/4": (0, 4), "6/8": (0, 3)}
GENRES = {"3/4": "kalimba, waltz", "4/4": "kalimba, ambient", "6/8": "kalimba, lullaby"}


@dataclass(frozen=True)
class Song:
    """`melody` and `chords` are bars apart by `|`: scale degrees, `'` and `,` an octave up and down, `:` eighths.

    A chord is the degree of its root, `+` for a major triad in minor. `words` are syllables apart by `-` or a space,
    one to a note, lines apart by `/`; `said` is how they are written where that is another script.
    """

    file: str
    rate: int
    bpm: int  # quarters, in 6/8 dotted quarters
    key: str
    metre: str
    chords: str
    melody: str
    caption: str
    lead: str = "box"
    words: str = ""
    said: str = ""
    language: str = "unknown"

    @property
    def stem(self) -> str:
        return Path(self.file).stem

    @property
    def title(self) -> str:
        return self.stem.replace("_", " ").title()

    @property
    def eighth(self) -> float:
        """Seconds."""
        return 60 / self.bpm / BEATS[self.metre]

    @property
    def bar(self) -> int:
        """Eighths in a bar."""
        return EIGHTHS[self.metre]

    @property
    def lines(self) -> list[str]:
        """Lyrics as written."""
        return [line.strip().replace("-", "") for line in (self.said or self.words).split("/")]


SONGS = (
    Song(
        "morning_tide.mp3", 44_100, 92, "C major", "3/4", "1|6|4|5|1",
        "5:2 3:2 5:2 | 6:2 5:2 3:2 | 4:2 6:2 5:2 | 2:6 | 1:6",
        "A gentle kalimba waltz with soft bass, light shaker and a soft female vocal, calm and hopeful",
        words="Morn-ing tide, roll in slow, / wash the stars a-way", language="en",
    ),
    Song(
        "paper_lanterns.flac", 48_000, 80, "D minor", "6/8", "1|4|5+|1",
        "1:2 2:1 3:3 | 6,:2 1:1 4:3 | 5:2 4:1 2:3 | 3:2 2:1 1:3",
        "A swaying kalimba lullaby in 6/8 with soft bass, shaker and a soft female vocal in Japanese, wistful",
        words="ka-mi-no a-ka-ri / ka-ze-ni yu-re-te", said="かみの あかり / かぜに ゆれて", language="ja",
    ),
    Song(
        "copper_rain.ogg", 44_100, 116, "A minor", "4/4", "1|6|4|5+|1",
        "5:3 3:1 1:2 3:2 | 1':3 6:1 3:4 | 4:3 6:1 4:2 1:2 | 2:3 4:1 2:2 5,:2 | 1:8",
        "Falling kalimba arpeggios with a bright music box melody, soft bass and shaker, instrumental, pensive",
    ),
    Song(
        "slow_orbit.opus", 48_000, 72, "G major", "3/4", "1|3|4|1",
        "3:4 5:2 | 7:4 5:2 | 6:4 4:2 | 3:2 2:2 1:2",
        "A slow instrumental waltz for plucked strings over kalimba and soft bass, spacious and warm",
        "pluck",
    ),
    Song(
        "little_harbour.wav", 22_050, 126, "F major", "3/4", "1|4|5|1",
        "5:2 3:2 4:2 | 6:2 4:4 | 4:2 3:2 2:2 | 3:2 1:4",
        "A lively little kalimba waltz with bass, shaker and a soft female vocal, cosy, lo-fi",
        words="Har-bour lights a-glow, / wait for me be-low", language="en",
    ),
    Song(
        "glass_garden.mp3", 44_100, 72, "E minor", "6/8", "1|6|4|5+|1",
        "1:2 2:1 3:2 5:1 | 3:6 | 6,:2 1:1 4:2 1:1 | 2:6 | -:6",
        "A dark, glassy kalimba ballad in 6/8 with soft bass, shaker and a soft female vocal, mysterious",
        words="In the glass gar-den, / noth-ing ev-er leaves", language="en",
    ),
    Song(
        "wind_up_carousel.ogg", 44_100, 150, "Bb major", "3/4", "1|6|2|5|1|1",
        "5:2 1':2 3':2 | 1':4 6:2 | 4:2 6:2 2':2 | 7:4 5:2 | 3:2 5:2 1':2 | 1':6",
        "A quick wind-up music box waltz with kalimba, bass and shaker, instrumental, playful",
    ),
    Song(
        "night-walk_music-box.mp3", 48_000, 96, "D major", "4/4", "1|5|4|1",
        "1:2 3:2 5:3 3:1 | 2:2 5:2 7:4 | 6:3 4:1 1':2 6:2 | 5:2 3:2 1:4",
        "A quiet music box melody over walking kalimba chords, soft bass and shaker, instrumental, peaceful",
    ),
)  # fmt: skip


# ---------------------------------------------------------------- other songs of the style

RHYTHMS = {"3/4": ("2 2 2", "4 2", "2 4", "3 1 2"), "4/4": ("2 2 2 2", "3 1 4", "2 2 4", "4 2 2"),
           "6/8": ("2 1 3", "2 1 2 1", "3 2 1", "3 3")}  # fmt: skip
PROGRESSIONS = {"major": ("1|6|4|5", "1|4|5|1", "1|3|4|1", "1|6|2|5"), "minor": ("1|4|5+|1", "1|6|4|5+", "1|6|4|1")}
TEMPI = {"3/4": (72, 150), "4/4": (92, 120), "6/8": (68, 84)}
MOODS = ("calm", "hopeful", "wistful", "pensive", "playful", "peaceful", "cosy", "dark")
SYLLABLES = ("la", "no", "me", "du", "si")


def pick(rng: np.random.Generator, choices):
    return choices[int(rng.integers(len(choices)))]


def tune(rng: np.random.Generator, metre: str, bars: int) -> list[str]:
    """A melody that walks about, a text for each bar."""
    degree, written = int(rng.integers(1, 6)), []
    for _ in range(bars):
        notes = []
        for length in pick(rng, RHYTHMS[metre]).split():
            degree = int(np.clip(degree + pick(rng, (-2, -1, -1, 0, 1, 1, 2)), 1, 8))
            notes.append(f"{degree}:{length}")
        written.append(" ".join(notes))
    return written


def with_intro(song: Song, seed: int) -> Song:
    """The song's chords, but for the last, under a drawn melody, then the song."""
    chords = song.chords.split("|")[:-1]
    intro = tune(np.random.default_rng([seed, 8]), song.metre, len(chords))
    return replace(song, chords="|".join([*chords, song.chords]), melody=" | ".join([*intro, song.melody]))


def another(seed: int, rate: int) -> Song:
    """A song as SONGS could have it, drawn from `seed`."""
    rng = np.random.default_rng([seed, 7])
    metre, key = pick(rng, tuple(EIGHTHS)), f"{pick(rng, tuple(TONICS))} {pick(rng, tuple(SCALES))}"
    mood, chords = pick(rng, MOODS), pick(rng, PROGRESSIONS[key.split()[1]])
    lead = pick(rng, ("box", "box", "voice", "voice", "pluck"))
    melody = " | ".join([*tune(rng, metre, chords.count("|") + 1), f"1:{EIGHTHS[metre]}"])
    words = " ".join(pick(rng, SYLLABLES) for _ in melody.replace("|", " ").split()) if lead == "voice" else ""
    heard = {"box": "a music box melody", "pluck": "a plucked string melody", "voice": "a soft female vocal"}[lead]
    song = Song(
        f"{seed:05d}.flac", rate, int(rng.integers(*TEMPI[metre])), key, metre, f"{chords}|1", melody,
        f"A {mood} {GENRES[metre].replace(', ', ' ')} with {heard}, soft bass and shaker",
        lead="box" if lead == "voice" else lead, words=words, language="en" if words else "unknown",
    )  # fmt: skip
    return with_intro(song, seed)


# ---------------------------------------------------------------- instruments: frequency in Hz, seconds, rate -> [n]


def ring(frequency: float, seconds: float, rate: int, partials) -> np.ndarray:
    """A struck or plucked thing: `partials` are (ratio, amplitude, decay time in seconds)."""
    t = np.arange(int(seconds * rate)) / rate
    heard = [(ratio, level, decay) for ratio, level, decay in partials if frequency * ratio < 0.45 * rate]
    wave = sum(level * np.exp(-t / decay) * np.sin(2 * np.pi * frequency * ratio * t) for ratio, level, decay in heard)
    return wave * np.minimum(1, t / 0.002) * np.clip((t[-1] - t) / 0.15, 0, 1)


def kalimba(frequency: float, seconds: float, rate: int) -> np.ndarray:
    return ring(frequency, seconds + 0.9, rate, [(1, 1, 0.45), (2, 0.12, 0.2), (5.4, 0.16, 0.06), (0.5, 0.1, 0.05)])


def box(frequency: float, seconds: float, rate: int) -> np.ndarray:
    return ring(frequency, seconds + 1.2, rate, [(1, 0.8, 0.7), (2.01, 0.15, 0.3), (6.27, 0.2, 0.08)])


def pluck(frequency: float, seconds: float, rate: int) -> np.ndarray:
    harmonics = np.arange(1, 25)
    levels = np.sin(np.pi * harmonics * 0.21) / harmonics**1.3
    return ring(frequency, seconds + 0.8, rate, zip(harmonics, levels, 0.9 / (1 + 0.12 * harmonics**1.5), strict=True))


def bass(frequency: float, seconds: float, rate: int) -> np.ndarray:
    return ring(frequency, seconds + 0.1, rate, [(1, 1, 0.8), (2, 0.3, 0.4), (3, 0.1, 0.2)])


def voice(frequency: float, seconds: float, rate: int, vowel: str, breath: np.ndarray) -> np.ndarray:
    """A sung vowel: harmonics of a gliding, vibrating pitch under three formants, with some breath at its start."""
    t = np.arange(int((seconds + 0.08) * rate)) / rate
    vibrato = 0.008 * np.sin(2 * np.pi * 5.4 * t) * np.clip((t - 0.2) / 0.3, 0, 1)
    phase = 2 * np.pi * np.cumsum(frequency * (1 + vibrato - 0.03 * np.exp(-t / 0.04))) / rate
    wave = np.zeros(len(t))
    for harmonic in range(1, int(min(5_000, 0.45 * rate) / frequency)):
        pitch = harmonic * frequency
        colour = sum(level / (1 + ((pitch - centre) / 110) ** 2) for centre, level in
                     zip(FORMANTS[vowel], (1, 0.5, 0.2), strict=True))  # fmt: skip
        wave += (0.08 + colour) * harmonic**-0.7 * np.sin(harmonic * phase)
    wave += 0.25 * breath[: len(t)] * np.exp(-t / 0.03)
    return 0.5 * wave * np.clip(t / 0.05, 0, 1) * np.clip((t[-1] - t) / 0.09, 0, 1)


def shaker(rate: int, hiss: np.ndarray) -> np.ndarray:
    t = np.arange(int(0.09 * rate)) / rate
    return np.diff(hiss[: len(t) + 1]) * np.minimum(1, t / 0.012) * np.exp(-t / 0.022)


# ---------------------------------------------------------------- score


def hertz(song: Song, degree: int, octave: int = 0, raised: int = 0) -> float:
    """Degrees count from 1, the tonic, and go on beyond the octave."""
    tonic, mode = song.key.split()
    octaves, step = divmod(degree - 1, 7)
    note = TONICS[tonic] + SCALES[mode][step] + 12 * (octave + octaves) + raised
    return 440 * 2 ** ((note - 69) / 12)


def chord(song: Song, name: str) -> list[float]:
    """Root, third, fifth and octave in Hz."""
    root = int(name.rstrip("+"))
    return [hertz(song, root + step, raised=int(step == 2 and "+" in name)) for step in (0, 2, 4, 7)]


def notes(song: Song) -> list[tuple[int, float, int]]:
    """The melody as (start in eighths, Hz, length in eighths), rests left out."""
    found, start = [], 0
    for token in song.melody.replace("|", " ").split():
        pitch, length = token.split(":")
        if pitch != "-":
            octave = pitch.count("'") - pitch.count(",")
            found.append((start, hertz(song, int(pitch.rstrip("',")), octave), int(length)))
        start += int(length)
    if start != song.bar * (song.chords.count("|") + 1):
        raise ValueError(f"{song.file}: the melody has {start} eighths, not as many as the chords.")
    return found


def sung(song: Song) -> list[str]:
    """The vowel of each syllable."""
    words = song.words.lower().replace("/", " ").replace("-", " ").split()
    return [next((letter for letter in word if letter in FORMANTS), "i") for word in words]


class Mix:
    """A stereo track that instruments are played into."""

    def __init__(self, song: Song, rng: np.random.Generator):
        self.song, self.rng = song, rng
        seconds = (song.chords.count("|") + 1) * song.bar * song.eighth + TAIL
        self.frames = np.zeros((int(seconds * song.rate), 2))

    def play(self, wave: np.ndarray, eighth: float, level: float, pan: float) -> None:
        """pan: -1 left to 1 right. Time and level waver a little, as a player's do."""
        start = max(0, int((eighth * self.song.eighth + self.rng.normal(0, 0.003)) * self.song.rate))
        angle = (pan + 1) * np.pi / 4
        wave = wave[: len(self.frames) - start, None] * level * self.rng.normal(1, 0.05)
        self.frames[start : start + len(wave)] += wave * [np.cos(angle), np.sin(angle)]

    def finished(self) -> np.ndarray:
        """[n, 2], with some room, faded out, peak 0.85."""
        rate = self.song.rate
        t = np.arange(rate) / rate
        room = self.rng.standard_normal((rate, 2)) * np.exp(-t / 0.22)[:, None] * np.clip(t / 0.01, 0, 1)[:, None]
        size = len(self.frames) + rate
        wet = np.fft.irfft(np.fft.rfft(self.frames, size, 0) * np.fft.rfft(room, size, 0), size, 0)[: len(self.frames)]
        mix = self.frames + 0.25 * wet / wet.std() * self.frames.std()
        mix[-rate // 4 :] *= np.linspace(1, 0, len(mix[-rate // 4 :]))[:, None] ** 2
        return 0.85 * mix / np.abs(mix).max()


def accompany(song: Song, mix: Mix) -> None:
    bars = song.chords.split("|")
    for number, name in enumerate(bars):
        first, tones, final = number * song.bar, chord(song, name), number == len(bars) - 1
        for eighth in BASS[song.metre][: 1 if final else None]:
            length = (song.bar - eighth if final else song.bar / len(BASS[song.metre])) * song.eighth
            mix.play(bass(tones[0] / 4, length, song.rate), first + eighth, 0.25, 0)
        for eighth, steps in enumerate(FIGURES[song.metre]):
            strength = 1.0 if eighth == 0 else 0.7 if eighth % BEATS[song.metre] == 0 else 0.4
            for step in map(int, steps):
                touch = 0.15 + 0.15 * strength
                mix.play(kalimba(2 * tones[step], song.eighth, song.rate), first + eighth, touch, 0.6 - 0.4 * step)
            hiss = mix.rng.standard_normal(song.rate)
            mix.play(shaker(song.rate, hiss), first + eighth, 0.1 * strength, 0.7)


def lead(song: Song, mix: Mix) -> None:
    melody = notes(song)
    vowels = sung(song) if song.words else []
    vowels = [None] * (len(melody) - len(vowels)) + vowels  # words come with the last notes
    for (start, frequency, length), vowel in zip(melody, vowels, strict=True):
        seconds = length * song.eighth
        if vowel:
            breath = mix.rng.standard_normal(int((seconds + 1) * song.rate))
            mix.play(voice(frequency, seconds, song.rate, vowel, breath), start, 0.45, 0)
        else:
            mix.play({"box": box, "pluck": pluck}[song.lead](2 * frequency, seconds, song.rate), start, 0.45, -0.4)


# ---------------------------------------------------------------- files


def lyrics(song: Song) -> str:
    return "\n".join(["[Verse 1]", *song.lines]) if song.words else "[Instrumental]"


def lrc(song: Song) -> str:
    """Lyrics with the time at which each line starts."""
    counts = [len(line.replace("-", " ").split()) for line in song.words.split("/")]
    first = len(notes(song)) - sum(counts)
    starts = [notes(song)[first + sum(counts[:number])][0] * song.eighth for number in range(len(counts))]
    rows = [f"[{s // 60:02.0f}:{s % 60:05.2f}]{line}" for s, line in zip(starts, song.lines, strict=True)]
    return "\n".join([f"[ti:{song.title}]", "[00:00.00][Verse 1]", *rows])


def facts(song: Song) -> dict:
    return {
        "bpm": song.bpm,
        "keyscale": song.key,
        "timesignature": song.metre,
        "language": song.language,
        "genre": GENRES[song.metre],
    }


def captioned(song: Song) -> str:
    return as_json({"caption": song.caption} | facts(song))


def as_json(value) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def side_step(song: Song) -> str:
    rows = [f"caption: {song.caption}", f"genre: {GENRES[song.metre]}", f"bpm: {song.bpm}", f"key: {song.key}"]
    rows += [f"signature: {song.metre}", "is_instrumental: false", f"language: {song.language}"]
    return "\n".join([*rows, "lyrics:", lyrics(song)])


SIDECARS = {  # night-walk_music-box has none
    "morning_tide": {".lyrics.txt": lyrics, ".caption.txt": lambda s: s.caption, ".json": lambda s: as_json(facts(s))},
    "paper_lanterns": {".txt": lyrics, ".json": captioned},
    "copper_rain": {},  # in key_bpm.csv
    "slow_orbit": {".caption.txt": lambda s: s.caption},  # and in key_bpm.csv
    "little_harbour": {".lrc": lrc, ".json": captioned},
    "glass_garden": {".txt": side_step},
    "wind_up_carousel": {".lyrics.txt": lyrics, ".json": captioned},
}
IN_CSV = {"copper_rain": ("8A", True), "slow_orbit": ("9B", False)}  # Camelot code; whether the caption is there


def write_csv(songs: tuple[Song, ...]) -> None:
    with (DEMO / "key_bpm.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow("File Artist Title BPM Key Camelot Caption".split())
        for song in (song for song in songs if song.stem in IN_CSV):
            camelot, with_caption = IN_CSV[song.stem]
            caption = song.caption if with_caption else ""
            rows.writerow([song.file, "Demo", song.title, song.bpm, song.key, camelot, caption])


def play(song: Song, seed: int) -> np.ndarray:
    """[n, 2] at the song's rate."""
    mix = Mix(song, np.random.default_rng(seed))
    accompany(song, mix)
    lead(song, mix)
    return mix.finished()


def write_demo() -> None:
    DEMO.mkdir(exist_ok=True)
    truth = []
    for number, short in enumerate(SONGS):
        song = with_intro(short, number)
        audio = play(song, number)
        path = DEMO / song.file
        options = {"format": "OGG", "subtype": "OPUS"} if path.suffix == ".opus" else {}
        soundfile.write(path, audio, song.rate, compression_level=COMPRESSION.get(path.suffix), **options)
        for suffix, write in SIDECARS.get(song.stem, {}).items():
            (DEMO / f"{song.stem}{suffix}").write_text(write(song) + "\n", encoding="utf-8", newline="\n")
        unit = "dotted quarter" if song.metre == "6/8" else "quarter"
        known = {"seconds": round(len(audio) / song.rate, 3), "bpm_unit": unit, "vocals": bool(song.words)}
        truth.append({"file": song.file} | facts(song) | known)
    write_csv(SONGS)
    (DEMO / "ground_truth.json").write_text(as_json(truth) + "\n", encoding="utf-8", newline="\n")


def write_more(count: int, folder: Path, rate: int = 48_000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(count):
        song = another(seed, rate)
        soundfile.write(folder / song.file, play(song, seed), rate)
        (folder / f"{song.stem}.json").write_text(captioned(song) + "\n", encoding="utf-8", newline="\n")
        (folder / f"{song.stem}.lyrics.txt").write_text(lyrics(song) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--more", type=int, metavar="COUNT", default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.more:
        write_more(options.more, options.out)
    else:
        write_demo()
