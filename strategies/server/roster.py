"""The clients that take part: nodes connect and say which clients they are, and the server accepts or refuses them."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedlora.common.errors import FedLoraError, RunError, WireError
from fedlora.common.events import emit
from fedlora.config import Config, largest_rank, rank_pattern
from fedlora.exchange import ClientInfo, parts, wire

from . import answers as of_client
from . import bindings
from .answers import Answer, AwayError
from .bindings import Identity
from .classes import disagreeing
from .mailbox import Mailbox

_HELLO_SECONDS = 600.0  # a node's first answer may need a download; clients join later if the run has begun by then
_OTHERS_SECONDS = 10.0  # wait for the other connected nodes when enough clients have answered
_LOOK_SECONDS = 0.5
# Largest number of bytes in which a client may describe itself, with classes and ranks, and a node all that it hosts.
_CLIENT_BYTES, _HOSTED_BYTES = 32 << 10, 64 << 20
_MOST_TOLD = 1000  # more clients without keys that come at once are one event
_log = logging.getLogger("fedlora")


@dataclass
class Roster:
    """The clients that take part.

    Attributes:
        infos: client id -> the client's description.
        nodes: client id -> number of the node on which the client lives.
        hosts: the nodes that host several clients, and whose messages have a part for each of them.
        refusals: for each client that was refused, the reason.
        ids: the ids of `infos`, in order; kept by `sort`, so that a round need not look at all clients.
    """

    infos: dict[int, ClientInfo]
    nodes: dict[int, int]
    hosts: set[int] = field(default_factory=set)
    refusals: list[str] = field(default_factory=list)
    ids: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.sort()

    def sort(self) -> None:
        """Put the clients in the order of their ids, after some have come or gone."""
        self.infos = dict(sorted(self.infos.items()))
        self.ids = list(self.infos)

    def by_node(self, chosen: Sequence[int]) -> dict[int, list[int]]:
        """Node -> its clients among the chosen ones, in order; one message asks all of them."""
        found: dict[int, list[int]] = {}
        for client in chosen:
            found.setdefault(self.nodes[client], []).append(client)
        return found

    def message(self, node: int, clients: Sequence[int], encoded: Callable[[int], RecordDict]) -> RecordDict:
        """The message to a node for these of its clients; `encoded` makes one client's message."""
        if node in self.hosts:
            return parts.join({client: encoded(client) for client in clients})
        [client] = clients
        return encoded(client)

    def answers(self, node: int, clients: Sequence[int], reply: Message | None) -> dict[int, Answer]:
        """The answers of these clients in their node's reply; if the whole reply is malformed, each gets the error."""
        answer = of_client.of(reply)
        if node not in self.hosts or not isinstance(answer, RecordDict):
            return dict.fromkeys(clients, answer)
        try:
            found = parts.split(answer, f"node {node}")
            if found.keys() != {*clients}:
                raise WireError(f"node {node} answered for clients {sorted(found)[:5]}, not for {clients[:5]}")
        except WireError as error:
            return dict.fromkeys(clients, error)
        return {client: found[client] for client in clients}


@dataclass(frozen=True, slots=True)
class _Offer:
    """A client that a node says it is or hosts."""

    info: ClientInfo
    node: int
    hosted: bool


class Meeting:
    """Asks nodes which clients they are, before the run, and between its rounds those that come later.

    A run has at most `federation.clients` clients, whatever nodes say. If more want to take part, clients come first
    whose id already belongs to their node's key, then clients of nodes with fewer clients, then clients of nodes that
    were registered earlier.

    Args:
        grid: carries the messages to the nodes.
        config: the run's configuration.
        fingerprint: fingerprint of the run's base model.
        classes: names of the classes in the server's own rows; None if it reads no rows. See `disagreeing`.
        allocated: gives a client its ranks by module, as `lora.allocation` says.
        limit: name of the setting that bounds the number of clients, for messages.
        compares: whether clients are refused that call their classes by other names than most do.

    Attributes:
        roster: the clients that take part.
    """

    def __init__(
        self,
        grid: Grid,
        config: Config,
        fingerprint: str,
        classes: Sequence[str] | None = None,
        allocated: Callable[[ClientInfo], ClientInfo] = lambda client: client,
        *,
        limit: str = "federation.clients",
        compares: bool = True,
    ) -> None:
        self.roster = Roster({}, {})
        self._limit, self._compares = limit, compares
        self._classes, self._allocated = classes, allocated
        self._grid, self._config, self._fingerprint = grid, config, fingerprint
        self._offers: dict[int, _Offer] = {}
        self._refusals: dict[int, set[str]] = {}  # by node
        self._away: list[str] = []
        self._asked: set[int] = set()
        self._connected: set[int] = set()
        self._listed: Iterable[int] = ()  # what the grid listed last
        self._lost = False  # whether a node that was listed is to be asked again
        self._entered = False  # whether a client has offered to take part since the last round
        self._identities: Mapping[int, Identity] = {}
        self._bound = bindings.known()
        self._least = _least(self._bound)
        self._mailbox = Mailbox(grid, "query", "0", max(config.federation.wait_timeout, _HELLO_SECONDS))

    def begin(self) -> None:
        """Ask each node that connects, until all clients are there or `federation.wait-timeout` is over.

        A dead node that Flower still lists is asked again as long as it is listed. For a node that hangs, the server
        waits no longer than that time.

        Raises:
            RunError: fewer than `federation.min-clients` clients have connected by then or can take part.
        """
        federation = self._config.federation
        wanted, least, wait = federation.clients, federation.min_clients, federation.wait_timeout
        began, enough, told = time.monotonic(), math.inf, False
        while True:
            self._ask_newcomers()
            heard = self._hear()
            now = time.monotonic()
            if self._reached >= wanted:
                enough = min(enough, now)
                if not self._mailbox.waited_for & self._connected or now - enough > _OTHERS_SECONDS:
                    break
            if not heard:
                if now - began >= wait:
                    break
                if not told:
                    _log.info("waiting up to %.0f s for %d clients (%s)", wait, wanted, self._limit)
                told = True
                time.sleep(min(_LOOK_SECONDS, wait))
        if self._reached < least:
            raise RunError(
                f"{self._reached} of {wanted} clients connected within {wait:.0f} s{self._who_did_not()}, but "
                f"federation.min-clients = {least}; start more clients or raise federation.wait-timeout"
            )
        self._accept(self._choose())
        self._entered = False
        for client, reason in self._disagreeing(self.roster.infos, self._classes).items():
            del self.roster.infos[client], self._offers[client]
            self._refuse(self.roster.nodes.pop(client), client, reason)
        self.roster.sort()
        if len(self.roster.infos) < least:
            refusals = self.roster.refusals
            why = f"; the first said: {refusals[0]}" if refusals else self._who_did_not()
            raise RunError(
                f"{len(self.roster.infos)} of {self._reached} clients can take part, but federation.min-clients = "
                f"{least}{why}"
            )

    def welcome(self) -> list[int]:
        """Accept the clients that have come since, or have come back on another node; return their ids.

        As long as the run has room, edges are asked again, since clients may have come to their regions.
        """
        if len(self.roster.infos) < self._config.federation.clients:
            edges = {self.roster.nodes[client] for client, info in self.roster.infos.items() if info.edges}
            again = (edges - self._mailbox.waited_for) & self._asked
            self._asked -= again
            self._lost = self._lost or bool(again)
        self._ask_newcomers()
        self._hear()
        roster = self.roster
        if not self._entered and len(self._offers) == len(roster.infos):  # nobody came, and nobody waits for a place
            return []
        self._entered = False
        back = [
            client
            for client, offer in self._offers.items()
            if client in roster.nodes and roster.nodes[client] != offer.node
        ]
        new = self._choose()[: max(0, self._config.federation.clients - len(roster.infos))]
        agreed = next((info.class_names for info in roster.infos.values()), None)
        self._accept([*back, *new])
        others = self._disagreeing({client: roster.infos[client] for client in (*back, *new)}, agreed)
        for client, why in others.items():
            self.turn_away(client, why)
        return sorted({*back, *new} - others.keys())

    def give_ranks(self) -> None:
        """Give all clients their ranks anew, those that take part and those that have offered to."""
        self.roster.infos = {client: self._allocated(info) for client, info in self.roster.infos.items()}
        self._offers = {c: replace(offer, info=self._allocated(offer.info)) for c, offer in self._offers.items()}

    def turn_away(self, client: int, why: str) -> None:
        """Remove a client that came late and cannot take part."""
        node = self.roster.nodes.pop(client)
        del self.roster.infos[client]
        self.roster.sort()
        self._offers.pop(client, None)
        self._refuse(node, client, f"client {client} on node {node} cannot join the run: {why}")

    def _disagreeing(self, infos: Mapping[int, ClientInfo], names: Sequence[str] | None) -> Mapping[int, str]:
        return disagreeing(infos, names) if self._compares else {}

    @property
    def _reached(self) -> int:
        """The number of clients that have answered; a node's refusals count at most for its equal share of clients."""
        share = math.ceil(self._config.federation.clients / max(1, len(self._connected)))
        return len(self._offers) + sum(min(len(said), share) for said in self._refusals.values())

    def _who_did_not(self) -> str:
        silent = sorted(self._mailbox.waited_for & self._connected)
        if silent:
            shown = ", ".join(map(str, silent[:3])) + (", …" if len(silent) > 3 else "")
            return (
                f" (connected, but without an answer yet: node {shown}; a first answer may take a download, and a "
                "node that is working answers afterwards)"
            )
        return f" (the first that did not: {self._away[0]})" if self._away else ""

    def _ask_newcomers(self) -> None:
        """Ask the nodes that have not been asked yet which clients they are."""
        listed = self._grid.get_node_ids()
        listed = listed if isinstance(listed, range) else list(listed)
        if listed == self._listed and not self._lost:
            return
        self._listed, self._lost = listed, False
        self._connected = {*listed}
        newcomers = sorted(self._connected - self._asked)
        if not newcomers:
            return
        self._asked |= {*newcomers}
        self._identities, self._away = bindings.identities(self._grid), []
        self._bound = bindings.known()
        self._least = _least(self._bound)
        hosted = self._config.federation.max_hosted or self._config.federation.clients
        most = min(hosted * _CLIENT_BYTES, _HOSTED_BYTES)
        for node in newcomers:
            self._mailbox.post(node, partial(wire.encode_hello, self._fingerprint), others=most)

    def _hear(self) -> bool:
        """Process the answers that have come; return whether there was one other than that a node is not there."""
        heard = False
        most = self._config.federation.max_hosted
        for node, reply in self._mailbox.arrived():
            answers = _introductions(node, reply)
            if most and len(answers) > most:
                many = f"node {node} says that it hosts {len(answers)} clients"
                self._deny(node, f"{many}, and is refused: federation.max-hosted = {most}")
            else:
                for client, answer in answers.items():
                    self._enter(node, client, answer)
            heard |= node in self._asked
        return heard

    def _enter(self, node: int, client: int | None, answer: Answer) -> None:
        who = f"node {node}" if client is None else f"client {client} on node {node}"
        try:
            content = of_client.content(answer, who)
            info = self._allocated(_same_run(wire.decode_info(content, self._fingerprint, who), self._config, who))
            if client not in (None, info.client_id):
                raise WireError(f"{who} says that it is client {info.client_id}")
        except AwayError as error:
            self._asked.discard(node)
            self._lost = True
            self._away.append(str(error))
            return
        except FedLoraError as error:
            self._refuse(node, client, str(error))
            return
        if self._may_be(node, info):
            self._offers[info.client_id] = _Offer(info, node, client is not None)
            self._entered = True

    def _refuse(self, node: int, client: int | None, reason: str) -> None:
        said = self._refusals.setdefault(node, set())
        if reason in said:  # an edge was asked again
            return
        said.add(reason)
        self.roster.refusals.append(reason)
        emit("client-failed", client_id=client, node=node, reason=reason, round=0)

    def _choose(self) -> list[int]:
        """The clients that do not take part yet, in the order in which they may."""
        of_node = Counter(offer.node for offer in self._offers.values())

        def order(client: int) -> tuple[bool, int, str, int, int]:
            node = self._offers[client].node
            known = self._identities.get(node, Identity())
            return client not in self._bound, of_node[node], known.registered, node, client

        return sorted(self._offers.keys() - self.roster.infos.keys(), key=order)

    def _accept(self, clients: Sequence[int]) -> None:
        """Add these clients to the roster, up to `federation.clients`, and bind their ids to their nodes' keys."""
        roster, most = self.roster, self._config.federation.clients
        many = len(clients) > _MOST_TOLD and not any(known.key for known in self._identities.values())
        for client in clients:
            offer = self._offers[client]
            if client not in roster.infos and len(roster.infos) >= most:
                del self._offers[client]
                self._deny(offer.node, f"client {client} on node {offer.node} stays out: {self._limit} = {most}")
                continue
            roster.infos[client], roster.nodes[client] = offer.info, offer.node
            if offer.hosted:
                roster.hosts.add(offer.node)
            if not many:
                about = {"rank": offer.info.rank, "num_examples": offer.info.num_examples}
                key = self._identities.get(offer.node, Identity()).key
                emit("client-met", client_id=client, node=offer.node, key=key, **about)
        if many:
            infos = [roster.infos[client] for client in clients if client in roster.infos]
            ranks = dict(sorted(Counter(info.rank for info in infos).items()))
            emit("clients-met", clients=len(infos), ranks=ranks, num_examples=sum(info.num_examples for info in infos))
        roster.sort()
        bindings.bind({client: self._identities.get(node, Identity()).key for client, node in roster.nodes.items()})
        self._bound = bindings.known()
        self._least = _least(self._bound)

    def _may_be(self, node: int, info: ClientInfo) -> bool:
        """Whether this node may be that client: its key is bound to the id, or it is the first node that says so.

        The key of an edge may come with further clients in each run, since its region may grow.

        Any other node that says so is refused by name, and the run goes on. Otherwise one node could stop every run.
        """
        client, mine = info.client_id, self._identities.get(node, Identity())
        owner, own = self._bound.get(client, ""), self._least.get(mine.key)
        foreign = own is not None and client not in self._bound and not info.edges
        if (owner and owner != mine.key) or foreign:
            belongs = "the id belongs to another node's key" if owner else f"its key belongs to client {own}"
            self._not_that(node, client, f"{belongs} since an earlier run; edit {bindings.where()} to change that")
            return False
        holder = self._offers[client].node if client in self._offers else self.roster.nodes.get(client)
        if holder is None or holder == node:
            return True
        theirs = self._identities.get(holder, Identity())
        if not mine.key and holder not in self._connected:  # without keys, a node that is started again is a new one
            return True
        first = (mine.registered, node) < (theirs.registered, holder) and client not in self.roster.infos
        winner, loser = (node, holder) if first else (holder, node)
        self._not_that(loser, client, f"node {winner} is that client already; give each node its own partition-id")
        return first

    def _not_that(self, node: int, client: int, why: str) -> None:
        self._deny(node, f"node {node} says that it is client {client}, and is refused: {why}")

    @staticmethod
    def _deny(node: int, reason: str) -> None:
        _log.warning("%s", reason)
        emit("client-failed", client_id=None, node=node, reason=reason, round=0)


def _least(bound: Mapping[int, str]) -> dict[str, int]:
    """For each key, the smallest of the clients that belong to it."""
    return {key: client for client, key in sorted(bound.items(), reverse=True)}


def _introductions(node: int, reply: Message | None) -> dict[int | None, Answer]:
    """A node's answers to the server's first question: one under None, or one for each client that it hosts."""
    answer = of_client.of(reply)
    if not isinstance(answer, RecordDict) or not parts.is_joined(answer):
        return {None: answer}
    try:
        return {**parts.split(answer, f"node {node}")}
    except WireError as error:
        return {None: error}


def _same_run(info: ClientInfo, config: Config, who: str) -> ClientInfo:
    """The client's description, after a check of the values that all clients must take from the run's config.

    These are the rank pattern, whose regular expressions the server evaluates, and alpha and the kind of scaling, which
    multiply all that the client sends. Only its rank may be its own, up to the largest that the run allows.

    Raises:
        WireError: the client has another pattern, alpha or kind of scaling, or a larger rank than the run allows.
    """
    lora = config.lora
    for key, mine, theirs in (
        ("lora.rank-pattern", rank_pattern(lora), dict(info.rank_pattern)),
        ("lora.alpha", lora.alpha, str(info.alpha)),
        ("lora.rslora", lora.rslora, info.rslora),
    ):
        if mine != theirs:
            raise WireError(f"{who} has another {key} than this run, but all clients must have the run's")
    most = largest_rank(config)
    if info.rank > most:
        key = f"federation.max-rank = {most}" if config.federation.max_rank else f"the largest of lora.ranks is {most}"
        raise WireError(
            f"{who} has rank {info.rank}, but {key}; lower its own rank, or set federation.max-rank = {info.rank}"
        )
    return info
