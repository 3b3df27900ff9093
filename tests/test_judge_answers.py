"""What is read of judges' answers: EditScore's two lists, the expected digit, and a field of one's own."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from judge_server import Reply, batch, digest, make_judge, message, serving

from rcgrpo_jax import rewards
from rcgrpo_jax.errors import UsageError
from rcgrpo_jax.rewards import pictures
from rcgrpo_jax.rewards.editscore import read_prompts, read_score
from rcgrpo_jax.rewards.rubric import read_field
from rcgrpo_jax.rewards.vlm_digits import expected_digit

PACKAGE = Path(sys.prefix, "editscore")  # where launch/test.sh puts it


# EditScore


@pytest.mark.parametrize(("text", "score"), [
    ('{"reasoning": "fine", "score": [20, 22]}', 8.0),
    ('```json\n{"reasoning": "a "red" cat", "score": [20.0, 25]}\n```', 8.0),
    ("{'reasoning': 'fine', 'score': ['20', '22']}", 8.0),
    ('<think>score: [1, 2] perhaps</think>{"score": [0, 25]}', 0.0),
])  # fmt: skip
def test_the_smaller_of_two_sub_scores_counts(text, score):
    assert read_score({"message": {"content": text}}) == score


@pytest.mark.parametrize("content", [
    "", None, 20, "I'm sorry, but I can't assist with that request.", '{"reasoning": "the cat has 2 ears and',
    '{"reasoning": "fine", "score": [20, 2', '{"score": 20}', '{"score": [20]}', '{"score": [20, 22, 1]}',
    '{"score": [30, 31]}', '{"score": [20, 31]}', '{"score": [-5, 22]}', '{"score": [NaN, 20]}', '{"score": null}',
    '{"score": [[20, 22]]}', '{"scores": [20, 22]}', '{"score": []}', "[20, 22]", '{"score": ["a", "b"]}',
])  # fmt: skip
def test_what_is_no_score_is_never_made_one(content):
    with pytest.raises(ValueError):  # noqa: PT011 (of any message)
        read_score({"message": {"content": content}})


def prompt_package(folder: Path) -> Path:
    """A package in the form of `editscore`, of other words; importing it fails."""
    package = folder / "editscore"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('torch')\n")
    said = {
        "_context_no_delimit_reasoning_first": "Context, 10 words.",
        "_prompts_0shot_two_image_edit_rule": "Two images.",
        "_prompts_0shot_tie_rule_SC": "From 0 to 10: <instruction>", "_prompts_0shot_rule_PQ": "Of 10.",
    }  # fmt: skip
    (package / "vie_prompts.py").write_text("".join(f"{name} = {text!r}\n" for name, text in said.items()))
    return folder


@pytest.fixture
def package(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(prompt_package(tmp_path / "packages"))


@pytest.fixture
def installed(monkeypatch):
    """The package itself, for one test."""
    monkeypatch.setattr(sys, "path", [str(PACKAGE), *sys.path])  # to which its import adds
    yield
    for name in [name for name in sys.modules if name.split(".")[0] in ("editscore", "json_repair")]:
        del sys.modules[name]


def test_editscore_asks_what_its_package_says(package):
    edit, quality = read_prompts()
    assert edit == "Context, 10 words.\nTwo images.\nFrom 0 to 25: {instruction}"
    assert quality == "Context, 10 words.\nOf 25."
    asked = [x.template for x in rewards.make("editscore", model="m").questions()]
    assert asked == ["{source}{edited}" + edit, "{source}{edited}" + quality]
    asked = [x.template for x in rewards.make("editscore", model="m", labels=True, quality_of="edited").questions()]
    assert asked == ["<img1>: {source}<img2>: {edited}" + edit, "<img1>: {edited}" + quality]


def test_editscore_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [x for x in sys.path if not Path(x, "editscore").is_dir()])
    with pytest.raises(UsageError, match="reward 'editscore': no package `editscore` found") as caught:
        rewards.make("editscore", model="m")
    assert caught.value.remedy == "Run: pip install --no-deps editscore==0.2"


def test_editscore_samples_as_its_authors_do(package):
    wanted = {"temperature": 0.7, "top_p": 0.9, "top_k": 20, "max_tokens": 512}
    assert rewards.make("editscore", model="m").request() == wanted


@pytest.mark.parametrize("average_first", [False, True])
def test_editscore_is_the_root_of_both_scores(package, average_first):
    combined = rewards.make("editscore", model="m", average_first=average_first).combine(
        np.array([[4.0, 9.0], [8.0, 2.0]])
    )
    wanted = math.sqrt(6 * 5.5) if average_first else (6 + 4) / 2
    assert combined == pytest.approx(wanted / 10)


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="launch/test.sh installs editscore")
@pytest.mark.parametrize("average_first", [False, True])
def test_editscore_is_that_of_its_package(installed, average_first):
    """On the same answers, with those that the package makes a number of though they hold no score left out."""
    editscore = importlib.import_module("editscore")
    inputs, passes = batch(2, 4), 3
    reduction = "average_first" if average_first else "average_last"
    theirs = editscore.EditScore(backbone="none", num_pass=passes, reduction=reduction)

    class Recorded:
        def prepare_input(self, images, text):
            return images, text

        def batch_inference(self, prompts, seed):
            return [answer(text, images[1], seed) for images, text in prompts]

    def answer(text: str, url: str, seed: int) -> str:
        pair = [digest({"text": text, "url": url, "seed": seed, "i": i}, 26) for i in range(2)]
        forms = ('{"reasoning": "so", "score": %s}', "```json\n{'reasoning': 'so', 'score': %s}\n```",
                 '{"reasoning": "a "red" one", "score": %s}')  # fmt: skip
        return forms[digest({"form": pair}, 3)] % pair

    def reply(body: dict, attempt: int) -> Reply:
        _, after, text = body["messages"][0]["content"]
        return message(answer(text["text"], after["image_url"]["url"], body["seed"]))

    theirs.model = Recorded()
    urls = [[pictures.data_url(x) for x in row] for row in inputs.edited]
    pairs = [("source", url) for row in urls for url in row]
    wanted = theirs.batch_evaluate(pairs, [x for x in inputs.instructions for _ in range(4)])
    with serving(reply) as server:
        ours = rewards.make("editscore", model="m", urls=server.url, num_pass=passes, average_first=average_first)
        found = ours.start(inputs).result()
    np.testing.assert_allclose(found.ravel(), [x["O_score"] / 10 for x in wanted], rtol=1e-6)


@pytest.mark.skipif(not PACKAGE.is_dir(), reason="launch/test.sh installs editscore")
@pytest.mark.parametrize(("text", "theirs"), [
    ("", 5.0),
    ("I'm sorry, but I can't assist with that request.", 5.0),
    ('{"reasoning": "fine", "scores": [20, 22]}', 5.0),
    ('{"reasoning": "fine", "score": null}', 5.0),
    ('{"reasoning": "the cat has 2 ears and', 0.8),
    ('{"reasoning": "fine", "score": [20, 2', 0.8),
    ('{"reasoning": "fine", "score": [20, 22, 1]}', 0.4),
    ('{"reasoning": "fine", "score": [20]}', 8.0),
    ('{"reasoning": "fine", "score": 20}', 8.0),
    ('{"reasoning": "fine", "score": [20, 31]}', 8.0),
    ('{"reasoning": "fine", "score": [30, 31]}', 12.5),
    ('{"reasoning": "fine", "score": [-5, 22]}', 12.5),
    ("[20, 22]", 8.0),
])  # fmt: skip
def test_what_the_package_makes_a_score_of_has_none_here(installed, text, theirs):
    """Of these answers to `batch_evaluate`, the last alone is a judgement. It is asked for again, as the others are."""
    editscore = importlib.import_module("editscore")
    scorer = editscore.EditScore(backbone="none")
    scorer.model = SimpleNamespace(
        prepare_input=lambda images, text: text, batch_inference=lambda prompts, seed: [text] * len(prompts)
    )
    (found,) = scorer.batch_evaluate([("source", "edited")], ["Make it red."])
    assert found["SC_score"] == pytest.approx(theirs)
    with pytest.raises(ValueError, match=r"a score of two numbers from 0 to 25 is wanted|could not convert"):
        read_score({"message": {"content": text}})


# The expected digit


def rated(**probabilities: float) -> dict:
    tokens = [{"token": token, "logprob": math.log(x), "bytes": None} for token, x in probabilities.items()]
    return {"message": {"content": "4"}, "logprobs": {"content": [{"token": "4", "top_logprobs": tokens}]}}


def test_the_expected_digit_has_its_closed_form():
    found = expected_digit(rated(**{"4": 0.5, "1": 0.25, " 3": 0.1, "Five": 0.1, "9": 0.05}))
    assert found == pytest.approx((4 * 0.5 + 1 * 0.25) / 0.75 / 5)


@pytest.mark.parametrize("choice", [
    {}, {"logprobs": None}, {"logprobs": {"content": []}}, {"logprobs": {"content": [{"top_logprobs": []}]}},
    {"logprobs": {"content": [{"top_logprobs": [{"token": "3", "logprob": "-1"}]}]}}, rated(yes=0.9),
])  # fmt: skip
def test_without_probabilities_of_digits_there_is_no_score(choice):
    with pytest.raises(ValueError):  # noqa: PT011 (of any message)
        expected_digit(choice)


def test_a_judge_by_digits_asks_for_one_token_with_its_probabilities():
    with serving(lambda *_: Reply(json.dumps({"choices": [rated(**{"5": 0.5, "0": 0.5})]}).encode())) as server:
        found = make_judge(server, rewards.VLMDigits).start(batch(1, 2)).result()
        body = server.bodies[0]
    np.testing.assert_allclose(found, [[0.5, 0.5]])
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (1, True, 20)
    assert "edit 0" in body["messages"][0]["content"][2]["text"]


# A prompt of one's own


@pytest.mark.parametrize(("text", "score"), [
    ('Well: {"score": 4}', 0.5),
    ('{"score": 1} {"note": {"score": 1}} {"score": 7, "x": [1]} so.', 1.0),
    ('```json\n{"score": 1.0}\n```', 0.0),
])  # fmt: skip
def test_a_field_of_the_last_object_is_scaled(text, score):
    assert read_field({"message": {"content": text}}, "score", 1, 7) == score


@pytest.mark.parametrize("text", [
    "4", '{"score": 8}', '{"score": "4"}', '{"score": true}', '{"score": NaN}', '{"score": 4',
    '{"other": 4}', "{" * 9000,
])  # fmt: skip
def test_a_field_without_such_a_number_is_no_score(text):
    with pytest.raises(ValueError, match="a JSON object with 'score', a number from 1 to 7, is wanted"):
        read_field({"message": {"content": text}}, "score", 1, 7)


def test_a_rubric_asks_ones_own_prompt(tmp_path):
    (tmp_path / "prompt.txt").write_text('Rate {edited} for {instruction}, as {"grade": 0}.')
    with serving(lambda *_: message('{"grade": 3}')) as server:
        options = {"template": str(tmp_path / "prompt.txt"), "field": "grade", "highest": 4.0}
        found = make_judge(server, rewards.Rubric, **options).start(batch(1, 1)).result()
        texts = [x.get("text") for x in server.bodies[0]["messages"][0]["content"]]
    np.testing.assert_allclose(found, [[0.75]])
    assert texts == ["Rate ", None, ' for edit 0, as {"grade": 0}.']
