"""Memory is estimated from the manifest and compared with what there is, before anything is loaded."""

from __future__ import annotations

import json

import pytest

from hyperrt.bundle import memory
from hyperrt.bundle.bundle import Bundle
from hyperrt.cli import main
from hyperrt.errors import ResourceError
from hyperrt.runtime import Runtime
from tests.hyperrt import fake_bundle
from tests.hyperrt.command_line import events, is_three_lines

GB = 10**9
SIZES = {  # GB of weights, of a row
    "image_encoder": (2, 0.5),
    "weight_decoder": (3, 0.25),
    "text_encoder": (1, 0.125),
    "context": (0.5, 0.125),
    "denoiser": (5, 1),
    "vae_decoder": (0.25, 4),
}


@pytest.fixture
def folder(tmp_path):
    """A bundle that says what its graphs need."""
    fake_bundle.register()
    path = fake_bundle.write(tmp_path / "sized")
    manifest = json.loads((path / "bundle.json").read_text())
    for name, (weights, row) in SIZES.items():
        manifest["graphs"][name].update(weight_bytes=int(weights * GB), row_bytes=int(row * GB))
    (path / "bundle.json").write_text(json.dumps(manifest))
    return path


def there_is(monkeypatch, gigabytes):
    monkeypatch.setattr(memory, "available", lambda: None if gigabytes is None else int(gigabytes * GB))


def test_the_peak_is_the_weights_that_are_open_and_the_rows_of_the_largest_graph(folder):
    bundle = Bundle.open(folder)
    assert memory.to_draw(bundle, 3) == 10.75 * GB  # all weights, and one picture decoded
    assert memory.to_draw(bundle, 6) == 12.75 * GB  # all weights, and six rows
    assert memory.to_draw(bundle, 3, low_memory=True) == 8 * GB  # the denoiser alone
    assert memory.to_personalize(bundle) == 3.25 * GB
    weights = sum(bundle.graphs[name].weight_bytes for name in ("image_encoder", "weight_decoder"))
    assert weights < memory.to_personalize(bundle, stay_open=True) <= 3.25 * GB + weights


def test_what_is_loaded_already_is_not_counted_again(folder):
    bundle = Bundle.open(folder)
    assert memory.to_draw(bundle, 3, is_open={"denoiser"}) == 5.75 * GB
    assert memory.to_draw(bundle, 3, is_open=memory.DRAWING) == 4 * GB
    assert memory.to_draw(bundle, 3, low_memory=True, is_open={"denoiser"}) == 3 * GB


def test_a_backend_that_loads_in_fp32_needs_the_weights_twice_then(folder):
    bundle = Bundle.open(folder)
    assert memory.to_draw(bundle, 3, loads_fp32=True) == 11.5 * GB  # the first three graphs, the third twice
    assert memory.to_draw(bundle, 3, is_open=memory.DRAWING, loads_fp32=True) == 4 * GB  # nothing to load
    assert memory.to_draw(bundle, 3, low_memory=True, loads_fp32=True) == 10 * GB
    assert memory.to_personalize(bundle, loads_fp32=True) == 6 * GB


def test_weights_of_two_bytes_are_twice_as_large_in_fp32(folder):
    path = folder / "bundle.json"
    path.write_text(path.read_text().replace('"precision": "fp32"', '"precision": "bf16"'))
    assert memory.to_draw(Bundle.open(folder), 3, low_memory=True, loads_fp32=True) == 15 * GB


def test_a_bundle_that_does_not_say_is_not_refused(pretend, monkeypatch):
    there_is(monkeypatch, 0)
    bundle = Bundle.open(pretend)
    assert memory.to_draw(bundle, 3) is memory.to_personalize(bundle) is None
    with Runtime.open(pretend, "fake") as runtime:
        runtime.generate("a robot")


@pytest.mark.parametrize(("gigabytes", "low_memory"), [(11, False), (7.5, True), (None, False)])
def test_what_fits_is_drawn(folder, monkeypatch, gigabytes, low_memory):
    there_is(monkeypatch, gigabytes)
    with Runtime.open(folder, "fake", low_memory=low_memory) as runtime:
        runtime.generate("a robot")


def test_what_does_not_fit_is_refused_before_a_graph_is_opened(folder, monkeypatch, photos):
    there_is(monkeypatch, 3)
    with Runtime.open(folder, "fake") as runtime:
        with pytest.raises(ResourceError) as caught:
            runtime.generate("a robot")
        assert "about 10.8 GB of memory, and 3.0 GB are available" in caught.value.what
        assert "--low-memory" in caught.value.do and "7.0 GB" in caught.value.do
        with pytest.raises(ResourceError, match=r"making a subject needs about 3\.2 GB"):
            runtime.personalize(photos)
        assert not runtime.open_graphs and fake_bundle.calls == []


def test_with_low_memory_the_advice_is_a_smaller_batch(folder, monkeypatch):
    there_is(monkeypatch, 7)
    with (
        Runtime.open(folder, "fake", low_memory=True) as runtime,
        pytest.raises(ResourceError, match=r"9\.0 GB") as caught,
    ):
        runtime.generate("a robot", n=2, batch_size=2)
    assert "--low-memory" not in caught.value.do and "--batch-size" in caught.value.do


@pytest.mark.usefixtures("alone")
def test_the_command_ends_with_the_code_of_resources_and_info_says_the_numbers(folder, monkeypatch, capsys):
    there_is(monkeypatch, 8)
    command = ["generate", "-p", "a robot", "--bundle", str(folder), "--backend", "fake", "-o", "a.png"]
    assert main.run(command) == 6
    assert is_three_lines(capsys.readouterr().err)
    assert main.run([*command, "--low-memory", "-n", "2"]) == 0
    assert capsys.readouterr().out == "a-0.png\na-1.png\n"
    main.run(["info", str(folder), "--json"])
    told = events(capsys.readouterr().out)[-1]["memory_gb"]
    assert told == {"drawing": 10.75, "with --low-memory": 8.0}


# available


def limits(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    return tmp_path


def test_what_the_machine_has_is_available(machine):
    assert memory.available() == 5000 * 1024


def test_a_container_s_limit_counts_and_what_it_only_caches_does_not(machine):
    stat = "anon 100\ninactive_file 1000"
    limits(machine / "cgroup", memory__max=4000, memory__current=3000, memory__stat=stat)
    assert memory.available() == 2000
    limits(machine / "cgroup", memory__max="max")
    assert memory.available() == 5000 * 1024


def test_the_first_version_of_cgroups_counts_too(machine):
    stat = "total_inactive_file 500"
    files = {"memory__limit_in_bytes": 4000, "memory__usage_in_bytes": 3000, "memory__stat": stat}
    limits(machine / "cgroup" / "memory", **files)
    assert memory.available() == 1500


def test_a_machine_that_does_not_say_has_an_unknown_amount(machine):
    (machine / "meminfo").unlink()
    assert memory.available() is None
