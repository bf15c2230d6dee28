"""What openvino.genai's Text2ImagePipeline needs for a step, and for a change of subject.

    python peer_openvino_genai.py step   FOLDER [--mode auto|fuse]
    python peer_openvino_genai.py switch FOLDER

`step`: classifier-free guidance at 512 x 512, one call of two rows, fixed shapes, the LoRA on both rows (it
cannot be on one): the time of an iteration of its loop, by its own metrics. `auto` is the mode that it chooses
itself, in which the LoRA can be changed; `fuse` merges the LoRA into the weights for good.
`switch`, in ms: a picture of one step with a new adapter made of safetensors bytes in memory, minus the same
picture with the adapter that is there already, by turns, at 64 x 64 where the step itself is short.
Runs in the environment `openvino_genai`; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from time import perf_counter

import numpy as np
import openvino as ov
import openvino_genai as genai
import peer_timing

GUIDANCE = 7.5


def main() -> None:
    parser = peer_timing.options(__doc__)
    parser.add_argument("--mode", choices=("auto", "fuse"), default="auto")
    args = parser.parse_args()
    found = step(args) if args.what == "step" else {"openvino_genai_ms": switch(args)}
    print(json.dumps(found | {"versions": peer_timing.versions("openvino-genai", "openvino")}))


def pipeline(args: argparse.Namespace, size: int, adapter: genai.Adapter) -> genai.Text2ImagePipeline:
    """The pipeline compiled for pictures of this size, in fp32, with the adapter."""
    mode = genai.AdapterConfig.Mode.MODE_FUSE if args.mode == "fuse" else genai.AdapterConfig.Mode.MODE_AUTO
    pipe = genai.Text2ImagePipeline(str(args.folder / "openvino_genai"))
    pipe.reshape(1, size, size, GUIDANCE)
    pipe.compile(
        "CPU",
        adapters=genai.AdapterConfig(adapter, 1.0, mode),
        INFERENCE_PRECISION_HINT="f32",
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
    """Seconds that a picture takes longer when its adapter is a new one."""
    pipe = pipeline(args, 64, adapter(args, "a"))
    data = [np.fromfile(args.folder / "lora" / f"{name}.safetensors", np.uint8) for name in "ab"]

    def picture(held: genai.Adapter | None, turn: int) -> tuple[float, genai.Adapter]:
        start = perf_counter()
        used = held or genai.Adapter(ov.Tensor(data[turn % 2]))
        pipe.generate(
            "a cat", num_inference_steps=1, guidance_scale=GUIDANCE, rng_seed=0,
            adapters=genai.AdapterConfig(used, 1.0),
        )  # fmt: skip
        return perf_counter() - start, used

    more = []
    for turn in range(args.warm_up + args.rounds):
        new, used = picture(None, turn)
        same, _ = picture(used, turn)
        print(f"round {turn}: new {new:.4f} s, same {same:.4f} s", file=sys.stderr)
        if turn >= args.warm_up:
            more.append(new - same)
    return peer_timing.summary(more)


if __name__ == "__main__":
    main()
