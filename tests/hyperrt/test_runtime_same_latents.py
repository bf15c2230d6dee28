"""A few requests draw the latents that they drew before; bench/same_latents.py compares bits of many more.

After a change that means to alter latents:

    python bench/same_latents.py --write tests/hyperrt/kept_latents.npz
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5  # relative to the largest: another processor rounds in another way


@pytest.fixture(scope="module")
def bench():
    """bench/latent_requests.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("latent_requests", ROOT / "bench" / "latent_requests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def kept():
    with np.load(Path(__file__).with_name("kept_latents.npz")) as file:
        return dict(file)


def relative(latents, expected):
    return np.abs(latents - expected).max() / np.abs(expected).max()


def test_the_runtime_draws_the_latents_that_are_kept(bench, kept, tiny, tmp_path):
    drawn = bench.draw(tiny, bench.KEPT, tmp_path)
    assert drawn.keys() == kept.keys()
    for name, results in drawn.items():
        latents = np.stack([result.latents for result in results])
        assert latents.shape == kept[name].shape, name
        assert relative(latents, kept[name]) <= TOLERANCE, name


def test_each_kept_request_has_latents_that_no_other_comes_near(kept):
    first = [latents[0, :1] for latents in kept.values()]
    pairs = [(one, another) for k, one in enumerate(first) for another in first[:k]]
    assert min(relative(*pair) for pair in pairs) > 1000 * TOLERANCE
