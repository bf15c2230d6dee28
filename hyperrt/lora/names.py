"""Names of a LoRA's tensors in other programs, and the site in the UNet that a name belongs to.

    diffusers  unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight
    peft       base_model.model.down_blocks.1.attentions.0. ... .attn2.to_k.lora_A.weight
    kohya      lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight, .alpha
    kohya XL   lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight, .alpha

For SDXL kohya's trainer uses the block names of the model's first publication.  With n layers per block (2
in every published model) down_blocks.i.attentions.j is input_blocks.k.1 with k = 1 + i (n + 1) + j, and
up_blocks.i.attentions.j is output_blocks.k.1 with k = i (n + 1) + j.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

# Prefix of the tensor names in each format; a diffusers model saved by itself has none.
FORMATS: Mapping[str, str] = {"diffusers": "unet.", "peft": "base_model.model.", "kohya": "lora_unet_"}
# Ways to combine photos (hyperrt/lora/combine.py); only the first two keep the bundle's rank.
COMBINED = ("mean", "product")
COMBINED_TO_SAVE = (*COMBINED, "concat")
LAYERS = 2  # per block, in every published Stable Diffusion
SITE = re.compile(  # the path of a site in a Stable Diffusion UNet
    r"(?:(?:down|up)_blocks\.\d{1,3}|mid_block)\.attentions\.\d{1,3}\.transformer_blocks\.\d{1,3}\.attn2\.to_[qkv]"
)

# Suffix after the path of a projection -> role.
_ROLES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_down.weight": "A", ".lora_up.weight": "B",
    ".lora.down.weight": "A", ".lora.up.weight": "B", "_lora.down.weight": "A", "_lora.up.weight": "B",
    ".alpha": "alpha",
}  # fmt: skip
_PROJECTION = re.compile(r"(.*\.to_[qkv])((?:\.|_lora\.).+)", re.DOTALL)
_DOWN_OR_UP = re.compile(r"(down|up)_blocks\.(\d{1,3})\.attentions\.(\d{1,3})\.(.+)")
_MIDDLE = "mid_block.attentions.0."
_STEM = re.compile(
    r"lora_unet_(?:(down|up)_blocks_(\d{1,3})_attentions_(\d{1,3})|(input|output)_blocks_(\d{1,3})_1|"
    r"mid_block_attentions_0|middle_block_1)_transformer_blocks_(\d{1,3})_attn2_(to_[qkv])"
)
_OF_FIRST_PUBLICATION = re.compile(r"lora_unet_(?:input_blocks|middle_block|output_blocks)_")
_KINDS = (  # other modules that a LoRA may adapt, by their names
    ("the text encoder", re.compile(r"lora_te|text_encoder")),
    ("self-attention", re.compile(r"attn1")),
    ("the output of the cross-attention", re.compile(r"attn2[._](?:processor\.)?to_out")),
    ("feed-forward layers", re.compile(r"[._]ff[._]")),
    ("convolutions and layers beside them", re.compile(r"resnets|conv|in_layers|out_layers|emb|proj_|_op")),
)

_METHODS = (  # other ways of adapting a model, by the names of their tensors
    ("DoRA", re.compile(r"lora_magnitude_vector|dora_scale")),
    ("LoHa", re.compile(r"hada_")),
    ("LoKr", re.compile(r"lokr_")),
    ("OFT", re.compile(r"oft_")),
    ("IA3", re.compile(r"ia3_")),
    ("VeRA", re.compile(r"vera_")),
)


@dataclass(frozen=True)
class Part:
    """What the name of a tensor means.

    Attributes:
        format: whose name it is.
        site: path of the site in the UNet; "" if the tensor belongs to another module.
        role: "A", "B", "alpha", or the rest of the name.
    """

    format: str
    site: str
    role: str


class SiteNames:
    """Finds the site that a tensor belongs to.

    Args:
        paths: of a bundle's sites.  Cross-attentions of a Stable Diffusion UNet are always sites.
        layers: layers per block if there are no paths; kohya's names of the first publication depend on it.
    """

    def __init__(self, paths: Collection[str] = (), layers: int = LAYERS) -> None:
        self.layers = layers_of(paths) if paths else layers
        self._paths = frozenset(paths)
        self._of_stem = {stem(path, count): path for path in paths for count in (None, self.layers)}

    def part_of(self, name: str) -> Part:
        """What the name of a tensor means."""
        if name.startswith("lora_"):
            module, _, rest = name.partition(".")
            path = self._of_stem.get(module) or _path_of(module, self.layers)
            return self._part("kohya", path, _ROLES.get(f".{rest}", rest))
        format = "peft" if name.startswith(FORMATS["peft"]) else "diffusers"
        match = _PROJECTION.fullmatch(name.removeprefix(FORMATS[format]))
        if match is None:
            return Part(format, "", name)
        path = match[1].replace(".processor.", ".")
        return self._part(format, path, _ROLES.get(match[2], match[2]))

    def _part(self, format: str, path: str, role: str) -> Part:
        is_site = path in self._paths or SITE.fullmatch(path)
        return Part(format, path if is_site else "", role)


def keys(format: str, path: str, layers: int | None = None) -> tuple[str, str]:
    """Names of the site's A and B; `layers` as in `stem`."""
    if format == "kohya":
        return f"{stem(path, layers)}.lora_down.weight", f"{stem(path, layers)}.lora_up.weight"
    return f"{FORMATS[format]}{path}.lora_A.weight", f"{FORMATS[format]}{path}.lora_B.weight"


def alpha_key(path: str, layers: int | None = None) -> str:
    """Name of the site's alpha in kohya's format; its scale is alpha / rank."""
    return f"{stem(path, layers)}.alpha"


def names_of(format: str, paths: Iterable[str], layers: int | None = None) -> dict[str, tuple[str, str]]:
    """Tensor name -> (path, role), in the order of a file; `layers` as in `stem`."""
    names: dict[str, tuple[str, str]] = {}
    for path in paths:
        key_a, key_b = keys(format, path, layers)
        names |= {key_a: (path, "A"), key_b: (path, "B")}
        if format == "kohya":
            names[alpha_key(path, layers)] = (path, "alpha")
    return names


def stem(path: str, layers: int | None = None) -> str:
    """kohya's name of a site; with `layers` per block, its name in the first publication."""
    return FORMATS["kohya"] + (_first_published(path, layers) if layers else path).replace(".", "_")


def layers_of(paths: Collection[str]) -> int:
    """Layers per block of a UNet, from the paths of its sites."""
    matches = [match.groups() for match in map(_DOWN_OR_UP.match, paths) if match]
    counts = [int(number) + (side == "down") for side, _, number, _ in matches]
    return max([count for count in counts if count], default=LAYERS)


def is_first_published(names: Collection[str]) -> bool:
    """Whether kohya's names are those of the first publication."""
    return any(_OF_FIRST_PUBLICATION.match(name) for name in names)


def kind_of(name: str) -> str:
    """The kind of module that a tensor belongs to, in words."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other modules")


def method_of(name: str) -> str:
    """The way of adapting a model that a tensor belongs to, such as "DoRA"; "" if unknown."""
    return next((method for method, pattern in _METHODS if pattern.search(name)), "")


def _first_published(path: str, layers: int) -> str:
    if path.startswith(_MIDDLE):
        return f"middle_block.1.{path.removeprefix(_MIDDLE)}"
    match = _DOWN_OR_UP.fullmatch(path)
    if match is None:
        return path
    number = int(match[2]) * (layers + 1) + int(match[3])
    if match[1] == "down":
        return f"input_blocks.{number + 1}.1.{match[4]}"
    return f"output_blocks.{number}.1.{match[4]}"


def _path_of(module: str, layers: int) -> str:
    """The path for kohya's name of a module; "" if it is not a projection of a cross-attention."""
    match = _STEM.fullmatch(module)
    if match is None:
        return ""
    side, block, layer, first, number, transformer, projection = match.groups()
    if first:
        side = "down" if first == "input" else "up"
        block, layer = divmod(int(number) - (first == "input"), layers + 1)
    start = f"{side}_blocks.{block}.attentions.{layer}" if side else _MIDDLE[:-1]
    return f"{start}.transformer_blocks.{transformer}.attn2.{projection}"
