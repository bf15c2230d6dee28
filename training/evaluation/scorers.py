"""Scores pictures beside real photos with networks: CLIP, DINO, face recognition.

    clip_i     mean cosine of a picture with all real photos of its subject, CLIP image features (ViT-B/32)
    clip_t     cosine of a picture with its prompt without [V], CLIP
    dino       as clip_i, with the CLS output of DINO ViT-S/16
    face_rec   as clip_i, with InceptionResnetV1 (VGGFace2) on the face that MTCNN finds; None without a face
    face_rec_zero   as face_rec, but 0 without a face
    face_detected   1 if a face is found, otherwise 0

The scores follow PatchDPO's evaluator, which probably made the paper's rows: pictures are resized (bicubic),
cropped to the middle and normalised as each network was trained. Weights come from a folder or the hub, as
safetensors. A scorer without weights raises `ScorerUnavailable`; it never gives a score of zero.
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
from hyperrt.photos.srgb import Picture
from hyperrt.plans.private_folder import xdg_folder
from hyperrt.training.evaluation import scores
from hyperrt.training.evaluation.protocols import EvaluationSubject
from hyperrt.training.evaluation.scores import Score
from hyperrt.training.model.encode import CLIP_MEAN, CLIP_STD
from hyperrt.training.model.weight_hash import hash_of

Columns = Mapping[str, Sequence[Score]]  # name of a score -> its value for each picture

BATCH = 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_RESIZE = 256 / 224  # shorter side before the crop, over the crop
PUBLISHED = {"CLIP": (768, 32, 224), "DINO": (384, 16, 224)}  # ViT-B/32, ViT-S/16: width, patch, pixels
FACE_SIZE, FACE_WEIGHTS = 160, "20180402-114759-vggface2.pt"


class ScorerUnavailable(Exception):
    """A scorer cannot run here; the text says why."""


class Scorer(Protocol):
    """Scores pictures of a subject.

    Attributes:
        about: its model and weights, for the report, as JSON values.
    """

    about: dict[str, Any]

    def score(
        self,
        subject: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        """Scores pictures beside the subject's photos; `numbers` are those of the prompts."""

    def real(self, subject: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        """Scores the subject's photos: the ceiling for pictures."""


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
        subject: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        features = self.features(pictures)
        prompts = subject.pack.plain(subject.noun)
        unique = sorted(set(numbers))
        text = dict(zip(unique, self.text_features([prompts[k] for k in unique]), strict=True))
        return {
            "clip_i": scores.mean_cosines(features, self.features(photos)),
            "clip_t": [
                float(feature @ text[number]) for feature, number in zip(features, numbers, strict=True)
            ],
        }

    def real(self, subject: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        return _with_and_without_self("clip_i", self.features(photos))

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Image features [n, F] of unit length."""

        def run(pixels: Tensor) -> Tensor:
            return self.model.get_image_features(pixel_values=pixels).pooler_output

        return _in_batches(run, pictures, self.size, self.size, CLIP_MEAN, CLIP_STD, self.model.device)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Text features [n, F] of unit length."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.model.device)
        return scores.unit(self.model.get_text_features(**tokens).pooler_output.float().cpu().numpy())


class DinoScorer:
    """DINO: the CLS token after the last norm."""

    def __init__(self, source: str, device: torch.device, offline: bool = False) -> None:
        from transformers import ViTModel

        self.model = _pretrained(ViTModel, source, offline, add_pooling_layer=False).to(device)
        self.size = self.model.config.image_size
        self.resize = round(DINO_RESIZE * self.size)
        self.about = _about("DINO", source, self.model, self.model.config, self.resize)

    def score(
        self,
        subject: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        return {"dino": scores.mean_cosines(self.features(pictures), self.features(photos))}

    def real(self, subject: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        return _with_and_without_self("dino", self.features(photos))

    @torch.no_grad()
    def features(self, pictures: Sequence[Picture]) -> np.ndarray:
        """Image features [n, F] of unit length."""

        def run(pixels: Tensor) -> Tensor:
            return self.model(pixel_values=pixels).last_hidden_state[:, 0]

        return _in_batches(
            run, pictures, self.resize, self.size, IMAGENET_MEAN, IMAGENET_STD, self.model.device
        )


class FaceScorer:
    """Face recognition by facenet-pytorch, which is not a dependency of the project."""

    def __init__(self, device: torch.device, offline: bool = False) -> None:
        try:
            facenet = importlib.import_module("facenet_pytorch")
        except ImportError as error:
            # Its metadata requires a PyTorch that is too old for this project.
            raise ScorerUnavailable(
                f"{error}; to install it: pip install --no-deps facenet-pytorch"
            ) from error
        weights = _torch_home() / "checkpoints" / FACE_WEIGHTS
        if offline and not weights.is_file():
            raise ScorerUnavailable(
                f"{FACE_WEIGHTS} is not in {weights.parent}, and --offline forbids a download"
            )
        try:
            self.detector = facenet.MTCNN(image_size=FACE_SIZE, device=device)
            self.model = facenet.InceptionResnetV1(pretrained="vggface2").eval().to(device)
        except Exception as error:  # a failed download may raise anything
            raise ScorerUnavailable(f"facenet-pytorch has no weights: {_first_line(error)}") from error
        self.device = device
        self.about = {"model": "InceptionResnetV1, VGGFace2; MTCNN", "sha256": hash_of(self.model)[:16]}

    def score(
        self,
        subject: EvaluationSubject,
        photos: Sequence[Picture],
        pictures: Sequence[Picture],
        numbers: Sequence[int],
    ) -> Columns:
        references = self._features(photos)
        features = [self.feature(picture) for picture in pictures]
        detected = [float(feature is not None) for feature in features]
        if not references:
            missing = [None] * len(features)
            return {"face_rec": missing, "face_rec_zero": missing, "face_detected": detected}
        stacked = np.stack(references)
        cosines = [
            None if feature is None else scores.mean_cosines(feature[None], stacked)[0]
            for feature in features
        ]
        return {
            "face_rec": cosines,
            "face_rec_zero": [0.0 if value is None else value for value in cosines],
            "face_detected": detected,
        }

    def real(self, subject: EvaluationSubject, photos: Sequence[Picture]) -> dict[str, Score]:
        features = self._features(photos)
        return {
            "face_detected": len(features) / len(photos),
            **(_with_and_without_self("face_rec", np.stack(features)) if features else {}),
        }

    def _features(self, photos: Sequence[Picture]) -> list[np.ndarray]:
        """The features of the photos that show a face."""
        return [feature for photo in photos if (feature := self.feature(photo)) is not None]

    @torch.no_grad()
    def feature(self, picture: Picture) -> np.ndarray | None:
        """The feature [512] of the face, of unit length; None without a face."""
        face = self.detector(Image.fromarray(picture))
        if face is None:
            return None
        return scores.unit(self.model(face[None].to(self.device)).cpu().numpy())[0]


def prepare(
    pictures: Sequence[Picture], resize: int, crop: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Resizes the shorter side to `resize` (bicubic), crops the middle and normalises: [n, 3, crop, crop].

    The same as torchvision's Resize, CenterCrop, ToTensor and Normalize on PIL images.
    """
    pixels = torch.empty(
        (len(pictures), 3, crop, crop)
    )  # aligned memory, so that the last bits are always the same
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


def _with_and_without_self(key: str, features: np.ndarray) -> dict[str, Score]:
    return {
        key: scores.among_themselves(features, with_self=False),
        f"{key}_with_self": scores.among_themselves(features, with_self=True),
    }


def _pretrained(kind: Any, source: str, offline: bool, **options: Any) -> Any:
    """Loads a network with all its weights, frozen, fp32.

    Raises:
        ScorerUnavailable: the hub cannot be reached, or has no safetensors of it.
        NotFound, IntegrityError: a folder does not exist, or lacks weights.
    """
    disable_progress_bar()
    model, loading = _from(
        kind, source, offline, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options
    )
    if lacking := sorted(loading["missing_keys"]):
        # transformers would fill them with random numbers.
        why = f"{len(lacking)} of its weights are missing, the first is {lacking[0]}"
        raise IntegrityError(f"{source} is not a {kind.__name__}", why, "name a folder of the right model")
    for tensor in (*model.parameters(), *model.buffers()):
        # A mapped file is aligned differently, which changes the last bits.
        tensor.data = tensor.data.clone()
    return model.eval().requires_grad_(False)


def _from(kind: Any, source: str, offline: bool, **options: Any) -> Any:
    """Calls `from_pretrained` with a folder, or OWNER/NAME[@REVISION] on the hub; errors as `_pretrained`."""
    folder = Path(source)
    if folder.is_dir():
        try:
            return kind.from_pretrained(folder, local_files_only=True, **options)
        except Exception as error:  # a damaged file may raise anything
            what = f"{source} cannot be read as a {kind.__name__}"
            raise IntegrityError(what, _first_line(error), "copy it again") from error
    name, _, revision = source.partition("@")
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise NotFound(
            f"there is no folder {source}", "it is not OWNER/NAME on the hub either", "check the name"
        )
    try:
        return kind.from_pretrained(name, revision=revision or "main", local_files_only=offline, **options)
    except Exception as error:
        raise ScorerUnavailable(f"{source} could not be loaded from the hub: {_first_line(error)}") from error


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
    """The folder of facenet-pytorch's weights."""
    return Path(os.environ.get("TORCH_HOME") or xdg_folder("cache") / "torch").expanduser()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
