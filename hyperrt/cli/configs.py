"""The options of each command as a frozen dataclass, checked before anything slow starts.

A field has the name and the default of its option. What depends on the bundle is None here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hyperrt.arguments import Checked, in_range, not_empty, one_of
from hyperrt.errors import UsageError
from hyperrt.lora.names import COMBINED, COMBINED_TO_SAVE, FORMATS
from hyperrt.sampling.options import (
    MAX_DEVICE,
    MAX_IMAGES,
    MAX_SEED,
    MAX_THREADS,
    SamplingOptions,
    check_needs_subject,
)

PRECISIONS = ("fp32", "fp16", "bf16")
QUANTIZED = ("none", "int8")
VERIFIED = ("none", "graphs", "full")
ADAPTED = ("inputs", "refit")
MAX_SIZE = 2**14  # pixels
MAX_RANK = 1024
STDOUT = "-"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingOptions):
    """One `hyperrt generate`.

    Raises:
        UsageError: a value is out of range, or two options exclude each other.
    """

    prompt: str
    recipe: Mapping[str, Any] | None = None  # the recipe to draw again
    images: tuple[str, ...] = ()  # photos: a folder, or files
    subject: str | None = None  # a subject file, instead of photos
    partial: bool = False  # ignore what a LoRA adapts beside the cross-attention
    bundle: str = "tiny"  # name or folder
    class_noun: str | None = None  # None: the noun of the prompt, else the subject file's, else the bundle's
    backend: str = "auto"
    threads: int | None = None  # None: the backend decides
    device: int = 0  # number of the GPU
    low_memory: bool = False  # close graphs that are no longer needed; decode large pictures in tiles
    strict_images: bool = False  # stop at a photo that cannot be used
    combine: str = "mean"  # how several photos become one LoRA
    output: str | None = None  # FILE.png, folder, "-" for stdout; None: the current folder
    force: bool = False  # overwrite

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("threads", self.threads, 1, MAX_THREADS)
        in_range("device", self.device, 0, MAX_DEVICE)
        one_of("combine", self.combine, COMBINED)
        if self.images and self.subject:
            raise UsageError(
                "--images and --subject were both given",
                "the subject comes from one of them",
                "leave one out",
            )
        if self.output == STDOUT and self.n != 1:
            what = f"-o - writes one picture, but -n is {self.n}"
            raise UsageError(what, "a pipe takes one PNG", "name a folder with -o")
        not_empty("images", *self.images)
        not_empty("subject", self.subject)
        if self.partial and not self.subject:
            why = "it ignores part of a subject file, and no file was given"
            do = "leave it out, or name the file with --subject"
            raise UsageError("--partial was given without --subject", why, do)
        check_needs_subject(bool(self.images or self.subject), self)
        if self.combine != "mean" and not self.images:
            why = "it selects how several photos become one LoRA, so it would have no effect"
            raise UsageError(f"combine is {self.combine!r}, but there are no photos", why, "leave it out")

    def sampling(self, **changes: Any) -> SamplingOptions:
        """The sampling options alone, some of them changed."""
        own = {field.name: getattr(self, field.name) for field in fields(SamplingOptions)}
        return SamplingOptions(**{**own, **changes})


@dataclass(frozen=True, kw_only=True)
class PersonalizeConfig(Checked):
    """One `hyperrt personalize`.

    Raises:
        UsageError: a value is out of range.
    """

    images: tuple[str, ...]
    output: str
    format: str = "diffusers"
    bundle: str = "tiny"
    class_noun: str | None = None
    backend: str = "auto"
    threads: int | None = None
    device: int = 0
    strict_images: bool = False
    combine: str = "mean"
    force: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("threads", self.threads, 1, MAX_THREADS)
        in_range("device", self.device, 0, MAX_DEVICE)
        one_of("format", self.format, FORMATS)
        one_of("combine", self.combine, COMBINED_TO_SAVE)
        if not self.images:
            raise UsageError("no photos were named", "", "name them with --images")
        not_empty("images", *self.images)
        not_empty("output", self.output)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Checked):
    """One `hyperrt export`; the `export` package reads it.

    Raises:
        UsageError: a value is not allowed.
    """

    model: str  # a family, or the folder of a base model
    output: str  # folder of the new bundle
    base: str | None = (
        None  # folder, file or hub id of the base model; None: that of the hypernetwork's training
    )
    vae: str | None = None  # folder, file or hub id of a VAE that replaces the base model's
    hypernet: str | None = None  # checkpoint of the weight decoder
    random_weights: int | None = None  # seed of random weights for everything
    image_encoder: str | None = None  # folder of the ViT that the hypernetwork reads
    image_prompt: str | None = None  # IP-Adapter-Plus file
    like: str | None = None  # folder or hub id with the configuration of a single file
    offline: bool = False
    size: int | None = None  # pixels; None: the size that the base model was trained for
    precision: str = "fp32"  # precision of the arithmetic
    quantize: str = "none"  # how weights are stored
    adapt: str = "inputs"  # how a LoRA enters the denoiser
    verify: str | None = None  # how much is compared with PyTorch; None: the family's default
    dry_run: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("random_weights", self.random_weights, 0, MAX_SEED)
        in_range("size", self.size, 8, MAX_SIZE)
        one_of("precision", self.precision, PRECISIONS)
        one_of("quantize", self.quantize, QUANTIZED)
        one_of("adapt", self.adapt, ADAPTED)
        if self.verify is not None:
            one_of("verify", self.verify, VERIFIED)


@dataclass(frozen=True, kw_only=True)
class CompileConfig(Checked):
    """One `hyperrt compile`.

    Raises:
        UsageError: a value is out of range.
    """

    bundle: str = "tiny"
    backend: str = "tensorrt-rtx"
    target: str = "current"  # such as "sm86,sm89"
    graph: tuple[str, ...] = ()  # names; empty: all
    pictures: int = 1  # per engine call
    branches: int = 3  # 2 with cfg, if kappa is 0 or 2, or if the guidance scale is 0.5
    several_subjects: bool = False  # whether the pictures of a call show different subjects
    low_memory: bool = False  # whether the decoder runs on tiles
    force: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("pictures", self.pictures, 1, MAX_IMAGES)
        in_range("branches", self.branches, 1, 3)
        not_empty("target", *self.targets)

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets, without duplicates."""
        return tuple(dict.fromkeys(name.strip() for name in self.target.split(",")))


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Checked):
    """One `hyperrt lora convert`.

    Raises:
        UsageError: a value is out of range.
    """

    source: str  # file or folder
    output: str
    format: str
    bundle: str | None = None  # None: the file is not compared with a bundle
    rank: int | None = None  # None: unchanged
    partial: bool = False  # keep only q, k and v of the cross-attention
    force: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("format", self.format, FORMATS)
        in_range("rank", self.rank, 1, MAX_RANK)
        not_empty("source", self.source)
        not_empty("output", self.output)
