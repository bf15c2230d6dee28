"""How much does it save to compute keys and values of the cross-attentions once per prompt?

    python bench/hoist.py [--family tiny|sd15|sdxl] [--size PIXELS] [--backend auto]

    time_ratio           time of a step with K and V from `context` / of one that computes them
    memory_ratio         peak memory of a process that runs the former / the latter
    weight_bytes_saved   of the key and value projections in fp16, free after the prompt

Random weights, three rows, one picture, fp32. Both graphs are exported by this script and differ only in the
projections and their LoRA; their outputs are compared first. Steps take turns; the time is the median over
rounds of the ratio within a round. Memory is measured in one process for each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median

import numpy as np
import report

from hyperrt import engines
from hyperrt.engines.base import Engine

BARS = {"time_ratio": "<= 1", "memory_ratio": "< 1"}
WAYS = ("hoisted", "in_step")
SIZES = {"images": 1, "branches": 3, "rows": 3, "subjects": 1}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=("tiny", "sd15", "sdxl"), default="sd15")
    parser.add_argument("--size", type=int, help="pixels; default: the family's")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="run the minimum, to test the script")
    parser.add_argument("--memory-of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.family, args.rounds, args.warm_up = "tiny", 2, 1
    if args.memory_of:
        print(json.dumps(peak_of(args.memory_of, args.backend)))
        return
    with tempfile.TemporaryDirectory() as folder:
        saved = write_both(Path(folder), args)
        times = time_both(Path(folder), args)
        peaks = {way: memory_in_child(Path(folder) / way, args.backend) for way in WAYS}
    report.table(
        [(way, median(times[way]), min(times[way]), peaks[way] / 1e9) for way in WAYS],
        ("K and V", "median ms", "min ms", "peak GB"),
    )
    figures = {
        "time_ratio": median(np.array(times["hoisted"]) / np.array(times["in_step"])),
        "memory_ratio": peaks["hoisted"] / peaks["in_step"],
        "weight_bytes_saved": saved,
    }
    report.finish(__file__, figures, BARS)


def write_both(folder: Path, args: argparse.Namespace) -> int:
    """Exports both denoisers and their feeds; returns the bytes of the K and V weights in fp16."""
    import dataclasses

    from torch import Tensor

    from hyperrt.engines.tensors import TensorSpec
    from hyperrt.export import families, graph_specs, modules, onnx_graph
    from hyperrt.export.source import sized
    from hyperrt.training.model import lora_layers
    from hyperrt.training.model.lora_layers import Rows

    class InStep(modules.DenoisingStep):
        """A denoiser that projects the text site by site, as diffusers does."""

        def forward(
            self, latents: Tensor, previous: Tensor, noise: Tensor, timestep: Tensor, coefficients: Tensor,
            guidance: Tensor, hidden_states: Tensor, gate: Tensor, lora_q: Tensor, lora_kv: Tensor,
            added: Tensor | None = None,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            gates = gate.reshape(-1, 1, 1)
            factors = lora_layers.unpack(self.layout, {"lora_q": lora_q, "lora_kv": lora_kv})
            rows = Rows(factors, gates, Projected(self.unet, hidden_states, Rows(factors, gates)))
            return self.step(latents, previous, noise, timestep, coefficients, guidance, gate, rows, added)

    source = sized(families.get(args.family).random(0), args.size)
    hoisted = next(graph for graph in graph_specs.build(source) if graph.name == "denoiser")
    text = TensorSpec("hidden_states", ("rows", source.max_tokens, source.text_width), "float32")
    lora_kv = TensorSpec("lora_kv", ("subjects", source.layout.size("lora_kv")), "float32")
    inputs = [text if spec.name == "context" else spec for spec in hoisted.inputs]
    index = [spec.name for spec in inputs].index("lora_q") + 1

    def make(loaded: graph_specs.Modules) -> InStep:
        return InStep(hoisted.make(loaded).unet, layout=source.layout)

    in_step = dataclasses.replace(hoisted, make=make, inputs=(*inputs[:index], lora_kv, *inputs[index:]))
    part = source.parts["unet"]
    loaded = {"unet": part.load()}
    for way, graph in zip(WAYS, (hoisted, in_step), strict=True):
        (folder / way).mkdir()
        onnx_graph.write(graph, {"unet": part.skeleton}, loaded, folder / way)
    unet = loaded["unet"].float()
    feeds = {name: tensor.numpy() for name, tensor in in_step.feeds(SIZES, seed=0).items()}
    context = lora_layers.context(
        unet, *(in_step.feeds(SIZES, seed=0)[name] for name in ("hidden_states", "gate", "lora_kv")),
        source.layout,
    )  # fmt: skip
    extra = {"hoisted": {"context": context.numpy()}, "in_step": {}}
    for way in WAYS:
        np.savez(folder / way / "feeds.npz", **feeds, **extra[way])
    return sum(2 * site.d_in * site.d_out for site in source.layout.sites_of("lora_kv"))


class Projected(Mapping):
    """Path of an attn2 -> its K and V, computed on access."""

    def __init__(self, unet: object, hidden_states: object, rows: object) -> None:
        from hyperrt.training.model import lora_layers

        self.modules = dict(lora_layers.attentions(unet, "attn2"))
        self.hidden_states, self.rows = hidden_states, rows

    def __getitem__(self, path: str) -> tuple[object, object]:
        from hyperrt.training.model.lora_layers import project

        key, value = (
            project(getattr(self.modules[path], name), f"{path}.{name}", self.hidden_states, self.rows)
            for name in ("to_k", "to_v")
        )
        return key, value

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)


def opened(folder: Path, backend: str) -> tuple[Engine, dict[str, np.ndarray]]:
    """An engine with the inputs bound that stay over a loop, and the inputs of a step."""
    backend = engines.resolve(backend)
    # fp32, since the outputs are compared.
    fp32 = {"precision": "f32"} if engines.BACKENDS[backend].precisions else {}
    engine = engines.open(folder / "denoiser.onnx", backend, sizes=SIZES, **fp32)
    names = {spec.name for spec in engine.inputs}
    feeds = {name: array for name, array in np.load(folder / "feeds.npz").items() if name in names}
    varying = ("latents", "previous", "noise", "timestep", "coefficients")
    engine.bind({name: array for name, array in feeds.items() if name not in varying})
    return engine, {name: feeds[name] for name in varying}


def time_both(folder: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of the steps of both graphs, in turns."""
    steps = {way: opened(folder / way, args.backend) for way in WAYS}
    results = [engine.run(feeds)["next_latents"] for engine, feeds in steps.values()]
    error = float(np.abs(results[0] - results[1]).max() / np.abs(results[1]).max())
    print(f"relative difference of the outputs: {error:.1e}\n")
    if not error < 1e-3:
        raise SystemExit(f"the outputs of the two graphs differ by {error:.1e}")
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(args.warm_up + args.rounds):
        for way in WAYS if turn % 2 else reversed(WAYS):
            engine, feeds = steps[way]
            elapsed = report.milliseconds(lambda engine=engine, feeds=feeds: engine.run(feeds))
            if turn >= args.warm_up:
                times[way].append(elapsed)
    for engine, _ in steps.values():
        engine.close()
    return times


def peak_of(folder: Path, backend: str) -> int:
    """Peak memory of this process after two steps, in bytes."""
    engine, feeds = opened(folder, backend)
    for _ in range(2):
        engine.run(feeds)
    return report.peak_bytes()


def memory_in_child(folder: Path, backend: str) -> int:
    command = [sys.executable, __file__, "--memory-of", str(folder), "--backend", backend]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return int(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
