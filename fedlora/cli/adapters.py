"""The commands on trained adapters: evaluate, export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from fedlora import config as configuration
from fedlora.common.errors import AdapterError, ConfigError
from fedlora.results.runs import adapter_folder

from .shared import Overrides, app, kept_by_clients, load, out, quiet

if TYPE_CHECKING:
    from fedlora.adapters import AdapterState
    from fedlora.exchange import ClientInfo
    from fedlora.trained.export import Exported, Source

# Metrics in the order in which they are shown.
_METRICS = ("loss", "perplexity", "accuracy", "macro-f1", "exact-match", "calibration-error")


class NoFactors(AdapterError):
    """A client has no personal factors on this machine."""


@app.command()
def evaluate(
    adapter: Annotated[
        list[Path],
        typer.Option(help="A run, by its name or folder, or the folder of a PEFT checkpoint; may be repeated."),
    ],
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="[CONFIG]", help="TOML file or preset with the model and the data; default: the first adapter's."
        ),
    ] = None,
    overrides: Overrides = None,
    *,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Use all rows of this data.source, which nobody trained on, instead of held-out rows.",
        ),
    ] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the scores to this file.")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(metavar="TASK,...", help="Use these tasks of lm-evaluation-harness instead of held-out rows."),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --lm-eval: folder with task files of your own.")
    ] = None,
    lm_eval_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --lm-eval: use only the first N rows of each task.")
    ] = None,
) -> None:
    """Evaluate adapters on held-out rows or other ones, and compare them with the base model without an adapter.

    All adapters are scored on the same rows and must belong to the same base model.

    Examples:

      fedlora evaluate --adapter quickstart

      fedlora evaluate --adapter a/adapter --adapter b/adapter --json scores.json

      fedlora evaluate --adapter sentiment -c evaluate.by=domain

      fedlora evaluate --adapter clothes --data fashion-mnist-test -c data.label-names="tee, trousers, …"
    """
    if lm_eval is not None and data is not None:
        raise ConfigError("evaluate: --data and --lm-eval both say what to score; give one of them")
    if lm_eval is None and (lm_eval_path or lm_eval_limit):
        raise ConfigError("evaluate: --lm-eval-path and --lm-eval-limit go with --lm-eval TASK; name a task")
    adapter = [adapter_folder(each) for each in adapter]
    settings = _settings(adapter, config, overrides)
    quiet()
    by_value: dict[str, Mapping[str, Any]] = {}
    if lm_eval is not None:
        from fedlora.trained import harness

        tasks = [task.strip() for task in lm_eval.split(",") if task.strip()]
        rows = harness.scores(adapter, settings, tasks, lm_eval_path, lm_eval_limit)
        title = f"{settings.model.name} on {lm_eval}"
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
    else:
        from fedlora.trained.evaluate import compare_with_base

        if data is not None:
            keys: dict[str, configuration.Scalar] = {"data.source": data}
            if "evaluate.by" not in configuration.parse_overrides(overrides or []):
                keys["evaluate.by"] = ""  # a column of the run's rows, which others need not have
            settings = configuration.parse(keys, settings, where="--data")
        found = compare_with_base(adapter, settings, whole=data is not None)
        rows = {label: each.metrics for label, each in found.items()}
        by_value = {label: each.by for label, each in found.items() if each.by}
        which = "held-out rows" if data is None else "all rows"
        title = f"{settings.model.name} on {settings.data.source}, {which}"
        measured = next(iter(rows.values()))
        names = sorted(
            measured, key=lambda name: (*_METRICS, name).index(name)
        )  # metrics that only this task has: last
    out.print(_table(title, rows, names))
    for label, by in by_value.items():
        from fedlora.results.display import values_table

        out.print(values_table(f"{label}, by {by['column']}", by))
    if as_json is not None:
        from fedlora.common.files import write_json

        about = {"config": settings.to_flat(), "adapters": [str(path) for path in adapter], "scores": rows}
        if by_value:
            about["by"] = by_value
        try:
            write_json(as_json, about)
        except OSError as error:
            raise ConfigError(f"--json {as_json}: cannot be written: {error}") from None


@app.command()
def export(
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="A run, by its name or folder, or an adapter's folder.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must be new or empty.")],
    *,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Reduce the adapter to at most this rank, with the smallest error.")
    ] = None,
    remove_intruders: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="LAMBDA",
            help="Scale intruder dimensions, which are strong directions that the base model does not have: 0 removes "
            "them, 1 changes nothing.",
        ),
    ] = None,
    client: Annotated[
        int | None,
        typer.Option(min=0, help="Write the adapter of this client: with its personal factors, or cut to its rank."),
    ] = None,
    all_clients: Annotated[
        bool, typer.Option("--all-clients", help="Write the adapters of all clients, to OUT/client-<number>/.")
    ] = False,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Write a whole model: the full-precision base with the adapter added to it."),
    ] = False,
) -> None:
    """Write an adapter for use elsewhere: a PEFT checkpoint, or a merged model, with a model card.

    Examples:

      fedlora export quickstart my-adapter

      fedlora export runs/quickstart/20260101-120000 small --rank 4

      fedlora export runs/quickstart/20260101-120000 fewer --remove-intruders 0

      fedlora export runs/quickstart/20260101-120000 merged --merge

      fedlora export runs/personal/20260101-120000 clients --all-clients
    """
    if all_clients and client is not None:
        raise ConfigError("export: --client names one client, but --all-clients takes all; leave out one of the two")
    quiet()
    from fedlora.trained import export as exporting

    source = exporting.find(adapter)
    if all_clients:
        exporting.check_free(folder)
        for each in _clients(source):
            try:
                one = folder / f"client-{each.client_id}"
                _say(_one(source, one, rank, each, intruders=remove_intruders, merge=merge))
            except NoFactors as error:
                out.print(f"left out: {error}", soft_wrap=True, markup=False)
        return
    chosen = None if client is None else _client(source, client)
    _say(_one(source, folder, rank, chosen, intruders=remove_intruders, merge=merge))


def _one(
    source: Source,
    folder: Path,
    rank: int | None,
    client: ClientInfo | None,
    *,
    intruders: float | None,
    merge: bool,
) -> Exported:
    from fedlora.models import peft_files
    from fedlora.strategies import registry  # pyright: ignore[reportMissingImports]
    from fedlora.trained import export as exporting
    from fedlora.trained.model_card import citation

    strategy = registry.STRATEGIES.resolve(source.config.strategy.name)
    facts: dict[str, Any] = {"rank": rank} if rank else {}
    personal = kept_by_clients(source.config)
    if personal and peft_files.is_own(source.adapter):
        raise AdapterError(
            f"{source.adapter}: what lora.kind = {source.config.lora.kind} adds to a layer is no fixed matrix, so that "
            "a client's own model has no LoRA factors and cannot be exported; train with another lora.kind"
        )
    if client is None and personal:
        raise ConfigError(
            f"{source.adapter}: with {source.config.strategy.name}, {personal} stays on the clients and there is no "
            "global adapter; add --client NUMBER or --all-clients"
        )
    trained = peft_files.read_adapter(source.adapter) if not personal else None
    if client is not None:
        facts["client"] = client.client_id
        if personal:
            facts["personal"] = personal
            trained = _personal(source, client)

    assert trained is not None
    if peft_files.has_magnitudes(trained) and (rank or intruders is not None):
        raise ConfigError(
            f"{source.adapter}: a DoRA adapter has no factors whose product is its update, so that neither its rank "
            "can be cut nor its intruders scaled; leave out --rank and --remove-intruders"
        )

    def change(state: AdapterState) -> AdapterState:
        if client is not None and not personal:
            state = exporting.for_client(state, client)
        return exporting.at_rank(state, rank) if rank else state

    write = exporting.write_merged if merge else exporting.write_adapter
    paper = citation(strategy.__doc__ or "")
    if intruders is None:
        return write(source, trained, folder, change, facts, paper=paper)
    exporting.check_free(folder)
    changed, found = exporting.with_fewer_intruders(source, trained, intruders, change, merge=merge)
    return write(source, trained, folder, lambda _: changed, {**facts, "intruders": found}, paper=paper)


def _personal(source: Source, client: ClientInfo) -> AdapterState:
    """The adapter from which the client would start its next round: shared and personal factors, with all folds."""
    from fedlora.clients.node import own_state  # pyright: ignore[reportMissingImports]
    from fedlora.models.adapted import in_factors
    from fedlora.simulations import personal  # pyright: ignore[reportMissingImports]
    from fedlora.strategies.configured import configured  # pyright: ignore[reportMissingImports]
    from fedlora.strategies.server import saved_state  # pyright: ignore[reportMissingImports]

    key = source.result.get("key", "")
    saved = saved_state.load(source.run / "state", key) if key else None
    if saved is None:
        raise AdapterError(f"{source.run}: no folder state/ with the shared factors here; give the run's own folder")
    folder = own_state.folder_of(source.run / "clients", key, client.client_id)
    own = personal.model(configured(source.config), saved[0], client, folder)
    if own is None:
        raise NoFactors(
            f"client {client.client_id}: no personal factors in {folder}; the client never trained, or has them on its "
            "node"
        )
    return in_factors(own, source.config.model, source.config.lora)


def _clients(source: Source) -> list[ClientInfo]:
    """The run's clients, as its result records them; clients without a record as the config says."""
    from fedlora.exchange import ClientInfo

    lora = source.config.lora
    ranks = {j: configuration.client_rank(lora, j) for j in range(source.config.federation.clients)}
    ranks |= {int(one["client-id"]): int(one["rank"]) for one in source.result.get("clients", [])}
    pattern = configuration.rank_pattern(lora)
    return [
        ClientInfo(client_id=j, rank=rank, alpha=lora.alpha, rslora=lora.rslora, rank_pattern=pattern)
        for j, rank in sorted(ranks.items())
    ]


def _client(source: Source, number: int) -> ClientInfo:
    known = {client.client_id: client for client in _clients(source)}
    if number not in known:
        raise ConfigError(f"--client {number}: this run has the clients {', '.join(map(str, sorted(known)))}")
    return known[number]


def _say(done: Exported) -> None:
    low, high = done.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    error = "" if done.error is None else f", relative error {done.error:.3g} against what was trained"
    out.print(f"{done.folder}: {ranks}{error}", soft_wrap=True)
    if done.intruders:
        before, after = done.intruders["before"], done.intruders["after"]
        out.print(f"intruder dimensions: {before} before, {after} after", soft_wrap=True)


def _settings(adapters: Sequence[Path], config: str | None, overrides: list[str] | None) -> configuration.Config:
    """The configuration of model and data: the named one, or that of the first adapter's run."""
    for place, adapter in enumerate(adapters):
        if adapter in adapters[:place]:
            raise ConfigError(f"--adapter {adapter}: named twice; name each adapter once")
    if config is not None:
        return load(config, overrides)
    from fedlora.models.peft_files import described

    trained = described(adapters[0]).get("config")
    if not trained:
        raise ConfigError(
            f"--adapter {adapters[0]}: the folder does not say with which model and data it was trained; name a CONFIG "
            "too"
        )
    for adapter in adapters:
        check_shared(adapter)
    own = configuration.parse(trained, where=str(adapters[0] / "fedlora.json"))
    return configuration.parse(configuration.parse_overrides(overrides or []), own, where="-c")


def check_shared(adapter: Path) -> None:
    """Raise ConfigError for the shared part of a run with personal factors: alone, it changes nothing of the base."""
    from fedlora.models.peft_files import described

    about = described(adapter)
    kept, config = "", about.get("config", {})
    if "export" not in about and config:
        kept = kept_by_clients(configuration.parse(config, where=str(adapter / "fedlora.json")))
    if kept:
        raise ConfigError(
            f"--adapter {adapter}: with {config.get('strategy.name')}, {kept} stays on the clients, and without it the "
            f"adapter is nobody's model; export a client's own first: fedlora export {adapter.parent} OUT --client 0"
        )


def _table(title: str, rows: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Table:
    table = Table(title=title)
    for heading in ("", *names):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for label, metrics in rows.items():
        table.add_row(label, *[f"{metrics[name]:.4f}" if name in metrics else "" for name in names])
    return table
