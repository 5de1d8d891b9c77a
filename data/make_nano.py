"""Make an untrained nano: ACE-Step 1.5 complete, of the real classes, a thousand times smaller.

    python data/make_nano.py --vae FOLDER --out data/models/nano

The proportions are the real ones (25 Hz latents, patch 2, grouped-query attention, alternating windowed and full
layers); sample rate and latent width are not (12 kHz, 48 channels), because a VAE of 48 kHz and 64 channels is too slow
for a laptop. --vae is what train_nano_vae.py made; without it, the linear codec that training starts from. All other
weights are random: train_nano_dit.py trains them.
"""

import argparse
import math
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AceStepAudioTokenDetokenizer,
    AceStepAudioTokenizer,
    AceStepConditionEncoder,
    AceStepPipeline,
    AceStepTransformer1DModel,
    AutoencoderOobleck,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.pipelines.ace_step.pipeline_ace_step import SFT_GEN_PROMPT, TASK_INSTRUCTIONS
from procedural.instruments import hiss
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from train_nano_vae import copied, new_vae
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

SEED = 0
DTYPE = torch.bfloat16
HIDDEN = 64  # of the text encoder
WIDTH = 128  # of the condition encoder and the transformer
WINDOW = 16  # patches, 1.28 s: the real 128 would never bite on short songs
RUSTLE = 0.2  # RMS / sqrt(2), one frame long
SILENCE_FRAMES = 15000  # 600 s, the length diffusers' buffer has

# Every projection of the DiT is at least 64 wide on both sides: LoKR with factor 8 needs factor^2 <= width.
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": WINDOW}
SIZES = {**ATTENTION, "hidden_size": WIDTH, "intermediate_size": 256}
END = "<|endoftext|>"

# Words that should be one or two tokens, so that a caption fits the 256 tokens the text encoder reads.
WORDS = """
piano guitar bass drums strings violin cello flute sax trumpet organ synth pad lead choir vocal vocals voice male
female acoustic electric electronic ambient classical jazz blues rock metal punk pop folk country soul funk disco house
techno trance lofi hiphop hop trap reggae latin orchestral cinematic chiptune waltz ballad march lullaby minimal melody
melodic harmony chord chords groove beat rhythm arpeggio riff solo warm bright dark soft loud gentle calm happy sad
dreamy upbeat energetic mellow slow fast steady smooth heavy light deep short long song track music instrumental with
and the over in of a for on to from you me my love night day heart time way down never always again verse chorus bridge
intro outro
""".split()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE (any text is representable) that, like the real one, ends every text with one more END."""
    scales = [f"{note}{sign} {mode}" for note in "ABCDEFG" for sign in ("", "#", "b") for mode in ("major", "minor")]
    metas = [f"- bpm: N/A\n- timesignature: 4\n- keyscale: {scale}\n- duration: 30 seconds\n" for scale in scales]
    prompts = [SFT_GEN_PROMPT.format(task, "", meta) for task in TASK_INSTRUCTIONS.values() for meta in metas]
    lyrics = [f"# Languages\nunknown\n\n# Lyric\n[Instrumental]{END}", "[Verse 1]\n[Chorus]\n[Bridge]\n"]
    words = [form for word in WORDS for form in (word, f" {word}")]

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(prompts + lyrics + words, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", pair=f"$A $B {END}", special_tokens=[(END, bpe.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=END, padding_side="right", model_max_length=32768
    )


def make_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Qwen3Model:
    """Kept in float32: transformers 5 loads the stored dtype, diffusers float32, and a pipeline of both cannot run."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=32768,
        initializer_range=HIDDEN**-0.5,  # the usual 0.02 would leave lyrics (embeddings only) below the encoder's bias
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3Model(config)


def _unit(std: torch.Tensor) -> float:
    """The power of two that brings `std` nearest 1: a factor that rounding errors of another machine do not change."""
    return 2.0 ** -round(math.log2(std.item()))


@torch.no_grad()
def encode_silence(vae: AutoencoderOobleck) -> torch.Tensor:
    """Posterior mean of silence after the rustle of a start, [1, SILENCE_FRAMES, LATENTS].

    The rustle tells the transformer where a song begins, as the padding of many layers does in the real VAEs' silence.
    Away from the ends the encoding of a constant is constant: four seconds are encoded, the middle frame is repeated.
    """
    vae = copied(vae).float()  # what every user of the stored weights computes on a CPU
    audio = torch.zeros(1, vae.config.audio_channels, 4 * vae.config.sampling_rate)
    audio[..., : vae.hop_length] = RUSTLE * torch.from_numpy(hiss(vae.hop_length, np.random.default_rng(SEED)))
    latents = vae.encode(audio).latent_dist.mean.transpose(1, 2)
    head = latents[:, : latents.shape[1] // 2]
    return torch.cat([head, head[:, -1:].expand(-1, SILENCE_FRAMES - head.shape[1], -1)], dim=1)


def make_condition_encoder(silence: torch.Tensor) -> AceStepConditionEncoder:
    encoder = AceStepConditionEncoder(
        **SIZES,
        text_hidden_dim=HIDDEN,
        timbre_hidden_dim=silence.shape[-1],
        num_lyric_encoder_hidden_layers=2,
        num_timbre_encoder_hidden_layers=2,
    )
    encoder.silence_latent.copy_(silence)
    return encoder.to(DTYPE)


@torch.no_grad()
def make_transformer(latents: int) -> AceStepTransformer1DModel:
    """The DiT, its output scaled so that an untrained velocity has a std of about 1."""
    dit = AceStepTransformer1DModel(
        **SIZES | {"intermediate_size": 384},
        num_hidden_layers=6,
        rope_theta=100.0,  # of heads 32 wide: the real 1e6 leaves five frequencies for a song of seconds
        in_channels=3 * latents,
        audio_acoustic_hidden_dim=latents,
        is_turbo=False,
        model_version="base",
    )
    frames = 250
    t = torch.full((1,), 0.5)
    velocity = dit(
        torch.randn(1, frames, latents), t, t, torch.randn(1, 100, WIDTH), torch.randn(1, frames, 2 * latents)
    ).sample
    scale = _unit(velocity.std())
    dit.proj_out_conv.weight *= scale
    dit.proj_out_conv.bias *= scale
    return dit.to(DTYPE)


def make_pipeline(vae: AutoencoderOobleck) -> AceStepPipeline:
    """All parts but the VAE, drawn from SEED in a fixed order; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        tokenizer, latents = make_tokenizer(), vae.config.decoder_input_channels
        pooling = {**SIZES, "audio_acoustic_hidden_dim": latents}
        return AceStepPipeline(
            vae=vae,
            tokenizer=tokenizer,
            text_encoder=make_text_encoder(tokenizer),
            condition_encoder=make_condition_encoder(encode_silence(vae)),
            transformer=make_transformer(latents),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0),
            audio_tokenizer=AceStepAudioTokenizer(**pooling, fsq_dim=WIDTH).to(DTYPE),
            audio_token_detokenizer=AceStepAudioTokenDetokenizer(**pooling).to(DTYPE),
        )


def _clean(path: Path) -> None:
    """Without where the model was loaded from, and with a tokenizer class that transformers 4 knows as well as 5."""
    text = re.sub(r' *"_name_or_path": .*\n', "", path.read_text(encoding="utf-8"))
    path.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8", newline="\n")


def save(model, folder: Path) -> None:
    """A pipeline, or one of its parts; every file is replaced whole."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.save_pretrained(temporary)
        for path in Path(temporary).rglob("*.json"):
            _clean(path)
        for source in [path for path in Path(temporary).rglob("*") if path.is_file()]:
            target = folder / source.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderOobleck.from_pretrained(options.vae) if options.vae else new_vae(SEED)
    save(make_pipeline(vae.to(DTYPE)), options.out)


if __name__ == "__main__":
    main()
