"""hyperrt prepare: a training step runs on the cache of every layout."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hyperrt.errors import BadInput, Incompatible, NotFound, ResourceError, UsageError
from hyperrt.training import prepare
from hyperrt.training.data import cache as data
from hyperrt.training.data import features
from hyperrt.training.data.cache import PictureCache
from hyperrt.training.model import encode
from hyperrt.training.prepare import PrepareConfig
from hyperrt.training.run.config import TrainConfig
from hyperrt.training.run.trainer import Trainer
from tests.training import data_sets

SHAPES = {  # layout -> subjects, views
    "folders": (4, 3),
    "celeba": (4, 1),
    "afhq": (6, 1),
    "subjects200k": (4, 2),
    "cutouts": (4, 4),
    "webdataset": (4, 2),
}


@pytest.fixture
def config(world, tmp_path):
    """A function: layout and options => PrepareConfig."""

    def config(layout: str, source: Path | None = None, **settings) -> PrepareConfig:
        source = source or getattr(data_sets, layout)(tmp_path / layout)
        found = {"base": world.base, "output": tmp_path / "cache", "device": "cpu", **settings}
        return PrepareConfig(layout=layout, source=source, **found)

    return config


def texts(cache: PictureCache) -> set[tuple[str, str]]:
    return {pair for views in cache.texts for pair in views}


def skipped(cache: Path) -> dict[str, str]:
    lines = (cache / "skipped.jsonl").read_text().splitlines()
    return {entry["name"]: entry["why"] for entry in map(json.loads, lines)}


@pytest.mark.parametrize("layout", SHAPES)
def test_a_training_step_runs_on_every_layout(layout, config, settings):
    cache = prepare.prepare(config(layout, flip=layout == "celeba"))
    identities, views = SHAPES[layout]
    assert cache.images.shape == (identities, views, 64, 64, 3)
    assert cache.latents.shape == (identities, views, 8, 8, 8)
    options = {"data": str(cache.path), "holdout": 1, "photos": min(2, views), "batch_size": 2}
    trainer = Trainer(TrainConfig(**{**settings, **options}))
    assert trainer.data.features.shape == (identities, views, 17, 32)
    before = [parameter.clone() for parameter in trainer.decoder.parameters()]
    assert torch.isfinite(trainer.step(0)).all()
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.decoder.parameters(), strict=True))


def test_the_cache_holds_the_outputs_of_the_base_models_encoders(config, parts):
    cache = prepare.prepare(config("folders", flip=True))
    picture = np.array(cache.images[2, 1])[None]
    pixels = torch.from_numpy(picture).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        means = [parts.vae.encode(x).latent_dist.mean * 0.5 for x in (pixels, pixels.flip(-1))]
        seen = parts.image_encoder(pixels).last_hidden_state
    tolerance = {"atol": 2e-3, "rtol": 2e-3}  # of float16
    for found, mean in zip((cache.latents, cache.mirrored), means, strict=True):
        np.testing.assert_allclose(found[2, 1], mean[0].numpy(), **tolerance)
    np.testing.assert_allclose(features.image_features(parts, cache)[2, 1], seen[0].numpy(), **tolerance)
    table = features.caption_table(parts, cache, "sks")
    expected = encode.encode_text(parts, ["", "a sks cat", "a cat"])
    rows = np.array([0, table.subject[2, 1], table.generic[2, 1]])
    torch.testing.assert_close(table.text(rows).hidden_states, expected, **tolerance)


def test_a_subject_with_fewer_photos_repeats_them_and_its_target_is_another_one(config, settings, parts):
    cache = prepare.prepare(config("folders"))
    assert cache.counts.tolist() == [3, 1, 2, 3]
    for array in (cache.images, cache.latents, features.image_features(parts, cache)):
        assert (array[1, 1] == array[1, 0]).all()
        assert (array[2, 2] == array[2, 0]).all()
        assert (array[2, 1] != array[2, 0]).any()
    options = {"data": str(cache.path), "holdout": 0, "photos": 1, "batch_size": 4, "cross_view": 1.0}
    trainer = Trainer(TrainConfig(**{**settings, **options}))
    for step in range(6):
        batch = trainer.batches.at(step)
        for who, photo, latents in zip(batch.subjects, batch.features, batch.latents, strict=True):
            seen = next(v for v in range(3) if np.allclose(trainer.data.features[who, v], photo))
            target = next(v for v in range(3) if np.array_equal(cache.latents[who, v], latents))
            assert (target == seen) == (who == 1)


def test_half_of_the_targets_are_mirrored_if_the_cache_has_them(config, settings):
    cache = prepare.prepare(config("celeba", flip=True))
    options = {"data": str(cache.path), "holdout": 0, "photos": 1, "batch_size": 4}
    trainer = Trainer(TrainConfig(**{**settings, **options}))
    mirrored = []
    for step in range(10):
        batch = trainer.batches.at(step)
        for who, latents in zip(batch.subjects, batch.latents.numpy(), strict=True):
            mirrored.append(np.array_equal(latents, cache.mirrored[who, 0]))
            assert mirrored[-1] or np.array_equal(latents, cache.latents[who, 0])
    assert 8 <= sum(mirrored) <= 32


def test_the_captions_of_the_closed_categories_are_those_of_the_paper(config, tmp_path):
    faces = prepare.prepare(config("celeba"))
    assert texts(faces) == {("a [V] face", "a face")}
    assert faces.captions(np.array([0]), np.array([0]), "sks") == ["a sks face"]
    animals = prepare.prepare(config("afhq", output=tmp_path / "other"))
    nouns = ("cat", "dog", "wild animal")
    assert texts(animals) == {(f"a [V] {noun}", f"a {noun}") for noun in nouns}
    assert animals.names == nouns


@pytest.mark.parametrize("layout", ["celeba", "afhq"])
def test_the_splits_of_a_layout_share_no_photos(layout, config, tmp_path):
    cache = prepare.prepare(config(layout, split="eval"))
    assert cache.shape == (1, 1)
    trained = prepare.prepare(config(layout, tmp_path / layout, output=tmp_path / "train"))
    assert not (trained.images == cache.images[0]).all((1, 2, 3, 4)).any()


def test_worker_processes_make_the_same_cache(config, tmp_path):
    source = data_sets.webdataset(tmp_path / "shards")
    one = prepare.prepare(config("webdataset", source))
    two = prepare.prepare(config("webdataset", source, output=tmp_path / "two", workers=2))
    assert np.array_equal(one.images, two.images)
    assert one.texts == two.texts
    assert one.metadata == two.metadata


def test_a_folder_with_one_photo_is_enough(config, tmp_path):
    cache = prepare.prepare(config("folders", data_sets.write(tmp_path / "cat", ["1.png"]), noun="cat"))
    assert cache.shape == (1, 1)
    assert texts(cache) == {("a [V] cat", "a cat")}


def test_a_limit_counts_subjects(config, tmp_path):
    source = data_sets.afhq(tmp_path / "afhq")
    assert prepare.prepare(config("afhq", source, limit=2)).shape == (2, 1)
    cache = prepare.prepare(config("folders", limit=3, views=2, output=tmp_path / "other"))
    assert cache.counts.tolist() == [2, 1, 2]


def test_bad_photos_are_left_out_and_named_up_to_a_share(config, tmp_path, caplog):
    source = data_sets.write(tmp_path / "faces", [f"{number}.png" for number in range(20)])
    (source / "3.png").write_bytes((source / "3.png").read_bytes()[:300])
    cache = prepare.prepare(config("celeba", source))
    assert cache.shape == (19, 1)
    assert "3.png" in skipped(cache.path)
    assert caplog.text.count("1 of 20 photos are left out (5.0%)") == 1
    (source / "4.png").write_bytes(b"no picture")
    again = config("celeba", source, output=tmp_path / "two")
    with pytest.raises(BadInput, match=r"2 of 20 photos(?s:.*)3\.png(?s:.*)--max-bad 0\.1"):
        prepare.prepare(again)
    assert not (again.output / data.METADATA).exists()
    assert prepare.prepare(replace(again, max_bad=0.1)).shape == (18, 1)


def test_a_data_set_without_usable_photos_is_an_error_of_three_lines(config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_bytes(b"no picture")
    for source, message in (
        ("empty", "holds no photos"),
        ("broken", "no photo of the data set can be used(?s:.*)1.png"),
    ):
        with pytest.raises(BadInput, match=message) as raised:
            prepare.prepare(config("folders", tmp_path / source, noun="cat"))
        assert len(str(raised.value).splitlines()) == 3
    with pytest.raises(NotFound, match="there is no"):
        prepare.prepare(config("folders", tmp_path / "absent"))


def test_malformed_and_hostile_photos_do_not_stop_the_work(config, tmp_path, shared_data):
    source = tmp_path / "photos"
    source.mkdir()
    for path in (shared_data / "bad_images").iterdir():
        shutil.copy(path, source)
    os.mkfifo(source / "pipe.png")
    (source / "link.png").symlink_to(shared_data / "photos")
    cache = prepare.prepare(config("folders", source, noun="thing", views=200, max_bad=1.0))
    why = skipped(cache.path)
    assert "it is a named pipe" in why["photos/pipe.png"]
    assert "a symbolic link" in why["photos/link.png"]
    assert "photos/truncated_jpeg.jpg" in why
    assert cache.counts[0] > 20


def test_real_photos_become_a_cache(config, shared_data):
    cache = prepare.prepare(config("folders", shared_data / "dreambench", limit=3))
    assert cache.counts.min() >= 4
    assert texts(cache) == {("a [V] backpack", "a backpack"), ("a [V] can", "a can")}


def test_a_finished_cache_is_kept_and_other_settings_need_force(config, tmp_path):
    first = config("folders")
    cache = prepare.prepare(first)
    before = {path.name: path.stat().st_mtime_ns for path in cache.path.iterdir()}
    prepare.prepare(first)
    after = {path.name: path.stat().st_mtime_ns for path in cache.path.iterdir()}
    assert {name for name in before if before[name] != after[name]} <= {data.METADATA}
    with pytest.raises(UsageError, match=r"other settings: token(?s:.*)--force"):
        prepare.prepare(replace(first, token="xyz"))
    with pytest.raises(UsageError, match="other settings: limit"):
        prepare.prepare(replace(first, limit=2))
    assert PictureCache.open(cache.path).metadata == cache.metadata
    other = prepare.prepare(replace(first, token="xyz", force=True))
    assert other.metadata["text"] != cache.metadata["text"]
    assert not (cache.path / cache.metadata["text"]).exists()
    assert (cache.path / data.IMAGES).stat().st_mtime_ns == before[data.IMAGES]
    assert prepare.prepare(replace(first, limit=2, force=True)).shape == (2, 3)


def test_a_folder_with_other_files_is_left_alone(config, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"holds thesis\.txt"):
        prepare.prepare(config("folders", force=True))


def test_a_cache_in_its_data_set_is_refused(config, tmp_path):
    source = data_sets.folders(tmp_path / "folders")
    with pytest.raises(UsageError, match="lies in the data set"):
        prepare.prepare(config("folders", source, output=source / "cache"))


@pytest.mark.parametrize("stage", ["image_features", "caption_table"])
def test_an_interrupted_run_keeps_its_finished_stages(stage, config, monkeypatch):
    def stop(*arguments):
        raise SystemExit(143)

    wanted = config("folders")
    with monkeypatch.context() as patch:
        patch.setattr(features, stage, stop)
        with pytest.raises(SystemExit):
            prepare.prepare(wanted)
    assert not (wanted.output / data.METADATA).exists()
    with pytest.raises(FileNotFoundError, match="not a finished"):
        PictureCache.open(wanted.output)
    monkeypatch.setattr(prepare.ingest, "write", stop)
    monkeypatch.setattr(features, "encode_latents", stop)
    assert prepare.prepare(wanted).shape == (4, 3)


def test_a_killed_run_leaves_nothing_that_looks_finished(config):
    """SIGKILL at random moments; then a run that gets through."""
    wanted = config("folders")
    seed = random.randrange(2**32)
    print(f"random.seed({seed})")
    moments = random.Random(seed)
    context = multiprocessing.get_context("fork")
    for _ in range(4):
        process = context.Process(target=prepare.prepare, args=(wanted,))
        process.start()
        time.sleep(moments.uniform(0, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (wanted.output / data.METADATA).exists():
            assert PictureCache.open(wanted.output).latents.shape == (4, 3, 8, 8, 8)
    cache = prepare.prepare(wanted)
    assert cache.shape == (4, 3)
    assert not [path.name for path in cache.path.iterdir() if path.name.startswith(".hyperrt")]


def test_two_runs_do_not_write_one_cache(config):
    wanted = config("folders")
    wanted.output.mkdir()
    claimed = prepare._claimed(wanted.output, wanted.source)
    with claimed, pytest.raises(UsageError, match="another run works on it"):
        prepare.prepare(wanted)


def test_a_dead_worker_is_an_error():
    with pytest.raises(ResourceError, match="a worker process died"):
        list(data.in_processes(os._exit, [9], 2))


def test_latents_of_another_autoencoder_are_refused(config, settings, parts):
    cache = prepare.prepare(config("celeba"))
    features.check_latents(parts, cache)
    other = PictureCache.read(cache.path, {**cache.metadata, "latents": "latents-0123456789ab.npy"})
    with pytest.raises(Incompatible, match="another VAE"):
        features.check_latents(parts, other)


def test_a_full_disk_is_an_error_before_the_work(config, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(ResourceError, match="no room for the latents"):
        prepare.prepare(config("celeba"))


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        ("folders", {"split": "eval"}, "has no split 'eval'"),
        ("celeba", {"noun": "cat"}, "--noun cannot be set"),
        ("celeba", {"max_bad": 2.0}, "a share, from 0 to 1"),
        ("celeba", {"size": 60}, "multiples of 16"),
        ("parquet", {"source": Path()}, "there is no layout"),
    ],
)
def test_impossible_options_are_refused(layout, settings, message, config):
    with pytest.raises(UsageError, match=message):
        prepare.prepare(config(layout, **settings))


@pytest.mark.parametrize("base", ["base", "model"])  # its name, and the former one
def test_the_command_makes_a_cache_and_prints_what_is_wrong(base, world, tmp_path):
    source = data_sets.celeba(tmp_path / "faces")
    options = {"layout": "celeba", "source": source, base: world.base, "output": tmp_path / "cache"}
    arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    result = CliRunner().invoke(prepare.main, [*arguments, "--size", "32", "--limit", "2"])
    assert result.exit_code == 0, result.output
    assert PictureCache.open(tmp_path / "cache").images.shape == (2, 1, 32, 32, 3)
    result = CliRunner().invoke(prepare.main, [*arguments, "--limit", "3"])
    assert result.exit_code == UsageError.code
    assert "add --force" in result.output
    assert "--model" not in CliRunner().invoke(prepare.main, ["--help"]).output
