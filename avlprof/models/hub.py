"""The model hub and the exact weights that a model has."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants, try_to_load_from_cache

_SECONDS = 3.0


def hub_reachable() -> bool:
    """Whether files can be fetched from the hub; behind a proxy the answer is left to the proxy.

    Asked before a load, because the hub's client retries for half a minute before it turns to
    the cache.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    if address.scheme in getproxies():
        return True
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=_SECONDS).close()
    except OSError:
        return False
    return True


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
