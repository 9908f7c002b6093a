"""The keys of other nodes that a node's config names."""

import os

import pytest

from fedlora.clients.node import peers, rules
from fedlora.common.errors import ConfigError
from fedlora.deployment import certificates


def test_files_and_folders_are_read_and_the_own_key_belongs_to_them(tmp_path):
    certificates.make(tmp_path / "all", nodes=["north", "south"])
    certificates.make_key(tmp_path / "own")
    named = os.pathsep.join([str(tmp_path / "all"), str(tmp_path / "own.pub")])
    found = peers.of({"peers": named, "key": str(tmp_path / "own")})
    assert found is not None
    assert [certificates.fingerprint(key) for key in found.others[2:]] == [
        certificates.fingerprint(found.own.public_key())
    ]
    assert len(found.others) == 3
    assert peers.of({"key": str(tmp_path / "own")}) is None


def test_what_is_no_key_is_refused_before_the_node_starts(tmp_path):
    (tmp_path / "text.pub").write_text("hello")
    (tmp_path / "empty").mkdir()
    for named, why in (
        (str(tmp_path / "nobody.pub"), "nobody.pub has no public key of a node: .*No such file"),
        (str(tmp_path / "text.pub"), "text.pub has no public key of a node"),
        (str(tmp_path / "empty"), r"the folder .*empty has no file \*.pub"),
        (3, "= 3, expected files with public keys"),
    ):
        with pytest.raises(ConfigError, match=f"node config: peers.*{why}"):
            rules.check({"peers": named})


def test_a_node_with_peers_and_no_key_of_its_own_is_told_so(tmp_path):
    certificates.make_key(tmp_path / "north")
    with pytest.raises(ConfigError, match="peers needs the node's private key, which fedlora key makes"):
        peers.of({"peers": str(tmp_path / "north.pub")})
