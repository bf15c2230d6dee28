"""What a training of the hypernetwork is told: one frozen dataclass, from a preset, a JSON file and flags."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperrt.lora.metadata import MAX_IMAGE_SCALE
from hyperrt.training.model.decoder_config import DecoderConfig
from hyperrt.training.model.losses import PRIORS, REDUCTIONS, REGULARISED
from hyperrt.training.run.presets import PRESETS

PRECISIONS = (None, "fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One `hyperrt train`.

    Raises:
        ValueError: a number is out of range.
    """

    model: str  # folder of the base model
    data: str  # folder of the cache of pictures, with latents
    output: str  # folder of the run
    steps: int = 3500
    batch: int = 64  # rows per step, over all processes, each with its own photos, LoRA and noise
    targets: int = 1  # rows that share a subject's photos and LoRA; the decoder runs batch / targets times
    photos: int = 2  # most photos of a subject that are averaged; each step draws 1 to this many
    rank: int = 4
    kind: str = "hyperdreambooth"  # this and the next seven: see DecoderConfig
    dim: int = 128
    layers: int = 2
    iterations: int = 4
    head_dim: int = 32
    output_dim: int = 0
    queries: str = "factor"
    shared_heads: bool = False
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: int = 200  # steps
    final_lr: float = 0.05  # share of lr that the cosine ends at
    clip: float = 1.0  # norm of the gradient
    ema: float = 0.999
    lambda_: float = 0.05  # weight of R(h), paper eq. 5
    reduction: str = "mean"  # of R(h): mean, sum, matrix_fro_mean, matrix_mean_sum
    regularised: str = "factors"  # what R(h) weighs: the factors A and B, or their "product"
    gamma: float = 0.0  # weight of L_reg, paper eq. 5; doubles the rows
    prior: str = "preservation"  # what L_reg is, or "matching": training/model/losses.py
    min_snr: float = 0.0  # gamma of min-SNR weighting (arXiv 2303.09556); 0: none
    noise_shift: float = 2.0  # above 1, more of the timesteps are noisy ones
    text_dropout: float = 0.1  # share of rows with the empty prompt
    cross_view: float = 0.7  # share of rows whose target is not one of the photos
    token: str = "sks"  # stands for [V]
    image_prompt: str | None = None  # safetensors of an IP-Adapter-Plus, for the personalised rows
    image_scale: float = 0.55  # of the image prompt; the paper's
    seed: int = 0
    holdout: int = 128  # last identities of the cache, never trained on, for the monitors
    log_every: int = 10
    monitor_every: int = 250
    sample_every: int = 1000
    save_every: int = 250
    device: str | None = None  # None: a GPU if there is one
    threads: int | None = None  # None: torch decides
    precision: str | None = None  # of products, fp32 or bf16; None: bf16 where the device computes in it
    compile: bool = False  # torch.compile for the UNet; pays on a GPU
    gradient_checkpointing: bool = False  # the UNet computes its activations twice and keeps few of them
    compress_gradients: bool = False  # between processes gradients travel as bf16, in half the bytes
    shard_optimizer: bool = False  # each process keeps its part of Adam's moments (ZeRO stage 1)

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "batch",
            "targets",
            "photos",
            "rank",
            "log_every",
            "monitor_every",
            "sample_every",
            "save_every",
        )
        for name in counts:
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
        if self.noise_shift <= 0 or self.lr <= 0 or self.clip <= 0:
            raise ValueError("noise_shift, lr and clip must be above 0")
        for name, words in (("reduction", REDUCTIONS), ("regularised", REGULARISED), ("prior", PRIORS)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(words)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be fp32 or bf16")
        if self.batch % self.targets:
            raise ValueError(f"batch is {self.batch}; it must be a multiple of targets, {self.targets}")
        _ = self.decoder  # checks its own numbers

    @property
    def decoder(self) -> DecoderConfig:
        shape = {field.name: getattr(self, field.name) for field in dataclasses.fields(DecoderConfig)}
        return DecoderConfig(**shape)


def resolve(flags: dict[str, Any], preset: str = "tiny", file: Path | None = None) -> TrainConfig:
    """The preset (training/run/presets.py), changed by the JSON file, changed by the flags that are not None.

    Raises:
        ValueError: an unknown preset or key, model, data or output missing, or a number out of range.
    """
    if preset not in PRESETS:
        raise ValueError(f"there is no preset {preset!r}; there are {', '.join(PRESETS)}")
    values = dict(PRESETS[preset])
    if file is not None:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
        if not isinstance(found, dict):
            raise ValueError(f"{file} holds no JSON object")
        values.update(found)
    values.update({name: value for name, value in flags.items() if value is not None})
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    if unknown := set(values) - known:
        raise ValueError(f"unknown settings: {', '.join(sorted(unknown))}")
    for field in dataclasses.fields(TrainConfig):
        if field.name in values and not _is_of(values[field.name], str(field.type)):
            raise ValueError(f"{field.name} is {values[field.name]!r}; it must be of the kind {field.type}")
    if missing := {"model", "data", "output"} - set(values):
        raise ValueError(f"missing: {', '.join('--' + name for name in sorted(missing))}")
    return TrainConfig(**values)


def _is_of(value: Any, kind: str) -> bool:
    """Whether a value is of a field's type, as written: "int", "float", "bool", "str", or one "| None"."""
    names = kind.split(" | ")
    if value is None:
        return "None" in names
    if isinstance(value, bool):
        return "bool" in names
    return isinstance(value, {"int": int, "float": (int, float), "str": str}.get(names[0], ()))


def to_json(config: TrainConfig | DecoderConfig) -> dict[str, Any]:
    """All fields by name."""
    return dataclasses.asdict(config)


# What a resumed run may change unasked: how long it goes on, how often it reports, where it computes and how
# much memory that takes. Base model, pictures and image prompt are told by content, not by path.
FREE = frozenset(
    (
        "model", "data", "output", "image_prompt", "steps",
        "log_every", "monitor_every", "sample_every", "save_every",
        "device", "threads", "precision", "compile", "gradient_checkpointing",
        "compress_gradients", "shard_optimizer",
    )
)  # fmt: skip
# What it may not change at all: the weights would not fit.
FIXED = frozenset(("rank", *(field.name for field in dataclasses.fields(DecoderConfig))))


def differences(before: dict[str, Any], now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """What a run was told otherwise, {name: (then, now)}, without what is `FREE`.

    Args:
        before: `to_json` of the run's configuration, maybe by a version that had fewer settings.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(now)}
    pairs = {name: (before.get(name, defaults[name]), value) for name, value in to_json(now).items()}
    return {name: pair for name, pair in pairs.items() if name not in FREE and pair[0] != pair[1]}
