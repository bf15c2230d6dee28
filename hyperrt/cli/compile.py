"""The command `hyperrt compile`: compiles the graphs of a bundle to plans for one or more GPUs."""

from __future__ import annotations

from typing import Any

import click

from hyperrt.cli.configs import CompileConfig
from hyperrt.cli.options import force_option, pictures_option
from hyperrt.cli.origin import checked
from hyperrt.cli.output import with_json


@click.command("compile")
@click.argument("bundle", metavar="NAME|DIR", default="tiny")
@click.option(
    "--backend", default="tensorrt-rtx", show_default=True, metavar="NAME", help="tensorrt-rtx or tensorrt."
)
@click.option(
    "--target", default="current", show_default=True, metavar="SM,…",
    help="GPUs to compile for, such as sm86,sm89; current is the GPU of this machine.",
)  # fmt: skip
@click.option("--graph", multiple=True, metavar="NAME", help="Compile only this graph; may be repeated.")
@pictures_option("pictures", "Pictures per engine call.")
@click.option(
    "--branches",
    type=int,
    default=3,
    show_default=True,
    help="Guidance branches: 2 with --cfg, or if kappa is 0 or 2.",
)
@click.option("--several-subjects", is_flag=True, help="The pictures of a call show different subjects.")
@click.option("--low-memory", is_flag=True, help="Compile the decoder for tiles, for generate --low-memory.")
@force_option("Compile again what is in the cache.")
@with_json
@click.pass_context
def compile_(context: click.Context, /, **options: Any) -> None:
    """Compile a bundle for TensorRT-RTX or TensorRT, into the cache that hyperrt plans list shows.

    TensorRT-RTX also compiles for GPUs that this machine does not have. TensorRT compiles only for its own.

    \b
    Examples:
      hyperrt compile my-bundle --target sm86,sm89,sm120
      hyperrt compile my-bundle --backend tensorrt
      hyperrt compile my-bundle --target sm89 --graph denoiser --branches 2
    """
    from hyperrt.bundle.bundle import Bundle
    from hyperrt.plans import build

    config, output = checked(context, CompileConfig, options), context.obj
    bundle = Bundle.open(config.bundle)
    sizes = build.sizes_of(
        bundle, config.pictures, config.branches,
        several=config.several_subjects, low_memory=config.low_memory,
    )  # fmt: skip
    count = len(config.targets) * len(config.graph or bundle.graphs)
    plans: list[dict[str, Any]] = []
    with output.progress("compile", 100 * count) as advance_to:

        def progress(graph: str, target: str, share: float) -> None:
            advance_to(100 * len(plans) + int(99 * share))

        for compiled in build.compile_bundle(
            bundle, config.backend, config.targets, sizes, config.graph,
            force=config.force, progress=progress,
        ):  # fmt: skip
            plans.append(_facts(compiled))
            advance_to(100 * len(plans))
            output.event("plan", **plans[-1])
    output.result("\n".join(_line(plan) for plan in plans), plans=plans)


def _facts(compiled: Any) -> dict[str, Any]:
    plan, built = compiled.plan, compiled.built
    facts = {"graph": plan.graph_name, "target": plan.key.target, "id": plan.key.id}
    facts |= {"bytes": plan.bytes, "path": str(plan.path)}
    if built is None:
        return {**facts, "seconds": 0.0}
    return {**facts, "seconds": built.seconds, "peak_bytes": built.peak_bytes, "inputs": built.inputs}


def _line(plan: dict[str, Any]) -> str:
    how = f"{plan['seconds']:.1f} s" if "inputs" in plan else "in the cache"
    return f"{plan['id'][:12]}  {plan['target']:6} {plan['graph']:15} {plan['bytes'] / 1e6:9.1f} MB  {how}"
