"""Recipes: pictures as PNG that say how they were made, and that they were made by a model.

Three chunks before the pixels:

    parameters          the text that AUTOMATIC1111's web UI writes, and many programs read (`infotext`)
    hyperrt             the recipe as JSON, iTXt; `read` gives it back, `options_of` what draws it again
    XML:com.adobe.xmp   IPTC's marker of generated media, DigitalSourceType trainedAlgorithmicMedia, iTXt

A recipe is a dict of JSON values. `parameters` is made of these keys, where they are there: `prompt`,
`negative_prompt`, `steps`, `solver`, `guidance_scale`, `kappa`, `seed`, `strength`, `class_noun`, `bundle` (a
name), `base_model` (a hash). A recipe must not hold file paths, photos, or names of users and machines.
`schema`, `version` and `size` ([W, H]) are added here.
"""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hyperrt import __version__, files, strict_json
from hyperrt.arguments import checked
from hyperrt.errors import BadImage, BadInput, NotFound, UsageError
from hyperrt.sampling import infotext
from hyperrt.sampling.options import SamplingOptions

SCHEMA = 1
JSON_CHUNK, TEXT_CHUNK, XMP_CHUNK = "hyperrt", "parameters", "XML:com.adobe.xmp"
MAX_JSON = 1 << 20  # bytes; a recipe has some hundred
MAX_TEXT = 100_000  # characters of AUTOMATIC1111's parameters, prompts included
MAX_PIXELS = 64_000_000  # of a picture that is decoded to find a chunk behind its pixels
XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' xmp:CreatorTool="HyperRT {__version__}"'
    ' Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


@checked
def save_png(
    path: str | os.PathLike[str], image: NDArray[np.uint8], recipe: Mapping[str, Any], force: bool = False
) -> None:
    """Write a picture with its recipe; the file is there whole or not at all.

    Args:
        path: where to.
        image: [H, W, 3] uint8.
        recipe: see the module.
        force: replace a file that is there.

    Raises:
        UsageError: the image is no picture, or the recipe holds something that JSON has no form for.
        HyperRTError: what `files.publish` raises.
    """
    content = encode_png(image, recipe)
    files.publish(path, lambda file: file.write(content), force=force)


@checked
def encode_png(image: NDArray[np.uint8], recipe: Mapping[str, Any]) -> bytes:
    """The PNG of `save_png` as bytes, for a pipe; the same arguments and errors."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        what = f"the image is {image.dtype} {list(image.shape)}"
        raise UsageError(what, "a picture is uint8 [H, W, 3]", "pass one of Result.images")
    height, width = image.shape[:2]
    full = {"schema": SCHEMA, "version": __version__, "size": [width, height], **recipe}
    chunks = PngInfo()
    try:
        chunks.add_text(TEXT_CHUNK, infotext.write(full))  # tEXt, or iTXt where Latin-1 is not enough
        chunks.add_itxt(JSON_CHUNK, json.dumps(full, default=_plain, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        do = "pass a recipe of Result.recipe_of, or plain JSON values"
        raise UsageError("the recipe cannot be written", str(error), do) from error
    chunks.add_itxt(XMP_CHUNK, XMP)
    content = io.BytesIO()
    Image.fromarray(image).save(content, "PNG", pnginfo=chunks)
    return content.getvalue()


@checked
def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe of a picture that HyperRT made. Its values are as untrusted as the file.

    Raises:
        NotFound: there is no such file.
        BadImage: it is not a PNG, is damaged, or carries no recipe that this version knows.
    """
    chunks = _read_chunks(_file(path))
    if JSON_CHUNK not in chunks:
        raise _none_in(Path(path).name)
    return _of_json(Path(path).name, chunks[JSON_CHUNK])


@checked
def read_any(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The recipe of a picture of any program, or of a text. Its values are as untrusted as the file.

    Args:
        path: a PNG of HyperRT, a PNG or a text with AUTOMATIC1111's parameters (`infotext.read`), or JSON: a
            recipe, or what `hyperrt info --json` prints.

    Raises:
        NotFound: there is no such file.
        BadImage: as `read`.
        BadInput: it is a text that holds no recipe.
    """
    file = _file(path)
    if (text := _text_of(file)) is not None:
        return _of_text(file.name, text)
    chunks = _read_chunks(file)
    if JSON_CHUNK in chunks:
        return _of_json(file.name, chunks[JSON_CHUNK])
    if (found := _of_parameters(chunks.get(TEXT_CHUNK, ""))) is None:
        raise _none_in(file.name)
    return found


@checked
def options_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What draws a recipe again: `runtime.generate(subject=subject, **options_of(recipe))`.

    Bundle, subject, backend, threads and low_memory being the same, and the batch size 1, so are the bits.
    A value of a wrong type or out of range is refused by `generate`.

    Args:
        recipe: of `read` or `read_any`, or a `Result`'s.

    Returns:
        `prompt` and the options of `Runtime.steps` that the recipe names; without `kappa`, which is always 0
        there, if it had no subject.

    Raises:
        UsageError: the recipe has no prompt.
    """
    if recipe.get("prompt") is None:
        raise UsageError("the recipe has no prompt", "nothing says what to draw", "give a prompt")
    left_out = {"n", "batch_size"} | (set() if had_subject(recipe) else {"kappa"})
    names = {"prompt", *(field.name for field in fields(SamplingOptions))} - left_out
    return {"cfg": False, **{name: recipe[name] for name in names if recipe.get(name) is not None}}


def had_subject(recipe: Mapping[str, Any]) -> bool:
    """Whether the picture is of a subject, and not of the base model alone."""
    return recipe.get("class_noun") is not None


def _file(path: str | os.PathLike[str]) -> Path:
    name = Path(path).name
    if not os.path.exists(path):  # unlike Path.exists it says False of a name that is too long
        raise NotFound(f"there is no file {name[:200]!r}", "", "check the name")
    if not Path(path).is_file():
        raise BadImage(name, "it is not a plain file", "name a PNG file")
    return Path(path)


def _none_in(name: str) -> BadImage:
    return BadImage(name, "it carries no recipe", "a recipe is in the PNGs that hyperrt generate writes")


def _of_parameters(text: str) -> dict[str, Any] | None:
    return infotext.read(text) if len(text) <= MAX_TEXT else None


def _of_text(name: str, text: str) -> dict[str, Any]:
    if text.lstrip().startswith("{"):
        try:
            found = strict_json.loads(text.encode())
            inner = found.get("recipe", found)
            if "branches" not in inner and "schema" not in inner:
                why = "it is JSON of another program: a recipe of HyperRT's says its schema or its branches"
                do = "give the prompt, seed and steps as options"
                raise BadInput(f"{name} holds no recipe", why, do)
            return _known(name, {"schema": SCHEMA, **inner})
        except (strict_json.StrictError, TypeError):  # other programs' prompts begin like this, too
            pass
    if (parameters := _of_parameters(text)) is not None:
        return parameters
    why = "it is no JSON of a recipe, and no text of AUTOMATIC1111 with its line of settings"
    raise BadInput(f"{name} holds no recipe", why, "name a picture that hyperrt generate wrote")


def _of_json(name: str, text: str) -> dict[str, Any]:
    try:
        recipe = strict_json.loads(text.encode()) if len(text) <= MAX_JSON else None
    except strict_json.StrictError:
        recipe = None
    if not isinstance(recipe, dict):
        raise BadImage(name, "its recipe is no JSON object of at most 1 MB", "use the original file")
    return _known(name, recipe)


def _known(name: str, recipe: dict[str, Any]) -> dict[str, Any]:
    if recipe.get("schema") != SCHEMA:
        raise BadImage(name, f"its recipe is not of schema {SCHEMA}", "update: pip install -U hyperrt")
    return recipe


def _text_of(path: Path) -> str | None:
    """What the file holds, if that is text of at most 1 MB."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON + 1)
    except OSError as error:
        raise BadImage(path.name, f"it cannot be read: {error.strerror}", "check its permissions") from error
    if len(content) > MAX_JSON or b"\0" in content or not content.strip():
        return None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _plain(value: Any) -> Any:
    """NumPy numbers and arrays as Python's, for JSON."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise ValueError(f"a recipe cannot hold {type(value).__name__}")


def _read_chunks(path: Path) -> dict[str, str]:
    """The texts of a PNG's chunks that may hold a recipe, by their keys."""
    from PIL import Image, UnidentifiedImageError

    bomb = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                # Pillow has read what stands before the pixels; some programs move text behind them.
                if JSON_CHUNK not in image.info and image.width * image.height <= MAX_PIXELS:
                    image.load()
                found = {key: image.info.get(key) for key in (JSON_CHUNK, TEXT_CHUNK)}
    except (OSError, ValueError, SyntaxError, struct.error, zlib.error, MemoryError, *bomb) as error:
        reason = "no PNG begins like this" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BadImage(path.name, f"it is not a sound PNG ({reason})", "use the original file") from error
    return {key: text for key, text in found.items() if isinstance(text, str)}
