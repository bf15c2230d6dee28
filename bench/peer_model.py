"""Writes a random Stable Diffusion of the true size in each peer's format, in the environment `diffusers`.

    python peer_model.py FOLDER --family sd15 --part diffusers|openvino_genai|onnxruntime|lora

    diffusers/        unet (fp32), text encoder, tokenizer, scheduler, a small VAE (not measured)
    openvino_genai/   the same as OpenVINO IR in fp32, by OpenVINO's converter, uncompressed, with the names
                      of inputs and outputs of optimum-intel
    onnxruntime/      the UNet as torch.onnx.export writes it, fp32, and the initialiser of each projection
    lora/             a.safetensors, b.safetensors: q, k, v of every cross-attention, kohya's names

Weights are PyTorch's initial ones, seed 0; the time of a step does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

PROJECTIONS = ("attn2.to_q", "attn2.to_k", "attn2.to_v")
RANKS = {"sd15": 3, "sdxl": 2}  # design.md, "LoRA contract"
DELTA = 0.01  # rms of a LoRA's product / rms of its weight
TRACED = 32  # side of the latents that a network is traced with


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=sorted(RANKS), default="sd15")
    parser.add_argument("--part", choices=sorted(PARTS), required=True)
    args = parser.parse_args()
    target = args.folder / args.part
    target.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        PARTS[args.part](args.folder, args.family)
    (target / "done").touch()
    print(json.dumps({"made": args.part}))


def unet_config(family: str) -> dict[str, object]:
    """The published configuration of the family's UNet, without UNet2DConditionModel's defaults."""
    if family == "sd15":
        return {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    return {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }


def write_diffusers(folder: Path, family: str) -> None:
    """Writes unet/, and for sd15 the other parts of a pipeline."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    root = folder / "diffusers"
    torch.manual_seed(0)
    UNet2DConditionModel(**unet_config(family)).save_pretrained(root / "unet")
    if family != "sd15":
        return
    text = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12,
        projection_dim=768, hidden_act="quick_gelu", bos_token_id=512, eos_token_id=513, pad_token_id=513,
    )  # fmt: skip
    CLIPTextModel(text).save_pretrained(root / "text_encoder")
    blocks = 4  # a picture side is 8 latents, as in the full-size decoder
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks, up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=(32,) * blocks, latent_channels=4, sample_size=512,
    ).save_pretrained(root / "vae")  # fmt: skip
    PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
        set_alpha_to_one=False, steps_offset=1,
    ).save_pretrained(root / "scheduler")  # fmt: skip
    tokenizer().save_pretrained(root / "tokenizer")
    (root / "model_index.json").write_text(json.dumps(PIPELINE, indent=1))


PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
}


def tokenizer():
    """CLIP's tokenizer without merges: a token for each byte; 512 and 513 begin and end a text."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77
    )


def write_lora(folder: Path, family: str) -> None:
    """Writes two subjects, a and b, in float32."""
    rank = RANKS[family]
    for seed, name in enumerate("ab", start=1):
        rng = np.random.default_rng(seed)
        tensors = {}
        for path, linear in sites(unet(folder)).items():
            wide, narrow = linear.out_features, linear.in_features
            down = rng.standard_normal((rank, narrow), np.float32)
            up = rng.standard_normal((wide, rank), np.float32)
            # Entries of up @ down have the standard deviation sqrt(rank).
            up *= DELTA * float(linear.weight.std()) / math.sqrt(rank)
            key = "lora_unet_" + path.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = np.array(rank, np.float32)
        save_file(tensors, folder / "lora" / f"{name}.safetensors")


def unet(folder: Path):
    """The family's UNet in float32, without PEFT."""
    from diffusers import UNet2DConditionModel

    if not (folder / "diffusers" / "done").is_file():
        raise SystemExit(f"{folder} has no UNet; run --part diffusers first")
    model = UNet2DConditionModel.from_pretrained(folder / "diffusers" / "unet", torch_dtype=torch.float32)
    return model.eval()


def sites(module: nn.Module) -> dict[str, nn.Linear]:
    """Path -> projection, for q, k and v of every cross-attention."""
    return {path: child for path, child in module.named_modules() if path.endswith(PROJECTIONS)}


def unet_inputs(family: str, rows: int, size: int | None = None) -> dict[str, torch.Tensor]:
    """Inputs of a call of the UNet, named as optimum-intel names them; size of latents: the family's."""
    config = unet_config(family)
    size, width = size or config["sample_size"], config["cross_attention_dim"]
    inputs = {
        "sample": torch.randn(rows, 4, size, size),
        "timestep": torch.tensor([501]),
        "encoder_hidden_states": torch.randn(rows, 77, width),
    }
    if family == "sdxl":
        inputs |= {"text_embeds": torch.randn(rows, 1280), "time_ids": torch.full((rows, 6), 1024.0)}
    return inputs


class PlainUNet(nn.Module):
    """A UNet whose inputs and single output are tensors, so that it can be traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, sample, timestep, encoder_hidden_states, text_embeds=None, time_ids=None):
        added = {"text_embeds": text_embeds, "time_ids": time_ids} if text_embeds is not None else None
        return self.inner(
            sample, timestep, encoder_hidden_states, added_cond_kwargs=added, return_dict=False
        )[0]


def write_onnxruntime(folder: Path, family: str) -> None:
    """Writes unet.onnx with torch.onnx.export, and sites.json: path -> name of its initialiser [in, out]."""
    import onnx

    model, path = unet(folder), folder / "onnxruntime" / "unet.onnx"
    inputs = unet_inputs(family, 1)
    torch.onnx.export(
        PlainUNet(model), tuple(inputs.values()), path, input_names=list(inputs), output_names=["out_sample"],
        dynamo=True, external_data=True,
    )  # fmt: skip
    # The exporter renames the weights of linear layers, so their values identify them.
    proto = onnx.load(path)
    by_value = {
        onnx.numpy_helper.to_array(tensor)[0].tobytes(): tensor.name
        for tensor in proto.graph.initializer
        if len(tensor.dims) == 2
    }
    names = {
        site: by_value[linear.weight.T.contiguous()[0].numpy().tobytes()]
        for site, linear in sites(model).items()
    }
    (folder / "onnxruntime" / "sites.json").write_text(json.dumps(names, indent=1))


def write_openvino_genai(folder: Path, family: str) -> None:
    """Writes IR of the UNet; for sd15 of all parts, in the folders that Text2ImagePipeline reads."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    source, root = folder / "diffusers", folder / "openvino_genai"
    inputs = unet_inputs(family, 2, TRACED)  # small, since tracing computes; the size is dynamic
    save_ir(folder, "unet", PlainUNet(unet(folder)), inputs, ["out_sample"])
    if family != "sd15":
        # The UNet reads from it how many pixels a latent is.
        (root / "vae_decoder").mkdir(exist_ok=True)
        (root / "vae_decoder" / "config.json").write_text(json.dumps({"block_out_channels": [32] * 4}))
        return
    text_encoder = CLIPTextModel.from_pretrained(source / "text_encoder", attn_implementation="eager")
    ids = {"input_ids": torch.full((1, 77), 513)}
    save_ir(folder, "text_encoder", TextEncoder(text_encoder), ids, ["last_hidden_state", "pooler_output"])
    vae = AutoencoderKL.from_pretrained(source / "vae")
    vae.forward = lambda latent_sample: vae.decode(latent_sample, return_dict=False)[0]
    save_ir(folder, "vae_decoder", vae, {"latent_sample": torch.randn(1, 4, 64, 64)}, ["sample"])
    save_tokenizer(source / "tokenizer", root / "tokenizer")
    shutil.copytree(source / "scheduler", root / "scheduler", dirs_exist_ok=True)
    (root / "model_index.json").write_text(json.dumps(PIPELINE, indent=1))


def save_ir(
    folder: Path, part: str, module: nn.Module, inputs: dict[str, torch.Tensor], outputs: list[str]
) -> None:
    """Writes a module as OpenVINO IR in float32, with dynamic rows and size, and its configuration."""
    import openvino as ov

    shapes = {name: [-1, *x.shape[1:]] if x.ndim > 1 else [1] for name, x in inputs.items()}
    shapes |= {name: [-1, 4, -1, -1] for name in ("sample", "latent_sample") if name in shapes}
    converted = ov.convert_model(module.eval(), example_input=inputs, input=list(shapes.items()))
    for port, name in zip(converted.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    root = folder / "openvino_genai" / part
    ov.save_model(converted, root / "openvino_model.xml", compress_to_fp16=False)
    shutil.copy(folder / "diffusers" / part.removesuffix("_decoder") / "config.json", root / "config.json")


def save_tokenizer(source: Path, root: Path) -> None:
    """Writes the tokenizer as OpenVINO IR, with its original files."""
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    reader, writer = convert_tokenizer(AutoTokenizer.from_pretrained(source), with_detokenizer=True)
    ov.save_model(reader, root / "openvino_tokenizer.xml")
    ov.save_model(writer, root / "openvino_detokenizer.xml")
    shutil.copytree(source, root, dirs_exist_ok=True)


class TextEncoder(nn.Module):
    """CLIP's text encoder from ids to the last hidden state and the pooled one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids):
        return self.inner(input_ids, return_dict=False)


PARTS = {
    "diffusers": write_diffusers,
    "lora": write_lora,
    "onnxruntime": write_onnxruntime,
    "openvino_genai": write_openvino_genai,
}

if __name__ == "__main__":
    main()
