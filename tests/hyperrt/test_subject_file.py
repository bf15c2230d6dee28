"""The bytes of a subject file: what is encoded is read again, and what is shown is safe to show."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load

from hyperrt import subject_file
from hyperrt.errors import LoraError

TENSORS = {"unet.b": np.arange(6, dtype=np.float32).reshape(2, 3), "unet.a": np.array(7, np.float32)}


def test_what_is_encoded_is_read_again(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(subject_file.encode(TENSORS, {"class_noun": "Tässchen"}, {"other": "1"}))
    tensors, origin = subject_file.read(path, limit=1000)
    assert origin == {"class_noun": "Tässchen"}
    theirs = load(path.read_bytes())
    assert tensors.keys() == theirs.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].tolist() == theirs[name].tolist() == tensor.tolist()


@pytest.mark.parametrize("start", subject_file.PICKLES)
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path, start):
    wanted = int.from_bytes(start, "little")  # "PK", for example, is a header of 19,280 bytes
    spare = wanted - int.from_bytes(subject_file.encode(TENSORS, {"class_noun": ""}, {})[:8], "little")
    data = subject_file.encode(TENSORS, {"class_noun": "x" * spare}, {})
    assert data.startswith(start)
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    tensors, _ = subject_file.read(path, limit=10**6)
    assert tensors.keys() == TENSORS.keys()


def test_the_limit_is_the_largest_size_that_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(subject_file.encode(TENSORS, {}, {}))
    subject_file.read(path, limit=path.stat().st_size)
    with pytest.raises(LoraError, match="too big"):
        subject_file.read(path, limit=path.stat().st_size - 1)


def test_the_format_is_known_by_the_names():
    for format in subject_file.FORMATS:
        names = subject_file.keys(format, "mid_block.attn2.to_q")
        assert subject_file.format_of(dict.fromkeys(names)) == format


def test_a_difference_is_counted_and_shortened():
    assert subject_file.difference({"a"}, {"a"}) == ""
    words = subject_file.difference({"x\x1b"}, {"a", "b", "c", "d"})
    assert words == "4 missing (4 expected): a, b, c, ...; 1 unknown (4 expected): 'x\\x1b'"
    assert len(subject_file.shown("y" * 999)) == 120
