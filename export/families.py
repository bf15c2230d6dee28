"""Model families: what `hyperrt export --model NAME` makes of a base model and a hypernetwork.

A family knows what the runtime is told about its models, and their sizes where weights are random; the graphs
are the same for all, and follow the parts that there are: a second text encoder makes it an SDXL, an image
prompt an open category.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTokenizer

from hyperrt.bundle.bundle import Defaults, Prompts
from hyperrt.errors import BadInput, HyperRTError, IntegrityError, NotFound, UsageError
from hyperrt.export import architectures, loading, supported
from hyperrt.export.errors import ExportError
from hyperrt.export.loading import Found
from hyperrt.export.parts import Part, random_part
from hyperrt.export.source import Inputs, Source, sized, vae_factor
from hyperrt.training.data import clip_tokenizer, scenes
from hyperrt.training.messages import first_line
from hyperrt.training.model import base_model as tiny
from hyperrt.training.model import image_prompt, lora_layers, weight_hash
from hyperrt.training.model.decoder_config import FULL_CLOSED, FULL_OPEN, DecoderConfig
from hyperrt.training.model.hypernet import decoder_of
from hyperrt.training.run import checkpoint

RANDOM_RANK = 4  # of tiny
TOKEN = "sks"
NOUNS = (
    "man", "woman", "boy", "girl", "person", "face", "dog", "puppy", "cat", "kitten", "horse", "bird",
    "rabbit",
    "backpack", "bag", "bear", "boot", "bottle", "bowl", "can", "candle", "car", "chair", "clock", "cup",
    "glasses", "hat", "house", "jacket", "lamp", "monster", "mug", "robot", "shoe", "sneaker", "sunglasses",
    "teapot", "toy", "stuffed animal", "vase", "wolf",
)  # fmt: skip
LICENSE = """\
Weights, tokenizer and graphs of this bundle were made by HyperRT (Apache License 2.0) from pictures that
HyperRT itself draws (training/data/scenes.py). No other model, text or picture went into them.
"""
RANDOM_LICENSE = """\
The weights of this bundle are random numbers; it draws noise. Its graphs were made by HyperRT (Apache License
2.0) from the published configuration of the architecture.
"""
THEIR_LICENSE = """\
The weights of this bundle are those of the base model that it was exported from, under the terms of that
model; its folder had no LICENSE file to copy. Graphs were made by HyperRT (Apache License 2.0).
"""


OF_ANOTHER_VAE = """\
It is under the terms of the model that it is of; there was no LICENSE file beside it to copy.
"""


@dataclass(frozen=True)
class Family:
    """One kind of base model.

    Attributes:
        random: (seed) to a source with random weights, for tests and measurements.
        nouns: class nouns that the runtime recognises after the placeholder.
        half_hash: whether base models are told apart by their weights rounded to fp16.
        verify: how much of the parity ladder is climbed, see `verify.LEVELS`.
    """

    name: str
    random: Callable[[int], Source]
    defaults: Defaults
    default_class: str
    nouns: tuple[str, ...]
    license: str
    half_hash: bool
    verify: str

    def prompts(self, source: Source) -> Prompts:
        """Prompt rules for the manifest."""
        return Prompts(
            placeholder="[V]",
            token=source.token,
            max_tokens=source.max_tokens,
            default_class=self.default_class,
            nouns=self.nouns,
            pad=source.pad,
            pad_2=source.pad_2,
            zero_empty=source.zero_empty,
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


@contextlib.contextmanager
def opened(family: Family, inputs: Inputs) -> Iterator[Source]:
    """What the bundle is made from, for as long as its files are needed.

    Raises:
        UsageError: `inputs` contradict each other, or lack something.
        NotFound, BadInput, IntegrityError: a file is missing, of another kind, or damaged.
        ExportError: the parts do not fit each other, or the graphs cannot express them.
    """
    if inputs.random_weights is not None:
        for name in ("base", "vae", "hypernet", "image_encoder", "image_prompt", "like"):
            if getattr(inputs, name) is not None:
                option = f"--{name.replace('_', '-')}"
                why = "random weights are in place of everything that could be read"
                raise UsageError(f"{option} and --random-weights exclude each other", why, "leave one out")
        source = sized(family.random(inputs.random_weights), inputs.size)
        supported.check(source)
        yield source
        return
    if inputs.hypernet is None:
        why = "a bundle is made from a base model and the hypernetwork that was trained on it"
        raise UsageError("--hypernet is not given", why, "name the folder of its run with --hypernet")
    about = _about_hypernet(inputs.hypernet)
    base = str(inputs.base or _base_of(inputs.hypernet, about))
    elsewhere = [name for name in ("vae", "image_encoder") if getattr(inputs, name) is not None]
    found = loading.find(base, inputs.like, inputs.offline, elsewhere)
    source = sized(_load(family, found, inputs, about), inputs.size)
    supported.check(source)
    _check_fit(source, about, family.half_hash)
    _check_image_prompt(source, about)
    yield source


def _load(family: Family, found: Found, inputs: Inputs, about: Mapping[str, Any]) -> Source:
    folder = found.folder
    vae = None if inputs.vae is None else loading.find_vae(str(inputs.vae), folder, inputs.offline)
    parts = loading.parts_of(folder, inputs.image_encoder, found.file, vae)
    unet = parts["unet"].skeleton
    tokenizer = loading.tokenizer_of(folder / "tokenizer", parts["text_encoder"])
    parts["weight_decoder"] = _decoder_part(inputs.hypernet, about)
    if inputs.image_prompt is not None:
        path = inputs.image_prompt
        read = lambda: image_prompt.load(path, unet, torch.float16)  # noqa: E731
        loaded_sizes = read()  # the file is checked now; its sizes are what the skeleton is made of
        parts["image_prompt"] = Part("image_prompt", lambda: loaded_sizes, read)
    return Source(
        parts=parts,
        tokenizer=tokenizer,
        scheduler=loading.scheduler_of(folder, found.file),
        layout=about["layout"],
        token=about["token"],
        image_scale=about["image_scale"],
        image_size=unet.config.sample_size * vae_factor(parts["vae"]),
        # A single file is not under the licence of the model whose configuration it has.
        license=(family.license if found.file else _license_of(folder, family)) + _license_of_vae(vae),
        **(_sdxl_rules(folder, parts["text_encoder_2"], tokenizer) if "text_encoder_2" in parts else {}),
    )


def _sdxl_rules(folder: Path, text_encoder_2: Part, tokenizer: CLIPTokenizer) -> dict[str, Any]:
    index = loading.read_json(folder / "model_index.json")
    return {
        "tokenizer_2": loading.second_tokenizer_of(folder, text_encoder_2, tokenizer),
        "zero_empty": bool(index.get("force_zeros_for_empty_prompt", True)),  # diffusers' default
    }


def _license_of(folder: Path, family: Family) -> str:
    for path in sorted(folder.glob("LICENSE*")):
        return path.read_text(encoding="utf-8", errors="replace")
    return family.license


def _license_of_vae(vae: Found | None) -> str:
    """What is added for a VAE that is not the base model's: its licence, if it came with one."""
    if vae is None:
        return ""
    model = vae.folder.parent  # a base model's, if it has an index
    folders = [vae.folder, model] if (model / "model_index.json").is_file() else [vae.folder]
    paths = [] if vae.file else [path for folder in folders for path in sorted(folder.glob("LICENSE*"))]
    text = paths[0].read_text(encoding="utf-8", errors="replace") if paths else OF_ANOTHER_VAE
    return f"\n---- the VAE, which is not the base model's ----\n\n{text}"


def _about_hypernet(path: Path) -> dict[str, Any]:
    """Of hypernet.json: token, base (folder), base_model (hash), feature_dim, layout, decoder (its shape),
    image_prompt (file that it was trained with, or None), its prompt_hash ("": not known) and image_scale.

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
        training = about["training"]
        return {
            "base": str(training["base"]),
            "base_model": str(about["base_model"]),
            "token": str(about["token"]),
            "layout": decoder.layout,
            "feature_dim": decoder.feature_dim,
            "decoder": decoder.config,
            # Runs of before there were image prompts say nothing of them.
            "image_prompt": training.get("image_prompt"),
            "prompt_hash": str(about.get("image_prompt", "")),
            "image_scale": float(training.get("image_scale", image_prompt.SCALE)),
        }
    except OSError as error:
        do = "train one with hyperrt train"
        raise NotFound(f"no hypernetwork can be read from {path}", first_line(error), do) from error
    except (HyperRTError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        why = f"hypernet.json lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise IntegrityError(
            f"the hypernetwork {path} is damaged", why, "copy it again, or train it again"
        ) from error


def _decoder_part(path: Path, about: Mapping[str, Any]) -> Part:
    return Part(
        "weight_decoder",
        lambda: decoder_of(about["layout"], about["feature_dim"], about["decoder"]),
        lambda: checkpoint.load_hypernet(path)[0],
    )


def _base_of(hypernet: Path, about: Mapping[str, Any]) -> Path:
    """The folder of the base model that the hypernetwork was trained on."""
    folder = Path(about["base"])
    if not folder.is_dir():
        why = f"{hypernet} was trained on {folder}, which is not there"
        raise NotFound("there is no base model", why, "say where it is: --base BASE")
    return folder


def _check_fit(source: Source, about: Mapping[str, Any], half_hash: bool) -> None:
    trained_on, unet = about["base_model"], source.parts["unet"]
    what = "the hypernetwork does not fit the base model"
    if source.layout.hash != lora_layers.layout_of(unet.skeleton, source.layout.rank).hash:
        raise ExportError(what, "their LoRA layouts differ", "train it again")
    width = source.config("image_encoder").hidden_size
    if about["feature_dim"] != width:
        why = f"it reads features of {about['feature_dim']} numbers, the image encoder makes {width}"
        raise ExportError(what, why, "train it again")
    found = unet.hash(half_hash)
    if found != trained_on:
        why = f"it was trained on {trained_on[:12]}, the base model is {found[:12]}"
        do = "give the base that it was trained on: --base BASE"
        raise ExportError("the hypernetwork is of another base model", why, do)


def _check_image_prompt(source: Source, about: Mapping[str, Any]) -> None:
    given, trained_with = "image_prompt" in source.parts, about["image_prompt"]
    if trained_with is not None and not given:
        why = f"it was trained with {trained_with}, and draws less of the subject alone"
        raise ExportError("the hypernetwork lacks its image prompt", why, "add --image-prompt FILE")
    if given and trained_with is None:
        why = "what the image prompt adds to its LoRA was not there in training"
        do = "leave --image-prompt out, or train with it"
        raise ExportError("the hypernetwork was trained without an image prompt", why, do)
    if given and about["prompt_hash"]:
        found = weight_hash.prompt_hash(source.parts["image_prompt"].read())
        if found != about["prompt_hash"]:
            why = f"it was trained with {about['prompt_hash'][:12]} ({trained_with}), this is {found[:12]}"
            do = "give --image-prompt the file that it was trained with"
            raise ExportError("the hypernetwork is of another image prompt", why, do)


def _random_tiny(seed: int) -> Source:
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer.build(Path(folder), tiny.MAX_TOKENS)
        modules = {
            "unet": tiny.tiny_unet(),
            "vae": tiny.tiny_vae(),
            "text_encoder": tiny.tiny_text_encoder(tokenizer),
            "image_encoder": tiny.tiny_image_encoder(),
        }
        scheduler = dict(tiny.tiny_scheduler().config)
    parts = {name: Part.of(name, module) for name, module in modules.items()}
    return _random(parts, tokenizer, scheduler, seed, RANDOM_RANK, DecoderConfig(), tiny.IMAGE_SIZE, LICENSE)


def _random_sd15(seed: int) -> Source:
    """SD1.5 of the closed category: rank 3, HyperDreamBooth's decoder."""
    parts = {name: random_part(name, build, seed) for name, build in architectures.SD15.items()}
    return _random(
        parts, _some_tokenizer(), architectures.SCHEDULER, seed, 3, FULL_CLOSED, 512, RANDOM_LICENSE
    )


def _random_sdxl(seed: int) -> Source:
    """SDXL of the open category: rank 2, the resampler decoder, an image prompt."""
    parts = {name: random_part(name, build, seed) for name, build in architectures.SDXL.items()}
    unet = parts["unet"].skeleton
    parts["image_prompt"] = random_part("image_prompt", lambda: image_prompt.ImagePrompt(unet), seed)
    source = _random(
        parts, _some_tokenizer(), architectures.SCHEDULER, seed, 2, FULL_OPEN, 1024, RANDOM_LICENSE
    )
    tokenizer_2 = clip_tokenizer.padded(source.tokenizer, "!")
    return dataclasses.replace(source, tokenizer_2=tokenizer_2, zero_empty=True)


def _random(
    parts: dict[str, Part],
    tokenizer: CLIPTokenizer,
    scheduler: Mapping[str, Any],
    seed: int,
    rank: int,
    config: DecoderConfig,
    image_size: int,
    license: str,
) -> Source:
    """These parts with a fresh weight decoder whose LoRA, unlike that of a fresh one, is not zero."""
    layout = lora_layers.layout_of(parts["unet"].skeleton, rank)
    width = parts["image_encoder"].skeleton.config.hidden_size

    def build() -> Any:
        return decoder_of(layout, width, config)

    def read() -> Any:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            decoder = build()
            for vector in decoder.offsets.values():
                vector.add_(torch.randn_like(vector), alpha=0.05)
            return decoder

    parts["weight_decoder"] = Part("weight_decoder", build, read, drawn_from=f"{seed}/weight_decoder")
    return Source(
        parts=parts, tokenizer=tokenizer, scheduler=scheduler, layout=layout, token=TOKEN,
        image_size=image_size, license=license,
    )  # fmt: skip


def _some_tokenizer() -> CLIPTokenizer:
    """CLIP's rules with a small vocabulary: random weights give no word a meaning."""
    with tempfile.TemporaryDirectory() as folder:
        return clip_tokenizer.build(Path(folder), architectures.MAX_TOKENS)


FAMILIES = {
    "tiny": Family(
        name="tiny",
        random=_random_tiny,
        defaults=Defaults(solver="dpmpp_2m", steps=30, guidance_scale=2.5, kappa=1.0),
        default_class="toy",
        nouns=scenes.NOUNS,
        license=LICENSE,
        half_hash=False,
        verify="full",
    ),
    "sd15": Family(
        name="sd15",
        random=_random_sd15,
        defaults=Defaults(solver="ddim", steps=30, guidance_scale=3.75, kappa=1.0),
        default_class="object",
        nouns=NOUNS,
        license=THEIR_LICENSE,
        half_hash=True,
        verify="graphs",
    ),
    "sdxl": Family(
        name="sdxl",
        random=_random_sdxl,
        defaults=Defaults(solver="euler", steps=30, guidance_scale=3.5, kappa=1.0),
        default_class="object",
        nouns=NOUNS,
        license=THEIR_LICENSE,
        half_hash=True,
        verify="graphs",
    ),
}
