"""The encoder that identifies drawn subjects in an evaluation.

    python -m training.evaluation.identity_encoder [-o DIR]

It is independent of every hypernetwork: its architecture differs from the bundle's image encoder, and it is
trained on other subjects (split "judge" of training/data/scenes.py), by InfoNCE on two views of each. That
takes about two minutes on one core. The folder of the weights is named by a hash of the settings and of some
drawings, so a change of either trains a new encoder.
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
from hyperrt.cli.options import RenamedOption
from hyperrt.errors import IntegrityError
from hyperrt.plans import private_folder
from hyperrt.training.data import cache as data
from hyperrt.training.messages import first_line, reported
from hyperrt.training.run import contrastive, device
from hyperrt.training.run.optimizer import Schedule

log = logging.getLogger("hyperrt.training")

SIZE = 64  # pixels of a picture's side
SPLIT, SUBJECTS, VIEWS = "judge", 3000, 4
BATCH, SEED = 64, 0
WIDTHS = (32, 64, 128, 192)
SCHEDULE = Schedule(steps=500, lr=2e-3, warmup=50, ema=0.99, report_every=250)
WEIGHTS, ABOUT = "identity_encoder.safetensors", "identity_encoder.json"
SAMPLED = 8  # drawn subjects in the key


class IdentityEncoder(nn.Module):
    """Encodes pictures [n, 3, S, S] in [-1, 1] to one feature each; the output is that of transformers."""

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
        """The feature of a picture [H, W, 3] uint8, a vector of unit length: `classifiers.Features`."""
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float().div(127.5).sub(1)
        if pixels.shape[-2:] != (SIZE, SIZE):
            pixels = nn.functional.interpolate(pixels, (SIZE, SIZE), mode="bilinear", antialias=True)
        vector = self(pixels).last_hidden_state[0, 0].double().numpy()
        return vector / np.linalg.norm(vector)


def key() -> str:
    """Sixteen hex digits that identify the settings and drawings that the weights depend on."""
    settings = {
        "size": SIZE, "split": SPLIT, "identities": SUBJECTS, "views": VIEWS, "batch": BATCH, "seed": SEED,
        "widths": WIDTHS, "schedule": asdict(SCHEDULE), "validation": contrastive.VALIDATION,
    }  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for index in range(SAMPLED):
        digest.update(data.draw_views(index, VIEWS, SIZE, data.MixedSubjects(SPLIT))[1].tobytes())
    return digest.hexdigest()[:16]


def default_folder() -> Path:
    """The folder of trained encoders: judges/ in HyperRT's own folder."""
    return private_folder.base_folder() / "judges"


def trained(folder: Path | None = None) -> tuple[IdentityEncoder, dict[str, object]]:
    """The frozen encoder and the contents of its JSON file; trains it if `folder` does not hold it yet.

    Raises:
        IntegrityError: the weights are damaged.
    """
    path = (folder or default_folder()) / key()
    if not (path / ABOUT).is_file():
        path.mkdir(parents=True, exist_ok=True)
        log.info("training the identity encoder, once: about two minutes on one core")
        _train(path)
    model = IdentityEncoder()
    try:
        about = json.loads((path / ABOUT).read_text())
        model.load_state_dict(load_file(path / WEIGHTS))
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        what = f"the encoder in {path} is damaged"
        raise IntegrityError(what, first_line(error), f"remove {path} to train it again") from error
    return model.eval().requires_grad_(False), about


def _train(path: Path) -> None:
    """Draws the subjects, trains, and publishes the weights and, last, the JSON file."""
    with tempfile.TemporaryDirectory(dir=path, prefix=".training-") as scratch:
        cache = data.build(Path(scratch) / "cache", SUBJECTS, VIEWS, SIZE, SPLIT, workers=1)
        torch.manual_seed(SEED)
        run = Path(scratch) / "run"
        model = contrastive.train_image_encoder(run, cache, SCHEDULE, BATCH, SEED, IdentityEncoder())
        entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    content = save({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()})
    top1 = next(entry["held_out_top1"] for entry in reversed(entries) if "held_out_top1" in entry)
    about = {
        "model": "convolutions, InfoNCE on drawn subjects of another split",
        "key": path.name,
        "sha256": hashlib.sha256(content).hexdigest()[:16],
        "held_out_top1": top1,  # among `held_out_subjects`
        "held_out_subjects": contrastive.VALIDATION,
    }
    files.publish(path / WEIGHTS, lambda file: file.write(content), force=True)
    files.publish(path / ABOUT, lambda file: file.write(json.dumps(about).encode()), force=True)


@click.command()
@click.option(
    "--output",
    "-o",
    cls=RenamedOption,
    former=["--out"],
    type=click.Path(path_type=Path),
    help="Folder of encoders.  [default: in HyperRT's own folder]",
)
def main(output: Path | None) -> None:
    """Train the identity encoder, unless it exists, and print its accuracy."""
    with reported():
        device.prepare()
        _, about = trained(output)
        click.echo(json.dumps(about))


if __name__ == "__main__":
    main()
