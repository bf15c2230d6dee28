"""Photos to weights: the encoder, the decoder, and the mean over the photos."""

from __future__ import annotations

import numpy as np
import pytest

from hyperrt.errors import NumericError, UsageError
from hyperrt.lora import combine
from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.lora.names import COMBINED_TO_SAVE
from hyperrt.session import personalizer

LAYOUT = LoraLayout((Site("0.to_q", 3, 2), Site("0.to_k", 2, 2)), rank=2)


class Recorded:
    """An engine that is a function; it keeps what it was fed."""

    def __init__(self, function):
        self.function = function
        self.fed = []

    def run(self, feeds, host=True):
        self.fed.append(feeds)
        return self.function(feeds)


def test_photos_are_encoded_one_at_a_time():
    pixels = np.arange(3 * 3 * 2 * 2, dtype=np.float32).reshape(3, 3, 2, 2)
    encoder = Recorded(lambda feeds: {"features": feeds["pixels"].reshape(1, 1, -1)})
    features = personalizer.encode_photos(pixels, encoder)
    assert [feeds["pixels"].shape for feeds in encoder.fed] == [(1, 3, 2, 2)] * 3
    np.testing.assert_array_equal(np.concatenate(features), pixels.reshape(3, 1, -1))


def test_the_weights_are_the_mean_over_the_photos():
    features = [np.full((1, 1, 1), value, np.float32) for value in (1, 2, 6)]
    decoder = Recorded(lambda feeds: {"lora_q": feeds["features"][0], "lora_kv": -feeds["features"][0]})
    weights = personalizer.predict_lora(features, decoder)
    assert weights["lora_q"].dtype == np.float32
    assert (weights["lora_q"].tolist(), weights["lora_kv"].tolist()) == ([3.0], [-3.0])


def test_one_photo_gives_the_bits_that_were_predicted():
    row = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32)
    weights = personalizer.predict_lora([row[None]], Recorded(lambda feeds: {"lora_q": row, "lora_kv": row}))
    np.testing.assert_array_equal(weights["lora_q"], row[0])


@pytest.mark.parametrize("photos", [1, 2, 3])
@pytest.mark.parametrize("way", COMBINED_TO_SAVE)
def test_the_weights_of_several_photos_are_combined_as_asked_and_one_keeps_its_bits(way, photos):
    rng = np.random.default_rng(0)
    sizes = {name: LAYOUT.size(name) for name in ("lora_q", "lora_kv")}
    each = [{name: rng.normal(size=(1, n)).astype("f4") for name, n in sizes.items()} for _ in range(photos)]
    decoder = Recorded(lambda feeds: each[int(feeds["features"])])
    features = [np.array(k, np.float32) for k in range(photos)]
    weights = personalizer.lora_of(features, decoder, LAYOUT, way)
    rows = [{name: row[0] for name, row in one.items()} for one in each]
    expected = {
        "mean": lambda: personalizer.predict_lora(features, decoder),
        "product": lambda: combine.product_mean(rows, LAYOUT),
        "concat": lambda: combine.concatenated(rows, LAYOUT),
    }[way]()
    for name, vector in (rows[0] if photos == 1 else expected).items():
        np.testing.assert_array_equal(weights[name], vector)


def test_another_way_to_combine_photos_is_refused_before_one_is_decoded():
    with pytest.raises(UsageError, match="combine is 'median'"):
        personalizer.lora_of([np.zeros(())], None, LAYOUT, "median")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_refused(value):
    bad = np.array([[1, value]], np.float32)
    decoder = Recorded(lambda feeds: {"lora_q": bad, "lora_kv": bad})
    with pytest.raises(NumericError, match="1 of 2 values of lora_q"):
        personalizer.predict_lora([np.zeros((1, 1, 1), np.float32)], decoder)
