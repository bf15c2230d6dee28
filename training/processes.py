"""Several processes as one training, by accelerate: `accelerate launch -m training.train`, or torchrun.

Only the decoder and its optimizer go through it. The frozen parts stay as they are, one copy in each process:
wrapped, they would be averaged and cast for nothing. Every process computes its rows of the same batch, and
the gradients' mean is the gradient of the whole batch; so how many processes there are is no setting of a run.
"""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import AdamW, Optimizer

from hyperrt.errors import UsageError

PATIENCE = timedelta(hours=1)  # with a process that encodes the pictures, or draws samples, for the others


def start(cpu: bool, compress: bool = False) -> Accelerator:
    """Joins the processes that a launcher started; one that was not launched is alone.

    Args:
        cpu: whether a processor computes even where there is a GPU.
        compress: whether gradients travel as bf16.
    """
    hook = DDPCommunicationHookType.BF16 if compress else DDPCommunicationHookType.NO
    # The decoder's buffers never change, and gradients that are views of the buckets are not held twice.
    wrapper = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook
    )
    handlers = [wrapper, InitProcessGroupKwargs(timeout=PATIENCE)]
    # Precision and devices are training/device.py's.
    return Accelerator(cpu=cpu, mixed_precision="no", device_placement=False, kwargs_handlers=handlers)


def adamw(groups: list[dict[str, object]], lr: float, sharded: bool) -> Optimizer:
    """AdamW on groups of parameters; sharded: each process has the moments of some of them (ZeRO stage 1)."""
    options = {"lr": lr, "betas": (0.9, 0.99), "fused": True}
    if sharded and torch.distributed.is_initialized():
        return ZeroRedundancyOptimizer(groups, AdamW, **options)
    return AdamW(groups, **options)


def any_of(accelerator: Accelerator, flag: bool) -> bool:
    """Whether it is so in any process; all must ask."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def share(rows: int, accelerator: Accelerator) -> slice:
    """This process's part of a batch.

    Raises:
        UsageError: the rows cannot be shared equally.
    """
    of, number = accelerator.num_processes, accelerator.process_index
    if rows % of:
        do = f"set --batch to a multiple of {of} times --targets"
        raise UsageError(f"a batch of {rows} subjects cannot be shared by {of} processes", "all take as many", do)
    return slice(rows // of * number, rows // of * (number + 1))
