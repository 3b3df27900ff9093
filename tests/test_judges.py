"""Judges: what they are shown and asked, how answers are read, and that nothing but answers makes a score."""

import base64
import io
import json
import math
import re
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import small_run
from judge_server import Pairs, Reply, batch, be_quick, digest, make_judge, message, rate, scores, serving
from PIL import Image

from rcgrpo_jax import rewards
from rcgrpo_jax.errors import UsageError, UserError
from rcgrpo_jax.rewards import base, judge, pictures
from rcgrpo_jax.rewards.judge import Question, SampledJudge


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    be_quick(monkeypatch)


def decode(part: dict) -> np.ndarray:
    kind, data = part["image_url"]["url"].split(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def levels(picture) -> np.ndarray:
    return np.round(np.asarray(picture) * 255).astype(np.uint8)


# What is asked


def test_each_candidate_is_shown_after_its_source_with_its_instruction(monkeypatch):
    inputs, encoded = batch(), []
    encode = pictures.data_url
    monkeypatch.setattr(judge, "data_url", lambda picture: encoded.append(1) or encode(picture))
    with serving() as server:
        found = make_judge(server, temperature=0.5, top_p=0.8, max_tokens=9, seed=7).start(inputs).result()
        bodies = server.bodies
    assert found.shape == (2, 3)
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert len(encoded) == 2 + 2 * 3  # a source once
    shown = []
    for body in bodies:
        assert {name: x for name, x in body.items() if name != "messages"} == {
            "model": "tiny", "temperature": 0.5, "top_p": 0.8, "max_tokens": 9, "seed": 7,
        }  # fmt: skip
        (said,) = body["messages"]
        assert said["role"] == "user"
        *seen, text = said["content"]
        if text["text"] == "How good is it?":
            assert len(seen) == 1
            continue
        p = int(text["text"].removeprefix("Did it edit ").removesuffix("?"))
        before, after = map(decode, seen)
        np.testing.assert_array_equal(before, levels(inputs.source[p]))
        g = next(g for g in range(3) if (levels(inputs.edited[p, g]) == after).all())
        shown.append((p, g))
    assert sorted(shown) == [(p, g) for p in range(2) for g in range(3)]


def test_top_k_is_asked_for_where_it_is_set():
    with serving() as server:
        make_judge(server, top_k=20).start(batch(1, 1)).result()
        assert {body["top_k"] for body in server.bodies} == {20}


def test_a_template_is_text_and_pictures_in_its_order():
    parts = pictures.content_parts("<img1>: {source}<img2>: {edited}Do {instruction}: {x} {", "{edited}", "S", "E")
    assert parts == [
        {"type": "text", "text": "<img1>: "},
        {"type": "image_url", "image_url": {"url": "S"}},
        {"type": "text", "text": "<img2>: "},
        {"type": "image_url", "image_url": {"url": "E"}},
        {"type": "text", "text": "Do {edited}: {x} {"},
    ]


def test_a_judge_of_the_region_sees_its_box_with_a_margin():
    inputs = batch(1, 1, side=200)
    mask = np.zeros((1, 200, 200), np.float32)
    mask[0, 20:120, 100:160] = 1
    with serving() as server:
        make_judge(server, view="region", margin=0.1).start(inputs._replace(mask=mask)).result()
        *_, after = next(x["messages"][0]["content"] for x in server.bodies if len(x["messages"][0]["content"]) == 3)[
            :2
        ]
    np.testing.assert_array_equal(decode(after), levels(inputs.edited[0, 0, 10:130, 90:170]))


@pytest.mark.parametrize(("region", "box"), [
    ((slice(0, 0), slice(0, 0)), (0, 200, 0, 300)),  # none
    ((slice(0, 200), slice(0, 300)), (0, 200, 0, 300)),
    ((slice(100, 102), slice(100, 102)), (73, 129, 73, 129)),  # widened to the least size
    ((slice(0, 2), slice(298, 300)), (0, 56, 244, 300)),
    ((slice(100, 180), slice(10, 110)), (75, 200, 0, 135)),
])  # fmt: skip
def test_the_box_of_a_region(region, box):
    mask = np.zeros((200, 300), np.float32)
    mask[region] = 1
    rows, columns = pictures.region_box(mask, 0.25)
    assert (rows.start, rows.stop, columns.start, columns.stop) == box


def test_a_picture_that_is_not_finite_is_not_asked_about():
    inputs = batch(1, 3)
    inputs.edited[0, 1, 0, 0, 0] = np.nan
    with serving() as server:
        found = make_judge(server).start(inputs).result()
        assert len(server.bodies) == 2 * 2
    np.testing.assert_array_equal(np.isfinite(found), [[True, False, True]])


# What makes a score


def test_the_passes_of_a_question_have_seeds_of_their_own():
    with serving(lambda body, attempt: scores(body["seed"], 25)) as server:
        found = make_judge(server, num_pass=3, seed=5).start(batch(1, 1)).result()
        assert sorted(body["seed"] for body in server.bodies) == [5, 5, 6, 6, 7, 7]
    np.testing.assert_allclose(found, [[np.mean([5, 6, 7]) / 2.5]], rtol=1e-6)


def test_an_answer_that_cannot_be_read_is_asked_for_with_the_next_seed():
    def reply(body: dict, attempt: int) -> Reply:
        return scores(10, 20) if body["seed"] >= 42 + 4 else message("I'm sorry, I can't.")

    with serving(reply) as server:
        asking = make_judge(server, num_pass=2, asks=3)
        found = asking.start(batch(1, 1)).result()
        assert sorted(body["seed"] for body in server.bodies) == sorted(2 * [42, 43, 44, 45, 46, 47])
        assert asking.metrics()["asked_again"] == 8
    np.testing.assert_allclose(found, [[4.0]])


def test_scores_are_the_same_bit_for_bit_whatever_servers_fail_meanwhile():
    def sometimes_unreadable(body: dict, attempt: int = 1) -> Reply:
        return message("?") if digest({"unreadable": body}, 10) == 0 else rate(body)

    def failing(body: dict, attempt: int) -> Reply:
        lot = digest({"of": body, "attempt": attempt}, 10)
        return Reply(status=(500, 429)[lot]) if lot < 2 else sometimes_unreadable(body)

    inputs = batch(3, 8)
    with serving(sometimes_unreadable) as whole, serving(failing) as one, serving(failing) as other:
        wanted = make_judge(whole, num_pass=2).start(inputs).result()
        asking = make_judge(whole, num_pass=2, attempts=20, urls=f"{one.url},{other.url}")
        found = asking.start(inputs).result()
        measured = asking.metrics()
    assert len(np.unique(wanted)) > 10
    assert measured["retries"] > 5
    assert measured["asked_again"] > 1
    assert found.tobytes() == wanted.tobytes()


def test_a_candidate_without_an_answer_has_no_score_and_is_counted(caplog):
    inputs = batch(2, 3)
    lost = pictures.data_url(inputs.edited[1, 2])

    def reply(body: dict, attempt: int) -> Reply:
        urls = [x["image_url"]["url"] for x in body["messages"][0]["content"] if x["type"] == "image_url"]
        return message('{"reasoning": "it has 2 ears and') if lost in urls else rate(body)

    with serving(reply) as server:
        asking = make_judge(server)
        found = asking.start(inputs).result()
        assert asking.metrics()["unscored"] == 1
    np.testing.assert_array_equal(np.isfinite(found), [[True, True, True], [True, True, False]])
    assert caplog.messages[0].startswith("1 of 6 candidates have no score: no answer of 3 can be read; the last: ")


def test_without_any_answer_there_are_no_scores():
    with serving(lambda *_: Reply(b"no", 500)) as server, pytest.raises(rewards.Unscored, match="status 500: no"):
        make_judge(server, attempts=2).start(batch(1, 2)).result()


def test_a_token_that_is_answered_is_not_told(monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "sk-12345")
    with serving(lambda *_: message("Your token is sk-12345.")) as server:
        asking = make_judge(server, token_variable="JUDGE_TOKEN")
        with pytest.raises(rewards.Unscored, match=r"Your token is \*\*\*\."):
            asking.start(batch(1, 1)).result()


def test_servers_that_are_gone_are_the_users_business():
    with serving() as server:
        url = server.url
    asking = Pairs(urls=url, model="tiny", patience=0.2)
    with pytest.raises(UserError, match=r"reward 'mine': no server has answered for 0\.2 s"):
        rewards.start_all({"mine": asking}, batch(2, 4)).result()


def test_a_judge_that_ends_the_program_is_an_error_and_other_requests_go_on():
    @dataclass(frozen=True)
    class Leaving(SampledJudge):
        def questions(self):
            return (Question("{edited}", lambda choice: sys.exit("no scores today")),)

    with serving() as server:
        leaving = make_judge(server, Leaving)
        for _ in range(2):
            with pytest.raises(UserError, match=r"reward 'mine' failed: SystemExit: no scores today"):
                rewards.start_all({"mine": leaving}, batch(2, 3)).result()


# Options


@pytest.mark.parametrize(("options", "problem"), [
    ({}, r"model: none found; the name of the model on the servers was wanted\.\n"),
    ({"model": "m", "in_flight": 0, "view": "crop"}, r"in_flight: 0 found, .*\n  view: 'crop' found, 'whole' or"),
    ({"model": "m", "timeout": 0.0}, "timeout: 0.0 found, greater than 0 wanted"),
    ({"model": "m", "margin": math.nan}, "margin: nan found, a finite number wanted"),
    ({"model": "m", "urls": "here"}, "urls: 'here' found"),
    ({"model": "m", "token_variable": "NOT_SET_ANYWHERE"}, "token_variable: an environment variable"),
    ({"model": "m", "template": "/nowhere.txt"}, r"template: '/nowhere.txt' cannot be read \(No such file"),
])  # fmt: skip
def test_options_that_are_no_good_are_refused(options, problem):
    with pytest.raises(UsageError, match=f"(?s)reward 'vlm_digits': .*{problem}") as caught:
        rewards.make("vlm_digits", **options)
    assert caught.value.remedy


def test_options_of_a_rubric_that_are_no_good_are_refused(tmp_path):
    (tmp_path / "prompt.txt").write_text("Rate it.")
    with pytest.raises(
        UsageError, match=r"reward 'rubric': template: none found; a text file with a prompt was wanted"
    ):
        rewards.make("rubric", model="m")
    with pytest.raises(UsageError, match=r"has no \{edited\}"):
        rewards.make("rubric", model="m", template=str(tmp_path / "prompt.txt"))
    (tmp_path / "prompt.txt").write_text("Rate {edited}.")
    with pytest.raises(UsageError, match="highest: 1 found with lowest: 2"):
        rewards.make("rubric", model="m", template=str(tmp_path / "prompt.txt"), lowest=2.0, highest=1.0)


def test_a_description_has_what_makes_the_scores_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "sk-12345")
    (tmp_path / "prompt.txt").write_text("Rate {edited}.")
    options = {"model": "m", "template": str(tmp_path / "prompt.txt")}
    described = rewards.make("rubric", **options, urls="http://a/v1", token_variable="JUDGE_TOKEN").describe()
    assert json.loads(json.dumps(described)) == described
    assert described == rewards.make("rubric", **options, urls="http://b/v1", patience=1.0).describe()
    assert described != rewards.make("rubric", **options, temperature=1.0).describe()
    assert described["model"] == "m"
    assert not {"a/v1", "JUDGE_TOKEN", "sk-12345", str(tmp_path)} & set(map(str, described.values()))
    (tmp_path / "prompt.txt").write_text("Rate the {edited}.")
    assert rewards.make("rubric", **options).describe()["prompts"] != described["prompts"]


# The request before the first step


def refuses(status: int, text: str) -> Reply:
    return Reply(json.dumps({"error": {"message": text}}).encode(), status)


@pytest.mark.parametrize(("reply", "problem", "remedy"), [
    (refuses(404, "The model `tiny` does not exist."), "status 404: .*The model `tiny` does not exist", "/v1/models"),
    (refuses(400, "tiny is not a multimodal model"), "status 400: .*not a multimodal model", "sees two pictures"),
    (refuses(401, "no key"), "status 401: .*no key", "token_variable"),
    (Reply(b"loading", 503), "status 503: loading", "is ready"),
    (Reply(b"<html>Welcome</html>"), "no chat completion: <html>Welcome", "up to and with /v1"),
    (Reply(status=302, headers={"Location": "/login"}), "status 302: an empty answer", "at `urls` itself"),
    (message("What a nice picture!"), "http://.*: no answer of 3 can be read; .*a nice", "this reward was made for"),
])  # fmt: skip
def test_a_server_that_cannot_judge_is_told_before_the_run(reply, problem, remedy):
    with serving() as good, serving(lambda *_: reply) as bad:
        asking = make_judge(good, urls=f"{good.url},{bad.url}")
        with pytest.raises(UserError, match=f"reward 'mine': .*{problem}") as caught:
            rewards.check_all({"mine": asking})
        assert len(good.bodies) == 2  # each question once
    assert remedy in caught.value.remedy
    assert "\n" not in caught.value.problem + caught.value.remedy


def test_a_wrong_path_and_no_server_are_told_before_the_run():
    with serving() as server:
        with pytest.raises(UserError, match=r"status 404: .*Not Found") as caught:
            make_judge(server, urls=server.url.removesuffix("/v1")).check()
        assert "up to and with /v1" in caught.value.remedy
        url = server.url
    with pytest.raises(UserError, match="no connection: ") as caught:
        Pairs(urls=url, model="tiny").check()
    assert "docs/judges.md" in caught.value.remedy


def test_a_server_without_probabilities_cannot_rate_by_digits():
    with (
        serving(lambda *_: message("4")) as server,
        pytest.raises(UserError, match=r"can be read; .*no log-probabilities"),
    ):
        make_judge(server, rewards.VLMDigits).check()


def test_the_judge_that_the_document_shows_works(monkeypatch):
    monkeypatch.setattr(base, "_FACTORIES", {**base._FACTORIES})
    *_, code = re.findall(r"```python\n(.*?)```", (small_run.ROOT / "docs" / "judges.md").read_text(), re.DOTALL)
    exec(compile(code, "docs/judges.md", "exec", dont_inherit=True), {"__name__": "rcgrpo_jax.shown"})
    with serving(lambda body, attempt: message("7" if body["seed"] > 42 else "seven")) as server:
        judge = rewards.make("natural", urls=server.url, model="tiny")
        np.testing.assert_allclose(judge.start(batch(1, 1)).result(), [[7 / 9]], rtol=1e-6)


def test_what_the_check_asks_is_not_counted():
    with serving() as server:
        asking = make_judge(server)
        asking.check()
        assert asking.metrics()["answers"] == 0
