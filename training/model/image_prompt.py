"""The image prompt of the open category, IP-Adapter-Plus: features to tokens, tokens to keys and values.

    tokens = Resampler(features)                     16 of the text's width      [photos, I, D]
    K, V   = to_k_ip(tokens), scale to_v_ip(tokens)  per attn2, no biases        [rows, I, inner]

Each cross-attention adds Attn(q, K, V) to that of the text (training/model/lora_layers.py). The scale of a
row lies in V: 0 makes it a row without image prompt, exactly.

Names of the parameters are those of the published files (`ip-adapter-plus_sdxl_vit-h.safetensors`):
`image_proj.*` is the resampler, `ip_adapter.N.to_k_ip.weight` belongs to the N-th attention processor of the
UNet. attn1 and attn2 take turns, so N = 1, 3, 5 ... is attn2 in the order of `lora_layers.attentions`.

Shapes: rows = branches x images, I image tokens, D text width, F feature width, inner = heads x head size.
Source: arXiv 2308.06721 (IP-Adapter); arXiv 2511.03156 section 5.2 (scale 0.55).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hyperrt.errors import BadInput, Incompatible, IntegrityError, NotFound
from hyperrt.training.model.encode import encode_pixels
from hyperrt.training.model.lora_layers import KeyValues, attentions
from hyperrt.training.model.resampler import Resampler

PARTS = ("image_proj.", "ip_adapter.")
TOKENS = 16
SCALE = 0.55  # of the paper
DIM_HEAD = 64  # of every published adapter; it is not in the files
PUBLISHED = "use ip-adapter-plus_sdxl_vit-h.safetensors, or the -plus file that fits the base model"


class ImagePrompt(nn.Module):
    """features [photos, T, F] to tokens [photos, I, D], and tokens to the K and V that every attn2 adds.

    Args:
        unet: the UNet that it is for; only names and sizes of its attn2 are read.
        feature_dim: F of the image encoder, 1280 for ViT-H/14.
        tokens, dim, heads, depth: of the resampler; by default those of IP-Adapter-Plus for SDXL.
    """

    def __init__(
        self,
        unet: nn.Module,
        feature_dim: int = 1280,
        tokens: int = TOKENS,
        dim: int = 1280,
        heads: int = 20,
        depth: int = 4,
    ) -> None:
        super().__init__()
        modules = dict(attentions(unet, "attn2"))
        self.paths = tuple(modules)
        widths = [(m.to_k.in_features, m.to_k.out_features, m.to_v.out_features) for m in modules.values()]
        self.count, self.width = tokens, widths[0][0]
        self.image_proj = Resampler(feature_dim, self.width, tokens, dim, heads, DIM_HEAD, depth)
        self.ip_adapter = nn.ModuleDict(
            {
                str(2 * n + 1): nn.ModuleDict(
                    {
                        "to_k_ip": nn.Linear(text, keys, bias=False),
                        "to_v_ip": nn.Linear(text, values, bias=False),
                    }
                )
                for n, (text, keys, values) in enumerate(widths)
            }
        )

    def tokens(self, features: Tensor) -> Tensor:
        """features [photos, T, F] to image tokens [photos, I, D]."""
        return self.image_proj(features)

    @torch.no_grad()
    def zero_tokens(self, image_encoder: nn.Module) -> Tensor:
        """[1, I, D]: the tokens of zero pixels, which stand for "no image" in IP-Adapter's training.

        image_encoder: the ViT that makes the features.
        """
        size = image_encoder.config.image_size
        like = next(image_encoder.parameters())
        pixels = torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device)
        features = encode_pixels(image_encoder, pixels)
        return self.tokens(features.to(self.image_proj.latents.dtype))

    def key_values(self, tokens: Tensor, scale: Tensor) -> KeyValues:
        """tokens [rows, I, D] and scale [rows] to `Rows.image`: (K, V times scale) per attn2."""
        scale = scale.reshape(-1, 1, 1)
        return {
            path: (pair["to_k_ip"](tokens), pair["to_v_ip"](tokens) * scale)
            for path, pair in zip(self.paths, self.ip_adapter.values(), strict=True)
        }

    def forward(self, features: Tensor) -> Tensor:
        return self.tokens(features)


def load(path: Path | str, unet: nn.Module, dtype: torch.dtype = torch.float32) -> ImagePrompt:
    """The image prompt of a published file, frozen and in eval mode; all sizes are those of its tensors.

    Args:
        path: safetensors with `image_proj.*` and `ip_adapter.*`.
        unet: the base model's; it may lie on the "meta" device.
        dtype: of the weights; SDXL has 423.7 M.

    Raises:
        NotFound: there is no such file.
        BadInput: it is a pickle, or not an IP-Adapter-Plus.
        IntegrityError: it is damaged.
        Incompatible: it was made for another UNet.
    """
    path = Path(path)
    tensors = _read(path, dtype)
    with torch.device("meta"):
        prompt = ImagePrompt(unet, **_sizes(path, tensors))
    expected = {name: tuple(tensor.shape) for name, tensor in prompt.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if shapes != expected:
        what = f"{path} does not fit the base model's UNet"
        raise Incompatible(what, _first_difference(shapes, expected), PUBLISHED)
    prompt.load_state_dict(tensors, assign=True)
    return prompt.eval().requires_grad_(False)


def _read(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the two parts; a published file has no others."""
    if not path.is_file():
        raise NotFound(f"there is no image prompt {path}", "there is no such file", PUBLISHED)
    if path.suffix != ".safetensors":
        why = "it is not .safetensors; pickles (.bin, .pt, .ckpt) can run code and are not read"
        raise BadInput(f"{path} cannot be read as an image prompt", why, PUBLISHED)
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith(PARTS)]  # noqa: SIM118
            return {name: file.get_tensor(name).to(dtype) for name in names}
    except SafetensorError as error:
        raise IntegrityError(f"{path} is damaged", str(error), "download or copy it again") from error


def _sizes(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The arguments of `ImagePrompt`, from the shapes of the tensors."""
    try:
        _, tokens, dim = tensors["image_proj.latents"].shape
        inner = tensors["image_proj.layers.0.0.to_q.weight"].shape[0]
        feature_dim = tensors["image_proj.proj_in.weight"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        why = f"its resampler, image_proj.*, cannot be read: {error}"
        raise BadInput(f"{path} is not an IP-Adapter-Plus", why, PUBLISHED) from error
    depth = len({name.split(".")[2] for name in tensors if name.startswith("image_proj.layers.")})
    sizes = {"tokens": tokens, "dim": dim, "heads": max(1, inner // DIM_HEAD), "depth": depth}
    return {**sizes, "feature_dim": feature_dim}


def _first_difference(actual: Mapping[str, object], expected: Mapping[str, object]) -> str:
    name = next(name for name in sorted({*actual, *expected}) if actual.get(name) != expected.get(name))
    return f"{name} is {actual.get(name, 'absent')}, the base model's is {expected.get(name, 'absent')}"
