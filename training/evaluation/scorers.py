"""Networks that score pictures beside real photos: CLIP, DINO, face recognition.

    clip_i     mean cosine of a picture with all real photos of its subject, CLIP image features (ViT-B/32)
    clip_t     cosine of a picture with its prompt without [V], CLIP
    dino       as clip_i, with the CLS output of DINO ViT-S/16
    face_rec   as clip_i, with InceptionResnetV1 (VGGFace2) on the face that MTCNN finds; without a face: none
    face_rec_zero, face_detected   the same with 0 where no face is found; the share where one is

As PatchDPO's evaluator has them, which the paper's rows are likely of: pictures are resized (bicubic),
cropped to the middle and normalised as each network was trained. Weights come from a folder or the hub, as
safetensors; what cannot be had is `ScorerUnavailable`, never a score of zero.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from hyperrt.errors import IntegrityError, NotFound
from hyperrt.training.data.features import CLIP_MEAN, CLIP_STD
from hyperrt.training.evaluation import scores
from hyperrt.training.evaluation.protocols import EvaluationSubject
from hyperrt.training.evaluation.scores import Score
from hyperrt.training.run.checkpoint import hash_of

Picture = np.ndarray  # [H, W, 3] uint8
Columns = Mapping[str, Sequence[Score]]  # score -> one value of each picture

BATCH = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_RESIZE = 256 / 224  # of the crop
PUBLISHED = {"CLIP": (768, 32, 224), "DINO": (384, 16, 224)}  # ViT-B/32, ViT-S/16: width, patch, pixels
FACE_SIZE, FACE_WEIGHTS = 160, "20180402-114759-vggface2.pt"


class ScorerUnavailable(Exception):
    """A scorer cannot be had here; the text says why."""


class Scorer(Protocol):
    """What an evaluation asks of a scorer.

    Attributes:
        about: what it is, for the report, as JSON values.
    """

    about: dict[str, Any]

    def score(
        self,
        entry: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        """Scores of pictures of a subject, beside its real photos; `numbers`: of their prompts."""

    def real(self, entry: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        """What the scorer says of the subject's real photos, which is what pictures could reach."""


class ClipScorer:
    """CLIP-I and CLIP-T."""

    def __init__(self, source: str, device: torch.device, offline: bool = False) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.model = _pretrained(CLIPModel, source, offline).to(device)
        self.tokenizer = _from(CLIPTokenizer, source, offline)
        vision = self.model.config.vision_config
        self.size = vision.image_size
        self.about = _about("CLIP", source, self.model, vision, self.size)

    def score(
        self,
        entry: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        made = self.features(pictures)
        plain = entry.pack.plain(entry.noun)
        different = sorted(set(numbers))
        text = dict(zip(different, self.text_features([plain[k] for k in different]), strict=True))
        return {
            "clip_i": scores.mean_cosines(made, self.features(photos)),
            "clip_t": [float(one @ text[number]) for one, number in zip(made, numbers, strict=True)],
        }

    def real(self, entry: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        return _both_ways("clip_i", self.features(photos))

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture]) -> np.ndarray:
        """[n, F] of unit length."""

        def run(pixels: Tensor) -> Tensor:
            return self.model.get_image_features(pixel_values=pixels).pooler_output

        return _in_batches(run, pictures, self.size, self.size, CLIP_MEAN, CLIP_STD, self.model.device)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """[n, F] of unit length."""
        most = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=most, return_tensors="pt"
        ).to(self.model.device)
        return scores.unit(self.model.get_text_features(**tokens).pooler_output.float().cpu().numpy())


class DinoScorer:
    """DINO: the CLS output behind the last norm."""

    def __init__(self, source: str, device: torch.device, offline: bool = False) -> None:
        from transformers import ViTModel

        self.model = _pretrained(ViTModel, source, offline, add_pooling_layer=False).to(device)
        self.size = self.model.config.image_size
        self.resize = round(DINO_RESIZE * self.size)
        self.about = _about("DINO", source, self.model, self.model.config, self.resize)

    def score(
        self,
        entry: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        return {"dino": scores.mean_cosines(self.features(pictures), self.features(photos))}

    def real(self, entry: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        return _both_ways("dino", self.features(photos))

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture]) -> np.ndarray:
        """[n, F] of unit length."""

        def run(pixels: Tensor) -> Tensor:
            return self.model(pixel_values=pixels).last_hidden_state[:, 0]

        return _in_batches(
            run, pictures, self.resize, self.size, IMAGENET_MEAN, IMAGENET_STD, self.model.device
        )


class FaceScorer:
    """Face recognition by facenet-pytorch, which the project does not depend on."""

    def __init__(self, device: torch.device, offline: bool = False) -> None:
        try:
            facenet = importlib.import_module("facenet_pytorch")
        except ImportError as error:
            # Its metadata asks for an old PyTorch, with which nothing here would work.
            raise ScorerUnavailable(
                f"{error}; to install it: pip install --no-deps facenet-pytorch"
            ) from error
        weights = _torch_home() / "checkpoints" / FACE_WEIGHTS
        if offline and not weights.is_file():
            raise ScorerUnavailable(
                f"{FACE_WEIGHTS} is not in {weights.parent}, and nothing is fetched offline"
            )
        try:
            self.detector = facenet.MTCNN(image_size=FACE_SIZE, device=device)
            self.model = facenet.InceptionResnetV1(pretrained="vggface2").eval().to(device)
        except Exception as error:  # a failed download is nearly any error
            raise ScorerUnavailable(f"facenet-pytorch has no weights: {_first_line(error)}") from error
        self.device = device
        self.about = {"model": "InceptionResnetV1, VGGFace2; MTCNN", "sha256": hash_of(self.model)[:16]}

    def score(
        self,
        entry: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        known = [found for photo in photos if (found := self.feature(photo)) is not None]
        made = [self.feature(picture) for picture in pictures]
        detected = [float(feature is not None) for feature in made]
        if not known:  # nobody to compare with
            nothing = [None] * len(made)
            return {"face_rec": nothing, "face_rec_zero": nothing, "face_detected": detected}
        references = np.stack(known)
        found = [None if one is None else scores.mean_cosines(one[None], references)[0] for one in made]
        return {
            "face_rec": found,
            "face_rec_zero": [0.0 if value is None else value for value in found],
            "face_detected": detected,
        }

    def real(self, entry: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        known = [found for photo in photos if (found := self.feature(photo)) is not None]
        return {
            "face_detected": len(known) / len(photos),
            **(_both_ways("face_rec", np.stack(known)) if known else {}),
        }

    @torch.no_grad()
    def feature(self, picture: Picture) -> np.ndarray | None:
        """[512] of unit length; None where no face is found."""
        face = self.detector(Image.fromarray(picture))
        if face is None:
            return None
        return scores.unit(self.model(face[None].to(self.device)).cpu().numpy())[0]


def prepare(
    pictures: Sequence[Picture], resize: int, crop: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Pictures to pixels [n, 3, crop, crop]: shorter side to `resize` (bicubic), middle cut out, normalised.

    As torchvision's Resize, CenterCrop, ToTensor and Normalize do it on PIL images.
    """
    pixels = torch.empty((len(pictures), 3, crop, crop))  # aligned, so that last bits are always the same
    average, spread = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    for row, picture in zip(pixels.numpy(), pictures, strict=True):
        height, width = picture.shape[:2]
        short = min(height, width)
        size = (int(resize * width / short), int(resize * height / short))
        small = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        left, top = (round((side - crop) / 2.0) for side in size)
        middle = np.asarray(small.crop((left, top, left + crop, top + crop)), np.float32) / 255
        row[:] = ((middle - average) / spread).transpose(2, 0, 1)
    return pixels


def _in_batches(
    run: Any,
    pictures: Sequence[Picture],
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> np.ndarray:
    parts = [
        run(prepare(pictures[k : k + BATCH], resize, crop, mean, std).to(device)).float().cpu().numpy()
        for k in range(0, len(pictures), BATCH)
    ]
    return scores.unit(np.concatenate(parts))


def _both_ways(key: str, features: np.ndarray) -> dict[str, Score]:
    return {
        key: scores.among_themselves(features, with_self=False),
        f"{key}_with_self": scores.among_themselves(features, with_self=True),
    }


def _pretrained(kind: Any, source: str, offline: bool, **options: Any) -> Any:
    """A network with all of its weights, frozen, fp32.

    Raises:
        ScorerUnavailable: the hub has it not, or not as safetensors, or cannot be reached.
        NotFound, IntegrityError: a folder that was named is not there, or lacks weights.
    """
    disable_progress_bar()
    model, loading = _from(
        kind, source, offline, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
    )
    if lacking := sorted(loading["missing_keys"]):
        # transformers would go on with random numbers in their place.
        why = f"{len(lacking)} of its weights are missing, the first is {lacking[0]}"
        raise IntegrityError(f"{source} is no {kind.__name__}", why, "name a folder of the right model")
    for tensor in (*model.parameters(), *model.buffers()):
        # What a file is mapped to is aligned otherwise, which alters last bits.
        tensor.data = tensor.data.clone()
    return model.eval().requires_grad_(False)


def _from(kind: Any, source: str, offline: bool, **options: Any) -> Any:
    """`from_pretrained` of a folder, or of NAME or NAME@REVISION on the hub; errors as `_pretrained`."""
    folder = Path(source)
    if folder.is_dir():
        try:
            return kind.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # a damaged file makes it raise nearly anything
            what = f"{source} cannot be read as a {kind.__name__}"
            raise IntegrityError(what, _first_line(error), "get it again") from error
    name, _, revision = source.partition("@")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise NotFound(f"there is no folder {source}", "nor is it OWNER/NAME on the hub", "check the name")
    try:
        return kind.from_pretrained(name, revision=revision or "main", local_files_only=offline, **options)
    except Exception as error:
        raise ScorerUnavailable(f"{source} could not be had from the hub: {_first_line(error)}") from error


def _about(model: str, source: str, network: torch.nn.Module, vision: Any, resize: int) -> dict[str, Any]:
    sizes = (vision.hidden_size, vision.patch_size, vision.image_size)
    return {
        "model": model,
        "source": Path(source).name if Path(source).is_dir() else source,  # no paths of this machine
        "sha256": hash_of(network)[:16],
        "pictures": f"shorter side to {resize} px, bicubic; the middle {vision.image_size} px",
        "width_patch_size": list(sizes),
        "as_published": sizes == PUBLISHED[model],
    }


def _torch_home() -> Path:
    """Where facenet-pytorch keeps its weights."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", Path(cache) / "torch")).expanduser()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
