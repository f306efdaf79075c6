"""Keep the hub's client libraries from the network for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hub_offline(wanted: bool = True) -> Iterator[None]:
    """Switch the clients off the network; they read the environment once, at import, hence the switch itself."""
    import datasets.config
    import huggingface_hub.constants

    clients: list[Any] = [huggingface_hub.constants, datasets.config] if wanted else []
    before = [client.HF_HUB_OFFLINE for client in clients]
    try:
        for client in clients:
            client.HF_HUB_OFFLINE = True
        yield
    finally:
        for client, value in zip(clients, before, strict=True):
            client.HF_HUB_OFFLINE = value
