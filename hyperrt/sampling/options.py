"""What a command was asked to do: frozen dataclasses that mirror the command line option for option.

Each is checked once, on construction, before anything slow starts; what depends on the bundle is None here
and filled in by `hyperrt.sampling.request`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from hyperrt.arguments import Checked, in_range, not_empty, one_of
from hyperrt.errors import UsageError
from hyperrt.lora.metadata import MAX_IMAGE_SCALE
from hyperrt.lora.names import COMBINED, COMBINED_TO_SAVE, FORMATS
from hyperrt.text import short_repr

PRECISIONS = ("fp32", "fp16", "bf16")
QUANTIZED = ("none", "int8")
VERIFIED = ("none", "graphs", "full")
ADAPTED = ("inputs", "refit")
MAX_SIZE = 2**14  # pixels
MAX_GUIDANCE = 100
MAX_STEPS = 1000  # the training schedule has no more
MAX_IMAGES = 1000
MAX_RANK = 1024
MAX_THREADS = 1024
MAX_DEVICE = 1023
MAX_SEED = 2**63 - 1
RANDOM = -1  # as a seed
RANDOM_SEEDS = 2**32  # what other programs take, too
STDOUT = "-"
SOLVER_NAMES = (
    "ddim",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
)  # the tables are in hyperrt/sampling/solvers.py, which needs NumPy


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Checked):
    """What `Runtime.steps` takes beside the prompt and the subject; None means the bundle's default.

    Raises:
        UsageError: a value has the wrong type or is out of range, naming it and what is taken.
    """

    generic_prompt: str | None = None  # None: the prompt without the placeholder
    negative_prompt: str = ""  # replaces the empty prompt on the base row
    kappa: float | None = None  # 0 to 2; share of guidance that comes from the subject
    cfg: bool = False  # plain CFG of the personalised model, instead of HM-CFG
    guidance_scale: float | None = None  # s = w + 1; None of CFG: twice the bundle's
    steps: int | None = None  # denoising steps
    solver: str | None = None
    seed: int = RANDOM  # picture k uses seed + k; RANDOM: one that is chosen here
    n: int = 1  # pictures
    strength: float = 1.0  # of the LoRA
    batch_size: int = 1  # pictures per engine call
    image_scale: float | None = None  # of the image tokens, open category

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("kappa", self.kappa, 0, 2)
        in_range("image scale", self.image_scale, 0, MAX_IMAGE_SCALE)
        in_range("guidance scale", self.guidance_scale, 0, MAX_GUIDANCE)
        in_range("steps", self.steps, 1, MAX_STEPS)
        in_range("n", self.n, 1, MAX_IMAGES)
        in_range("batch size", self.batch_size, 1, MAX_IMAGES)
        if self.seed == RANDOM:
            object.__setattr__(self, "seed", random_seed(self.n))
        if not 0 <= self.seed <= MAX_SEED - self.n:
            why = f"it must be from 0 to {MAX_SEED - self.n}, or {RANDOM} for a random one"
            raise UsageError(f"seed is {short_repr(self.seed)}", why)
        in_range("strength", self.strength, -10, 10)
        if self.solver is not None:
            one_of("solver", self.solver, SOLVER_NAMES)
        if self.cfg and self.kappa is not None:
            why = "plain CFG draws with the personalised model alone, and has no share to set"
            raise UsageError(f"cfg is on, but kappa is {self.kappa:g}", why, "leave one of them out")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> SamplingConfig:
        """The config of these options.

        Raises:
            UsageError: there is no such option, or as for the config itself.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise UsageError(f"there is no option {unknown[0]!r}", f"the options are {', '.join(known)}")
        return cls(**options)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(SamplingConfig):
    """One `hyperrt generate`.

    Raises:
        UsageError: a value is out of range, or two options exclude each other.
    """

    prompt: str
    recipe: Mapping[str, Any] | None = None  # what is drawn again
    images: tuple[str, ...] = ()  # photos: a folder, or files
    subject: str | None = None  # a subject file, instead of photos
    partial: bool = False  # of a LoRA that adapts other modules, too: leave these out
    bundle: str = "tiny"  # name or folder
    class_noun: str | None = None  # None: the noun of the prompt, else the subject file's, else the bundle's
    backend: str = "auto"
    threads: int | None = None  # None: the backend decides
    device: int = 0  # which GPU, of a backend that runs on one
    low_memory: bool = False  # close graphs that are no longer needed; decode large pictures in tiles
    strict_images: bool = False  # one bad photo stops the command
    combine: str = "mean"  # what becomes of several photos
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
            why = "it leaves out part of a subject file, and none was named"
            do = "leave it out, or name the file with --subject"
            raise UsageError("--partial was given without --subject", why, do)
        check_needs_subject(bool(self.images or self.subject), self)
        if self.combine != "mean" and not self.images:
            why = "it says what becomes of several photos, and would change nothing"
            raise UsageError(f"combine is {self.combine!r}, but there are no photos", why, "leave it out")

    def sampling(self, **changes: Any) -> SamplingConfig:
        """The sampling options alone, some of them changed."""
        own = {field.name: getattr(self, field.name) for field in fields(SamplingConfig)}
        return SamplingConfig(**{**own, **changes})


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
        UsageError: a value is not one of those known.
    """

    model: str  # a family, or the folder of a base model
    output: str  # folder of the new bundle
    base: str | None = (
        None  # folder, file or hub id of the base model; None: that of the hypernetwork's training
    )
    vae: str | None = None  # folder, file or hub id of a VAE in place of the base model's
    hypernet: str | None = None  # checkpoint of the weight decoder
    random_weights: int | None = None  # seed: random weights in place of both
    image_encoder: str | None = None  # folder of the ViT that the hypernetwork reads
    image_prompt: str | None = None  # IP-Adapter-Plus file
    like: str | None = None  # folder or hub id whose configuration a single file has
    offline: bool = False
    size: int | None = None  # pixels; None: what the base model was trained for
    precision: str = "fp32"  # of the arithmetic
    quantize: str = "none"  # how weights are stored
    adapt: str = "inputs"  # how a LoRA enters the denoiser
    verify: str | None = None  # how much is compared with PyTorch; None: what suits the family
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
    target: str = "current"  # "sm86,sm89": GPUs that are not here
    graph: tuple[str, ...] = ()  # none: all
    images: int = 1  # pictures of a call
    branches: int = 3  # 2 with cfg, or where kappa is 0 or 2, or the guidance scale 0.5
    several_subjects: bool = False  # the pictures of a call have different ones
    low_memory: bool = False  # the decoder for tiles
    force: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("images", self.images, 1, MAX_IMAGES)
        in_range("branches", self.branches, 1, 3)
        not_empty("target", *self.targets)

    @property
    def targets(self) -> tuple[str, ...]:
        """Each once, in order."""
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
    bundle: str | None = None  # None: whatever model the file is for
    rank: int | None = None  # None: as it is
    partial: bool = False  # leave out what is no q, k or v of the cross-attention
    force: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("format", self.format, FORMATS)
        in_range("rank", self.rank, 1, MAX_RANK)
        not_empty("source", self.source)
        not_empty("output", self.output)


def random_seed(pictures: int) -> int:
    """A seed for so many pictures that nobody can foresee; their own are below RANDOM_SEEDS, too."""
    import secrets

    return secrets.randbelow(RANDOM_SEEDS - pictures + 1)


def check_needs_subject(has_subject: bool, options: SamplingConfig) -> None:
    """Refuse options that change nothing without a subject.

    Raises:
        UsageError: one was given, and is not 0.
    """
    if options.cfg and not has_subject:
        why = "it is guidance by the subject's model alone, and without a subject there is none"
        raise UsageError("cfg is on, but there is no subject", why, "leave it out, or name a subject")
    for name, value, what in (
        ("kappa", options.kappa, "it is the share of the subject in the guidance"),
        ("image scale", options.image_scale, "it is the weight of the subject's photos beside the text"),
    ):
        if value and not has_subject:
            why = f"{what}, and would change nothing"
            do = "leave it out, or name a subject"
            raise UsageError(f"{name} is {value:g}, but there is no subject", why, do)
