"""Times openvino.genai's Text2ImagePipeline: a step, and a change of subject.

    python peer_openvino_genai.py step   FOLDER [--mode auto|fuse] [--precision fp32|bf16]
    python peer_openvino_genai.py switch FOLDER

`step`: the time of an iteration in its metrics, with classifier-free guidance at 512 x 512, one call of two
rows, fixed shapes, and the LoRA on both rows (it cannot be on one). `auto` is its default mode, in which the
LoRA can be changed; `fuse` merges the LoRA into the weights permanently.
`switch`: ms from safetensors bytes in memory to an adapter that is set in the UNet.  The extra time of the
first step after that is reported, too.  Pictures have 64 x 64 pixels, so that steps are short.
Runs in the environment `openvino_genai`; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import openvino as ov
import openvino_genai as genai
import peer_timing

GUIDANCE = 7.5
SMALL, TOKENS = 64, 77  # side of the picture in pixels for `switch`; length of a text


def main() -> None:
    parser = peer_timing.options(__doc__)
    parser.add_argument("--mode", choices=("auto", "fuse"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args()
    results = step(args) if args.what == "step" else {"openvino_genai_ms": switch(args)}
    print(json.dumps(results | {"versions": peer_timing.versions("openvino-genai", "openvino")}))


def pipeline(args: argparse.Namespace, size: int, adapter: genai.Adapter) -> genai.Text2ImagePipeline:
    """The pipeline compiled for pictures of this size, with the adapter."""
    mode = genai.AdapterConfig.Mode.MODE_FUSE if args.mode == "fuse" else genai.AdapterConfig.Mode.MODE_AUTO
    pipe = genai.Text2ImagePipeline(str(args.folder / "openvino_genai"))
    pipe.reshape(1, size, size, GUIDANCE)
    pipe.compile(
        "CPU",
        adapters=genai.AdapterConfig(adapter, 1.0, mode),
        INFERENCE_PRECISION_HINT=args.precision.replace("fp", "f"),
        INFERENCE_NUM_THREADS=args.threads,
    )
    return pipe


def adapter(args: argparse.Namespace, name: str) -> genai.Adapter:
    """A subject's LoRA from bytes in memory."""
    data = np.fromfile(args.folder / "lora" / f"{name}.safetensors", np.uint8)
    return genai.Adapter(ov.Tensor(data))


def step(args: argparse.Namespace) -> dict[str, object]:
    """Seconds of an iteration of the loop, over two rows."""
    pipe = pipeline(args, 512, adapter(args, "a"))
    rounds = args.warm_up + args.rounds
    pipe.generate("a cat on a beach", num_inference_steps=rounds, guidance_scale=GUIDANCE, rng_seed=0)
    metrics = pipe.get_performance_metrics()
    raw = metrics.raw_metrics
    loops = [x / 1e6 if x > 1e3 else x / 1e3 for x in raw.iteration_durations]
    print("iterations", raw.iteration_durations, "unet", raw.unet_inference_durations, file=sys.stderr)
    return peer_timing.summary(loops[args.warm_up :])


def switch(args: argparse.Namespace) -> dict[str, object]:
    """Seconds from the bytes of a LoRA to a UNet that computes with it."""
    data = [np.fromfile(args.folder / "lora" / f"{name}.safetensors", np.uint8) for name in "ab"]
    unet = genai.UNet2DConditionModel(str(args.folder / "openvino_genai" / "unet"))
    unet.reshape(2, SMALL, SMALL, TOKENS)
    unet.compile(
        "CPU",
        adapters=genai.AdapterConfig(genai.Adapter(ov.Tensor(data[0])), 1.0),
        INFERENCE_PRECISION_HINT="f32",
        INFERENCE_NUM_THREADS=args.threads,
    )
    rng = np.random.default_rng(0)
    for name, shape in texts(args.folder).items():
        unet.set_hidden_states(name, ov.Tensor(rng.standard_normal(shape, np.float32)))
    latents = ov.Tensor(rng.standard_normal((2, 4, SMALL // 8, SMALL // 8), np.float32))
    time = ov.Tensor(np.array([501], np.int64))
    turn = 0
    noises = []

    def change() -> None:
        nonlocal turn
        turn += 1
        adapter = genai.Adapter(ov.Tensor(data[turn % 2]))
        unet.set_adapters(genai.AdapterConfig(adapter, 1.0))

    def step() -> float:
        start = perf_counter()
        noises.append(np.array(unet.infer(latents, time).data))
        return perf_counter() - start

    changes, first, later = [], [], []
    for _ in range(args.warm_up + args.rounds):
        start = perf_counter()
        change()
        changes.append(perf_counter() - start)
        first.append(step())
        later.append(step())
        print(f"{changes[-1]:.5f} s, steps {first[-1]:.4f} {later[-1]:.4f} s", file=sys.stderr)
    if np.array_equal(noises[0], noises[2]) or not np.array_equal(noises[0], noises[4]):
        raise SystemExit("an adapter has no effect, or gives another result the second time")
    extra = [a - b for a, b in zip(first, later, strict=True)][args.warm_up :]
    return peer_timing.summary(changes[args.warm_up :]) | {"first_step_more_s": median(extra)}


def texts(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the UNet's conditioning for two texts."""
    config = json.loads((folder / "openvino_genai" / "unet" / "config.json").read_text())
    shapes = {"encoder_hidden_states": (2, TOKENS, config["cross_attention_dim"])}
    if config["addition_embed_type"] == "text_time":
        shapes |= {"text_embeds": (2, 1280), "time_ids": (2, 6)}
    return shapes


if __name__ == "__main__":
    main()
