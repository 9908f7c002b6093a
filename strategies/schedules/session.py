"""A run on the server: sample, broadcast, collect, aggregate, evaluate, record. The same for every engine."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flwr.serverapp import Grid
from torch import Tensor
from torch.profiler import record_function

from fedlora.adapters import AdapterState
from fedlora.adapters.kinds import base as kinds
from fedlora.adapters.kinds.base import AdapterKind, as_factors
from fedlora.adapters.kinds.registry import KINDS
from fedlora.adapters.sketched_sum import Sketch
from fedlora.common.errors import ConfigError, FedLoraError, RunError, StrategyError
from fedlora.common.events import emit
from fedlora.config import Config, clients_per_round
from fedlora.data import prepare
from fedlora.exchange import Broadcast, ClientInfo, ClientUpdate
from fedlora.models import adapted, base_fingerprint, check_length, injection, parts
from fedlora.models.weights import weight_of
from fedlora.results.record import RunRecord
from fedlora.tasks.registry import check_task, task_of

from ..allocations.registry import Ranks
from ..base import ServerState, Strategy
from ..checks.clients import check, check_evaluation, check_places
from ..checks.privacy import check_private, multiplies_noise, releases
from ..checks.sums import check_summed_ranks
from ..configured import configured
from ..initializers.allocated import Allocated
from ..initializers.base import Initializer
from ..initializers.from_weights import Bound, FromWeights
from ..initializers.registry import initializer
from ..initializers.uniform import seeded
from ..registry import NAMES, naming_others
from ..server import clock, guard, privacy, returned, saved_state
from ..server.classes import out_of_order
from ..server.collect import TrainRound, evaluate_on_clients
from ..server.diagnostics import Diagnosis, diagnose
from ..server.evaluation import HeldOutEvaluator
from ..server.flights import Flight, Flights
from ..server.flights import saved as saved_flights
from ..server.overlapping import OverlappingRound, Rules
from ..server.returned import NotFiniteError
from ..server.roster import Meeting, Roster
from ..server.sampling import drawn
from ..server.secure import SecureRound
from ..server.summing import SummingRound
from ..server.sums import sketch_of, summed
from ..tools.shelf import Shelf
from ..wrappers.wrapper import innermost

# A round's diagnosis needs every update at once; with more clients than this, memory and time matter more.
_MAX_DIAGNOSED = 32
_log = logging.getLogger("fedlora")


@dataclass
class Session:
    """A run, made once from its config; a schedule plays it.

    Attributes:
        state: what the next round starts from.
        done: the last round that is complete; 0 before round 1.
        frozen: the base with its weights, where the adapter kind makes fixed tensors of them; else None.
        previous: what the last round was played from, and how far each client moved in it; None where nothing is
            known that the run could be taken back to.
        flights: the clients that train while rounds go on; None under a schedule whose rounds wait for all.
        rules: with `flights`, when a round ends.
    """

    grid: Grid
    config: Config
    record: RunRecord
    strategy: Strategy
    initializer: Initializer
    ranks: Ranks
    kind: AdapterKind
    base: injection.Shapes
    fingerprint: str
    meeting: Meeting
    evaluator: HeldOutEvaluator | None
    state: ServerState
    done: int
    frozen: adapted.AdaptedModel | None = None
    previous: tuple[ServerState, Mapping[int, float]] | None = None
    flights: Flights | None = None
    rules: Rules | None = None

    @classmethod
    def open(cls, grid: Grid, config: Config, record: RunRecord, run_id: int) -> Session:
        """Meet the clients, and take the run up where it was left, or before its first round.

        Raises:
            RunError: fewer clients than `federation.min-clients` connected.
            StrategyError: the strategy cannot serve these clients, or nobody could evaluate what it learns.
            ConfigError: the engine cannot do what the configuration asks for.
        """
        if config.federation.traces != "equal" and not clock.is_virtual(grid):
            raise ConfigError(
                f"federation.traces = {config.federation.traces}: only the local engine on one device has a virtual "
                "clock, and here clients take the time that they need; leave it out, or run without --server, "
                "--devices and --engine flower"
            )
        check_task(config)
        strategy = configured(config)
        with naming_others():
            chosen = initializer(config.lora, strategy)
        kind = KINDS.make(config.lora.kind, config.lora.kind_options)
        check_evaluation(config, strategy)
        base = _base(config)
        fingerprint = base_fingerprint(config.model)
        saved = saved_state.load(record.folder / "state", record.key, config.run.from_round)
        if not saved:
            chosen.check(base, fingerprint)
        if saved and config.run.from_round >= 0:  # first what is served, and the later states last of all
            served = strategy.global_adapter(saved[0])
            record.save_adapter(_factored(served, kind, base, _frozen(config, kind)))
        record.go_on(saved and saved[1])
        evaluates = config.evaluate.server and not strategy.personal
        if saved:
            saved_state.drop_after(record.folder / "state", saved[1])
        ranks = Ranks.of(
            config.lora, base.lora, saved and saved_state.load_learned(record.folder / "state", record.key)
        )
        meeting = Meeting(grid, config, fingerprint, _classes(config, evaluates), ranks.give)
        meeting.begin()
        clients = list(meeting.roster.infos.values())
        check(strategy, clients, config.lora)
        check_places(clients, config.lora, base.lora)
        check_private(strategy, config)
        check_summed_ranks(strategy, clients, config)
        if said := out_of_order(base.classes, clients[0].class_names):
            raise ConfigError(said)
        record.start(clients, fingerprint, base.facts(), clients[0].class_names)
        if promise := privacy.facts(config, clients, releases(strategy)):
            record.promises(promise)
            _log.info("privacy: %s", promise["mechanism"])
            for sentence in privacy.warnings(config, clients, multiplies_noise(strategy)):
                _log.warning("%s", sentence)
        before = -1 if chosen.statistic or ranks.rule.statistic else 0
        state, done = saved or (saved_state.plain(strategy.init(seeded(config, clients, base))), before)
        state = _as_configured(state, config)
        evaluator = HeldOutEvaluator(config, run_id) if evaluates else None
        session = cls(
            grid, config, record, strategy, chosen, ranks, kind, base, fingerprint, meeting, evaluator, state, done
        )
        if isinstance(chosen, FromWeights):
            session.initializer = Bound(chosen, session._weight)
        if ranks.rule.statistic:
            session.initializer = Allocated(session.initializer, ranks.rule, session._settle)
        if clock.is_virtual(grid):
            _go_on(clock.of(grid), meeting.roster, record.data["rounds"])
        session.frozen = _frozen(config, kind)
        session._baseline(new=saved is None)
        return session

    def _baseline(self, new: bool) -> None:
        """Round 0 in the record: the untouched base."""
        if self.strategy.personal:
            _log.info(
                "no evaluation on held-out rows: there is no model without a client's own %s",
                " and ".join(sorted(self.strategy.personal)),
            )
        if self.evaluator:
            if new:
                learned = self.strategy.global_adapter(self.state)
                self.record.baseline(self.evaluator(self.strategy, self.state, learned))
            found = self.record.data
            by = {"by": found["baseline-by"]} if "baseline-by" in found else {}
            emit("baseline", metrics=found["baseline"], head=self.base.words, **by)
        elif self.config.evaluate.by:
            _log.warning(
                "evaluate.by = %r has no effect on the rounds of this run, since the server evaluates nothing in them",
                self.config.evaluate.by,
            )
        if self.done == self.rounds:  # died after its last round
            self._save(self.strategy.global_adapter(self.state))

    @property
    def rounds(self) -> int:
        """The last round of the run."""
        return self.config.federation.rounds

    def begin(self) -> None:
        """Make the start of round 1; the clients are asked in a round 0 where the initializer wants to know of them.

        That round differs in the clients' job alone: it is recorded like any round, and nothing is evaluated after it.
        """
        while self.done < 0:
            self.play(0)
        if self.done == 0 and not self.initializer.statistic:
            self.state = saved_state.plain(self.strategy.begin(self.state, (), self.initializer))

    def _weight(self, module: str) -> Tensor:
        """A weight of the base model, with which it computes; the model is loaded when the first is asked for."""
        model = adapted.adapted_model(self.config.model, self.config.lora)
        adapted.merge_folds(model, None, ())
        return weight_of(model.layers[module])

    def _settle(self, learned: dict[str, Tensor]) -> AdapterState:
        """Give all clients the ranks that the allocation learned, and return LoRA's own start at them."""
        self.ranks.learned = learned
        self.meeting.give_ranks()
        clients = list(self.roster.infos.values())
        check(self.strategy, clients, self.config.lora)
        saved_state.save_learned(self.record.folder / "state", learned, self.record.key)
        spread = [client.rank_of(module) for client in clients for module in self.base.lora]
        modules = self.ranks.rule.modules(self.base.lora, learned)
        few = "" if modules is None else f", and {len(modules)} of {len(self.base.lora)} modules are trained"
        _log.info("lora.allocation = %s: ranks from %d to %d%s", self.ranks.name, min(spread), max(spread), few)
        return seeded(self.config, clients, self.base)

    def close(self) -> None:
        """The end of all rounds.

        Raises:
            RunError: a client was refused in every one of them.
        """
        if self.config.federation.lost_clients == "fail":
            _check_lost(self.record, self.roster, self.config)

    @property
    def roster(self) -> Roster:
        """Who takes part."""
        return self.meeting.roster

    def play(self, number: int) -> None:
        """One round; `done` stays as it was when the round is to be played again, without a client that spoiled it.

        Raises:
            RunError: too few clients answered.
            StrategyError: the strategy cannot go on.
        """
        seconds: dict[str, float] = {}
        began = time.perf_counter()
        config, before = self.config, self.state
        self._welcome(number)
        this = self._opened(number)
        chosen = self._chosen(this)
        emit("round-start", round=number, rounds=config.federation.rounds, clients=len(chosen))
        private = config.privacy.level != "none"
        if private:
            self.record.spends({client: self.roster.infos[client].num_examples for client in chosen})
        try:
            self.state = saved_state.plain(self._aggregate(before, this, chosen, seconds))
        except _EveryoneDivergedError as error:
            return self._take_back(number - 1, error)
        except NotFiniteError as error:
            return self._leave_out(this.moves, error, "this round begins again")
        finally:
            this.shelf.clear()
        self.previous = before, this.moves
        learned = self.strategy.global_adapter(self.state)
        with _clock(seconds, "diagnose"):
            diagnosed = this.keep and number > 0 and not self.strategy.personal
            numbers = diagnose(before, self.state, this.kept, this.sent) if diagnosed else Diagnosis()
        this.kept, this.sent = [], {}  # questions of this round that are still open keep it in memory
        entry = _entry(number, this, numbers) | this.facts()
        if private:
            entry["privacy"] = privacy.spent(config, self.record.data, self.state, releases(self.strategy))
        if number and (number == config.federation.rounds or number % config.evaluate.every == 0):
            with _clock(seconds, "evaluate"):
                self._evaluate(entry, learned, chosen if self.flights is None else sorted(this.answers), number)
        with _clock(seconds, "save"):
            self._save(learned)
        seconds["round"] = time.perf_counter() - began
        entry["seconds"] = seconds
        self.record.round(entry)
        with _clock(seconds, "checkpoint"):  # the last of a round: a round without it is played again
            self._checkpoint(number)
        emit("round-end", entry=entry)
        self.done = number

    def overlap(self, rules: Rules) -> None:
        """Let rounds end by these rules, while clients of earlier ones still train.

        In a run that is resumed, those that were training are asked again, each for the round in which it was. On a
        virtual clock each is asked at the time at which it was, and on this machine's clock now.

        Raises:
            RunError: what is needed to resume is not there.
        """
        self.rules, federation = rules, self.config.federation
        self.flights = Flights(self.grid, clock.of(self.grid), federation.round_timeout)
        folder = self.record.folder / "state"
        if self.done == 0:
            return self._checkpoint(0)
        now, training = saved_flights(folder, self.done)
        this, its_clock = self._opened(self.done), self.flights.clock
        assert isinstance(this, OverlappingRound)
        latest, before = self.state, dict[int, ServerState]()  # round -> the state that it began from
        its_clock.go(now)
        for client, number, asked in training:
            if client not in self.roster.infos or client in self.record.excluded:
                continue
            if number <= self.done and number not in before:
                found = saved_state.load(folder, self.record.key, number - 1)
                assert found is not None
                before[number] = _as_configured(found[0], self.config)
            self.state = before.get(number, latest)
            if clock.is_virtual(self.grid):
                its_clock.go(asked)
            this.depart(Flight(client, number, its_clock.now(), self._for(number)))
            self.state = latest
        if clock.is_virtual(self.grid):
            its_clock.go(now)

    def _opened(self, number: int) -> TrainRound:
        """A round before its first question, played from the present state."""
        config = self.config
        sketch = self._sketch(number)
        edges = any(info.edges for info in self.roster.infos.values())
        sums = config.wire.edges == "sum" and edges and number > 0  # statistics of round 0 come one by one
        # what is kept is for the diagnosis, which sketches say nothing of
        size = self.rules.size if self.rules else clients_per_round(len(self._present), config.federation.fraction)
        about: dict[str, Any] = {
            "keep": size <= _MAX_DIAGNOSED and sketch is None and not (config.privacy.secure_sum or sums),
            "shelf": Shelf(self.record.folder / "waiting" if sketch else None),
        }
        make: Callable[..., TrainRound] = TrainRound
        if config.privacy.secure_sum:
            make = partial(SecureRound, run=self.record.key, server=self.state.adapter)
        elif sums:
            make = SummingRound
        elif self.flights is not None and self.rules is not None and number:
            anew = innermost(self.strategy).anew
            make = partial(OverlappingRound, flights=self.flights, rules=self.rules, present=self._present, anew=anew)
        return make(self.grid, config, self.fingerprint, self.roster, number, self._for(number), **about)

    @property
    def _present(self) -> Sequence[int]:
        """The clients that may be asked, in the order of their ids."""
        excluded = self.record.excluded
        return [client for client in self.roster.ids if client not in excluded] if excluded else self.roster.ids

    def _chosen(self, this: TrainRound) -> list[int]:
        """The clients that are asked as a round begins."""
        if isinstance(this, OverlappingRound):
            return this.pick(this.rules.at_once - (len(this.flights.open) if this.rules.refill else 0))
        present = self._present
        count = clients_per_round(len(present), self.config.federation.fraction)
        draw = random.Random(f"{self.config.run.seed}/{this.number}")
        there, asleep = drawn(present, count, draw, this.awake)
        return sorted(there or asleep)

    def _welcome(self, number: int) -> None:
        """Clients that came since the last round take part from this one, where the strategy can serve them too."""
        came = self.meeting.welcome()
        for client in came:
            info = self.roster.infos[client]
            try:
                clients = list(self.roster.infos.values())
                check(self.strategy, clients, self.config.lora)
                check_summed_ranks(self.strategy, clients, self.config)
                self._for(number)(info)  # a rank beyond the server's, for instance
            except StrategyError as error:
                self.meeting.turn_away(client, str(error))
                continue
            self.record.joined(info, number)
            _log.info("client %d joins the run in round %d", client, number)
            emit("client-joined", client_id=client, node=self.roster.nodes[client], round=number)
        if self.flights is not None:  # clients may train that are back on another node, were turned away or left out
            gone = {*came} | self.record.excluded | (self.flights.open.keys() - self.roster.infos.keys())
            self.flights.give_up(self.flights.open.keys() & gone)

    def _for(self, number: int) -> Callable[[ClientInfo], Broadcast]:
        """What each client is sent in a round that starts from the present state."""
        state, key = self.state, self.record.key
        if number == 0:
            return lambda client: replace(self.initializer.ask(state.adapter, client), run=key)
        probe = parts.probe(self.frozen, state.adapter) if self.frozen else ()
        sketch = self._sketch(number)

        def sent(client: ClientInfo) -> Broadcast:
            made = self.ranks.narrow(self.strategy.broadcast(state, client, number))
            plan = replace(made.plan, terms=(*made.plan.terms, *self.initializer.terms), sketch=sketch)
            return replace(made, plan=plan, run=key, probe=probe)

        return sent

    def _sketch(self, number: int) -> Sketch | None:
        """How clients sketch their updates in this round; None where they send factors.

        If rounds overlap, all have the same signs, since sketches of several of them are added up.
        """
        signs = min(number, 1) if self.flights else number
        return sketch_of(self.config, innermost(self.strategy), self.state.adapter, signs)

    def _evaluate(self, entry: dict[str, object], learned: AdapterState, chosen: Sequence[int], number: int) -> None:
        if self.evaluator:
            found = self.evaluator(self.strategy, self.state, learned)
            entry["heldout"] = found.metrics
            if found.by:
                entry["heldout-by"] = found.by
            if self.evaluator.spectra:
                entry["intruders"] = self.evaluator.spectra.counts()
        if self.config.evaluate.clients:
            entry["client-test"] = evaluate_on_clients(
                self.grid,
                self.config,
                self.fingerprint,
                self.roster,
                chosen,
                number=number,
                make_broadcast=self._for(number + 1),
            )

    def _save(self, learned: AdapterState) -> None:
        """Everything learned, as factors on the untouched base."""
        self.record.save_adapter(_factored(learned, self.kind, self.base, self.frozen))

    def _aggregate(
        self, state: ServerState, this: TrainRound, chosen: Sequence[int], seconds: dict[str, float]
    ) -> ServerState:
        """The next state, or RunError when too few clients answered."""
        least, name = self.config.federation.min_clients, self.config.strategy.name
        began = time.perf_counter()
        arrived = this.trusted(chosen)
        if sketch := self._sketch(this.number):
            arrived = summed(this, sketch, self.record.key, arrived)
        first = next(arrived, None)
        with record_function("fedlora/aggregation"):
            made = state if first is None else self._made(state, _chain(first, arrived), this.number)
        wanted = this.expected(chosen)
        if len(this.answers) < min(least, wanted) or first is None:
            why = "; ".join(list(this.failures.values())[:3])
            else_enough = len(this.answers) + len(this.diverged) >= min(least, wanted)
            raise (_EveryoneDivergedError if this.diverged and else_enough else RunError)(
                f"round {this.number}: {len(this.answers)} of {wanted} clients answered, and "
                f"federation.min-clients = {least}: {why}"
            )
        new = returned.check(name, state, made, this.number)
        if this.number:
            share = this.number / self.rounds
            adapter = kinds.after_round(state.adapter, new.adapter, self.kind, self.base.lora, share)
            new = replace(new, adapter=self.ranks.rule.after_round(adapter, self.ranks.learned or {}))
        seconds["encode"], seconds["decode"] = this.encode_seconds, this.decode_seconds
        seconds["clients"] = this.wait_seconds
        seconds["aggregate"] = time.perf_counter() - began - sum(seconds.values())
        return new

    def _made(self, state: ServerState, updates: Iterator[ClientUpdate], number: int) -> ServerState:
        """What a strategy makes of a round's replies; what goes wrong in a user's own is named as theirs."""
        name = self.config.strategy.name
        try:
            with naming_others():
                if number == 0:
                    return self.strategy.begin(state, updates, self.initializer)
                return self.strategy.aggregate(state, updates, number)
        except FedLoraError:
            raise
        except Exception as error:
            if name in NAMES:
                raise
            raise StrategyError(
                f"strategy.name = {name!r}: its aggregate failed in round {number}: {type(error).__name__}: {error}"
            ) from error

    def _checkpoint(self, number: int) -> None:
        folder, also = self.record.folder / "state", set[int]()
        if self.flights is not None:
            also = self.flights.save(folder, number, self.config.run.keep)
        saved_state.save(folder, self.state, number, self.record.key, keep=self.config.run.keep, also=also)

    def _take_back(self, number: int, error: _EveryoneDivergedError) -> None:
        """Go on from before the last round, whose result no client could train on."""
        if self.previous is None:
            raise error
        state, moves = self.previous
        self._leave_out(moves, error, f"the run goes on from before round {number}", undone=number)
        self.state, self.previous = state, None
        self._save(self.strategy.global_adapter(state))
        self._checkpoint(number)

    def _leave_out(self, moves: Mapping[int, float], error: FedLoraError, then: str, undone: int | None = None) -> None:
        """Go on without the client whose update is held to have spoiled a round, or raise where none stands out."""
        client = None if self.config.privacy.level == "client" else guard.suspect(moves)
        if client is None:  # with privacy of clients, none may be left out for what it sent
            raise error
        reason = f"client {client} is left out from now on, and {then}: its update was by far the largest, and {error}"
        _log.warning("%s", reason)
        self.record.exclude(client, reason, undone)


def _as_configured(state: ServerState, config: Config) -> ServerState:
    """The state with what the run's config says: the seed, and the limits of the folds."""
    compact = config.anchor.base_update == "anchor"
    folds = replace(state.folds, max_rank=config.anchor.max_rank, compact=compact)
    return replace(state, seed=config.run.seed, folds=folds)


def _entry(number: int, this: TrainRound, numbers: Diagnosis) -> dict[str, object]:
    """A round in the record."""
    coded = this.config.wire.upload_dtype != "fp32"
    return {
        "round": number,
        "train-loss": this.mean("train-loss"),
        "clients": this.weighed(),
        "failures": this.failures,
        "refused": sorted(this.refused),
        "upload-bytes": this.upload_bytes,
        "download-bytes": this.download_bytes,
        **({"borders": dict(sorted(this.borders.items()))} if this.borders else {}),
        "aggregation-error": numbers.error,
        "sketch-loss": this.sketch_loss,
        "drift": numbers.drift,
        "update-cosine": numbers.update_cosine,
        "tail-energy": numbers.tail_energy,
        "effective-rank": numbers.effective_rank,
        "codec-error": this.mean("codec-error") if coded else None,
        "train-cut": this.mean("train-cut"),
        "norms": numbers.norms,
    }


class _EveryoneDivergedError(RunError):
    """A round failed since its clients had no finite loss."""


def _check_lost(record: RunRecord, roster: Roster, config: Config) -> None:
    """Raises RunError when a client was never counted for a reason that is no accident."""
    counted: set[int] = set()
    reasons: dict[int, str] = {}
    for entry in record.data["rounds"]:
        counted |= {int(client) for client in entry["clients"]}
        failures = {int(client): reason for client, reason in entry["failures"].items()}
        reasons |= {client: failures[client] for client in entry.get("refused", ())}
    lost = [reasons[client] for client in sorted(reasons.keys() - counted)]
    if len(roster.infos) < config.federation.clients:
        lost += roster.refusals
    if lost:
        more = f"; and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise RunError(
            f"all {config.federation.rounds} rounds are done and the adapter is saved, but without a client that was "
            f"refused every time: {'; '.join(lost[:3])}{more}; mend that, or set federation.lost-clients = accept"
        )


def _go_on(time_of_run: clock.Clock, roster: Roster, rounds: Sequence[Mapping[str, Any]]) -> None:
    """Set the virtual time after these rounds, and which folds each client's device has then."""
    for entry in rounds:
        time_of_run.go(entry.get("time", 0.0))
        for client, about in entry["clients"].items():
            if (info := roster.infos.get(int(client))) and "base-version" in about:
                roster.infos[int(client)] = replace(info, known_base_version=about["base-version"])


def _frozen(config: Config, kind: AdapterKind) -> adapted.AdaptedModel | None:
    """The base with its weights, where the kind makes fixed tensors of them."""
    if not kind.needs_weight:
        return None
    if not config.evaluate.server:
        _log.info(
            "lora.kind = %s: the server loads the base's weights, which its fixed tensors come from", config.lora.kind
        )
    return adapted.adapted_model(config.model, config.lora)


def _factored(
    learned: AdapterState, kind: AdapterKind, base: injection.Shapes, frozen: adapted.AdaptedModel | None
) -> AdapterState:
    """An adapter of any kind as factors."""
    return parts.factored(frozen, learned) if frozen else as_factors(learned, kind, base.lora)


def _base(config: Config) -> injection.Shapes:
    """The base's shapes, once it is seen that the run can be on it."""
    base = injection.shapes(config.model, config.lora)
    check_length(base.longest, config)
    return base


def _classes(config: Config, evaluates: bool) -> tuple[str, ...] | None:
    """What the server calls the classes; None where it does not read its rows."""
    task = task_of(config.model)
    return task.class_names(prepare(config).rows, config.data) if task.classes and evaluates else None


def _chain(first: ClientUpdate, rest: Iterator[ClientUpdate]) -> Iterator[ClientUpdate]:
    yield first
    yield from rest


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    with record_function(f"fedlora/{name}"):
        yield
    seconds[name] = time.perf_counter() - began
