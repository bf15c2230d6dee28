"""Runs every script of bench/ with --quick, and checks that it gives its figures; asserts no times."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hyperrt.bundle.bundle import packaged

BENCH = Path(__file__).resolve().parents[1] / "bench"
# Keys by which figures are compared between commits; a script may have more.
KEYS = {
    "coldstart": {"generate_s", "peak_mb", "help_s", "forbidden_modules"},  # sizes need pip's index
    "parity": {"worst_rel"},
    "interop": {"missing", "unexpected", "picture_rel_diff"},
    "fused_step": {"fused_over_two_calls", "lora_overhead"},
    "full_size": {"export_s", "export_peak_gb", "bundle_gb", "step_s_onnxruntime", "parity_fp32_worst_rel"},
    "hoist": {"time_ratio", "memory_ratio", "weight_bytes_saved"},
    "compile": {"compiled"},
    "peers": {"ours_s"},  # the smallest run makes no environments
    "delta_retention": {"beside", "merged"},
    "subjects": {"per_subject_s_1", "per_subject_s_8", "mb_per_extra_subject"},
    "gpu": {"tiny_step_over_floor", "switch_ms", "vs_compile_naive"},
    "training_speed": {"vs_plain", "mb_per_sample"},
    "against_dreambooth": {
        *(
            f"{key}_{method}"
            for key in ("identity", "background", "seconds_per_subject")
            for method in ("hypernet", "dreambooth")
        ),
        "times_faster",
    },
    "paper_small": {"orderings_held", "orderings_held_in_pairs", "orderings"},
    "same_latents": {"requests", "changed", "images_changed", "worst_rel"},
    "structure": {
        *("hyperrt_rooms_at_the_top", "import_circles", "longest_file", "longest_function"),
        *("readme_lines", "untyped_public_options"),
    },
    "switch": {"switch_ms", "aba_max_diff", "a_base_max_diff", "row_alone_max_rel"},
    "fidelity": {
        f"{key}{way}"
        for key in ("identity_hist", "identity_encoder", "background")
        for way in ("", "_none", "_wrong", "_real")
    },
}
NEEDS_GIT = ("same_latents", "structure")
NEEDS = {"parity": ("torch", "diffusers", "peft", "onnx_ir"), "fused_step": ("onnx_ir",)}
EXPORTS = ("torch", "diffusers", "onnxscript", "openvino")
NEEDS |= {"full_size": EXPORTS, "hoist": EXPORTS, "compile": ("tensorrt_rtx",)}
NEEDS |= {
    "same_latents": ("onnxruntime",),
    "gpu": ("torch", "diffusers", "onnxruntime"),
    "interop": NEEDS["parity"],
}
NEEDS |= dict.fromkeys(
    ("training_speed", "against_dreambooth", "paper_small"),
    ("torch", "diffusers", "peft", "scipy", "matplotlib"),
)


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="session")
def figures():
    """A function: name of a script -> the figures of its smallest run; each runs once."""
    done: dict[str, dict[str, float]] = {}

    def run(script: str) -> dict[str, float]:
        for package in NEEDS.get(script, ()):
            pytest.importorskip(package)
        if "tiny" not in packaged():
            pytest.skip("the default bundle is not in this checkout")
        if script in NEEDS_GIT and not (BENCH.parent / ".git").exists():
            pytest.skip("this is not a checkout of git")
        if script not in done:
            command = [sys.executable, str(BENCH / f"{script}.py"), "--quick"]
            env = os.environ | {"PYTHONPATH": str(BENCH.parent)}  # this checkout, whatever is installed
            result = subprocess.run(
                command, env=env, capture_output=True, text=True, timeout=300, check=False
            )
            assert result.returncode == 0, result.stderr
            line = json.loads(result.stdout.splitlines()[-1])
            assert line.keys() - {"against"} == {"bench", "commit", "machine", "figures"}
            assert line["bench"] == script
            done[script] = line["figures"]
        return done[script]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("script", KEYS)
def test_a_script_ends_in_its_figures_and_explains_them(figures, script):
    found = figures(script)
    assert found.keys() >= KEYS[script]
    assert all(math.isfinite(value) for value in found.values())
    text = ast.get_docstring(ast.parse((BENCH / f"{script}.py").read_text(encoding="utf-8")))
    assert not [
        key for key in KEYS[script] if key not in text and not key.endswith(("_none", "_wrong", "_real"))
    ]


def test_every_script_has_a_test():
    """Those of the peers run in the peers' environments, which no test makes."""
    scripts = {path.stem for path in BENCH.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert {name for name in scripts if not name.startswith("peer_")} == KEYS.keys()


def test_every_peer_is_pinned_and_has_a_script():
    peers = module("peer_environment").PEERS
    assert {path.stem for path in (BENCH / "peers").glob("*.txt")} == set(peers)
    for peer in peers:
        lines = (BENCH / "peers" / f"{peer}.txt").read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if not line.startswith("#") and "==" not in line]
        assert (BENCH / f"peer_{peer}.py").is_file()


def test_the_scripts_of_the_peers_import_nothing_of_the_project():
    own = {"engines", "hyperrt", "training", "export", "report"}
    for path in BENCH.glob("peer_*.py"):
        if path.stem == "peer_ours":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        for node in ast.walk(tree):
            names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        assert not own & {name.split(".")[0] for name in names}, path.name


def test_an_environment_is_remade_only_when_its_packages_change(tmp_path, monkeypatch):
    environment = module("peer_environment")
    monkeypatch.setattr(environment, "HOME", tmp_path)
    calls = []

    def run(command, **_):
        calls.append(command)
        (tmp_path / "onnxruntime").mkdir(exist_ok=True)

    monkeypatch.setattr(environment.subprocess, "run", run)
    first = environment.python("onnxruntime")
    assert first == tmp_path / "onnxruntime" / "bin" / "python" and len(calls) == 2
    assert environment.python("onnxruntime") == first and len(calls) == 2
    (tmp_path / "onnxruntime" / "done").write_text("of other packages")
    assert environment.python("onnxruntime") == first and len(calls) == 4


def test_a_peer_that_fails_ends_the_measurement():
    with pytest.raises(SystemExit, match="exit code 3"):
        module("peer_environment").run([sys.executable, "-c", "raise SystemExit(3)"])


def test_ratios_are_at_equal_precision_and_at_the_faster_one(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    times = {"ours_onnxruntime_fp32_s": 3.0, "ours_openvino_fp32_s": 2.0, "ours_openvino_bf16_s": 1.0}
    times |= {"diffusers_toggle_fp32_s": 4.0, "diffusers_toggle_bf16_s": 8.0, "onnxruntime_fp32_s": 2.5}
    found = module("peers").with_ratios(times)
    assert (found["ours_s"], found["diffusers_toggle_s"]) == (1, 4)
    assert found["vs_diffusers_toggle"] == 0.25
    assert (found["vs_diffusers_toggle_fp32"], found["vs_diffusers_toggle_bf16"]) == (0.5, 0.125)
    assert (found["vs_onnxruntime"], found["vs_onnxruntime_fp32"]) == (0.4, 0.8)
    assert "vs_onnxruntime_bf16" not in found and "vs_openvino_genai" not in found


@pytest.mark.slow
def test_the_bundle_computes_what_diffusers_and_peft_do(figures):
    assert figures("parity")["worst_rel"] < 1e-3


def test_the_weights_of_base_are_rounded_as_the_bundle_stores_them(monkeypatch, tmp_path):
    for package in NEEDS["parity"]:
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(BENCH)
    from hyperrt.training.model import base_model

    base = importlib.import_module("small_world").make(tmp_path, identities=8).base
    exact = base_model.load(base).unet.state_dict()
    unet, encode = importlib.import_module("parity").reference_of(None, base)
    for name, weight in unet.state_dict().items():
        assert weight.equal(exact[name].half().float()), name
    assert any(not weight.equal(exact[name]) for name, weight in unet.state_dict().items())
    assert encode(["a mug", ""]).shape[0] == 2


@pytest.mark.slow
def test_other_programs_load_all_of_a_subject_and_draw_the_same_picture(figures):
    found = figures("interop")
    assert found["missing"] == found["unexpected"] == 0
    assert found["picture_rel_diff"] < 1e-3


@pytest.mark.slow
def test_nothing_of_a_former_subject_remains(figures):
    found = figures("switch")
    assert found["aba_max_diff"] == found["a_base_max_diff"] == 0
    assert found["row_alone_max_rel"] < 1e-5


@pytest.mark.slow
def test_a_picture_loads_no_training_framework(figures):
    assert figures("coldstart")["forbidden_modules"] == 0


@pytest.mark.slow
def test_the_classifiers_recognise_real_pictures(figures):
    found = figures("fidelity")
    assert min(found["identity_hist_real"], found["background_real"]) > 0.9


def test_a_slow_call_is_timed_once_and_a_quick_one_in_every_round():
    timing = module("peer_timing")
    calls = []

    def rounds_within(limit: float) -> int:
        args = timing.options("").parse_args(["step", ".", "--limit", str(limit), "--rounds", "3"])
        calls.clear()
        return timing.repeat(lambda: calls.append(0), args)["rounds"]

    assert rounds_within(1000) == 3
    assert len(calls) == 5  # two of them to warm up
    assert rounds_within(0) == 1
    assert len(calls) == 1


def test_the_switch_of_a_peer_is_in_milliseconds(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    switch = module("switch")
    times = {"median_s": 0.25, "least_s": 0.2, "rounds": 5}
    monkeypatch.setattr(switch.peer_environment, "model", lambda *_: Path("model"))
    monkeypatch.setattr(
        switch.peer_environment, "call", lambda name, *_: {f"{name}_ms": times, "versions": {name: "1"}}
    )
    assert switch.peers("sd15") == {f"{name}_ms": 250 for name in switch.peer_environment.PEERS}


def test_int8_weights_keep_the_effect_of_a_lora_beside_them_but_not_of_a_merged_one(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    found = module("delta_retention").projections(delta=0.003, quick=True)
    assert found["beside"].share > 0.9999
    assert found["merged"].share < 0.3
    assert found["merged"].projection == pytest.approx(1, abs=0.1)


def test_the_share_projection_and_error_of_an_effect(monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    compare = module("delta_retention").compare
    effect = np.array([3.0, 4.0])
    assert compare(effect, effect) == (1, 1, 0)
    assert compare(effect, 0 * effect) == (0, 0, 1)
    assert compare(effect, effect / 2) == pytest.approx((1, 0.5, 0.5))
    assert compare(effect, np.array([7.0, 1.0])) == pytest.approx((0.5, 1, 1))


def coloured(*colours: tuple[int, int, int]) -> np.ndarray:
    """A picture with one row of each colour, and as much white."""
    rows = [*colours, *[(255, 255, 255)] * len(colours)]
    return np.repeat(np.array(rows, np.uint8)[:, None], 4, axis=1)


def test_the_histogram_depends_on_colours_and_not_on_white_or_position():
    from hyperrt.training.evaluation.classifiers import histogram

    mine = histogram(coloured((200, 30, 40), (20, 90, 200)))
    assert np.linalg.norm(mine) == pytest.approx(1)
    assert mine @ histogram(coloured((20, 90, 200), (200, 30, 40))) == pytest.approx(1)
    similar = mine @ histogram(coloured((210, 35, 50), (30, 80, 190)))
    another = mine @ histogram(coloured((30, 200, 40), (20, 90, 200)))
    assert another < similar < 1
    assert not histogram(coloured((255, 255, 255))).any()
