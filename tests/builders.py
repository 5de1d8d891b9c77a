"""Inputs that tests make on the spot: songs, and a whole base model in upstream's layout unlike any released one."""

import gc
import json
import shutil
from pathlib import Path

import numpy as np
import soundfile
import torch
from diffusers import AutoencoderOobleck
from diffusers.models.transformers.ace_step_transformer import AceStepTransformer1DModel
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from diffusers.pipelines.ace_step.modeling_ace_step import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3Model

from acestep_lora import cli
from acestep_lora.naming import to_upstream

gc.freeze()  # the libraries' own objects: looking through them after every stage would be most of the tests' time

NANO = cli.ROOT / "data/models/nano"
VARIANT = "acestep-v15-turbo"

# 24 kHz in hops of 1200 samples are 20 frames a second; 8 channels, 5 Hz tokens of 4 frames. The encoder is narrower
# than the transformer, as in XL models, and its text is of a third width.
CONFIG = {
    "model_type": "acestep",
    "model_version": "turbo",
    "is_turbo": True,
    "auto_map": {"AutoModel": "modeling_acestep_v15_turbo.AceStepConditionGenerationModel"},
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "encoder_hidden_size": 64,
    "encoder_intermediate_size": 80,
    "encoder_num_attention_heads": 2,
    "encoder_num_key_value_heads": 1,
    "in_channels": 24,
    "audio_acoustic_hidden_dim": 8,
    "patch_size": 2,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "text_hidden_dim": 48,
    "timbre_hidden_dim": 8,
    "num_lyric_encoder_hidden_layers": 2,
    "num_timbre_encoder_hidden_layers": 2,
    "num_attention_pooler_hidden_layers": 2,
    "pool_window_size": 4,
    "fsq_dim": 64,
    "fsq_input_levels": [5, 5, 3],
    "fsq_input_num_quantizers": 1,
    "timestep_mu": -0.2,
    "timestep_sigma": 0.8,
}
VAE = {
    "sampling_rate": 24000,
    "downsampling_ratios": [10, 10, 12],
    "channel_multiples": [1, 1, 2],
    "encoder_hidden_size": 16,
    "decoder_input_channels": 8,
    "decoder_channels": 8,
    "audio_channels": 2,
}


def write_songs(folder: Path, rate: int, count: int = 3, seconds: float = 1.0) -> list[Path]:
    """Noise under a slow swell, every song of another length and none a whole number of frames."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for i in range(count):
        frames = int((seconds + 0.2 * i) * rate) + 7 * i + 1
        noise = np.random.default_rng(i).normal(0, 0.1, (frames, 2))
        swell = np.sin(np.linspace(0, 3 + i, frames))[:, None]
        paths.append(folder / f"song_{i}.wav")
        soundfile.write(paths[-1], noise * swell, rate)
    return paths


def base_model(folder: Path, seed: int = 0) -> Path:
    """`folder` with acestep-v15-turbo/, vae/ and Qwen3-Embedding-0.6B/, of random weights; give it as model.path."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = _modules(CONFIG)
        silence = torch.randn(1, 8, 900)
        AutoencoderOobleck(**VAE).save_pretrained(folder / "vae")
        text_encoder(CONFIG["text_hidden_dim"]).save_pretrained(folder / "Qwen3-Embedding-0.6B")
    shutil.copytree(NANO / "tokenizer", folder / "Qwen3-Embedding-0.6B", dirs_exist_ok=True)
    write_variant(folder / VARIANT, modules, CONFIG, silence)
    return folder


def write_variant(folder: Path, modules: dict[str, torch.nn.Module], config: dict, silence: torch.Tensor) -> Path:
    """A variant's folder in upstream's layout: `modules` by prefix (decoder, encoder, ...), silence [1, c, s]."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {}
    for prefix, module in modules.items():
        state |= {f"{prefix}.{to_upstream(name)}": value.contiguous() for name, value in module.state_dict().items()}
    state["null_condition_emb"] = state.pop("encoder.null_condition_emb")
    del state["encoder.silence_latent"]
    save_file(state, folder / "model.safetensors")
    torch.save(silence, folder / "silence_latent.pt")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _modules(config: dict) -> dict[str, torch.nn.Module]:
    shared = {
        "head_dim": config["head_dim"],
        "rope_theta": config["rope_parameters"]["rope_theta"],
        "sliding_window": config["sliding_window"],
    }
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    decoder = (*sizes, "num_hidden_layers", "in_channels", "audio_acoustic_hidden_dim", "encoder_hidden_size")
    encoder = shared | {size: config[f"encoder_{size}"] for size in sizes}
    pooling = encoder | {name: config[name] for name in ("audio_acoustic_hidden_dim", "pool_window_size")}
    fsq = {name: config[name] for name in ("fsq_dim", "fsq_input_levels")}
    return {
        "decoder": AceStepTransformer1DModel(**shared, **{name: config[name] for name in decoder}),
        "encoder": AceStepConditionEncoder(
            **encoder,
            text_hidden_dim=config["text_hidden_dim"],
            timbre_hidden_dim=config["timbre_hidden_dim"],
            num_lyric_encoder_hidden_layers=2,
            num_timbre_encoder_hidden_layers=2,
        ),
        "tokenizer": AceStepAudioTokenizer(**pooling, **fsq),
        "detokenizer": AceStepAudioTokenDetokenizer(**pooling),
    }


def text_encoder(hidden_size: int) -> Qwen3Model:
    """A causal encoder of random weights for nano's tokenizer."""
    config = Qwen3Config(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.1,
    )
    return Qwen3Model(config)
