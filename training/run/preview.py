"""The sample sheet of a hypernetwork's training: held-out subjects, one row each.

Columns: a photo; the base model on the generic caption; the personalised one with two captions; the first of
these with the LoRA of the next subject, which should not look like the photo.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hyperrt.training.data import scenes
from hyperrt.training.run.sample import sample, write_sheet

if TYPE_CHECKING:
    from hyperrt.training.train import Trainer

SUBJECTS, STEPS, GUIDANCE_SCALE, KAPPA = 8, 16, 1.5, 1.2


@torch.no_grad()
def write(path: Path, trainer: Trainer) -> None:
    """Draws the sheet of the EMA decoder as a PNG; none where no subject is held out."""
    cache, token = trainer.cache, trainer.config.token
    rows = min(SUBJECTS, trainer.config.holdout)
    if not rows:
        return
    who = np.arange(len(cache.nouns) - rows, len(cache.nouns))
    nouns = [cache.names[k] for k in cache.nouns[who]]
    photos = torch.from_numpy(trainer.features[who, 0].astype(np.float32)).to(trainer.device)
    lora = trainer.ema(photos)
    other = {name: vector.roll(-1, 0) for name, vector in lora.items()}
    plain, far = scenes.BACKGROUNDS[-1], scenes.BACKGROUNDS[0]

    def draw(place: str, weights: dict[str, torch.Tensor] | None) -> np.ndarray:
        subject = None if weights is None else [scenes.caption(noun, place, token) for noun in nouns]
        return sample(
            trainer.base, [scenes.caption(noun, place) for noun in nouns], subject, weights,
            rank=trainer.config.rank, kappa=KAPPA, guidance_scale=GUIDANCE_SCALE, steps=STEPS, seed=0,
        )  # fmt: skip

    columns = [
        cache.images[who, 0],
        draw(plain, None),
        draw(plain, lora),
        draw(far, lora),
        draw(plain, other),
    ]
    write_sheet(path, list(zip(*columns, strict=True)))
