"""One parser for presets, the command line and Flower's run config."""

import tomllib
from pathlib import Path

import pytest

from fedlora import config as configuration
from fedlora.common.errors import ConfigError
from fedlora.config import Config, load, parse, parse_overrides

ROOT = Path(__file__).resolve().parent.parent


def test_flowers_table_equals_the_defaults():
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    assert configuration.flatten(table) == Config().to_flat()


PRESETS = sorted(path for path in (ROOT / "configs").glob("*.toml") if not path.stem.startswith("compare-"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
def test_every_preset_parses_and_shows_its_command(preset):
    assert load(preset)
    assert preset.read_text(encoding="utf-8").startswith(f"# fedlora run {preset.stem}\n")


def test_flat_keys_round_trip():
    config = parse({"lora.rank": 3, "train.lr": 1, "strategy.name": "fedavg"})
    assert config.train.lr == 1.0
    assert isinstance(config.train.lr, float)
    assert parse(config.to_flat()) == config


@pytest.mark.parametrize(
    ("flat", "says"),
    [
        ({"lora.rnak": 8}, r"unknown key 'lora.rnak'; did you mean 'lora.rank'"),
        ({"lora.rank": "eight"}, r"lora.rank = 'eight' is str, expected int"),
        ({"lora.rank": True}, r"lora.rank = True is bool, expected int"),
        ({"lora.rank": 0}, r"lora.rank = 0 is out of bounds, expected at least 1"),
        ({"lora.ranks": [16, 8]}, r"write lists as comma strings"),
        ({"lora.ranks": "16,x"}, r"lora.ranks: got '16,x', expected positive integers"),
        ({"lora.alpha": "2rr"}, r"lora.alpha: got '2rr'"),
        ({"lora.alpha": "-1"}, r"lora.alpha = '-1', expected a number above 0"),
        ({"lora.rank-pattern": "k_proj"}, r"lora.rank-pattern: got 'k_proj', expected module=rank"),
        ({"model.quantization": "nf5"}, r"model.quantization = 'nf5'; did you mean 'nf4'"),
        ({"train.lr": float("nan")}, r"train.lr = nan is out of bounds"),
        ({"federation.clients": 2, "federation.min-clients": 3}, r"min-clients = 3 exceeds federation.clients = 2"),
        ({"anchor.base-update": "merge"}, r"needs model.quantization = 'none'"),
        ({"data.partition": "sizes", "data.sizes": "5,5"}, r"must name one size for each of the 4 clients"),
        ({"privacy.level": "rows"}, r"privacy.level = 'rows'; known are client, example, none"),
        (
            {"privacy.level": "client"},
            r"privacy.level = 'client' needs privacy.epsilon, .* or privacy.noise-multiplier",
        ),
        (
            {"privacy.level": "client", "privacy.epsilon": 8, "privacy.noise-multiplier": 1},
            r"privacy.epsilon = 8 and privacy.noise-multiplier = 1 both say how much noise",
        ),
        (
            {"privacy.level": "example", "privacy.epsilon": 8, "privacy.clip-quantile": 0.5},
            r"privacy.clip-quantile = 0.5 moves the norm .* set privacy.clip-quantile = 0, or privacy.level = 'client'",
        ),
        (
            {"privacy.level": "example", "privacy.epsilon": 8, "model.quantization": "int8"},
            r"model.quantization = 'int8' treats columns by the largest .* set model.quantization = 'nf4' or 'none'",
        ),
    ],
)
def test_a_bad_value_is_named(flat, says):
    with pytest.raises(ConfigError, match=says):
        parse(flat)


def test_overrides_are_read_as_toml_or_text():
    got = parse_overrides(
        ["lora.rank=16", "train.lr = 1e-4", "strategy.name=flora", "lora.ranks=8,4", "evaluate.server=false"]
    )
    assert got == {
        "lora.rank": 16,
        "train.lr": 1e-4,
        "strategy.name": "flora",
        "lora.ranks": "8,4",
        "evaluate.server": False,
    }
    with pytest.raises(ConfigError, match="expected key=value"):
        parse_overrides(["lora.rank"])


def test_files_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        load(bad)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_ranks_are_cyclic_and_alpha_follows():
    lora = parse({"lora.ranks": "16,8,4"}).lora
    assert [configuration.client_rank(lora, i) for i in range(5)] == [16, 8, 4, 16, 8]
    assert configuration.alpha_of("2r", 8) == 16
    assert configuration.alpha_of("r", 8) == 8
    assert configuration.alpha_of("16", 8) == configuration.alpha_of(16.0, 8) == 16


def test_every_key_is_described():
    rows = configuration.describe()
    assert [key for key, _, _ in rows] == list(Config().to_flat())
    assert all(text for _, _, text in rows)


@pytest.mark.parametrize(
    ("parts", "clients", "groups"),
    [
        ("", 3, ((0,), (1,), (2,))),
        ("0+1+2+3 of 4", 1, ((0, 1, 2, 3),)),
        ("2 of 4", 1, ((2,),)),
        (" 3 + 0 , 1 of 5 ", 2, ((3, 0), (1,))),
    ],
)
def test_parts_say_which_rows_each_client_has(parts, clients, groups):
    config = parse({"data.parts": parts, "federation.clients": clients})
    assert configuration.client_parts(config.data, clients)[0] == groups


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ("0+1", r"data.parts: got '0\+1', expected different parts joined by \+"),
        ("0+1 of", r"expected different parts"),
        ("0+4 of 4", r"expected different parts"),
        ("-1 of 4", r"expected different parts"),
        ("0+0 of 4", r"expected different parts"),
        ("a of 4", r"expected different parts"),
        ("0++1 of 4", r"expected different parts"),
        ("all", r"expected different parts"),
        ("0,1 of 4", r"data.parts = '0,1 of 4' is for 2 clients, but federation.clients is 1; make them agree"),
    ],
)
def test_parts_that_cannot_be_are_named(parts, says):
    with pytest.raises(ConfigError, match=says):
        parse({"data.parts": parts, "federation.clients": 1})


def test_sizes_are_for_the_parts_that_are_dealt():
    sized = {"data.partition": "sizes", "data.parts": "1 of 4", "federation.clients": 1}
    assert parse({**sized, "data.sizes": "5,4,3,2"}).data.sizes == "5,4,3,2"
    with pytest.raises(ConfigError, match="must name one size for each of the 4 clients"):
        parse({**sized, "data.sizes": "5"})
