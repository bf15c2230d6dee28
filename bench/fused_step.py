"""How much time does one call for all branches of HM-CFG save, and what does the LoRA cost in it?

HyperRT computes a step as one call of three rows: base with the empty prompt, personalised, base with the
generic prompt. The usual way is two models: the base model on two rows, the personalised model on one.

    fused_over_two_calls   time of the call of three rows / (base pair + personalised single)
    lora_overhead          time of the call of three rows / time of the plain UNet on them, minus 1

The plain UNet is the bundle's denoiser without the LoRA's nodes; the script checks that it gives the result
of the denoiser with gate 0. The base pair runs on it. Calls are made as in the runtime: same backend and
threads, constants bound. Each round makes all calls in random order, and a figure is the median over the
rounds of the ratio within a round, so that other load affects all alike. One picture, at the bundle's size.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import against
import numpy as np
import onnx_ir as ir
import report
from onnx_ir.passes.common import RemoveUnusedNodesPass

from hyperrt import engines
from hyperrt.bundle.bundle import Bundle
from hyperrt.sampling import guidance

BARS = {"fused_over_two_calls": "< 0.95", "lora_overhead": "< 0.05"}
WARM_UP = 5  # rounds that are not counted
BASE_PAIR, SUBJECT = [0, 2], [1]  # rows of the three


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--threads", type=int, help="default: as the runtime chooses")
    against.add_options(parser)
    args = parser.parse_args()
    if args.against:
        against.finish(__file__, args, BARS)
        return
    bundle = Bundle.open(args.bundle)
    with tempfile.TemporaryDirectory() as folder:
        plain = without_lora(bundle.graph("denoiser"), Path(folder) / "plain.onnx")
        times, error = measure(bundle, plain, 3 if args.quick else args.rounds, args.threads)
    print(f"plain UNet against the denoiser with its gate at 0: relative difference {error:.1e}\n")
    names = {"fused": "three rows, LoRA", "plain": "three rows, plain UNet", "pair": "base pair, plain UNet"}
    names["single"] = "personalised single, LoRA"
    rows = [(names[key], len(times[key]), median(times[key]), min(times[key])) for key in names]
    report.table(rows, ("call", "rounds", "median ms", "min ms"))
    fused, plain_times, pair, single = (np.array(times[key]) for key in names)
    figures = {
        "fused_over_two_calls": float(np.median(fused / (pair + single))),
        "lora_overhead": float(np.median(fused / plain_times)) - 1,
        "fused_ms": float(np.median(fused)),
    }
    report.finish(__file__, figures, BARS)


def without_lora(denoiser: Path, path: Path) -> Path:
    """Writes the denoiser without its LoRA: replaces each sum of projection and LoRA by the projection."""
    model = ir.load(denoiser)
    graph = model.graph
    lora = next(value for value in graph.inputs if value.name == "lora_q")
    of_lora = {lora}  # values computed from the LoRA alone
    for node in graph:
        others = [value for value in node.inputs if value not in of_lora]
        if len(others) == len(node.inputs):
            continue
        if node.op_type == "Add" and len(others) == 1:
            node.outputs[0].replace_all_uses_with(others[0])
        else:
            of_lora.update(node.outputs)
    RemoveUnusedNodesPass()(model)
    graph.inputs.remove(lora)
    ir.save(model, path)
    return path


def measure(
    bundle: Bundle, plain: Path, rounds: int, threads: int | None
) -> tuple[dict[str, list[float]], float]:
    """Milliseconds of every call in every round, and the error of the plain UNet against gate 0."""
    constants = random_constants(bundle)
    variable = random_latents(bundle)
    base = {name: value for name, value in constants.items() if name != "lora_q"}

    def step(path: Path, rows: list[int], feeds: dict[str, np.ndarray], **changed: np.ndarray) -> Callable:
        engine = engines.open(path, threads=threads)
        by_row = {name: feeds[name][rows] for name in ("context", "gate", "guidance")}
        engine.bind({**feeds, **by_row, **changed})
        return partial(engine.run, variable)

    denoiser = bundle.graph("denoiser")
    all_rows = [0, 1, 2]
    calls = {
        "fused": step(denoiser, all_rows, constants),
        "plain": step(plain, all_rows, base),
        "pair": step(plain, BASE_PAIR, base),
        "single": step(denoiser, SUBJECT, constants),
    }
    gate_shut = step(denoiser, all_rows, constants, gate=np.zeros(3, np.float32))()["next_latents"]
    error = np.abs(calls["plain"]()["next_latents"] - gate_shut).max() / np.abs(gate_shut).max()
    if not error < 1e-5:
        raise SystemExit(f"the plain UNet differs from the denoiser at gate 0 by {error:.1e}")
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    for turn in range(WARM_UP + rounds):
        shuffle(order)
        for name in order:
            elapsed = report.milliseconds(calls[name])
            if turn >= WARM_UP:
                times[name].append(elapsed)
    return times, float(error)


def random_constants(bundle: Bundle) -> dict[str, np.ndarray]:
    """The inputs that stay over a loop, for one picture with the rows empty, subject, generic."""
    rng = np.random.default_rng(0)
    sizes = {spec.name: spec.shape for spec in bundle.graphs["denoiser"].inputs}
    defaults = bundle.defaults
    weights = guidance.hm_cfg_weights(defaults.guidance_scale, defaults.kappa)
    added = {"added": rng.standard_normal((3, *sizes["added"][1:]), np.float32)} if "added" in sizes else {}
    return added | {
        "context": rng.standard_normal((3, *sizes["context"][1:]), np.float32),
        "gate": np.array([0, 1, 0], np.float32),
        "guidance": np.array(weights, np.float32),
        "lora_q": 0.1 * rng.standard_normal((1, *sizes["lora_q"][1:]), np.float32),
    }


def random_latents(bundle: Bundle) -> dict[str, np.ndarray]:
    """The inputs that change in every step, for one picture."""
    rng = np.random.default_rng(1)
    shape = (1, bundle.latent.channels, bundle.latent.size, bundle.latent.size)
    return {
        **{name: rng.standard_normal(shape, np.float32) for name in ("latents", "previous", "noise")},
        "timestep": np.array(501, np.float32),
        "coefficients": np.array([1, 0.9, 0.1, 0.05, 0, 0.9, 0.1], np.float32),
    }


if __name__ == "__main__":
    main()
