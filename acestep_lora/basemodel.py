"""The base model on disk: where its parts are, what its files say, how its weights are read.

Two layouts are understood: upstream's (`acestep-v15-turbo/`, `vae/`, `Qwen3-Embedding-0.6B/`) and a diffusers pipeline
folder. Original checkpoints are read as JSON and safetensors and renamed: no remote code runs and no pickle is loaded
(silence_latent.pt, a bare tensor, is opened with weights_only=True).
"""

import inspect
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from acestep_lora.errors import UserError
from acestep_lora.hashes import FileHashes
from acestep_lora.naming import to_diffusers
from acestep_lora.untrusted import is_plain, read_object, read_pt, told

RELEASE = "ACE-Step/Ace-Step1.5"
"""The repository that holds the VAE and the text encoder every variant shares."""

_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "silence_latent.pt", "*/silence_latent.pt"]


class BaseModelError(UserError):
    """A part of the base model is missing, incomplete or not what it should be."""


# ---------------------------------------------------------------- what a folder holds


_MOST = 512
"""Of anything that a config counts: layers, heads, quantizers. Each layer takes memory even where it has no weights."""


def _told(path: Path):
    return told(f"{path} cannot be used as part of a base model", BaseModelError)


def _json(path: Path) -> dict:
    with _told(path):
        return read_object(path)


def _is_original(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and _json(config).get("model_type") == "acestep"


def _is_transformer(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and str(_json(config).get("_class_name")).startswith("AceStepTransformer")


def read_config(folder: str | Path) -> dict:
    """config.json of a variant or component folder, with the fields later versions moved put back in place."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{folder} has no config.json, so it is not a model folder.")
    config = _json(folder / "config.json")
    with _told(folder / "config.json"):
        for name, value in config.items():
            if "num_" in name and isinstance(value, int) and value > _MOST:
                raise ValueError(f"{name} is {value}, more than {_MOST}")
        if math.prod(config.get("fsq_input_levels") or ()) > 1 << 20:
            raise ValueError(f"fsq_input_levels={config['fsq_input_levels']} make too many codes")
        rope = config.get("rope_parameters") or {}
        config.setdefault("rope_theta", rope.get("rope_theta", 1e6))
    return config


def _encoder_config(config: dict) -> dict:
    """The sizes of the condition encoder and the audio tokenizer: XL checkpoints give them apart from the decoder's."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return config | {size: config.get(f"encoder_{size}") or config[size] for size in sizes}


def _weight_files(folder: Path) -> list[Path]:
    """The .safetensors files of a folder, all there and whole as far as their headers tell."""
    files = _listed_files(folder) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise BaseModelError(f"{folder} holds no .safetensors weights.")
    for file in files:
        with told(f"{file} is damaged, download it again", BaseModelError), safe_open(file, framework="pt"):
            pass
    return files


def _listed_files(folder: Path) -> list[Path]:
    """The shards that an index names."""
    for index in folder.glob("*.safetensors.index.json"):
        with _told(index):
            files = sorted({folder / Path(name).name for name in read_object(index)["weight_map"].values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise BaseModelError(
                f"{folder} is incomplete: {', '.join(missing)} is named in {index.name} but not there."
            )
        return files
    return []


def _tensors(folder: Path, component: str) -> Iterator[tuple[str, Tensor]]:
    """(name in diffusers' terms, tensor) of one component; a diffusers folder holds nothing else."""
    prefix = f"{component}." if _is_original(folder) else ""
    for file in _weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                if name.startswith(prefix):
                    yield to_diffusers(name.removeprefix(prefix)), weights.get_tensor(name)
                elif component == "encoder" and name == "null_condition_emb":
                    yield name, weights.get_tensor(name)
    if component == "encoder" and _is_original(folder):
        yield "silence_latent", _silence_file(folder)


def _silence_file(folder: Path) -> Tensor:
    for place in (folder, folder.parent, *sorted(folder.parent.glob("acestep-v15-*"))):
        if (file := place / "silence_latent.pt").is_file():
            with _told(file):
                silence = read_pt(file)
                if not is_plain(silence) or silence.ndim != 3:
                    raise ValueError("it holds no tensor [1, channels, frames]")
                return silence.transpose(1, 2).contiguous()
    raise BaseModelError(f"{folder} has no silence_latent.pt: get it with `hf download {RELEASE}`.")


def fill(module: nn.Module, folder: str | Path, component: str, dtype: torch.dtype, device: str | torch.device) -> None:
    """Give `module` (on the meta device) the weights of `component`; no key may be left over, none may be missing."""
    folder = Path(folder)
    state = {}
    for name, tensor in _tensors(folder, component):
        state[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    expected = module.state_dict()
    wrong = sorted(expected.keys() ^ state.keys())
    if wrong:
        raise BaseModelError(f"{folder} does not fit {type(module).__name__}: {len(wrong)} keys, first {wrong[0]}.")
    shapes = [name for name in expected if expected[name].shape != state[name].shape and name != "silence_latent"]
    if shapes:
        name = shapes[0]
        raise BaseModelError(f"{folder}: {name} is {list(state[name].shape)}, expected {list(expected[name].shape)}.")
    for name, buffer in list(module.named_buffers()):
        if name == "silence_latent":  # its length is the checkpoint's, not the class's
            module.register_buffer(name, torch.empty_like(state[name], device="meta"))
        elif name not in state and buffer.is_meta:
            raise BaseModelError(f"{type(module).__name__}.{name} has no value in {folder}.")
    module.load_state_dict(state, strict=True, assign=True)
    module.eval().requires_grad_(False)


# ---------------------------------------------------------------- where the parts are


@dataclass(frozen=True)
class BaseModel:
    """Folders of one base model's parts. In upstream's layout dit, condition and audio_tokenizer are one folder."""

    dit: Path
    condition: Path
    vae: Path
    text_encoder: Path
    tokenizer: Path
    audio_tokenizer: Path | None
    detokenizer: Path | None

    @property
    def original(self) -> bool:
        return _is_original(self.dit)

    @property
    def sample_rate(self) -> int:
        return read_config(self.vae)["sampling_rate"]

    @property
    def hop(self) -> int:
        """Audio samples per latent frame."""
        hop = 1
        for ratio in read_config(self.vae)["downsampling_ratios"]:
            hop *= ratio
        return hop

    @property
    def channels(self) -> int:
        return read_config(self.dit)["audio_acoustic_hidden_dim"]

    @property
    def frame_rate(self) -> float:
        """Latent frames per second."""
        return self.sample_rate / self.hop

    def timestep_law(self) -> tuple[float, float]:
        """mu and sigma of the timesteps the model was trained on; a diffusers config lacks them: the published ones."""
        config = read_config(self.dit)
        return config.get("timestep_mu", -0.4), config.get("timestep_sigma", 1.0)

    def uses_timbre_token(self) -> bool:
        """Whether the official app prepends the timbre encoder's special token: in XL models, not in 2B ones."""
        config = read_config(self.dit)
        named = f"{config.get('auto_map', '')} {config.get('model_version', '')}"
        return "xl" in named.lower()

    def check(self) -> None:
        """Raise BaseModelError for configs without the numbers that are needed, and for parts that do not fit."""
        vae, _ = read_config(self.vae), read_config(self.dit)
        with _told(f"{self.vae} or {self.dit}"):
            latent, channels = vae["decoder_input_channels"], self.channels
            mu, sigma = self.timestep_law()
            if not (1 <= channels <= 1 << 16 and self.frame_rate > 0 and sigma > 0 and math.isfinite(mu + sigma)):
                raise ValueError("a number in its config.json makes no sense")
        if latent != channels:
            raise BaseModelError(f"{self.vae} makes {latent} latent channels, {self.dit} takes {channels}.")

    def vae_hash(self, hashes: FileHashes) -> str:
        return hashes.files([*_weight_files(self.vae), self.vae / "config.json"])

    def condition_hash(self, hashes: FileHashes) -> str:
        files = [*_weight_files(self.condition), *_weight_files(self.text_encoder)]
        return hashes.files(
            [*files, *sorted(self.tokenizer.glob("tokenizer*.json")), *sorted(self.tokenizer.glob("*.txt"))]
        )

    def dit_hash(self, hashes: FileHashes) -> str:
        return hashes.files(_weight_files(self.dit))


def _download(repo: str, files: list[str], lacking: str = "") -> Path:
    """Folder of a hub repository, from the local hub cache or the network; data files only, never code."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=files))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        raise BaseModelError(
            f"{lacking}{repo} is not a folder here and could not be fetched; run "
            f"`hf download {repo} --local-dir models/{repo.split('/')[-1]}` "
            f"and give that folder as model.path (or model.parts_path)."
        ) from None


def _variants(folder: Path) -> dict[str, Path]:
    found = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and _is_original(sub)]
    return {sub.name: sub for sub in found}


def pick_variant(folder: Path, variant: str) -> Path:
    """The folder of the transformer inside `folder`, whatever its layout; BaseModelError names what is there."""
    if _is_original(folder) or _is_transformer(folder):
        return folder
    if (folder / "model_index.json").is_file():
        return folder / "transformer"
    variants = _variants(folder)
    if variant in variants:
        return variants[variant]
    if variants:
        raise BaseModelError(
            f"{folder} holds {', '.join(variants)} but not {variant}: choose model=... or one of these folders."
        )
    raise BaseModelError(f"{folder} holds no ACE-Step model: expected {variant}/, model_index.json or config.json.")


def _part(name: str, places: list[Path], folders: tuple[str, ...]) -> Path:
    """The folder of a part in the first place that has it; when none has, in the released repository."""

    def found(places: list[Path]) -> Path | None:
        candidates = (place / folder for place in places for folder in folders)
        return next((c for c in candidates if any((c / f).is_file() for f in ("config.json", "tokenizer.json"))), None)

    lacking = f"{places[-1]} has no {name} ({' or '.join(folders)}/); "
    part = found(places) or found([_download(RELEASE, [f"{folder}/*" for folder in folders], lacking)])
    if part is None:
        raise BaseModelError(f"{lacking}{RELEASE} has none either: give its folder as model.parts_path.")
    return part


def find(path: str | None, *, variant: str, repo: str, parts_path: str | None = None) -> BaseModel:
    """Locate every part of a base model.

    Args:
        path: a folder in either layout, a single variant's folder, or a hub id; None looks in `$ACESTEP_MODELS`.
        variant: folder name of the wanted variant, such as `acestep-v15-turbo`.
        repo: hub id that holds the variant, named in the error when nothing is found.
        parts_path: folder with `vae/` and the text encoder, for a `path` that holds only the transformer.

    Raises:
        BaseModelError: naming what is missing and the command that gets it.
    """
    path = path or os.environ.get("ACESTEP_MODELS")
    if not path:
        raise BaseModelError(
            f"model.path is not set; run `hf download {repo} --local-dir models/{repo.split('/')[-1]}` "
            f"and give model.path=models/{repo.split('/')[-1]} (or set ACESTEP_MODELS)."
        )
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            raise BaseModelError(f"model.path={path} is neither a folder nor a hub id such as {repo}.")
        folder = _download(str(path), _FILES)
    dit = pick_variant(folder, variant)
    original = _is_original(dit)
    places = [Path(parts_path).expanduser()] if parts_path else []
    places += [dit, dit.parent]
    condition = dit if original else _part("condition encoder", places, ("condition_encoder",))
    return BaseModel(
        dit=dit,
        condition=condition,
        vae=_part("VAE", places, ("vae",)),
        text_encoder=_part("text encoder", places, ("text_encoder", "Qwen3-Embedding-0.6B")),
        tokenizer=_part("tokenizer", places, ("tokenizer", "Qwen3-Embedding-0.6B")),
        audio_tokenizer=dit if original else _optional(dit.parent / "audio_tokenizer"),
        detokenizer=dit if original else _optional(dit.parent / "audio_token_detokenizer"),
    )


def _optional(folder: Path) -> Path | None:
    return folder if folder.is_dir() else None


# ---------------------------------------------------------------- the frozen parts


def accepted_config(folder: str | Path, cls: type, component: str) -> dict:
    """What a folder's config says of one component, as the arguments that its class takes."""
    folder = Path(folder)
    config = read_config(folder)
    if _is_original(folder) and component != "decoder":
        with _told(folder):
            config = _encoder_config(config)
        config.pop("layer_types", None)  # the decoder's; encoder, tokenizer and detokenizer alternate on their own
    return {name: config[name] for name in inspect.signature(cls.__init__).parameters if name in config}


def build(cls: type, folder: str | Path, component: str, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    """A diffusers class with the weights of one component: decoder, encoder, tokenizer or detokenizer."""
    folder = Path(folder)
    config, arguments = read_config(folder), accepted_config(folder, cls, component)
    with _told(folder):
        with torch.device("meta"):
            module = cls(**arguments)
        if component == "tokenizer":  # constants of the quantiser that no checkpoint stores
            sizes = (config[f"fsq_{name}"] for name in ("dim", "input_levels", "input_num_quantizers"))
            module.quantizer = type(module.quantizer)(*sizes)
    fill(module, folder, component, dtype, device)
    return module.to(device)


def _check_loading(loading: dict) -> None:
    """The libraries would go on with random weights in place of those that a checkpoint lacks."""
    if lacking := sorted(map(str, loading["missing_keys"])) + sorted(map(str, loading["mismatched_keys"])):
        raise ValueError(f"{len(lacking)} weights lack or have other shapes, first {lacking[0]}: download it again")


def load_vae(base: BaseModel, dtype: torch.dtype, device: str | torch.device) -> nn.Module:
    from diffusers import AutoencoderOobleck

    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    read_config(base.vae)
    with _told(base.vae):
        vae, loading = AutoencoderOobleck.from_pretrained(base.vae, torch_dtype=dtype, **options)
        _check_loading(loading)
    return vae.to(device).eval().requires_grad_(False)


def load_text_encoder(base: BaseModel, dtype: torch.dtype, device: str | torch.device) -> tuple[nn.Module, object]:
    """The text encoder and its tokenizer, which pads on the right (the encoder is causal)."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    options = {"local_files_only": True, "trust_remote_code": False}
    read_config(base.text_encoder)
    with _told(base.tokenizer):
        tokenizer = AutoTokenizer.from_pretrained(base.tokenizer, **options)
        tokenizer.padding_side = "right"
    with _told(base.text_encoder):
        options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        encoder, loading = AutoModel.from_pretrained(base.text_encoder, **options)
        _check_loading(loading)
    return encoder.to(device).eval().requires_grad_(False), tokenizer


def load_condition_encoder(
    base: BaseModel, dtype: torch.dtype, device: str | torch.device, timbre_token: bool | None = None
) -> nn.Module:
    """The condition encoder. `timbre_token` None follows the official app: prepended by its XL models, not by 2B."""
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    encoder = build(AceStepConditionEncoder, base.condition, "encoder", dtype, device)
    if base.uses_timbre_token() if timbre_token is None else timbre_token:
        timbre = encoder.timbre_encoder

        def prepend(_module, _inputs, embedded: Tensor) -> Tensor:
            return torch.cat(
                [timbre.special_token.to(embedded.dtype).expand(embedded.shape[0], 1, -1), embedded], dim=1
            )

        timbre.embed_tokens.register_forward_hook(prepend)
    return encoder


def load_audio_tokenizer(
    base: BaseModel, dtype: torch.dtype, device: str | torch.device
) -> tuple[nn.Module, nn.Module]:
    """The 5 Hz tokenizer and its detokenizer, which together make the LM-hint context."""
    from diffusers.pipelines.ace_step.modeling_ace_step import AceStepAudioTokenDetokenizer, AceStepAudioTokenizer

    if base.audio_tokenizer is None or base.detokenizer is None:
        raise BaseModelError(f"{base.dit.parent} has no audio_tokenizer/, which conditioning.lm_hints needs.")
    return (
        build(AceStepAudioTokenizer, base.audio_tokenizer, "tokenizer", dtype, device),
        build(AceStepAudioTokenDetokenizer, base.detokenizer, "detokenizer", dtype, device),
    )


def constants(base: BaseModel) -> tuple[Tensor, Tensor]:
    """null_condition [d] and silence latents [s, c], float32, without loading the encoder they belong to."""
    wanted = {"null_condition_emb", "silence_latent"}
    if base.original:
        found = {"silence_latent": _silence_file(base.condition)}
    else:
        found = {}
    for file in _weight_files(base.condition):
        with safe_open(file, framework="pt") as weights:
            found |= {name: weights.get_tensor(name) for name in wanted & set(weights.keys())}
    if wanted - found.keys():
        raise BaseModelError(f"{base.condition} lacks {', '.join(sorted(wanted - found.keys()))}.")
    with _told(base.condition):
        return found["null_condition_emb"].flatten().float(), found["silence_latent"][0].float()
