"""Requests to the runtime, and a function that draws their latents and pictures.

bench/same_latents.py runs this file with the packages of two commits, and a test compares a few requests with
a file. So it imports only NumPy and the public names of `hyperrt`. With one thread of ONNX Runtime and fixed
seeds, a processor computes the same bits each time.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import hyperrt

PHOTOS = Path(__file__).resolve().parents[1] / "examples" / "subjects"
MUG, ROBOT, CAR = "a [V] mug on a beach", "a [V] robot in the snow", "a [V] car at night"
DEFAULTS = {"seed": 7, "steps": 4}
SOLVERS = ("ddim", "dpmpp_2m", "euler", "euler_ancestral")


class Request(NamedTuple):
    """A call of `Runtime.generate`.

    Attributes:
        subject: a folder of photos in examples/subjects, optionally with a space and a word: "product"
            combines the photos by product, "photo" uses the first alone, "diffusers", "peft" and "kohya" load
            the LoRA from a file of that format. A list for a list of prompts.
        options: of `generate`, in addition to DEFAULTS.
        low_memory: of `Runtime.open`.
    """

    prompt: str | list[str]
    subject: str | list[str | None] | None
    options: Mapping[str, Any] = {}
    low_memory: bool = False


# Few steps: processors round differently, and each step adds to the difference.
KEPT = {
    "no subject": Request("a mug on a beach", None, {"steps": 2}),
    "subject": Request(MUG, "mug"),
    "CFG with a negative prompt": Request(
        ROBOT, "robot", {"cfg": True, "negative_prompt": "a house", "solver": "ddim"}
    ),
    "kappa and a generic prompt": Request(CAR, "car", {"kappa": 0.4, "generic_prompt": "a red car at night"}),
    "several pictures in batches": Request(
        MUG, "mug", {"n": 3, "batch_size": 2, "solver": "euler_ancestral", "steps": 2}
    ),
    "a subject file": Request(ROBOT, "robot diffusers", {"strength": 0.7, "solver": "euler"}),
}
REQUESTS = {
    **KEPT,
    "the bundle's defaults": Request(MUG, "mug", {"steps": None}),
    "no subject, the bundle's defaults": Request("a robot", None, {"steps": None}),
    "no subject, a negative prompt": Request(
        "a robot", None, {"negative_prompt": "snow", "guidance_scale": 3.0}
    ),
    "one step": Request(MUG, "mug", {"steps": 1}),
    "another seed": Request(MUG, "mug", {"seed": 2**40}),
    **{f"kappa {kappa:g}": Request(MUG, "mug", {"kappa": kappa}) for kappa in (0.0, 1.6, 2.0)},
    **{solver: Request(ROBOT, "robot", {"solver": solver, "steps": 7}) for solver in SOLVERS},
    "CFG": Request(MUG, "mug", {"cfg": True}),
    "CFG, guidance 4": Request(MUG, "mug", {"cfg": True, "guidance_scale": 4.0}),
    "guidance 0.5: two branches": Request(MUG, "mug", {"guidance_scale": 0.5}),
    "guidance 5": Request(MUG, "mug", {"guidance_scale": 5.0}),
    "a negative prompt": Request(MUG, "mug", {"negative_prompt": "a house in the snow"}),
    "a generic prompt": Request(MUG, "mug", {"generic_prompt": "a blue mug on a table"}),
    "a long prompt": Request(f"a [V] mug {'very ' * 100}far away", "mug"),
    "strength 0": Request(MUG, "mug", {"strength": 0.0}),
    "strength -1": Request(MUG, "mug", {"strength": -1.0}),
    "three pictures, one a call": Request(MUG, "mug", {"n": 3}),
    "three pictures in a call": Request(MUG, "mug", {"n": 3, "batch_size": 3, "solver": "euler_ancestral"}),
    "one photo": Request(MUG, "mug photo"),
    "combined as product": Request(CAR, "car product"),
    "a file for PEFT": Request(CAR, "car peft"),
    "a file for kohya": Request(CAR, "car kohya"),
    "low memory": Request(MUG, "mug", low_memory=True),
    "low memory, no subject": Request("a mug", None, {"n": 2}, low_memory=True),
}
# Several subjects in one call; not for bundles with a refitted LoRA.
SEVERAL = {
    "several subjects": Request([MUG, ROBOT, CAR], ["mug", "robot", "car product"]),
    "several subjects, pictures and solver": Request(
        [MUG, "a house", MUG], ["mug", None, "mug"], {"n": 2, "batch_size": 2, "solver": "euler_ancestral"}
    ),
    "several subjects, CFG": Request([ROBOT, MUG], ["robot", "mug"], {"cfg": True}),
    "several subjects, low memory": Request([MUG, CAR], ["mug", "car"], {"kappa": 1.6}, low_memory=True),
}
# For the open category, in which photos also become image tokens.
IMAGE_TOKENS = {
    f"image scale {scale:g}": Request(MUG, "mug", {"image_scale": scale}) for scale in (0.0, 0.5, 2.0)
}


def main() -> None:
    """Draws every request of every bundle; writes latents.npz and images.npz, "BUNDLE/REQUEST" -> array.

    Arguments: root of the checkout, a folder for subject files (existing ones are read), a folder for the
    arrays, and as JSON: BUNDLE -> [name or folder, names of its groups of requests].
    """
    logging.getLogger("hyperrt").setLevel(logging.ERROR)  # no warning about the long prompt
    root, files, output = map(Path, sys.argv[1:4])
    latents, images = {}, {}
    for name, (bundle, groups) in json.loads(sys.argv[4]).items():
        requests = {key: request for group in groups for key, request in globals()[group].items()}
        (files / name).mkdir(parents=True, exist_ok=True)
        for key, results in draw(bundle, requests, files / name).items():
            latents[f"{name}/{key}"] = np.stack([result.latents for result in results])
            images[f"{name}/{key}"] = np.stack([result.images for result in results])
    check_origin(root)
    np.savez(output / "latents.npz", **latents)
    np.savez(output / "images.npz", **images)


def draw(bundle: str, requests: Mapping[str, Request], files: Path) -> dict[str, list[hyperrt.Result]]:
    """The results of each request, one for each prompt.

    Args:
        bundle: name or folder.
        files: folder of the subject files; missing ones are written.
    """
    results = {}
    for low_memory in (False, True):
        chosen = {key: request for key, request in requests.items() if request.low_memory == low_memory}
        if not chosen:
            continue
        with hyperrt.Runtime.open(bundle, "onnxruntime", threads=1, low_memory=low_memory) as runtime:
            subject_of = functools.cache(functools.partial(subject, runtime, files))
            for key, request in chosen.items():
                several = isinstance(request.prompt, list)
                names = request.subject if several else [request.subject]
                subjects = [name and subject_of(name) for name in names]
                options = {**DEFAULTS, **request.options}
                result = runtime.generate(request.prompt, subjects if several else subjects[0], **options)
                results[key] = result if several else [result]
    return results


def subject(runtime: hyperrt.Runtime, files: Path, name: str) -> hyperrt.Subject:
    """The subject that a request names; see `Request`."""
    noun, _, way = name.partition(" ")
    photos = PHOTOS / noun
    if way == "photo":
        return runtime.personalize(photos / "1.png", noun)
    result = runtime.personalize(photos, noun, combine=way if way == "product" else "mean")
    if way not in ("diffusers", "peft", "kohya"):
        return result
    path = files / f"{name}.safetensors"
    if not path.exists():
        tokens = None if way == "kohya" else result.image_tokens  # kohya's format has none
        layout = runtime.bundle.layout
        if hasattr(result, "save"):
            result.save(path, way)
        else:  # a commit before Subject.save
            hyperrt.save_subject(path, result.lora, layout, result.metadata, way, image_tokens=tokens)
    return runtime.load_subject(path)


def check_origin(root: Path) -> None:
    """Refuses packages of another checkout, such as an installed one."""
    for name, module in sys.modules.items():
        path = getattr(module, "__file__", None)
        if name.split(".")[0] in ("hyperrt", "engines") and path and not Path(path).is_relative_to(root):
            raise SystemExit(f"{name} was imported from {path}, not from {root}")
