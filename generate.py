"""Prompt + adapter -> audio: python generate.py adapter.path=runs/... prompt="..." lyrics=@song.txt seed=1"""

from pathlib import Path

from omegaconf import DictConfig

from acestep_lora import cli
from acestep_lora.errors import UserError


def read_lyrics(text: str) -> str:
    """Lyrics as given, or those of the file behind an @."""
    if not text.startswith("@"):
        return text
    from acestep_lora.data.sidecars import read_text, strip_lrc

    try:
        return strip_lrc(read_text(Path(text[1:]).expanduser())[0])
    except (OSError, ValueError) as error:
        raise UserError(f"lyrics={text} is not a file that can be read: {error}.") from None


def read_metas(cfg: DictConfig) -> dict:
    """bpm, keyscale, timesignature and language in the form the model was trained on: Dm is `D minor`, 4/4 is `4`."""
    from acestep_lora.data import fields

    metas = {}
    for name, unsaid in {"bpm": None, "keyscale": "", "timesignature": "", "language": "unknown"}.items():
        try:
            metas[name] = getattr(fields, name)(cfg[name]) or unsaid
        except ValueError as error:
            raise UserError(f"{name}: {error}.") from None
    return metas


def generate(cfg: DictConfig) -> list[Path]:
    """Write the clips, each with a spectrogram -> the files."""
    paths = [str(path) for path in cli.as_list(cfg.adapter.path)]
    scales = [float(scale) for scale in cli.as_list(cfg.adapter.scale)]
    if len(scales) == 1:
        scales *= len(paths)
    if len(scales) != len(paths):
        raise UserError(f"adapter.scale={scales} must be one number, or one for each of {len(paths)} adapters.")
    for path in paths:
        if not Path(path).expanduser().exists():
            raise UserError(f"adapter.path={path} does not exist: give an adapter's folder or .safetensors file.")
    if cfg.prompt is None:
        raise UserError('prompt is missing: say what to play, such as prompt="a slow waltz for piano".')
    if cfg.format not in ("wav", "flac"):
        raise UserError(f"format={cfg.format} must be wav or flac.")
    lyrics, metas = read_lyrics(cfg.lyrics), read_metas(cfg)

    from hydra.utils import instantiate

    from acestep_lora import generation, runs
    from acestep_lora.data.fields import line

    hardware, base = instantiate(cfg.hardware), runs.find_base(cfg.model)
    prompt = str(cfg.prompt)
    for tag in generation.trigger_tags(paths):
        if tag not in prompt:
            print(f"note: the prompt lacks the adapter's trigger tag '{line(tag)}'")
    request = generation.Request(
        prompt=prompt,
        lyrics=lyrics,
        duration=cfg.duration,
        **metas,
        instrumental=cfg.instrumental,
        negative_prompt=cfg.negative_prompt,
        steps=cfg.steps,
        shift=cfg.shift,
        guidance_scale=cfg.guidance_scale,
        seeds=list(range(cfg.seed, cfg.seed + cfg.n)),
    )
    folder = Path(cfg.output_dir).expanduser()
    pipeline = generation.load_pipeline(base, hardware.dtype, hardware.device, cfg.model.timbre_token)
    return generation.write(pipeline, request, paths, scales, folder, cfg.format, cfg.compare)


def main(cfg: DictConfig) -> int:
    for path in generate(cfg):
        print(path)
    return 0


if __name__ == "__main__":
    cli.main("generate", main)
