"""Tiles cover a picture, blend without a seam, and hold memory to one tile."""

from __future__ import annotations

import numpy as np
import pytest

from hyperrt.bundle.bundle import Bundle
from hyperrt.bundle.memory import tile_of
from hyperrt.runtime import Runtime
from hyperrt.session.decode import decode_tiles
from tests.hyperrt import fake_bundle


def enlarged(latents):
    """A decoder that works place by place: 2 x larger."""
    return np.sin(latents[:, :3]).repeat(2, axis=2).repeat(2, axis=3).astype(np.float32)


def blurred(latents):
    """A decoder that looks at its neighbours."""
    padded = np.pad(latents, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    high, wide = latents.shape[2:]
    shifted = [padded[:, :, i : i + high, j : j + wide] for i in range(3) for j in range(3)]
    return enlarged(np.mean(shifted, axis=0))


def latents(high, wide):
    return np.random.default_rng(0).normal(size=(1, 4, high, wide)).astype(np.float32)


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (17, 23), (40, 9), (5, 30)])
def test_a_decoder_that_works_place_by_place_gives_what_it_gives_untiled(size):
    whole = latents(*size)
    np.testing.assert_allclose(decode_tiles(enlarged, whole, 8), enlarged(whole), rtol=1e-5, atol=1e-6)


def test_a_decoder_that_looks_around_differs_a_little_and_only_near_the_seams():
    whole = latents(32, 32)
    difference = np.abs(decode_tiles(blurred, whole, 16) - blurred(whole))
    assert 0 < difference.max() < 0.2 and difference.mean() < 0.01
    assert difference[..., :20, :20].max() < 1e-6  # the first tile, up to where the second begins


def test_every_tile_is_of_one_size_so_that_one_compiled_graph_does():
    seen = []
    decode_tiles(lambda tile: seen.append(tile.shape) or enlarged(tile), latents(20, 33), 16)
    assert set(seen) == {(1, 4, 16, 16)} and len(seen) == 6


def test_blending_falls_linearly_to_the_edge():
    mark = iter([0.0, 1.0])
    result = decode_tiles(lambda tile: np.full_like(tile[:, :3], next(mark)), latents(8, 14), 8)
    row = result[0, 0, 0]
    assert (np.diff(row) >= 0).all() and row[0] == 0 and row[-1] == 1
    np.testing.assert_allclose(row[6:8], [0.25, 0.75])


def with_free_sizes(folder, **changes):
    """A bundle whose decoder takes any size."""
    tensors = fake_bundle.TENSORS["vae_decoder"]
    free = ({"latents": ("images", 4, "h", "w")}, {"pixels": ("images", 3, "height", "width")})
    fake_bundle.TENSORS["vae_decoder"] = free
    try:
        return fake_bundle.write(folder, **changes)
    finally:
        fake_bundle.TENSORS["vae_decoder"] = tensors


LARGE = {"image_size": 1024, "latent": {"channels": 4, "size": 4}}


def test_only_large_pictures_of_a_graph_with_free_sizes_have_tiles(tmp_path):
    free = Bundle.open(with_free_sizes(tmp_path / "free", **LARGE))
    assert tile_of(free) == 2
    assert tile_of(Bundle.open(with_free_sizes(tmp_path / "small", image_size=512))) is None
    assert tile_of(Bundle.open(fake_bundle.write(tmp_path / "fixed", **LARGE))) is None


def test_tiles_are_used_with_low_memory_alone(tmp_path):
    fake_bundle.register()
    folder = with_free_sizes(tmp_path / "free", **LARGE)
    images = []
    for low_memory in (False, True):
        fake_bundle.calls.clear()
        with Runtime.open(folder, "fake", low_memory=low_memory) as runtime:
            images.append(runtime.generate("a robot").images)
        assert fake_bundle.calls.count("vae_decoder") == (4 if low_memory else 1)
    np.testing.assert_array_equal(*images)
