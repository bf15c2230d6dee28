"""Reads the hypernetwork of a training run, and checks that it fits a base model and an image prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hyperrt.errors import BadInput, HyperRTError, IntegrityError, NotFound
from hyperrt.export.errors import ExportError
from hyperrt.export.parts import ModelPart
from hyperrt.export.source import Source
from hyperrt.lora.layout import LoraLayout
from hyperrt.training.messages import first_line
from hyperrt.training.model import image_prompt, lora_layers
from hyperrt.training.model.hypernet import decoder_of
from hyperrt.training.run import checkpoint
from hyperrt.training.run.config import DecoderConfig


@dataclass(frozen=True)
class Hypernetwork:
    """The content of hypernet.json.

    Attributes:
        path: the run's folder, or one of its two files.
        base: folder of the base model that it was trained on.
        base_hash: hash of that model's UNet.
        token: stands for the subject in prompts.
        layout: of the LoRA that it predicts.
        feature_dim: width of the image features that it reads.
        decoder: shape of the weight decoder.
        image_prompt: file of the image prompt that it was trained with, or None.
        prompt_hash: hash of that image prompt; "" in runs that did not record it.
        image_scale: weight of the image prompt in training.
    """

    path: Path
    base: Path
    base_hash: str
    token: str
    layout: LoraLayout
    feature_dim: int
    decoder: DecoderConfig
    image_prompt: str | None
    prompt_hash: str
    image_scale: float

    @property
    def part(self) -> ModelPart:
        """The weight decoder."""
        return ModelPart(
            "weight_decoder",
            lambda: decoder_of(self.layout, self.feature_dim, self.decoder),
            lambda: checkpoint.load_hypernet(self.path)[0],
        )


def read(path: Path) -> Hypernetwork:
    """Reads hypernet.json, and of the weights their names and shapes.

    Raises:
        NotFound: a file is missing or cannot be opened.
        BadInput: the path is another kind of file.
        IntegrityError: a file is damaged, or the two do not fit each other.
    """
    if path.is_file() and path.suffix not in (".safetensors", ".json"):
        why = (
            "a checkpoint is hypernet.safetensors beside hypernet.json; pickles can run code and are not read"
        )
        raise BadInput(f"{path} is not a checkpoint of a hypernetwork", why, "name the run's folder")
    try:
        decoder, about = checkpoint.load_hypernet(path, values=False)
        training = about["training"]
        return Hypernetwork(
            path=path,
            base=Path(training["base"]),
            base_hash=str(about["base_model"]),
            token=str(about["token"]),
            layout=decoder.layout,
            feature_dim=decoder.feature_dim,
            decoder=decoder.config,
            # The first runs recorded nothing about image prompts.
            image_prompt=training.get("image_prompt"),
            prompt_hash=str(about.get("image_prompt", "")),
            image_scale=float(training.get("image_scale", image_prompt.SCALE)),
        )
    except OSError as error:
        do = "train one with hyperrt train"
        raise NotFound(f"no hypernetwork can be read from {path}", first_line(error), do) from error
    except (HyperRTError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        why = f"hypernet.json lacks {error}" if isinstance(error, KeyError) else first_line(error)
        do = "copy it again, or train it again"
        raise IntegrityError(f"the hypernetwork {path} is damaged", why, do) from error


def check_base(hypernetwork: Hypernetwork, source: Source, half_hash: bool) -> None:
    """Checks that the hypernetwork was trained on this base model and image encoder.

    half_hash: as in `Family`.

    Raises:
        ExportError: it was not.
    """
    unet = source.parts["unet"]
    what = "the hypernetwork does not fit the base model"
    if hypernetwork.layout.hash != lora_layers.layout_of(unet.skeleton, hypernetwork.layout.rank).hash:
        raise ExportError(what, "their LoRA layouts differ", "train it again")
    width = source.config("image_encoder").hidden_size
    if hypernetwork.feature_dim != width:
        why = f"it reads features of {hypernetwork.feature_dim} numbers, the image encoder makes {width}"
        raise ExportError(what, why, "train it again")
    sha256 = unet.hash(half_hash)
    if sha256 != hypernetwork.base_hash:
        why = f"it was trained on {hypernetwork.base_hash[:12]}, the base model is {sha256[:12]}"
        do = "give the base model that it was trained on: --base BASE"
        raise ExportError("the hypernetwork is of another base model", why, do)


def check_image_prompt(hypernetwork: Hypernetwork, prompt: ModelPart | None) -> None:
    """Checks that the image prompt of the export is that of the training.

    Raises:
        ExportError: it is another one, or only one of the two has an image prompt.
    """
    name, sha256 = hypernetwork.image_prompt, hypernetwork.prompt_hash
    if prompt is None:
        if name is not None:
            why = f"it was trained with {name}, and draws less of the subject without it"
            raise ExportError("the hypernetwork lacks its image prompt", why, "add --image-prompt FILE")
        return
    if name is None:
        why = "the image prompt would add to a LoRA that was trained without it"
        do = "leave --image-prompt out, or train with it"
        raise ExportError("the hypernetwork was trained without an image prompt", why, do)
    if sha256 and sha256 != (given := prompt.hash(half=True)):
        why = f"it was trained with {sha256[:12]} ({name}), this is {given[:12]}"
        do = "give --image-prompt the file that it was trained with"
        raise ExportError("the hypernetwork is of another image prompt", why, do)
