"""The client of chat servers: every fault of a server is waited out or told, and none changes an answer."""

import json
import socket
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest
from judge_server import Reply, digest, message, scores, serving
from tenacity.wait import wait_random_exponential

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.rewards import chat
from rcgrpo_jax.rewards.chat import Chat
from rcgrpo_jax.rewards.endpoint import Fault, parse_urls, read_token

FINE = scores(20, 22)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """What a server is given to recover, cut down."""
    monkeypatch.setattr(chat, "REST", 0.01)
    monkeypatch.setattr(chat, "_BACKOFF", wait_random_exponential(multiplier=0.005, max=0.05))


def connect(*urls: str, token: str = "", in_flight: int = 8, timeout: float = 20.0, attempts: int = 3, patience=20.0):
    return Chat(urls, token, in_flight=in_flight, timeout=timeout, attempts=attempts, patience=patience)


def ask(client: Chat, number: int = 0) -> str:
    return client.run(client.complete({"number": number})).result()["message"]["content"]


def ask_all(client: Chat, count: int) -> list[str]:
    started: list[Future] = [client.run(client.complete({"number": i})) for i in range(count)]
    return [x.result()["message"]["content"] for x in started]


def named(body: dict, attempt: int) -> Reply:
    return message(f"answer {body['number']}")


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_requests_under_way_are_bounded_and_shared_by_the_servers():
    gate = threading.Barrier(6)

    def held(body: dict, attempt: int) -> Reply:
        gate.wait(60)  # until six are there at once
        return named(body, attempt)

    with serving(held) as one, serving(held) as other:
        answers = ask_all(connect(one.url, other.url, in_flight=6), 18)
    assert answers == [f"answer {i}" for i in range(18)]
    assert (one.most, other.most) == (3, 3)


def test_a_connection_is_kept():
    with serving(named) as server:
        client = connect(server.url, in_flight=2)
        for i in range(10):
            ask(client, i)
        assert server.connections == 1


ELSEWHERE = "http://elsewhere"  # replaced by another server


@pytest.mark.parametrize("fault", [
    Reply(b'{"error": "overloaded"}', 500),
    Reply(b"", 503),
    Reply(b"slow down", 429, {"Retry-After": "0"}),
    Reply(b"slow down", 429, {"Retry-After": "soon"}),
    Reply(FINE.content, cut=True),
    Reply(absent=True),
    Reply(FINE.content[:40]),
    Reply(b"<html>Bad Gateway</html>"),
    Reply(b'{"choices": []}'),
    Reply(b'{"choices": ' + b"[" * 200 + b"]" * 200 + b"}"),
    Reply(b"\xff\xfe"),
    Reply(b" " * 65536, endless=True),
    Reply(b"", 307, {"Location": ELSEWHERE}),
    Reply(FINE.content, delay=2.5),
], ids=["500", "503", "429", "429-later", "cut", "closed", "truncated", "html", "empty", "nested", "bytes", "endless",
        "redirect", "time-out"])  # fmt: skip
def test_a_request_that_a_server_fails_at_is_sent_again(fault):
    with serving() as elsewhere:
        headers = {name: value.replace(ELSEWHERE, elsewhere.url) for name, value in fault.headers.items()}
        fault = fault._replace(headers=headers)
        with serving(lambda body, attempt: fault if attempt == 1 else FINE) as server:
            client = connect(server.url, token="secret", timeout=2.0 if fault.delay else 20.0)
            assert json.loads(ask(client))["score"] == [20, 22]
            assert client.metrics(["retries"])["retries"] == 1
            assert server.bodies[0] == server.bodies[1]
        assert elsewhere.headers == []  # neither the request nor the token was sent there


def test_a_server_that_asks_for_time_is_left_alone():
    with serving(lambda *_: Reply(status=429, headers={"Retry-After": "1000"})) as full, serving(named) as other:
        client = connect(full.url, other.url)
        assert [ask(client, i) for i in range(10)] == [f"answer {i}" for i in range(10)]
        assert (len(full.bodies), len(other.bodies)) == (1, 10)


def test_what_a_dying_server_had_is_answered_by_another():
    def dying(body: dict, attempt: int) -> Reply:
        if len(one.bodies) == 4:
            one.die()
        return named(body, attempt)._replace(delay=0.05)

    with serving(dying) as one, serving(named) as other:
        assert ask_all(connect(one.url, other.url, in_flight=4), 30) == [f"answer {i}" for i in range(30)]


def test_servers_that_are_gone_are_waited_for():
    port = unused_port()
    client = connect(f"http://127.0.0.1:{port}/v1")
    asked = client.run(client.complete({"number": 3}))
    with pytest.raises(TimeoutError):
        asked.result(0.2)
    with serving(named, port):
        assert asked.result()["message"]["content"] == "answer 3"


def test_servers_that_stay_gone_end_the_run():
    client = connect(f"http://127.0.0.1:{unused_port()}/v1", patience=0.2)
    with pytest.raises(
        UserError, match=r"no server has answered for 0\.2 s; the last cause: .*no connection"
    ) as caught:
        ask(client)
    assert "goes on from the last checkpoint" in caught.value.remedy


def test_a_request_that_servers_always_fail_at_is_given_up():
    def reply(body: dict, attempt: int) -> Reply:
        return Reply(b'{"error": {"message": "no such \\u001b[31mpicture"}}', 500) if body["number"] == 1 else FINE

    with serving(reply) as server:
        client = connect(server.url, attempts=4)
        ask(client, 0)
        with pytest.raises(Fault, match=r"status 500: .*no such .*picture"):
            ask(client, 1)
        assert len(server.bodies) == 1 + 4


def test_a_request_that_no_server_has_room_for_waits_as_long_as_others_are_answered(monkeypatch):
    """Longer than the patience, which counts from the last answer."""
    clock, opened = [0.0], threading.Event()
    monkeypatch.setattr(chat, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + clock[0]))

    def reply(body: dict, attempt: int) -> Reply:
        return Reply(status=503) if body["number"] == 1 and not opened.is_set() else named(body, attempt)

    with serving(reply) as server:
        client = connect(server.url, patience=1000.0)
        stuck = client.run(client.complete({"number": 1}))
        for i in range(3):
            clock[0] += 600.0
            assert ask(client, 2 + i) == f"answer {2 + i}"
            asked = len(server.bodies)
            while len(server.bodies) < asked + 2:  # it is refused at this time too
                time.sleep(0.001)
        opened.set()
        assert stuck.result()["message"]["content"] == "answer 1"


def test_servers_that_take_requests_and_never_answer_are_gone():
    with serving(lambda *_: Reply(delay=1.0)) as server:
        client = connect(server.url, timeout=0.1, attempts=3, patience=0.3)
        with pytest.raises(UserError, match=r"no server has answered for .* no whole answer in 0\.1 s"):
            ask(client)


def test_answers_do_not_depend_on_the_faults_of_servers():
    def failing(body: dict, attempt: int) -> Reply:
        faults = [Reply(status=500), Reply(status=503), Reply(b"?"), Reply(FINE.content, cut=True)]
        lot = digest({"of": body, "attempt": attempt}, 20)
        return faults[lot] if lot < len(faults) else named(body, attempt)

    with serving(failing) as one, serving(failing) as other:
        client = connect(one.url, other.url, attempts=20)
        assert ask_all(client, 100) == [f"answer {i}" for i in range(100)]
        assert client.metrics(["retries"])["retries"] > 5


def test_the_token_is_sent_and_never_told(caplog):
    caplog.set_level("DEBUG")

    def refuse(body: dict, attempt: int) -> Reply:
        return Reply(f"{'':770}Incorrect key: {server.headers[-1]['Authorization']}".encode(), 401)

    with serving(refuse) as server:
        client = connect(server.url, token="sk-12345", attempts=2)
        with pytest.raises(Fault, match=r"status 401: Incorrect key: Bearer \*\*\*") as caught:
            ask(client)
        assert server.headers[0]["Authorization"] == "Bearer sk-12345"
    assert "12345" not in f"{caught.value!r} {caplog.text} {client!r}"


def test_the_environment_adds_no_proxy_and_no_password(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    with serving(named) as server:
        assert ask(connect(server.url)) == "answer 0"
        assert "Authorization" not in server.headers[0]


def test_what_a_client_measures_is_told_once():
    with serving(named) as server:
        client = connect(server.url)
        ask_all(client, 5)
        client.counts["unscored"] += 2
        found = client.metrics(["retries", "unscored"])
        assert set(found) == {"answers", "retries", "unscored", "seconds_p50", "seconds_p95", "seconds_max"}
        assert (found["answers"], found["retries"], found["unscored"]) == (5, 0, 2)
        assert 0 < found["seconds_p50"] <= found["seconds_p95"] <= found["seconds_max"]
        assert client.metrics(["unscored"])["unscored"] == 0


# Addresses and tokens


def test_addresses_are_a_list_with_commas():
    assert parse_urls(" http://a:8000/v1/ ,https://b/v1,http://a:8000/v1") == ["http://a:8000/v1", "https://b/v1"]


@pytest.mark.parametrize("text", [
    "", "localhost:8000", "ftp://a/v1", "http://", "http://a:x/v1", "http://a/v1,", "http://a:0/v1", "http://[a/v1",
])  # fmt: skip
def test_what_is_no_address_is_refused(text):
    with pytest.raises(UserError, match=r"^urls: .* found; addresses such as http://localhost:8000/v1"):
        parse_urls(text)


@pytest.mark.parametrize("text", ["http://me:secret@a/v1", "http://a/v1?key=secret", "http://a/v1#secret", "secret@b"])
def test_an_address_with_a_secret_is_not_told(text):
    with pytest.raises(UserError, match="more than host, port and path") as caught:
        parse_urls(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "two words", "line\n"])
def test_a_variable_without_a_token_is_refused_and_not_told(monkeypatch, value):
    monkeypatch.delenv("SK_12345", raising=False)
    if value is not None:
        monkeypatch.setenv("SK_12345", value)
    with pytest.raises(UserError, match="not set, empty, or has spaces") as caught:
        read_token("SK_12345")
    assert "12345" not in str(caught.value)


def test_a_token_is_read_where_one_is_named(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "abc")
    assert (read_token("JUDGE_TOKEN"), read_token("")) == ("abc", "")
