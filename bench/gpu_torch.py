"""Times PyTorch: a step of HM-CFG with three rows, and a change of subject.

    naive   as with diffusers: the base model on two rows, then the same UNet with the LoRA on one row; q, k
            and v of every attention in every step
    rows    HyperRT's step in PyTorch: one call of three rows with the LoRA on one, keys and values computed
            once per subject, guidance and solver included (export/modules.py)

A change of subject copies the factors from the host's memory to the device; for `rows` it also computes keys
and values.  Weights are random, sizes are true.  `rows` of SDXL has the image tokens of the open category,
`naive` does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import gpu_timing
import numpy as np

try:
    import torch

    from hyperrt.export import families, graph_specs, precision
    from hyperrt.export.source import Source
    from hyperrt.training.model import lora_layers
except ModuleNotFoundError as error:
    raise gpu_timing.Absent(f"PyTorch's kinds need the package {error.name!r}") from error

SIZES = {"images": 1, "branches": 3, "rows": 3, "subjects": 1}
GATE, WEIGHTS = (0.0, 1.0, 0.0), (-6.5, 3.75, 3.75)  # of empty prompt, subject, generic prompt
BASE, SUBJECT = (0, 2), (1,)  # rows
SOLVER = (1, 0.9, 0.1, 0, 0, 0.9, 0.1)  # coefficients of a step that does not use the last
Step = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, eq=False)
class Model:
    """A family's UNet on a device, and the inputs of its three rows.

    Attributes:
        feeds: every input of the `denoiser` graph, on the device.
        subjects: two packed LoRAs by name, in the host's memory.
        compiled: wraps a function in torch.compile, or returns it unchanged.
    """

    source: Source
    unet: Any
    precision: precision.Precision
    feeds: dict[str, torch.Tensor]
    hidden: torch.Tensor
    subjects: list[dict[str, torch.Tensor]]
    compiled: Callable[[Any], Any]

    @property
    def dtype(self) -> torch.dtype:
        """The type of the arithmetic."""
        return precision.DTYPES[self.precision]


def measure(args: argparse.Namespace, way: str, mode: str = "") -> dict[str, float]:
    """Figures of one way, "naive" or "rows".

    Args:
        mode: of torch.compile; "" computes eagerly.
    """
    device = gpu_timing.device(torch, args)
    torch.backends.cudnn.benchmark = True
    with torch.no_grad():
        model = build(args, device, mode)
        step, put = {"naive": naive, "rows": rows}[way](model)
        subjects = cycle(model.subjects)
        latents = model.feeds["latents"]

        def one_step() -> torch.Tensor:
            return finished(step(latents))

        def picture() -> torch.Tensor:
            x = latents
            for _ in range(args.steps):
                x = step(x)
            return finished(x)

        def switch() -> None:
            put(next(subjects))
            finished(latents)

        settle = torch.cuda.empty_cache  # without CUDA it does nothing
        return gpu_timing.figures(one_step, switch, picture, args, settle)


def finished(tensor: torch.Tensor) -> torch.Tensor:
    """Waits until the device has computed the tensor; returns it."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return tensor


def build(args: argparse.Namespace, device: str, mode: str) -> Model:
    """The family's UNet with PyTorch's initialisation, with random inputs and subjects."""
    torch.manual_seed(0)
    source = families.get(args.family).random(0)
    with torch.device(device):
        unet = source.parts["unet"].build().eval().requires_grad_(False)
    unet = unet.to(device=device, memory_format=torch.channels_last)
    feeds = denoiser_of(source).feeds(SIZES, seed=0)
    feeds |= {"gate": torch.tensor(GATE), "guidance": torch.tensor(WEIGHTS), "timestep": torch.tensor(501.0)}
    feeds["coefficients"] = torch.tensor(SOLVER)
    rng = np.random.default_rng(0)
    subjects = [
        {name: torch.from_numpy(0.01 * rng.standard_normal((1, source.layout.size(name)), np.float32))
         for name in ("lora_q", "lora_kv")}
        for _ in range(2)
    ]  # fmt: skip
    return Model(
        source=source,
        unet=unet,
        precision=args.precision,
        feeds={name: tensor.to(device) for name, tensor in feeds.items()},
        hidden=torch.randn(3, source.max_tokens, source.text_width, device=device),
        subjects=subjects,
        compiled=compiler(device, mode),
    )


def compiler(device: str, mode: str) -> Callable[[Any], Any]:
    """torch.compile in that mode; on a CPU only its tracing, which needs no C++ compiler."""
    if not mode:
        return lambda function: function
    if device == "cpu":
        return lambda function: torch.compile(function, backend="eager", dynamic=False)
    compiled = lambda function: torch.compile(function, mode=mode, dynamic=False)  # noqa: E731
    return (lambda function: replayed(compiled(function))) if mode == "reduce-overhead" else compiled


def replayed(function: Any) -> Any:
    """Copies the results of a CUDA graph, which its next launch overwrites."""
    return lambda *tensors: function(*tensors).clone()


def denoiser_of(source: Source) -> graph_specs.GraphSpec:
    """The graph of a step."""
    return next(graph for graph in graph_specs.build(source) if graph.name == "denoiser")


def naive(model: Model) -> tuple[Step, Callable[[dict[str, torch.Tensor]], None]]:
    """Two calls of one UNet, with the LoRA off and on."""
    feeds, dtype, layout = model.feeds, model.dtype, model.source.layout
    unet = model.unet.to(dtype)
    lora_layers.install(unet)
    device, text = model.hidden.device, model.hidden.to(dtype)
    lora = {name: vector.to(device, dtype, copy=True) for name, vector in model.subjects[0].items()}
    open_gate = torch.ones(1, 1, 1, device=device, dtype=dtype)
    time, c, weights = feeds["timestep"], feeds["coefficients"], feeds["guidance"].reshape(3, 1, 1, 1)
    texts = {rows: text[list(rows)] for rows in (BASE, SUBJECT)}
    others = {rows: added(model, len(rows)) for rows in (BASE, SUBJECT)}

    def predict(x: torch.Tensor, text: torch.Tensor, other: Any, lora_q: Any, lora_kv: Any) -> torch.Tensor:
        kwargs: dict[str, Any] = {}
        if lora_q is not None:
            factors = lora_layers.unpack(layout, {"lora_q": lora_q, "lora_kv": lora_kv})
            kwargs = {"cross_attention_kwargs": {"rows": lora_layers.Rows(factors, open_gate)}}
        return unet(x, time, text, added_cond_kwargs=other, return_dict=False, **kwargs)[0]

    call = model.compiled(predict)

    def step(latents: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        x = (latents * c[0]).to(dtype)
        base = call(x.repeat(2, 1, 1, 1), texts[BASE], others[BASE], None, None)
        personal = call(x, texts[SUBJECT], others[SUBJECT], lora["lora_q"], lora["lora_kv"])
        g = (weights * torch.cat([base[:1], personal, base[1:]]).float()).sum(0, keepdim=True)
        return c[1] * latents + c[2] * g

    def put(subject: dict[str, torch.Tensor]) -> None:
        for name, vector in subject.items():
            lora[name].copy_(vector)

    return step, put


def added(model: Model, rows: int) -> dict[str, torch.Tensor] | None:
    """SDXL's added conditioning for so many rows, pooled text and sizes; None for other families."""
    if not model.source.is_sdxl:
        return None
    device, side = model.hidden.device, model.source.image_size
    pooled = model.source.config("text_encoder_2").projection_dim
    sizes = torch.tensor([side, side, 0, 0, side, side], device=device, dtype=model.dtype)
    return {
        "text_embeds": torch.ones(rows, pooled, device=device, dtype=model.dtype),
        "time_ids": sizes.repeat(rows, 1),
    }


def rows(model: Model) -> tuple[Step, Callable[[dict[str, torch.Tensor]], None]]:
    """One call of three rows."""
    module = precision.apply(denoiser_of(model.source).make({"unet": model.unet}), model.precision)
    feeds = dict(model.feeds)
    text, gate, layout = model.hidden.to(model.dtype), feeds["gate"].to(model.dtype), model.source.layout
    names = [name for name in feeds if name not in ("latents", "previous", "noise")]

    def compute(latents: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        by_name = dict(zip(names, inputs, strict=True))
        return module(latents=latents, previous=latents, noise=latents, **by_name)[0]

    call = model.compiled(compute)

    def step(latents: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return call(latents, *(feeds[name] for name in names))

    def put(subject: dict[str, torch.Tensor]) -> None:
        feeds["lora_q"].copy_(subject["lora_q"])
        lora_kv = subject["lora_kv"].to(gate.device, model.dtype)
        context = lora_layers.context(model.unet, text, gate, lora_kv, layout)
        feeds["context"][:, : context.shape[1]].copy_(context)  # the image tokens come after it

    return step, put
