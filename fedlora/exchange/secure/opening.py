"""What is left of the masks in a sum, computed from the shares that the clients opened."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from fedlora.common.errors import WireError

from . import masks
from .keys import PublicKeys, fingerprint, public_of, same
from .neighbours import threshold_of
from .numbers import Words
from .sharing import combine

# Client id -> what each of its neighbours opened: id of the neighbour -> its share.
Opened = Mapping[int, Mapping[int, bytes]]


@dataclass(frozen=True)
class Participants:
    """Who masked with whom in a round.

    Args:
        context: of the round.
        public: the public keys of all clients that sent some.
        holders: client id -> the neighbours among which it split its secrets; of the clients that did.
    """

    context: bytes
    public: Mapping[int, PublicKeys]
    holders: Mapping[int, Collection[int]]

    def masked_with(self, client: int) -> dict[int, bytes]:
        """Id -> public masking key of the neighbours with which this client masks: those that split their secrets."""
        return {j: self.public[j].masking for j in sorted(self.holders[client]) if j in self.holders}

    def unmasked(self, total: Words, arrived: Collection[int], opened: Opened, part: int = 0) -> Words:
        """The sum of the numbers themselves.

        Args:
            total: sum of the masked numbers of the clients that arrived.
            arrived: these clients.
            opened: of clients that arrived the shares of their self-masks; of the others the shares of their masking
                keys.
            part: number of the sum in its round.

        Raises:
            WireError: too few shares of a secret were opened, or a share is false; the message names the client.
        """
        total = total.copy()
        for client, secret in self.secrets(arrived, opened).items():
            if client in arrived:
                total -= masks.of_self(secret, self.context, len(total), part)
                continue
            for other in self.masked_with(client):
                if other in arrived:  # what the other has added for the client that is missing
                    theirs = self.public[other].masking
                    total -= masks.between(
                        other, client, secret, theirs, context=self.context, count=len(total), part=part
                    )
        return total

    def secrets(self, arrived: Collection[int], opened: Opened) -> dict[int, bytes]:
        """The secret of each client's self-mask if it arrived, or else of its masking key; see `unmasked`."""
        found: dict[int, bytes] = {}
        for client, holders in sorted(self.holders.items()):
            if client not in arrived and not any(other in arrived for other in self.masked_with(client)):
                continue
            try:
                secret = combine(opened.get(client, {}), [*holders], threshold_of(len(holders)))
            except WireError as error:
                raise WireError(f"client {client}: {error}") from None
            if client in arrived:
                true = same(fingerprint(secret, self.context), self.public[client].self_mask)
            else:
                true = same(public_of(secret, self.context, "masking"), self.public[client].masking)
            if not true:
                holding = ", ".join(map(str, sorted(opened[client])))
                raise WireError(
                    f"client {client}: a share of its secret is false; it was opened by one of the clients {holding}, "
                    "or the client itself has sent false shares"
                )
            found[client] = secret
        return found
