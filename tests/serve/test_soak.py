"""The short form of ``soak.py``, which see."""

from tests.serve import soak

NAMES = ["tiny", "tiny-alias", "one", "two"]
# With the four rows and eight waiting of this server nobody is refused: a request whose client has gone counts until
# the server has seen that.
CLIENTS = 6


def test_clients_that_ask_stop_go_and_send_nonsense(server):
    expected = soak.fingerprint(server.port, NAMES, rows=4)
    seen = soak.run(server.port, NAMES, CLIENTS, requests=50)
    assert seen.faults == []
    assert seen.kinds.total() == 50 and set(seen.kinds) == set(soak.KINDS)
    assert soak.settled(server.port) == []
    assert soak.fingerprint(server.port, NAMES, rows=4) == expected
    assert "Traceback" not in server.said()
