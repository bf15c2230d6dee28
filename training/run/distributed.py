"""One training as several processes, started by `accelerate launch -m hyperrt.training.train` or torchrun.

Only the decoder and its optimizer are distributed; the frozen networks have no gradients to share, and each
process holds a copy. Every process computes its rows of the same batch, and the mean of the gradients is the
whole batch's. So the number of processes is not a setting of a run.
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

TIMEOUT = timedelta(hours=1)  # the others wait while one process encodes the pictures or draws samples


def start(cpu: bool, compress: bool = False) -> Accelerator:
    """Joins the processes of a launcher; without a launcher the process is alone.

    Args:
        cpu: whether to compute on the CPU even if there is a GPU.
        compress: whether gradients travel as bf16, in half the bytes.

    Raises:
        UsageError: gradients cannot be compressed between CPUs.
    """
    hook = DDPCommunicationHookType.BF16 if compress else DDPCommunicationHookType.NO
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True, comm_hook=hook),
        InitProcessGroupKwargs(timeout=TIMEOUT),
    ]
    if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # accelerate 1.15.0 synchronises processes on the GPU of their number even if they compute on a CPU,
        # and on a machine with one GPU the second of two processes ended (docs/log.md).
        os.environ[driver.VISIBLE] = ""
    # Precision and devices are chosen in training/run/device.py.
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", device_placement=False, kwargs_handlers=handlers)
    if compress and accelerator.num_processes > 1 and accelerator.device.type != "cuda":
        why = f"PyTorch compresses them between GPUs only, and these processes use {accelerator.device}"
        raise UsageError("gradients cannot travel as bf16", why, "leave --compress-gradients out")
    return accelerator


def adamw(groups: list[dict[str, object]], lr: float, sharded: bool) -> Optimizer:
    """AdamW on groups of parameters; sharded: each process keeps a part of the moments (ZeRO stage 1)."""
    options = {"lr": lr, "betas": (0.9, 0.99), "fused": True}
    if sharded and torch.distributed.is_initialized():
        return ZeroRedundancyOptimizer(groups, AdamW, **options)
    return AdamW(groups, **options)


def gather(accelerator: Accelerator | None, number: int) -> list[int]:
    """All-gather of one integer, rank 0 first; collective, every rank must call it."""
    if accelerator is None or accelerator.num_processes == 1:
        return [number]
    return accelerator.gather(torch.tensor([number], device=accelerator.device)).tolist()


def check_start(accelerator: Accelerator, step: int, folder: Path) -> None:
    """Refuses, in all processes together, to start at different steps; collective.

    Raises:
        UsageError: with the steps of the main process and another one.
    """
    steps = gather(accelerator, step)
    for process, other in enumerate(steps):
        if other != steps[0]:
            why = f"in {folder} the main process finds step {steps[0]}, process {process} step {other}"
            do = "make --output a folder that all machines share"
            raise UsageError("the processes would start at different steps", why, do)


def share(subjects: int, accelerator: Accelerator) -> slice:
    """This process's part of a step's subjects.

    Raises:
        UsageError: the subjects cannot be divided equally.
    """
    count, number = accelerator.num_processes, accelerator.process_index
    if subjects % count:
        what = f"a step of {subjects} subjects cannot be divided among {count} processes"
        do = f"set --batch-size to a multiple of {count} times --targets"
        raise UsageError(what, "every process takes the same number of subjects", do)
    return slice(subjects // count * number, subjects // count * (number + 1))
