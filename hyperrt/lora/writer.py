"""Writes a LoRA to a file of one of three formats, and converts between them.

A conversion copies the bits of A and B and writes alpha as the new format has it: a tensor per site (kohya),
or PEFT's configuration in the header (diffusers) or in a separate file (PEFT's folder).
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyperrt import files
from hyperrt.errors import LoraError
from hyperrt.lora import low_rank, names, safetensors_file
from hyperrt.lora import metadata as lora_metadata
from hyperrt.lora.peft_config import CONFIG, PEFT_CONFIG, PEFT_FILE
from hyperrt.lora.reader import (
    IMAGE_TOKENS,
    LAYERS,
    ORIGIN,
    Factors,
    LoraFile,
    counted,
)
from hyperrt.lora.safetensors_file import REMAKE, Stored

log = logging.getLogger("hyperrt")

Sites = Mapping[str, Factors]  # path of a site -> its LoRA, in the order of the file

_ONLY_IN_FOLDERS = ("peft_type", "bias", "inference_mode")  # PEFT's defaults, which diffusers does not need
_OF_A_FORMAT = ("format", CONFIG, LAYERS)


def write_ours(
    path: str | os.PathLike[str],
    format: str,
    sites: Sites,
    origin: Mapping[str, str],
    tokens: Stored | None = None,
    force: bool = False,
) -> None:
    """Write a subject of ours; files of two formats differ in the names alone.

    Args:
        origin: our metadata, without prefix.
        tokens: image tokens [1, tokens, width].

    Raises:
        UsageError, NotFound, ResourceError: it cannot be written there (`files.publish`).
    """
    layers = _layers(format, sites, origin.get("family", ""))
    for_others = lora_metadata.for_others(format, origin, peft_config(sites), text_width(sites), layers)
    ours = {ORIGIN + name: str(text) for name, text in origin.items()}
    _write(path, format, sites, ours | for_others, layers, tokens, force)


def convert(
    file: LoraFile,
    path: str | os.PathLike[str],
    format: str,
    *,
    family: str = "",
    rank: int | None = None,
    force: bool = False,
    advance_to: Callable[[int], None] = lambda done: None,
) -> float:
    """Write the sites of an open file in another format, without other modules.

    Args:
        family: of the bundle that it is for; "": from the file itself.
        rank: the largest rank; a site of a higher rank is reduced to the nearest LoRA of this rank.
        advance_to: called with the number of sites that are done.

    Returns:
        The part of the LoRA that `rank` discards: its Frobenius norm over that of the whole LoRA.

    Raises:
        LoraError: a number is NaN, infinite or too large, or metadata of ours is unusable.
        UsageError, NotFound, ResourceError: it cannot be written there (`files.publish`).
    """
    if file.origin and (fault := lora_metadata.fault(file.origin)):
        raise LoraError(f"{file.name} has unusable metadata", fault, REMAKE)
    whole, sites = {}, {}
    for done, site in enumerate(file.pairs, 1):
        whole[site] = file.factors(site)
        sites[site] = reduced(whole[site], rank) if rank else whole[site]
        advance_to(done)
    is_whole = all(sites[site] is factors for site, factors in whole.items())
    if file.origin and is_whole:
        write_ours(path, format, sites, file.origin, file.tokens(), force)
    else:  # a subject of another rank is not what the hypernetwork made: it becomes a LoRA like any other
        _write_foreign(file, path, format, sites, family, force)
    return 0.0 if is_whole else _lost(whole.values(), sites.values())


def _write_foreign(
    file: LoraFile, path: str | os.PathLike[str], format: str, sites: Sites, family: str, force: bool
) -> None:
    """Write the sites with the file's metadata, but without ours and the old format's."""
    width = text_width(sites)
    family = family or lora_metadata.family_of(file.metadata, width)
    layers = _layers(format, sites, family)
    dropped = (*_OF_A_FORMAT, *(key for key in file.metadata if key.startswith(ORIGIN)))
    metadata = {key: text for key, text in file.metadata.items() if key not in dropped}
    if format == "kohya":
        config = peft_config(sites)
        metadata |= lora_metadata.kohya(config, family, width)
        if "alpha_pattern" in config:
            log.warning("alpha differs between sites, but diffusers reads only one alpha from a kohya file")
    if "modelspec.implementation" in metadata:
        metadata["modelspec.implementation"] = lora_metadata.SGM if layers else "diffusers"
    _write(path, format, sites, metadata, layers, file.tokens(), force)


def _lost(whole: Iterable[Factors], kept: Iterable[Factors]) -> float:
    """Norm of the discarded part over that of the whole; the nearest LoRA is orthogonal to the rest."""
    before, after = (sum(norm(factors) ** 2 for factors in sites) for sites in (whole, kept))
    return float(np.sqrt(max(before - after, 0) / before)) if before else 0.0


def reduced(factors: Factors, rank: int) -> Factors:
    """The nearest LoRA of at most this rank (Eckart-Young), with alpha equal to the rank."""
    if factors.rank <= rank:
        return factors
    a, b = factors.numbers()
    nearest_a, nearest_b = low_rank.truncated(a.T, b.T, rank)
    return Factors(Stored.of(nearest_a.T), Stored.of(nearest_b.T), float(rank))


def norm(factors: Factors) -> float:
    """Frobenius norm of alpha / r times B A, which is added to the weight.

    No matrix is larger than the factors, even if a file has a rank of many thousands.
    """
    a, b = (array.astype(np.float64) for array in factors.numbers())
    if factors.rank > max(a.shape[1], len(b)):
        return float(np.linalg.norm(b @ a))
    return float(np.sqrt(max(np.sum((a @ a.T) * (b.T @ b)), 0)))


def peft_config(sites: Sites) -> dict[str, Any]:
    """PEFT's configuration: the most frequent rank and alpha, and those of the other sites by path."""
    ranks = {site: factors.rank for site, factors in sites.items()}
    alphas = {site: _number(factors.alpha) for site, factors in sites.items()}
    rank, alpha = (next(iter(counted(values.values())), 1) for values in (ranks, alphas))
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha}
    config |= {"target_modules": list(sites), "bias": "none", "inference_mode": True}
    for key, values, usual in (("rank_pattern", ranks, rank), ("alpha_pattern", alphas, alpha)):
        if others := {site: value for site, value in values.items() if value != usual}:
            config[key] = others
    return config


def _write(
    path: str | os.PathLike[str],
    format: str,
    sites: Sites,
    metadata: Mapping[str, str],
    layers: int | None,
    tokens: Stored | None,
    force: bool,
) -> None:
    tensors = {}
    for name, (site, role) in names.names_of(format, sites, layers).items():
        factors = sites[site]
        tensors[name] = {"A": factors.a, "B": factors.b, "alpha": _alpha_tensor(factors)}[role]
    if tokens is not None and format == "kohya":
        # With one tensor of another name diffusers takes the file for its own format and applies nothing.
        log.warning("a kohya file cannot hold image tokens: the subject will be drawn with its LoRA alone")
    elif tokens is not None:
        tensors[IMAGE_TOKENS] = tokens
    config, own = peft_config(sites), {"format": "pt"}
    if format == "diffusers":  # diffusers could find the rank without it, but not alpha
        options = {f"unet.{key}": value for key, value in config.items() if key not in _ONLY_IN_FOLDERS}
        own[CONFIG] = json.dumps(options, sort_keys=True)
    if layers:
        own[LAYERS] = str(layers)
    data = safetensors_file.encode(tensors, {**metadata, **own})
    if format == "peft" and not Path(path).suffix:
        fill = functools.partial(_fill_folder, data=data, config=config)
        files.publish_folder(path, fill, marker=PEFT_CONFIG, force=force)
    else:
        files.publish(path, lambda file: file.write(data), force=force)


def _fill_folder(folder: Path, data: bytes, config: Mapping[str, Any]) -> None:
    (folder / PEFT_FILE).write_bytes(data)
    (folder / PEFT_CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _layers(format: str, sites: Sites, family: str) -> int | None:
    """Layers per block if the names are those of the first publication: SDXL in kohya's format.

    kohya's trainer does the same; for SD 1.x it uses diffusers' block names.
    """
    return names.layers_of(sites) if format == "kohya" and family == "sdxl" else None


def text_width(sites: Sites) -> int:
    """Width of the text's hidden states, from d_in of a to_k; 0 if there is none."""
    return next((factors.a.shape[1] for site, factors in sites.items() if site.endswith("to_k")), 0)


def _alpha_tensor(factors: Factors) -> Stored:
    """alpha in the type of the weights, as kohya's trainer writes it, if that is exact; else float32."""
    if factors.a.dtype == "F16" and factors.alpha < 1024 and np.float16(factors.alpha) == factors.alpha:
        return Stored("F16", (), np.array(factors.alpha, "<f2").tobytes())
    return Stored.of(np.array(factors.alpha))


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
