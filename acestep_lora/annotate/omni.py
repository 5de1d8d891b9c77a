"""Qwen2.5-Omni models on this machine, as ACE-Step's transcriber and captioner are: a song and a prompt -> text.

Only the part that listens and writes is loaded, the "thinker". The prompt is put together here, just as the chat
template and Qwen2_5OmniProcessor do it: that processor needs torchvision, for pictures, which are of no use to us.
"""

from functools import cached_property
from pathlib import Path

import torch

from acestep_lora.annotate.provider import loading
from acestep_lora.data import audio
from acestep_lora.hardware import Hardware

RATE = 16_000  # Hz
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{before}"
    "<|audio_bos|>{audio}<|audio_eos|>{after}<|im_end|>\n<|im_start|>assistant\n"
)


class Omni:
    """A local counterpart of `remote.OpenAI.say`; `model` is a folder or a hub id, and afterwards its name alone."""

    def __init__(self, model: str, hardware: Hardware, max_new_tokens: int = 2048) -> None:
        self.place, self.model = model, Path(model).name
        self.hardware, self.max_new_tokens = hardware, max_new_tokens

    @cached_property
    def _parts(self):
        from transformers import AutoTokenizer, Qwen2_5OmniThinkerForConditionalGeneration, WhisperFeatureExtractor

        with loading(self.place):
            thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
                self.place, dtype=self.hardware.dtype, use_safetensors=True
            )
            listener = WhisperFeatureExtractor.from_pretrained(self.place)
            tokenizer = AutoTokenizer.from_pretrained(self.place)
        return thinker.to(self.hardware.device).eval(), listener, tokenizer

    @torch.inference_mode()
    def say(self, prompt: str, song: Path) -> str:
        """The likeliest text (greedy). A prompt may say with `<audio>` where the song goes; else it goes first."""
        thinker, listener, tokenizer = self._parts
        heard = listener(
            audio.mono(song, RATE),
            sampling_rate=RATE,
            truncation=False,
            return_attention_mask=True,
            return_tensors="pt",
        )
        frames = heard.attention_mask.sum(-1)  # mel frames; the encoder halves them twice
        before, mark, after = prompt.partition("<audio>")
        before, after = (before, after) if mark else ("", prompt)
        text = PROMPT.format(
            before=before, after=after, audio="<|AUDIO|>" * int((((frames - 1) // 2 + 1) - 2) // 2 + 1)
        )
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        inputs = {
            "input_features": heard.input_features.to(thinker.dtype),
            "feature_attention_mask": heard.attention_mask,
            **{name: tokens[name] for name in ("input_ids", "attention_mask")},
        }
        inputs = {name: tensor.to(thinker.device) for name, tensor in inputs.items()}
        written = thinker.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
