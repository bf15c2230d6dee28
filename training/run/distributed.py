"""Several processes as one training, by `accelerate launch -m hyperrt.training.train`, or torchrun.

Only the decoder and its optimizer go through it; the frozen parts have no gradients to share, and each
process holds a copy. Every process computes its rows of the same batch, and the mean of the gradients is that
of the whole batch: so how many processes there are is no setting of a run.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW, Optimizer

from hyperrt.engines.nvidia import driver
from hyperrt.errors import UsageError

PATIENCE = timedelta(hours=1)  # with a process that encodes the pictures, or draws samples, for the others


def start(cpu: bool, compress: bool = False) -> Accelerator:
    """Joins the processes that a launcher started; one that was not launched is alone.

    Args:
        cpu: whether a processor computes even where there is a GPU.
        compress: whether gradients travel as bf16, in half the bytes.

    Raises:
        UsageError: they cannot, between processors.
    """
    hook = DDPCommunicationHookType.BF16 if compress else DDPCommunicationHookType.NO
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook),
        InitProcessGroupKwargs(timeout=PATIENCE),
    ]
    if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # accelerate 1.15.0 lets processes wait for each other at a GPU of their number, also those on a
        # processor, and on a machine with one GPU the second of two ended (docs/log.md).
        os.environ[driver.VISIBLE] = ""
    # Precision and devices are training/run/device.py's.
    found = Accelerator(cpu=cpu, mixed_precision="no", device_placement=False, kwargs_handlers=handlers)
    if compress and found.num_processes > 1 and found.device.type != "cuda":
        why = f"PyTorch does it between GPUs, and these processes compute on {found.device}"
        raise UsageError("gradients cannot travel as bf16", why, "leave --compress-gradients out")
    return found


def adamw(groups: list[dict[str, object]], lr: float, sharded: bool) -> Optimizer:
    """AdamW on groups of parameters; sharded: each process has the moments of some of them (ZeRO stage 1)."""
    options = {"lr": lr, "betas": (0.9, 0.99), "fused": True}
    if sharded and torch.distributed.is_initialized():
        return ZeroRedundancyOptimizer(groups, AdamW, **options)
    return AdamW(groups, **options)


def said(accelerator: Accelerator, number: int) -> list[int]:
    """What each process says, the main one first; all must ask."""
    if accelerator.num_processes == 1:
        return [number]
    return accelerator.gather(torch.tensor([number], device=accelerator.device)).tolist()


def check_start(accelerator: Accelerator, step: int, folder: Path) -> None:
    """Refuse processes that would start at different steps; all must ask, and are refused together.

    Raises:
        UsageError: with what the main process and another one found.
    """
    steps = said(accelerator, step)
    for process, other in enumerate(steps):
        if other != steps[0]:
            why = f"in {folder} the main process finds step {steps[0]}, process {process} step {other}"
            do = "make --output a folder that all machines share"
            raise UsageError("the processes would start at different steps", why, do)


def share(subjects: int, accelerator: Accelerator) -> slice:
    """This process's part of a step's subjects.

    Raises:
        UsageError: they cannot be shared equally.
    """
    of, number = accelerator.num_processes, accelerator.process_index
    if subjects % of:
        what = f"a step of {subjects} subjects cannot be shared by {of} processes"
        do = f"set --batch to a multiple of {of} times --targets"
        raise UsageError(what, "each takes as many as the others", do)
    return slice(subjects // of * number, subjects // of * (number + 1))
