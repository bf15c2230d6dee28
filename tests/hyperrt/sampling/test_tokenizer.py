"""The same ids as transformers' CLIPTokenizer, and no text that is lost silently."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hyperrt.errors import BundleError
from hyperrt.sampling.tokenizer import Tokenizer

LENGTH = 16
TEXTS = [
    "",
    "a sks robot on a beach",
    "A  SKS\tRobot,on a BEACH!!",
    "a photo of the zyzzyva's 1024 things, they've said so",
    "ein Kätzchen, 猫 and Cafe\u0301",
    "a 👨‍👩‍👧 and 🇩🇪",
    "a <|endoftext|> robot <|startoftext|>",
    "<lora:x:1> (big:1.5) [V] \\ \u202eright to left",
    "robot " * 200,
    "x" * 5000,
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """transformers' tokenizer and the folder that it was saved in."""
    pytest.importorskip("transformers")
    from hyperrt.training.data import clip_tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    return clip_tokenizer.build(folder, LENGTH), folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A tokenizer of whole words, made without transformers: a, b, c are 2, 3, 4; start and end 0 and 1."""
    from tokenizers import Tokenizer as Vendor
    from tokenizers import models, pre_tokenizers, processors

    vendor = Vendor(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}, unk_token="</s>"))
    vendor.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vendor.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    vendor.save(str(path))
    return path


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:20]))
@pytest.mark.parametrize("length", [LENGTH, 77, 2])
def test_ids_are_those_of_transformers(clip, text, length):
    reference, folder = clip
    expected = reference(text, padding="max_length", truncation=True, max_length=length)["input_ids"]
    ids = Tokenizer(folder / "tokenizer.json", length).encode(text).ids
    assert ids.dtype == np.int64
    assert ids.tolist() == expected


def test_ids_of_random_text_are_those_of_transformers(clip):
    reference, folder = clip
    tokenizer = Tokenizer(folder / "tokenizer.json", LENGTH)
    rng = np.random.default_rng(0)
    ranges = [(0x20, 0x7F), (0xA0, 0x250), (0x3040, 0x30FF), (0x1F600, 0x1F650)]
    for _ in range(300):
        low, high = ranges[rng.integers(len(ranges))]
        text = "".join(chr(rng.choice([0x20, rng.integers(low, high)])) for _ in range(rng.integers(1, 30)))
        expected = reference(text, padding="max_length", truncation=True)["input_ids"]
        assert tokenizer.encode(text).ids.tolist() == expected, ascii(text)


@pytest.mark.parametrize("text", ["a robot!", "!", "wow!! ok", "a! b", "robot " * 20 + "!"])
def test_the_word_of_a_pad_is_a_token_of_its_own_as_in_transformers(clip, text):
    from hyperrt.training.data import clip_tokenizer

    reference, folder = clip_tokenizer.padded(clip[0], "!"), clip[1]
    assert reference.pad_token_id != reference.eos_token_id
    expected = reference(text, padding="max_length", truncation=True)["input_ids"]
    padded = Tokenizer(folder / "tokenizer.json", LENGTH, reference.pad_token_id)
    assert padded.encode(text).ids.tolist() == expected
    plain = Tokenizer(folder / "tokenizer.json", LENGTH).encode(text).ids.tolist()
    assert plain == clip[0](text, padding="max_length", truncation=True)["input_ids"]


@pytest.mark.parametrize("pad", [4, 99])
def test_the_pad_follows_the_end(small, pad):
    assert Tokenizer(small, 5, pad).encode("a b").ids.tolist() == [0, 2, 3, 1, pad]


@pytest.mark.parametrize(
    ("text", "ids", "dropped"),
    [
        ("", [0, 1, 1, 1], ""),
        ("a", [0, 2, 1, 1], ""),
        ("a b", [0, 2, 3, 1], ""),
        ("a b  c a", [0, 2, 3, 1], "c a"),
    ],
)
def test_text_is_set_between_start_and_end_and_what_does_not_fit_is_reported(small, text, ids, dropped):
    encoded = Tokenizer(small, 4).encode(text)
    assert encoded.ids.tolist() == ids
    assert encoded.dropped == dropped


def test_dropped_text_is_the_users_own_letters(clip):
    _, folder = clip
    encoded = Tokenizer(folder / "tokenizer.json", 7).encode("A Robot  on a Beach,\nGOLDEN hour")
    assert encoded.dropped == ",\nGOLDEN hour"


def test_cutting_and_padding_that_the_file_asks_for_are_not_done_unseen(small, tmp_path):
    content = json.loads(small.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 4,
        "pad_type_id": 0,
        "pad_token": "c",
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    encoded = Tokenizer(path, 4).encode("a b c")
    assert (encoded.ids.tolist(), encoded.dropped) == ([0, 2, 3, 1], "c")


def test_a_missing_or_damaged_file_is_a_damaged_bundle(small, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer(path, 4)
    for content in (b"", b"{}", b"\xff\xfe", small.read_bytes()[:-20]):
        path.write_bytes(content)
        with pytest.raises(BundleError, match=r"cannot read the tokenizer"):
            Tokenizer(path, 4)


def test_a_tokenizer_without_start_and_end_is_refused(small, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(small.read_text()), "post_processor": None}))
    with pytest.raises(BundleError, match="not CLIP's"):
        Tokenizer(path, 4)
