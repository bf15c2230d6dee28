"""A base model with random weights and a small scene cache, made once for all tests of training."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import runpy
import shutil
import socket
from collections.abc import Callable
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
    base = tiny_base.make(folder / "base")
    return SimpleNamespace(base=base, cache=tiny_base.make_cache(folder / "cache", base))


@pytest.fixture(scope="session")
def parts(world):
    """The loaded base model."""
    from hyperrt.training.model import base_model as base

    return base.load(world.base)


@pytest.fixture(scope="session")
def short_run(world) -> dict:
    """Settings of a run of a few steps, without its folder."""
    return {
        "base": str(world.base),
        "data": str(world.cache),
        "steps": 6,
        "batch_size": 4,
        "rank": 2,
        "dim": 16,
        "layers": 1,
        "iterations": 2,
        "head_dim": 8,
        "warmup": 2,
        "holdout": 2,
        "log_every": 2,
        "monitor_every": 3,
        "save_every": 3,
        "device": "cpu",
    }


@pytest.fixture
def settings(short_run, tmp_path) -> dict:
    """The same with a folder of the test's own."""
    return {**short_run, "output": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory) -> SimpleNamespace:
    """A small SDXL and a cache that was prepared for it: `model`, its folder; `base`, `cache`, `table`."""
    from hyperrt.training import prepare
    from hyperrt.training.data import features
    from hyperrt.training.model import base_model as base
    from tests.export import small_models
    from tests.training import data_sets

    folder = tmp_path_factory.mktemp("sdxl")
    model = folder / "base"
    small_models.save(model, small_models.SDXL)
    source = data_sets.webdataset(folder / "set")
    config = prepare.PrepareConfig(
        layout="webdataset", source=source, base=model, output=folder / "cache", device="cpu"
    )
    cache, parts = prepare.prepare(config), base.load(model)
    table = features.caption_table(parts, cache, "sks")
    return SimpleNamespace(model=model, cache=cache, base=parts, table=table)


CLOCK = ("rows_per_s", "peak_mb", "mb_per_sample", "processes", "config")  # and what names the run


def read_log(folder: Path | str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def entries() -> Callable[[Path | str], list[dict]]:
    """The lines of a run's log."""
    return read_log


@pytest.fixture(scope="session")
def curve() -> Callable[[Path | str], list[dict]]:
    """The log without what the machine and the folder's name decide."""
    return lambda folder: [{k: v for k, v in e.items() if k not in CLOCK} for e in read_log(folder)]


@pytest.fixture
def no_sheets(monkeypatch):
    """Sample sheets are tested once; they are the longest part of a short run."""
    from hyperrt.training.run import preview

    monkeypatch.setattr(preview, "write", lambda path, trainer: None)


@pytest.fixture(scope="session")
def straight(short_run, tmp_path_factory) -> Path:
    """A run of `short_run` that nothing interrupted."""
    from hyperrt.training import train
    from hyperrt.training.run import preview
    from hyperrt.training.run.config import TrainConfig

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preview, "write", lambda path, trainer: None)
        output = tmp_path_factory.mktemp("straight") / "run"
        return train.run(TrainConfig(**short_run, output=str(output)))


@pytest.fixture
def finished(straight, settings) -> Path:
    """A copy of that run, in the folder of `settings`."""
    return Path(shutil.copytree(straight, settings["output"]))


@pytest.fixture(scope="session")
def launch() -> Callable[..., multiprocessing.Process]:
    """Starts a training in a process of its own, see child.py.

    The process is forked off a server that has imported the training once: no test waits for that.  Where it
    is to compute on a GPU it must be a "spawn" instead, since imports use CUDA, which no fork survives.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(["hyperrt.training.train"])
    child = str(Path(__file__).with_name("child.py"))

    def start(config, method: str = "forkserver", **options) -> multiprocessing.Process:
        context = multiprocessing.get_context(method)
        process = context.Process(target=runpy.run_path, args=(child, {"config": config, "options": options}))
        process.start()
        return process

    return start


@pytest.fixture(scope="session")
def together(launch) -> Callable[..., list[multiprocessing.Process]]:
    """Starts so many processes of one training, as a launcher would."""

    def start(count: int, config, **options) -> list[multiprocessing.Process]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            launch(config, environment={**shared, "RANK": str(k), "LOCAL_RANK": str(k)}, **options)
            for k in range(count)
        ]

    return start


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

    from hyperrt.training.data import clip_tokenizer

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
