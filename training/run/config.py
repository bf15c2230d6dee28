"""Settings of a hypernetwork's training: one frozen dataclass, from a preset, a JSON file and flags."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperrt.lora.metadata import MAX_IMAGE_SCALE
from hyperrt.training.model.decoder_config import KINDS, QUERIES, DecoderConfig
from hyperrt.training.model.losses import PRIORS, REDUCTIONS, REGULARISED
from hyperrt.training.run.presets import PRESETS

PRECISIONS = ("fp32", "bf16")
RENAMED = {"model": "base", "batch": "batch_size", "cache": "data", "out": "output"}  # former name -> name


def setting(help: str, default: object = dataclasses.MISSING) -> Any:
    """A field of `TrainConfig`; `help` is shown by `hyperrt train --help`."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One `hyperrt train`.

    Raises:
        ValueError: a number is out of range, or a word is unknown.
    """

    base: str = setting("Folder of the base model.")
    data: str = setting("Folder of the cache of pictures, with latents.")
    output: str = setting("Folder of the run.")
    steps: int = setting("Optimizer steps.", 3500)
    batch_size: int = setting("Rows per step over all processes, each with its own photos, LoRA, noise.", 64)
    targets: int = setting("Rows per subject; they share its photos and LoRA. Divides the batch size.", 1)
    photos: int = setting("Most photos of a subject that are averaged; each step uses 1 to this many.", 2)
    rank: int = setting("Rank of the LoRA.", 4)
    kind: str = setting(f"Kind of weight decoder: {', '.join(KINDS)}.", DecoderConfig.kind)
    dim: int = setting("Width of the decoder's tokens.", DecoderConfig.dim)
    layers: int = setting("Different blocks of the decoder.", DecoderConfig.layers)
    iterations: int = setting("Passes through the blocks; a resampler makes one.", DecoderConfig.iterations)
    head_dim: int = setting("Bottleneck of all heads; 0: none (the paper).", DecoderConfig.head_dim)
    output_dim: int = setting("Width of a resampler's output; 0: --dim.", DecoderConfig.output_dim)
    queries: str = setting(f"A resampler's query is for one: {', '.join(QUERIES)}.", DecoderConfig.queries)
    shared_heads: bool = setting("Layers share their heads.", DecoderConfig.shared_heads)
    lr: float = setting("Learning rate after the warm-up.", 1e-3)
    weight_decay: float = setting("Of AdamW, for matrices.", 1e-4)
    warmup: int = setting("Steps in which the learning rate rises.", 200)
    final_lr: float = setting("Where the cosine ends, as a share of the learning rate.", 0.05)
    clip: float = setting("Largest norm of the gradient.", 1.0)
    ema: float = setting("Decay of the averaged weights.", 0.999)
    lambda_: float = setting("Weight of R(h), the penalty on the LoRA (paper eq. 5).", 0.05)
    reduction: str = setting(f"How R(h) is averaged: {', '.join(REDUCTIONS)}.", "mean")
    regularised: str = setting("What R(h) is computed on: A and B (factors), or A B (product).", "factors")
    gamma: float = setting("Weight of L_reg (paper eq. 5); above 0 it doubles the rows.", 0.0)
    prior: str = setting("L_reg: preservation (other subjects) or matching (the base model).", "preservation")
    min_snr: float = setting("Gamma of min-SNR weighting (arXiv 2303.09556); 0: off.", 0.0)
    noise_shift: float = setting("Above 1, more timesteps are noisy ones.", 2.0)
    text_dropout: float = setting("Share of rows with the empty prompt.", 0.1)
    cross_view: float = setting("Share of rows whose target is not one of the photos.", 0.7)
    token: str = setting("The word that stands for [V].", "sks")
    image_prompt: str | None = setting("IP-Adapter-Plus (.safetensors) for the personalised rows.", None)
    image_scale: float = setting("Strength of the image prompt; the paper's is 0.55.", 0.55)
    seed: int = setting("Seed of all random numbers.", 0)
    holdout: int = setting("Subjects at the end of the cache that are held out for the monitors.", 128)
    log_every: int = setting("Steps between two lines of the log.", 10)
    monitor_every: int = setting("Steps between two measurements of held-out subjects.", 250)
    sample_every: int = setting("Steps between two sample sheets.", 1000)
    save_every: int = setting("Steps between two checkpoints.", 250)
    device: str | None = setting("PyTorch's name of the device [default: a GPU if there is one].", None)
    threads: int | None = setting("Threads of PyTorch [default: PyTorch's choice].", None)
    precision: str | None = setting("fp32 or bf16 [default: bf16 if the device computes in it].", None)
    compile: bool = setting("Compile the UNet with torch.compile; pays on a GPU.", False)
    gradient_checkpointing: bool = setting("Save memory: compute the UNet's activations twice.", False)
    compress_gradients: bool = setting("Send gradients between GPUs as bf16.", False)
    shard_optimizer: bool = setting("Each process keeps a part of Adam's moments (ZeRO stage 1).", False)

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "targets", "photos", "rank")
        for name in (*counts, "log_every", "monitor_every", "sample_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("text_dropout", "cross_view", "final_lr", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
        weights = ("lambda_", "gamma", "min_snr", "weight_decay", "image_scale")
        for name in (*weights, "warmup", "holdout", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if self.image_scale > MAX_IMAGE_SCALE:
            raise ValueError(f"image_scale is {self.image_scale}; it must be from 0 to {MAX_IMAGE_SCALE}")
        for name in ("noise_shift", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name, words in (("reduction", REDUCTIONS), ("regularised", REGULARISED), ("prior", PRIORS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(words)}")
        if self.precision not in (None, *PRECISIONS):
            raise ValueError(f"precision is {self.precision!r}; it must be fp32 or bf16")
        if self.batch_size % self.targets:
            why = f"it must be a multiple of targets, {self.targets}"
            raise ValueError(f"batch_size is {self.batch_size}; {why}")
        _ = self.decoder  # raises ValueError for its own settings

    @property
    def decoder(self) -> DecoderConfig:
        """The settings of the weight decoder."""
        return DecoderConfig(**{name: getattr(self, name) for name in _names(DecoderConfig)})


def resolve(flags: dict[str, Any], preset: str = "tiny", file: Path | None = None) -> TrainConfig:
    """The preset (training/run/presets.py), changed by the JSON file, changed by the flags that are not None.

    Raises:
        ValueError: an unknown preset or setting, a missing base, data or output, or a number out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    values = dict(PRESETS[preset])
    if file is not None:
        settings = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(settings, dict):
            raise ValueError(f"{file} holds no JSON object")
        values.update(renamed(settings))
    values.update({name: value for name, value in flags.items() if value is not None})
    if unknown := set(values) - _names(TrainConfig):
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
    for field in dataclasses.fields(TrainConfig):
        if field.name in values and not _has_type(values[field.name], str(field.type)):
            raise ValueError(f"{field.name} is {values[field.name]!r}; its type must be {field.type}")
    if missing := {"base", "data", "output"} - set(values):
        raise ValueError(f"missing: {', '.join('--' + name for name in sorted(missing))}")
    return TrainConfig(**values)


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under their present names; runs of earlier versions have others."""
    return {RENAMED.get(name, name): value for name, value in settings.items()}


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _has_type(value: Any, annotation: str) -> bool:
    """Whether a value has the type in an annotation: "int", "float", "bool", "str", or "... | None"."""
    names = annotation.split(" | ")
    if value is None:
        return "None" in names
    if isinstance(value, bool):
        return "bool" in names
    return isinstance(value, {"int": int, "float": (int, float), "str": str}.get(names[0], ()))


def to_json(config: TrainConfig | DecoderConfig) -> dict[str, Any]:
    """All settings by name."""
    return dataclasses.asdict(config)


# Settings that a resumed run may change unasked: how long it runs, how often it reports, where it computes
# and how much memory that takes. Base model, pictures and image prompt are compared by content, not by path.
FREE = frozenset(
    (
        "base", "data", "output", "image_prompt", "steps",
        "log_every", "monitor_every", "sample_every", "save_every",
        "device", "threads", "precision", "compile", "gradient_checkpointing",
        "compress_gradients", "shard_optimizer",
    )
)  # fmt: skip
# Settings that it cannot change at all: the weights would not fit.
FIXED = frozenset(("rank", *_names(DecoderConfig)))


def differences(before: Mapping[str, Any], now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The settings of a saved run that differ from `now`, {name: (before, now)}, without those in `FREE`.

    Args:
        before: `to_json` of the saved run; an earlier version may have had fewer settings.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(now)}
    pairs = {name: (before.get(name, defaults[name]), value) for name, value in to_json(now).items()}
    return {name: pair for name, pair in pairs.items() if name not in FREE and pair[0] != pair[1]}
