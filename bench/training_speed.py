"""Times a step of `hyperrt train` and the same step with diffusers and PEFT.

    vs_plain       samples per second of ours / of the faster plain loop
    ours_per_s     samples a second of `Trainer.step`: every row of a batch has its own LoRA
    alone_per_s    plain: subject by subject, hypernetwork, UNet and backward; gradients add up
    shared_per_s   plain: the hypernetwork once for the whole batch, the UNet subject by subject
    mb_per_sample  peak memory of our step that one more row costs, in 10^6 bytes

A PEFT layer holds one adapter for all rows of a call, so the plain loops call the UNet once for each subject,
with the hypernetwork's output in place of the layer's weights, through which the gradient flows.  All three
see the same batches, take the same losses and update with the same optimizer; batch, rank and decoder are the
defaults of training/run/config.py.  They take turns in one process; the figures are medians.  Without --base
a random base model of the tiny family's sizes is used: speed does not depend on weights.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from statistics import median

import report
import small_world
import torch
from torch import Tensor, nn

from hyperrt.training.finetune import ADAPTER, adapted
from hyperrt.training.model import base_model as bases
from hyperrt.training.model.lora_layers import unpack
from hyperrt.training.model.losses import row_loss
from hyperrt.training.run import device
from hyperrt.training.run.batches import Batch
from hyperrt.training.run.config import TrainConfig
from hyperrt.training.run.optimizer import Optimizer
from hyperrt.training.run.trainer import Trainer

BARS = {"vs_plain": ">= 5"}
SMALLER = 4  # for the growth of memory: a batch of a quarter is compared
HOLDOUT = 16  # enough for a cache of few subjects; no monitor is measured here


class Plain:
    """The training loop that one writes with diffusers and PEFT; one UNet call per subject."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.config, self.layout = trainer, trainer.config, trainer.decoder.layout
        self.regulariser = trainer.loss.regulariser
        self.decoder = copy.deepcopy(trainer.decoder)
        self.optimizer = Optimizer(self.decoder, trainer.optimizer.schedule, no_decay=("position",))
        unet = adapted(bases.opened(self.config.base).unet, self.layout).requires_grad_(False)
        self.unet = unet.to(trainer.device)
        self.slots: dict[str, tuple[nn.Module, nn.Module]] = {}
        for site in self.layout.sites:
            layer = self.unet.get_submodule(site.path)
            self.slots[site.path] = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
            for slot in self.slots[site.path]:
                del slot.weight  # a Parameter would not take a tensor that has a history

    def alone(self, batch: Batch) -> float:
        """Gradients of the batch's loss, subject by subject; returns the loss."""
        total, subjects = 0.0, len(batch.subjects)
        for k in range(subjects):
            lora = self._predicted(batch.features[k * batch.photos : (k + 1) * batch.photos], batch.photos)
            loss = self._row_loss(batch, k, {name: vector[0] for name, vector in lora.items()})
            loss = (loss + self._regulariser(lora)) / subjects
            loss.backward()
            total += loss.item()
        return total

    def shared(self, batch: Batch) -> float:
        """The same, the hypernetwork once: its output collects what flows back from the UNet's calls."""
        lora = self._predicted(batch.features, batch.photos)
        leaves = {name: vector.detach().requires_grad_() for name, vector in lora.items()}
        total, subjects = 0.0, len(batch.subjects)
        for k in range(subjects):
            loss = self._row_loss(batch, k, {name: leaf[k] for name, leaf in leaves.items()}) / subjects
            loss.backward()
            total += loss.item()
        penalty = self._regulariser(lora)
        torch.autograd.backward([penalty, *lora.values()], [None, *(leaves[name].grad for name in lora)])
        return total + penalty.item()

    def step(self, step: int, gradients: Callable[[Batch], float]) -> float:
        """One update; returns the loss."""
        optimizer = self.optimizer
        optimizer.adamw.zero_grad(set_to_none=True)
        loss = gradients(self.trainer.batches.at(step))
        nn.utils.clip_grad_norm_(optimizer.parameters, self.config.clip)
        for group in optimizer.adamw.param_groups:
            group["lr"] = optimizer.schedule.rate(step)
        optimizer.adamw.step()
        return loss

    def _predicted(self, features: Tensor, photos: int) -> dict[str, Tensor]:
        """Features [S photos, T, F] to packed LoRAs [S, N]."""
        with device.autocast(self.trainer.device):
            lora = self.decoder(features.to(self.trainer.device))
        return {name: vector.float().unflatten(0, (-1, photos)).mean(1) for name, vector in lora.items()}

    def _row_loss(self, batch: Batch, subject: int, lora: dict[str, Tensor]) -> Tensor:
        """Mean loss of one subject's rows, with its LoRA [N] in the PEFT layers."""
        for path, factors in unpack(self.layout, {name: v[None] for name, v in lora.items()}).items():
            for slot, factor in zip(self.slots[path], factors, strict=True):
                slot.weight = factor[0].T
        targets, where, scheduler = self.config.targets, self.trainer.device, self.trainer.loss.scheduler
        rows = slice(subject * targets, (subject + 1) * targets)
        parts = (batch.latents, batch.noise, batch.timesteps, batch.text)
        latents, noise, timesteps, text = (part[rows].to(where) for part in parts)
        with device.autocast(where):
            noisy = scheduler.add_noise(latents, noise, timesteps)
            predicted = self.unet(noisy, timesteps, text.hidden_states).sample
        losses = row_loss(predicted, scheduler.target(latents, noise, timesteps))
        return (losses * scheduler.min_snr_weights(timesteps, self.config.min_snr)).mean()

    def _regulariser(self, lora: dict[str, Tensor]) -> Tensor:
        return self.config.lambda_ * self.regulariser(lora, self.decoder.deltas(lora))


def main() -> None:
    parser = small_world.options(__doc__)
    parser.add_argument("--batch-size", type=int, default=TrainConfig.batch_size)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.batch_size, args.rounds, args.warm_up = 4, 1, 0
    with small_world.refusals(), small_world.opened(args, random=True) as world:
        device.prepare(args.threads)
        trainer, growth = trained(world, args)
        times = in_turns(trainer, args)
    figures = {f"{way}_per_s": args.batch_size / median(spent) for way, spent in times.items()}
    figures["vs_plain"] = figures["ours_per_s"] / max(figures["alone_per_s"], figures["shared_per_s"])
    figures["mb_per_sample"] = growth
    rows = [(way, median(spent), min(spent), len(spent)) for way, spent in times.items()]
    report.table(rows, ("step", "median s", "min s", "rounds"))
    report.finish(__file__, figures, BARS)


def trained(world: small_world.World, args: argparse.Namespace) -> tuple[Trainer, float]:
    """What `hyperrt train` trains with at its defaults, after a first step or two; and how much
    this process's peak of memory, in 10^6 bytes, grew for each row more than in a smaller batch.
    """
    few, peaks = max(1, args.batch_size // SMALLER), []
    for batch in (few, args.batch_size):
        with tempfile.TemporaryDirectory() as out:
            trainer = Trainer(world.training(out, batch_size=batch, holdout=min(HOLDOUT, args.batch_size)))
        for step in range(2):  # Adam's state is there from the first update on
            trainer.step(step)
        peaks.append(report.peak_bytes() / 1e6)
    return trainer, (peaks[1] - peaks[0]) / (args.batch_size - few)


def in_turns(trainer: Trainer, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the steps of each way, round by round."""
    plain = Plain(trainer)
    ways = {
        "ours": trainer.step,
        "alone": lambda step: plain.step(step, plain.alone),
        "shared": lambda step: plain.step(step, plain.shared),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for step in range(args.warm_up + args.rounds):
        for way, take in ways.items():
            seconds = report.milliseconds(lambda take=take, step=step: take(step)) / 1000
            if step >= args.warm_up:
                times[way].append(seconds)
    return times


if __name__ == "__main__":
    main()
