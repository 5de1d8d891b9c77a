"""Listen, look and edit: python -m acestep_lora.studio dataset.dir=/music/mine"""

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from acestep_lora import basemodel, cli
from acestep_lora.annotate.provider import Provider
from acestep_lora.errors import UserError
from acestep_lora.studio.review import Review, Settings


def providers(cfg: DictConfig) -> dict[str, Callable[[], Provider]]:
    """Every provider there is, by group and name."""
    choices = [(file.parent.name, file.stem) for file in cli.provider_files()]
    return {f"{group}={name}": partial(provider, cfg, group, name) for group, name in choices}


def provider(cfg: DictConfig, group: str, name: str) -> Provider:
    """The one that was chosen on the command line with its options there, any other one as its YAML file has it."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    chosen = HydraConfig.get()
    if chosen.runtime.choices[group] != name:
        others = [text for text in chosen.overrides.task if not text.startswith((f"{group}=", f"{group}."))]
        cfg = compose("studio", overrides=[*others, f"{group}={name}"])
    return instantiate(cfg[group])


def open_review(cfg: DictConfig) -> Review:
    from hydra.utils import instantiate
    from transformers import AutoTokenizer

    if cfg.dataset.dir is None:
        raise UserError("dataset.dir is not set: give the folder of songs to review, dataset.dir=/music/mine.")
    model = cfg.model
    base = basemodel.find(model.path, variant=model.variant, repo=model.repo, parts_path=model.parts_path)
    tokenizer = AutoTokenizer.from_pretrained(base.tokenizer, local_files_only=True, trust_remote_code=False)
    folder = cfg.dataset.dir if isinstance(cfg.dataset.dir, str) else "."
    output = Path(cfg.output or Path(folder, "dataset.json")).expanduser()
    return Review(cfg.dataset.dir, instantiate(cfg.conditioning), tokenizer, providers(cfg), output)


def main(cfg: DictConfig) -> int:
    review = open_review(cfg)
    try:
        import uvicorn

        from acestep_lora.studio.page import app
    except ModuleNotFoundError as error:
        raise UserError(f'the studio needs {error.name}: pip install "acestep-lora[studio]".') from None
    settings = Settings(cfg.dataset.custom_tag, cfg.dataset.tag_position or "prepend", cfg.dataset.genre_ratio or 0)
    try:
        listener = socket.create_server((cfg.host, cfg.port))
    except OSError as error:
        raise UserError(f"{cfg.host}:{cfg.port} cannot be used ({error.strerror}): choose another port=.") from None
    host, port = listener.getsockname()[:2]
    print(f"open http://{host}:{port} in a browser; Ctrl-C ends", flush=True)
    uvicorn.Server(uvicorn.Config(app(review, settings, cfg.host), log_level="warning")).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    cli.main("studio", main)
