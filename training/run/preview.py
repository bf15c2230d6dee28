"""The sample sheet of a hypernetwork's training: held-out subjects, one per row.

Columns: a photo; the base model with the generic caption; the personalised model with two captions; the first
of these with the next subject's LoRA, which should not look like the photo.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hyperrt.training.data import scenes
from hyperrt.training.model.hypernet import Packed
from hyperrt.training.run.sample import sample, write_sheet
from hyperrt.training.run.trainer import Trainer

SUBJECTS, STEPS, GUIDANCE_SCALE, KAPPA = 8, 16, 1.5, 1.2


@torch.no_grad()
def write(path: Path, trainer: Trainer) -> None:
    """Draws the EMA decoder's sheet as a PNG; writes nothing without held-out subjects."""
    cache, token = trainer.data.cache, trainer.config.token
    rows = min(SUBJECTS, trainer.config.holdout)
    if not rows:
        return
    subjects = np.arange(len(cache.nouns) - rows, len(cache.nouns))
    nouns = [cache.names[noun] for noun in cache.nouns[subjects]]
    photos = torch.from_numpy(trainer.data.features[subjects, 0].astype(np.float32)).to(trainer.device)
    lora = trainer.optimizer.ema(photos)
    others = {name: vector.roll(-1, 0) for name, vector in lora.items()}
    plain, far = scenes.BACKGROUNDS[-1], scenes.BACKGROUNDS[0]

    def draw(place: str, weights: Packed | None) -> np.ndarray:
        prompts = None if weights is None else [scenes.caption(noun, place, token) for noun in nouns]
        return sample(
            trainer.base, [scenes.caption(noun, place) for noun in nouns], prompts, weights,
            rank=trainer.config.rank, kappa=KAPPA, guidance_scale=GUIDANCE_SCALE, steps=STEPS, seed=0,
        )  # fmt: skip

    columns = [
        cache.images[subjects, 0],
        draw(plain, None),
        draw(plain, lora),
        draw(far, lora),
        draw(plain, others),
    ]
    write_sheet(path, list(zip(*columns, strict=True)))
