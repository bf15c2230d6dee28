"""Model families: what `hyperrt export --model NAME` makes of a base model and a hypernetwork.

A family knows how to load its parts and what the runtime is told about them; the graphs are the same for all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from export.errors import ExportError
from hyperrt.bundle import Betas, Defaults, Preprocess, Prompts
from hyperrt.errors import BadInput, HyperRTError, IntegrityError, NotFound, UsageError
from hyperrt.solvers import BETA_SCHEDULES
from training import base as tiny
from training import checkpoint, clip_tokenizer, lora_layers, scenes
from training.base import Base
from training.config import DecoderConfig
from training.hypernet import WeightDecoder

RANDOM_RANK = 4
LICENSE = """\
Weights, tokenizer and graphs of this bundle were made by HyperRT (Apache License 2.0) from pictures that
HyperRT itself draws (training/scenes.py). No other model, text or picture went into them.
"""


@dataclass(frozen=True, eq=False)
class Source:
    """What a bundle is made from, frozen and in eval mode, weights as they were trained.

    token:  stands for the subject in prompts.
    folder: of the base model; None where the weights are random.
    """

    base: Base
    decoder: WeightDecoder
    token: str
    folder: Path | None = None

    def modules(self) -> dict[str, nn.Module]:
        """Every module whose weights go into the bundle, by name."""
        base = self.base
        parts = {"unet": base.unet, "vae": base.vae, "text_encoder": base.text_encoder}
        return {**parts, "image_encoder": base.image_encoder, "weight_decoder": self.decoder}


@dataclass(frozen=True)
class Family:
    """One kind of base model.

    Attributes:
        load: (base folder, checkpoint of the hypernetwork) to what the bundle is made from; without a folder
            the base is where it was when the hypernetwork was trained.
        random: (seed) to the same with random weights, for tests and measurements.
        nouns: class nouns that the runtime recognises after the placeholder.
    """

    name: str
    load: Callable[[Path | None, Path], Source]
    random: Callable[[int], Source]
    defaults: Defaults
    default_class: str
    nouns: tuple[str, ...]
    license: str

    def prompts(self, source: Source) -> Prompts:
        """Prompt rules for the manifest."""
        return Prompts(
            placeholder="[V]",
            token=source.token,
            max_tokens=source.base.tokenizer.model_max_length,
            default_class=self.default_class,
            nouns=self.nouns,
        )


def get(name: str) -> Family:
    """The family of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in FAMILIES:
        raise UsageError(
            f"there is no model family {name!r}", f"there are {', '.join(FAMILIES)}", "choose one of these"
        )
    return FAMILIES[name]


def betas(source: Source) -> Betas:
    """The noise schedule for the manifest.

    Raises:
        ExportError: the runtime does not know it.
    """
    config = source.base.scheduler.config
    if config.beta_schedule not in BETA_SCHEDULES:
        why = f"its beta_schedule is {config.beta_schedule!r}"
        raise ExportError("the base model has an unknown noise schedule", why, "train it with scaled_linear")
    return Betas(config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps)


def preprocess(source: Source) -> Preprocess:
    """Photo preprocessing for the manifest: that of training/features.py."""
    half = (0.5, 0.5, 0.5)
    return Preprocess(source.base.image_encoder.config.image_size, half, half, "bicubic", "center")


def _load_tiny(folder: Path | None, hypernet: Path) -> Source:
    decoder, about = _hypernet(hypernet)
    folder = folder or _base_of(hypernet, about)
    try:
        base = tiny.load(folder)
    except OSError as error:
        do = "train one: python -m training.pretrain"
        raise NotFound(f"no base model can be read from {folder}", _why(error), do) from error
    except ValueError as error:
        raise IntegrityError(
            f"the base model {folder} is damaged", _why(error), "copy it again, or train it again"
        ) from error
    _check_fit(base, decoder, about["base_model"])
    return Source(base, decoder, about["token"], folder)


def _hypernet(path: Path) -> tuple[WeightDecoder, dict[str, str]]:
    """The decoder, and of its hypernet.json: token, base (a folder) and base_model (a hash).

    Raises:
        NotFound: there is none, or it cannot be opened.
        BadInput: it is another kind of file.
        IntegrityError: it is damaged.
    """
    if path.is_file() and path.suffix not in (".safetensors", ".json"):
        why = "it is hypernet.safetensors beside hypernet.json; pickles can run code and are not read"
        raise BadInput(f"{path} is no checkpoint of a hypernetwork", why, "name the run's folder")
    try:
        decoder, about = checkpoint.load_hypernet(path)
        entries = {"base": about["training"]["base"], **{key: about[key] for key in ("base_model", "token")}}
        return decoder, {key: str(value) for key, value in entries.items()}
    except OSError as error:
        do = "train one: python -m training.train"
        raise NotFound(f"no hypernetwork can be read from {path}", _why(error), do) from error
    except (HyperRTError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        why = f"hypernet.json lacks {error}" if isinstance(error, KeyError) else _why(error)
        raise IntegrityError(
            f"the hypernetwork {path} is damaged", why, "copy it again, or train it again"
        ) from error


def _base_of(hypernet: Path, about: dict[str, str]) -> Path:
    """The folder of the base model that the hypernetwork was trained on."""
    folder = Path(about["base"])
    if not folder.is_dir():
        why = f"{hypernet} was trained on {folder}, which is not there"
        raise NotFound("there is no base model", why, "say where it is: --base BASE")
    return folder


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or repr(error)).splitlines()[0]


def _check_fit(base: Base, decoder: WeightDecoder, trained_on: str) -> None:
    found = checkpoint.hash_of(base.unet)
    if found != trained_on:
        why = f"it was trained on {trained_on[:12]}, the base model is {found[:12]}"
        do = "give the base that it was trained on: --base BASE"
        raise ExportError("the hypernetwork is of another base model", why, do)
    what = "the hypernetwork does not fit the base model"
    if decoder.layout.hash != lora_layers.layout_of(base.unet, decoder.layout.rank).hash:
        raise ExportError(what, "their LoRA layouts differ", "train it again")
    width = base.image_encoder.config.hidden_size
    if decoder.feature_dim != width:
        why = f"it reads features of {decoder.feature_dim} numbers, the image encoder makes {width}"
        raise ExportError(what, why, "train it again")


def _random_tiny(seed: int) -> Source:
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer.build(Path(folder), tiny.MAX_TOKENS)
        base = Base(
            unet=tiny.tiny_unet(),
            vae=tiny.tiny_vae(),
            text_encoder=tiny.tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            image_encoder=tiny.tiny_image_encoder(),
            scheduler=tiny.tiny_scheduler(),
        )
        return random_source(base, RANDOM_RANK, DecoderConfig())


def random_source(base: Base, rank: int, config: DecoderConfig) -> Source:
    """`base` with a fresh weight decoder whose LoRA, unlike one at the start of training, is not zero."""
    decoder = WeightDecoder(
        lora_layers.layout_of(base.unet, rank), base.image_encoder.config.hidden_size, config
    )
    with torch.no_grad():
        for vector in decoder.offsets.values():
            vector.add_(torch.randn_like(vector), alpha=0.05)
    source = Source(base, decoder, scenes.TOKEN)
    for module in source.modules().values():
        module.eval().requires_grad_(False)
    return source


FAMILIES = {
    "tiny": Family(
        name="tiny",
        load=_load_tiny,
        random=_random_tiny,
        defaults=Defaults(solver="dpmpp_2m", steps=30, guidance_scale=2.5, kappa=1.0),
        default_class="toy",
        nouns=scenes.NOUNS,
        license=LICENSE,
    ),
}
