"""The latents of a seed never change: no refactoring, no other NumPy, no other machine."""

from __future__ import annotations

import numpy as np

from hyperrt.runtime import Runtime

PROMPT = "a [V] robot on the beach"
SEED_7 = [
    [-7.690021, -6.468311, -8.377, -7.294029],
    [-8.798129, -6.378116, -6.015757, -6.016833],
    [-6.898407, -8.575995, -8.900989, -8.650026],
    [-5.335038, -5.101764, -8.590986, -5.715236],
]


def test_the_latents_of_a_seed_are_those_that_are_written_here(pretend, photos):
    with Runtime.open(pretend, "fake") as runtime:
        subject = runtime.personalize(photos)
        options = {"steps": 3, "solver": "euler_ancestral", "guidance_scale": 1.1, "strength": 0.02}
        latents = runtime.generate(PROMPT, subject, seed=7, **options).latents
    np.testing.assert_allclose(latents[0, :, 1], SEED_7, rtol=1e-4)
