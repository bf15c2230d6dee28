"""A LoRA that enters by refit: what the engine computes is always whole, and whose the adapter says it is."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from hyperrt import engines
from hyperrt.bundle.bundle import MANIFEST, Bundle
from hyperrt.engines import EngineError, EngineUnusable, TensorSpec
from hyperrt.engines.fake import FakeEngine
from hyperrt.errors import BundleError, BundleMismatch, LoraMismatch, UsageError
from hyperrt.lora.layout import LoraLayout, Site
from hyperrt.lora.subject import Subject
from hyperrt.runtime import Runtime
from hyperrt.session import graphs
from hyperrt.session.adapter import put_lora
from hyperrt.session.resident import Resident
from tests.hyperrt import fake_bundle

PROMPT = "a [V] robot on the beach"
LAYOUT = LoraLayout(
    tuple(Site(f"block{k}.attn2.{kind}", 3 + k, 4) for k in range(3) for kind in ("to_q", "to_k")), rank=2
)
SIZE, CONSTANTS = LAYOUT.size("lora_q"), LAYOUT.constants("lora_q")


def subject(seed, size=SIZE):
    weights = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    return Subject({"lora_q": weights}, "robot", 1, {})


SUBJECTS = [subject(seed) for seed in range(8)]
BASE = np.zeros(SIZE, np.float32)


@dataclasses.dataclass
class Adapter:
    """An open engine that takes its LoRA by refit."""

    resident: Resident

    def put(self, *subjects):
        put_lora(self.resident, "lora_q", LAYOUT, "refit", subjects)

    @property
    def held(self):
        return self.resident.value("lora_q") or ()


def opened():
    """An engine that returns the packed LoRA that its constants make, and an adapter of it."""
    engine = FakeEngine(
        lambda t: {"lora": np.concatenate([t[spec.name].ravel() for spec in CONSTANTS])},
        inputs=[],
        outputs=[TensorSpec("lora", (SIZE,), "float32")],
        weights={spec.name: np.zeros(spec.shape, np.float32) for spec in CONSTANTS},
    )
    return engine, Adapter(Resident(engine))


def weights_of(subject):
    return BASE if subject is None else subject.lora["lora_q"]


def computed(engine):
    return engine.run({})["lora"]


def residue(engine, adapter):
    """How far the engine is from whom the adapter says it holds."""
    (held,) = adapter.held
    return float(np.abs(computed(engine) - weights_of(held)).max())


def test_each_site_has_two_constants_of_its_own_name_in_the_order_of_the_packed_vector():
    names = [f"block{k}.attn2.to_q.lora_{factor}" for k in range(3) for factor in "AB"]
    assert [spec.name for spec in CONSTANTS] == names
    assert [spec.shape for spec in CONSTANTS[:2]] == [(1, 3, 2), (1, 2, 4)]
    packed = np.concatenate([a.ravel() for a in LAYOUT.named(SUBJECTS[0].lora).values()])
    np.testing.assert_array_equal(packed, weights_of(SUBJECTS[0]))


def test_the_base_model_comes_back_after_a_subject():
    engine, adapter = opened()
    base = computed(engine)
    for who in (SUBJECTS[0], SUBJECTS[1], SUBJECTS[0], None):
        adapter.put(who)
        np.testing.assert_array_equal(computed(engine), weights_of(who))
    assert computed(engine).tobytes() == base.tobytes()


def test_a_subject_that_is_there_is_not_put_again():
    engine, adapter = opened()
    adapter.put(SUBJECTS[0])
    engine.refit_faults = [0]
    adapter.put(SUBJECTS[0])
    adapter.put(SUBJECTS[0], None, SUBJECTS[0])  # the base model's rows have a gate of 0
    assert engine.refit_faults == [0]


def test_two_subjects_in_one_call_are_refused_and_the_old_one_stays():
    engine, adapter = opened()
    adapter.put(SUBJECTS[0])
    words = r"2 subjects cannot .*\n.*the same for all rows(?s:.*)--adapt inputs"
    with pytest.raises(UsageError, match=words):
        adapter.put(SUBJECTS[1], None, SUBJECTS[2])
    assert (adapter.held, residue(engine, adapter)) == ((SUBJECTS[0],), 0)


def test_a_subject_of_another_size_is_refused_and_the_old_one_stays():
    engine, adapter = opened()
    adapter.put(SUBJECTS[0])
    with pytest.raises(LoraMismatch, match="does not fit the bundle"):
        adapter.put(subject(9, SIZE + 1))
    assert (adapter.held, residue(engine, adapter)) == ((SUBJECTS[0],), 0)


@pytest.mark.parametrize("done", range(len(CONSTANTS) + 1))
def test_a_refit_that_fails_at_any_constant_leaves_the_old_subject(done):
    engine, adapter = opened()
    adapter.put(SUBJECTS[0])
    engine.refit_faults = [done]
    with pytest.raises(EngineError, match=f"{done} of {len(CONSTANTS)}"):
        adapter.put(SUBJECTS[1])
    assert (adapter.held, residue(engine, adapter)) == ((SUBJECTS[0],), 0)
    adapter.put(SUBJECTS[1])
    assert (adapter.held, residue(engine, adapter)) == ((SUBJECTS[1],), 0)


@pytest.mark.parametrize("who", [SUBJECTS[0], SUBJECTS[1], None], ids=["the old one", "the new one", "none"])
def test_after_a_way_back_that_failed_nobody_is_drawn_before_a_subject_is_whole(who):
    engine, adapter = opened()
    adapter.put(SUBJECTS[0])
    engine.refit_faults = [2, 1]
    with pytest.raises(EngineUnusable):
        adapter.put(SUBJECTS[1])
    assert adapter.held == ()
    with pytest.raises(EngineUnusable):
        computed(engine)
    adapter.put(who)
    assert (adapter.held, residue(engine, adapter)) == ((who,), 0)


def test_a_thousand_sequences_with_faults_leave_no_residue():
    rng = np.random.default_rng(0)
    everyone, staged = [*SUBJECTS, None], []
    for _ in range(1000):
        engine, adapter = opened()
        for _ in range(12):
            how_many = rng.choice(3, p=[0.6, 0.25, 0.15])  # of the refit, or of it and the way back
            faults = rng.integers(len(CONSTANTS) + 1, size=how_many).tolist()
            before, engine.refit_faults = adapter.held, [*faults]
            who = everyone[rng.integers(len(everyone))]
            try:
                adapter.put(who)
            except EngineUnusable:
                assert adapter.held == ()
            except EngineError:
                assert adapter.held == before
            else:
                assert adapter.held == (who,)
            used = len(faults) - len(engine.refit_faults)
            staged += [(k, done) for k, done in enumerate(faults[:used])]
            if adapter.held:
                assert residue(engine, adapter) == 0
            elif used == 2:
                with pytest.raises(EngineUnusable):
                    computed(engine)
        engine.refit_faults = []
        adapter.put(None)
        np.testing.assert_array_equal(computed(engine), BASE)
    # Every place at which a refit, and the way back from one, can fail was tried.
    assert set(staged) == {(k, done) for k in (0, 1) for done in range(len(CONSTANTS) + 1)}


# The runtime on a bundle whose manifest says refit


@pytest.fixture
def folder(tmp_path):
    fake_bundle.register()
    return fake_bundle.write(tmp_path / "refit", refit=True)


@pytest.fixture
def runtime(folder):
    with Runtime.open(folder, "fake") as runtime:
        yield runtime


@pytest.fixture
def two(runtime, photos):
    return runtime.personalize(photos), runtime.personalize([np.full((40, 40, 3), 120, np.uint8)])


def draw(runtime, subject, **options):
    prompt = PROMPT if subject else "a robot on the beach"
    return runtime.generate(prompt, subject, **options).latents.tobytes()


def test_a_picture_is_the_same_whichever_way_the_lora_enters(runtime, two, tmp_path):
    with Runtime.open(fake_bundle.write(tmp_path / "inputs"), "fake") as by_inputs:
        for who in (*two, None, two[0]):
            assert draw(runtime, who, n=2) == draw(by_inputs, who, n=2)


def test_in_the_runtime_a_failed_refit_stops_one_picture_and_no_other(runtime, two):
    first, second = (draw(runtime, who) for who in two)
    denoiser = runtime._graphs.engine("denoiser")
    for faults, error in (([1], EngineError), ([1, 2], EngineUnusable)):
        denoiser.refit_faults = faults
        with pytest.raises(error):
            draw(runtime, two[0])
        assert draw(runtime, two[1]) == second
        assert draw(runtime, two[0]) == first
        assert draw(runtime, two[1]) == second


def test_pairs_of_one_subject_share_a_call_and_those_of_two_are_refused_before_it(runtime, two):
    prompts = [PROMPT, "a [V] robot in snow", "a robot"]
    runtime.generate(prompts, [two[0], two[0], None])
    fake_bundle.calls.clear()
    with pytest.raises(UsageError, match="2 subjects cannot share a call"):
        runtime.generate(prompts, [*two, None])
    assert fake_bundle.calls == []


def test_a_backend_that_cannot_refit_is_refused_when_the_bundle_is_opened(folder):
    with pytest.raises(BundleMismatch, match=r"'openvino' cannot .*\n.*by refit.*\n.*--adapt inputs"):
        Runtime.open(folder, "openvino")


def test_auto_is_a_backend_that_can_refit(folder, monkeypatch):
    monkeypatch.setattr(engines, "resolve", lambda name: "openvino" if name == "auto" else name)
    assert Runtime.open(folder, "auto").backend == "onnxruntime"


def drop(weights):
    del weights[-1]


def rename(weights):
    weights[1]["name"] = "elsewhere.lora_B"


def turn(weights):
    weights[0]["shape"].reverse()


def halve(weights):
    weights[0]["dtype"] = "float16"


@pytest.mark.parametrize("change", [drop, rename, turn, halve])
def test_a_graph_with_other_weights_than_the_manifest_names_is_refused(change, folder):
    graph = json.loads((folder / "denoiser.onnx").read_text())
    change(graph["weights"])
    (folder / "denoiser.onnx").write_text(json.dumps(graph))
    bundle = Bundle.open(folder)
    bundle._verified.add("denoiser")  # as if the manifest had the hash of what was written
    with pytest.raises(BundleMismatch, match=r"weights in denoiser .*\n.*it has .*says .*lora_[AB] \[1, "):
        graphs.Graphs(bundle, "fake", None).engine("denoiser")


def test_a_graph_with_weights_that_the_manifest_does_not_name_is_refused(folder, tmp_path):
    by_inputs = fake_bundle.write(tmp_path / "inputs")
    (by_inputs / "denoiser.onnx").write_bytes((folder / "denoiser.onnx").read_bytes())
    bundle = Bundle.open(by_inputs)
    bundle._verified.add("denoiser")
    with pytest.raises(BundleMismatch, match="the manifest says none"):
        graphs.Graphs(bundle, "fake", None).engine("denoiser")


@pytest.mark.parametrize("change", [drop, rename, turn, halve])
def test_a_manifest_that_names_other_weights_than_its_layout_is_refused(change, folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["graphs"]["denoiser"]["weights"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"denoiser\.weights\[\d\] is .*; lora needs .*lora_[AB]"):
        Bundle.open(folder)
