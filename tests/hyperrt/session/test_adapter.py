import numpy as np

from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.session.adapter import TOKENS, write_context


def test_the_product_of_each_site_is_added_to_its_keys_or_values_of_the_text():
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
    text, image = TOKENS + 3, 2
    hidden = rng.standard_normal((text, 5), np.float32)
    plain = rng.standard_normal((text + image, 20), np.float32)
    found = np.full_like(plain, np.nan)
    write_context(layout, plain, hidden, layout.pack(factors)["lora_kv"], 0.5, found)
    order = [factors[f"{path}.{kind}"] for path in paths for kind in ("to_k", "to_v")]
    delta = 0.5 * np.concatenate([hidden @ a @ b for a, b in order], axis=1)
    np.testing.assert_allclose(found[:text], plain[:text] + delta, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[text:], plain[text:])
