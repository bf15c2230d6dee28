"""Does another program load our LoRA files whole, and draw the picture that we draw?

The runtime makes a subject of an example's photos; it is saved in every format, and each file is loaded by
HyperRT and elsewhere:

    diffusers, kohya   StableDiffusionPipeline.load_lora_weights
    peft               PeftModel.from_pretrained, of the folder; its UNet in diffusers' pipeline

Both draw from the same noise with DDIM, 30 steps. HM-CFG is the personalised model alone where the base
model's branches have no weight: kappa = 2 takes the generic prompt away, a guidance scale of 1/2 the empty
one. That is diffusers' guidance scale of 1. With more, diffusers personalises the empty prompt, too, which
HM-CFG does not. Where that prompt is all zeros, as SDXL's, this makes no difference, and s at kappa = 2 is
diffusers' 2 s: tests/export/test_small_models_loop.py compares that, and test_subject_elsewhere.py pipelines
that share nothing with the runtime.

    missing            names of the LoRA's tensors that PEFT looked for and did not find, of all formats
    unexpected         names that it did not look for
    picture_rel_diff   max |ours - theirs| / max |theirs| of the picture's values in [0, 1], the worst format
    latents_rel_diff   the same of the final latents

Missing and unexpected are what `peft.set_peft_model_state_dict` returns: diffusers loads through it, and only
logs what is wrong. The UNet is diffusers' own, with the weights of the bundle (bench/parity.py); the prompt's
hidden states and the picture come from the bundle's text encoder and decoder for both.
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
    """One format: names that did not fit, and how far pictures and latents are apart."""
    bundle = runtime.bundle
    made = runtime.personalize(PHOTOS, NOUN)
    path = folder / ("peft" if format == "peft" else f"{format}.safetensors")
    made.save(path, format)
    prompt, subject = f"a [V] {NOUN} {SCENE}", runtime.load_subject(path)
    ours, plain = (
        runtime.generate(prompt, subject, steps=steps, strength=strength, **ALONE).latents
        for strength in (1.0, 0.0)
    )
    with reports() as found:
        theirs = drawn_by_diffusers(bundle, path, format, prompt, steps)
    if len(found) != 1:
        raise SystemExit(f"{format}: PEFT loaded {len(found)} times; it should be once")
    missing, unexpected = found[0]
    pictures = relative(decoded(bundle, ours), decoded(bundle, theirs))
    return format, len(missing), len(unexpected), pictures, relative(ours, theirs), relative(plain, theirs)


def drawn_by_diffusers(bundle: Bundle, path: Path, format: str, prompt: str, steps: int) -> np.ndarray:
    """Final latents [1, C, h, w] of diffusers' pipeline with the file."""
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
def reports() -> Iterator[list[tuple[list[str], list[str]]]]:
    """Of each load that PEFT does meanwhile: names of the LoRA's that are missing, and that are too many."""
    found = []
    load = peft.set_peft_model_state_dict

    def watched(*args: object, **options: object) -> object:
        result = load(*args, **options)
        found.append(([name for name in result.missing_keys if "lora" in name], result.unexpected_keys))
        return result

    with (
        mock.patch("peft.set_peft_model_state_dict", watched),
        mock.patch("peft.peft_model.set_peft_model_state_dict", watched),
    ):
        yield found


if __name__ == "__main__":
    main()
