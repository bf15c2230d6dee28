"""Model families: the defaults, nouns and licences that `hyperrt export --model NAME` writes into a manifest.

The graphs do not depend on the family but on the parts: with a second text encoder they are SDXL's, and with
an image prompt they are those of the open category.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hyperrt.bundle.bundle import Defaults, Prompts
from hyperrt.errors import UsageError
from hyperrt.export import random_sources
from hyperrt.export.source import Source
from hyperrt.training.data import scenes

NOUNS = (
    "man", "woman", "boy", "girl", "person", "face", "dog", "puppy", "cat", "kitten", "horse", "bird",
    "rabbit",
    "backpack", "bag", "bear", "boot", "bottle", "bowl", "can", "candle", "car", "chair", "clock", "cup",
    "glasses", "hat", "house", "jacket", "lamp", "monster", "mug", "robot", "shoe", "sneaker", "sunglasses",
    "teapot", "toy", "stuffed animal", "vase", "wolf",
)  # fmt: skip
LICENSE_OF_BASE = """\
The weights of this bundle are those of the base model that it was exported from, under the terms of that
model; its folder had no LICENSE file to copy. Graphs were made by HyperRT (Apache License 2.0).
"""


@dataclass(frozen=True)
class Family:
    """A kind of base model.

    Attributes:
        random: (seed) to a source with random weights, for tests and measurements.
        nouns: class nouns that the runtime recognises after the placeholder.
        license: text of the bundle's LICENSES if the base model's folder has no LICENSE file.
        half_hash: whether the hash of a base model is computed from its weights rounded to fp16.
        verify: default of `--verify`, see export/verify.py.
    """

    name: str
    random: Callable[[int], Source]
    defaults: Defaults
    default_class: str
    nouns: tuple[str, ...]
    license: str
    half_hash: bool
    verify: str

    def prompts(self, source: Source) -> Prompts:
        """Prompt rules for the manifest."""
        return Prompts(
            placeholder="[V]",
            token=source.token,
            max_tokens=source.max_tokens,
            default_class=self.default_class,
            nouns=self.nouns,
            pad=source.pad,
            pad_2=source.pad_2,
            zero_empty=source.zero_empty,
        )


def get(name: str) -> Family:
    """The family of that name.

    Raises:
        UsageError: no family has that name.
    """
    if name not in FAMILIES:
        why = f"the families are {', '.join(FAMILIES)}"
        raise UsageError(f"there is no model family {name!r}", why, "choose one of these")
    return FAMILIES[name]


FAMILIES = {
    "tiny": Family(
        name="tiny",
        random=random_sources.tiny,
        defaults=Defaults(solver="dpmpp_2m", steps=30, guidance_scale=2.5, kappa=1.0),
        default_class="toy",
        nouns=scenes.NOUNS,
        license=random_sources.LICENSE_OF_TINY,
        half_hash=False,
        verify="full",
    ),
    "sd15": Family(
        name="sd15",
        random=random_sources.sd15,
        defaults=Defaults(solver="ddim", steps=30, guidance_scale=3.75, kappa=1.0),
        default_class="object",
        nouns=NOUNS,
        license=LICENSE_OF_BASE,
        half_hash=True,
        verify="graphs",
    ),
    "sdxl": Family(
        name="sdxl",
        random=random_sources.sdxl,
        defaults=Defaults(solver="euler", steps=30, guidance_scale=3.5, kappa=1.0),
        default_class="object",
        nouns=NOUNS,
        license=LICENSE_OF_BASE,
        half_hash=True,
        verify="graphs",
    ),
}
