"""A bundle whose graphs are Python functions on the fake backend: for tests of everything above the engines.

The functions keep what matters of the real graphs: rows of a batch do not touch each other, a gate of 0 is
the base model, the prompt enters by the context, and the step is the solver's. `register()` makes them known
to the backend.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hyperrt.engines import fake
from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.sampling import solvers
from hyperrt.session.adapter import write_context

S, T, F, L, D, W, C, SIZE, IMAGE = 8, 2, 3, 8, 4, 12, 4, 4, 16
P, E, TOKENS, WIDTH, PAD_2 = 5, 3, 2, 4, 2
BASE_MODEL, HYPERNET = "b" * 64, "c" * 64
LAYOUT = LoraLayout(
    tuple(
        Site(f"{block}.attentions.0.transformer_blocks.0.attn2.{projection}", 4, 3)
        for block in ("down_blocks.0", "mid_block")
        for projection in ("to_q", "to_k", "to_v")
    ),
    rank=2,
)
NQ, NKV = LAYOUT.size("lora_q"), LAYOUT.size("lora_kv")

Shape = tuple[int | str, ...]
TENSORS: dict[str, tuple[dict[str, Shape], dict[str, Shape]]] = {
    "image_encoder": ({"pixels": ("photos", 3, S, S)}, {"features": ("photos", T, F)}),
    "weight_decoder": (
        {"features": ("photos", T, F)},
        {"lora_q": ("photos", NQ), "lora_kv": ("photos", NKV)},
    ),
    "text_encoder": ({"input_ids": ("prompts", L)}, {"hidden_states": ("prompts", L, D)}),
    "context": (
        {"hidden_states": ("rows", L, D), "gate": ("rows",), "lora_kv": ("subjects", NKV)},
        {"context": ("rows", L, W)},
    ),
    "denoiser": (
        {
            "latents": ("images", C, SIZE, SIZE),
            "previous": ("images", C, SIZE, SIZE),
            "noise": ("images", C, SIZE, SIZE),
            "timestep": (),
            "coefficients": (7,),
            "guidance": ("branches",),
            "context": ("rows", L, W),
            "gate": ("rows",),
            "lora_q": ("subjects", NQ),
        },
        {"next_latents": ("images", C, SIZE, SIZE), "denoised": ("images", C, SIZE, SIZE)},
    ),
    "vae_decoder": ({"latents": ("images", C, SIZE, SIZE)}, {"pixels": ("images", 3, IMAGE, IMAGE)}),
}
SDXL: dict[str, tuple[dict[str, Shape], dict[str, Shape]]] = {  # what a second text encoder adds
    "text_encoder": ({"input_ids_2": ("prompts", L)}, {"pooled": ("prompts", P)}),
    "context": ({"pooled": ("rows", P), "time_ids": ("rows", 6)}, {"added": ("rows", E)}),
    "denoiser": ({"added": ("rows", E)}, {}),
}
OPEN: dict[str, tuple[dict[str, Shape], dict[str, Shape]]] = {  # what an image prompt adds
    "image_prompt": (
        {"features": ("photos", T, F)},
        {"image_tokens": ("photos", TOKENS, WIDTH), "zero_tokens": (1, TOKENS, WIDTH)},
    ),
    "context": ({"image_tokens": ("rows", TOKENS, WIDTH), "image_scale": ("rows",)}, {}),
}
WORDS = ("a", "the", "on", "in", "robot", "mug", "cat", "beach", "snow", "red", "sks", ",", "blurry")
calls: list[str] = []  # names of the graphs that ran, in order


def _image_encoder(t: dict[str, Any]) -> dict[str, Any]:
    pixels = t["pixels"]
    return {"features": np.stack([pixels.mean((2, 3)), pixels.std((2, 3))], axis=1)}


def _weight_decoder(t: dict[str, Any]) -> dict[str, Any]:
    flat = t["features"].reshape(len(t["features"]), -1)
    ramp = np.linspace(0, 3, NQ + NKV, dtype=np.float32)
    weights = np.sin(flat.sum(1, keepdims=True) + ramp)
    return {"lora_q": weights[:, :NQ], "lora_kv": weights[:, NQ:]}


def _image_prompt(t: dict[str, Any]) -> dict[str, Any]:
    mean = t["features"].mean((1, 2))[:, None, None]
    ramp = np.arange(1, 1 + TOKENS * WIDTH, dtype=np.float32).reshape(1, TOKENS, WIDTH)
    return {"image_tokens": mean * ramp, "zero_tokens": ramp}


def _text_encoder(t: dict[str, Any]) -> dict[str, Any]:
    ramp = np.linspace(0.1, 1, D, dtype=np.float32)
    told = {"hidden_states": t["input_ids"][..., None].astype(np.float32) * ramp}
    if "input_ids_2" in t:
        told["pooled"] = t["input_ids_2"][:, :P].astype(np.float32) + 1
    return told


def _context(t: dict[str, Any]) -> dict[str, Any]:
    words = np.repeat(t["hidden_states"].sum(2, keepdims=True), W, axis=2)
    for row, gate in enumerate(t["gate"]):
        lora_kv = t["lora_kv"][row % len(t["lora_kv"])]
        write_context(LAYOUT, words[row].copy(), t["hidden_states"][row], lora_kv, float(gate), words[row])
    if "image_tokens" in t:
        words = words + (t["image_scale"] * t["image_tokens"].sum((1, 2)))[:, None, None]
    told = {"context": words}
    if "pooled" in t:
        added = t["pooled"].sum(1) + t["time_ids"].sum(1) / 100
        told["added"] = np.repeat(added[:, None], E, axis=1)
    return told


def _denoiser(t: dict[str, Any]) -> dict[str, Any]:
    images, branches = len(t["latents"]), len(t["guidance"])
    x = np.tile(t["latents"] * t["coefficients"][0], (branches, 1, 1, 1))
    lora_q = t["lora_q"] if "lora_q" in t else _of_constants(t)
    told = np.tanh(t["context"].mean((1, 2)) / 10) + t["gate"] * lora_q.sum(1) + t["timestep"] / 1000
    if "added" in t:
        told = told + t["added"].mean(1) / 10
    out = (0.5 * x + told[:, None, None, None]).reshape(branches, images, *x.shape[1:])
    summed = np.einsum("b,b...->...", t["guidance"], out).astype(np.float32)
    after, denoised = solvers.apply(t["coefficients"], t["latents"], summed, t["previous"], t["noise"])
    return {"next_latents": after.astype(np.float32), "denoised": denoised.astype(np.float32)}


def _of_constants(t: dict[str, Any]) -> Any:
    return np.concatenate([t[spec.name].ravel() for spec in LAYOUT.constants("lora_q")])[None]


def _vae_decoder(t: dict[str, Any]) -> dict[str, Any]:
    large = t["latents"][:, :3].repeat(IMAGE // SIZE, axis=2).repeat(IMAGE // SIZE, axis=3)
    return {"pixels": np.sin(large)}  # never flat, however large the latents get


GRAPHS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "image_encoder": _image_encoder,
    "image_prompt": _image_prompt,
    "weight_decoder": _weight_decoder,
    "text_encoder": _text_encoder,
    "context": _context,
    "denoiser": _denoiser,
    "vae_decoder": _vae_decoder,
}


def register(**replaced: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Make the functions known to the fake backend, some of them replaced."""
    for name, function in {**GRAPHS, **replaced}.items():
        fake.FUNCTIONS[name] = _counted(name, function)
    calls.clear()


def write(
    folder: Path, sdxl: bool = False, open_category: bool = False, refit: bool = False, **changes: Any
) -> Path:
    """The bundle in `folder`, with top-level fields of the manifest changed; returns the folder.

    Args:
        sdxl: with a second text encoder, pooled text and time ids.
        open_category: with an image prompt.
        refit: the denoiser's LoRA enters by refit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graphs = {}
    for name, (inputs, outputs) in _tensors(sdxl, open_category).items():
        specs = {"inputs": _specs(inputs), "outputs": _specs(outputs)}
        if refit and name == "denoiser":
            specs["inputs"] = [spec for spec in specs["inputs"] if spec["name"] != "lora_q"]
            specs["weights"] = _specs({spec.name: spec.shape for spec in LAYOUT.constants("lora_q")})
        content = json.dumps({"function": name, **specs}).encode()
        (folder / f"{name}.onnx").write_bytes(content)
        graphs[name] = {"file": f"{name}.onnx", "sha256": hashlib.sha256(content).hexdigest(), **specs}
    _write_tokenizer(folder / "tokenizer.json")
    (folder / "LICENSES").write_text("none\n")
    tokenizer = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    manifest = {**_manifest(graphs), "tokenizer_sha256": tokenizer}
    if sdxl:
        manifest["prompts"] |= {"pad_2": PAD_2, "zero_empty": True}
    if refit:
        manifest["adapt"] = "refit"
    if open_category:
        manifest["image_prompt"] = {"tokens": TOKENS, "width": WIDTH, "scale": 0.55}
    manifest |= changes
    (folder / "bundle.json").write_text(json.dumps(manifest))
    return folder


def _counted(name: str, function: Callable[[dict[str, Any]], dict[str, Any]]) -> fake.Function:
    def run(tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append(name)
        return function(tensors)

    return run


def _tensors(sdxl: bool, open_category: bool) -> dict[str, tuple[dict[str, Shape], dict[str, Shape]]]:
    """Inputs and outputs of every graph."""
    found = dict(TENSORS)
    for more in [SDXL] * sdxl + [OPEN] * open_category:
        for name, (inputs, outputs) in more.items():
            before = found.get(name, ({}, {}))
            found[name] = ({**before[0], **inputs}, {**before[1], **outputs})
    return found


def _specs(tensors: dict[str, Shape]) -> list[dict[str, Any]]:
    return [
        {"name": name, "shape": list(shape), "dtype": "int64" if name.startswith("input_ids") else "float32"}
        for name, shape in tensors.items()
    ]


def _manifest(graphs: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": 1,
        "family": "tiny",
        "name": "pretend",
        "created_by": "tests",
        "image_size": IMAGE,
        "latent": {"channels": C, "size": SIZE},
        "prediction_type": "epsilon",
        "betas": {"schedule": "scaled_linear", "start": 0.00085, "end": 0.012, "steps": 1000},
        "defaults": {"solver": "ddim", "steps": 4, "guidance_scale": 1.5, "kappa": 1.0},
        "graphs": graphs,
        "lora": {**LAYOUT.to_json(), "hash": LAYOUT.hash},
        "adapt": "inputs",
        "preprocess": {"size": S, "mean": [0.5] * 3, "std": [0.5] * 3, "resample": "bicubic", "crop": "pad"},
        "prompts": {
            "placeholder": "[V]",
            "token": "sks",
            "max_tokens": L,
            "default_class": "robot",
            "nouns": ["robot", "mug", "cat"],
        },
        "hashes": {"base_model": BASE_MODEL, "hypernet": HYPERNET},
        "precision": "fp32",
        "storage": "fp32",
        "parity": {},
    }


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<start>", "<end>", "<unknown>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    tokenizer.save(str(path))
