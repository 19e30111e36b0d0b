"""The page in a real Chromium: a conversation clicked through, and what a model's text cannot do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from siliconlm.config import SampleConfig
from siliconlm.data.chat import Message
from siliconlm.inference.conversation import Talk

webdriver = pytest.importorskip("selenium.webdriver")
from selenium.common.exceptions import JavascriptException  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here"),
]
FLAGS = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
FLAGS += " disable-sync"
WIDE, PHONE = (1100, 800), (360, 740)
TOKEN = "correct-horse"
MARKDOWN = """Some *slanted*, some **bold with `code`**, `<b>code</b>` and 2 * 3 * 4 snake_case_name.

- one
- two <img src=x onerror="window.hacked = 1">

3. three
4. four

```html
<script>window.hacked = 2</script>
   * kept *  as it is, on a line that is a good deal wider than the screen of any phone is
```
<script>window.hacked = 3</script><a href="javascript:window.hacked = 4">x</a>
averyveryveryveryveryveryveryveryveryverylongwordthatgoesonandonandonandonandonandonandonandon"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS.split(), f"user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield made
    made.quit()


class Page:
    """The page of a server, as somebody sees and uses it."""

    def __init__(self, driver: Any, url: str, until: Callable[..., Any]) -> None:
        self.driver, self.url, self.until = driver, url, until
        self.look()

    def look(self, size: tuple[int, int] = WIDE, scheme: str = "light") -> None:
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, kept: Any = None) -> Page:
        """Afresh, or with a conversation kept from before."""
        self.driver.get(f"{self.url}/health")
        self.script("localStorage.clear(); sessionStorage.clear()")
        if kept is not None:
            self.script("localStorage.setItem('siliconlm', arguments[0])", json.dumps(kept))
        self.driver.get(self.url)
        return self

    def script(self, code: str, *words: Any) -> Any:
        return self.driver.execute_script(code, *words)

    def all(self, css: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def one(self, css: str) -> Any:
        [found] = self.all(css)
        return found

    def texts(self, css: str) -> list[str]:
        return self.script("return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", css)

    def button(self, name: str, within: str = "body") -> Any:
        [found] = [item for item in self.all(f"{within} button") if item.text == name and item.is_displayed()]
        return found

    def ask(self, text: str) -> None:
        self.one("#question").send_keys(text, Keys.ENTER)

    def answered(self) -> list[str]:
        """All answers, once the last is whole."""
        self.until(lambda: self.all(".assistant") and not self.all("[aria-busy=true]"))
        return self.texts(".assistant .said")

    def kept(self) -> Any:
        return self.script("return JSON.parse(localStorage.getItem('siliconlm'))")

    def shot(self, name: str, folder: Path) -> None:
        self.driver.save_screenshot(str(folder / f"{name}.png"))

    def complaints(self) -> list[str]:
        """What the browser has to complain of: a policy broken, a script that failed."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def page(driver: Any, served: Any, until: Any) -> Iterator[Page]:
    page = Page(driver, served.url, until).open()
    yield page
    assert page.complaints() == []
    until(served.quiet)


@pytest.fixture(scope="module")
def long(serve: Any, make_model: Any) -> Any:
    """A model that talks for seconds."""
    return serve(model=make_model(context=8192, endless=True))


def answer_to(served: Any, *said: Message) -> str:
    """What the model says by the one-by-one path, at the temperature 0."""
    settings = SampleConfig(temperature=0, max_tokens=served.service.context)
    talk = Talk(served.service.worker.batch.model, served.service.template, served.device, settings, 0)
    talk.messages = list(said[:-1])
    list(talk.ask(said[-1].content))
    return talk.messages[-1].content


def plain(text: str) -> str:
    """Letters and digits: what Markdown leaves as it is."""
    return re.sub(r"[^a-zA-Z0-9]", "", text)


def user(text: str) -> Message:
    return Message("user", text)


# --- a conversation --------------------------------------------------------------------------------------------------


def test_a_conversation(page: Page, served: Any) -> None:
    """Ask, ask again, edit, retry, reload, clear."""
    page.until(lambda: page.texts("#model") == ["m"])
    assert page.one("#greeting").is_displayed() and page.driver.switch_to.active_element == page.one("#question")
    page.open({"messages": [], "temperature": 0})
    page.until(lambda: page.texts("#model") == ["m"])

    page.ask("Who are you?")
    first = answer_to(served, user("Who are you?"))
    assert [plain(text) for text in page.answered()] == [plain(first)]
    assert page.texts(".user .said") == ["Who are you?"] and not page.one("#empty").is_displayed()

    page.ask("And now?")
    second = answer_to(served, user("Who are you?"), Message("assistant", first), user("And now?"))
    assert [plain(text) for text in page.answered()] == [plain(first), plain(second)]
    assert page.driver.switch_to.active_element == page.one("#question"), "to go on typing"

    page.all(".user")[0].find_element(By.CSS_SELECTOR, ".tools button:last-child").click()
    area = page.one(".edit textarea")
    assert area.get_attribute("value") == "Who are you?" and page.driver.switch_to.active_element == area
    area.send_keys(Keys.ESCAPE)
    assert page.texts(".user .said") == ["Who are you?", "And now?"]

    page.all(".user")[0].find_element(By.CSS_SELECTOR, ".tools button:last-child").click()
    page.one(".edit textarea").send_keys(" Really?")
    page.button("Send", ".edit").click()
    edited = answer_to(served, user("Who are you? Really?"))
    assert [plain(text) for text in page.answered()] == [plain(edited)] and edited != first
    assert page.texts(".user .said") == ["Who are you? Really?"]

    page.button("Retry", ".assistant").click()
    assert [plain(text) for text in page.answered()] == [plain(edited)]

    page.driver.refresh()
    assert [plain(text) for text in page.answered()] == [plain(edited)]
    assert page.texts(".user .said") == ["Who are you? Really?"]

    page.button("Clear").click()
    assert not page.all(".turn") and page.kept()["messages"] == [] and page.one("#greeting").is_displayed()


def test_settings_reach_the_model_and_are_kept(page: Page, served: Any) -> None:
    page.until(lambda: page.texts("#model") == ["m"])
    page.button("Settings").click()
    page.one("#system").send_keys("Be brief.")
    slider = page.one("#temperature")
    slider.send_keys(Keys.HOME)
    assert page.one("#temperature-value").text == "0"
    page.button("Done").click()
    page.ask("Who are you?")
    expected = answer_to(served, Message("system", "Be brief."), user("Who are you?"))
    assert [plain(text) for text in page.answered()] == [plain(expected)]
    page.driver.refresh()
    page.button("Settings").click()
    assert page.one("#system").get_attribute("value") == "Be brief." and slider_at(page) == "0"
    page.one("#system").send_keys(Keys.ESCAPE)
    assert not page.one("#settings").is_displayed()


def slider_at(page: Page) -> str:
    return str(page.one("#temperature").get_attribute("value"))


@pytest.mark.parametrize("how", ["button", "escape"])
def test_a_long_answer_streams_and_is_stopped(driver: Any, long: Any, until: Any, how: str) -> None:
    page = Page(driver, long.url, until).open({"messages": [], "temperature": 0})
    page.until(lambda: page.texts("#model") == ["m"])
    page.ask("Go on")
    lengths = {page.until(lambda: len(page.texts(".assistant .said")[0])) for _ in range(3)}
    page.until(lambda: len(page.texts(".assistant .said")[0]) > max(lengths))
    assert page.all("[aria-busy=true]") and not page.one("#send").is_displayed()
    if how == "button":
        page.button("Stop").click()
    else:
        page.one("#question").send_keys(Keys.ESCAPE)
    [said] = page.answered()
    until(long.quiet)
    assert page.texts(".turn .note") == ["Stopped."] and page.one("#send").is_displayed()
    assert answer_to(long, user("Go on")).startswith(page.kept()["messages"][1]["content"])
    page.driver.refresh()
    assert page.answered() == [said]
    assert page.complaints() == []


def test_leaving_the_page_ends_the_text(driver: Any, long: Any, until: Any) -> None:
    page = Page(driver, long.url, until).open({"messages": [], "temperature": 0})
    page.until(lambda: page.texts("#model") == ["m"])
    page.ask("Go on")
    until(lambda: long.counts()["running"] == 1)
    page.driver.get("about:blank")
    until(long.quiet)


def test_enter_sends_and_shift_enter_does_not(page: Page) -> None:
    page.until(lambda: page.texts("#model") == ["m"])
    low = page.one("#question").size["height"]
    for keys in ("one", Keys.SHIFT + Keys.ENTER, "two"):
        page.one("#question").send_keys(keys)
    assert page.one("#question").get_attribute("value") == "one\ntwo" and not page.all(".turn")
    assert page.one("#question").size["height"] > low
    page.one("#question").send_keys(Keys.ENTER)
    page.answered()
    assert page.texts(".user .said") == ["one\ntwo"] and page.one("#question").get_attribute("value") == ""
    page.one("#question").send_keys("   ", Keys.ENTER)
    assert len(page.all(".user")) == 1


# --- faults ----------------------------------------------------------------------------------------------------------


def test_a_refusal_is_told_in_words_and_can_be_mended(page: Page) -> None:
    page.until(lambda: page.texts("#model") == ["m"])
    page.ask("日本")
    page.until(lambda: page.all(".fault"))
    assert "tokenizer has no '日'" in page.one(".fault").text and page.one(".fault").get_attribute("role") == "alert"
    page.button("Try again", ".fault").click()
    page.until(lambda: page.all(".fault"))
    page.driver.get_log("browser")  # which notes that the server has refused
    page.button("Edit", ".user").click()
    page.one(".edit textarea").clear()
    page.one(".edit textarea").send_keys("Japan", Keys.ENTER)
    assert page.answered() and not page.all(".fault")


def test_a_server_that_is_gone(driver: Any, serve: Any, until: Any) -> None:
    going = serve()
    page = Page(driver, going.url, until).open()
    page.until(lambda: page.texts("#model") == ["m"])
    going.server.should_exit = True
    until(lambda: not going.service.worker.thread.is_alive())
    page.ask("Hello")
    page.until(lambda: page.all(".fault"))
    assert "cannot be reached" in page.one(".fault").text and page.button("Try again", ".fault")
    page.driver.get_log("browser")


def test_an_answer_that_breaks_off_keeps_what_there_is(driver: Any, serve: Any, make_model: Any, until: Any) -> None:
    going = serve(model=make_model(context=8192, endless=True))
    page = Page(driver, going.url, until).open({"messages": [], "temperature": 0})
    page.until(lambda: page.texts("#model") == ["m"])
    page.ask("Go on")
    page.until(lambda: len(page.texts(".assistant .said")[0]) > 20)
    going.server.should_exit = True
    page.until(lambda: page.all(".fault"))
    assert "broke off: the server is stopping" in page.one(".fault").text
    assert len(page.texts(".assistant .said")[0]) > 20
    page.driver.get_log("browser")


def test_a_token_is_asked_for_and_kept_for_the_tab(driver: Any, serve: Any, until: Any) -> None:
    locked = serve(token=TOKEN)
    page = Page(driver, locked.url, until).open()
    for word in ("wrong-token", TOKEN):
        page.until(lambda: page.one("#locked").is_displayed())
        page.one("#token").send_keys(word, Keys.ENTER)
    page.until(lambda: page.texts("#model") == ["m"])
    page.ask("Who are you?")
    assert page.answered()
    assert page.script("return sessionStorage.getItem('token')") == TOKEN
    assert TOKEN not in json.dumps(page.kept())
    page.driver.get_log("browser")  # which notes two refusals


def test_a_model_that_cannot_talk_says_so(driver: Any, serve: Any, until: Any) -> None:
    page = Page(driver, serve(talks=False).url, until).open()
    page.until(lambda: "not tuned" in page.one("#hint").text)
    page.ask("Hello")
    page.until(lambda: page.all(".fault"))
    assert "Type silicon finetune" in page.one(".fault").text
    page.driver.get_log("browser")


def test_a_conversation_that_has_outgrown_the_model_says_so(page: Page) -> None:
    old = [
        {"role": role, "content": f"{n} something is said here"} for n in range(20) for role in ("user", "assistant")
    ]
    page.open({"messages": old, "temperature": 0})
    page.until(lambda: page.texts("#model") == ["m"])
    page.ask("And now?")
    page.until(lambda: len(page.answered()) == 21)
    assert any("no longer fit" in note for note in page.texts(".note"))


# --- what a model's text may do --------------------------------------------------------------------------------------


def with_markdown() -> Any:
    said = [("user", "<b>Show</b> **me**"), ("assistant", MARKDOWN), ("user", "x" * 300), ("assistant", "Good.")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def test_markdown_becomes_elements_and_nothing_else_does(page: Page) -> None:
    page.open(with_markdown())
    page.until(lambda: page.texts("#model") == ["m"])
    first = ".turn:nth-child(2) .said"
    assert page.texts(f"{first} em") == ["slanted"]
    assert page.texts(f"{first} strong") == ["bold with code"] and page.texts(f"{first} strong code") == ["code"]
    assert page.texts(f"{first} p code")[1:] == ["<b>code</b>"]
    assert page.texts(f"{first} ul li") == ["one", 'two <img src=x onerror="window.hacked = 1">']
    assert page.texts(f"{first} ol li") == ["three", "four"] and page.one(f"{first} ol").get_attribute("start") == "3"
    assert page.texts(f"{first} pre code")[0].splitlines()[:1] == ["<script>window.hacked = 2</script>"]
    assert "2 * 3 * 4 snake_case_name" in page.texts(f"{first} p")[0]
    assert page.texts(".user .said")[0] == "<b>Show</b> **me**", "what people write is shown as it is"
    assert not page.all("#talk img, #talk script, #talk a, #talk b")
    assert page.script("return window.hacked") is None


@pytest.mark.parametrize(
    "kept", ["null", "{", '"x"', '{"messages": 5}', '{"messages": [null]}', '{"temperature": "x"}']
)
def test_what_was_kept_may_be_anything(page: Page, kept: str) -> None:
    page.driver.get(f"{page.url}/health")
    page.script("localStorage.setItem('siliconlm', arguments[0])", kept)
    page.driver.get(page.url)
    page.until(lambda: page.texts("#model") == ["m"])
    page.ask("Hello")
    assert page.answered()


def test_no_injected_script_runs(page: Page) -> None:
    """The policy, as the browser takes it."""
    for attempt in ("made.textContent = 'window.hacked = 1'", "document.body.innerHTML = '<i>x</i>'"):
        with pytest.raises(JavascriptException, match="Trusted"):
            page.script("const made = document.createElement('script');" + attempt)
    page.script(
        "const node = document.createElement('img'); node.src = 'https://example.org/x.png'; document.body.append(node)"
    )
    page.until(lambda: [entry for entry in page.complaints() if "Content Security Policy" in entry])
    assert page.script("return window.hacked") is None
    page.driver.get_log("browser")


# --- how it looks ----------------------------------------------------------------------------------------------------

CONTRAST = """
const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = numbers(getComputedStyle(node).backgroundColor);
    if (colour.length < 4 || colour[3] > 0) return colour;
  }
};
return [...document.querySelectorAll(arguments[0])].map((node) => {
  const [one, two] = [numbers(getComputedStyle(node).color), ground(node)].map(light);
  return [node.textContent.slice(0, 30), (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05)];
});
"""
WORDS = "h1, header button, #send, .said p, .said li, .said code, .user .said, .tools button, .note, #settings label"
WORDS += ", #settings button, output"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE])
def test_every_size_and_colour(page: Page, tmp_path: Path, scheme: str, size: tuple[int, int]) -> None:
    page.look(size, scheme)
    kept = with_markdown()
    kept["messages"][-1]["note"] = "Stopped."
    page.open(kept)
    page.until(lambda: page.texts("#model") == ["m"])
    dark = sum(map(int, re.findall(r"\d+", page.one("body").value_of_css_property("background-color"))[:3])) < 200
    assert dark == (scheme == "dark")
    weak = [(text, ratio) for text, ratio in page.script(CONTRAST, WORDS) if ratio < 4.5]
    assert not weak, "less contrast than WCAG AA asks for"
    assert page.script("return document.scrollingElement.scrollWidth <= innerWidth")
    assert page.script("return document.getElementById('scroll').scrollWidth <= innerWidth")
    wide = "return [...document.querySelectorAll('body *:not(pre *, dialog *, .hidden)')].filter((node) => {"
    wide += "const at = node.getBoundingClientRect(); return at.right > innerWidth + 1 || at.left < -1 })"
    assert page.script(wide + ".map((node) => node.outerHTML.slice(0, 80))") == []
    page.button("Settings").click()
    assert page.script("return document.querySelector('#settings').getBoundingClientRect().right <= innerWidth")
    page.shot(f"{scheme}-{size[0]}", tmp_path)
    page.look()


def test_all_controls_have_names_and_show_where_the_focus_is(page: Page) -> None:
    page.open(with_markdown())
    page.until(lambda: page.texts("#model") == ["m"])
    controls = page.all("button, textarea, input")
    assert len(controls) > 10 and all(control.accessible_name for control in controls if control.is_displayed())
    assert page.one("#talk").get_attribute("aria-live") == "polite"
    page.one("#question").send_keys(Keys.TAB)
    focused = page.driver.switch_to.active_element
    assert focused.text == "Send" and focused.value_of_css_property("outline-style") == "solid"
    page.one("h1").click()
    for _ in range(4):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
    assert page.driver.switch_to.active_element.text in ("Copy", "Edit"), "the tools of a message are reached by Tab"
