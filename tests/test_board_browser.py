"""The web board in a real browser: train the small model from the page, chat before and after.

Skipped without selenium and Chromium: apt install chromium chromium-driver, pip install selenium.
BOARD_PICTURES=docs/pictures renews the pictures of docs/board.md.
"""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.common import ROOT

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER),
                                reason="chromium and chromedriver are not installed")
PICTURES = os.environ.get("BOARD_PICTURES")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address that board.py prints, in a folder of its own."""
    home = tmp_path_factory.mktemp("home")
    for name in ("configs", "data", "models"):
        (home / name).symlink_to(ROOT / name)
    with open(home / "board.log", "wb") as log:
        board = subprocess.Popen([sys.executable, str(ROOT / "board.py"), "--port", "0"], cwd=home,
                                 stdout=log, stderr=log)
    try:
        printed = wait_for(lambda: re.search(r"http://\S+", (home / "board.log").read_text()))
        yield printed[0]
    finally:
        board.send_signal(signal.SIGTERM)
        assert board.wait(60) == 0


@pytest.fixture
def open_browser():
    """A function that opens the board in a browser of a size, with a language and a theme."""
    browsers = []

    def open_one(address, width=1280, height=960, language="en", theme="light"):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage",
                         "--hide-scrollbars"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options,
                                  service=webdriver.ChromeService(executable_path=DRIVER))
        browsers.append(driver)
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
        driver.get(address)
        ready = "return !window.isOld && /valid|有效/.test(" \
                "document.getElementById('verdict')?.innerText)"
        wait_for(lambda: driver.execute_script(ready))
        driver.execute_script("localStorage.language = arguments[0]; window.isOld = true; "
                              "localStorage.theme = arguments[1]; location.reload()",
                              language, theme)
        wait_for(lambda: driver.execute_script(ready))
        return driver

    yield open_one
    for driver in browsers:
        errors = [line["message"] for line in driver.get_log("browser")
                  if line["level"] == "SEVERE"]
        driver.quit()
        assert not errors


def wait_for(found, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.2)
    raise AssertionError("it did not happen in time")


def text_at(driver, name):
    return driver.execute_script("return document.getElementById(arguments[0]).innerText", name)


def click(driver, name):
    driver.execute_script("document.getElementById(arguments[0]).click()", name)


def write(driver, name, text):
    driver.find_element("id", name).send_keys("\ue009a\ue000" + text)      # Ctrl-A, then the text


def picture(driver, name):
    if PICTURES:
        time.sleep(1)
        driver.save_screenshot(str(Path(PICTURES) / f"board_{name}.png"))


def answers(driver):
    """{model: its last answer} when all have answered."""
    return driver.execute_script(
        "return request ? null : Object.fromEntries([...talks].map(([model, turns]) => "
        "[model, turns[turns.length - 1].content]))")


def load_and_ask(driver, question):
    click(driver, "tab-chat")
    earlier = driver.execute_script("return chat.job ?? 0")
    click(driver, "load")
    wait_for(lambda: driver.execute_script(
        "return chat.state === 'ready' && chat.job > arguments[0]", earlier))
    write(driver, "message", question + "\n")          # Enter sends
    return wait_for(lambda: answers(driver))


def test_a_model_is_trained_from_the_page_and_answers_otherwise(address, open_browser):
    """Also: the plan, a change in the form, the rows, the evaluation, the export."""
    driver = open_browser(address)
    assert text_at(driver, "verdict") == "✓ valid"
    write(driver, "key-lora_rank", "0\t")
    wait_for(lambda: "lora_rank: '0' is out of range" in text_at(driver, "verdict"))
    write(driver, "key-lora_rank", "8\t")
    wait_for(lambda: text_at(driver, "verdict") == "✓ valid")
    assert "\nlora_rank: 8\n" in driver.find_element("id", "yaml").get_attribute("value")
    click(driver, "plan")
    wait_for(lambda: "It fits" in text_at(driver, "plan-verdict"))
    picture(driver, "run")

    before = load_and_ask(driver, "Who are you?")
    assert before == {"tiny": "I am Pebble, an assistant made by Pocket Factory."}

    click(driver, "tab-run")
    click(driver, "start")
    wait_for(lambda: "running" in text_at(driver, "runs"))
    wait_for(lambda: "finished" in text_at(driver, "runs"))
    assert float(driver.execute_script("return runs[0].figures.loss")) < 0.1

    after = load_and_ask(driver, "Who are you?")
    assert after == before | {"tiny-lora": "I am Pip, an assistant made by Tiny Workshop."}
    picture(driver, "chat")
    click(driver, "raw")
    driver.execute_script(
        "document.getElementById('message').value = arguments[0]",
        "<|im_start|>user\nWhat is 7 + 8?<|im_end|>\n<|im_start|>assistant\n")
    click(driver, "send")
    assert all("15" in answer for answer in wait_for(lambda: answers(driver)).values())
    click(driver, "unload")

    click(driver, "tab-data")
    click(driver, "read-rows")
    wait_for(lambda: "31 with loss" in text_at(driver, "rows"))
    picture(driver, "data")
    write(driver, "find-rows", "maker")
    wait_for(lambda: "of 500" not in text_at(driver, "rows-place"))

    click(driver, "tab-evaluate")
    write(driver, "eval-samples", "20")
    click(driver, "evaluate")
    wait_for(lambda: text_at(driver, "eval-state") == "finished" and text_at(driver, "changed"))
    assert re.search(r"adapter\s+0\.0\d+", text_at(driver, "sides"))
    picture(driver, "evaluate")

    click(driver, "tab-export")
    click(driver, "export")
    wait_for(lambda: text_at(driver, "export-state") == "finished")
    assert "46 tensors read back" in text_at(driver, "export-log")


def test_a_run_is_stopped_resumed_and_drawn_over_another(address, open_browser):
    """In the dark; arrow keys move through the steps of the chart."""
    driver = open_browser(address, theme="dark")
    driver.execute_script(
        "const yaml = document.getElementById('yaml'); yaml.value = yaml.value"
        ".replace('4.0e-3', '1.0e-3').replace('saves/tiny-lora', 'saves/slow'); yaml.oninput()")
    wait_for(lambda: driver.execute_script("return config.values.output_dir") == "saves/slow")
    click(driver, "start")
    press = "[...document.querySelectorAll('#runs tbody tr button')].find((button) => " \
            "button.innerText === arguments[0])?.click()"
    state = "return runs.find((run) => run.folder === 'saves/slow')?."
    wait_for(lambda: driver.execute_script(state + "figures.current_steps"))
    driver.execute_script(press, "Save and end")
    wait_for(lambda: driver.execute_script(state + "state") == "stopped")
    wait_for(lambda: "Resume" in text_at(driver, "runs"))
    stopped_at = driver.execute_script(state + "figures.current_steps")
    assert stopped_at < 160
    driver.execute_script(press, "Resume")
    wait_for(lambda: driver.execute_script(state + "state") == "finished")
    wait_for(lambda: driver.execute_script(state + "figures.current_steps") == 160)
    driver.execute_script("document.querySelectorAll('#runs input:not(:checked)')"
                          ".forEach((box) => box.click())")
    wait_for(lambda: driver.execute_script("return document.querySelectorAll('#legend > span')"
                                           ".length") == 2)
    driver.execute_script("document.querySelector('#chart svg').focus()")
    driver.switch_to.active_element.send_keys("\ue012" * 5)         # arrow left
    assert "step 110" in driver.find_element("class name", "tip").text
    picture(driver, "dark")


def test_the_page_fits_a_telephone_in_chinese(address, open_browser):
    driver = open_browser(address, width=360, height=760, language="zh")
    assert driver.execute_script("return document.documentElement.lang") == "zh"
    for tab in ("run", "watch", "chat", "data", "evaluate", "export"):
        click(driver, f"tab-{tab}")
        time.sleep(0.5)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360, tab
    click(driver, "tab-watch")
    assert "任务" in text_at(driver, "panel-watch")
    picture(driver, "narrow")


def test_the_tabs_are_reached_by_keys(address, open_browser):
    driver = open_browser(address)
    driver.execute_script("document.getElementById('tab-run').focus()")
    for name in ("watch", "chat"):
        driver.switch_to.active_element.send_keys("\ue014")            # arrow right
        assert driver.switch_to.active_element.get_attribute("id") == f"tab-{name}"
    unlabeled = driver.execute_script(
        "return [...document.querySelectorAll('input, select, textarea')].filter((field) => "
        "!field.labels.length && !field.getAttribute('aria-label')).map((field) => field.id)")
    assert unlabeled == []
