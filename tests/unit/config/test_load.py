"""Settings: who wins, what is refused, and how it is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from serverlessllm.config import schema
from serverlessllm.config.load import COMMAND_LINE, DEFAULT, ConfigError, effective, load
from serverlessllm.config.settings import Settings
from serverlessllm.core.units import GIB, MIB

HOME = {"HOME": "/home/somebody"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "serverlessllm.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_nothing_given_means_defaults(tmp_path):
    loaded = load(environ=HOME, cwd=tmp_path)
    assert loaded.settings == Settings()
    assert loaded.path is None
    assert loaded.paths.data_dir == Path("/home/somebody/.local/share/serverlessllm")
    assert {row.origin for row in effective(loaded)} == {DEFAULT}


def test_flags_win_over_environment_over_file(tmp_path):
    write(tmp_path, '[loader]\ndram_budget_bytes = "1GiB"\nnvme_budget_bytes = "2GiB"\n')
    environ = HOME | {
        "SLLM_LOADER__DRAM_BUDGET_BYTES": "3GiB",
        "SLLM_LOADER__RANGE_BYTES": "4MiB",
    }
    loaded = load(
        environ=environ, cwd=tmp_path, overrides={"loader.range_bytes": "2MiB", "data_dir": None}
    )
    loader = loaded.settings.loader
    assert (loader.nvme_budget_bytes, loader.dram_budget_bytes) == (2 * GIB, 3 * GIB)
    assert loader.range_bytes == 2 * MIB
    origins = {row.key: row.origin for row in effective(loaded)}
    assert origins["loader.nvme_budget_bytes"] == str(tmp_path / "serverlessllm.toml")
    assert origins["loader.dram_budget_bytes"] == "SLLM_LOADER__DRAM_BUDGET_BYTES"
    assert origins["loader.range_bytes"] == COMMAND_LINE
    assert origins["data_dir"] == DEFAULT


def test_the_file_is_looked_for_in_order(tmp_path):
    home, cwd = tmp_path / "config" / "serverlessllm", tmp_path / "cwd"
    home.mkdir(parents=True)
    cwd.mkdir()
    write(home, 'data_dir = "/in/home"')
    environ = HOME | {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    assert load(environ=environ, cwd=cwd).settings.data_dir == "/in/home"
    write(cwd, 'data_dir = "/in/cwd"')
    assert load(environ=environ, cwd=cwd).settings.data_dir == "/in/cwd"
    named = tmp_path / "named.toml"
    named.write_text('data_dir = "/in/named"')
    environ |= {"SLLM_CONFIG": str(named)}
    assert load(environ=environ, cwd=cwd).settings.data_dir == "/in/named"
    assert load(path=cwd / "serverlessllm.toml", environ=environ).settings.data_dir == "/in/cwd"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("loader.dram_budget_bytes", "8GiB", 8 * GIB),
        ("loader.dram_budget_bytes", "auto", None),
        ("loader.dram_budget_bytes", 4096, 4096),
        ("store.slow_bytes_s", "2MiB", 2.0 * MIB),
        ("orchestrator.wait_budget_s", "1m30s", 90.0),
        ("orchestrator.wait_budget_s", 5, 5.0),
        ("orchestrator.wait_budget_s_max", "1h", 3600.0),
        ("agent.keep_alive_s", "-1", -1.0),
        ("agent.keep_alive_s", "forever", -1.0),
        ("orchestrator.retries_max", "7", 7),
        ("store.allow_http", "true", True),
        ("orchestrator.on_demand_sources", "hf, s3", ("hf", "s3")),
        ("orchestrator.on_demand_sources", '["hf"]', ("hf",)),
        ("orchestrator.on_demand_sources", "", ()),
        ("store.options", {"region": "x"}, {"region": "x"}),
        ("ingest.sources.tries", "3", 3),
        ("telemetry.log_format", "auto", "auto"),
        ("agent.id", "007", "007"),
    ],
)
def test_values_as_people_write_them(key, text, value):
    loaded = load(environ=HOME, overrides={key: text})
    found: object = loaded.settings
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value) or isinstance(found, str)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("loader.dram_budget_bytes", "lots", "a size such as 512MiB or 8GiB"),
        ("loader.dram_budget_bytes", -1, "a size such as"),
        ("loader.dram_budget_bytes", True, "a size such as"),
        ("orchestrator.wait_budget_s", "soon", "a duration such as 30s"),
        ("orchestrator.retries_max", "many", "a whole number"),
        ("orchestrator.retries_max", 1.5, "a whole number"),
        ("orchestrator.retry_share", "half", "a number"),
        ("store.allow_http", "maybe", "true or false"),
        ("orchestrator.on_demand_sources", 5, "a list"),
        ("telemetry.log_level", "loud", "one of debug, info, warning, error"),
        ("data_dir", 5, "text"),
    ],
)
def test_a_wrong_value_names_place_key_and_what_was_expected(key, text, expected):
    with pytest.raises(ConfigError) as caught:
        load(environ=HOME, overrides={key: text})
    message = str(caught.value)
    assert message.startswith(f"{COMMAND_LINE}: {key}: expected ")
    assert expected in message


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("[loader]\ndram_budgt_bytes = 1", "loader.dram_budget_bytes"),
        ("[loder]\ndram_budget_bytes = 1", "loader.dram_budget_bytes"),
        ("dram_budget_bytes = 1", "loader.dram_budget_bytes"),
        ("data_dri = 'x'", "data_dir"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, text, near):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match="is not a setting") as caught:
        load(path=path, environ=HOME)
    assert str(path) in str(caught.value)
    assert f"did you mean '{near}'?" in str(caught.value)


def test_an_unknown_section_is_refused_whole(tmp_path):
    with pytest.raises(ConfigError, match="is not a setting"):
        load(path=write(tmp_path, "[qqq]\nzzz = 1"), environ=HOME)
    with pytest.raises(ConfigError, match="is not a setting"):
        load(path=write(tmp_path, "[qqq]"), environ=HOME)
    assert load(path=write(tmp_path, "[loader]"), environ=HOME).settings == Settings()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("SLLM_LOADER__DRAM_BUGDET_BYTES", "did you mean SLLM_LOADER__DRAM_BUDGET_BYTES"),
        ("SLLM_DATADIR", "did you mean SLLM_DATA_DIR"),
        ("SLLM_QQQ__ZZZ", "is not a setting"),
    ],
)
def test_a_misspelt_variable_is_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        load(environ=HOME | {name: "1"})


def test_variables_that_a_platform_sets_are_left_alone():
    environ = HOME | {
        "SLLM_SERVICE_HOST": "10.0.0.1",
        "SLLM_PORT_8000_TCP_ADDR": "10.0.0.1",
        "SLLM_URL": "http://127.0.0.1:1",
        "SLLM_API_KEY": "k",
        "OTHER": "x",
    }
    assert load(environ=environ).settings == Settings()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"x = ", "not valid TOML"),
        (b"x = 1\nx = 2", "not valid TOML"),
        (b"x = '\xff'", "not UTF-8"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, data, said):
    path = tmp_path / "broken.toml"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=said) as caught:
        load(path=path, environ=HOME)
    assert str(path) in str(caught.value)


def test_a_file_that_was_named_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(path=tmp_path / "none.toml", environ=HOME)
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(environ=HOME | {"SLLM_CONFIG": str(tmp_path)})


def test_secrets_are_never_shown():
    environ = HOME | {
        "SLLM_ORCHESTRATOR__API_KEY_SHA256": "c0ffee00" * 8,
        "SLLM_STORE__OPTIONS": '{"secret_access_key": "hunter2", "region": "eu"}',
        "SLLM_STORE__ENDPOINT": "http://user:hunter2@store:9000/x@y",
    }
    shown = {row.key: row.value for row in effective(load(environ=environ))}
    assert "c0ffee" not in repr(shown)
    assert "hunter2" not in repr(shown)
    assert shown["store.endpoint"] == "http://store:9000/x@y"
    assert '"region":"eu"' in shown["store.options"]
    for keys in ('{"hunter2": 1}', "hunter2"):
        with pytest.raises(ConfigError) as caught:
            load(environ=HOME | {"SLLM_ORCHESTRATOR__API_KEY_SHA256": keys})
        assert "API_KEY_SHA256" in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_every_setting_can_be_set_by_its_own_variable():
    names = [field.environment for field in schema.fields(Settings).values()]
    assert len(names) == len(set(names))


def test_the_spelling_of_a_default_reads_back_as_the_default():
    for key, field in schema.fields(Settings).items():
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            text = schema.spell(field.name, field.default).strip('"')
            assert field.convert(text) == pytest.approx(field.default), key
