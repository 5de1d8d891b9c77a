"""Other prompts, under which an adapter should leave the base model as it is: read, and encoded once."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from acestep_lora.data.cache import cannot_write, text_key
from acestep_lora.data.encode import Encoder, Job, stage
from acestep_lora.data.sidecars import read_text
from acestep_lora.data.track import Track
from acestep_lora.errors import UserError
from acestep_lora.hashes import write_atomic

SECONDS = 60.0
"""Duration that the prompts name."""


def read_prompts(prompts: str | Sequence[str]) -> list[str]:
    """The prompts of a list, or of a text file with one in each line. Raises UserError when there are none."""
    found = prompts
    if isinstance(prompts, str):
        try:
            found = read_text(Path(prompts.removeprefix("@")).expanduser())[0].splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"preservation.prompts={prompts} cannot be read: {error}.") from None
    found = [text.strip() for text in found or () if text.strip()]
    if not found:
        raise UserError(
            f"preservation.prompts={prompts} holds no prompt: give a list, or a file with one in each line."
        )
    return found


def encode(encoder: Encoder, prompts: Sequence[str]) -> list[Tensor]:
    """Condition states [l, d] of each prompt as an instrumental, from a file in the cache's folder or made for it."""
    tracks = [Track(id=prompt, path=Path("prior"), caption=prompt) for prompt in prompts]
    texts = [encoder.conditioning.key(track, SECONDS) for track in tracks]
    key = text_key(texts, encoder.condition_hash, encoder.dtype, encoder.timbre_token)
    path = encoder.cache.folder / f"prior-{key[:32]}.safetensors"
    try:
        return list(load_file(path).values())
    except (OSError, SafetensorError):
        pass  # not made yet
    states = {}

    def run(encoders) -> None:
        with torch.no_grad():
            for i, track in enumerate(tracks):
                states[f"{i:06d}"] = dict(encoders.conditions(Job(track), track, SECONDS))["condition.caption"]

    from acestep_lora.data.passes import TextPass  # and so diffusers

    stage("text and condition encoders, other prompts", lambda: TextPass.load(encoder, []), run)
    encoder.cache.create()
    try:
        write_atomic(path, save({name: tensor.contiguous() for name, tensor in states.items()}))
    except OSError as error:
        raise cannot_write(encoder.cache.folder, error) from None
    return list(states.values())
