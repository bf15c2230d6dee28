"""The parts of a hypernetwork's training, and one step of it."""

from __future__ import annotations

import gc
import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as checkpoint_block

from hyperrt.errors import Incompatible
from hyperrt.training.data import features as cache_features
from hyperrt.training.data.cache import PictureCache
from hyperrt.training.data.features import CaptionTable
from hyperrt.training.messages import warn
from hyperrt.training.model import base_model, image_prompt, weight_hash
from hyperrt.training.model.hypernet import Decoder, decoder_of
from hyperrt.training.model.image_prompt import ImagePrompt
from hyperrt.training.model.lora_layers import install, layout_of
from hyperrt.training.model.losses import Equation5, NoiseScheduler, Regulariser
from hyperrt.training.model.predictor import Predictor
from hyperrt.training.run import checkpoint, device, distributed
from hyperrt.training.run.batches import Ahead, Batch, Batches
from hyperrt.training.run.config import TrainConfig
from hyperrt.training.run.optimizer import Optimizer, Schedule

log = logging.getLogger("hyperrt.training")

LOSSES = ("loss", "ft", "reg", "prior", "grad_norm")  # what `Trainer.step` returns
NO_IMAGE_PROMPT = (
    "the decoder of the open category is trained without an image prompt",
    "the paper's model has IP-Adapter-Plus beside the LoRA; without it the LoRA has to do all of the work",
    f"add --image-prompt ({image_prompt.PUBLISHED}), or continue if that is what you want to see",
)


@dataclass(frozen=True)
class Data:
    """A cache and what the frozen encoders make of it."""

    cache: PictureCache
    features: np.ndarray  # of every picture, (N, V, T, F) float16
    captions: CaptionTable


class Trainer:
    """All parts of a run.

    Attributes:
        predict: the frozen UNet.
        decoder: the hypernetwork that is trained; `optimizer.model` is what to call in a step, and
            `optimizer.ema` its averaged copy.
        draw: step -> batch, prior; see `Batches.with_prior`.
        loss: paper eq. 5.
        origin: hashes of base model, data and image prompt.

    Raises:
        NotFound, IntegrityError: base model or data cannot be read.
        Incompatible: they do not fit together, or the image prompt does not fit them.
        UsageError: the data is too small, or the processes cannot share a batch.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.accelerator = distributed.start(config.device == "cpu", config.compress_gradients)
        if not self.accelerator.is_main_process:
            log.setLevel(logging.ERROR)  # the main process logs for all
        alone = self.accelerator.num_processes == 1
        self.device = device.pick(config.device) if alone else self.accelerator.device
        self.autocast = partial(device.autocast, self.device, config.precision)
        device.seed_everything(config.seed)
        self.base = base_model.opened(config.base)
        for module in vars(self.base).values():
            if isinstance(module, nn.Module):
                module.to(self.device)
        scheduler = NoiseScheduler(self.base.scheduler, self.device)
        part = distributed.share(config.batch_size // config.targets, self.accelerator)
        # One process of each machine encodes the cache; the others read the result.
        with self.accelerator.local_main_process_first(), base_model.readable(config.data, "build it anew"):
            self.data = data = _data(config, self.base)
            steps = scheduler.train_timesteps
            self.batches = Batches(data.cache, data.features, data.captions, config, steps, part)
        prompt, prompt_hash = _image_prompt(config, self.base.unet, self.data.features.shape[-1], self.device)
        base_hash = weight_hash.base_hash(self.base.unet)
        self.origin = checkpoint.Origin(base_hash, self.batches.fingerprint, prompt_hash)
        unet = self._prepared_unet()
        layout = layout_of(self.base.unet, config.rank)
        side = self.data.cache.images.shape[2]
        self.predict = Predictor(unet, layout, side, self.device, self.autocast, prompt, config.image_scale)
        self.decoder = self._new_decoder()
        # On a CPU there is nothing to overlap with.
        draw = self.batches.with_prior
        self.draw = Ahead(draw) if self.device.type == "cuda" else draw
        self.loss = Equation5(
            scheduler,
            Regulariser(layout, config.reduction, config.regularised, self.device),
            gamma=config.gamma, lambda_=config.lambda_, prior=config.prior, min_snr=config.min_snr,
            device=self.device,
        )  # fmt: skip
        schedule = Schedule(
            steps=config.steps, lr=config.lr, warmup=config.warmup, final_lr=config.final_lr,
            ema=config.ema, weight_decay=config.weight_decay, clip=config.clip,
        )  # fmt: skip
        self.optimizer = Optimizer(
            self.decoder, schedule, ("position",), self.accelerator, config.shard_optimizer
        )

    def _prepared_unet(self) -> nn.Module:
        """The frozen UNet as the steps call it; encoders that are not needed any more leave a GPU."""
        unet = self.base.unet
        install(unet)
        unet.to(memory_format=torch.channels_last)
        if (dtype := device.frozen_dtype(self.device, self.config.precision)) != unet.dtype:
            unet.to(dtype)
        self.base.image_encoder.to("cpu")
        if self.base.is_sdxl:  # no sample sheets are drawn
            for encoder in (self.base.text_encoder, self.base.text_encoder_2, self.base.vae):
                encoder.to("cpu")
        if self.config.gradient_checkpointing:
            # Not re-entrant: that kind would detach the LoRA, which is part of a block's argument.
            unet.enable_gradient_checkpointing(partial(checkpoint_block, use_reentrant=False))
        return torch.compile(unet) if self.config.compile else unet

    def _new_decoder(self) -> Decoder:
        features = self.data.features
        decoder = decoder_of(self.predict.layout, features.shape[-1], self.config.decoder)
        decoder.set_feature_statistics(*cache_features.feature_statistics(features))
        return decoder.to(self.device)

    def losses(self, batch: Batch, prior: Batch | None) -> dict[str, Tensor]:
        """The loss of eq. 5 and its terms, for the rows of L_FT and L_reg."""
        with self.autocast():
            lora = self.optimizer.model(batch.features.to(self.device))
        lora = {
            name: vector.float().unflatten(0, (-1, batch.photos)).mean(1) for name, vector in lora.items()
        }
        image_tokens = self.predict.image_tokens(batch.features, batch.photos)
        return self.loss(self.predict, lora, self.decoder.deltas(lora), batch, prior, image_tokens)

    def step(self, step: int) -> Tensor:
        """One update of the decoder; returns `LOSSES` as one tensor.

        Raises:
            NumericError: the loss is not a finite number.
        """
        batch, prior = self.draw(step)
        subjects = f"subjects {self.batches.subjects(step).tolist()}"
        return self.optimizer.step(step, self.losses(batch, prior), subjects)

    def resume(self, folder: Path, allow_changes: bool = False) -> tuple[int, Tensor]:
        """Loads the state in a folder; returns the steps done and their losses not logged yet.

        Raises:
            UsageError, Incompatible, IntegrityError: as `checkpoint.check_state` and `read_state`.
        """
        tensors, metadata = checkpoint.read_state(folder)
        path = folder / checkpoint.STATE
        changed = checkpoint.check_state(path, metadata, self.config, self.origin, allow_changes)
        checkpoint.restore(folder, self.optimizer, tensors)
        for name, (before, now) in changed.items():
            log.warning("%s was %s and is %s now", name, before, now)
        return int(metadata["step"]), tensors["window"]

    def save(self, folder: Path, step: int, window: Tensor) -> None:
        """Writes the EMA for export, and the state to resume from; collective.

        The state comes last: a run that is killed in between resumes from the state before, and writes both
        again.

        Args:
            step: steps done.
            window: losses that are not logged yet [n, LOSSES]; the main process's are saved.
        """
        tensors = self.optimizer.tensors()
        if self.accelerator.is_main_process:
            hashes = self.origin.base_model, self.origin.image_prompt
            checkpoint.save_hypernet(folder, self.optimizer.ema, self.config, step, *hashes)
            metadata = checkpoint.state_metadata(step, self.config, self.origin)
            checkpoint.save_state(folder, {"window": window, **tensors}, metadata)
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leaves the group of processes; no step can follow.

        DistributedDataParallel is freed before the group: as the group's last holder it would end the group's
        threads under Python's lock, and one of them may be waiting for the lock (gloo, torch 2.13.0).
        """
        if isinstance(self.draw, Ahead):
            self.draw.close()
        self.optimizer.model = self.decoder
        self.accelerator.free_memory()
        gc.collect()
        self.accelerator.end_training()


def _data(config: TrainConfig, base: base_model.Base) -> Data:
    """The cache, its features and its captions; encodes what is not on the disk yet."""
    cache = PictureCache.open(config.data)
    cache_features.check_latents(base, cache)
    features = cache_features.image_features(base, cache)
    return Data(cache, features, cache_features.caption_table(base, cache, config.token))


def _image_prompt(
    config: TrainConfig, unet: nn.Module, feature_dim: int, device_: torch.device
) -> tuple[ImagePrompt | None, str]:
    """The image prompt and its hash; None and "" without one.

    Raises:
        Incompatible: it reads other features than the image encoder makes.
    """
    path = config.image_prompt
    if path is None:
        if config.kind == "resampler":
            warn(*NO_IMAGE_PROMPT)
        return None, ""
    prompt = image_prompt.load(path, unet)
    if (width := prompt.image_proj.proj_in.in_features) != feature_dim:
        why = f"it reads features of {width} numbers, the image encoder of --base makes {feature_dim}"
        raise Incompatible(f"{path} does not fit the base model", why, image_prompt.PUBLISHED)
    digest = weight_hash.prompt_hash(prompt)  # before a GPU's precision changes the weights
    return prompt.to(device_, device.frozen_dtype(device_, config.precision)), digest
