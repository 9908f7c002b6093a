"""The division of the rows: first the held-out rows, then one part for each client. It depends on the seed alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedlora.common.errors import DataError
from fedlora.config import DataConfig, ints

from .places import places
from .sources import PACKAGED

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)

_DIRICHLET_DRAWS = 5
_ORDER, _DEAL, _LOCAL = range(3)  # independent streams of one seed


@dataclass(frozen=True, eq=False)
class Split:
    """Rows divided among the clients.

    Args:
        rows: all rows.
        heldout: rows that no client has, for the server's evaluation, with the same distribution as the clients' rows.
        parts: for each client an array of indices into `rows`.
        names: the natural key of each client; empty for other partitions.
        left_out: number of rows that neither a client nor the server has.
        test: rows that no client has and that are scored only after the last round.
        owners: for each row of `heldout` and of `test`, the number of the client that has the same key; empty for
            partitions other than natural.
    """

    rows: Dataset
    heldout: Dataset
    parts: tuple[np.ndarray, ...]
    names: tuple[str, ...]
    left_out: int
    test: Dataset
    owners: tuple[np.ndarray, np.ndarray]

    def client(self, client_id: int) -> Dataset:
        """The rows of one client, in a seeded order.

        Raises:
            DataError: there is no such client.
        """
        return self.rows.select(self._part(client_id))

    def count(self, client_id: int) -> int:
        """The number of a client's rows; no row is read.

        Raises:
            DataError: there is no such client.
        """
        return len(self._part(client_id))

    def _part(self, client_id: int) -> np.ndarray:
        if not 0 <= client_id < len(self.parts):
            raise DataError(
                f"client {client_id} has no rows: the data is divided among {len(self.parts)} clients, 0 to "
                f"{len(self.parts) - 1}; set federation.clients to the number of clients"
            )
        return self.parts[client_id]


def split_rows(rows: Dataset, data: DataConfig, clients: int, seed: int) -> Split:
    """Take out the held-out rows, and divide the others among the clients.

    With a natural partition, each client has one value of the key column. If there are more values than clients, those
    with the most rows are taken, largest first and equal ones by name; held-out rows have these values only. With a
    numbered partition, the key column has the number of each row's client, from 0. Natural, numbered and dirichlet
    partitions hold out about the same share of each value, but never all of its rows.

    Args:
        rows: the rows, at least one.
        data: the section data. Its `heldout_max` and `client_max` are applied last, so that they move no other row.
        clients: number of clients.
        seed: the run's seed; the same seed gives the same split in any process.

    Raises:
        DataError: the key column is missing or has empty cells, there are fewer natural clients than wanted, the sizes
            exceed the rows, a client would have no rows, or there would be no held-out rows although some are wanted.
    """
    codes = np.zeros(len(rows), dtype=np.int64)
    names: tuple[str, ...] = ()
    if data.partition in ("natural", "numbered", "dirichlet"):
        column = key_column(rows.column_names, data)
        codes, values = _keys(rows, column, data)
        if data.partition == "natural":
            codes, names = _choose(codes, values, column, data, clients)
        elif data.partition == "numbered":
            check_numbers(rows, column, data, clients)
            codes, names = np.array(values, dtype=np.int64)[codes], tuple(map(str, range(clients)))
    order = _rng(seed, _ORDER).permutation(np.flatnonzero(codes >= 0))
    held = _held_out(codes[order], data.heldout_fraction)
    heldout, kept = order[held], order[~held]
    tested = _held_out(codes[heldout], data.test_fraction)
    heldout, test = heldout[~tested][: data.heldout_max or None], heldout[tested][: data.heldout_max or None]
    if data.heldout_fraction and not len(heldout):
        raise DataError(
            f"{data.source}: data.heldout-fraction = {data.heldout_fraction} of {len(order)} rows leaves none for "
            f"the server's evaluation; raise it, or set it to 0 and evaluate.server = false"
        )
    parts = _deal(kept, codes[kept], data, clients, seed)
    for client, part in enumerate(parts):
        if not len(part):
            raise DataError(
                f"{data.source}: data.partition = {data.partition!r} leaves client {client} without rows "
                f"({len(kept)} training rows for {clients} clients); lower federation.clients"
                f"{', or raise data.dirichlet-alpha' if data.partition == 'dirichlet' else ''}"
            )
    left_out = len(rows) - int(held.sum()) - sum(map(len, parts))
    if left_out:
        _log.info("%s: %d of %d rows belong to none of the %d clients", data.source, left_out, len(rows), clients)
    return Split(
        rows=rows,
        heldout=rows.select(heldout),
        parts=tuple(part[: data.client_max or None] for part in parts),
        names=names,
        left_out=left_out,
        test=rows.select(test),
        owners=(codes[heldout], codes[test]) if names else (codes[:0], codes[:0]),
    )


def joined(split: Split, groups: Sequence[Sequence[int]]) -> Split:
    """The split for other clients, each of which has several parts of the given split; held-out rows are the same.

    Args:
        split: a split that `split_rows` made.
        groups: for each new client, the numbers of its parts; see `fedlora.config.client_parts`.
    """
    return replace(
        split,
        parts=tuple(np.concatenate([split.parts[part] for part in group]) for group in groups),
        names=tuple("+".join(split.names[part] for part in group) for group in groups) if split.names else (),
    )


def client_split(rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """A client's own rows as (training rows, test rows).

    Args:
        rows: the rows of one client.
        fraction: share of the test rows; see `kept_back`.
        seed: the client's seed; the same seed gives the same split in any process.
    """
    order = _rng(seed, _LOCAL).permutation(len(rows))
    test = kept_back(len(rows), fraction)
    return rows.select(order[test:]), rows.select(order[:test])


def kept_back(rows: int, fraction: float) -> int:
    """The number of a client's test rows in `client_split`.

    Args:
        rows: number of the client's rows.
        fraction: share of the test rows. With 0, there are none. Otherwise, if the client has at least two rows, there
            is at least one test row and one training row.
    """
    return min(max(1, round(rows * fraction)), rows - 1) if fraction else 0


def most_kept_back(left: int, fraction: float) -> int:
    """The largest possible `kept_back` of a client with `left` training rows."""
    most = int((left * fraction + 0.5) / (1 - fraction)) + 1
    return next((kept for kept in range(most, 0, -1) if kept_back(left + kept, fraction) == kept), 0)


def key_column(columns: Sequence[str], data: DataConfig) -> str:
    """The key column of a natural, numbered or dirichlet partition.

    Raises:
        DataError: the rows do not have this column.
    """
    own = PACKAGED[data.source].key if data.source in PACKAGED else data.label_column
    if not own and data.partition == "natural" and data.partition_by == "auto":
        raise DataError(
            f"{data.source}: its rows belong to nobody, so that data.partition = 'natural' has no key; set "
            "data.partition = 'dirichlet' or 'iid'"
        )
    own = own or data.label_column
    if data.partition == "numbered":
        own = "client"
    column = own if data.partition_by == "auto" else data.partition_by
    if column not in columns:
        raise DataError(
            f"{data.source}: no column {column!r}, which data.partition = {data.partition!r} needs as its key; the "
            f"columns are {', '.join(map(repr, columns))}; set data.partition-by to one of them, or data.partition = "
            f"'iid'"
        )
    return column


def _rng(seed: int, *stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, *stream])


def _keys(rows: Dataset, column: str, data: DataConfig) -> tuple[np.ndarray, list[Any]]:
    """For each row the index of its key, and the list of all keys."""
    import pyarrow as pa

    cells = rows.select_columns([column]).with_format("arrow")[:][column].combine_chunks()
    blank = [
        at for at, cell in enumerate(cells.to_pylist()) if cell is None or (isinstance(cell, str) and not cell.strip())
    ]
    if blank:
        raise DataError(
            f"{data.source}: column {column!r} is empty in {len(blank)} of {len(cells)} rows "
            f"({places(rows, blank, data)}), but data.partition = {data.partition!r} needs a key in each; fill them, "
            "or drop these rows"
        )
    try:
        encoded = cells.dictionary_encode()
    except pa.ArrowNotImplementedError:
        raise DataError(
            f"{data.source}: column {column!r} holds {cells.type}, expected texts or numbers as the key of "
            f"data.partition = {data.partition!r}"
        ) from None
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _choose(
    codes: np.ndarray, values: list[Any], column: str, data: DataConfig, clients: int
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The number of each row's client (-1: none), and the clients' names."""
    if len(values) < clients:
        raise DataError(
            f"{data.source}: column {column!r} has {len(values)} values, too few for {clients} natural clients; set "
            f"federation.clients = {len(values)} or less, or data.partition = 'iid'"
        )
    counts = np.bincount(codes, minlength=len(values))
    chosen = sorted(range(len(values)), key=lambda code: (-counts[code], values[code]))[:clients]
    client_of = np.full(len(values), -1)
    client_of[chosen] = np.arange(clients)
    return client_of[codes], tuple(str(values[code]) for code in chosen)


def check_numbers(rows: Dataset, column: str, data: DataConfig, clients: int) -> None:
    """Check that a column has the number of a client, from 0, in every row.

    Raises:
        DataError: it has something else; the message says in which rows.
    """
    cells = rows.select_columns([column])[:][column]
    wrong = [at for at, cell in enumerate(cells) if type(cell) is not int or not 0 <= cell < clients]
    if wrong:
        raise DataError(
            f"{data.source}: column {column!r} holds something else than a client's number, 0 to {clients - 1}, in "
            f"{places(rows, wrong, data)}; set federation.clients to the number of clients, or correct these rows"
        )


def _held_out(codes: np.ndarray, fraction: float) -> np.ndarray:
    """For each of these shuffled rows, whether it is held out: the same share of each code, but never all its rows."""
    by_code = np.argsort(codes, kind="stable")
    steps = np.floor(np.arange(len(codes) + 1) * fraction + 1e-9)
    picked = np.diff(steps) > 0
    picked &= np.diff(codes[by_code], prepend=-1) == 0
    held = np.zeros(len(codes), dtype=bool)
    held[by_code[picked]] = True
    return held


def _deal(kept: np.ndarray, codes: np.ndarray, data: DataConfig, clients: int, seed: int) -> list[np.ndarray]:
    """The shuffled training rows, divided into one part for each client."""
    if data.partition in ("natural", "numbered"):
        # Not flwr_datasets' NaturalIdPartitioner: it numbers clients by name, and draws a progress bar.
        by_client = np.argsort(codes, kind="stable")
        return np.split(kept[by_client], np.cumsum(np.bincount(codes, minlength=clients))[:-1])
    if data.partition == "sizes":
        return _sized(kept, data)
    if data.partition == "dirichlet" and len(kept) >= clients:
        return _dirichlet(kept, codes, data, clients, seed)
    return np.array_split(kept, clients)


def _sized(kept: np.ndarray, data: DataConfig) -> list[np.ndarray]:
    sizes = ints("data.sizes", data.sizes)
    if sum(sizes) > len(kept):
        raise DataError(
            f"{data.source}: data.sizes = {data.sizes!r} asks for {sum(sizes)} rows, but {len(kept)} are left for "
            f"training; lower the sizes or data.heldout-fraction"
        )
    return np.split(kept[: sum(sizes)], np.cumsum(sizes)[:-1])


def _dirichlet(kept: np.ndarray, codes: np.ndarray, data: DataConfig, clients: int, seed: int) -> list[np.ndarray]:
    """Parts with Dirichlet shares of each key (https://arxiv.org/abs/1905.12022); drawn again if a part is empty."""
    from flwr_datasets.partitioner import DirichletPartitioner

    parts: list[np.ndarray] = []
    for draw in range(_DIRICHLET_DRAWS):
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="code",
            alpha=data.dirichlet_alpha,
            min_partition_size=0,
            seed=int(_rng(seed, _DEAL, draw).integers(2**31)),
        )
        parts = _ask(partitioner, kept, codes)
        if len(parts[-1]):
            break
    return parts


def _ask(partitioner: Any, kept: np.ndarray, codes: np.ndarray) -> list[np.ndarray]:
    """The parts that a Flower partitioner makes, up to the first empty part; its rows have an index and a key."""
    import pyarrow as pa
    from datasets import Dataset

    partitioner.dataset = Dataset(pa.table({"row": kept, "code": codes}))
    parts: list[np.ndarray] = []
    while len(parts) < partitioner.num_partitions and (not parts or len(parts[-1])):
        parts.append(np.array(partitioner.load_partition(len(parts))[:]["row"], dtype=np.int64))
    return parts
