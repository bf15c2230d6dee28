"""Scorers with small networks of random weights, compared with plain loops."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hyperrt.errors import IntegrityError, NotFound
from hyperrt.training.evaluation import scorers
from hyperrt.training.evaluation.prompt_packs import PACKS
from hyperrt.training.evaluation.protocols import EvaluationSubject
from hyperrt.training.evaluation.scorers import ClipScorer, DinoScorer, FaceScorer, ScorerUnavailable

CPU = torch.device("cpu")
SUBJECT = EvaluationSubject("can", "can", PACKS["dreambench-objects"])


def pictures(count: int, seed: int, size: tuple[int, int] = (48, 40)) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in coarse]


@pytest.fixture(scope="module")
def clip(networks):
    return ClipScorer(str(networks.clip), CPU)


@pytest.fixture(scope="module")
def dino(networks):
    return DinoScorer(str(networks.dino), CPU)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=-1).item()


@torch.no_grad()
def test_dino_is_the_mean_cosine_of_class_tokens(dino):
    drawn, photos = pictures(3, 0), pictures(2, 1)

    def token(picture):
        pixels = scorers.prepare([picture], 37, 32, scorers.IMAGENET_MEAN, scorers.IMAGENET_STD)
        return dino.model(pixel_values=pixels).last_hidden_state[0, 0]

    plain = [np.mean([cosine(token(one), token(photo)) for photo in photos]) for one in drawn]
    scored = dino.score(SUBJECT, photos, drawn, [0, 1, 2])["dino"]
    assert scored == pytest.approx(plain, abs=1e-6)
    assert np.ptp(scored) > 1e-3  # otherwise nothing was compared


@torch.no_grad()
def test_clip_i_and_clip_t_equal_those_of_a_plain_loop(clip):
    made, photos, numbers = pictures(4, 2), pictures(2, 3), [7, 0, 7, 24]

    def image(picture):
        pixels = scorers.prepare([picture], 32, 32, scorers.CLIP_MEAN, scorers.CLIP_STD)
        hidden = clip.model.vision_model(pixel_values=pixels).pooler_output
        return clip.model.visual_projection(hidden)[0]

    def text(number):
        template = SUBJECT.pack.templates[number]
        tokens = clip.tokenizer([template.replace("[V] {noun}", "can")], return_tensors="pt")
        return clip.model.text_projection(clip.model.text_model(**tokens).pooler_output)[0]

    found = clip.score(SUBJECT, photos, made, numbers)
    images = [np.mean([cosine(image(one), image(photo)) for photo in photos]) for one in made]
    assert found["clip_i"] == pytest.approx(images, abs=1e-6)
    texts = [cosine(image(one), text(number)) for one, number in zip(made, numbers, strict=True)]
    assert found["clip_t"] == pytest.approx(texts, abs=1e-5)  # padded and not
    assert np.ptp(found["clip_i"]) > 1e-3 and np.ptp(found["clip_t"]) > 1e-3


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_real_photos_are_scored_with_and_without_themselves(kind, request):
    scorer = request.getfixturevalue(kind)
    key = {"clip": "clip_i", "dino": "dino"}[kind]
    photos = pictures(3, 4)
    matrix = np.stack([scorer.score(SUBJECT, [one], photos, [0] * 3)[key] for one in photos])
    others = matrix[~np.eye(3, dtype=bool)].mean()
    real = scorer.real(SUBJECT, photos)
    assert real[key] == pytest.approx(others, abs=1e-6)
    assert real[f"{key}_with_self"] == pytest.approx(matrix.mean(), abs=1e-6)
    assert scorer.real(SUBJECT, photos[:1])[key] is None


def test_several_batches_give_the_same_scores_as_one(dino, monkeypatch):
    made, photos = pictures(5, 5), pictures(2, 6)
    whole = dino.score(SUBJECT, photos, made, [0] * 5)["dino"]
    monkeypatch.setattr(scorers, "BATCH", 2)
    assert dino.score(SUBJECT, photos, made, [0] * 5)["dino"] == pytest.approx(whole, abs=1e-6)


@pytest.mark.parametrize("size", [(40, 64), (64, 40), (33, 97)])
def test_pictures_are_resized_by_the_shorter_side_and_cropped_in_the_middle(size):
    (picture,) = pictures(1, 7, size)
    pixels = scorers.prepare([picture], 36, 32, (0.5, 0.25, 0.125), (0.5, 0.25, 2.0))[0].numpy()
    width, height = size
    scaled = (36, int(36 * height / width)) if width < height else (int(36 * width / height), 36)
    whole = np.asarray(Image.fromarray(picture).resize(scaled, Image.Resampling.BICUBIC)) / 255
    top, left = round((scaled[1] - 32) / 2), round((scaled[0] - 32) / 2)
    for channel, (mean, std) in enumerate([(0.5, 0.5), (0.25, 0.25), (0.125, 2.0)]):
        middle = whole[top : top + 32, left : left + 32, channel]
        assert np.allclose(pixels[channel], (middle - mean) / std, atol=1e-5)


def test_a_scorer_describes_its_weights_without_a_path(clip, dino, networks):
    for scorer in (clip, dino):
        assert len(scorer.about["sha256"]) == 16
        assert str(networks.clip.parent) not in json.dumps(scorer.about)
    assert clip.about["sha256"] != dino.about["sha256"]


def test_missing_weights_are_refused(networks, tmp_path):
    copy = shutil.copytree(networks.dino, tmp_path / "dino")
    tensors = load_file(copy / "model.safetensors")
    name = next(name for name in tensors if "dense.weight" in name or "mlp" in name)
    save_file({k: v for k, v in tensors.items() if k != name}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(IntegrityError, match="weights are missing"):
        DinoScorer(str(copy), CPU)
    with pytest.raises(IntegrityError):
        DinoScorer(str(networks.clip), CPU)
    (copy / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(IntegrityError, match="cannot be read"):
        DinoScorer(str(copy), CPU)


def test_a_pickle_is_refused(networks, tmp_path):
    copy = shutil.copytree(networks.dino, tmp_path / "dino")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match="safetensors"):
        DinoScorer(str(copy), CPU)


def test_a_missing_folder_is_an_error_and_an_unreachable_hub_makes_the_scorer_unavailable(tmp_path):
    with pytest.raises(NotFound, match="there is no folder"):
        ClipScorer(str(tmp_path / "clip"), CPU)
    with pytest.raises(NotFound, match="there is no folder"):
        ClipScorer("clip", CPU)
    with pytest.raises(ScorerUnavailable, match="could not be loaded from the hub"):
        ClipScorer("nobody/nothing@refs/pr/1", CPU, offline=True)


class Detector:
    """Finds a face if the first pixel is bright."""

    def __init__(self, image_size, device):
        self.size = image_size

    def __call__(self, picture):
        pixels = np.asarray(picture.resize((self.size, self.size)), np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1) / 255 if picture.getpixel((0, 0))[0] > 99 else None


class Recogniser(torch.nn.Module):
    def __init__(self, pretrained):
        super().__init__()
        assert pretrained == "vggface2"
        self.scale = torch.nn.Parameter(torch.tensor([3.0, 1.0, 2.0]))

    def forward(self, faces):
        return faces.mean((2, 3)) * self.scale


@pytest.fixture
def face(monkeypatch):
    module = SimpleNamespace(MTCNN=Detector, InceptionResnetV1=Recogniser)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)
    return FaceScorer(CPU)


def plain_picture(*colour: int) -> np.ndarray:
    return np.full((40, 40, 3), colour, np.uint8)


def test_a_picture_without_a_face_scores_none_or_zero(face):
    photos = [plain_picture(200, 10, 10), plain_picture(150, 150, 0), plain_picture(0, 0, 200)]
    made = [plain_picture(200, 10, 10), plain_picture(10, 200, 10)]
    found = face.score(SUBJECT, photos, made, [0, 0])
    feature = [np.array(one[0, 0], float) * (3, 1, 2) for one in (photos[0], photos[1], made[0])]
    first, second, mine = (one / np.linalg.norm(one) for one in feature)
    expected = (first @ mine + second @ mine) / 2
    assert found["face_rec"] == [pytest.approx(expected, abs=1e-6), None]
    assert found["face_rec_zero"] == [pytest.approx(expected, abs=1e-6), 0.0]
    assert found["face_detected"] == [1.0, 0.0]
    real = face.real(SUBJECT, photos)
    assert real["face_detected"] == pytest.approx(2 / 3)
    assert real["face_rec"] == pytest.approx(first @ second, abs=1e-6)


def test_without_a_face_in_the_photos_nothing_is_scored(face):
    found = face.score(SUBJECT, [plain_picture(0, 0, 9)], [plain_picture(200, 0, 0)], [0])
    assert found == {"face_rec": [None], "face_rec_zero": [None], "face_detected": [1.0]}
    assert face.real(SUBJECT, [plain_picture(0, 0, 9)]) == {"face_detected": 0}


def test_face_recognition_needs_its_package_and_its_weights(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)
    with pytest.raises(ScorerUnavailable, match="pip install"):
        FaceScorer(CPU)
    module = SimpleNamespace(MTCNN=Detector, InceptionResnetV1=Recogniser)
    monkeypatch.setitem(sys.modules, "facenet_pytorch", module)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ScorerUnavailable, match="--offline forbids"):
        FaceScorer(CPU, offline=True)

    def unreachable(**_):
        raise OSError("no route to host")

    module.InceptionResnetV1 = unreachable
    with pytest.raises(ScorerUnavailable, match="no route to host"):
        FaceScorer(CPU)
