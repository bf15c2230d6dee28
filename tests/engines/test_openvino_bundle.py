"""The packaged tiny bundle on OpenVINO: as on ONNX Runtime, and the bits of one LoRA come back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hyperrt import engines

pytest.importorskip("openvino")
BUNDLE = Path(engines.__file__).parents[1] / "hyperrt" / "bundles" / "tiny"
GRAPHS = json.loads((BUNDLE / "bundle.json").read_text(encoding="utf-8"))["graphs"]
SIZES = {"photos": 2, "prompts": 3, "images": 1, "branches": 3, "rows": 3, "subjects": 1}
WORDS = 600  # ids below are in the vocabulary


def opened(graph, backend="openvino", **options):
    exact = {"precision": "f32"} if backend == "openvino" else {}
    return engines.open(BUNDLE / GRAPHS[graph]["file"], backend, threads=1, **exact, **options)


def feeds(graph, seed=0, **sizes):
    rng, made = np.random.default_rng(seed), {}
    for spec in GRAPHS[graph]["inputs"]:
        shape = [(SIZES | sizes).get(dim, dim) for dim in spec["shape"]]
        scale = 0.2 if spec["name"].startswith("lora_") else 1
        made[spec["name"]] = np.asarray(scale * rng.standard_normal(shape), np.float32)
        if spec["dtype"] == "int64":
            made[spec["name"]] = rng.integers(0, WORDS, shape)
    if "timestep" in made:
        made["timestep"] = np.array(500, np.float32)
    return made


@pytest.mark.parametrize("fixed", [False, True], ids=["any size", "fixed sizes"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_computes_what_it_does_on_onnxruntime(graph, fixed):
    pytest.importorskip("onnxruntime")
    more = {} if fixed else {"photos": 1, "prompts": 2, "images": 2, "rows": 6}
    cases = [feeds(graph), feeds(graph, **more), feeds(graph, **more, subjects=(SIZES | more)["rows"])]
    with (
        opened(graph, sizes=SIZES if fixed else None) as engine,
        opened(graph, "onnxruntime") as reference,
    ):
        for case in cases[:1] if fixed else cases:
            wanted = reference.run(case)
            for name, found in engine.run(case).items():
                error = np.abs(found - wanted[name]).max()
                assert error <= 1e-4 * np.abs(wanted[name]).max(), name


@pytest.mark.parametrize("subjects", [1, 3])
@pytest.mark.parametrize("fixed", [False, True], ids=["any size", "fixed sizes"])
def test_a_lora_gives_its_bits_again_and_a_closed_gate_those_of_the_base_model(fixed, subjects):
    sizes = SIZES | {"subjects": subjects}
    rest = feeds("denoiser", subjects=subjects) | {"gate": np.array([0, 1, 1], np.float32)}
    first, second = (rest.pop("lora_q"), feeds("denoiser", seed=1, subjects=subjects)["lora_q"])
    closed = rest | {"gate": np.zeros(3, np.float32)}
    with opened("denoiser", sizes=sizes if fixed else None) as engine:

        def bits(lora, others):
            engine.bind({"lora_q": lora})
            return engine.run(others)["denoised"].tobytes()

        a, b, again = bits(first, rest), bits(second, rest), bits(first, rest)
        assert a == again != b
        assert bits(0 * first, rest) == bits(first, closed) == bits(second, closed) != a
