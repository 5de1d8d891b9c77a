"""What the model is told about a song: prompt strings and context latents, exactly as inference builds them.

Source: acestep `constants.py`, `core/generation/handler/{prompt_utils,metadata_utils,conditioning_embed}.py`, compared
string by string with diffusers' AceStepPipeline. The official trainer departs from its own inference (raw lyrics
without header, padded to 769 tokens, zeros for timbre); `Conditioning` can reproduce that for comparison.
"""

import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from acestep_lora.errors import UserError

TEXT2MUSIC = "Fill the audio semantic mask based on the given conditions:"
COVER = "Generate audio semantic tokens based on the given conditions:"

_PROMPT = "# Instruction\n{instruction}\n\n# Caption\n{caption}\n\n# Metas\n{metas}<|endoftext|>\n"
_METAS = "- bpm: {bpm}\n- timesignature: {timesignature}\n- keyscale: {keyscale}\n- duration: {duration} seconds\n"
_LYRICS = "# Languages\n{language}\n\n# Lyric\n{lyrics}<|endoftext|>"

_SENTENCE = re.compile(r"""[.!?…]["'”’)\]]*(?=\s)|[。！？][」』）]*""")
_LINE, _WORD, _CHARACTER = re.compile("\n"), re.compile(r"\s"), re.compile(".", re.DOTALL)


@dataclass(frozen=True)
class Conditioning:
    """How songs are put into words, and how those words are encoded. The defaults are inference's.

    Args:
        lyric_header: wrap lyrics with their language header and end-of-text token.
        lyric_tokens: longest lyrics in tokens; inference takes 2048, the official trainer 512.
        padded: pad to `text_tokens` and `lyric_tokens` and let attention see the padding, as the official trainer does.
        silence_timbre: the timbre encoder hears 30 s of the silence latent; False gives it one frame of zeros.
        lm_hints: probability of training on the context that an LM's audio codes give at inference (thinking mode of
            the official app, ComfyUI's default workflow): the song itself through the 5 Hz tokenizer and back.
    """

    lyric_header: bool = True
    text_tokens: int = 256
    lyric_tokens: int = 2048
    padded: bool = False
    silence_timbre: bool = True
    lm_hints: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.lm_hints <= 1:
            raise ValueError(f"conditioning.lm_hints is a probability, got {self.lm_hints}.")

    def prompt(self, track, caption: str, instruction: str, duration: float) -> str:
        """The text prompt of a track under `caption` and its trigger tag; unknown metas read N/A.

        duration: seconds of what was encoded.
        """
        metas = _METAS.format(
            bpm=track.bpm or "N/A",
            timesignature=track.timesignature or "N/A",
            keyscale=track.keyscale or "N/A",
            duration=int(duration),
        )
        return _PROMPT.format(instruction=instruction, caption=track.prompt(caption), metas=metas)

    def lyrics(self, track) -> str:
        return _LYRICS.format(language=track.language, lyrics=track.lyrics) if self.lyric_header else track.lyrics

    def fit_caption(self, track, caption: str, instruction: str, duration: float, count: Callable[[str], int]) -> str:
        """As much of `caption` as leaves tag, metas and end-of-text whole within `text_tokens`.

        count: text -> tokens, with whatever the tokenizer adds. Raises UserError if the tag alone is too long.
        """

        def fits(text: str) -> bool:
            return count(self.prompt(track, text, instruction, duration)) <= self.text_tokens

        kept = shorten(caption, fits)
        if not fits(kept):
            raise UserError(f"custom_tag {track.custom_tag[:40]!r}... leaves no room for the metas: shorten it.")
        return kept

    def fit_lyrics(self, track, count: Callable[[str], int]) -> str:
        """As many of the lyrics' lines as leave the end-of-text within `lyric_tokens`; inference would cut it off."""

        def fits(text: str) -> bool:
            return count(self.lyrics(replace(track, lyrics=text))) <= self.lyric_tokens

        return shorten(track.lyrics, fits, (_LINE, _WORD, _CHARACTER))

    def variants(self, track) -> dict[str, tuple[str, str]]:
        """What a track can be trained on: variant -> (caption or genre, instruction)."""
        captions = {"caption": track.caption} | ({"genre": track.genre} if track.genre else {})
        variants = {name: (caption, TEXT2MUSIC) for name, caption in captions.items()}
        if self.lm_hints:
            variants |= {f"{name}_hint": (caption, COVER) for name, caption in captions.items()}
        return variants

    def key(self, track, duration: float) -> list:
        """Everything about text that decides a track's condition states, as JSON values."""
        prompts = {name: self.prompt(track, *variant, duration) for name, variant in self.variants(track).items()}
        limits = [self.text_tokens, self.lyric_tokens, self.padded, self.silence_timbre]
        return [prompts, self.lyrics(track), limits]


def shorten(
    text: str, fits: Callable[[str], bool], ends: tuple[re.Pattern, ...] = (_SENTENCE, _WORD, _CHARACTER)
) -> str:
    """`text` if it fits, else a beginning that does: whole sentences, else whole words, else characters.

    The first of these that keeps at least half of what fits, so that "feat." or a short first sentence is not all that
    is left. `fits` should be monotone; whatever it is, it holds for what is returned, except for "".
    """
    if fits(text):
        return text
    kept = [_longest(text, [match.end() for match in end.finditer(text)], fits) for end in ends]
    return next(part for part in kept if 2 * len(part) >= max(map(len, kept)))


def _longest(text: str, stops: list[int], fits: Callable[[str], bool]) -> str:
    count = bisect_left(stops, True, key=lambda stop: not fits(text[:stop].rstrip()))
    return text[: stops[count - 1]].rstrip() if count else ""


def silence_context(silence: Tensor, frames: int) -> Tensor:
    """Context of plain text-to-music: silence latents [s, c], tiled when too short, beside ones -> [frames, 2c].

    Always from the start of `silence`: its first frames are a transient that inference shows the model at frame 0.
    """
    repeats = -(-frames // silence.shape[0])
    source = silence.repeat(repeats, 1)[:frames]
    return torch.cat([source, torch.ones_like(source)], dim=-1)


def hint_context(hints: Tensor) -> Tensor:
    """Context when an LM's codes are given: their detokenised latents [t, c] beside ones -> [t, 2c]."""
    return torch.cat([hints, torch.ones_like(hints)], dim=-1)
