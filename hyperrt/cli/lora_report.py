"""The facts and checks of a LoRA file, for `hyperrt lora inspect` and `verify`. The file is untrusted."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

from hyperrt.bundle.bundle import Bundle
from hyperrt.cli.checks import Check, guarded
from hyperrt.errors import LoraError
from hyperrt.lora import metadata, reader, writer
from hyperrt.lora.reader import IMAGE_TOKENS, Factors, LoraFile, counted
from hyperrt.lora.safetensors_file import REMAKE
from hyperrt.lora.subject_file import load_file

PROJECTIONS = ("to_q", "to_k", "to_v")
FEW = 3  # items shown of a list that may have thousands
OTHERS = ("modelspec.", "ss_network", "ss_base_model", "ss_sd_model", "ss_output_name")  # keys shown


def facts(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The facts of a LoRA file, as JSON values; `kind` is subject.

    Raises:
        NotFound, LoraError: as `subject_file.open_lora`.
    """
    file = reader.open_lora(path)
    sites, faults = _sites(file)
    names = [name for pair in file.pairs.values() for name in (pair.a, pair.b)]
    tokens = file.entries.get(IMAGE_TOKENS)
    return {
        "kind": "subject",
        "format": file.format,
        "names": "first publication" if file.layers else "diffusers",
        "tensors": len(file.entries),
        "types": counted(entry.dtype for entry in file.entries.values()),
        "weights": sum(math.prod(file.entries[name].shape) for name in names),
        "rank": _one_or_counted([pair.rank for pair in file.pairs.values()]),
        "alpha": _one_or_counted([pair.alpha for pair in file.pairs.values()]),
        "sites": {name: len(pairs) for name, pairs in _by_projection(file.pairs).items()},
        "norms": {name: _norms(group) for name, group in _by_projection(sites).items() if group},
        **({} if tokens is None else {"image_tokens": list(tokens.shape)}),
        "finite": not faults,
        "faults": [*(f"{method.name}: {method.why}" for method in file.methods), *faults, *file.notes],
        "no_pairs": list(file.odd[:FEW]),
        "other_modules": reader.unused_kinds(file),
        "base_model": {
            "family": metadata.family_of(file.metadata, writer.text_width(sites)) or "unknown",
            "sha256": file.origin.get("base_model", "unknown"),
            "in_words": metadata.base_of(file.metadata) or "unknown",
        },
        "origin": file.origin,
        "metadata": {key: text for key, text in file.metadata.items() if key.startswith(OTHERS)},
    }


def checks(path: str | os.PathLike[str], bundle: str | None, partial: bool = False) -> Iterator[Check]:
    """Run every check, and yield its result.

    Args:
        bundle: name or folder of the bundle that the file must fit; None: only the file is checked.
        partial: accept other modules than the sites.

    Raises:
        NotFound, LoraError: as `subject_file.open_lora`: there is nothing to check.
        NotFound, BundleError: the bundle cannot be opened.
    """
    opened = Bundle.open(bundle) if bundle is not None else None
    layout = opened.layout if opened else None
    file = reader.open_lora(path, [site.path for site in layout.sites] if layout else ())
    yield Check("file", "ok", f"{file.name}: {file.format}, {len(file.entries)} tensors")
    alone = [
        guarded("tensors", lambda: _tensors(file, partial)),
        guarded("numbers", lambda: _numbers(file)),
        guarded("origin", lambda: _origin(file)),
        *(Check("configuration", "warn", note) for note in file.notes),
    ]
    yield from alone
    if opened and not any(check.status == "fail" for check in alone):  # it would fail for the same reason
        yield guarded(f"bundle {bundle}", lambda: _fits(file, opened, partial))


def _tensors(file: LoraFile, partial: bool) -> Check:
    reader.check_used(file, partial)
    ranks = counted(pair.rank for pair in file.pairs.values())
    counts = ", ".join(f"{len(pairs)} {name}" for name, pairs in _by_projection(file.pairs).items())
    detail = f"{len(file.pairs)} sites ({counts}), rank {' and '.join(map(str, ranks))}"
    if file.unused:
        return Check("tensors", "warn", f"{detail}; {len(file.unused)} tensors of other modules are left out")
    return Check("tensors", "ok", detail)


def _numbers(file: LoraFile) -> Check:
    norms = [writer.norm(file.factors(site)) for site in file.pairs]
    if tokens := file.tokens():
        reader.check_tokens(file.name, tokens.array(), tokens.shape[1:])
    if norms and not any(norms):
        return Check("numbers", "warn", "all are finite, but the LoRA is zero: it changes nothing")
    return Check("numbers", "ok", "all are finite")


def _origin(file: LoraFile) -> Check:
    if not file.origin:
        base = metadata.base_of(file.metadata)
        made = f"made by another program{f' for {base}' if base else ''}; the base model cannot be compared"
        return Check("origin", "warn", made, "draw a picture with it and look at it")
    if fault := metadata.fault(file.origin):
        raise LoraError(f"{file.name} has unusable metadata", fault, REMAKE)
    noun, base = file.origin["class_noun"], file.origin["base_model"]
    return Check("origin", "ok", f"a {noun} of {file.origin['photos']} photos, base model {base[:12]}")


def _fits(file: LoraFile, bundle: Bundle, partial: bool) -> Check:
    layout = bundle.layout
    base, tokens = bundle.hashes.base_model, bundle.token_shape
    load_file(file, layout, base, tokens, partial=partial, bundle=bundle.reference)
    missing = len(layout.sites) - len(file.pairs)
    detail = f"{len(file.pairs)} of {len(layout.sites)} sites"
    if missing:
        return Check("bundle", "warn", f"{detail}; the others keep the base model's weights")
    return Check("bundle", "ok", f"{bundle.name}: {detail}")


def _sites(file: LoraFile) -> tuple[dict[str, Factors], list[str]]:
    """The sites that can be read, and the errors of the others."""
    factors, faults = {}, []
    for site in file.pairs:
        try:
            factors[site] = file.factors(site)
        except LoraError as error:
            faults.append(f"{error.what}: {error.why}")
    return factors, faults[:FEW]


def _by_projection(sites: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [site for path, site in sites.items() if path.endswith(name)] for name in PROJECTIONS}


def _norms(sites: list[Factors]) -> dict[str, float]:
    """Mean and largest Frobenius norm of the products B A that are added to the weights."""
    norms = [writer.norm(factors) for factors in sites]
    return {"mean": float(f"{sum(norms) / len(norms):.4g}"), "max": float(f"{max(norms):.4g}")}


def _one_or_counted(values: list[Any]) -> Any:
    """The value if all are equal, otherwise the count of each: {"4": 30, "8": 2}."""
    counts = counted(values)
    return next(iter(counts), None) if len(counts) < 2 else {f"{key:g}": n for key, n in counts.items()}
