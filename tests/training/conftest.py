"""A base model with random weights and a small scene cache, made once for all tests of training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

torch.set_num_threads(1)  # the models are too small for two


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """Folders of a base model and of its cache: `base`, `cache`."""
    source = Path(__file__).with_name("tiny_base.py")
    spec = importlib.util.spec_from_file_location("tiny_base", source)
    tiny_base = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_base)
    folder = tmp_path_factory.mktemp("world")
    return SimpleNamespace(base=tiny_base.make(folder / "base"), cache=tiny_base.make_cache(folder / "cache"))


@pytest.fixture(scope="session")
def parts(world):
    """The loaded base model."""
    from training import base

    return base.load(world.base)


@pytest.fixture(scope="session")
def short_run(world) -> dict:
    """Settings of a run of a few steps, without its folder."""
    return {
        "base": str(world.base),
        "cache": str(world.cache),
        "steps": 6,
        "batch": 4,
        "rank": 2,
        "dim": 16,
        "layers": 1,
        "iterations": 2,
        "head_dim": 8,
        "warmup": 2,
        "holdout": 8,
        "log_every": 2,
        "monitor_every": 3,
        "save_every": 3,
        "device": "cpu",
    }


@pytest.fixture
def settings(short_run, tmp_path) -> dict:
    """The same with a folder of the test's own."""
    return {**short_run, "out": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def cutout_folder():
    """A function that makes a folder of small cut-outs from (name or colour, noun) pairs, and their table."""
    from PIL import Image, ImageColor

    def make(
        folder: Path, entries: list[tuple[str, str]], table: bool = True, colours: int | None = None
    ) -> Path:
        folder.mkdir(exist_ok=True)
        names = [name if name.endswith(".png") else f"{name}.png" for name, _ in entries]
        for (colour, _), name in list(zip(entries, names, strict=True))[:colours]:
            picture = Image.new("RGBA", (48, 64), (0, 0, 0, 0))
            picture.paste(ImageColor.getrgb(colour), (20, 8, 36, 40))
            picture.save(folder / name)
        if table:
            lines = [f"{name},{noun},train" for name, (_, noun) in zip(names, entries, strict=True)]
            (folder / "metadata.csv").write_text("\n".join(["file,class_noun,split", *lines]))
        return folder

    return make


@pytest.fixture(scope="session")
def networks(tmp_path_factory) -> SimpleNamespace:
    """Folders of a small CLIP and a small ViT of random weights, as scorers read them: `clip`, `dino`."""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    from training import clip_tokenizer

    folder = tmp_path_factory.mktemp("networks")
    (folder / "clip").mkdir()
    tokenizer = clip_tokenizer.build(folder / "clip", 32)
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(3)
    text = {
        "vocab_size": len(tokenizer), "max_position_embeddings": 32, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    vision = {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(
        text_config=layers | text, vision_config=layers | vision, projection_dim=24, initializer_factor=4.0
    )
    CLIPModel(config).save_pretrained(folder / "clip")
    vit = ViTConfig(**layers, **vision, initializer_range=0.3)
    ViTModel(vit, add_pooling_layer=False).save_pretrained(folder / "dino")
    return SimpleNamespace(clip=folder / "clip", dino=folder / "dino")
