"""The command `hyperrt export`, whose work is that of `hyperrt.export`, loaded when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import click

from hyperrt.cli.configs import ADAPTED, PRECISIONS, QUANTIZED, VERIFIED, ExportConfig
from hyperrt.cli.origin import checked
from hyperrt.cli.output import with_json
from hyperrt.cli.training import require

EXPORT_NEEDS = ("accelerate", "torch", "diffusers", "transformers", "peft", "onnx", "onnxscript")


@click.command()
@click.option(
    "--model", required=True, metavar="NAME|DIR", help="tiny, sd15, sdxl, or the folder of a base model."
)
@click.option("--output", "-o", required=True, metavar="DIR", help="Folder of the new bundle.")
@click.option(
    "--hypernet", metavar="CKPT", help="Checkpoint of the weight decoder: its run's folder, or its file."
)
@click.option(
    "--base",
    metavar="MODEL",
    help="The base model: a diffusers folder, a .safetensors file, or OWNER/NAME@COMMIT on the hub.  "
    "[default: what the hypernet was trained on]",
)
@click.option(
    "--vae",
    metavar="MODEL",
    help="Another VAE than the base model's: a diffusers folder, a .safetensors file, or OWNER/NAME@COMMIT.",
)
@click.option("--like", metavar="MODEL", help="Folder or hub id whose configuration a single file has.")
@click.option("--offline", is_flag=True, help="Use of the hub only what was downloaded before.")
@click.option("--image-encoder", metavar="DIR", help="The ViT that the hypernet reads, if the base has none.")
@click.option("--image-prompt", metavar="FILE", help="IP-Adapter-Plus weights, for the open category.")
@click.option(
    "--random-weights", type=int, metavar="SEED", help="Random weights in place of all, to test and time."
)
@click.option("--size", type=int, metavar="PIXELS", help="Of the pictures.  [default: the base model's]")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of the arithmetic."
)
@click.option(
    "--quantize", type=click.Choice(QUANTIZED), default="none", show_default=True, help="Of stored weights."
)
@click.option(
    "--adapt",
    type=click.Choice(ADAPTED),
    default="inputs",
    show_default=True,
    help="How a LoRA enters: as an input, or by refitting constants, for one subject a call.",
)
@click.option(
    "--verify",
    type=click.Choice(VERIFIED),
    help="What is compared with PyTorch.  [default: full for tiny, graphs for the others]",
)
@click.option("--dry-run", is_flag=True, help="Say what would be written, and what disk and memory it takes.")
@click.option("--force", "-f", is_flag=True, help="Replace a bundle that exists.")
@with_json
@click.pass_context
def export(context: click.Context, /, **options: Any) -> None:
    """Turn a PyTorch model into a bundle, and check that it computes the same (needs PyTorch).

    \b
    Examples:
      hyperrt export --model tiny --hypernet hypernet.safetensors -o my-bundle
      hyperrt generate --bundle my-bundle -p "a house in the snow"
    """
    config = checked(context, ExportConfig, options)
    require("export", "export", EXPORT_NEEDS)
    importlib.import_module("hyperrt.export.cli").run(config, context.obj)
