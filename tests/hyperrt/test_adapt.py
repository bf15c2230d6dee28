import numpy as np

from hyperrt.adapt import add_to_context
from hyperrt.lora import LoraLayout, Site


def test_the_lora_is_added_to_keys_and_values_as_the_graph_would():
    rng = np.random.default_rng(0)
    paths = ("a.attn2", "b.attn2")
    sites = tuple(
        Site(f"{path}.{kind}", 5, width)
        for path, width in zip(paths, (3, 7), strict=True)
        for kind in ("to_q", "to_k", "to_v")
    )
    layout = LoraLayout(sites, rank=2)
    factors = {
        site.path: (rng.standard_normal((5, 2), np.float32), rng.standard_normal((2, site.d_out), np.float32))
        for site in sites
    }
    hidden, base = rng.standard_normal((4, 5), np.float32), rng.standard_normal((4, 20), np.float32)
    found = base.copy()
    add_to_context(layout, found, hidden, layout.pack(factors)["lora_kv"], 0.5)
    order = [factors[f"{path}.{kind}"] for path in paths for kind in ("to_k", "to_v")]
    expected = base + 0.5 * np.concatenate([hidden @ a @ b for a, b in order], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
