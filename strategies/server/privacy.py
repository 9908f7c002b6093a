"""The privacy that a run has spent, for its record: it is counted for all clients that were asked, answered or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.config import Config, clients_per_round
from fedlora.exchange import ClientInfo
from fedlora.exchange.privacy import Mechanism, mechanism

from ..base import ServerState
from ..wrappers.client_noise import CLEARNESS, MEMORY


def facts(config: Config, clients: Sequence[ClientInfo], releases: int) -> dict[str, Any] | None:
    """The mechanism of a run in words and numbers; None without `privacy.level`.

    Args:
        config: of the run.
        clients: all of it.
        releases: number of sums with noise in each round, at the level of clients.

    Raises:
        ConfigError: the accountant's library is not installed, or no noise gives the run's epsilon.
    """
    if config.privacy.level == "none":
        return None
    made = [_of(config, client.num_examples, releases) for client in clients]
    noise = sorted({one.noise_multiplier for one in made})
    return {
        "level": config.privacy.level,
        "mechanism": _words(config, made),
        "delta": config.privacy.delta,
        "clip": config.privacy.clip,
        "noise-multiplier": noise[-1],
        "least-noise-multiplier": noise[0],
    }


def warnings(config: Config, clients: Sequence[ClientInfo], both: bool) -> list[str]:
    """What makes the promise smaller than it looks, a sentence each.

    Args:
        config: of the run.
        clients: all of it.
        both: rounds train both A and B.
    """
    level, delta = config.privacy.level, config.privacy.delta
    if level == "none":
        return []
    found: list[str] = []
    protected = len(clients) if level == "client" else min(client.num_examples for client in clients)
    if delta * protected >= 1:
        found.append(
            f"privacy.delta = {delta:g} is not below 1 over {protected}, the number of "
            f"{'clients' if level == 'client' else 'rows of the smallest client'}, so that the promise allows one of "
            "them to be published whole; lower it"
        )
    if both:
        found.append(
            f"privacy.level = {level} with strategy.name = {config.strategy.name}: A and B both get noise, and their "
            "product has the product of both noises; ffa and rolora train one factor at a time"
        )
    if level == "client" and config.federation.max_move:
        found.append(
            "federation.max-move is not applied with privacy.level = client, since no client may decide whether "
            "another one counts"
        )
    return found


def spent(config: Config, record: Mapping[str, Any], state: ServerState, releases: int) -> dict[str, Any]:
    """A round's entry: epsilon so far, and with noise from the server what its sum showed.

    Args:
        config: of a run with `privacy.level`.
        record: the content of its result.json, with all clients that were ever asked, and how often, also in rounds
            that were played again.
        state: after the round.
        releases: as in `facts`.
    """
    so_far = record["privacy"]
    if config.privacy.level == "example":
        each = {(_of(config, so_far["rows"][client]), n) for client, n in so_far["participations"].items()}
        return {"epsilon": max(made.epsilon(n) for made, n in each), "delta": config.privacy.delta}
    made = _of(config, 1, releases)
    held = (
        {name: float(value) for name, value in state.memory[MEMORY].tensors.items()} if MEMORY in state.memory else {}
    )
    of_modules = {n.removeprefix(CLEARNESS): value for n, value in held.items() if n.startswith(CLEARNESS)}
    told = {"clip": held.get("used"), "clipped": held.get("clipped")} if held else {}
    return {
        "epsilon": made.epsilon(so_far["releases"]),
        "delta": config.privacy.delta,
        **told,
        **({"signal-to-noise": of_modules} if of_modules else {}),
    }


def _of(config: Config, num_examples: int, releases: int = 1) -> Mechanism:
    made = mechanism(config, num_examples, releases)
    assert made is not None
    return made


def _words(config: Config, made: Sequence[Mechanism]) -> str:
    privacy = config.privacy
    if privacy.level == "client":
        asked = clients_per_round(config.federation.clients, config.federation.fraction)
        one = "one release a round"
        two = "two releases a round, of a sketch of the products' sum and of its projection"
        releases = one if made[0].per_round == 1 else two
        if privacy.weight_cap:
            releases += f", in which a client with n rows weighs min(1, n / {privacy.weight_cap})"
        moving = f", moved towards the {privacy.clip_quantile:g} quantile of the norms" if privacy.clip_quantile else ""
        return (
            f"Gaussian noise from the server on the sum of the clients' changes, each clipped to norm "
            f"{privacy.clip:g}{moving}, divided by {asked}; {releases}, without amplification by sampling; "
            "neighbours: two runs of which one lacks all that one client would have sent"
        )
    rates = sorted({one.rate for one in made})
    span = f"{rates[0]:g}" if len(rates) == 1 else f"{rates[0]:g} to {rates[-1]:g}"
    return (
        f"DP-SGD on each client: each row's gradient clipped to norm {privacy.clip:g}, Gaussian noise from the client "
        f"in each step, rows drawn for each step by Poisson sampling at rate {span}; epsilon is that of the client "
        "with the largest; neighbours: two clients' data of which one lacks one row"
    )
