"""Pictures from the base model in plain PyTorch, with or without a LoRA, as previews of a training.

The loop, the solver tables, the noise and the guidance weights are the runtime's, so a preview equals
the picture of the exported bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hyperrt import files
from hyperrt.sampling import guidance, loop, solvers
from hyperrt.session.decode import pictures_from_pixels
from hyperrt.training.model.base_model import Base
from hyperrt.training.model.encode import encode_text
from hyperrt.training.model.lora_layers import Rows, install, layout_of, unpack

GAP, ZOOM = 2, 2  # of a sheet: pixels between pictures, and magnification


@torch.no_grad()
def sample(
    base: Base,
    generic: Sequence[str],
    subject: Sequence[str] | None = None,
    lora: Mapping[str, Tensor] | None = None,
    *,
    rank: int = 4,
    kappa: float = 1.0,
    guidance_scale: float = 2.5,
    steps: int = 20,
    seed: int = 0,
    solver: str = "dpmpp_2m",
) -> np.ndarray:
    """Draws pictures with HM-CFG (paper eq. 20); image k has the noise of seed + k.

    Args:
        generic: prompts of the base branch.
        subject: prompts of the personalised branch; None: plain CFG on `generic` at twice `guidance_scale`.
        lora: "lora_q" [1|images, Nq] and "lora_kv" [1|images, Nkv] of that rank; None: the base model.

    Returns:
        uint8 [images, H, W, 3].
    """
    hidden = {
        "generic": encode_text(base, generic),
        "subject": None if subject is None else encode_text(base, subject),
    }
    weights = guidance.hm_cfg_weights(guidance_scale, 0.0 if subject is None else kappa)
    branches = guidance.active(map(guidance.Branch, guidance.BRANCHES, weights))
    hidden["uncond"] = encode_text(base, [""]).expand_as(hidden["generic"])
    predict = _predictor(base, branches, hidden, lora, rank)

    schedule = solvers.NoiseSchedule(base.scheduler.betas.double().numpy())
    table = solvers.table(solver, schedule, steps, base.scheduler.config.prediction_type)

    def step(feeds: loop.Feeds) -> loop.Feeds:
        latents = torch.from_numpy(np.asarray(feeds["latents"]))
        output = predict(latents * float(feeds["coefficients"][0]), float(feeds["timestep"])).cpu().numpy()
        outputs = solvers.apply(
            feeds["coefficients"], feeds["latents"], output, feeds["previous"], feeds["noise"]
        )
        return dict(zip(("next_latents", "denoised"), outputs, strict=True))

    unet = base.unet.config
    images = len(hidden["generic"])
    shape = (unet.in_channels, unet.sample_size, unet.sample_size)
    latents = loop.initial_noise(seed, shape, images) * np.float32(table.initial_scale)
    trajectory = loop.Trajectory(table, latents, loop.noise_generators(seed, images))
    for done in loop.denoise(step, trajectory):
        latents = done.latents
    return decode(base, torch.from_numpy(latents))


@torch.no_grad()
def decode(base: Base, latents: Tensor) -> np.ndarray:
    """Latents as the UNet takes them [n, C, h, w] => uint8 [n, H, W, 3]."""
    latents = latents.float().to(next(base.vae.parameters()).device)
    pixels = base.vae.decode(base.latent_scale.for_vae(latents)).sample
    return pictures_from_pixels(pixels.cpu().numpy())


def sheet(rows: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Pictures of equal size [H, W, 3], arranged row by row on grey."""
    height, width = rows[0][0].shape[:2]
    columns = max(len(row) for row in rows)
    canvas = np.full((len(rows) * (height + GAP) + GAP, columns * (width + GAP) + GAP, 3), 96, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            top, left = GAP + y * (height + GAP), GAP + x * (width + GAP)
            canvas[top : top + height, left : left + width] = picture
    return canvas.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)


def write_sheet(path: Path, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Writes the `sheet` of these pictures as a PNG; replaces an existing file."""
    picture = Image.fromarray(sheet(rows))
    files.publish(path, lambda file: picture.save(file, "PNG"), force=True)


def _predictor(
    base: Base,
    branches: Sequence[guidance.Branch],
    hidden: Mapping[str, Tensor],
    lora: Mapping[str, Tensor] | None,
    rank: int,
) -> Callable[[Tensor, float], Tensor]:
    """The guided prediction as a function of (latents [images, C, h, w], timestep)."""
    install(base.unet)
    device, dtype = base.unet.device, base.unet.dtype  # bf16 for frozen weights on a GPU, else fp32
    text = torch.cat([hidden[branch.name] for branch in branches]).to(device)
    images = len(hidden["generic"])
    options = None
    if lora is not None:
        gate = torch.tensor([branch.name == "subject" for branch in branches], device=device).float()
        factors = unpack(
            layout_of(base.unet, rank),
            {k: _rows(v.to(device), len(branches), images) for k, v in lora.items()},
        )
        options = {"rows": Rows(factors, gate.repeat_interleave(images).view(-1, 1, 1))}

    def predict(latents: Tensor, timestep: float) -> Tensor:
        rows = latents.to(device).repeat(len(branches), 1, 1, 1)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = base.unet(
                rows, timestep, encoder_hidden_states=text, cross_attention_kwargs=options
            ).sample.float()
        return guidance.combine([branch.weight for branch in branches], output.chunk(len(branches)))

    return predict


def _rows(vector: Tensor, branches: int, images: int) -> Tensor:
    """[1, N] stays, [images, N] is repeated for each branch; the gate switches it off in the base's rows."""
    return vector if len(vector) == 1 else vector.repeat(branches, 1)
