"""Texts about plans: who built a plan and for what, how two differ, and the command that builds it again."""

from __future__ import annotations

import shlex

from hyperrt.engines.backends import BACKENDS
from hyperrt.plans.record import PlanKey

SHOWN = 12  # digits of an id in tables and messages
OPTIONS = {"images": ("--pictures", 1), "branches": ("--branches", 3)}  # of `hyperrt compile`, with defaults


def compile_command(key: PlanKey, bundle: str = "") -> str:
    """The command that builds the plan of a key, or words if the bundle is unknown."""
    if not bundle:
        return f"compile its bundle with --backend {key.backend}"
    words = ["hyperrt", "compile", bundle, "--backend", key.backend]
    backend = BACKENDS.get(key.backend)
    if backend is None or backend.cross_compiles:
        words += ["--target", key.target.split()[0]]
    sizes = dict(key.sizes)
    for name, (option, default) in OPTIONS.items():
        if sizes.get(name, default) != default:
            words += [option, str(sizes[name])]
    if sizes.get("subjects", 1) > 1:
        words.append("--several-subjects")
    return shlex.join(words)


def rebuild_command(key: PlanKey, bundle: str = "") -> str:
    """The commands that remove a plan and build it again."""
    return again(shlex.join(["hyperrt", "plans", "rm", key.id[:SHOWN]]), key, bundle)


def again(first: str, key: PlanKey, bundle: str = "") -> str:
    """A command followed by the command that builds the plan of a key."""
    return f"{first} && {compile_command(key, bundle)}" if bundle else first


def maker(key: PlanKey) -> str:
    """The compiler of a plan: "TensorRT 10.16"."""
    title = BACKENDS[key.backend].title if key.backend in BACKENDS else key.backend
    return f"{title} {key.version}"


def builder(key: PlanKey) -> str:
    """Compiler and target of a plan: "TensorRT 10.16 for sm89"."""
    return f"{maker(key)} for {key.target}"


def sizes(key: PlanKey) -> str:
    """The fixed sizes of a plan: "branches=3 images=1"."""
    return " ".join(f"{name}={value}" for name, value in key.sizes) or "any size"


def differing(key: PlanKey, other: PlanKey) -> str:
    """Compiler and target of a plan, and its other parts that differ from those of another plan."""
    parts = [builder(key)]
    if key.sizes != other.sizes:
        parts.append(sizes(key))
    if key.flags != other.flags:
        parts.append(", ".join(key.flags) or "no flags")
    if key.graph != other.graph:
        parts.append(f"graph {key.graph[:SHOWN]}")
    return ", ".join(parts)
