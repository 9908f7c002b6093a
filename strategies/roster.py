"""Who takes part: the nodes that connect, and the clients that they say they are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora import parts, wire
from fedlora.config import Config, rank_pattern
from fedlora.errors import FedLoraError, RunError, WireError
from fedlora.events import emit
from fedlora.exchange import ClientInfo

from . import answers as of_client
from . import bindings
from .answers import Answer, AwayError
from .bindings import Identity
from .classes import disagreeing
from .mailbox import Mailbox

_HELLO_SECONDS = 600.0  # a client's first answer may need a download
_ANSWER_SECONDS = 60.0  # that it has at least
_LOOK_SECONDS = 0.5
_log = logging.getLogger("fedlora")


@dataclass
class Roster:
    """Who takes part: what the server knows of each client, and the node that it lives on.

    Attributes:
        infos, nodes: by client id.
        hosts: nodes whose messages have a part for each of several clients.
        refusals: why others cannot take part.
    """

    infos: dict[int, ClientInfo]
    nodes: dict[int, int]
    hosts: set[int] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)

    def by_node(self, chosen: Sequence[int]) -> dict[int, list[int]]:
        """Node -> those of its clients that are chosen, in their order: they are asked by one message."""
        found: dict[int, list[int]] = {}
        for client in chosen:
            found.setdefault(self.nodes[client], []).append(client)
        return found

    def message(self, node: int, clients: Sequence[int], encoded: Callable[[int], RecordDict]) -> RecordDict:
        """What a node is sent for these of its clients; `encoded` makes one client's message."""
        if node in self.hosts:
            return parts.join({client: encoded(client) for client in clients})
        [client] = clients
        return encoded(client)

    def answers(self, node: int, clients: Sequence[int], reply: Message | None) -> dict[int, Answer]:
        """What a node answers for these of its clients; one that is malformed as a whole is so for each of them."""
        answer = of_client.of(reply)
        if node not in self.hosts or not isinstance(answer, RecordDict):
            return dict.fromkeys(clients, answer)
        try:
            found = parts.split(answer, f"node {node}")
            if found.keys() != {*clients}:
                raise WireError(f"node {node} answered for clients {sorted(found)[:5]}, it was asked for {clients[:5]}")
        except WireError as error:
            return dict.fromkeys(clients, error)
        return {client: found[client] for client in clients}


def meet(grid: Grid, config: Config, fingerprint: str, classes: Sequence[str] | None = None) -> Roster:
    """Ask each node that connects who its clients are, until all are there or `federation.wait-timeout` is over.

    A node that does not answer, since it died and Flower still lists it, is asked again while it is listed. Clients
    whose classes are called otherwise than `classes`, see `disagreeing`, are refused.

    Raises:
        RunError: fewer than `federation.min-clients` are there by then, or too many cannot take part.
    """
    wanted, least, wait = config.federation.clients, config.federation.min_clients, config.federation.wait_timeout
    deadline = time.monotonic() + wait
    roster = Roster({}, {})
    met = _Meeting(grid, config, fingerprint, roster, deadline)
    nodes: set[int] = set()
    told, late = False, False
    while not late and met.reached < wanted:
        late = time.monotonic() >= deadline
        before, nodes = nodes, {*grid.get_node_ids()}
        # Others may be about to connect: a first answer takes long, and many at a time take no longer.
        if late or nodes == before or len(nodes) >= wanted:
            met.introduce(sorted(nodes))
        if not late and met.reached < wanted:
            if not told:
                _log.info("waiting up to %.0f s for %d clients (federation.clients)", wait, wanted)
            told = True
            time.sleep(_LOOK_SECONDS)
    if met.reached < least:
        why = f" (the first that did not: {met.away[0]})" if met.away else ""
        raise RunError(
            f"{met.reached} of {wanted} clients connected within {wait:.0f} s{why}, and federation.min-clients = "
            f"{least}; start more clients or raise federation.wait-timeout"
        )
    for client, reason in disagreeing(roster.infos, classes).items():
        del roster.infos[client]
        met.refuse(client, roster.nodes[client], reason)
    roster.refusals = met.refusals
    if len(roster.infos) < least:
        why = f"; the first said: {met.refusals[0]}" if met.refusals else ""
        raise RunError(
            f"{len(roster.infos)} of {met.reached} clients can take part, and federation.min-clients = {least}{why}"
        )
    roster.infos = dict(sorted(roster.infos.items()))
    bindings.bind({client: met.identities.get(node, Identity()).key for client, node in roster.nodes.items()})
    return roster


class _Meeting:
    """Nodes that are asked who their clients are.

    Attributes:
        refusals: why clients cannot take part.
        away: why nodes did not answer the last time that they were asked.
        identities: of the nodes that are connected.
    """

    def __init__(self, grid: Grid, config: Config, fingerprint: str, roster: Roster, deadline: float) -> None:
        self._grid, self._config, self._fingerprint, self._roster = grid, config, fingerprint, roster
        self._deadline = deadline
        self._asked: set[int] = set()
        self.refusals: list[str] = []
        self.away: list[str] = []
        self.identities: Mapping[int, Identity] = {}
        self._bound = bindings.known()

    @property
    def reached(self) -> int:
        return len(self._roster.infos) + len(self.refusals)

    def refuse(self, client: int | None, node: int, reason: str) -> None:
        """Note that a client cannot take part."""
        self.refusals.append(reason)
        emit("client-failed", client_id=client, node=node, reason=reason, round=0)

    def introduce(self, nodes: Sequence[int]) -> None:
        """Enter the clients of those nodes into the roster that have not said yet who they are."""
        newcomers = [node for node in nodes if node not in self._asked]
        if not newcomers:
            return
        self._asked |= {*newcomers}
        self.identities, self.away = bindings.identities(self._grid), []
        federation = self._config.federation
        mailbox = Mailbox(
            self._grid,
            "query",
            "0",
            max(federation.wait_timeout, _HELLO_SECONDS),
            # one node that hangs keeps nobody waiting once enough are there
            enough_after=max(_ANSWER_SECONDS, self._deadline - time.monotonic()),
            wanted=lambda: len(self._roster.infos) < federation.min_clients,
        )
        for node in newcomers:
            mailbox.post(node, partial(wire.encode_hello, self._fingerprint))
        for node, reply in mailbox.replies():
            for client, answer in _introductions(node, reply).items():
                self._enter(node, client, answer)

    def _enter(self, node: int, client: int | None, answer: Answer) -> None:
        who = f"node {node}" if client is None else f"client {client} on node {node}"
        try:
            content = of_client.content(answer, who)
            info = _same_run(wire.decode_info(content, self._fingerprint, who), self._config, who)
            if client not in (None, info.client_id):
                raise WireError(f"{who} says that it is client {info.client_id}")
        except AwayError as error:
            self._asked.discard(node)
            self.away.append(str(error))
            return
        except FedLoraError as error:
            self.refuse(client, node, str(error))
            return
        if self._may_be(node, info.client_id):
            self._roster.infos[info.client_id], self._roster.nodes[info.client_id] = info, node
            if client is not None:
                self._roster.hosts.add(node)

    def _may_be(self, node: int, client: int) -> bool:
        """Whether this node is that client: its key is bound to the id, or else it is the first that says so.

        Another that says so is refused and named, and the run goes on: else one node could stop every run.
        """
        mine = self.identities.get(node, Identity())
        owner, own = self._bound.get(client, ""), sorted(one for one, key in self._bound.items() if key == mine.key)
        if (owner and owner != mine.key) or (own and client not in own):
            belongs = "the id belongs to another node's key" if owner else f"its key belongs to client {own[0]}"
            self._deny(node, client, f"{belongs} since an earlier run; edit {bindings.where()} to change that")
            return False
        holder = self._roster.nodes.get(client)
        if holder is None:
            return True
        theirs = self.identities.get(holder, Identity())
        first = (mine.registered, node) < (theirs.registered, holder)
        winner, loser = (node, holder) if first else (holder, node)
        self._deny(loser, client, f"node {winner} is that client already; give each node its own partition-id")
        return first

    def _deny(self, node: int, client: int, why: str) -> None:
        reason = f"node {node} says that it is client {client}, and is refused: {why}"
        _log.warning("%s", reason)
        emit("client-failed", client_id=None, node=node, reason=reason, round=0)


def _introductions(node: int, reply: Message | None) -> dict[int | None, Answer]:
    """A node's answers to the server's first question: its only client's, under no id, or one for each it hosts."""
    answer = of_client.of(reply)
    if not isinstance(answer, RecordDict) or not parts.is_joined(answer):
        return {None: answer}
    try:
        return {**parts.split(answer, f"node {node}")}
    except WireError as error:
        return {None: error}


def _same_run(info: ClientInfo, config: Config, who: str) -> ClientInfo:
    """The client's description, if what every client takes from the run's config is what it has.

    Its rank may be its own. A pattern is regular expressions that the server evaluates, and a scale multiplies all that
    the client sends.

    Raises:
        WireError: it has another pattern, alpha or kind of scaling.
    """
    lora = config.lora
    for key, mine, theirs in (
        ("lora.rank-pattern", rank_pattern(lora), dict(info.rank_pattern)),
        ("lora.alpha", lora.alpha, str(info.alpha)),
        ("lora.rslora", lora.rslora, info.rslora),
    ):
        if mine != theirs:
            raise WireError(f"{who} has another {key} than this run, which goes for every client alike")
    return info
