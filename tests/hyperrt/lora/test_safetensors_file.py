"""Safetensors files: what is encoded is read again, and what is damaged is refused before it is read."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import load

from hyperrt.errors import LoraError
from hyperrt.lora import safetensors_file
from hyperrt.lora.safetensors_file import PICKLES, Stored, encode, read_header, read_tensor

ARRAYS = {"unet.b": np.arange(6, dtype=np.float32).reshape(2, 3), "unet.a": np.array(7, np.float32)}
TENSORS = {name: Stored.of(array) for name, array in ARRAYS.items()}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.safetensors"


def test_what_is_encoded_is_read_again_as_the_library_reads_it(path):
    path.write_bytes(encode(TENSORS, {"class_noun": "Tässchen", "other": "1"}))
    metadata, entries = read_header(path)
    assert metadata == {"class_noun": "Tässchen", "other": "1"}
    theirs = load(path.read_bytes())
    assert list(entries) == list(ARRAYS) and theirs.keys() == entries.keys()
    for name, array in ARRAYS.items():
        found = read_tensor(path, name, entries[name]).array()
        assert found.dtype == np.float32 and found.shape == array.shape
        assert found.tolist() == theirs[name].tolist() == array.tolist()


def test_sixteen_bits_become_thirty_two_exactly(path):
    halves = np.array([[1.5, -0.0, 6e-8]], "<f2")
    brain = np.array([[1.5, -0.0, 1e-40]], "<f4").view("<u4") >> 16
    tensors = {
        "half": Stored("F16", (1, 3), halves.tobytes()),
        "brain": Stored("BF16", (1, 3), brain.astype("<u2").tobytes()),
    }
    path.write_bytes(encode(tensors, {}))
    _, entries = read_header(path)
    half, wide = (read_tensor(path, name, entries[name]).array() for name in ("half", "brain"))
    assert half.tobytes() == halves.astype("<f4").tobytes()
    assert wide.view("<u4").tolist() == [[bits << 16 for bits in brain[0].tolist()]]


@pytest.mark.parametrize("start", PICKLES)
def test_a_header_whose_length_looks_like_a_pickle_is_read(path, start):
    wanted = int.from_bytes(start, "little")  # "PK", for example, is a header of 19,280 bytes
    spare = wanted - int.from_bytes(encode(TENSORS, {"class_noun": ""})[:8], "little")
    data = encode(TENSORS, {"class_noun": "x" * spare})
    assert data.startswith(start)
    path.write_bytes(data)
    assert read_header(path)[1].keys() == TENSORS.keys()


def test_a_header_that_is_too_large_is_refused_unread(path, monkeypatch):
    path.write_bytes(encode(TENSORS, {}))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(safetensors_file, "MAX_HEADER", length)
    read_header(path)
    monkeypatch.setattr(safetensors_file, "MAX_HEADER", length - 1)
    with pytest.raises(LoraError, match=r"header of x\.safetensors is too large"):
        read_header(path)


def test_a_length_beyond_the_file_is_refused_and_nothing_is_allocated(path):
    for claimed in (2**63 - 1, 2**40, 100):
        path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
        with pytest.raises(LoraError, match="damaged"):
            read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        "{}{}",
        "[1]",
        '{"a": 1}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        '{"a": {"dtype": "F32", "shape": [4611686018427387904, 4], "data_offsets": [0, 8]}}',
        '{"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}',
        '{"__metadata__": {"a": 1}}',
        '{"\\ud800": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        "[" * 10_000,
    ],
    ids=["two", "list", "number", "short", "hole", "overflow", "type", "metadata", "surrogate", "deep"],
)
def test_a_header_that_does_not_describe_its_file_is_refused(path, header):
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(LoraError, match="damaged"):
        read_header(path)


def test_a_file_that_is_cut_between_header_and_numbers_is_an_error_and_no_crash(path):
    path.write_bytes(encode(TENSORS, {}))
    _, entries = read_header(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(LoraError, match="cut while it was read"):
        read_tensor(path, "unet.a", entries["unet.a"])


def test_numbers_of_another_type_are_refused_by_name(path):
    header = json.dumps({"a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}})
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    _, entries = read_header(path)
    with pytest.raises(LoraError, match="a is I64"):
        read_tensor(path, "a", entries["a"])
