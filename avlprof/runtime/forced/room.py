"""How much of the prefilled prompts may stay, and where: on the device, on the host, or nowhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from avlprof.models import LoadedModel
from avlprof.models.memory import free_bytes, host_bytes, model_devices
from avlprof.tasks import Sample
from avlprof.watch import Watch

SHARE = 0.5
"""Of what is free, prompts may take this much; the rest is for the passes over them."""

LOOKED_AT = 4  # samples whose prompts are encoded for an estimate


@dataclass(frozen=True)
class Room:
    """Bytes of prefilled prompts that may stay; None is no limit.

    Attributes:
        device: where the model is.
        host: beside it, for prompts that come back when they are needed; 0 where both are one.
    """

    device: int | None = None
    host: int | None = 0

    @classmethod
    def of(cls, loaded: LoadedModel, device: int | None = None) -> Room:
        """The room beside a model; `device` in place of half of what is free there."""
        devices = model_devices(loaded.model)
        if device is None:
            free = free_bytes(devices)
            device = None if free is None else int(SHARE * free)
        if any(one.type == "cpu" for one in devices) or len(devices) > 1:
            return cls(device, 0)
        host = host_bytes()
        return cls(device, None if host is None else int(SHARE * host))

    def fits_host(self, held: int) -> bool:
        """Whether so many bytes may be held on the host."""
        return self.host is None or held <= self.host

    def batch(self, wanted: int, each: int) -> int:
        """Samples of a batch, whose prompts alone must fit: as many as wanted, or fewer."""
        return wanted if self.device is None else max(min(wanted, self.device // max(each, 1)), 1)


def prompt_bytes(loaded: LoadedModel, samples: Sequence[Sample]) -> int:
    """About how many bytes the keys and values of a prompt take, by the first few samples."""
    few = samples[:LOOKED_AT]
    mask = loaded.adapter.encode_samples(few)["attention_mask"]
    tokens = -(-int(mask.sum()) // len(few))
    return tokens * loaded.adapter.layers * loaded.adapter.kv_bytes_per_token_per_layer()


def say_room(watch: Watch, room: Room, each: int, samples: int, batch: int, wanted: int) -> None:
    """Tell beforehand what the prompts will take, and what happens to those for which there is no room."""
    text = f"prompt KV of {samples} sample{'s' * (samples != 1)}: about {_size(each * samples)}"
    if room.device is not None:
        text += f", {_size(room.device)} may stay"
        if each * samples > room.device:
            rest = "waits on the host or is prefilled again" if room.host != 0 else "is prefilled again"
            text += f", the rest {rest}"
    if batch < wanted:
        text += f"; {batch} at a time, not {wanted}"
    watch.say(text)


def _size(count: float) -> str:
    power = min(max(int(math.log(max(count, 1), 1024)), 0), 4)
    return f"{count / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
