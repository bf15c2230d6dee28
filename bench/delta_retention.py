"""How much of a LoRA's effect is left when the base model's weights are int8?

The effect of a LoRA is y(base + LoRA) - y(base), computed in float32.  It is compared with the same
difference for quantised weights (symmetric, one scale per output channel).  The LoRA either stays in floating
point beside them (`beside`, as in HyperRT) or is added before the weights are quantised (`merged`).

    beside, merged     share kept: squared cosine of the two differences; the rest is rounding noise.  Mean
                       over the q, k and v projections of all cross-attentions of SD1.5
    *_projection       length of the difference along the effect; 1 is full strength
    *_error            norm of (difference - effect) / norm of the effect
    beside_step, …     with `--bundle` and `--int8`, the same base model in floating point and in int8: the
                       LoRA's effect on the noise that a step predicts, K and V included

The projections have Gaussian weights of the true shapes, the LoRA's product has 1 % of their rms (`--delta`),
inputs are Gaussian; only weights are rounded.  Rounding a merged LoRA is unbiased, so its projection stays 1
although much of the difference is noise; the projection alone says nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import fmean
from typing import NamedTuple

import numpy as np
import report

from hyperrt import engines
from hyperrt.bundle.bundle import Bundle
from hyperrt.lora.layout import VECTORS

BARS = {"beside": ">= 0.98", "beside_step": ">= 0.98"}
TEXT, RANK, ROWS = 768, 3, 256  # width of SD1.5's text, rank of its LoRA, rows of the random inputs
BLOCKS = {320: 5, 640: 5, 1280: 6}  # cross-attentions of each width: 2 + 3, 2 + 3, 2 + 1 + 3


class Kept(NamedTuple):
    """How much of an effect is left; see the figures above."""

    share: float
    projection: float
    error: float


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--delta", type=float, default=0.01, help="rms of the LoRA / rms of the weight")
    parser.add_argument("--int8", help="folder of the bundle in int8, for the figures of a step")
    parser.add_argument("--backend", default="auto")
    args = parser.parse_args()
    figures: dict[str, float] = {}
    rows = []
    for delta in (args.delta,) if args.quick else (args.delta / 3, args.delta, 3 * args.delta):
        for way, kept in projections(delta, args.quick).items():
            rows.append((f"{100 * delta:.2g} %", way, *kept))
            if delta == args.delta:
                figures |= named(way, kept)
    if args.int8:
        kept = compare(*(step_effect(name, args.backend, args.delta) for name in (args.bundle, args.int8)))
        rows.append((f"{100 * args.delta:.2g} %", "beside, a whole step", *kept))
        figures |= named("beside_step", kept)
    report.table(rows, ("LoRA / weight", "LoRA", "share kept", "projection", "relative error"))
    report.finish(__file__, figures, BARS)


def named(key: str, kept: Kept) -> dict[str, float]:
    """The figures of one comparison."""
    return {key: kept.share, f"{key}_projection": kept.projection, f"{key}_error": kept.error}


def int8(weight: np.ndarray) -> np.ndarray:
    """Weights [in, out] rounded to int8 with a scale per output channel."""
    scale = np.abs(weight).max(axis=0, keepdims=True) / 127
    return np.rint(weight / scale) * scale


def compare(effect: np.ndarray, kept: np.ndarray) -> Kept:
    """How much of `effect` is in `kept`, an array of the same shape.  The share of zeros is 0."""
    effect, kept = effect.astype(np.float64).ravel(), kept.astype(np.float64).ravel()
    along, length, own = effect @ kept, effect @ effect, kept @ kept
    share = along**2 / (length * own) if own else 0.0
    return Kept(float(share), float(along / length), float(np.linalg.norm(kept - effect) / np.sqrt(length)))


def sites() -> Iterator[tuple[int, int]]:
    """(in, out) of every adapted projection."""
    for width, blocks in BLOCKS.items():
        for _ in range(blocks):
            yield from ((width, width), (TEXT, width), (TEXT, width))


def projections(delta: float, quick: bool) -> dict[str, Kept]:
    """Means over the projections, for `beside` and `merged`."""
    rng = np.random.default_rng(0)
    results: dict[str, list[Kept]] = {"beside": [], "merged": []}
    for d_in, d_out in list(sites())[: 3 if quick else None]:
        weight = rng.standard_normal((d_in, d_out), np.float32) / np.sqrt(d_in)
        a, b = rng.standard_normal((d_in, RANK), np.float32), rng.standard_normal((RANK, d_out), np.float32)
        b *= delta * weight.std() / np.sqrt(RANK)
        x = rng.standard_normal((ROWS, d_in), np.float32)
        effect, base, lora = x @ (a @ b), x @ int8(weight), (x @ a) @ b
        results["beside"].append(compare(effect, (base + lora) - base))
        results["merged"].append(compare(effect, x @ int8(weight + a @ b) - base))
    return {way: Kept(*map(fmean, zip(*each, strict=True))) for way, each in results.items()}


def step_effect(name: str, backend: str, delta: float) -> np.ndarray:
    """The change by a random LoRA of the noise that a bundle predicts for one row, [1, C, h, w]."""
    bundle = Bundle.open(name)
    rng = np.random.default_rng(0)
    hidden = {
        spec.name: rng.standard_normal((1, *spec.shape[1:]), np.float32)
        for spec in bundle.graphs["context"].inputs
        if spec.name not in ("gate", "lora_kv")
    }
    lora = {name: gaussian_lora(bundle, name, delta, rng) for name in VECTORS}
    x = rng.standard_normal((1, bundle.latent.channels, bundle.latent.size, bundle.latent.size), np.float32)
    # With these coefficients the next latents are the predicted noise itself.
    coefficients = np.array([1, 0, 1, 0, 0, 0, 1], np.float32)
    gates = [np.array([strength], np.float32) for strength in (0, 1)]
    with engines.open(bundle.graph("context"), backend) as engine:
        contexts = [engine.run({**hidden, "gate": gate, "lora_kv": lora["lora_kv"]}) for gate in gates]
    with engines.open(bundle.graph("denoiser"), backend) as engine:
        base, own = (
            engine.run(
                {"latents": x, "previous": x, "noise": x, "guidance": np.ones(1, np.float32), "gate": gate}
                | {"timestep": np.array(501, np.float32), "coefficients": coefficients}
                | {"lora_q": lora["lora_q"], **context}
            )["next_latents"]
            for gate, context in zip(gates, contexts, strict=True)
        )
    return own - base


def gaussian_lora(bundle: Bundle, name: str, delta: float, rng: np.random.Generator) -> np.ndarray:
    """A packed vector [1, N] whose products have `delta` of the rms of fresh weights, 1 / sqrt(3 d_in)."""
    rank = bundle.layout.rank
    vector = np.empty(bundle.layout.size(name), np.float32)
    for site, part_a, part_b in bundle.layout.slices(name):
        vector[part_a] = rng.standard_normal(part_a.stop - part_a.start)
        vector[part_b] = rng.standard_normal(part_b.stop - part_b.start)
        vector[part_b] *= delta / np.sqrt(3 * site.d_in * rank)
    return vector[np.newaxis]


if __name__ == "__main__":
    main()
