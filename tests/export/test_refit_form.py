"""The denoiser with its LoRA as named constants: each reaches its site, and nothing else changes."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from hyperrt import engines
from hyperrt.export import refit_form, verify
from hyperrt.export.errors import ExportError
from hyperrt.lora.layout import LoraLayout

SIZES = {"images": 2, "branches": 3, "rows": 6, "subjects": 1}


@pytest.fixture(scope="module")
def layout(source):
    return source.layout


@pytest.fixture(scope="module")
def path(exported, layout, tmp_path_factory):
    """The denoiser of `exported` in the other form."""
    model = ir.load(exported / "denoiser.onnx")
    refit_form.apply(model, layout)
    file = tmp_path_factory.mktemp("refit") / "denoiser.onnx"
    ir.save(model, file)
    return file


@pytest.fixture(scope="module")
def graph(path):
    model = onnx.load(path)
    onnx.checker.check_model(model, skip_opset_compatibility_check=True)
    return model.graph


@pytest.fixture(scope="module")
def both(exported, path, layout):
    """run(lora, **feeds) runs the two forms: by inputs, by refit."""
    with engines.open(exported / "denoiser.onnx") as by_inputs, engines.open(path) as by_refit:
        runs = (by_inputs.run, verify.run_of(by_refit, layout))

        def run(lora, **feeds):
            return [run_form({**feeds, "lora_q": lora[np.newaxis]}) for run_form in runs]

        yield run


@pytest.fixture(scope="module")
def feeds(parts):
    found = {name: tensor.numpy() for name, tensor in parts["denoiser"].feeds(SIZES, seed=0).items()}
    gate = np.array([0, 0, 1, 0.5, 0, 0], np.float32)  # two images of each branch
    return {name: x for name, x in found.items() if name != "lora_q"} | {"gate": gate}


@pytest.fixture
def model(exported):
    """A copy of the denoiser of `exported`, which a test may change."""
    return ir.load(exported / "denoiser.onnx")


def some(layout, seed):
    return 0.3 * np.random.default_rng(seed).standard_normal(layout.size("lora_q")).astype(np.float32)


def sites(layout):
    return [(site.path, part_a, part_b) for site, part_a, part_b in layout.slices("lora_q")]


# The file


def test_each_factor_is_a_constant_of_float32_zeros_and_an_input_that_one_product_reads(graph, layout):
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}
    for spec in layout.constants("lora_q"):
        assert (constants[spec.name].shape, constants[spec.name].dtype) == (spec.shape, np.float32)
        assert not constants[spec.name].any()
        assert spec.name in inputs
        assert [node.op_type for node in graph.node if spec.name in node.input] == ["MatMul"]


def test_nothing_is_left_of_the_packed_input(graph, exported):
    before = onnx.load(exported / "denoiser.onnx").graph
    assert "lora_q" not in [value.name for value in graph.input]
    kept = [value.name for value in before.input if value.name != "lora_q"]
    assert [value.name for value in graph.input][: len(kept)] == kept
    ops = [[node.op_type for node in one.node] for one in (before, graph)]
    removed = {op: ops[0].count(op) - ops[1].count(op) for op in {*ops[0]}}
    assert removed["Split"] == 1
    assert removed["Reshape"] > 1
    assert {op for op, count in removed.items() if count} <= {"Split", "Reshape", "Concat", "Shape"}


def test_onnx_runtime_sees_inputs_without_the_lora_and_weights_with_it(path, parts, layout, capfd):
    with engines.open(path) as engine:
        assert engine.inputs == tuple(spec for spec in parts["denoiser"].inputs if spec.name != "lora_q")
        assert engine.outputs == parts["denoiser"].outputs
        assert sorted(engine.weights, key=str) == sorted(layout.constants("lora_q"), key=str)
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""


# What it computes


def test_a_graph_that_was_not_refitted_is_the_base_model(path, both, feeds, layout):
    by_inputs, _ = both(np.zeros(layout.size("lora_q"), np.float32), **feeds)
    with engines.open(path) as engine:
        assert verify.relative(engine.run(feeds), by_inputs) <= 1e-6


@pytest.mark.parametrize("seed", [1, 2])
def test_it_computes_what_the_other_form_does_under_any_lora(both, feeds, layout, seed):
    by_inputs, by_refit = both(some(layout, seed), **feeds)
    assert verify.relative(by_refit, by_inputs) <= 1e-6


def test_each_site_has_the_effect_that_it_has_in_the_other_form(both, feeds, layout):
    assert len(sites(layout)) == sum(site.projection == "to_q" for site in layout.sites) > 1
    lora = some(layout, 3)
    before = both(lora, **feeds)
    for path, *factors in sites(layout):
        for factor in factors:
            changed = lora.copy()
            changed[factor] = -changed[factor]
            effects = [
                {name: after[name] - old[name] for name in after}
                for after, old in zip(both(changed, **feeds), before, strict=True)
            ]
            assert max(np.abs(effect).max() for effect in effects[0].values()) > 1e-3, path
            assert verify.relative(effects[1], effects[0]) < 1e-3, path


@pytest.mark.parametrize(("branch", "moves"), [(0, False), (1, True), (2, False)])
def test_rows_of_the_base_model_do_not_move(both, feeds, layout, branch, moves):
    alone = np.eye(3, dtype=np.float32)[branch]  # the guidance sum is this branch
    results = [both(lora, **feeds | {"guidance": alone})[1] for lora in (some(layout, 4), some(layout, 5))]
    same = [np.array_equal(results[0][name], results[1][name]) for name in results[0]]
    assert same == [not moves] * 2


def test_a_copy_with_another_lora_in_it_computes_with_that(path, both, feeds, layout):
    lora = some(layout, 6)
    by_inputs, _ = both(lora, **feeds)
    copied = path.with_name("copy.onnx")
    refit_form.with_lora(path, layout.named({"lora_q": lora}), copied)
    with engines.open(copied) as engine:
        assert verify.relative(engine.run(feeds), by_inputs) <= 1e-6


# What is refused


def spoiled(model, layout, match):
    with pytest.raises(ExportError, match=f"cannot be written for a refit\n.*{match}(?s:.*)--adapt inputs"):
        refit_form.apply(model, layout)


def test_another_layout_is_refused(model, layout):
    spoiled(model, LoraLayout(layout.sites[::-1][3:], layout.rank), "is not split as the layout says")
    spoiled(model, LoraLayout(layout.sites, layout.rank + 1), "is not split as the layout says")


def test_a_graph_without_the_input_is_refused(model, layout):
    refit_form.apply(model, layout)
    spoiled(model, layout, "no input lora_q")


def test_a_name_that_is_taken_is_refused(model, layout):
    model.graph[-1].outputs[0].name = layout.constants("lora_q")[3].name
    spoiled(model, layout, "there is a tensor .*lora_B already")


@pytest.mark.parametrize("k", [0, 1])
def test_a_site_whose_factor_reaches_no_product_is_refused(model, layout, k):
    """The product reads a constant instead, as if the exporter had lost the factor."""
    split = next(node for node in model.graph if node.op_type == "Split" and node.inputs[0].name == "lora_q")
    ((reshape, _),) = split.outputs[2 + k].uses()
    ((product, index),) = reshape.outputs[0].uses()
    product.replace_input_with(index, model.graph.inputs[0])
    spoiled(model, layout, f"{layout.constants('lora_q')[2].name} is read by nothing")


def test_a_part_that_goes_elsewhere_is_refused(model, layout):
    split = next(node for node in model.graph if node.op_type == "Split" and node.inputs[0].name == "lora_q")
    ((reshape, _),) = split.outputs[0].uses()
    reshape.op_type = "Flatten"
    spoiled(model, layout, "goes to Flatten, and not to Reshape")


def test_a_vector_that_is_read_twice_is_refused(model, layout):
    packed = next(value for value in model.graph.inputs if value.name == "lora_q")
    model.graph.append(ir.Node("", "Identity", [packed]))
    spoiled(model, layout, "lora_q goes to Split, Identity")


def test_factors_without_the_gate_between_them_are_refused(model, layout):
    split = next(node for node in model.graph if node.op_type == "Split" and node.inputs[0].name == "lora_q")
    ((reshape, _),) = split.outputs[0].uses()
    ((product, _),) = reshape.outputs[0].uses()
    ((gate, _),) = product.outputs[0].uses()
    gate.op_type = "Add"
    spoiled(model, layout, "no gate between the two products")
