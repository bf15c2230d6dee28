"""The command `hyperrt compile`: a bundle's graphs to plans for a GPU, this machine's or another."""

from __future__ import annotations

from typing import Any

import click

from hyperrt.cli.configs import CompileConfig
from hyperrt.cli.output import Output, with_json


@click.command("compile")
@click.argument("bundle", metavar="NAME|DIR", default="tiny")
@click.option(
    "--backend", default="tensorrt-rtx", show_default=True, metavar="NAME", help="tensorrt-rtx or tensorrt."
)
@click.option(
    "--target", default="current", show_default=True, metavar="SM,…",
    help="GPUs to compile for, such as sm86,sm89; current is that of this machine.",
)  # fmt: skip
@click.option("--graph", multiple=True, metavar="NAME", help="Only this graph; may be repeated.")
@click.option("--images", type=int, default=1, show_default=True, help="Pictures of one engine call.")
@click.option(
    "--branches",
    type=int,
    default=3,
    show_default=True,
    help="Of the guidance; 2 with --cfg, or where kappa is 0 or 2.",
)
@click.option("--several-subjects", is_flag=True, help="The pictures of a call have different subjects.")
@click.option("--low-memory", is_flag=True, help="The decoder for tiles, as generate --low-memory runs it.")
@click.option("--force", "-f", is_flag=True, help="Compile what is there already, too.")
@with_json
@click.pass_obj
def compile_(output: Output, /, **options: Any) -> None:
    """Compile a bundle for TensorRT-RTX or TensorRT; what is compiled is kept: hyperrt plans list.

    TensorRT-RTX compiles for GPUs that this machine does not have. TensorRT compiles for its own alone.

    \b
    Examples:
      hyperrt compile my-bundle --target sm86,sm89,sm120
      hyperrt compile my-bundle --backend tensorrt
      hyperrt compile my-bundle --target sm89 --graph denoiser --branches 2
    """
    from hyperrt.bundle.bundle import Bundle
    from hyperrt.plans import build

    config = CompileConfig(**options)
    bundle = Bundle.open(config.bundle)
    sizes = build.sizes_of(
        bundle, config.images, config.branches,
        several=config.several_subjects, low_memory=config.low_memory,
    )  # fmt: skip
    wanted = len(config.targets) * len(config.graph or bundle.graphs)
    plans: list[dict[str, Any]] = []
    with output.progress("compile", 100 * wanted) as advance_to:

        def progress(graph: str, target: str, share: float) -> None:
            advance_to(100 * len(plans) + int(99 * share))

        for one in build.compile_bundle(
            bundle, config.backend, config.targets, sizes, config.graph,
            force=config.force, progress=progress,
        ):  # fmt: skip
            plans.append(_facts(one))
            advance_to(100 * len(plans))
            output.event("plan", **plans[-1])
    output.result("\n".join(_line(plan) for plan in plans), plans=plans)


def _facts(one: Any) -> dict[str, Any]:
    built = one.built
    facts = {"graph": one.plan.graph_name, "target": one.plan.key.target, "id": one.plan.key.id}
    facts |= {"bytes": one.plan.bytes, "path": str(one.plan.path)}
    if built is None:
        return {**facts, "seconds": 0.0}
    return {**facts, "seconds": built.seconds, "peak_bytes": built.peak_bytes, "inputs": built.inputs}


def _line(plan: dict[str, Any]) -> str:
    how = f"{plan['seconds']:.1f} s" if "inputs" in plan else "was there"
    return f"{plan['id'][:12]}  {plan['target']:6} {plan['graph']:15} {plan['bytes'] / 1e6:9.1f} MB  {how}"
