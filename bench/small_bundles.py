"""Exports small bundles of each family for bench/same_latents.py, from the models of the tests."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from hyperrt.cli.configs import ExportConfig
from hyperrt.export import export_bundle, families
from tests.export import small_models

FORMS = {"sd15": ("inputs", "refit"), "sdxl": ("inputs", "refit")}


def main() -> None:
    """Exports each family in each form to FOLDER/FAMILY-FORM; the folder is the only argument."""
    folder = Path(sys.argv[1])
    for family, forms in FORMS.items():
        source = small_models.source(family, folder / f"{family}-tokenizer")
        random = dataclasses.replace(families.get(family), random=lambda seed, source=source: source)
        families.FAMILIES[family] = random
        for adapt in forms:
            print("exporting", family, adapt, file=sys.stderr, flush=True)
            output = str(folder / f"{family}-{adapt}")
            export_bundle(
                ExportConfig(model=family, output=output, random_weights=0, verify="none", adapt=adapt)
            )
