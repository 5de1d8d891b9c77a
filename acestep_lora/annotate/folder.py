"""A folder of songs -> a folder of text files, as the official app's preparation scripts do it."""

import logging
from collections.abc import Iterator
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from acestep_lora import cli
from acestep_lora.annotate.annotator import progress
from acestep_lora.annotate.provider import Provider, ProviderDown
from acestep_lora.data.track import scan
from acestep_lora.errors import UserError
from acestep_lora.hashes import write_atomic

log = logging.getLogger(__name__)


def process_folder(input_dir: str | Path, output_dir: str | Path, provider: str | Provider) -> list[Path]:
    """Transcribe or caption the songs of a folder, subfolders apart -> the files written.

    These are {stem}.lyrics.txt and {stem}.caption.txt, whichever the provider has something for; those that are there
    stay. provider: one, or a file name in conf/transcriber or conf/captioner ("gemini" is in both and does both). Songs
    that fail are logged and left out; keys come from the environment. Raises ProviderDown.
    """
    written, folder = [], Path(input_dir).expanduser().absolute()
    for one in _configured(provider) if isinstance(provider, str) else [provider]:
        songs = [track for track in scan(folder).tracks if track.path.parent == folder]
        for track in progress(songs, one.name):
            paths = {name: Path(output_dir, f"{track.path.stem}.{name}.txt") for name in ("lyrics", "caption")}
            missing = {name: path for name, path in paths.items() if name in one.fields and not path.exists()}
            try:
                values = one.annotate(track).values if missing else {}
            except ProviderDown:
                raise
            except UserError as error:
                log.error("%s: %s", track.id, error)
                continue
            for name in missing.keys() & values.keys():
                write_atomic(missing[name], f"{values[name]}\n".encode())
                written.append(missing[name])
    return written


def _configured(name: str) -> Iterator[Provider]:
    files = cli.provider_files(("transcriber", "captioner"))
    if name not in {file.stem for file in files}:
        raise UserError(f"provider {name!r} is none of {', '.join(sorted({file.stem for file in files}))}.")
    cli.register()
    for group in [file.parent.name for file in files if file.stem == name]:
        with initialize_config_dir(str(cli.CONF), version_base="1.3"):
            cfg = compose("annotate", overrides=["tempo_key=none", f"{group}={name}"])
        yield instantiate(cfg[group])
