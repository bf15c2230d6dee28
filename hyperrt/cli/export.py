"""The command `hyperrt export`; it loads the package `hyperrt.export` when it is called."""

from __future__ import annotations

import importlib
from typing import Any

import click

from hyperrt.cli.configs import ADAPTED, PRECISIONS, QUANTIZED, VERIFIED, ExportConfig
from hyperrt.cli.options import force_option
from hyperrt.cli.origin import checked
from hyperrt.cli.output import with_json
from hyperrt.cli.training import require

EXPORT_NEEDS = ("accelerate", "torch", "diffusers", "transformers", "peft", "onnx", "onnxscript")


@click.command()
@click.option(
    "--model", required=True, metavar="NAME|DIR", help="tiny, sd15, sdxl, or the folder of a base model."
)
@click.option("--output", "-o", required=True, metavar="DIR", help="Folder for the new bundle.")
@click.option(
    "--hypernet", metavar="CKPT", help="Checkpoint of the weight decoder: the folder of its run, or its file."
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
    help="VAE to use instead of the base model's: a folder, a .safetensors file, or OWNER/NAME@COMMIT.",
)
@click.option("--like", metavar="MODEL", help="Folder or hub id with the configuration of a single file.")
@click.option("--offline", is_flag=True, help="Use no network, only files in the Hugging Face cache.")
@click.option("--image-encoder", metavar="DIR", help="The hypernet's ViT, if the base model has none.")
@click.option("--image-prompt", metavar="FILE", help="IP-Adapter-Plus weights, for the open category.")
@click.option(
    "--random-weights", type=int, metavar="SEED", help="Use random weights for everything, to test and time."
)
@click.option("--size", type=int, metavar="PIXELS", help="Size of the pictures.  [default: the base model's]")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of the arithmetic."
)
@click.option(
    "--quantize", type=click.Choice(QUANTIZED), default="none", show_default=True, help="Storage of weights."
)
@click.option(
    "--adapt",
    type=click.Choice(ADAPTED),
    default="inputs",
    show_default=True,
    help="How a LoRA enters the model: as inputs, or by refitting constants (one subject per call).",
)
@click.option(
    "--verify",
    type=click.Choice(VERIFIED),
    help="How much to compare with PyTorch.  [default: full for tiny, graphs for the others]",
)
@click.option("--dry-run", is_flag=True, help="Write nothing; show the disk and memory it would take.")
@force_option("Replace an existing bundle.")
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
