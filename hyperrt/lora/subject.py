"""A subject: the LoRA that was made of photos, on the host or still on the device that computed it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt.arguments import Checked
from hyperrt.engines.dlpack import DeviceArray

Vector = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Subject(Checked):
    """One person, animal or thing as the runtime uses it; compared by identity.

    Attributes:
        lora: the packed vectors "lora_q" [Nq] and "lora_kv" [Nkv] (`hyperrt.lora.layout`), on the host.
        class_noun: what it is.
        photos: how many it was made of.
        metadata: base_model, hypernet, class_noun, photos, trigger, as `save_subject` takes them.
        image_tokens: [1 or photos, tokens, width], of the open category: what the image prompt made of the
            photos; None: the LoRA alone.  They may be on a device: `numpy.asarray` copies them to the host.

    Raises:
        UsageError: a value has another type.
    """

    lora: Mapping[str, Vector]
    class_noun: str
    photos: int
    metadata: Mapping[str, str]
    image_tokens: Vector | DeviceArray | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether another program made it: its file does not name the base model."""
        return "base_model" not in self.metadata


class LoraOnDevice(Mapping[str, Vector]):
    """The `lora` of a subject that a device made; whoever reads a vector gets a copy on the host, made once.

    Args:
        there: the packed vectors on the device, by name.
    """

    def __init__(self, there: Mapping[str, DeviceArray]) -> None:
        self.there = there
        self._here: dict[str, Vector] = {}

    def __getitem__(self, name: str) -> Vector:
        if name not in self._here:
            self._here[name] = np.asarray(self.there[name])
        return self._here[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.there)

    def __len__(self) -> int:
        return len(self.there)

    def __reduce__(self) -> Any:  # what is pickled is on the host
        return dict, (dict(self),)
