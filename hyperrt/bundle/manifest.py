"""The manifest of a bundle: the dataclasses that `bundle.json` is read into, field for field, and checked by.

docs/bundle-format.md is the specification.  A field with a default was added after the first bundles; it is
written only where it says something else, so that what needs none of it stays the same file.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hyperrt.engines.tensors import TensorSpec
from hyperrt.lora.layout import MAX_WEIGHTS, LoraLayout, Site
from hyperrt.lora.metadata import MAX_IMAGE_SCALE
from hyperrt.strict_json import check_sha256

GRAPHS = ("image_encoder", "weight_decoder", "text_encoder", "context", "denoiser", "vae_decoder")
IMAGE_PROMPT = "image_prompt"  # graph of the open category; there if the manifest has `image_prompt`

MAX_SIZE = 2**16  # of anything that the manifest counts: what is beyond is damaged or hostile
MAX_BYTES = 2**50  # of what a graph says that it needs
# A plain name: it cannot leave the folder, on any system, and is no device on Windows.
FILE_NAME = re.compile(
    r"(?!(?i:CON|PRN|AUX|NUL|COM[0-9]|LPT[0-9])(?:\.|$))[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
)


@dataclass(frozen=True)
class Latent:
    """What the UNet denoises: [channels, size, size]."""

    channels: int
    size: int

    def __post_init__(self) -> None:
        _positive(channels=self.channels, size=self.size)


@dataclass(frozen=True)
class Betas:
    """The noise schedule that the base model was trained with."""

    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"]
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _positive(steps=self.steps)
        if not 0 < self.start < self.end < 1:
            raise ValueError(f"start is {self.start}, end {self.end}; it must be 0 < start < end < 1")


@dataclass(frozen=True)
class Defaults:
    """What `generate` uses where it is told nothing."""

    solver: str
    steps: int
    guidance_scale: float  # s = w + 1
    kappa: float  # 0 to 2

    def __post_init__(self) -> None:
        _positive(steps=self.steps)
        if not 0 <= self.kappa <= 2:
            raise ValueError(f"kappa is {self.kappa}; it must be from 0 to 2")


@dataclass(frozen=True)
class Graph:
    """One ONNX file, its external data if it has any, and its tensors."""

    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    data_file: str | None = None
    data_sha256: str | None = None
    weight_bytes: int = 0  # of the weights once loaded, in the graph's arithmetic; 0: unknown
    row_bytes: int = 0  # peak of what one row (or image, or prompt) needs beside them; 0: unknown
    weights: tuple[TensorSpec, ...] = ()  # constants that a refit replaces

    def __post_init__(self) -> None:
        for name, count in (("weight_bytes", self.weight_bytes), ("row_bytes", self.row_bytes)):
            if not 0 <= count <= MAX_BYTES:
                raise ValueError(f"{name} is {str(count)[:20]}; it must be from 0 to {MAX_BYTES}")
        if (self.data_file is None) != (self.data_sha256 is None):
            raise ValueError("data_file and data_sha256 come together or not at all")
        for name, _ in self.files():
            if not FILE_NAME.fullmatch(name):
                why = "it must be letters, digits, '_', '-' and '.', with no folder and no device of Windows"
                raise ValueError(f"the file name {name[:60]!r} is refused; {why}")
        for _, sha256 in self.files():
            check_sha256(sha256=sha256)
        for spec in (*self.inputs, *self.outputs, *self.weights):
            if not all(isinstance(size, str) or 1 <= size <= MAX_WEIGHTS for size in spec.shape):
                why = f"a fixed size must be from 1 to {MAX_WEIGHTS}"
                raise ValueError(f"{spec.name[:60]!r} has shape {str(list(spec.shape))[:60]}; {why}")

    @property
    def adapt(self) -> str:
        """How its LoRA enters it: by "refit" of constants, or as "inputs"."""
        return "refit" if self.weights else "inputs"

    def takes(self, name: str) -> bool:
        """Whether it has an input of that name."""
        return any(spec.name == name for spec in self.inputs)

    def gives(self, name: str) -> bool:
        """Whether it has an output of that name."""
        return any(spec.name == name for spec in self.outputs)

    def files(self) -> list[tuple[str, str]]:
        """(file name, sha256) of each file."""
        found = [(self.file, self.sha256)]
        if self.data_file is not None and self.data_sha256 is not None:
            found.append((self.data_file, self.data_sha256))
        return found


@dataclass(frozen=True)
class LoraSection:
    """The LoRA layout as JSON holds it."""

    rank: int
    sites: tuple[Site, ...]
    hash: str

    def __post_init__(self) -> None:
        if self.layout.hash != self.hash:
            raise ValueError(f"hash is {self.hash[:12]}, but rank and sites give {self.layout.hash[:12]}")

    @functools.cached_property
    def layout(self) -> LoraLayout:
        """The same, ready to pack and unpack."""
        return LoraLayout(self.sites, self.rank)

    @classmethod
    def of(cls, layout: LoraLayout) -> LoraSection:
        """What the manifest says of `layout`."""
        return cls(layout.rank, layout.sites, layout.hash)


@dataclass(frozen=True)
class Preprocess:
    """How a photo becomes the image encoder's pixels [3, size, size]: (value in [0, 1] - mean) / std."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: Literal["bicubic"]
    crop: Literal["pad", "center"]

    def __post_init__(self) -> None:
        _positive(size=self.size)
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; each must be above 0")


@dataclass(frozen=True)
class Prompts:
    """Rules of prompts: `placeholder` is what people write, `token` what the text encoder reads instead."""

    placeholder: str
    token: str
    max_tokens: int
    default_class: str
    nouns: tuple[str, ...]
    pad: int | None = None  # what follows the end token in the ids; None: the end token again
    pad_2: int | None = None  # the same for a second text encoder, which there is if this is said
    zero_empty: bool = False  # an empty text, if it is no negative prompt, is all zeros and is not encoded

    def __post_init__(self) -> None:
        _positive(max_tokens=self.max_tokens)
        for name, pad in (("pad", self.pad), ("pad_2", self.pad_2)):
            if pad is not None and not 0 <= pad < 2**31:
                raise ValueError(f"{name} is {str(pad)[:20]}; a token id is from 0 to {2**31 - 1}")
        if not (self.placeholder and self.token and self.default_class):
            raise ValueError("placeholder, token and default_class must not be empty")


@dataclass(frozen=True)
class ImagePrompt:
    """Image tokens of the open category: [tokens, width] per subject, beside the text of its rows."""

    tokens: int
    width: int
    scale: float  # where `generate` is told nothing; 0 is the plain UNet

    def __post_init__(self) -> None:
        _positive(tokens=self.tokens, width=self.width)
        if not 0 <= self.scale <= MAX_IMAGE_SCALE:
            raise ValueError(f"scale is {self.scale}; it must be from 0 to {MAX_IMAGE_SCALE}")


@dataclass(frozen=True)
class Hashes:
    """sha256 (hex) of the weights that the bundle was exported from."""

    base_model: str
    hypernet: str

    def __post_init__(self) -> None:
        check_sha256(base_model=self.base_model, hypernet=self.hypernet)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of `bundle.json`."""

    format: int
    family: str
    name: str
    created_by: str
    image_size: int  # pixels
    latent: Latent
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    betas: Betas
    defaults: Defaults
    graphs: Mapping[str, Graph]
    lora: LoraSection
    adapt: Literal["inputs", "refit"]
    preprocess: Preprocess
    prompts: Prompts
    tokenizer_sha256: str
    hashes: Hashes
    precision: Literal["fp32", "fp16", "bf16"]  # of the arithmetic
    storage: Literal["fp32", "fp16", "bf16", "int8"]  # of the weights in the files
    parity: Mapping[str, float]  # rung of the ladder -> error measured at export
    timestep_spacing: Literal["leading", "trailing"] = "leading"  # trailing: models of few steps
    image_prompt: ImagePrompt | None = None  # of the open category

    def __post_init__(self) -> None:
        _positive(image_size=self.image_size)
        check_sha256(tokenizer_sha256=self.tokenizer_sha256)
        wanted = self.graph_names
        if set(self.graphs) != set(wanted):
            raise ValueError(f"graphs has {', '.join(sorted(self.graphs))}; it must have {', '.join(wanted)}")
        self._check_lora("lora_q", "denoiser", by_refit=self.adapt == "refit")
        self._check_lora("lora_kv", "context", by_refit=False)
        for name, graph in self.graphs.items():
            if graph.weights and (name, self.adapt) != ("denoiser", "refit"):
                raise ValueError(f"graphs.{name} must not have weights: only denoiser may, if adapt is refit")
        self._check_inputs()

    def _check_lora(self, vector: str, name: str, by_refit: bool) -> None:
        """A graph takes its part of the LoRA as the layout has it: as one input, or as constants."""
        graph, size = self.graphs[name], self.layout.size(vector)
        shapes = [spec.shape[1:] for spec in graph.inputs if spec.name == vector]
        if not by_refit and shapes != [(size,)]:
            raise ValueError(f"graphs.{name} must take {vector} of {size}, the size that lora gives")
        if by_refit and shapes:
            raise ValueError(f"graphs.{name} must not take {vector}: adapt is refit")
        if by_refit and graph.weights != (wanted := self.layout.constants(vector)):
            pairs = itertools.zip_longest(graph.weights, wanted)
            k, one, other = next((k, *pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
            why = f"by lora it must be {spec_text(other)}"
            raise ValueError(f"graphs.{name}.weights[{k}] is {spec_text(one)}; {why}")

    def _check_inputs(self) -> None:
        """The inputs that not every bundle has are there together with what feeds them."""
        text, context = self.graphs["text_encoder"], self.graphs["context"]
        image = "image_prompt says so" if self.image_prompt else "there is no image_prompt"
        pad = f"prompts.pad_2 is {self.prompts.pad_2}"
        added = f"graphs.context gives {'an' if context.gives('added') else 'no'} output of that name"
        for graph, name, wanted, why in (
            ("text_encoder", "input_ids_2", self.prompts.pad_2 is not None, pad),
            ("context", "image_tokens", self.image_prompt is not None, image),
            ("context", "image_scale", self.image_prompt is not None, image),
            ("denoiser", "added", context.gives("added"), added),
        ):
            if self.graphs[graph].takes(name) != wanted:
                must = "must" if wanted else "must not"
                raise ValueError(f"graphs.{graph} {must} take {name}: {why}")
        if context.takes("pooled") and not text.gives("pooled"):
            raise ValueError("graphs.context takes pooled, which graphs.text_encoder does not give")

    @property
    def token_shape(self) -> tuple[int, int] | None:
        """(tokens, width) of a subject's image tokens; None outside the open category."""
        return (self.image_prompt.tokens, self.image_prompt.width) if self.image_prompt else None

    @property
    def graph_names(self) -> tuple[str, ...]:
        """The graphs of this bundle, in the order in which they first run."""
        return GRAPHS if self.image_prompt is None else (*GRAPHS[:2], IMAGE_PROMPT, *GRAPHS[2:])

    @property
    def layout(self) -> LoraLayout:
        """The LoRA layout: order and shapes of all factors."""
        return self.lora.layout


def spec_text(spec: TensorSpec | None) -> str:
    """A weight for a message; None is one that is not there."""
    return f"{spec.name[:100]} {list(spec.shape)} {spec.dtype[:20]}" if spec else "none"


def _positive(**values: int) -> None:
    for name, value in values.items():
        if not 1 <= value <= MAX_SIZE:
            raise ValueError(f"{name} is {str(value)[:20]}; it must be at least 1 and at most {MAX_SIZE}")
