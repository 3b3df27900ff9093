"""Chromium, and what a voter does with the page of a study in it.

`python tests/study_browser.py docs/images/study.webp` draws the picture in docs/study.md.
"""

import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from rcgrpo_jax.data.images import save_image
from rcgrpo_jax.data.scenes.source import Scenes
from rcgrpo_jax.study.build import build

FASTER = 10  # the page's clock, so that tests need not wait long
PAUSE = 0.6 / FASTER  # seconds, after which the page takes a vote


class Browser:
    """Chromium, and what a voter does with it."""

    def __init__(self, downloads: Path):
        programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
        assert all(programs), "no browser: apt-get install chromium chromium-driver"
        options = webdriver.ChromeOptions()
        options.binary_location = programs[0]
        for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
        self.downloads = downloads
        clock = f"const now = performance.now.bind(performance); performance.now = () => {FASTER} * now();"
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": clock})

    def open(self, page: Path, width: int = 1280, height: int = 720, touch: bool = False):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": touch}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
        self.driver.get(page.as_uri())

    def start(self, voter: str = "ann"):
        ActionChains(self.driver, duration=0).send_keys(voter, Keys.ENTER).perform()

    def press(self, *keys: str):
        """Each key, once the page takes it."""
        for key in keys:
            time.sleep(PAUSE)
            ActionChains(self.driver, duration=0).send_keys(key).perform()

    def tap(self, element):
        time.sleep(PAUSE)
        self.run("arguments[0].scrollIntoView({ block: 'center' })", element)
        box = self.run(
            "const b = arguments[0].getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]", element
        )
        for kind, points in (("touchStart", [{"x": box[0], "y": box[1]}]), ("touchEnd", [])):
            self.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def run(self, script: str, *arguments):
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, name: str) -> str:
        return self.run("return document.getElementById(arguments[0]).textContent", name)

    def wait(self, condition):
        return WebDriverWait(self.driver, 10, 0.02).until(lambda _: condition())

    def saved(self) -> Path:
        """The file that the page has just saved."""
        self.wait(lambda: [*self.downloads.glob("*.json")])
        (path,) = self.downloads.glob("*.json")
        return path.rename(path.with_suffix(".taken"))


def draw(path: Path) -> None:
    """A choice of a study of scenes: the right edit, an edit gone wrong, and none."""
    scenes, wrong = (Scenes("heldout", 6, 256, flaws=flaws) for flaws in (0.0, 1.0))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for right, flawed in ((scenes[i], wrong[i]) for i in range(len(scenes))):
            edits = {"right": right.target, "flawed": flawed.target, "untouched": right.image}
            for maker, picture in edits.items():
                save_image(root / maker / f"{right.name}.png", picture)
        makers = {maker: root / maker for maker in edits}
        build(scenes, makers, root / "study.html", seed=3)
        browser = Browser(root)
        browser.open(root / "study.html", 1280, 670)
        browser.start()
        browser.press("1", "3", Keys.ARROW_LEFT)
        Image.open(io.BytesIO(browser.driver.get_screenshot_as_png())).convert("RGB").save(path, quality=85)
        browser.driver.quit()


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
