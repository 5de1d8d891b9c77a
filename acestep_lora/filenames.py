"""Names that Linux, macOS and Windows all accept, and folders that are where they seem to be."""

import re
from pathlib import Path

from acestep_lora.errors import UserError

LONGEST = 240
"""Characters of a whole path; Windows takes 259, and other programs add to them."""

_ILLEGAL = re.compile(r'[<>:"/\\|?*\x00-\x1f]+')
_DEVICE = re.compile(r"(?:con|prn|aux|nul|(?:com|lpt)[0-9¹²³])\s*(?:\.|$)", re.IGNORECASE)


def legal(text: str, most: int = 40) -> str:
    """`text` as the name of a file or folder, of at most `most` bytes."""
    name = _shortened(_ILLEGAL.sub("_", text), most)
    return _shortened(f"_{name}", most) if not name or _DEVICE.match(name) else name


def _shortened(name: str, most: int) -> str:
    return name.encode(errors="ignore")[:most].decode(errors="ignore").strip(" .")


def own(folder: Path) -> Path:
    """A folder of ours among the user's files. Raises UserError for a link: files that came with it lead anywhere."""
    if folder.resolve() != folder.parent.resolve() / folder.name:
        raise UserError(f"{folder} is a link, and nothing is written through it: remove it, or set dataset.cache_dir.")
    return folder
