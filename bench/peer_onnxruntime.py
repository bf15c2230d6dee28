"""Times plain ONNX Runtime: one row of the UNet, and a change of subject.

    python peer_onnxruntime.py step   FOLDER
    python peer_onnxruntime.py switch FOLDER

`step`: the UNet as torch.onnx.export writes it, fp32, one row a call, no LoRA: the time of one branch.
`switch`: ms from LoRA tensors in memory to a session that computes with them. NumPy adds the LoRA to the
weights, and a session is opened on the same file with these weights in place of the file's.
Runs in the environment `onnxruntime`; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import peer_timing
from safetensors import safe_open
from safetensors.numpy import load_file


def main() -> None:
    args = peer_timing.options(__doc__).parse_args()
    results = step(args) if args.what == "step" else {"onnxruntime_reload_ms": switch(args)}
    print(json.dumps(results | {"versions": peer_timing.versions("onnxruntime")}))


def session(args: argparse.Namespace, merged: dict[str, np.ndarray] | None = None) -> ort.InferenceSession:
    """A session on the UNet; `merged` replaces initialisers by name."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = args.threads
    options.log_severity_level = 3
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in (merged or {}).items()}
    if values:
        options.add_external_initializers(list(values), list(values.values()))
    path = args.folder / "onnxruntime" / "unet.onnx"
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def step(args: argparse.Namespace) -> dict[str, object]:
    """Seconds of one row."""
    opened = session(args)
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in opened.get_inputs():
        if spec.name == "timestep":
            feeds[spec.name] = np.full(spec.shape, 501, np.int64)
        else:
            feeds[spec.name] = rng.standard_normal(spec.shape, np.float32)
    return peer_timing.repeat(lambda: opened.run(None, feeds), args)


def weights(folder: Path) -> dict[str, np.ndarray]:
    """The base model's adapted weights [in, out], contiguous, under their names in the graph."""
    names = json.loads((folder / "onnxruntime" / "sites.json").read_text())
    targets = {f"{path}.weight": name for path, name in names.items()}
    arrays = {}
    for path in (folder / "diffusers" / "unet").glob("*.safetensors"):  # SDXL has two
        with safe_open(path, "numpy") as file:
            for key in targets.keys() & file.keys():
                arrays[targets[key]] = np.ascontiguousarray(file.get_tensor(key).T)
    return arrays


def merge(
    base: dict[str, np.ndarray], names: dict[str, str], lora: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Base weights plus the LoRA, under their names in the graph."""
    merged = {}
    for path, name in names.items():
        key = "lora_unet_" + path.replace(".", "_")
        down, up = lora[f"{key}.lora_down.weight"], lora[f"{key}.lora_up.weight"]
        merged[name] = base[name] + down.T @ up.T
    return merged


def switch(args: argparse.Namespace) -> dict[str, object]:
    """Seconds of a change of subject; closes the old session before it opens the next, to save memory."""
    base = weights(args.folder)
    names = json.loads((args.folder / "onnxruntime" / "sites.json").read_text())
    subjects = [load_file(args.folder / "lora" / f"{name}.safetensors") for name in "ab"]
    state: dict[str, object] = {"turn": 0}

    def change() -> None:
        state.pop("session", None)
        state["turn"] = 1 - state["turn"]
        state["session"] = session(args, merge(base, names, subjects[state["turn"]]))

    return peer_timing.repeat(change, args)


if __name__ == "__main__":
    main()
