"""A comparison's file: the cells that it stands for, and one sentence for what is wrong in it."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from fedlora.common.errors import ConfigError, FedLoraError, StrategyError
from fedlora.config import client_rank, find_preset
from fedlora.simulations.comparison.grid import BASELINES, Grid, load

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = """
[settings]
lora.ranks = "4,2,2,1"
data.heldout-fraction = 0.2
data.test-fraction = 0.5
federation.rounds = 3
train.steps = 5
"""
HEAD = """
config = "quickstart"
metric = "loss"
strategies = ["flora", "fedsa"]
learning-rates = [2e-3, 1e-3]
seeds = [0, 7]
baselines = []
"""
REST = """
[variants.rolora-slow]
strategy.name = "rolora"
train.steps = 2

[scenarios.full]

[scenarios.half]
federation.fraction = 0.5
"""
WHOLE = HEAD + SETTINGS + REST


def grid_of(folder: Path, text: str, *overrides: str) -> Grid:
    path = folder / "compare-mine.toml"
    path.write_text(text, encoding="utf-8")
    return load(path, find_preset, overrides)


def test_cells_are_the_product_of_what_the_file_names(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, WHOLE.replace("baselines = []", f"baselines = {[*BASELINES]}"))
    assert grid.name == "mine"
    labels, rates, seeds, scenarios = ("flora", "fedsa", "rolora-slow"), (1e-3, 2e-3), (0, 7), ("full", "half")
    trained = [*labels, "local", "centralised"]
    expected = {*product(scenarios, trained, rates, seeds), *product(scenarios, ["base"], [None], seeds)}
    assert {(cell.scenario, cell.label, cell.lr, cell.seed) for cell in grid.cells} == expected
    assert len(grid.cells) == len(expected) == len({cell.path for cell in grid.cells})
    assert grid.facts()["cells"] == len(expected)
    for cell in grid.cells:
        for config in cell.configs:
            assert config.run.seed == cell.seed
            assert cell.lr in (config.train.lr, None)
    by_path = {cell.path: cell.configs for cell in grid.cells}
    assert by_path["full/flora/lr0.001-seed0"][0].federation.fraction == 1.0
    assert by_path["half/flora/lr0.001-seed0"][0].federation.fraction == 0.5
    own = by_path["half/rolora-slow/lr0.002-seed7"][0]
    assert (own.strategy.name, own.train.steps, own.lora.ranks) == ("rolora", 2, "4,2,2,1")
    assert by_path["full/flora/lr0.002-seed7"][0].train.steps == 5
    assert len(by_path["full/base/seed0"]) == 1


def test_cells_of_one_seed_differ_by_strategy_and_rate_alone(tmp_path: Path) -> None:
    cells = [cell for cell in grid_of(tmp_path, HEAD + SETTINGS).cells if cell.seed == 0]
    flats = [cell.configs[0].to_flat() for cell in cells]
    differing = {key for flat in flats for key in flat if flat[key] != flats[0][key]}
    assert differing == {"strategy.name", "train.lr", "evaluate.server"}  # fedsa has no model of the server's


def test_every_strategy_trains_on_the_same_rows_where_clients_keep_some_back(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, WHOLE.replace("[settings]", "[settings]\nevaluate.clients = true"))
    assert {cell.configs[0].evaluate.clients for cell in grid.cells} == {True}


def test_local_is_each_client_alone_at_its_own_rank(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, WHOLE.replace("baselines = []", "baselines = ['local']"))
    cell = next(cell for cell in grid.cells if cell.path == "half/local/lr0.002-seed7")
    assert [client_rank(config.lora, 0) for config in cell.configs] == [4, 2, 2, 1]
    assert [config.data.parts for config in cell.configs] == [f"{client} of 4" for client in range(4)]
    for config in cell.configs:
        assert (config.federation.clients, config.federation.fraction, config.train.steps) == (1, 1.0, 5)
        assert config.federation.rounds == 3


@pytest.mark.parametrize(("scenario", "steps", "epochs"), [("full", 20, 2.0), ("half", 10, 1.0)])
def test_centralised_has_all_rows_the_largest_rank_and_a_rounds_steps(tmp_path, scenario, steps, epochs) -> None:
    text = WHOLE.replace("baselines = []", "baselines = ['centralised']").replace(
        "train.steps = 5", "train.steps = 5\ntrain.epochs = 2.0"
    )
    grid = grid_of(tmp_path, text)
    (config,) = next(cell for cell in grid.cells if cell.path == f"{scenario}/centralised/lr0.002-seed7").configs
    assert config.data.parts == "0+1+2+3 of 4"
    assert (client_rank(config.lora, 0), config.train.steps, config.train.epochs) == (4, steps, epochs)
    assert config.federation.clients == 1


def test_baselines_are_plain_training(tmp_path: Path) -> None:
    extra = """
    strategy.restart-every = 1
    strategy.robust = "norm-bound"
    train.prox-mu = 0.1
    wire.upload-dtype = "int8"
    federation.min-clients = 2
    """
    grid = grid_of(
        tmp_path,
        HEAD.replace("baselines = []", "baselines = ['local', 'centralised']").replace(', "fedsa"', "")
        + SETTINGS
        + extra,
    )
    for cell in grid.cells:
        for config in cell.configs if cell.role == "baseline" else ():
            assert (config.strategy.name, config.strategy.restart_every, config.strategy.robust) == (
                "fedavg",
                0,
                "none",
            )
            assert (config.train.prox_mu, config.wire.upload_dtype, config.federation.min_clients) == (0.0, "fp32", 1)


def test_close_rates_have_paths_of_their_own(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, (HEAD + SETTINGS).replace("[2e-3, 1e-3]", "[0.00123456789, 0.00123456788, 1, 1e-5]"))
    assert len({cell.path for cell in grid.cells}) == len(grid.cells) == 16
    rates = {float(cell.path.rpartition("/lr")[2].rpartition("-seed")[0]) for cell in grid.cells}
    assert rates == {0.00123456789, 0.00123456788, 1.0, 1e-5}


def test_what_is_named_twice_is_there_once(tmp_path: Path) -> None:
    text = (HEAD + SETTINGS).replace("[0, 7]", "[0, 7, 0]").replace("[2e-3, 1e-3]", "[1, 1.0]")
    grid = grid_of(tmp_path, text)
    assert len(grid.cells) == 4
    assert {cell.path for cell in grid.cells} >= {"default/flora/lr1-seed0"}


def test_a_mean_or_a_worst_value_is_a_metric_where_a_column_is_named(tmp_path: Path) -> None:
    text = WHOLE.replace("[settings]", "[settings]\nevaluate.by = 'sender'")
    for metric in ("accuracy-mean-by", "loss-worst-by"):
        assert grid_of(tmp_path, text.replace('"loss"', f'"{metric}"')).metric == metric


def test_all_baselines_are_run_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, (HEAD + SETTINGS).replace("baselines = []", ""))
    assert grid.baselines == BASELINES


def test_overrides_and_a_config_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[lora]\nranks = ""\nrank = 3\n[train]\nbatch-size = 9\n')
    text = HEAD.replace('"quickstart"', '"base.toml"') + "[settings]\ndata.test-fraction = 0.5\n"
    grid = grid_of(tmp_path, text, "federation.rounds=9")
    config = grid.cells[0].configs[0]
    assert (config.lora.rank, config.train.batch_size, config.federation.rounds) == (3, 9, 9)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("compare-*.toml")), ids=lambda path: path.stem)
def test_every_packaged_comparison_loads_and_shows_its_command(path: Path) -> None:
    grid = load(path, find_preset)
    assert len({cell.path for cell in grid.cells}) == len(grid.cells) > 0
    assert path.read_text(encoding="utf-8").startswith(f"# fedlora compare {path.stem}")


WRONG = {
    "unknown-key": (("seeds", "sedes"), "unknown key 'sedes' in a comparison; did you mean 'seeds'"),
    "unknown-strategy": (('"fedsa"', '"fedsaa"'), "strategies: 'fedsaa' .*; did you mean 'fedsa'"),
    "own-class": (('"fedsa"', '"mine:Own"'), r"strategies: 'mine:Own' names a folder; .*name it under \[variants\]"),
    "setting": (
        ("train.steps = 5", "train.step = 5"),
        "settings: unknown key 'train.step'; did you mean 'train.steps'",
    ),
    "scenario": (
        ("federation.fraction", "federation.fracton"),
        "scenarios.half: unknown key 'federation.fracton'; did you mean 'federation.fraction'",
    ),
    "scenario-value": (("fraction = 0.5\n", "fraction = 2.0\n"), "fraction = 2.0 is out of bounds"),
    "variant": (
        ("train.steps = 2", "train.stpes = 2"),
        "variants.rolora-slow: unknown key 'train.stpes'; did you mean 'train.steps'",
    ),
    "variant-strategy": (('"rolora"', '"roolra"'), "variants.rolora-slow: .*; did you mean 'rolora'"),
    "no-strategies": (('["flora", "fedsa"]', "[]"), "strategies is empty, so that there is nothing to compare"),
    "no-rates": (("[2e-3, 1e-3]", "[]"), "learning-rates is empty, so that there is nothing to compare"),
    "no-seeds": (("[0, 7]", "[]"), "seeds is empty, so that there is nothing to compare"),
    "missing-rates": (("learning-rates = [2e-3, 1e-3]", ""), "learning-rates: got nothing, expected a list of highest"),
    "rates-of-text": (("[2e-3, 1e-3]", '["2e-3"]'), r"learning-rates: got \['2e-3'\], expected a list of highest"),
    "one-rate": (("[2e-3, 1e-3]", "2e-3"), "learning-rates: got 0.002, expected a list of highest"),
    "zero-rate": (("[2e-3, 1e-3]", "[0.0]"), r"learning-rates = \[0.0\], expected numbers above 0"),
    "endless-rate": (("[2e-3, 1e-3]", "[inf]"), r"learning-rates = \[inf\], expected numbers above 0"),
    "no-rate": (("[2e-3, 1e-3]", "[nan]"), r"learning-rates = \[nan\], expected numbers above 0"),
    "seed-below-0": (("[0, 7]", "[-1]"), r"seeds = \[-1\], expected numbers from 0"),
    "seeds-of-bools": (("[0, 7]", "[true]"), r"seeds: got \[True\], expected a list of seeds"),
    "reference": (("seeds", 'reference = "fedsb"\nseeds'), "reference = 'fedsb' is none of the strategies"),
    "own-seed": (("train.steps = 5", "run.seed = 5"), "settings sets run.seed, .*; use 'seeds'"),
    "own-rate": (("train.steps = 5", "train.lr = 5"), "settings sets train.lr, .*; use 'learning-rates'"),
    "own-rate-of-variant": (("train.steps = 2", "train.lr = 2"), "variants.rolora-slow sets train.lr"),
    "metric": (('"loss"', '"acuracy"'), "'acuracy' is not known for model.task = 'causal-lm'; did you mean 'accuracy'"),
    "metric-of-classes": (('"loss"', '"macro-f1"'), "metric = 'macro-f1' is not known for model.task = 'causal-lm'"),
    "metric-of-text": (
        ('"quickstart"\nmetric = "loss"', '"sentiment"\nmetric = "perplexity"'),
        "metric = 'perplexity' is not known for model.task = 'classification'",
    ),
    "metric-by": (
        ('"loss"', '"accuracy-worst-by"'),
        "metric = 'accuracy-worst-by' is over the values of a column, and evaluate.by names none; set it under",
    ),
    "metric-by-of-nothing": (('"loss"', '"acuracy-mean-by"'), "'acuracy-mean-by' is not known for model.task"),
    "no-test": (("test-fraction = 0.5", "test-fraction = 0"), "data.test-fraction 0.0, so that no rows are left"),
    "no-heldout": (
        ("heldout-fraction = 0.2", "heldout-fraction = 0"),
        "data.heldout-fraction is 0.0.* no rows are left",
    ),
    "no-test-in-a-scenario": (("federation.fraction = 0.5", "data.test-fraction = 0"), "no rows are left"),
    "unequal-ranks": (
        ('["flora", "fedsa"]', '["flora", "fedavg"]'),
        "strategies: 'fedavg' in scenario 'full': .*needs one rank, got ranks 4, 2, 2, 1",
    ),
    "folder": (("[scenarios.half]", '[scenarios."a/b"]'), "scenarios: 'a/b' names a folder; use letters"),
    "parent-folder": (("[scenarios.half]", '[scenarios.".."]'), r"scenarios: '\.\.' names a folder; use letters"),
    "name": (("seeds", 'name = "../mine"\nseeds'), "name: '../mine' names a folder; use letters"),
    "number-for-name": (("seeds", "name = 3\nseeds"), "name = 3, expected a name for"),
    "baseline": (
        ("baselines = []", "baselines = ['centralized']"),
        "baselines: 'centralized'; did you mean 'centralised'",
    ),
    "baseline-variant": (("[variants.rolora-slow]", "[variants.local]"), "'local' is a baseline's name"),
    "no-config": (('config = "quickstart"', ""), "config is missing, expected the preset or TOML file"),
    "unknown-config": (('"quickstart"', '"quikstart"'), "config: quikstart: neither a TOML file nor a preset; did you"),
    "settings": (("[settings]", "settings = 3\n[scenarios.more]"), "settings is int, expected a table"),
    "scenarios": (("[scenarios.full]", "[scenarios]\nfull = 1"), r"scenarios: expected a table with a table"),
    "damaged": (("seeds = ", "seeds = = "), "cannot be read as TOML: "),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence_with_the_file(tmp_path: Path, case: str) -> None:
    (old, new), says = WRONG[case]
    assert WHOLE.count(old) >= 1
    with pytest.raises(FedLoraError, match=says) as failure:
        grid_of(tmp_path, WHOLE.replace(old, new))
    assert isinstance(failure.value, ConfigError | StrategyError)
    assert str(failure.value).startswith(str(tmp_path / "compare-mine.toml"))
    assert "\n" not in str(failure.value).strip()


def test_overrides_cannot_set_what_the_comparison_sets(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compare-mine.toml: -c sets run.seed, .*use 'seeds'"):
        grid_of(tmp_path, WHOLE, "run.seed=3")
    with pytest.raises(ConfigError, match=r"-c: unknown key 'train.stpes'; did you mean 'train.steps'"):
        grid_of(tmp_path, WHOLE, "train.stpes=3")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such file"):
        load(tmp_path / "none.toml", find_preset)
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path, find_preset)
