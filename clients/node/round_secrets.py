"""What a client keeps of a secure sum between the phases of one round: its secrets, and what it has answered.

It is one file per run and client, which only the node's user may read. The next round's secrets replace it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedlora.common.errors import DataError
from fedlora.common.files import replacing
from fedlora.exchange.secure.keys import PublicKeys, RoundSecrets

NAME = "secure-sum.json"


@dataclass(frozen=True, repr=False)
class Kept:
    """A client's side of one try of a round.

    Args:
        session: names the try.
        secrets: drawn for it.
        public: the neighbours' public keys, once they are known.
        letters: what was written to each of them. Other shares would be encrypted with the same keys.
        sent: SHA-256 of the masked numbers that were sent, in hexadecimal; empty before that. Other numbers under the
            same masks would tell how the two differ, and the same numbers under fewer masks what a mask is.
        opened: of which clients a share was opened, and of which secret: "self-mask" or "masking"; empty before that.
    """

    session: str
    secrets: RoundSecrets
    public: Mapping[int, PublicKeys] = field(default_factory=dict)
    letters: Mapping[int, bytes] = field(default_factory=dict)
    sent: str = ""
    opened: Mapping[int, str] = field(default_factory=dict)


def load(folder: Path, session: str) -> Kept | None:
    """What is kept of this session; None if nothing is, or only something of another one.

    Raises:
        DataError: the file cannot be read.
    """
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["session"] != session:
            return None
        own = found["secrets"]
        secrets = RoundSecrets(own["context"].encode(), *(bytes.fromhex(own[each]) for each in _SECRETS))
        public = {int(other): PublicKeys(*map(bytes.fromhex, keys)) for other, keys in found["public"].items()}
        letters = {int(other): bytes.fromhex(letter) for other, letter in found["letters"].items()}
        opened = {int(other): which for other, which in found["opened"].items()}
        return Kept(session, secrets, public, letters, found["sent"], opened)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: cannot be read: {error}; remove it, and this client waits for the next round"
        ) from None


def save(folder: Path, kept: Kept) -> None:
    """Store it in place of what was there. The file is complete or absent, whatever happens."""
    secrets = kept.secrets
    content = {
        "session": kept.session,
        "secrets": {"context": secrets.context.decode(), **{each: getattr(secrets, each).hex() for each in _SECRETS}},
        "public": {
            str(other): [keys.masking.hex(), keys.letters.hex(), keys.self_mask.hex()]
            for other, keys in kept.public.items()
        },
        "letters": {str(other): letter.hex() for other, letter in kept.letters.items()},
        "sent": kept.sent,
        "opened": {str(other): which for other, which in kept.opened.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / NAME) as part:
        part.touch(0o600)
        part.write_text(json.dumps(content), encoding="utf-8")


_SECRETS = ("masking", "letters", "self_mask")
