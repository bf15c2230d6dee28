"""Does the compiled runtime compute the paper's formula?

The reference shares no code with the runtime's step. It is a plain PyTorch loop with diffusers' UNet,
attention and schedulers. PEFT injects the LoRA and switches it on and off between the branches, which are
separate calls, and the sum of the paper's equation 20 is written out:

    eps = (1 - 2 s) eps_base(empty) + kappa s eps_lora(subject) + (2 - kappa) s eps_base(generic)

    worst_rel   max |runtime - reference| / max |reference| of the final latents, the largest over kappa 0.4,
                1, 2 and every solver, 30 steps

Both start from the noise of the runtime's generator, and stochastic solvers add the same noise. The LoRA is
that of an example's photos, which PEFT reads from a subject file. With --base the reference's UNet and text
encoder come from that folder, with weights rounded to fp16 as the bundle stores them. Without it the UNet's
weights are read from the bundle's graphs, and its text encoder computes the hidden states of the prompts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import against
import diffusers
import graph_weights
import numpy as np
import report
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from hyperrt import Runtime, engines
from hyperrt.bundle.bundle import Bundle
from hyperrt.lora.subject import Subject
from hyperrt.sampling import loop, options
from hyperrt.sampling.tokenizer import Tokenizer
from hyperrt.training.model import base_model
from hyperrt.training.model.encode import encode_text

KAPPAS = (0.4, 1.0, 2.0)
SOLVERS = sorted(options.SOLVER_NAMES)
STEPS = 30
SEED = 7
NOUN, SCENE = "mug", "on a beach"
PHOTOS = report.ROOT / "examples" / "subjects" / NOUN
SCHEDULERS = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
}
BARS = {"worst_rel": "< 1e-3"}

Encode = Callable[[Sequence[str]], Tensor]  # prompts to hidden states [prompts, L, D]


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument(
        "--base", type=Path, metavar="FOLDER", help="the base model that the bundle was exported from"
    )
    against.add_options(parser, turns=1)
    args = parser.parse_args()
    if args.against:
        against.finish(__file__, args, BARS)
        return
    kappas, steps = ((1.0,), 3) if args.quick else (KAPPAS, STEPS)
    bundle = Bundle.open(args.bundle)
    unet, encode = reference_of(bundle, args.base)
    token = bundle.prompts.token
    text = encode(["", f"a {token} {NOUN} {SCENE}", f"a {NOUN} {SCENE}"]).split(1)
    rows, scale = [], bundle.defaults.guidance_scale
    with Runtime.open(args.bundle, "onnxruntime") as runtime:
        subject = runtime.personalize(PHOTOS, NOUN)
        inject(unet, subject)
        for solver, kappa in product(SOLVERS, kappas):
            options = {
                "kappa": kappa,
                "guidance_scale": scale,
                "steps": steps,
                "solver": solver,
                "seed": SEED,
            }
            latents = runtime.generate(f"a [V] {NOUN} {SCENE}", subject, **options).latents
            expected = sample(unet, text, bundle, solver, steps, kappa, scale)
            # The effect of the LoRA: parity with a LoRA that does nothing would prove nothing.
            plain = runtime.generate(f"a [V] {NOUN} {SCENE}", subject, strength=0.0, **options).latents
            rows.append((solver, kappa, relative(latents, expected), relative(plain, expected)))
    report.table(rows, ("solver", "kappa", "relative difference", "relative difference without the LoRA"))
    report.finish(__file__, {"worst_rel": max(row[2] for row in rows)}, BARS)


def reference_of(bundle: Bundle, folder: Path | None) -> tuple[UNet2DConditionModel, Encode]:
    """The base model as a UNet of diffusers and a text encoder.

    Args:
        folder: of the base model; None: the weights are read from the bundle's graphs.

    Raises:
        SystemExit: there is no folder, and the bundle is not of the tiny family.
    """
    if folder is not None:
        base = base_model.load(folder)
        for part in (base.unet, base.text_encoder):
            part.half().float()  # in place: the bundle stores fp16
        return base.unet, partial(encode_text, base)
    if bundle.family != "tiny":
        raise SystemExit(f"the family of the bundle is {bundle.family}; give --base")
    unet = graph_weights.read_into(base_model.tiny_unet(), bundle).eval().requires_grad_(False)
    tokenizer = Tokenizer(bundle.tokenizer, bundle.prompts.max_tokens)

    def encode(prompts: Sequence[str]) -> Tensor:
        ids = np.stack([tokenizer.encode(prompt).ids for prompt in prompts])
        with engines.open(bundle.graph("text_encoder")) as engine:
            return torch.from_numpy(engine.run({"input_ids": ids})["hidden_states"])

    return unet, encode


def inject(unet: UNet2DConditionModel, subject: Subject) -> None:
    """Loads the subject into the UNet as a PEFT adapter; diffusers reads it from a subject file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "subject.safetensors"
        subject.save(path)
        unet.load_lora_adapter(str(path), prefix="unet", use_safetensors=True)


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    text: Sequence[Tensor],
    bundle: Bundle,
    solver: str,
    steps: int,
    kappa: float,
    s: float,
) -> np.ndarray:
    """Final latents [1, C, h, w] of the reference.

    Args:
        text: hidden states of the empty, the subject's and the generic prompt, each [1, L, D].
        s: the guidance scale.
    """
    empty, subject, generic = text
    scheduler = scheduler_of(bundle, solver)
    scheduler.set_timesteps(steps)
    shape = (bundle.latent.channels, bundle.latent.size, bundle.latent.size)
    latents = torch.from_numpy(loop.initial_noise(SEED, shape, 1)) * scheduler.init_noise_sigma
    noise = fresh_noise(shape)
    with mock.patch(
        "diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", lambda *_, **__: next(noise)
    ):
        for t in scheduler.timesteps:
            x = scheduler.scale_model_input(latents, t)
            unet.disable_lora()
            base_empty, base_generic = unet(x, t, empty).sample, unet(x, t, generic).sample
            unet.enable_lora()
            personal = unet(x, t, subject).sample
            guided = (1 - 2 * s) * base_empty + kappa * s * personal + (2 - kappa) * s * base_generic
            latents = scheduler.step(guided, t, latents).prev_sample
    return latents.numpy()


def scheduler_of(bundle: Bundle, solver: str) -> diffusers.SchedulerMixin:
    """diffusers' scheduler for a solver, with the bundle's noise schedule."""
    kind, more = SCHEDULERS[solver]
    return kind(
        num_train_timesteps=bundle.betas.steps, beta_schedule=bundle.betas.schedule,
        beta_start=bundle.betas.start, beta_end=bundle.betas.end, prediction_type=bundle.prediction_type,
        timestep_spacing="leading", steps_offset=1, **more,
    )  # fmt: skip


def fresh_noise(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """The noise [1, *shape] that the runtime's stochastic solver adds in each step."""
    generator = loop.noise_generators(SEED, 1)[0]
    while True:
        yield torch.from_numpy(generator.standard_normal((1, *shape), np.float32))


def relative(result: np.ndarray, expected: np.ndarray) -> float:
    """max |result - expected| / max |expected|."""
    return float(np.abs(result - expected).max() / np.abs(expected).max())


if __name__ == "__main__":
    main()
