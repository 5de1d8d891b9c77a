"""What acestep-5Hz-lm says of a song: audio -> VAE -> 5 Hz codes -> the language model's fields.

The model answers audio codes with YAML lines between <think> and </think>, keys in alphabetical order (acestep
`llm_inference.py`, `constrained_logits_processor.py`). Here the keys and all that is known are written for it, and it
fills in values: whatever it says, the lines are well-formed. BPM and key are written or left out; it is never asked for
them, nor for lyrics.
"""

import math
import re
import tempfile
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache

from acestep_lora import basemodel
from acestep_lora.annotate.captions import checked, token_count
from acestep_lora.annotate.provider import Answer, ProviderDown, ProviderError
from acestep_lora.data.audio import spool
from acestep_lora.data.fields import LANGUAGES, line
from acestep_lora.data.oobleck import encode_windows, load_encoder
from acestep_lora.data.track import Track
from acestep_lora.hardware import Hardware

INSTRUCTION = "# Instruction\nUnderstand the given musical conditions and describe the audio semantics accordingly:\n\n"
MAX_SECONDS = 600  # the longest song the model knows
FIELDS = {"caption": "caption", "genres": "genre", "language": "language"}
MAX_TOKENS = {"caption": 384, "genres": 48, "language": 8}
# A text goes on over lines that are indented.
END = {"caption": re.compile(r"\n\S"), "genres": re.compile(r"\n\S"), "language": re.compile(r"\n")}


class AceStepLM:
    """Caption, genre and, of a song with lyrics, language: the words acestep-5Hz-lm finds likeliest.

    Args:
        path: folder or hub id of the LM: ACE-Step/acestep-5Hz-lm-0.6B, -1.7B or -4B.
        base: folder or hub id of the base model, whose VAE and 5 Hz tokenizer make the codes.
        variant: folder of the transformer inside `base`.
    """

    kind, name, paid = "captioner", "acestep_lm", False
    fields = tuple(FIELDS.values())

    def __init__(self, path: str, base: str | None, variant: str, hardware: Hardware) -> None:
        self.path, self.base, self.variant, self.hardware = path, base, variant, hardware
        self.version = Path(path).name
        self._listener: Listener | None = None

    def annotate(self, track: Track) -> Answer:
        try:
            self._listener = self._listener or self._load()
            return checked(track, self._listener.describe(track), self._listener.count)
        except basemodel.BaseModelError as error:
            raise ProviderDown(str(error)) from None
        except torch.OutOfMemoryError:
            raise ProviderDown(f"{self.path} does not fit into the GPU: take a smaller one, or hardware=cpu.") from None

    def _load(self) -> "Listener":
        base = basemodel.find(self.base, variant=self.variant, repo=basemodel.RELEASE)
        return Listener(base, self.path, self.hardware)


def load_lm(path: str, hardware: Hardware):
    """The LM and its tokenizer, from a folder or the hub: transformers' own classes, safetensors, all weights there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        lm, loading = AutoModelForCausalLM.from_pretrained(
            path, dtype=hardware.dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, SafetensorError) as error:
        raise ProviderDown(f"{path} is no folder or hub id of a language model ({line(str(error))[:200]}).") from error
    if lacking := sorted(loading["missing_keys"]):
        raise ProviderDown(f"{path} is incomplete, {len(lacking)} weights lack, first {lacking[0]}: download it again.")
    if tokenizer.chat_template is None:
        raise ProviderDown(f"{path} has no chat template: download it again, with all of its JSON and jinja files.")
    return lm.to(hardware.device).eval(), tokenizer


class Listener:
    """VAE, 5 Hz tokenizer and LM, loaded."""

    def __init__(self, base: basemodel.BaseModel, path: str, hardware: Hardware) -> None:
        device, dtype = hardware.device, hardware.dtype
        self.lm, self.tokenizer = load_lm(path, hardware)
        self.vae = load_encoder(base, device)
        self.audio_tokenizer, _ = basemodel.load_audio_tokenizer(base, dtype, device)
        self.silence = basemodel.constants(base)[1][None].to(device, dtype)
        self.count = token_count(base.tokenizer)
        special, size = self.tokenizer.get_added_vocab(), self.lm.config.vocab_size
        codes = self.audio_tokenizer.quantizer.codebook_size
        known = sum(token.startswith("<|audio_code_") and i < size for token, i in special.items())
        if not codes <= known < 2 * codes:  # the released vocabulary may have a few to spare
            raise ProviderDown(
                f"{path} knows {known} audio codes and {base.dit.name} makes {codes}: choose model=turbo."
            )
        words = self.tokenizer.batch_decode([[i] for i in range(min(size, len(self.tokenizer)))])
        self.spoken = torch.zeros(size, dtype=torch.bool, device=device)
        self.spoken[: len(words)] = True
        self.spoken[list(special.values())] = False
        self.visible = self.spoken.clone()
        self.visible[[i for i, word in enumerate(words) if not word.strip()]] = False
        self.first = self.visible.clone()
        self.first[self._ids(" ")] = True
        self.languages = [self._ids(f" {language}\n") for language in sorted(LANGUAGES)]

    @torch.inference_mode()
    def describe(self, track: Track) -> dict[str, str]:
        """Field -> what the LM says of it."""
        codes, seconds = self.codes(track.path)
        messages = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": codes}]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) + "<think>\n"
        lines = {"bpm": track.bpm, "caption": None, "duration": int(seconds), "genres": None}
        lines |= {"keyscale": track.keyscale} | ({} if track.is_instrumental else {"language": None})
        ids, cache, said = [], DynamicCache(), {}
        for key, known in lines.items():
            if key not in FIELDS:
                text += f"{key}: {known}\n" if known else ""
                continue
            ids += self._ids(f"{text}{key}:")
            value = self._complete(ids, cache, key)
            ids += value
            said[key] = self.tokenizer.decode(value)
            text = "" if said[key].endswith("\n") else "\n"
        return {FIELDS[key]: unfold(value) for key, value in said.items()}

    @torch.inference_mode()
    def codes(self, song: Path) -> tuple[str, float]:
        """The audio codes as the LM reads them, five a second, and how many seconds they last."""
        rate = self.vae.config.sampling_rate
        with tempfile.TemporaryDirectory() as folder, spool(song, rate, folder, max_duration=MAX_SECONDS) as audio:
            if "is silent" in audio.problems:
                raise ProviderError(f"{song.name!r} is silent: there is nothing to describe.")
            latents, _ = encode_windows(self.vae, audio)
        _, codes = self.audio_tokenizer.tokenize(latents[None].to(self.silence), self.silence)
        return "".join(f"<|audio_code_{code}|>" for code in codes.flatten().tolist()), audio.duration

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _complete(self, ids: list[int], cache: DynamicCache, key: str) -> list[int]:
        """The tokens of a value. `cache` has gone through everything before the last text; now through them, too."""

        def constrain(sequence: Tensor, scores: Tensor) -> Tensor:
            return scores.masked_fill(~self._allowed(key, sequence[0, len(ids) :].tolist()), -math.inf)

        def finished(sequence: Tensor, scores: Tensor, **_) -> Tensor:
            ended = END[key].search(self.tokenizer.decode(sequence[0, len(ids) :]))
            return torch.tensor([ended is not None], device=sequence.device)

        prompt = torch.tensor([ids], device=self.lm.device)
        answer = self.lm.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=MAX_TOKENS[key],
            do_sample=False,
            logits_processor=[constrain],
            stopping_criteria=[finished],
        )
        return answer[0, len(ids) : -1].tolist()  # the last one ended it, and the cache has not seen it

    def _allowed(self, key: str, value: list[int]) -> Tensor:
        """Which tokens may come next: a space, something visible, then any text; or the code of a language."""
        if key != "language":
            blank = not self.tokenizer.decode(value[:2]).strip()
            return (self.visible if value else self.first) if blank else self.spoken
        allowed, length = torch.zeros_like(self.spoken), len(value)
        allowed[[language[length] for language in self.languages if language[:length] == value]] = True
        return allowed


def unfold(text: str) -> str:
    """A YAML string, quoted or folded over several lines, on one line."""
    text = text.strip()
    if text[:1] in ("'", '"'):
        try:
            text = str(yaml.safe_load(text))
        except yaml.YAMLError:
            text = text.strip("'\"")
    return " ".join(text.split())
