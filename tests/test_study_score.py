"""What votes say, with intervals that hold the truth, and which files are none of the study."""

import json
from dataclasses import replace

import numpy as np
import pytest
import small_run
from scipy import stats
from study_site import MAKERS, make_key, make_votes, write_votes

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.evaluation.statistics import mean_interval
from rcgrpo_jax.evaluation.tables import latex, markdown
from rcgrpo_jax.study.rates import pooled_rate
from rcgrpo_jax.study.records import read_key, read_votes, write_key
from rcgrpo_jax.study.score import UNSURE, as_json, notes, score, tables

BASE, LORA, OTHER = MAKERS
ANN = [LORA, LORA, LORA, BASE, None, LORA, OTHER, LORA]
BEN = [LORA, BASE, None, BASE, BASE, LORA, OTHER, None]


# Rates


def draw(rng, voters, examples, of_voters, of_examples, rate, kept=1.0):
    """Votes of voters who differ, each on a random part of examples that differ; `rate` is the true one."""
    threshold = stats.norm.isf(rate) * np.sqrt(of_voters**2 + of_examples**2 + 1)
    liked = of_voters * rng.standard_normal((voters, 1)) + of_examples * rng.standard_normal((1, examples))
    chosen = liked + rng.standard_normal((voters, examples)) > threshold
    given = np.argsort(rng.random((voters, examples)), axis=1) < examples * rng.uniform(kept, 1, (voters, 1))
    return chosen[given], *np.nonzero(given)


@pytest.mark.parametrize(
    ("voters", "examples", "of_voters", "of_examples", "rate", "kept"),
    [
        (3, 100, 0.5, 0.5, 0.34, 1.0),
        (5, 50, 0.3, 2.0, 0.05, 1.0),
        (10, 50, 0.5, 0.5, 0.34, 0.2),
        (1, 40, 0.0, 1.0, 0.2, 1.0),
    ],
)
def test_the_interval_covers_the_rate_over_all_voters_and_examples(
    voters, examples, of_voters, of_examples, rate, kept
):
    rng = np.random.default_rng(0)
    found = [pooled_rate(*draw(rng, voters, examples, of_voters, of_examples, rate, kept)) for _ in range(300)]
    assert np.mean([x.low <= rate <= x.high for x in found]) > 0.915
    assert all(0 <= x.low <= x.mean <= x.high <= 1 for x in found)


def test_votes_that_are_alike_are_not_counted_as_independent():
    """Wilson's interval of all votes covers far less where voters differ."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        chosen, _, _ = draw(rng, 5, 50, 0.5, 0.5, 0.34)
        naive = stats.binomtest(int(chosen.sum()), len(chosen)).proportion_ci(method="wilson")
        hits += naive.low <= 0.34 <= naive.high
    assert hits / 300 < 0.6


def test_it_is_that_of_a_mean_where_everybody_has_voted_on_everything():
    """In Wilson's form: the bounds p are those at which the mean is h sqrt(p (1 - p) / (m (1 - m))) away."""
    chosen, voters, examples = draw(np.random.default_rng(1), 5, 40, 0.8, 0.8, 0.4)
    found, mean = pooled_rate(chosen, voters, examples), mean_interval(chosen.reshape(5, 40).astype(float))
    half = (mean.high - mean.low) / 2
    assert found.mean == pytest.approx(mean.mean)
    for bound in (found.low, found.high):
        away = half * np.sqrt(bound * (1 - bound) / (mean.mean * (1 - mean.mean)))
        assert abs(bound - mean.mean) == pytest.approx(away, rel=1e-5)


@pytest.mark.parametrize("voters", [1, 6])
def test_where_all_agree_an_example_is_one_vote(voters):
    chosen = np.ones(voters * 20, bool)
    found = pooled_rate(chosen, np.repeat(np.arange(voters), 20), np.tile(np.arange(20), voters))
    wilson = 1 / (1 + stats.t.ppf(0.975, 19) ** 2 / 20)
    assert (found.mean, found.high) == (1, pytest.approx(1))
    assert found.low == pytest.approx(wilson)


def test_no_votes_have_no_rate():
    assert np.isnan(pooled_rate(np.zeros(0, bool), np.zeros(0, int), np.zeros(0, int))).all()


# Counts


@pytest.fixture
def scores():
    key = make_key(8)
    return score(key, [make_votes(key, "ann", ANN), make_votes(key, "ben", BEN)])


def test_rates_are_shares_of_all_votes_with_those_that_are_not_sure(scores):
    found = {name: (rate.count, rate.votes) for name, rate in scores.rates["Question 1?"].items()}
    assert found == {BASE: (4, 16), LORA: (7, 16), OTHER: (2, 16), UNSURE: (3, 16)}
    assert sum(rate.interval.mean for rate in scores.rates["Question 1?"].values()) == pytest.approx(1)


def test_a_win_is_among_the_votes_for_either(scores):
    won = scores.wins["Question 1?"]
    assert {pair: (rate.count, rate.votes) for pair, rate in won.items()} == {
        (BASE, LORA): (4, 11), (BASE, OTHER): (4, 6), (LORA, OTHER): (7, 9),
    }  # fmt: skip


def test_a_voter_has_wilsons_interval(scores):
    ann = scores.voters["ann"]
    rate, expected = ann.rates["Question 1?"][LORA], stats.binomtest(5, 8).proportion_ci(method="wilson")
    assert (rate.count, rate.votes) == (5, 8)
    assert rate.interval == pytest.approx((5 / 8, expected.low, expected.high))
    assert (ann.given, ann.wanted, ann.seconds) == (8, 8, 2.5)


def test_places_are_those_of_the_votes_for_an_edit():
    key = make_key(6)
    firsts = [next(iter(example["edits"].values())) for example in key["examples"].values()]
    scores = score(key, [make_votes(key, "ann", [*firsts[:4], None, None])])
    found = {place: (rate.count, rate.votes) for place, rate in scores.positions["Question 1?"].items()}
    assert found == {"Edit 1": (4, 4), "Edit 2": (0, 4), "Edit 3": (0, 4)}


def test_each_question_has_votes_of_its_own():
    key = make_key(8, questions=2)
    votes = make_votes(key, "ann", ANN)
    votes["answers"] += make_votes(key, "ann", [OTHER] * 3, "q2")["answers"]
    scores = score(key, [votes])
    assert scores.rates["Question 1?"][LORA].count == 5
    assert scores.rates["Question 2?"][OTHER][:2] == (3, 3)
    assert (scores.given, scores.wanted) == (11, 16)


def test_the_papers_figure_is_a_table(scores):
    rows = tables(scores)[0].lines
    assert rows[0] == ["edits of", "Question 1?"]
    assert [row[0] for row in rows[1:]] == [*MAKERS, UNSURE]
    assert rows[2][1].startswith("43.8 [")
    assert rows[2][1].endswith("] (7)")
    wins = tables(scores)[1].lines
    assert wins[1][0] == f"{BASE} over {LORA}"
    assert wins[1][1].startswith("36.4 [")


def test_a_star_is_a_win_that_excludes_even_chances():
    key = make_key(40)
    wins = tables(score(key, [make_votes(key, "ann", [LORA] * 36 + [BASE] * 4)]))[1].lines
    assert wins[1][1].endswith("(40) *")
    assert not wins[2][1].endswith("*")  # four votes


def test_what_is_missing_is_said():
    key = make_key(8)
    found = score(key, [make_votes(key, "ann", ANN[:3]), make_votes(key, "ben", BEN), make_votes(key, "cy", [])])
    said = "\n".join(notes(found))
    assert "11 of 24 votes were given." in said
    assert "ann 3 of 8, cy 0 of 8" in said
    assert "3 voters tell little" in said
    assert tables(found)[2].lines[3][1:] == [*["no votes"] * 4, "0 of 8", ""]
    assert "One voter" in "\n".join(notes(score(key, [make_votes(key, "ann", ANN)])))


def test_names_do_not_break_a_table(scores):
    named = replace(scores, voters={"a|b_c & 50%": scores.voters["ann"]})
    assert r"| a\|b_c & 50% |" in markdown(tables(named))
    hostile = markdown(tables(replace(scores, voters={"<script>\n": scores.voters["ann"]})))
    assert r"| &lt;script>\n |" in hostile
    assert r"a|b\_c \& 50\% & " in latex(tables(named))


def test_json_has_every_number(scores):
    found = json.loads(json.dumps(as_json(scores), allow_nan=False))
    (lora,) = (row for row in found["rates"] if row["edits"] == LORA)
    rate = scores.rates["Question 1?"][LORA]
    assert lora == {
        "question": "Question 1?", "edits": LORA, "count": 7, "votes": 16, "rate": rate.interval.mean,
        "low": rate.interval.low, "high": rate.interval.high,
    }  # fmt: skip
    assert {"wins": 3, "positions": 3, "voters": 2}.items() <= {x: len(y) for x, y in found.items() if x in (
        "wins", "positions", "voters")}.items()  # fmt: skip


# Files


def spoil(votes, **changes):
    """Votes with the first answer changed."""
    return {**votes, "answers": [{**votes["answers"][0], **changes}, *votes["answers"][1:]]}


KEY = make_key(8)
GOOD = make_votes(KEY, "ann", ANN)
EDITS = [*KEY["examples"]["example0"]["edits"]]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ([{**GOOD, "study": "ffff"}], "votes0.json: votes of the study 'ffff' found; a1b2 of --key was wanted"),
        ([GOOD, {**GOOD}], "votes1.json: votes of ann found, and .*votes0.json has votes of that name"),
        ([spoil(GOOD, example="x")], "answers.0.example: 'x' found; one of the 8 ids of the key"),
        ([spoil(GOOD, question="q2")], "answers.0.question: 'q2' found; one of the 1 ids"),
        (
            [spoil(GOOD, chosen="edit1-0")],
            "answers.0.chosen: 'edit1-0' found; one of edit0-0, .*edit0-2 or null",
        ),
        ([spoil(GOOD, shown=EDITS[::-1])], "answers.0.shown: .* found; edit0-0, edit0-1, edit0-2 of the key"),
        ([spoil(GOOD, seconds=-1)], "answers.0.seconds: -1 found"),
        ([spoil(GOOD, chosen=3)], "answers.0.chosen: 3 found"),
        ([{**GOOD, "answers": GOOD["answers"] * 2}], "answers.8: a second answer to q1 of the example example0"),
        ([{**GOOD, "voter": ""}], "votes0.json: voter: '' found"),
        ([{**GOOD, "voter": " "}], "votes0.json: voter: ' ' found; a name of 1 to 60 characters in one line"),
        ([{**GOOD, "voter": "a\nb"}], "votes0.json: voter: 'a.*' found"),
        ([{**GOOD, "voter": "x" * 61}], "votes0.json: voter: 'xxx.* found"),
        ([GOOD, {**GOOD, "voter": " ann "}], "votes1.json: votes of ann found, and .*votes0.json has votes"),
        ([{**GOOD, "more": "x" * 120_000}], r"votes0.json: 12\d,\d{3} bytes found; votes of this study take 116,000"),
        ([{"study": "a1b2"}], "votes0.json:"),
        ([{**GOOD, "answers": []}], "--votes: no vote found in 1 files"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_files_that_are_no_votes_of_this_study_are_refused(tmp_path, files, problem):
    with pytest.raises(UserError, match=problem):
        read_votes(KEY, write_votes(tmp_path, *files))


def test_whole_seconds_are_seconds(tmp_path):
    assert read_votes(KEY, write_votes(tmp_path, spoil(GOOD, seconds=3)))[0]["answers"][0]["seconds"] == 3


def test_a_damaged_file_is_refused(tmp_path):
    (path,) = write_votes(tmp_path, GOOD)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match=r"votes0\.json: not JSON"):
        read_votes(KEY, [path])


def test_a_key_is_read_as_it_was_written_and_one_that_lacks_an_edit_is_refused(tmp_path):
    write_key(tmp_path / "a.json", KEY)
    assert read_key(tmp_path / "a.json") == KEY
    damaged = json.loads((tmp_path / "a.json").read_text())
    del damaged["examples"]["example3"]["edits"]["edit3-1"]
    write_key(tmp_path / "b.json", damaged)
    with pytest.raises(UserError, match=r"examples\.example3: edits of"):
        read_key(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("field", "names"),
    [("makers", [BASE, BASE, OTHER]), ("makers", [BASE, UNSURE, OTHER]), ("questions", {"q1": "A?", "q2": "A?"})],
    ids=["twins", "not sure", "question"],
)
def test_a_key_whose_names_cannot_be_told_apart_is_refused(tmp_path, field, names):
    key = make_key(2, tuple(names)) if field == "makers" else {**make_key(2), field: names}
    write_key(tmp_path / "a.json", key)
    with pytest.raises(UserError, match=f"{field}: .* found; different ones were wanted"):
        read_key(tmp_path / "a.json")


def test_the_command_writes_numbers_and_tables_and_spares_other_files(tmp_path, capsys):
    write_key(tmp_path / "key.json", KEY)
    paths = write_votes(tmp_path, GOOD, make_votes(KEY, "ben", BEN))
    argv = ["study", "score", f"--key={tmp_path / 'key.json'}", *(f"--votes={path}" for path in paths)]
    out_flag = f"--out={tmp_path / 'scores.json'}"
    for _ in range(2):  # what it has written, it may write again
        code, out, _ = small_run.run_command(capsys, *argv, out_flag)
        assert code == 0
    assert "kontext-lora" in out
    assert "16 of 16 votes were given." in out
    assert json.loads((tmp_path / "scores.json").read_text())["given"] == 16
    assert "| kontext-lora | 43.8" in (tmp_path / "scores.md").read_text()
    assert "kontext-lora & 43.8" in (tmp_path / "scores.tex").read_text()
    (tmp_path / "scores.md").write_text("# My notes")
    code, problem, _ = small_run.fail(capsys, *argv, out_flag)
    assert (code, "scores.md is there and begins with" in problem) == (1, True)
    code, problem, _ = small_run.fail(capsys, *argv, f"--out={paths[0]}")
    assert "which is read; another place was wanted" in problem
    write_key(tmp_path / "other.json", KEY)
    code, problem, _ = small_run.fail(capsys, *argv, f"--out={tmp_path / 'other.json'}")
    assert "a file that this command has written was wanted" in problem
