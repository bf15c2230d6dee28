"""AdamW with a learning-rate schedule, clipped gradients, and an EMA of the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from hyperrt.errors import NumericError
from hyperrt.training.run import distributed


@dataclass(frozen=True)
class Schedule:
    """Length, learning rate and reports of a training: linear warm-up, then a cosine."""

    steps: int
    lr: float
    warmup: int = 100  # steps
    final_lr: float = 0.05  # where the cosine ends, as a share of lr
    ema: float = 0.999
    weight_decay: float = 1e-4
    clip: float = 1.0  # norm of the gradient
    log_every: int = 20
    report_every: int = 500

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


class Optimizer:
    """Updates a model and its EMA.

    Norms, biases and other vectors have no weight decay, nor have the parameters in `no_decay`.

    Args:
        model: what is trained, in place.
        accelerator: for a training that may run as several processes.
        sharded: whether each process keeps only its part of AdamW's moments.

    Attributes:
        ema: a copy of the model with averaged weights.
        model: what to call in a step: the model, or with several processes its DistributedDataParallel.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        no_decay: Sequence[str] = (),
        accelerator: Accelerator | None = None,
        sharded: bool = False,
    ) -> None:
        self.schedule = schedule
        self.ema = copy.deepcopy(model).requires_grad_(False).eval()
        self.named = dict(model.named_parameters())
        self.parameters = list(self.named.values())
        self.ema_parameters = list(self.ema.parameters())
        matrices, others = [], []
        for name, parameter in self.named.items():
            (matrices if parameter.ndim > 1 and name not in no_decay else others).append(parameter)
        groups = [
            {"params": matrices, "weight_decay": schedule.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.adamw = distributed.adamw(groups, schedule.lr, sharded)
        self.raw_model = self.model = model
        self.accelerator = accelerator
        if accelerator is not None:
            self.model, self.adamw = accelerator.prepare(model, self.adamw)

    def step(self, step: int, losses: Mapping[str, Tensor], batch: str = "") -> Tensor:
        """Updates the weights by the gradient of losses["loss"].

        Args:
            batch: what the batch holds, for the error message.

        Returns:
            All losses and the norm of the gradient, on the CPU; means over the processes.

        Raises:
            NumericError: one of them is not a finite number; the weights are left unchanged.
        """
        self.adamw.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        figures = torch.stack([*(value.detach().float() for value in losses.values()), norm.detach()])
        if self.accelerator is not None:
            figures = self.accelerator.reduce(figures, "mean")
        figures = figures.cpu()
        if not figures.isfinite().all():
            pairs = zip((*losses, "gradient"), figures.tolist(), strict=True)
            values = ", ".join(f"{name} {value:g}" for name, value in pairs)
            why = f"{values}; {batch}" if batch else values
            raise NumericError(
                f"step {step}: the loss is not a finite number", why, "lower the learning rate"
            )
        for group in self.adamw.param_groups:
            group["lr"] = self.schedule.rate(step)
        self.adamw.step()
        decay = min(self.schedule.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(self.ema_parameters, self.parameters, 1 - decay)
        return figures

    def tensors(self) -> dict[str, Tensor]:
        """Weights, EMA and AdamW's moments, by the names in `checkpoint.save_state`.

        Collective: every process must call it. Processes other than the main one get {} if AdamW is sharded.
        """
        adamw = self._unwrapped()
        if isinstance(adamw, ZeroRedundancyOptimizer):
            adamw.consolidate_state_dict(to=0)
            if not self.accelerator.is_main_process:
                return {}
        tensors = {f"model/{name}": tensor for name, tensor in self.raw_model.state_dict().items()}
        tensors |= {f"ema/{name}": tensor for name, tensor in self.ema.state_dict().items()}
        state = adamw.state_dict()["state"]
        for index, name in enumerate(self._order()):
            tensors |= {f"adam.{key}/{name}": value for key, value in state.get(index, {}).items()}
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads the result of `tensors`; others are ignored.

        Raises:
            RuntimeError: the tensors are another model's.
        """
        self.raw_model.load_state_dict(_under("model/", tensors))
        self.ema.load_state_dict(_under("ema/", tensors))
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in self.named}
        for key in {name.partition("/")[0] for name in tensors if name.startswith("adam.")}:
            for name, value in _under(f"{key}/", tensors).items():
                moments[name][key.removeprefix("adam.")] = value
        self._restore_moments(moments)

    def _restore_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Loads AdamW's state of each parameter, by name."""
        numbers = iter(range(len(self.named)))
        groups = [
            {**group, "params": [next(numbers) for _ in group["params"]]} for group in self.adamw.param_groups
        ]
        state = {
            index: {key: _laid_out(value, self.named[name]) for key, value in moments[name].items()}
            for index, name in enumerate(self._order())
            if moments[name]
        }
        self.adamw.load_state_dict({"state": state, "param_groups": groups})
        adamw = self._unwrapped()
        if isinstance(adamw, ZeroRedundancyOptimizer):
            for parameter, values in adamw.optim.state.items():
                # Loading leaves it on the host, but the fused AdamW of a GPU reads it on the GPU.
                values["step"] = values["step"].to(parameter.device)
            adamw.state.clear()  # a second copy, which nothing reads

    def _unwrapped(self) -> torch.optim.Optimizer:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.adamw, "optimizer", self.adamw)

    def _order(self) -> list[str]:
        """Names of the parameters in AdamW's order."""
        names = {parameter: name for name, parameter in self.named.items()}
        return [names[p] for group in self.adamw.param_groups for p in group["params"]]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """A moment in the memory layout of its parameter, which AdamW's fused kernel takes for granted."""
    if value.shape != parameter.shape:  # "step"
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
