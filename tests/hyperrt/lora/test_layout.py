"""LoRA layout, packing, and subject files: exact round trips, and refusal of everything else."""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from hyperrt.errors import LoraError, LoraMismatch, NotFound, NumericError, UsageError
from hyperrt.lora import names
from hyperrt.lora.layout import LoraLayout, Site, difference
from hyperrt.lora.reader import MAX_WEIGHT
from hyperrt.lora.subject_file import load_subject
from tests.hyperrt.lora_files import change, read, save_subject

FORMATS = ("diffusers", "peft", "kohya")
BASE = "b" * 64
METADATA = {"base_model": BASE, "hypernet": "a" * 64, "class_noun": "mug", "photos": "3", "trigger": "sks"}

sites = st.builds(
    Site,
    path=st.builds(
        "{}.{}".format, st.text("abc012", min_size=1, max_size=6), st.sampled_from(["to_q", "to_k", "to_v"])
    ),
    d_in=st.integers(1, 9),
    d_out=st.integers(1, 9),
)
layouts = st.builds(
    LoraLayout,
    st.lists(sites, max_size=6, unique_by=lambda site: site.path).map(tuple),
    st.integers(1, 4),
)


def small_layout(rank: int = 2) -> LoraLayout:
    attn = "down_blocks.0.attentions.1.transformer_blocks.0.attn2"
    sizes = {"to_q": 8, "to_k": 5, "to_v": 5}
    return LoraLayout(tuple(Site(f"{attn}.{name}", d_in, 6) for name, d_in in sizes.items()), rank)


def random_lora(layout: LoraLayout, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(layout.size(name)).astype(np.float32) for name in ("lora_q", "lora_kv")}


def same(found, expected) -> bool:
    """Bit for bit, and under the same names."""
    return {n: v.tobytes() for n, v in found.items()} == {n: v.tobytes() for n, v in expected.items()}


@pytest.fixture
def layout() -> LoraLayout:
    return small_layout()


@pytest.fixture
def saved(tmp_path, layout):
    path = tmp_path / "mug.safetensors"
    save_subject(path, random_lora(layout), layout, METADATA)
    return path


# --- layout and packing


@given(layouts, st.integers(0, 99))
def test_unpack_and_pack_are_inverse(layout, seed):
    packed = random_lora(layout, seed)
    factors = layout.unpack(packed)
    assert list(factors) == [site.path for site in layout.sites]
    assert same(layout.pack(factors), packed)


@given(layouts)
def test_slices_tile_the_vector_without_gap_or_overlap(layout):
    for name in ("lora_q", "lora_kv"):
        parts = [part for _, a, b in layout.slices(name) for part in (a, b)]
        ends = [0, *(part.stop for part in parts)]
        assert [part.start for part in parts] == ends[:-1]
        assert ends[-1] == layout.size(name) == sum(s.numel(layout.rank) for s in layout.sites_of(name))


@given(layouts)
def test_a_layout_survives_json_and_its_hash_with_it(layout):
    again = LoraLayout.from_json(json.loads(json.dumps(layout.to_json())))
    assert again == layout
    assert again.hash == layout.to_json()["hash"] == layout.hash


@given(layouts, layouts)
def test_two_layouts_have_the_same_hash_only_if_they_are_equal(one, other):
    assert (one.hash == other.hash) == (one == other)


def test_queries_go_to_the_denoiser_and_keys_and_values_to_the_context(layout):
    assert [site.projection for site in layout.sites_of("lora_q")] == ["to_q"]
    assert [site.projection for site in layout.sites_of("lora_kv")] == ["to_k", "to_v"]
    assert layout.size("lora_q") == 2 * (8 + 6)


def test_factors_are_stored_a_then_b_row_major(layout):
    packed = {name: np.arange(layout.size(name), dtype=np.float32) for name in ("lora_q", "lora_kv")}
    a, b = layout.unpack(packed)[layout.sites[0].path]
    assert a.shape == (8, 2) and b.shape == (2, 6)
    assert a[0].tolist() == [0, 1] and b[0, 0] == 16


@pytest.mark.parametrize(
    ("sites", "rank"),
    [
        ((Site("a.to_out", 2, 2),), 1),
        ((Site("a.to_q", 2, 2), Site("a.to_q", 2, 2)), 1),
        ((Site("a.to_q", 0, 2),), 1),
        ((Site("a.to_q", 2, 2),), 0),
        ((Site("a.to_q", 2**20, 2**20),), 2**10),
    ],
)
def test_a_layout_that_cannot_be_packed_is_refused(sites, rank):
    with pytest.raises(UsageError):
        LoraLayout(sites, rank)


def test_factors_that_do_not_fit_are_refused_by_name(layout):
    factors = layout.unpack(random_lora(layout))
    first = layout.sites[0].path
    a, b = factors[first]
    with pytest.raises(LoraMismatch, match="1 missing"):
        layout.pack({path: pair for path, pair in factors.items() if path != first})
    with pytest.raises(LoraMismatch, match="1 unknown"):
        layout.pack({**factors, "nowhere.to_q": (a, b)})
    with pytest.raises(LoraMismatch, match=first):
        layout.pack({**factors, first: (a.T, b)})
    with pytest.raises(LoraMismatch, match="lora_q"):
        layout.unpack({"lora_q": np.zeros(3, np.float32)})
    with pytest.raises(UsageError, match="lora_x"):
        layout.slices("lora_x")


# --- subject files that are sound


@pytest.mark.parametrize("format", FORMATS)
def test_a_subject_comes_back_bit_for_bit_from_every_format(tmp_path, layout, format):
    packed = random_lora(layout)
    packed["lora_q"][:3] = [-0.0, 1e-42, MAX_WEIGHT]  # negative zero, denormal, the largest
    save_subject(tmp_path / "mug.safetensors", packed, layout, METADATA, format)
    subject = load_subject(tmp_path / "mug.safetensors", layout, BASE)
    assert same(subject.lora, packed)
    assert (subject.class_noun, subject.photos) == ("mug", 3)
    assert METADATA.items() <= subject.metadata.items()


@given(layouts.filter(lambda layout: layout.sites), st.sampled_from(FORMATS), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_layout_comes_back_from_any_format(tmp_path_factory, layout, format, seed):
    path = tmp_path_factory.mktemp("subject") / "any.safetensors"
    save_subject(path, random_lora(layout, seed), layout, METADATA, format)
    assert same(load_subject(path, layout, BASE).lora, random_lora(layout, seed))


def test_the_same_subject_is_the_same_file(tmp_path, layout, saved):
    subject = load_subject(saved, layout, BASE)
    save_subject(tmp_path / "again.safetensors", subject.lora, layout, subject.metadata)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_the_library_reads_what_is_written_and_finds_it_aligned(saved, layout):
    tensors = load(saved.read_bytes())
    stem = f"unet.{layout.sites[0].path}"
    assert tensors[f"{stem}.lora_A.weight"].shape == (2, 8)
    assert tensors[f"{stem}.lora_B.weight"].shape == (6, 2)
    assert int.from_bytes(saved.read_bytes()[:8], "little") % 8 == 0


def test_a_peft_subject_can_be_a_folder_as_peft_wants_it(tmp_path, layout):
    save_subject(tmp_path / "mug", random_lora(layout), layout, METADATA, "peft")
    assert sorted(os.listdir(tmp_path / "mug")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert same(load_subject(tmp_path / "mug", layout, BASE).lora, random_lora(layout))


def test_a_file_that_exists_is_replaced_only_by_force(saved, layout):
    before = saved.read_bytes()
    with pytest.raises(UsageError):
        save_subject(saved, random_lora(layout, 1), layout, METADATA)
    assert saved.read_bytes() == before
    save_subject(saved, random_lora(layout, 1), layout, METADATA, force=True)
    assert same(load_subject(saved, layout, BASE).lora, random_lora(layout, 1))


def test_what_cannot_be_loaded_again_is_not_saved(tmp_path, layout):
    packed, path = random_lora(layout), tmp_path / "mug.safetensors"
    with pytest.raises(UsageError, match="gguf"):
        save_subject(path, packed, layout, METADATA, "gguf")
    with pytest.raises(UsageError, match="trigger"):
        save_subject(path, packed, layout, {k: v for k, v in METADATA.items() if k != "trigger"})
    with pytest.raises(UsageError, match="class noun"):
        save_subject(path, packed, layout, METADATA | {"class_noun": "m\x1bug"})
    with pytest.raises(LoraMismatch, match="lora_q"):
        save_subject(path, {"lora_kv": packed["lora_kv"]}, layout, METADATA)
    with pytest.raises(NumericError, match="lora_q"):
        save_subject(path, packed | {"lora_q": packed["lora_q"] * np.nan}, layout, METADATA)
    assert not list(tmp_path.iterdir())


# --- subject files that are not


KEY = f"unet.{small_layout().sites[0].path}.lora_A.weight"
GOOD = np.zeros((2, 8), np.float32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({KEY: None}, "1 missing"),
        ({"unet.up.lora_A.weight": GOOD}, "1 unknown"),
        ({"unet.\x1b[2J": GOOD}, r"x1b"),
        ({KEY: GOOD.T.copy()}, "lora_A.weight is"),
        ({KEY: GOOD[:1]}, "lora_A.weight is"),
        ({KEY: GOOD[:, :7].copy()}, "lora_A.weight is"),
        ({KEY: GOOD[0]}, "lora_A.weight is"),
        ({KEY: GOOD + np.nan}, "NaN"),
        ({KEY: GOOD + np.inf}, "infinity"),
        ({KEY: GOOD + 1e30}, "10000"),
        ({KEY: GOOD.astype(np.int32)}, "I32"),
        ({KEY: GOOD.astype(np.float64)}, "F64"),
        ({"unet.huge": np.zeros(2**20, np.float32)}, "1 unknown"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_tensor_is_refused_by_name(saved, layout, tensors, words):
    change(saved, tensors)
    with pytest.raises(LoraError, match=words) as caught:
        load_subject(saved, layout, BASE)
    assert caught.value.code == 3
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"base_model": "c" * 64}, "another base model"),
        ({"layout": "d" * 64}, "another LoRA layout"),
        ({"layout": None}, "another LoRA layout"),
        ({"version": "2"}, "another format"),
    ],
)
def test_a_subject_of_something_else_is_a_mismatch(saved, layout, metadata, words):
    change(saved, metadata={f"hyperrt.{name}": text for name, text in metadata.items()})
    with pytest.raises(LoraMismatch, match=words) as caught:
        load_subject(saved, layout, BASE)
    assert caught.value.code == 5


def test_another_rank_is_another_layout(saved):
    with pytest.raises(LoraMismatch, match="another LoRA layout"):
        load_subject(saved, small_layout(rank=3), BASE)


@pytest.mark.parametrize(
    "metadata",
    [
        {"class_noun": ""},
        {"class_noun": "mug\x1b[2J"},
        {"class_noun": "m" * 65},
        {"photos": "many"},
        {"photos": "-1"},
        {"photos": "\N{SUPERSCRIPT THREE}"},
        {"base_model": None},
    ],
)
def test_metadata_is_not_trusted(saved, layout, metadata):
    change(saved, metadata={f"hyperrt.{name}": text for name, text in metadata.items()})
    with pytest.raises(LoraError) as caught:
        load_subject(saved, layout, BASE)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("alpha", [0, 1, np.nan])
def test_a_subject_whose_scale_somebody_changed_is_refused(tmp_path, layout, alpha):
    path = tmp_path / "mug.safetensors"
    save_subject(path, random_lora(layout), layout, METADATA, "kohya")
    change(path, {names.alpha_key(layout.sites[0].path): np.array(alpha, np.float32)})
    with pytest.raises(LoraError, match=f"alpha is {alpha:g}"):
        load_subject(path, layout, BASE)


def test_a_subject_in_half_precision_is_read_as_it_is(saved, layout):
    old, _ = read(saved)
    halves = {name: tensor.astype(np.float16) for name, tensor in old.items()}
    change(saved, halves)
    found = load_subject(saved, layout, BASE).lora
    expected = {name: vector.astype(np.float16) for name, vector in random_lora(layout).items()}
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_a_file_cut_anywhere_is_refused(saved, layout):
    whole = saved.read_bytes()
    for length in {*range(0, 64), *range(64, len(whole), 37), len(whole) - 1}:
        saved.write_bytes(whole[:length])
        with pytest.raises(LoraError):
            load_subject(saved, layout, BASE)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_is_loaded_whole_or_refused(tmp_path_factory, data):
    layout = small_layout()
    path = tmp_path_factory.mktemp("damaged") / "mug.safetensors"
    save_subject(path, random_lora(layout), layout, METADATA)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        subject = load_subject(path, layout, BASE)
    except LoraError:
        return
    assert all(np.isfinite(vector).all() for vector in subject.lora.values())


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"\x80\x02}q", b"\x80\x05\x95"])
def test_a_pickle_is_refused_whatever_its_name(tmp_path, layout, magic):
    (tmp_path / "mug.safetensors").write_bytes(magic + bytes(99))
    with pytest.raises(LoraError, match="pickle"):
        load_subject(tmp_path / "mug.safetensors", layout, BASE)


def test_what_is_no_file_is_refused_at_once(tmp_path, layout):
    with pytest.raises(NotFound):
        load_subject(tmp_path / "none.safetensors", layout, BASE)
    with pytest.raises(NotFound):
        load_subject(tmp_path, layout, BASE)
    with pytest.raises(NotFound):
        load_subject("x" * 5000, layout, BASE)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(LoraError, match="plain file"):
        load_subject(tmp_path / "pipe", layout, BASE)


def test_subjects_are_told_apart_by_identity(layout):
    from hyperrt.lora.subject import Subject

    one = Subject(random_lora(layout), "mug", 1, METADATA)
    assert one == one and one != dataclasses.replace(one)


def test_a_difference_is_counted_and_shortened():
    assert difference({"a"}, {"a"}) == ""
    words = difference({"x\x1b"}, {"a", "b", "c", "d"})
    assert words == "4 missing (4 expected): a, b, c, ...; 1 unknown (4 expected): x\\x1b"
