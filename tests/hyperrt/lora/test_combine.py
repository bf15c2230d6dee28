"""Several LoRAs to one: against products that are written out, which the code itself never does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperrt.errors import LoraMismatch, UsageError
from hyperrt.lora import combine
from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.lora.subject_file import load_subject
from tests.hyperrt.lora_files import save_subject

METADATA = {
    "base_model": "b" * 64,
    "hypernet": "a" * 64,
    "class_noun": "mug",
    "photos": "3",
    "trigger": "sks",
}

layouts = st.builds(
    lambda sizes, rank: LoraLayout(
        tuple(Site(f"{k}.to_{'qkv'[k % 3]}", *s) for k, s in enumerate(sizes)), rank
    ),
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    st.integers(1, 4),
)
counts = st.integers(1, 5)
seeds = st.integers(0, 99)


def several(layout: LoraLayout, count: int, seed: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    sizes = {name: layout.size(name) for name in ("lora_q", "lora_kv")}
    return [
        {name: rng.standard_normal(size, dtype=np.float32) for name, size in sizes.items()}
        for _ in range(count)
    ]


def products(layout: LoraLayout, packed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {path: a.astype(np.float64) @ b for path, (a, b) in layout.unpack(packed).items()}


def mean_products(layout: LoraLayout, photos: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    each = [products(layout, photo) for photo in photos]
    return {path: np.mean([one[path] for one in each], axis=0) for path in each[0]}


@pytest.fixture
def layout() -> LoraLayout:
    return LoraLayout((Site("0.to_q", 8, 6), Site("0.to_k", 5, 6), Site("0.to_v", 5, 6)), rank=2)


@given(layouts, counts, seeds)
@settings(deadline=None)
def test_side_by_side_the_product_is_the_mean_of_products(layout, count, seed):
    photos = several(layout, count, seed)
    found = combine.concatenated(photos, layout)
    wide = combine.combined_layout(layout, "concat", count)
    assert (wide.rank, wide.sites) == (count * layout.rank, layout.sites)
    for path, expected in mean_products(layout, photos).items():
        error = np.linalg.norm(products(wide, found)[path] - expected)
        assert error <= 1e-6 * max(np.linalg.norm(expected), 1)


@given(layouts, counts, seeds)
@settings(deadline=None)
def test_the_product_errs_as_the_truncated_svd_of_the_mean_written_out(layout, count, seed):
    photos = several(layout, count, seed)
    found = products(layout, combine.product_mean(photos, layout))
    for path, mean in mean_products(layout, photos).items():
        least = np.linalg.norm(np.linalg.svd(mean, compute_uv=False)[layout.rank :])
        error = np.linalg.norm(found[path] - mean)
        assert error == pytest.approx(least, rel=1e-5, abs=1e-5 * (1 + np.linalg.norm(mean)))


@given(layouts, st.integers(2, 5), seeds)
@settings(deadline=None)
def test_the_product_of_photos_that_agree_is_each_ones(layout, count, seed):
    [photo] = several(layout, 1, seed)
    found = products(layout, combine.product_mean([photo] * count, layout))
    for path, expected in products(layout, photo).items():
        np.testing.assert_allclose(found[path], expected, rtol=0, atol=2e-6 * (1 + np.abs(expected).max()))


def test_photos_that_disagree_keep_in_the_product_what_the_mean_of_factors_loses(layout):
    """A and -A, B and -B: the same change of the weights, and factors whose mean is nothing."""
    [photo] = several(layout, 1, 0)
    photos = [photo, {name: -vector for name, vector in photo.items()}]
    assert not any(sum(photo[name] for photo in photos).any() for name in photo)
    found = products(layout, combine.product_mean(photos, layout))
    for path, expected in products(layout, photo).items():
        np.testing.assert_allclose(found[path], expected, atol=1e-5)


def test_side_by_side_they_can_be_saved_and_read_under_their_own_layout(layout, tmp_path):
    wide = combine.combined_layout(layout, "concat", 3)
    packed = combine.concatenated(several(layout, 3, 0), layout)
    save_subject(tmp_path / "mug.safetensors", packed, wide, METADATA)
    again = load_subject(tmp_path / "mug.safetensors", wide, "b" * 64)
    assert all(np.array_equal(again.lora[name], packed[name]) for name in packed)
    with pytest.raises(LoraMismatch, match="another LoRA layout"):
        load_subject(tmp_path / "mug.safetensors", layout, "b" * 64)


def test_another_word_is_refused():
    with pytest.raises(UsageError, match=r"combine is 'median'\n.*mean, product, concat"):
        combine.check_way("median")


@pytest.mark.parametrize("way", [combine.product_mean, combine.concatenated])
def test_a_photo_of_another_layout_is_refused(layout, way):
    photos = several(layout, 2, 0)
    photos[1]["lora_q"] = photos[1]["lora_q"][1:]
    with pytest.raises(LoraMismatch, match="lora_q is"):
        way(photos, layout)
