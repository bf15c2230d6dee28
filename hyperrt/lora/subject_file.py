"""Reads a LoRA file as the subject of a bundle, or refuses it if it does not fit.

docs/bundle-format.md, "Subject files", is the specification; `Subject.save` writes such files.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import numpy as np

from hyperrt.arguments import checked
from hyperrt.errors import LoraError, LoraMismatch
from hyperrt.lora import metadata as lora_metadata
from hyperrt.lora import names, reader
from hyperrt.lora.layout import LoraLayout, Site, Vector, difference
from hyperrt.lora.reader import IMAGE_TOKENS, LoraFile, check_tokens
from hyperrt.lora.safetensors_file import REMAKE
from hyperrt.lora.subject import SUBJECT_VERSION, Subject
from hyperrt.text import shortened

log = logging.getLogger("hyperrt")

OTHER_BUNDLE = "use a bundle of the model that it was made for"


@checked
def load_subject(
    path: str | os.PathLike[str],
    layout: LoraLayout,
    base_model_hash: str,
    token_shape: tuple[int, ...] | None = None,
    *,
    partial: bool = False,
    bundle: str = "",
) -> Subject:
    """Read a LoRA file of any of the three formats, or a folder that holds one, trusting nothing in it.

    A file of ours must fit the bundle exactly.  Another program's file may have ranks up to the bundle's, a
    scale, and fewer sites; missing sites and ranks are zero.

    Args:
        layout, base_model_hash: of the bundle.
        token_shape: the bundle's (tokens, width) of image tokens; None if it takes none.
        partial: leave out tensors of other modules in another program's file.
        bundle: value of `--bundle`, for the command in a message.

    Raises:
        NotFound: the file does not exist.
        LoraMismatch: it was made for another base model or LoRA layout, its rank is too large, it adapts
            other modules, or its image tokens do not fit.
        LoraError: it is not safetensors, truncated, or a tensor is missing, unknown, of another type or
            shape, or holds NaN or infinity.
    """
    file = reader.open_lora(path, [site.path for site in layout.sites])
    return load_file(file, layout, base_model_hash, token_shape, partial=partial, bundle=bundle)


def load_file(
    file: LoraFile,
    layout: LoraLayout,
    base_model_hash: str,
    token_shape: tuple[int, ...] | None = None,
    *,
    partial: bool = False,
    bundle: str = "",
) -> Subject:
    """`load_subject` for a file that was opened with the paths of the layout; raises the same errors."""
    if file.origin:
        reader.check_plain(file)
        _check_origin(file.name, file.origin, layout, base_model_hash)
        _check_whole(file, layout)
        origin = file.origin
    else:
        _check_foreign(file, layout, partial, bundle)
        trigger = lora_metadata.trigger_of(file.metadata)
        origin = {"class_noun": "", "photos": "0", **({"trigger": trigger} if trigger else {})}
    stored = file.tokens()
    tokens = None if stored is None else stored.array()
    check_tokens(file.name, tokens, token_shape)
    lora = layout.pack({site.path: _factors(file, site, layout.rank) for site in layout.sites})
    return Subject(lora, origin["class_noun"], int(origin["photos"]), origin, tokens, layout)


def _factors(file: LoraFile, site: Site, rank: int) -> tuple[Vector, Vector]:
    """A [d_in, rank] and B [rank, d_out] with the scale folded in, padded with zeros."""
    a, b = np.zeros((site.d_in, rank), np.float32), np.zeros((rank, site.d_out), np.float32)
    if site.path in file.pairs:
        factors = file.factors(site.path)
        file_a, file_b = factors.numbers()
        a[:, : factors.rank], b[: factors.rank] = file_a.T, file_b.T
    return a, b


def _check_origin(name: str, metadata: Mapping[str, str], layout: LoraLayout, base_model_hash: str) -> None:
    version = metadata.get("version", "")
    if version not in ("", SUBJECT_VERSION):
        why = f"its format is {version[:12]!r}; this version reads {SUBJECT_VERSION!r}"
        raise LoraMismatch(f"{name} has another format", why, REMAKE)
    if fault := lora_metadata.fault(metadata):
        raise LoraError(f"{name} has unusable metadata", fault, REMAKE)
    if metadata.get("combine") == "concat" and metadata.get("layout") != layout.hash:
        why = f"its rank is {shortened(metadata.get('rank', ''))}, the bundle's is {layout.rank}"
        do = f"{REMAKE}, with --combine product"
        raise LoraMismatch(f"{name} was made with --combine concat, for other programs", why, do)
    for word, in_file, in_bundle in (
        ("base model", metadata["base_model"], base_model_hash),
        ("LoRA layout", metadata.get("layout", ""), layout.hash),
    ):
        if in_file != in_bundle:
            why = f"the file's {word} is {in_file[:12]!r}, the bundle's is {in_bundle[:12]!r}"
            do = f"use the bundle that made it, or {REMAKE}"
            raise LoraMismatch(f"{name} was made for another {word}", why, do)


def _check_whole(file: LoraFile, layout: LoraLayout) -> None:
    """A file of ours has all tensors of the layout and no others, with alpha equal to the rank."""
    expected = names.names_of(file.format, [site.path for site in layout.sites], file.layers)
    if wrong := difference(set(file.entries) - {IMAGE_TOKENS}, set(expected)):
        raise LoraError(f"{file.name} does not hold the tensors of a subject", wrong, REMAKE)
    for site in layout.sites:
        _check_shape(file, site, LoraError)
        pair = file.pairs[site.path]
        if (pair.rank, pair.alpha) != (layout.rank, layout.rank):
            what = f"{file.name}: alpha is {pair.alpha:g}, and the rank {pair.rank}, at {site.path}"
            raise LoraError(what, f"both must be the rank of the layout, {layout.rank}", REMAKE)


def _check_foreign(file: LoraFile, layout: LoraLayout, partial: bool, bundle: str) -> None:
    """Another program's file adapts sites of the bundle and, unless `partial`, nothing else."""
    reader.check_used(file, partial)
    sites = {site.path for site in layout.sites}
    if unknown := [path for path in file.pairs if path not in sites]:
        why = f"{len(unknown)} of its {len(file.pairs)} sites are not in the bundle, first: {unknown[0]}"
        raise LoraMismatch(f"{file.name} was made for another model", why, OTHER_BUNDLE)
    for site in layout.sites:
        if site.path in file.pairs:
            _check_shape(file, site, LoraMismatch)
    if file.rank > layout.rank:
        do = reader.how_to_reduce(file, layout.rank, partial, bundle)
        raise LoraMismatch(f"the rank of {file.name} is {file.rank}", f"the bundle's is {layout.rank}", do)
    for note in file.notes:
        log.warning("%s", note)
    base = lora_metadata.base_of(file.metadata)
    log.warning(
        "%s was made by another program%s; it may be for another base model",
        file.name, f" for {base}" if base else "",
    )  # fmt: skip


def _check_shape(file: LoraFile, site: Site, kind: type[LoraError]) -> None:
    pair = file.pairs[site.path]
    for key, shape in ((pair.a, (pair.rank, site.d_in)), (pair.b, (site.d_out, pair.rank))):
        if (actual := file.entries[key].shape) != shape:
            do = REMAKE if file.origin else OTHER_BUNDLE
            raise kind(f"{file.name}: {key} is {actual}", f"the bundle's layout says {shape}", do)
