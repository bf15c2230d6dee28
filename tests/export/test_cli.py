import json

import pytest

from export import assemble, cli
from hyperrt.cli_output import Output
from hyperrt.config import ExportConfig
from hyperrt.errors import UsageError


@pytest.fixture
def output():
    return Output(json=True, interrupted=lambda: False)


def test_a_dry_run_says_how_large_each_graph_will_be_and_writes_nothing(output, trained, tmp_path, capsys):
    config = ExportConfig(
        model=str(trained.base), hypernet=str(trained.hypernet), output=str(tmp_path / "new"), dry_run=True
    )
    cli.run(config, output)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["graphs"]["denoiser"] > result["graphs"]["context"] > 0
    assert not list(tmp_path.iterdir())


def test_the_result_is_the_bundles_folder(output, trained, tmp_path, capsys, monkeypatch):
    seen = {}

    def fake(model, base, hypernet, output, **options):
        seen.update(model=model, base=base, **options)
        return output

    monkeypatch.setattr(assemble, "export_bundle", fake)
    config = ExportConfig(
        model=str(trained.base), hypernet=str(trained.hypernet), output=str(tmp_path / "new"), force=True
    )
    cli.run(config, output)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["path"] == str(tmp_path / "new")
    assert (seen["model"], seen["base"], seen["force"]) == ("tiny", trained.base, True)


@pytest.mark.parametrize(
    "option", [{"precision": "fp16"}, {"adapt": "refit"}], ids=lambda option: next(iter(option))
)
def test_what_is_not_there_yet_is_refused(output, option):
    with pytest.raises(UsageError, match="not there yet"):
        cli.run(ExportConfig(model="tiny", output="new", **option), output)
