"""Writes the ONNX graphs of this folder, which are stored so that an install without `onnx` can test.

    python tests/engines/graphs/make.py

affine: y = x w + step lora, same = x, with w = [[1, 0], [0, 1], [1, 1]].
x ["rows", 3], lora ["subjects", 2], step [] int64 -> y ["rows", 2], same ["rows", 3].

refittable: y = x w + b, with w [3, 2] of ones and b [1, 2] of zeros, that a refit replaces.
x ["rows", 3] -> y ["rows", 2].

halves: y = x w in half precision, with w [3, 2] of ones.  x ["rows", 3] -> y ["rows", 2].
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = Path(__file__).parent
FLOAT, HALF, INT = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def model(nodes, inputs, outputs, constants=()):
    """A checked model of IR version 10, opset 20, that names no producer version."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, list(constants))
    built = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(built)
    return built


def affine():
    tensor = helper.make_tensor_value_info
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["projected"]),
            helper.make_node("Cast", ["step"], ["strength"], to=FLOAT),
            helper.make_node("Mul", ["lora", "strength"], ["shift"]),
            helper.make_node("Add", ["projected", "shift"], ["y"]),
            helper.make_node("Identity", ["x"], ["same"]),
        ],
        [tensor("x", FLOAT, ["rows", 3]), tensor("lora", FLOAT, ["subjects", 2]), tensor("step", INT, [])],
        [tensor("y", FLOAT, ["rows", 2]), tensor("same", FLOAT, ["rows", 3])],
        [numpy_helper.from_array(np.array([[1, 0], [0, 1], [1, 1]], np.float32), "w")],
    )


def refittable():
    tensor = helper.make_tensor_value_info
    return model(
        [
            helper.make_node("MatMul", ["x", "w"], ["projected"]),
            helper.make_node("Add", ["projected", "b"], ["y"]),
        ],
        [tensor("x", FLOAT, ["rows", 3]), tensor("w", FLOAT, [3, 2]), tensor("b", FLOAT, [1, 2])],
        [tensor("y", FLOAT, ["rows", 2])],
        [
            numpy_helper.from_array(np.ones((3, 2), np.float32), "w"),
            numpy_helper.from_array(np.zeros((1, 2), np.float32), "b"),
        ],
    )


def halves():
    tensor = helper.make_tensor_value_info
    return model(
        [
            helper.make_node("Cast", ["x"], ["half_x"], to=HALF),
            helper.make_node("MatMul", ["half_x", "w"], ["half_y"]),
            helper.make_node("Cast", ["half_y"], ["y"], to=FLOAT),
        ],
        [tensor("x", FLOAT, ["rows", 3])],
        [tensor("y", FLOAT, ["rows", 2])],
        [numpy_helper.from_array(np.ones((3, 2), np.float16), "w")],
    )


GRAPHS = {"affine.onnx": affine, "refittable.onnx": refittable, "halves.onnx": halves}

if __name__ == "__main__":
    for name, build in GRAPHS.items():
        (HERE / name).write_bytes(build().SerializeToString(deterministic=True))
