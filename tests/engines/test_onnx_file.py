"""Every file that an ONNX file names for its weights is found, wherever the name stands."""

from __future__ import annotations

import pytest

from hyperrt.engines.onnx_file import external_files
from tests.engines.onnx_bytes import external_graph, external_tensor, field

TENSOR = external_tensor(b"w.data")
CONSTANT = field(1, field(5, field(5, TENSOR)))  # of a graph: a node with an attribute that is a tensor
NUMBERS = b"\x08\xff\x01" + b"\x09" + bytes(8) + b"\x0d" + bytes(4)  # fields of 7 bits a byte, 8 and 4 bytes
PLACES = {
    "initializer": field(7, field(5, TENSOR)),
    "sparse initializer": field(7, field(15, field(1, TENSOR))),
    "constant": field(7, CONSTANT),
    "one of an attribute's tensors": field(7, field(1, field(5, field(10, TENSOR)))),
    "branch of an If": field(7, field(1, field(5, field(6, CONSTANT)))),
    "function": field(25, field(7, field(5, field(5, TENSOR)))),
    "second part of a graph": field(7, field(2, b"main")) + field(7, field(5, TENSOR)),
    "behind numbers of every type": NUMBERS + external_graph(b"w.data"),
    "length of two bytes": b"\x3a" + bytes([len(field(5, TENSOR)) | 0x80, 0]) + field(5, TENSOR),
}


def files_of(tmp_path, content: bytes) -> set[bytes]:
    (tmp_path / "graph.onnx").write_bytes(content)
    return external_files(tmp_path / "graph.onnx")


@pytest.mark.parametrize("content", PLACES.values(), ids=PLACES)
def test_a_name_is_found_wherever_it_stands(tmp_path, content):
    assert files_of(tmp_path, content) == {b"w.data"}


def test_of_a_key_that_has_two_values_both_are_found(tmp_path):
    entry = field(1, b"location") + field(2, b"first") + field(2, b"second")
    assert files_of(tmp_path, field(7, field(5, field(13, entry)))) == {b"first", b"second"}


def test_a_value_before_its_key_is_found(tmp_path):
    entry = field(2, b"w.data") + field(1, b"location")
    assert files_of(tmp_path, field(7, field(5, field(13, entry)))) == {b"w.data"}


def test_the_word_in_another_place_is_no_name(tmp_path):
    node = field(1, field(3, b"allocation") + field(1, b"location"))
    other_key = field(5, field(13, field(1, b"location of it") + field(2, b"x")))
    assert files_of(tmp_path, field(7, node + other_key)) == set()


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_file_that_ends_too_early_is_refused(tmp_path, cut):
    with pytest.raises(ValueError, match="byte"):
        files_of(tmp_path, external_graph(b"a-name-of-thirty-bytes-in-all")[:-cut])


@pytest.mark.parametrize("content", [b"", b"\x0blocation", b"\xff" * 11 + b"location"], ids=range(3))
def test_what_is_no_protobuf_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"empty|type 3|does not end"):
        files_of(tmp_path, content)


def test_what_the_onnx_package_writes_is_read(tmp_path):
    onnx = pytest.importorskip("onnx")
    import numpy as np

    weights = onnx.numpy_helper.from_array(np.zeros((4, 4), np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [weights])
    where = {"save_as_external_data": True, "location": "w.data", "size_threshold": 0}
    onnx.save(onnx.helper.make_model(graph), tmp_path / "graph.onnx", **where)
    assert external_files(tmp_path / "graph.onnx") == {b"w.data"}
