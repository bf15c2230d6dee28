"""What a command was asked to do: frozen dataclasses that mirror the command line option for option.

Each is checked once, on construction, before anything slow starts; what depends on the bundle (a default, the
list of solvers) is None here and filled in by the runtime.  `output_paths` names the pictures of one request.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hyperrt.errors import NotFound, UsageError

SUBJECT_FORMATS = ("diffusers", "peft", "kohya")
PRECISIONS = ("fp32", "fp16", "bf16")
ADAPT_MODES = ("inputs", "refit")
MAX_STEPS = 1000  # the training schedule has no more
MAX_IMAGES = 1000
MAX_SEED = 2**63 - 1
STDOUT = "-"


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One `hyperrt generate`.

    Raises:
        UsageError: a value is out of range, or two options exclude each other.
    """

    prompt: str
    images: tuple[str, ...] = ()  # photos: a folder, or files
    subject: str | None = None  # a subject file, instead of photos
    bundle: str = "tiny"  # name or folder
    class_noun: str | None = None  # None: the subject file's, else the bundle's
    generic_prompt: str | None = None  # None: the prompt without the placeholder
    negative_prompt: str = ""  # replaces the empty prompt on the base row
    kappa: float | None = None  # 0 to 2; share of guidance that comes from the subject
    guidance_scale: float | None = None  # s = w + 1
    steps: int | None = None  # denoising steps
    solver: str | None = None
    seed: int = 0  # picture k uses seed + k
    n: int = 1  # pictures
    strength: float = 1.0  # of the LoRA
    batch_size: int = 1  # pictures per engine call
    backend: str = "onnxruntime"
    threads: int | None = None  # None: the backend decides
    strict_images: bool = False  # one bad photo stops the command
    output: str | None = None  # FILE.png, folder, "-" for stdout; None: the current folder
    force: bool = False  # overwrite

    def __post_init__(self) -> None:
        check_sampling(self.kappa, self.guidance_scale, self.steps, self.seed, self.n, self.strength, self.batch_size)
        _in_range("threads", self.threads, 1, 1024)
        if self.images and self.subject:
            raise UsageError("--images and --subject were both given", "the subject comes from one of them", "leave one out")
        if self.output == STDOUT and self.n != 1:
            raise UsageError(f"-o - writes one picture, but -n is {self.n}", "a pipe takes one PNG", "use -o FOLDER")


@dataclass(frozen=True, kw_only=True)
class PersonalizeConfig:
    """One `hyperrt personalize`.

    Raises:
        UsageError: a value is out of range.
    """

    images: tuple[str, ...]
    output: str
    format: str = "diffusers"
    bundle: str = "tiny"
    class_noun: str | None = None
    backend: str = "onnxruntime"
    threads: int | None = None
    strict_images: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        _in_range("threads", self.threads, 1, 1024)
        _one_of("format", self.format, SUBJECT_FORMATS)
        if not self.images:
            raise UsageError("no photos were named", "", "add --images FOLDER")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """One `hyperrt export`; the `export` package reads it.

    Raises:
        UsageError: a value is not one of those known.
    """

    model: str  # tiny, or the folder of a base model
    output: str  # folder of the new bundle
    hypernet: str | None = None  # checkpoint of the weight decoder
    precision: str = "fp32"
    adapt: str = "inputs"
    dry_run: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("adapt", self.adapt, ADAPT_MODES)


def check_sampling(
    kappa: float | None,
    guidance_scale: float | None,
    steps: int | None,
    seed: int,
    n: int,
    strength: float,
    batch_size: int,
) -> None:
    """Refuse sampling arguments out of range; None means "the bundle's default".

    Raises:
        UsageError: naming the argument, its value and the range.
    """
    _in_range("kappa", kappa, 0, 2)
    _in_range("guidance scale", guidance_scale, 0, 100)
    _in_range("steps", steps, 1, MAX_STEPS)
    _in_range("n", n, 1, MAX_IMAGES)
    _in_range("batch size", batch_size, 1, MAX_IMAGES)
    _in_range("seed", seed, 0, MAX_SEED - n)
    _in_range("strength", strength, -10, 10)


def output_paths(output: str | None, prompt: str, seeds: Sequence[int], force: bool = False) -> list[Path]:
    """Where each picture goes; checked before the work, so that an hour is not lost to a full name.

    `FILE.png` is that file, with `-SEED` before the suffix when there are several; anything without a suffix is a
    folder, which gets `WORDS-OF-PROMPT-SEED.png`; None is the current folder.

    Raises:
        UsageError: another suffix than .png, a name that exists without `force`, or something that is no plain file.
        NotFound: the folder of `FILE.png` does not exist.
    """
    target = Path(output or ".")
    if target.suffix and not target.is_dir() and not (output or "").endswith("/"):
        paths = _file_names(target, seeds)
    else:
        if target.exists() and not target.is_dir():
            raise UsageError(f"{target} is not a folder", "a name without .png means a folder", f"use -o {target}.png")
        words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:60].strip("-") or "picture"
        paths = [target / f"{words}-{seed}.png" for seed in seeds]
    for path in paths:
        check_free(path, force)
    return paths


def check_free(path: Path, force: bool = False) -> None:
    """Refuse a file that may not be written over.

    Raises:
        UsageError: it exists and `force` is off, or it is a folder, device or pipe.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_file():
        raise UsageError(f"{path} is not a plain file", "only plain files are replaced", "choose another -o")
    if not force:
        raise UsageError(f"{path} exists", "nothing is overwritten unasked", "add --force, or choose another -o")


def _file_names(target: Path, seeds: Sequence[int]) -> list[Path]:
    if target.suffix.lower() != ".png":
        raise UsageError(f"{target} ends in {target.suffix}", "pictures are written as PNG", f"use -o {target.with_suffix('.png')}")
    if not target.parent.is_dir():
        raise NotFound(f"the folder {target.parent} does not exist", "", f"mkdir -p {target.parent}")
    if len(seeds) == 1:
        return [target]
    return [target.with_name(f"{target.stem}-{seed}{target.suffix}") for seed in seeds]


def _in_range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{name} is {value}", f"it must be from {low} to {high}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}", f"it must be one of {', '.join(allowed)}")
