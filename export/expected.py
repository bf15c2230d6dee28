"""Makes inputs for each graph, and the results of diffusers and PEFT for them (export/reference.py)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from hyperrt.bundle import bundle
from hyperrt.export import reference
from hyperrt.export.graph_specs import GraphSpec, Modules
from hyperrt.export.reference import Switch, Text
from hyperrt.export.source import Source, save_tokenizer
from hyperrt.sampling.tokenizer import Tokenizer

Feeds = dict[str, Tensor]
Expected = tuple[Feeds, dict[str, np.ndarray]]

# With a word that is one token for some tokenizers, and with more words than a text encoder reads.
PROMPTS = ("a sks toy on a beach!", "a toy", "a robot in the snow, at night, " * 12)


@torch.no_grad()
def of_graph(
    graph: GraphSpec, source: Source, modules: Modules, sizes: Sequence[Mapping[str, int]]
) -> list[Expected]:
    """Inputs of these sizes, each with the outputs that the graph must have.

    Args:
        graph: one of a bundle's graphs.
        source: what it was made from.
        modules: its parts; they become fp32 in place, which changes no weight.
        sizes: of the symbolic dims; if the LoRA is refitted, `subjects` becomes 1.
    """
    networks = {name: modules[name].float() for name in graph.parts}
    if graph.refit:
        sizes = [{**size, "subjects": 1} for size in sizes]
    return [MAKERS[graph.name](graph, source, networks, size, seed) for seed, size in enumerate(sizes)]


def _image_encoder(
    graph: GraphSpec, source: Source, modules: Any, size: Mapping[str, int], seed: int
) -> Expected:
    feeds = graph.feeds(size, seed)
    if isinstance(modules["image_encoder"], CLIPVisionModelWithProjection):
        features = _encoded_images(source, modules, feeds["pixels"])[0]
    else:  # a ViT; diffusers has none
        features = modules["image_encoder"](feeds["pixels"]).last_hidden_state
    return feeds, {"features": features.numpy()}


def _encoded_images(source: Source, modules: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """IP-Adapter's features of the pixels, and of as many pictures of zeros."""
    pipe = reference.pipeline(source, modules)
    return pipe.encode_image(pixels, torch.device("cpu"), 1, output_hidden_states=True)


def _weight_decoder(
    graph: GraphSpec, source: Source, modules: Any, size: Mapping[str, int], seed: int
) -> Expected:
    """Results of the hypernetwork itself; diffusers has none."""
    feeds = graph.feeds(size, seed)
    packed = modules["weight_decoder"](feeds["features"])
    return feeds, {name: packed[name].numpy() for name in ("lora_q", "lora_kv")}


def _image_prompt(
    graph: GraphSpec, source: Source, modules: Any, size: Mapping[str, int], seed: int
) -> Expected:
    feeds = graph.feeds(size, seed)
    project = reference.image_projection(source.parts["unet"].skeleton, modules["image_prompt"])
    side = source.config("image_encoder").image_size
    _, zeros = _encoded_images(source, modules, torch.zeros(1, 3, side, side))
    tokens = {"image_tokens": project(feeds["features"]), "zero_tokens": project(zeros)}
    return feeds, {name: tensor.numpy() for name, tensor in tokens.items()}


def _text_encoder(
    graph: GraphSpec, source: Source, modules: Any, size: Mapping[str, int], seed: int
) -> Expected:
    """Token ids by the runtime's tokenizer, embeddings by the pipeline."""
    prompts = [PROMPTS[(seed + k) % len(PROMPTS)] for k in range(size["prompts"])]
    text = reference.encoded(reference.pipeline(source, modules), prompts)
    arrays = {"hidden_states": text.hidden.numpy()}
    if text.pooled is not None:
        arrays["pooled"] = text.pooled.numpy()
    return token_ids(source, prompts), arrays


def token_ids(source: Source, prompts: Sequence[str]) -> Feeds:
    """The ids [prompts, L] for each text encoder, by the runtime's tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / bundle.TOKENIZER
        save_tokenizer(source, path)
        pads = {"input_ids": source.pad} | ({"input_ids_2": source.pad_2} if source.is_sdxl else {})
        tokenizers = {name: Tokenizer(path, source.max_tokens, pad) for name, pad in pads.items()}
    return {
        name: torch.from_numpy(np.stack([tokenizer.encode(text).ids for text in prompts]))
        for name, tokenizer in tokenizers.items()
    }


def _context(graph: GraphSpec, source: Source, modules: Any, size: Mapping[str, int], seed: int) -> Expected:
    feeds, unet = graph.feeds(size, seed), modules["unet"]
    texts = Text(feeds["hidden_states"], feeds.get("pooled"))
    with contextlib.ExitStack() as stack:
        if "image_prompt" in modules:
            stack.enter_context(reference.image_prompted(unet, modules["image_prompt"]))
        lora = {"lora_kv": feeds["lora_kv"].numpy()}
        use = stack.enter_context(reference.adapted(unet, source.layout, lora))
        rows = []
        for row in range(size["rows"]):
            _use_for(use, feeds, size, row)
            keys_values = [text_keys_values(unet, texts.of(row))]
            if "image_tokens" in feeds:
                tokens, scale = feeds["image_tokens"][row : row + 1], feeds["image_scale"][row]
                keys_values.append(_image_keys_values(unet, tokens, scale))
            rows.append(torch.cat(keys_values, dim=1))
    arrays = {"context": torch.cat(rows).numpy()}
    if "time_ids" in feeds:
        arrays["added"] = added(unet, texts, feeds["time_ids"]).numpy()
    return feeds, arrays


def _use_for(use: Switch, feeds: Feeds, size: Mapping[str, int], row: int) -> None:
    use(row if size["subjects"] > 1 else 0, float(feeds["gate"][row]))


def text_keys_values(unet: Any, text: Text) -> Tensor:
    """K and V of every cross-attention, [1, L, W], packed as in the bundle's format."""
    linears = [linear for _, attn in cross_attentions(unet) for linear in (attn.to_k, attn.to_v)]
    return torch.cat([linear(text.hidden) for linear in linears], -1)


def _image_keys_values(unet: Any, tokens: Tensor, scale: Tensor) -> Tensor:
    """The same for image tokens [1, I, D]: [1, I, W], with V times the scale."""
    parts = []
    for _, attn in cross_attentions(unet):
        (to_k,), (to_v,) = attn.processor.to_k_ip, attn.processor.to_v_ip
        parts += [to_k(tokens), scale * to_v(tokens)]
    return torch.cat(parts, -1)


def cross_attentions(unet: nn.Module) -> list[tuple[str, Any]]:
    """Path and module of each cross-attention, in the UNet's order."""
    return [(path, module) for path, module in unet.named_modules() if path.endswith("attn2")]


def added(unet: Any, texts: Text, time_ids: Tensor) -> Tensor:
    """What SDXL's UNet adds to its time embedding, [n, E]."""
    condition = {"text_embeds": texts.pooled, "time_ids": time_ids}
    return unet.get_aug_embed(texts.hidden, texts.hidden, condition)


def _denoiser(graph: GraphSpec, source: Source, modules: Any, size: Mapping[str, int], seed: int) -> Expected:
    """One step with random coefficients; each row is a call of the UNet with its text and its LoRA."""
    feeds, unet, rows = graph.feeds(size, seed), modules["unet"], size["rows"]
    rng = np.random.default_rng([seed, 1])

    def random(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    texts = Text(random(rows, source.max_tokens, source.text_width))
    time_ids = None
    if source.is_sdxl:
        texts = Text(texts.hidden, random(rows, source.config("text_encoder_2").projection_dim))
        time_ids = 1000 * torch.from_numpy(rng.random((rows, 6), np.float32))
        feeds["added"] = added(unet, texts, time_ids)
    image = feeds["context"][:, source.max_tokens :]  # K and V of the image prompt, if there is one
    lora = {"lora_q": feeds["lora_q"].numpy()}
    lora["lora_kv"] = 0.2 * random(len(feeds["lora_q"]), source.layout.size("lora_kv")).numpy()
    x = feeds["latents"] * feeds["coefficients"][0]
    context, outputs = [], []
    with reference.adapted(unet, source.layout, lora) as use:
        for row in range(rows):
            _use_for(use, feeds, size, row)
            text, row_image, k = texts.of(row), image[row : row + 1], row % len(x)
            context.append(torch.cat([text_keys_values(unet, text), row_image], dim=1))
            ids = None if time_ids is None else time_ids[row : row + 1]
            with with_image(unet, row_image) as tokens:
                outputs.append(reference.predicted(unet, x[k : k + 1], feeds["timestep"], text, ids, tokens))
    feeds["context"] = torch.cat(context)
    return feeds, _stepped(feeds, torch.cat(outputs))


def with_image(unet: Any, packed: Tensor) -> contextlib.AbstractContextManager[list[Tensor] | None]:
    """Gives a UNet an image prompt with keys and values `packed` [1, I, W]; does nothing if I is 0."""
    if not packed.shape[1]:
        return contextlib.nullcontext(None)
    widths = [(attn.to_k.out_features, attn.to_v.out_features) for _, attn in cross_attentions(unet)]
    parts = iter(packed.split([width for both in widths for width in both], dim=-1))
    pairs = {path: (next(parts), next(parts)) for path, _ in cross_attentions(unet)}
    return reference.with_image(unet, pairs)


def _stepped(feeds: Feeds, outputs: Tensor) -> dict[str, np.ndarray]:
    """The guided sum of the rows and the solver's update, as in docs/bundle-format.md section 3."""
    c, latents = feeds["coefficients"], feeds["latents"]
    by_branch = outputs.unflatten(0, (-1, len(latents)))
    guided = (feeds["guidance"].view(-1, 1, 1, 1, 1) * by_branch).sum(0)
    following = c[1] * latents + c[2] * guided + c[3] * feeds["previous"] + c[4] * feeds["noise"]
    return {"next_latents": following.numpy(), "denoised": (c[5] * latents + c[6] * guided).numpy()}


def _vae_decoder(
    graph: GraphSpec, source: Source, modules: Any, size: Mapping[str, int], seed: int
) -> Expected:
    feeds = graph.feeds(size, seed)
    return feeds, {"pixels": reference.decoded(source, modules["vae"], feeds["latents"])}


MAKERS: Mapping[str, Callable[[GraphSpec, Source, Any, Mapping[str, int], int], Expected]] = {
    "image_encoder": _image_encoder,
    "weight_decoder": _weight_decoder,
    "image_prompt": _image_prompt,
    "text_encoder": _text_encoder,
    "context": _context,
    "denoiser": _denoiser,
    "vae_decoder": _vae_decoder,
}
