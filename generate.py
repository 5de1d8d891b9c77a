"""Prompt + adapter -> audio: python generate.py adapter.path=runs/... prompt="..." lyrics=@song.txt seed=1"""

from pathlib import Path

from omegaconf import DictConfig, ListConfig

from acestep_lora import cli
from acestep_lora.errors import UserError


def as_list(value) -> list:
    return list(value) if isinstance(value, ListConfig | list) else [] if value is None else [value]


def read_lyrics(text: str) -> str:
    """Lyrics as given, or those of the file behind an @."""
    if not text.startswith("@"):
        return text
    from acestep_lora.data.sidecars import read_text, strip_lrc

    path = Path(text[1:]).expanduser()
    if not path.is_file():
        raise UserError(f"lyrics={text} names no file.")
    return strip_lrc(read_text(path)[0])


def generate(cfg: DictConfig) -> list[Path]:
    """Write the clips, each with a spectrogram -> the files."""
    from hydra.utils import instantiate

    from acestep_lora import generation, runs

    paths = [str(path) for path in as_list(cfg.adapter.path)]
    scales = [float(scale) for scale in as_list(cfg.adapter.scale)]
    if len(scales) == 1:
        scales *= len(paths)
    if len(scales) != len(paths):
        raise UserError(f"adapter.scale={scales} must be one number, or one for each of {len(paths)} adapters.")
    hardware, base = instantiate(cfg.hardware), runs.find_base(cfg.model)
    for tag in generation.trigger_tags(paths):
        if tag not in cfg.prompt:
            print(f"note: the prompt lacks the adapter's trigger tag '{tag}'")
    request = generation.Request(
        prompt=cfg.prompt,
        lyrics=read_lyrics(cfg.lyrics),
        duration=cfg.duration,
        bpm=cfg.bpm,
        keyscale=cfg.keyscale,
        timesignature=str(cfg.timesignature),
        language=cfg.language,
        instrumental=cfg.instrumental,
        negative_prompt=cfg.negative_prompt,
        steps=cfg.steps,
        shift=cfg.shift,
        guidance_scale=cfg.guidance_scale,
        seeds=list(range(cfg.seed, cfg.seed + cfg.n)),
    )
    pipeline = generation.load_pipeline(base, hardware.dtype, hardware.device, cfg.model.timbre_token)
    return generation.write(pipeline, request, paths, scales, Path(cfg.output_dir), cfg.format, compare=cfg.compare)


def main(cfg: DictConfig) -> int:
    for path in generate(cfg):
        print(path)
    return 0


if __name__ == "__main__":
    cli.main("generate", main)
