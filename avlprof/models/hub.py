"""Whether the model hub answers, asked once and quickly."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants

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
