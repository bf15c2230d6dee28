"""A subject: its LoRA, on the host or still on the device that computed it, and how it is saved."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperrt.arguments import Checked, checked, one_of
from hyperrt.engines.dlpack import DeviceArray
from hyperrt.errors import LoraMismatch, NumericError, UsageError
from hyperrt.lora import metadata as lora_metadata
from hyperrt.lora import writer
from hyperrt.lora.layout import VECTORS, LoraLayout, Vector, difference
from hyperrt.lora.names import FORMATS
from hyperrt.lora.reader import NOT_USABLE, Factors, check_tokens, usable
from hyperrt.lora.safetensors_file import REMAKE, Stored
from hyperrt.text import short_repr

SUBJECT_VERSION = "1"  # of the format of a subject file


@dataclass(frozen=True, eq=False)
class Subject(Checked):
    """One person, animal or thing. Subjects are compared by identity: do not change the arrays of one.

    Attributes:
        lora: the packed vectors "lora_q" [Nq] and "lora_kv" [Nkv] (`hyperrt.lora.layout`), on the host.
        class_noun: what the subject is: "mug".
        photos: number of photos that it was made from.
        metadata: its origin: the names in `lora.metadata.REQUIRED`, and those in OPTIONAL if known.
        image_tokens: [1 or photos, tokens, width], of the open category: the image prompt's output for the
            photos; None: the LoRA alone.  They may be on a device: `numpy.asarray` copies them to the host.
        layout: of the packed vectors; None: unknown, and the subject cannot be saved.

    Raises:
        UsageError: a value has another type.
    """

    lora: Mapping[str, Vector]
    class_noun: str
    photos: int
    metadata: Mapping[str, str]
    image_tokens: Vector | DeviceArray | None = None
    layout: LoraLayout | None = None

    @property
    def is_foreign(self) -> bool:
        """Whether another program made it: its file does not name the base model."""
        return "base_model" not in self.metadata

    @checked
    def save(self, path: str | os.PathLike[str], format: str = "diffusers", force: bool = False) -> None:
        """Write a subject file, whole or not at all; `Runtime.load_subject` reads it.

        Args:
            path: a file; with format "peft" and no suffix a folder, which also gets `adapter_config.json`.
            format: whose tensor names to use: "diffusers", "peft" or "kohya".  The mean of the image
                tokens over the photos is saved too, but not as kohya.
            force: replace a file that exists.

        Raises:
            UsageError: the format, or the subject's metadata or layout, is missing or unknown.
            LoraMismatch: the vectors do not fit the layout.
            NumericError: a weight is NaN, infinite, or beyond MAX_WEIGHT.
            NotFound, ResourceError: it cannot be written there (`files.publish`).
        """
        one_of("format", format, FORMATS)
        if fault := lora_metadata.fault(self.metadata):
            raise UsageError("the subject's metadata cannot be saved", fault)
        if self.layout is None:
            do = "make it with Runtime.personalize, or set its layout"
            raise UsageError("the subject cannot be saved", "its LoRA layout is unknown", do)
        if wrong := difference(set(self.lora), set(VECTORS)):
            raise LoraMismatch("the packed LoRA is not complete", wrong)
        for name, vector in self.lora.items():
            if not isinstance(vector, np.ndarray) or vector.dtype.kind != "f":
                raise UsageError(f"{name} is {short_repr(vector)}", "it must be an array of floats")
            if not usable(vector):
                raise NumericError(f"{name} cannot be saved", NOT_USABLE)
        tokens, rank = self.image_tokens, self.layout.rank
        if tokens is not None:
            check_tokens("the subject", tokens, tokens.shape[1:])
            tokens = np.asarray(tokens).mean(0, dtype=np.float32, keepdims=True)
        sites = {  # the scale is folded in: alpha is the rank
            path: Factors(Stored.of(a.T), Stored.of(b.T), float(rank))
            for path, (a, b) in self.layout.unpack(self.lora).items()
        }
        origin = {
            **self.metadata, "version": SUBJECT_VERSION, "layout": self.layout.hash, "rank": str(rank)
        }  # fmt: skip
        writer.write_ours(path, format, sites, origin, None if tokens is None else Stored.of(tokens), force)


class LoraOnDevice(Mapping[str, Vector]):
    """The `lora` of a subject on a device; reading a vector copies it to the host, once.

    Args:
        on_device: the packed vectors on the device, by name.
    """

    def __init__(self, on_device: Mapping[str, DeviceArray]) -> None:
        self.on_device = on_device
        self._on_host: dict[str, Vector] = {}

    def __getitem__(self, name: str) -> Vector:
        if name not in self._on_host:
            self._on_host[name] = np.asarray(self.on_device[name])
        return self._on_host[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.on_device)

    def __len__(self) -> int:
        return len(self.on_device)

    def __reduce__(self) -> Any:  # pickled as a dict on the host
        return dict, (dict(self),)


def only_subject(subjects: Iterable[Subject | None]) -> Subject | None:
    """The one subject of a call, for a bundle with a single LoRA for all rows; None for the base model.

    Raises:
        UsageError: the subjects differ.
    """
    different = [*dict.fromkeys(subject for subject in subjects if subject is not None)]
    if len(different) > 1:
        raise UsageError(
            f"{len(different)} subjects cannot share a call of this bundle",
            "its LoRA is part of the graph, the same for all rows (adapt is 'refit')",
            "draw them one after the other, or export the bundle with --adapt inputs",
        )
    return different[0] if different else None


def packed(subject: Subject | None, name: str, size: int, there: bool = False) -> Vector | DeviceArray:
    """The packed vector [size] of a subject; zeros for the base model.

    Args:
        there: leave the vector on the device if it is on one.

    Raises:
        LoraMismatch: the subject has another number of weights.
    """
    if subject is None:
        return np.zeros(size, np.float32)
    if there and isinstance(subject.lora, LoraOnDevice):
        vector: Vector | DeviceArray = subject.lora.on_device[name]
    else:
        vector = _on_host(subject, name)
    if vector.shape != (size,):
        raise LoraMismatch(
            "the subject does not fit the bundle",
            f"its {name} holds {math.prod(vector.shape)} weights, the bundle's {size}",
            REMAKE,
        )
    return vector


def _on_host(subject: Subject, name: str) -> Vector:
    """A vector of the subject as float32; a number that is too large becomes infinity.

    Raises:
        LoraMismatch: it is not an array of floats.
    """
    try:
        vector = np.asarray(subject.lora.get(name))
        with np.errstate(over="ignore"):
            return vector.astype(np.float32, casting="same_kind", copy=False)
    except (TypeError, ValueError) as error:
        why = f"its {name} is not an array of floats: {error}"
        raise LoraMismatch("the subject cannot be used", why, REMAKE) from error
