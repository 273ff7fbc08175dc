"""Which exact weights a model has, for provenance."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

_SAMPLED = 1 << 20


def hub_commit(source: str, revision: str | None) -> str | None:
    """The commit of a hub model that lies in the local cache; None if it does not."""
    path = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(path).parent.name if isinstance(path, str) else None


def folder_fingerprint(folder: Path) -> str:
    """12 hex digits over the config and over the size, first and last MiB of every weights file."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLED))
            file.seek(max(0, size - _SAMPLED))
            digest.update(file.read(_SAMPLED))
    return digest.hexdigest()[:12]
