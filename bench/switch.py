"""Times a change of subject, and checks that nothing of the former subject remains.

Engines stay open and nothing is compiled; the factors of the new subject replace the former ones.

    switch_ms          from having another subject's LoRA to being able to run a step with it, the prompt
                       staying: its factors checked and copied into both graphs, K and V of all three branches
                       computed anew by the `context` graph and bound to the denoiser. Median over changes to
                       and fro. Not in it: photos, hypernetwork, the step, and the prompt's hidden states
    aba_max_diff       largest difference between the latents of subject A, and of A again after subject B
    a_base_max_diff    the same of the base model, before and after a subject
    row_alone_max_rel  largest relative difference between a row of a batch (subjects and base rows mixed, the
                       LoRA differing by row; that of Q by none, where it is refitted) and the same row alone,
                       K and V included

A target of 0 means equal bits: both pictures come from one open runtime, with the same seed.

With `--family sd15|sdxl` the bundle is of that size with random weights (`--bundle`, or exported once), the
subjects are random, and only `switch_ms` is measured.  `--peers` adds other programs in
fp32, from LoRA tensors in memory to a UNet that can run a step, each in a separate process (bench/peer_*.py):

    diffusers_fuse_ms      unfuse the old LoRA, load the new one, fuse it
    diffusers_hotswap_ms   replace the tensors of an adapter that stays unfused
    openvino_genai_ms      an adapter from bytes in memory, set in openvino.genai's UNet
    onnxruntime_reload_ms  LoRA merged into the weights, a new session of ONNX Runtime on them
    times_faster           the least of these / switch_ms

Their figures are without K and V, which they compute in every step; ours is with them.
"""

from __future__ import annotations

import argparse
from itertools import cycle
from statistics import median

import against
import numpy as np
import peer_environment
import peer_ours
import report

from hyperrt import Runtime, engines
from hyperrt.bundle.bundle import Bundle
from hyperrt.engines.base import Engine
from hyperrt.lora.subject import Subject
from hyperrt.session.adapter import put_lora
from hyperrt.session.resident import Resident

BARS = {"switch_ms": "< 2", "aba_max_diff": "0", "a_base_max_diff": "0", "row_alone_max_rel": "< 1e-5"}
SUBJECTS = report.ROOT / "examples" / "subjects"
GATE = np.array([0, 1, 0], np.float32)  # empty prompt, subject, generic prompt
VECTOR = {"denoiser": "lora_q", "context": "lora_kv"}
HELD = ("lora_q", "lora_kv", "context", "added")  # by the engines, between steps
WARM_UP = 10
IMAGES, BRANCHES = 2, 3


def main() -> None:
    parser = report.options(__doc__)
    parser.add_argument("--changes", type=int, help="default: 500, of a family 20")
    parser.add_argument("--family", choices=("sd15", "sdxl"), help="full size")
    parser.add_argument("--peers", action="store_true", help="with --family: also measure the peers")
    parser.add_argument("--backend", default="auto", help="with --family: backend of HyperRT (default: auto)")
    parser.set_defaults(bundle=None)
    against.add_options(parser)
    args = parser.parse_args()
    if args.against:
        against.finish(__file__, args, BARS)
    elif args.family:
        full_size(args)
    else:
        args.bundle, args.changes = args.bundle or "tiny", args.changes or 500
        small(args)


def small(args: argparse.Namespace) -> None:
    """Measures all figures on a small bundle, with subjects of photos."""
    changes, steps = (5, 2) if args.quick else (args.changes, None)
    with Runtime.open(args.bundle, "onnxruntime") as runtime:
        subjects = [runtime.personalize(SUBJECTS / name, name) for name in ("mug", "robot")]
        bundle = runtime.bundle
        figures = return_differences(runtime, *subjects, steps)
    with (
        engines.open(bundle.graph("context")) as context,
        engines.open(bundle.graph("denoiser")) as denoiser,
    ):
        times = switch_times(bundle, context, denoiser, subjects, changes)
        alone = row_alone(bundle, context, denoiser, subjects)
    report.finish(__file__, {"switch_ms": total(times), **figures, "row_alone_max_rel": alone}, BARS)


def full_size(args: argparse.Namespace) -> None:
    """Measures the switch alone, on a full-size bundle of random weights, and the peers."""
    bundle = Bundle.open(args.bundle or peer_environment.bundle(args.family))
    subjects = [peer_ours.random_subject(bundle, seed) for seed in (0, 1)]
    with Runtime.open(bundle.path, args.backend) as runtime:
        times = {"ready for the first step": prepare_times(runtime, subjects, args.changes or 20)}
    figures = {"switch_ms": total(times)}
    if args.peers:
        theirs = peers(args.family)
        figures |= theirs | {"times_faster": min(theirs.values()) / figures["switch_ms"]}
    report.finish(__file__, figures, {"switch_ms": "< 20", "times_faster": ">= 20"})


def prepare_times(runtime: Runtime, subjects: list[Subject], changes: int) -> list[float]:
    """Milliseconds from LoRA tensors to a denoiser that is ready for its first step, prompts unchanged."""
    times = []
    for turn, subject in zip(range(WARM_UP + changes), cycle(subjects), strict=False):
        elapsed = report.milliseconds(
            lambda subject=subject: runtime.prepare(runtime.request("a [V] on a beach", subject))
        )
        if turn >= WARM_UP:
            times.append(elapsed)
    return times


def peers(family: str) -> dict[str, float]:
    """Milliseconds of each peer's change of subject, median of at least five."""
    figures, rows = {}, []
    for name in peer_environment.PEERS:
        folder = peer_environment.model(family, *dict.fromkeys(("diffusers", "lora", name)))
        found = peer_environment.call(name, f"peer_{name}.py", "switch", str(folder))
        versions = " ".join(f"{package} {number}" for package, number in found.pop("versions").items())
        for key, times in found.items():
            figures[key] = 1000 * times["median_s"]
            rows.append((key, figures[key], 1000 * times["least_s"], times["rounds"], versions))
    report.table(rows, ("peer", "median ms", "min ms", "changes", "versions"))
    return figures


def total(times: dict[str, list[float]]) -> float:
    """Median milliseconds of a change; prints its parts."""
    report.table(
        [(name, len(x), median(x), max(x)) for name, x in times.items()],
        ("part of a switch", "changes", "median ms", "max ms"),
    )
    return median([sum(parts) for parts in zip(*times.values(), strict=True)])


def switch_times(
    bundle: Bundle, context: Engine, denoiser: Engine, subjects: list[Subject], changes: int
) -> dict[str, list[float]]:
    """Milliseconds of every change of subject, by its parts."""
    residents = {"denoiser": Resident(denoiser), "context": Resident(context)}
    texts = random_inputs(bundle, "context", len(GATE))

    def put_both(subject: Subject) -> None:
        for graph, resident in residents.items():
            put(bundle, graph, resident, subject)

    def renew() -> None:
        denoiser.bind(context.run({**texts, "gate": GATE}))

    times: dict[str, list[float]] = {"factors into both graphs": [], "K and V": []}
    for turn, subject in zip(range(WARM_UP + changes), cycle(subjects), strict=False):
        parts = report.milliseconds(lambda subject=subject: put_both(subject)), report.milliseconds(renew)
        if turn >= WARM_UP:
            for values, part in zip(times.values(), parts, strict=True):
                values.append(part)
    for engine in (context, denoiser):
        engine.unbind([spec.name for spec in engine.inputs if spec.name in HELD])
    return times


def put(bundle: Bundle, graph: str, resident: Resident, subject: Subject) -> None:
    """Puts a subject's LoRA into one of the two graphs with a LoRA."""
    put_lora(resident, VECTOR[graph], bundle.layout, bundle.graphs[graph].adapt, [subject])


def return_differences(runtime: Runtime, a: Subject, b: Subject, steps: int | None) -> dict[str, float]:
    """How far subject A, and the base model, are from themselves after something else was drawn."""

    def latents(subject: Subject | None) -> np.ndarray:
        prompt = "a [V] mug on a beach" if subject else "a mug on a beach"
        return runtime.generate(prompt, subject, seed=3, steps=steps).latents

    base, first, other, again, base_again = (latents(subject) for subject in (None, a, b, a, None))
    if np.array_equal(first, other):
        raise SystemExit("both subjects give the same latents, so the comparison proves nothing")
    return {
        "aba_max_diff": float(np.abs(again - first).max()),
        "a_base_max_diff": float(np.abs(base_again - base).max()),
    }


def row_alone(bundle: Bundle, context: Engine, denoiser: Engine, subjects: list[Subject]) -> float:
    """Rows = branches x images, branch-major, the rows of the middle branch with a subject of their own."""
    rows = IMAGES * BRANCHES
    rng = np.random.default_rng(0)
    gate = np.repeat(GATE, IMAGES)
    lora = {
        name: np.stack([subjects[row % len(subjects)].lora[name] for row in range(rows)])
        for name in ("lora_q", "lora_kv")
    }
    texts = random_inputs(bundle, "context", rows)
    refitted = bundle.graphs["denoiser"].adapt == "refit"
    if refitted:
        put(bundle, "denoiser", Resident(denoiser), subjects[0])
    latents = rng.standard_normal(
        (IMAGES, bundle.latent.channels, bundle.latent.size, bundle.latent.size), np.float32
    )

    def outputs(which: list[int], guidance: np.ndarray) -> np.ndarray:
        """The guidance sum of these rows' predictions, [images, C, h, w]."""
        own = {name: vectors[which] for name, vectors in lora.items()}
        feeds = {name: array[which] for name, array in texts.items()}
        feeds |= {"gate": gate[which], "lora_kv": own["lora_kv"]}
        x = latents[sorted({row % IMAGES for row in which})]
        constants = {"gate": gate[which], "guidance": guidance, **context.run(feeds)}
        if not refitted:
            constants["lora_q"] = own["lora_q"]
        # With these coefficients the next latents are the sum itself.
        solver = {
            "coefficients": np.array([1, 0, 1, 0, 0, 0, 1], np.float32),
            "timestep": np.array(501, np.float32),
        }
        return denoiser.run({"latents": x, "previous": x, "noise": x, **solver, **constants})["next_latents"]

    worst = 0.0
    for row in range(rows):
        branch, image = divmod(row, IMAGES)
        fused = outputs(list(range(rows)), np.eye(BRANCHES, dtype=np.float32)[branch])[image]
        alone = outputs([row], np.ones(1, np.float32))[0]
        worst = max(worst, float(np.abs(fused - alone).max() / np.abs(alone).max()))
    return worst


def random_inputs(bundle: Bundle, graph: str, rows: int) -> dict[str, np.ndarray]:
    """Gaussian arrays for a graph's inputs that depend on the prompts, with `rows` rows."""
    rng = np.random.default_rng(1)
    specs = [spec for spec in bundle.graphs[graph].inputs if spec.name not in ("gate", "lora_kv")]
    return {spec.name: rng.standard_normal((rows, *spec.shape[1:]), np.float32) for spec in specs}


if __name__ == "__main__":
    main()
