"""Do other programs load all of our LoRA files, and draw the same picture from them?

The runtime makes a subject from an example's photos and saves it in every format. HyperRT and another program
load each file:

    diffusers, kohya   StableDiffusionPipeline.load_lora_weights
    peft               PeftModel.from_pretrained, of the folder; its UNet in diffusers' pipeline

Both draw from the same noise with DDIM, 30 steps. With kappa = 2 and a guidance scale of 1/2, HM-CFG weighs
the generic and the empty prompt with 0, so only the personalised model counts, as with diffusers' guidance
scale of 1. At larger scales diffusers personalises the empty prompt, too; HM-CFG does not. If that prompt is
all zeros, as in SDXL, both are equal, and s at kappa = 2 is diffusers' 2 s (compared by
tests/export/test_small_models_loop.py). test_subject_elsewhere.py uses pipelines that share nothing with the
runtime.

    missing            names of LoRA tensors that PEFT did not find in the file, in all formats
    unexpected         names in the file that PEFT does not know
    picture_rel_diff   max |ours - theirs| / max |theirs| of the pixels in [0, 1], largest of all formats
    latents_rel_diff   the same for the final latents

`peft.set_peft_model_state_dict` returns the missing and unexpected names; diffusers calls it and only logs
them. The UNet is diffusers' with the weights of the bundle (bench/parity.py). The bundle's text encoder and
decoder are used on both sides.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import peft
import report
import torch
from diffusers import StableDiffusionPipeline
from parity import NOUN, PHOTOS, SCENE, reference_of, relative, scheduler_of

from hyperrt import Runtime, engines
from hyperrt.bundle.bundle import Bundle
from hyperrt.lora.names import FORMATS
from hyperrt.sampling import loop

SEED, STEPS, SOLVER = 11, 30, "ddim"
ALONE = {"kappa": 2.0, "guidance_scale": 0.5, "solver": SOLVER, "seed": SEED}
BARS = {
    "missing": "0",
    "unexpected": "0",
    "picture_rel_diff": "< 1e-3",
    "latents_rel_diff": "< 1e-3",
}


def main() -> None:
    args = report.options(__doc__).parse_args()
    steps = 3 if args.quick else STEPS
    with tempfile.TemporaryDirectory() as folder, Runtime.open(args.bundle, "onnxruntime") as runtime:
        rows = [compare(runtime, Path(folder), format, steps) for format in FORMATS]
    head = ("format", "missing", "unexpected", "picture", "latents", "latents without the LoRA")
    report.table(rows, head)
    figures = {
        "missing": sum(row[1] for row in rows),
        "unexpected": sum(row[2] for row in rows),
        "picture_rel_diff": max(row[3] for row in rows),
        "latents_rel_diff": max(row[4] for row in rows),
    }
    report.finish(__file__, figures, BARS)


def compare(
    runtime: Runtime, folder: Path, format: str, steps: int
) -> tuple[str, int, int, float, float, float]:
    """The row of a format: missing and unexpected names, differences of pictures and latents."""
    bundle = runtime.bundle
    saved = runtime.personalize(PHOTOS, NOUN)
    path = folder / ("peft" if format == "peft" else f"{format}.safetensors")
    saved.save(path, format)
    prompt, subject = f"a [V] {NOUN} {SCENE}", runtime.load_subject(path)
    ours, plain = (
        runtime.generate(prompt, subject, steps=steps, strength=strength, **ALONE).latents
        for strength in (1.0, 0.0)
    )
    with recorded_loads() as loads:
        theirs = drawn_by_diffusers(bundle, path, format, prompt, steps)
    if len(loads) != 1:
        raise SystemExit(f"{format}: PEFT loaded {len(loads)} times, not once")
    missing, unexpected = loads[0]
    pictures = relative(decoded(bundle, ours), decoded(bundle, theirs))
    return format, len(missing), len(unexpected), pictures, relative(ours, theirs), relative(plain, theirs)


def drawn_by_diffusers(bundle: Bundle, path: Path, format: str, prompt: str, steps: int) -> np.ndarray:
    """Final latents [1, C, h, w] of diffusers' pipeline with the LoRA of the file."""
    unet, encode = reference_of(bundle, None)
    text = encode([prompt.replace(bundle.prompts.placeholder, bundle.prompts.token)])
    if format == "peft":
        unet = peft.PeftModel.from_pretrained(unet, str(path)).get_base_model()
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler_of(bundle, SOLVER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    if format != "peft":
        pipeline.load_lora_weights(str(path), use_safetensors=True)
    shape = (bundle.latent.channels, bundle.latent.size, bundle.latent.size)
    noise = torch.from_numpy(loop.initial_noise(SEED, shape, 1))
    drawn = pipeline(
        prompt_embeds=text, guidance_scale=1.0, num_inference_steps=steps, latents=noise, output_type="latent"
    )
    return drawn.images.numpy()


def decoded(bundle: Bundle, latents: np.ndarray) -> np.ndarray:
    """The picture [1, 3, H, W], its values in [0, 1]."""
    with engines.open(bundle.graph("vae_decoder")) as decoder:
        return np.clip(decoder.run({"latents": latents})["pixels"] / 2 + 0.5, 0, 1)


@contextmanager
def recorded_loads() -> Iterator[list[tuple[list[str], list[str]]]]:
    """Records (missing LoRA names, unexpected names) of each load by PEFT in the context."""
    loads = []
    load = peft.set_peft_model_state_dict

    def recording(*args: object, **options: object) -> object:
        result = load(*args, **options)
        loads.append(([name for name in result.missing_keys if "lora" in name], result.unexpected_keys))
        return result

    with (
        mock.patch("peft.set_peft_model_state_dict", recording),
        mock.patch("peft.peft_model.set_peft_model_state_dict", recording),
    ):
        yield loads


if __name__ == "__main__":
    main()
