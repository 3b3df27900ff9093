"""The page of a study as voters use it, in a real browser: by keys, by touch, across reloads, without a network."""

import json
import time

import pytest
import small_run
import study_site
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from study_browser import FASTER, PAUSE, Browser

from rcgrpo_jax.study.build import key_file
from rcgrpo_jax.study.records import read_key, read_votes

HOSTILE = """</script><img src=x onerror="document.title='hit'"> & {{ 7 * 7 }}?"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("downloads"))
    yield opened
    opened.driver.quit()


@pytest.fixture
def study(tmp_path):
    return study_site.write_study(tmp_path, questions=["Which follows best?", "Which keeps the rest best?"])


def test_a_study_by_keys_loses_nothing_on_a_reload_and_is_scored(browser, study, capsys):
    page, key = study
    browser.open(page)
    assert browser.text("total") == "6"
    browser.start("Zoë")
    assert browser.text("place") == "Choice 1 of 6"
    browser.press("2", "n", Keys.ARROW_LEFT, "3", "1")
    browser.driver.refresh()
    assert browser.text("place") == "Choice 4 of 6"
    browser.press(Keys.ARROW_RIGHT)
    assert browser.text("place") == "Choice 4 of 6"  # there is no vote to go past
    browser.press("0", "4", "2", Keys.ARROW_LEFT, Keys.ARROW_RIGHT)
    assert browser.text("place") == "Choice 6 of 6"
    browser.press("1")
    assert browser.run("return document.activeElement.id") == "thanks"
    browser.press(Keys.TAB, Keys.ENTER)
    path = browser.saved()
    assert path.name.startswith("votes-Zoe-")
    (votes,) = read_votes(key, [path])
    assert votes["voter"] == "Zoë"
    assert [x["shown"].index(x["chosen"]) + 1 if x["chosen"] else 0 for x in votes["answers"]] == [2, 3, 1, 0, 2, 1]
    assert [x["question"] for x in votes["answers"]] == ["q1", "q2"] * 3
    assert all(0.3 <= x["seconds"] < 60 * FASTER for x in votes["answers"])
    code, out, _ = small_run.run_command(capsys, "study", "score", f"--key={key_file(page)}", f"--votes={path}")
    assert code == 0
    assert "6 of 6 votes were given." in out


def test_a_study_by_touch_on_a_small_screen(browser, study):
    page, key = study
    browser.open(page, 360, 640, touch=True)
    browser.tap(browser.find("#voter"))
    browser.press("ann")
    browser.tap(browser.find("#start button"))
    assert browser.run("return document.documentElement.scrollWidth") == 360
    browser.tap(browser.all(".look")[2])
    assert browser.find("#large").get_attribute("alt") == "Edit 2"
    browser.tap(browser.all("#tools button")[0])
    assert browser.find("#large").get_attribute("alt") == "Source"
    browser.tap(browser.find("#tools .close"))
    assert not browser.find("#zoom").is_displayed()
    sizes = [element.size for element in browser.all("button") if element.is_displayed()]
    assert min(min(size["width"], size["height"]) for size in sizes) >= 44
    for choice in (1, 0, 2, 1, 1, 3):
        browser.tap(browser.all("figure .vote")[choice - 1] if choice else browser.find("#unsure"))
    browser.tap(browser.find("#finish"))
    (votes,) = read_votes(key, [browser.saved()])
    assert [x["shown"].index(x["chosen"]) + 1 if x["chosen"] else 0 for x in votes["answers"]] == [1, 0, 2, 1, 1, 3]


@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_cut_off_at_any_width(browser, tmp_path, width):
    page, _ = study_site.write_study(tmp_path, questions=["Which " + 60 * "x" + "?"])
    browser.open(page, width)
    assert browser.run("return document.documentElement.scrollWidth") == width
    browser.start()
    assert browser.run("return document.documentElement.scrollWidth") == width
    browser.press("z")
    assert browser.run("return document.documentElement.scrollWidth") == width


def test_it_asks_nothing_of_the_network_and_could_not(browser, study):
    page, _ = study
    browser.driver.get_log("performance")
    browser.open(page)
    browser.start()
    browser.press("1", "z", Keys.ESCAPE)
    messages = [json.loads(entry["message"])["message"] for entry in browser.driver.get_log("performance")]
    urls = [x["params"]["request"]["url"] for x in messages if x["method"] == "Network.requestWillBeSent"]
    assert page.as_uri() in urls
    assert {url.partition(":")[0] for url in urls} <= {"file", "data"}
    assert [url for url in urls if url.startswith("file")] == [page.as_uri()]
    asked = "const done = arguments[0]; fetch('http://127.0.0.1:9/').then(() => done('sent'), (e) => done('' + e))"
    browser.driver.get_log("browser")
    assert "TypeError" in browser.driver.execute_async_script(asked)
    assert any("Content Security Policy" in entry["message"] for entry in browser.driver.get_log("browser"))


def test_whoever_looks_into_the_open_page_finds_no_maker(browser, study):
    page, key = study
    browser.open(page)
    browser.start()
    browser.press("1")
    seen = browser.run("return document.documentElement.outerHTML + JSON.stringify(localStorage)")
    names = [example["name"] for example in key["examples"].values()]
    assert not [
        secret for secret in (*study_site.MAKERS, *names, str(key["seed"])) if secret in seen.replace(page.as_uri(), "")
    ]


def test_names_roles_and_the_order_of_focus(browser, study):
    page, _ = study
    browser.open(page)
    assert browser.run("return document.activeElement.id") == "voter"
    browser.start()
    assert browser.run("return document.activeElement.id") == "question"
    names, rings = [], []
    for _ in range(11):
        ActionChains(browser.driver, duration=0).send_keys(Keys.TAB).perform()
        element = browser.driver.switch_to.active_element
        names.append(f"{element.aria_role} {element.accessible_name.strip()}")
        rings.append(element.value_of_css_property("outline-style"))
    edits = [f"button {name} {i}" for i in (1, 2, 3) for name in ("Enlarge: Edit", "Choose edit")]
    expected = ["button Enlarge: Source", *edits, "button Not sure", "button Save votes so far", "button Another voter"]
    assert names == [*expected, "checkbox Keyboard shortcuts"]
    assert set(rings) == {"solid"}
    assert [image.accessible_name for image in browser.all("figure img")] == ["Source", "Edit 1", "Edit 2", "Edit 3"]
    assert browser.find("#status").aria_role == "status"
    assert browser.find("#progress").accessible_name == "Votes given"
    browser.press("2")
    assert browser.text("status") == "Kept. Choice 2 of 6."
    browser.press(Keys.ARROW_LEFT)
    assert [x.get_attribute("aria-pressed") for x in browser.all(".vote")] == ["false", "true", "false", "false"]


def test_the_keys_can_be_switched_off_and_a_button_takes_enter(browser, study):
    page, _ = study
    browser.open(page)
    browser.start()
    browser.find("#keys").click()
    browser.press("1")
    assert browser.text("place") == "Choice 1 of 6"
    browser.run("document.querySelectorAll('figure .vote')[1].focus()")
    browser.press(Keys.ENTER)
    assert browser.text("place") == "Choice 2 of 6"


def test_an_enlarged_picture_changes_by_keys_and_takes_no_vote(browser, study):
    page, _ = study
    browser.open(page)
    browser.start()
    browser.press("z", "3")
    assert browser.text("turned") == browser.find("#large").get_attribute("alt") == "Edit 3"
    fitting = browser.find("#large").size["width"]
    browser.press("z")
    assert browser.find("#large").size["width"] == pytest.approx(2 * fitting, abs=1)
    browser.press("0", Keys.ESCAPE)
    assert browser.text("place") == "Choice 1 of 6"
    assert browser.run("return document.activeElement.id") == "question"


def test_a_double_click_is_one_vote(browser, study):
    page, _ = study
    browser.open(page)
    browser.start()
    time.sleep(PAUSE)
    browser.run("for (const _ of [1, 2]) document.querySelector('figure .vote').click()")
    assert browser.text("place") == "Choice 2 of 6"


def test_another_voter_has_votes_and_an_order_of_their_own(browser, tmp_path):
    page, _ = study_site.write_study(tmp_path, seed=0)
    browser.open(page)
    first = {}
    for voter in ("ann", "ben", "cy", "di", "ed"):
        browser.start(voter)
        assert browser.text("place") == "Choice 1 of 3"
        first[voter] = browser.find("figure img").get_attribute("src")
        browser.press("1")
        browser.find("#leave").click()
    assert len(set(first.values())) > 1
    browser.start("ann")
    assert browser.text("place") == "Choice 2 of 3"
    browser.press(Keys.ARROW_LEFT)
    assert browser.find("figure img").get_attribute("src") == first["ann"]


def test_a_saved_file_is_gone_on_with_and_another_is_refused(browser, study, tmp_path):
    page, key = study
    browser.open(page)
    browser.start()
    browser.press("1", "2")
    browser.find("#save").click()
    path = browser.saved()
    assert browser.text("status").endswith("2 of 6 votes.")
    browser.run("localStorage.clear()")
    browser.driver.refresh()
    browser.run("document.querySelector('details').open = true")
    votes = json.loads(path.read_text())
    spoiled = {**votes, "answers": [{**votes["answers"][0], "chosen": "x"}]}
    for content, problem in (
        ("{", "This file is damaged"),
        (json.dumps([1]), "This file holds no votes."),
        (json.dumps({**votes, "study": "x"}), "This file has votes of another study."),
        (json.dumps(spoiled), "it has votes that this page cannot give"),
    ):
        (tmp_path / "other.json").write_text(content)
        browser.find("#file").send_keys(str(tmp_path / "other.json"))
        browser.wait(lambda problem=problem: problem in browser.text("problem"))
    browser.find("#file").send_keys(str(path))
    browser.wait(lambda: browser.text("place") == "Choice 3 of 6")
    assert browser.text("name") == "ann"
    assert (
        json.loads(browser.run("return localStorage.getItem(arguments[0])", f"rcgrpo-study/{key['study']}/ann"))
        == votes
    )


def test_a_browser_that_keeps_nothing_says_so(browser, study):
    script = {"source": "Storage.prototype.setItem = () => { throw new Error('full'); }"}
    added = browser.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", script)
    try:
        browser.open(study[0])
        browser.start()
        browser.press("1")
        assert browser.text("status").startswith("This browser keeps no votes")
        browser.find("#leave").click()  # else the browser asks whether to leave
    finally:
        browser.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_what_a_user_wrote_is_shown_and_never_run(browser, tmp_path):
    page, _ = study_site.write_study(tmp_path, questions=[HOSTILE])
    browser.open(page)
    browser.start()
    assert browser.text("question") == HOSTILE
    assert browser.driver.title == "Compare picture edits"
    assert read_key(key_file(page))["questions"]["q1"] == HOSTILE
