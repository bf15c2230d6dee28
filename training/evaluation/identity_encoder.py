"""The encoder that judges identities of drawn subjects: contrastive, and a stranger to every hypernetwork.

    python -m training.identity_encoder [--out DIR]

It has another architecture than the bundle's image encoder, and is trained on other subjects (split "judge"
of training/data/scenes.py), by InfoNCE on two views of each. That takes about two minutes on one core; the
weights are kept under a key of everything that they come from, the drawings included, so a change of any of
it trains anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from hyperrt import files
from hyperrt.errors import IntegrityError
from hyperrt.plans import private_folder
from hyperrt.training import pretrain
from hyperrt.training.data import cache as data
from hyperrt.training.messages import first_line, reported
from hyperrt.training.run import device
from hyperrt.training.run.optimizer import Schedule

log = logging.getLogger("hyperrt.training")

SIZE = 64  # pixels of a picture's side
SPLIT, IDENTITIES, VIEWS = "judge", 3000, 4
BATCH, SEED = 64, 0
WIDTHS = (32, 64, 128, 192)
SCHEDULE = Schedule(steps=500, lr=2e-3, warmup=50, ema=0.99, report_every=250)
WEIGHTS, ABOUT = "identity_encoder.safetensors", "identity_encoder.json"
SAMPLED = 8  # drawn subjects whose pixels are part of the key


class IdentityEncoder(nn.Module):
    """Pictures in [-1, 1], [n, 3, S, S], to one feature of each; an output as transformers' encoders have."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in WIDTHS:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.GroupNorm(8, width), nn.GELU()]
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.GELU()]
            before = width
        self.layers = nn.Sequential(*layers[:-1])
        self.head = nn.Linear(before, before)

    def forward(self, pixels: Tensor) -> BaseModelOutput:
        features = self.head(self.layers(pixels).mean((2, 3)))
        return BaseModelOutput(last_hidden_state=features[:, None])

    @torch.no_grad()
    def features(self, picture: np.ndarray) -> np.ndarray:
        """A picture [H, W, 3] uint8 to a vector of unit length, as training/evaluation/judges.py wants it."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float().div(127.5).sub(1)
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
        vector = self(pixels).last_hidden_state[0, 0].double().numpy()
        return vector / np.linalg.norm(vector)


def key() -> str:
    """Sixteen hex digits of all that the weights come from."""
    recipe = {
        "size": SIZE, "split": SPLIT, "identities": IDENTITIES, "views": VIEWS, "batch": BATCH, "seed": SEED,
        "widths": WIDTHS, "schedule": asdict(SCHEDULE), "validation": pretrain.VALIDATION,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode())
    for index in range(SAMPLED):
        digest.update(data.draw_views(index, VIEWS, SIZE, data.Subjects(SPLIT))[1].tobytes())
    return digest.hexdigest()[:16]


def default_folder() -> Path:
    """Where encoders are kept: judges/ in HyperRT's own folder."""
    return private_folder.base_folder() / "judges"


def trained(folder: Path | None = None) -> tuple[IdentityEncoder, dict[str, object]]:
    """The encoder, trained if it is not in `folder` yet, frozen; and what its file of facts says.

    Raises:
        IntegrityError: the weights are damaged.
    """
    place = (folder or default_folder()) / key()
    if not (place / ABOUT).is_file():
        place.mkdir(parents=True, exist_ok=True)
        log.info("training the encoder that judges identities, once: about two minutes on one core")
        _train(place)
    model = IdentityEncoder()
    try:
        about = json.loads((place / ABOUT).read_text())
        model.load_state_dict(load_file(place / WEIGHTS))
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        what = f"the encoder in {place} is damaged"
        raise IntegrityError(what, first_line(error), f"remove {place}") from error
    return model.eval().requires_grad_(False), about


def _train(place: Path) -> None:
    """Draws the subjects, trains, and publishes the weights and, last, what is said of them."""
    with tempfile.TemporaryDirectory(dir=place, prefix=".training-") as scratch:
        cache = data.build(Path(scratch) / "cache", IDENTITIES, VIEWS, SIZE, SPLIT, workers=1)
        torch.manual_seed(SEED)
        run = Path(scratch) / "run"
        model = pretrain.train_image_encoder(run, cache, SCHEDULE, BATCH, SEED, IdentityEncoder())
        entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    content = save({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()})
    top1 = next(entry["held_out_top1"] for entry in reversed(entries) if "held_out_top1" in entry)
    about = {
        "model": "convolutions, InfoNCE on drawn subjects of another split",
        "key": place.name,
        "sha256": hashlib.sha256(content).hexdigest()[:16],
        "held_out_top1": top1,  # of so many subjects:
        "held_out_subjects": pretrain.VALIDATION,
    }
    files.publish(place / WEIGHTS, lambda file: file.write(content), force=True)
    files.publish(place / ABOUT, lambda file: file.write(json.dumps(about).encode()), force=True)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder of encoders [default: HyperRT's own].")
def main(out: Path | None) -> None:
    """Train the encoder that judges identities, if it is not there yet, and say how good it is."""
    with reported():
        device.prepare()
        _, about = trained(out)
        click.echo(json.dumps(about))


if __name__ == "__main__":
    main()
