"""report.html must work: as HTML, without a network, and under a reader's hands in a browser.

A small network's report is written once; its page is parsed, compared with results.json, and opened
in headless Chromium, where the replay is clicked, dragged and typed at through the DevTools
protocol. Without Chromium (Debian: apt-get install chromium) the tests of the browser are skipped.

    python -m pytest tests/test_page.py
"""

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import count

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_evaluation import SMALL, gestures, make_tiny
from torch import nn

from evaluation import replay
from evaluation.__main__ import main
from train_diffusion_ddim import (
    NUM_TASKS,
    TrainConfig,
    build_model,
    build_scheduler,
    press_edges,
    recreate,
)
from trainlib.checkpoint import save_checkpoint
from trainlib.state import TrainState
from trainlib.tables import ROUNDING

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "img", "input", "br", "hr"}
STEPS = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = build_model(TrainConfig(**SMALL))
    for p in net.output_projection.parameters():
        nn.init.normal_(p, std=0.1)
    return net.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """A report of a random network on 8 gestures, and a checkpoint path that needs escaping."""
    run, data = tmp_path_factory.mktemp("<run> & co"), tmp_path_factory.mktemp("data")
    np.save(data / "a_actions.npy", gestures(8, seed=3).numpy())
    config = TrainConfig(**SMALL, data_dir=str(ROOT / "test_data_mini/train"))
    state = TrainState(model, build_scheduler(config), config, config.num_epochs, NUM_TASKS)
    save_checkpoint(run / "diffusion_checkpoint_epoch_0.pth", state.to_checkpoint(0, None))
    argv = ["--checkpoint", str(run), "--data_dir", str(data), "--quick", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch:
        make_tiny(patch)
        assert main([*argv, "--num_inference_steps", str(STEPS)]) == 0
    return run / "report"


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "report.html").read_text("utf-8")


# ----------------------------------------------------------------------------------------
# HTML
# ----------------------------------------------------------------------------------------


class Strict(HTMLParser):
    """Collects what a page names and shows; refuses tags that are not closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.numbers = [], [], [], []
        self.path = None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            self.links += [attributes[name]] if name in attributes else []
        self.path = attributes.get("data-path")

    def handle_data(self, text):
        if self.path:
            self.numbers.append((self.path, text))
            self.path = None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


@pytest.fixture(scope="module")
def parsed(html):
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def test_page_is_one_well_formed_file_that_loads_nothing(html, parsed):
    assert len(parsed.ids) == len(set(parsed.ids))
    for link in parsed.links:
        assert link.startswith("data:") or link[1:] in parsed.ids, link[:80]
    assert not re.search(r"https?://|@import|url\(|{{", html)
    assert "default-src 'none'" in html
    assert len(html) < 4e6


def test_text_of_the_user_is_escaped(html):
    assert "<run>" not in html and "&lt;run&gt; &amp; co" in html


def test_numbers_are_those_of_results_json(folder, parsed):
    protocols = json.loads((folder / "results.json").read_text("utf-8"))["protocols"]
    shown = set()
    for path, text in parsed.numbers:
        protocol, setting, metric = path.split("|")
        value = protocols[protocol][setting][metric]["value"]
        shown.add((protocol, setting, metric))
        if text == "–":
            assert value is None
        else:
            assert float(text.replace(",", "")) == pytest.approx(value, rel=6e-3, abs=ROUNDING), (
                path
            )
    kept = {"keyframes", "denoise", "generate"}
    whole = {(p, s, m) for p in kept for s, row in protocols[p].items() for m in row}
    assert whole <= shown


# ----------------------------------------------------------------------------------------
# REPLAY — its data
# ----------------------------------------------------------------------------------------


def decode(text, dtype, low, high):
    whole = np.frombuffer(base64.b64decode(text), dtype=dtype)
    return torch.from_numpy(low + (high - low) * whole / np.iinfo(dtype).max).reshape(-1, 250, 3)


def test_replay_shows_what_was_scored(model):
    scheduler = build_scheduler(TrainConfig(**SMALL))
    sampling = {"num_inference_steps": STEPS, "eta": 0.0, "sampler": "ddim"}
    x_0 = gestures(30, seed=5)
    x_0[3] = 0  # without a press edge: not shown
    recreated = recreate(model, scheduler, x_0, **sampling)
    rows, names = replay.pick_gestures(x_0, recreated)
    data = replay.make_replay(model, scheduler, x_0, recreated, sampling)
    assert data["names"] == names and 3 not in rows
    task = data["tasks"][0]
    for i, row in enumerate(rows):
        original = decode(data["x_0"][i], np.uint16, 0, 1)[0]
        assert torch.allclose(original, x_0[row].double(), atol=1e-5)
        x_t = decode(task["x_t"][i], np.uint8, *replay.X_T_RANGE)
        estimate = decode(task["estimate"][i], np.uint16, 0, 1)
        assert len(x_t) == len(estimate) == len(task["sigmas"]) == len(task["rms"][i]) == STEPS
        assert torch.allclose(estimate[-1], recreated[row].double().clamp(0, 1), atol=1e-4)
        rms = float(((recreated[row] - x_0[row]) ** 2).mean().sqrt())
        assert task["rms"][i][-1] == pytest.approx(rms, rel=6e-3)
        assert task["given"][i] == torch.nonzero(press_edges(x_0[row : row + 1])[0])[:, 0].tolist()
        assert x_t[0].std() > 0.4  # pure noise has 0.5, less what the range clips
    assert data["tasks"][1]["sigmas"][0] == pytest.approx(replay.SIGMA, rel=0.05)
    assert not any(data["tasks"][1]["given"])


def test_the_worst_and_a_typical_gesture_of_each_type_are_picked():
    x_0 = gestures(400, seed=6)
    noise = torch.linspace(0, 0.3, 400)[:, None, None] * torch.ones(1, 250, 3)
    recreated = x_0 + noise
    rows, names = replay.pick_gestures(x_0, recreated)
    assert len(rows) == len(names) == 20 and 399 in rows and len(set(rows.tolist())) == 20
    assert {name.split(",")[0] for name in names} == {
        *("click", "horizontal", "vertical", "diagonal")
    }
    assert names[4].startswith("click, worst of ")
    few, few_names = replay.pick_gestures(x_0[:2], recreated[:2])
    assert len(few) == len(few_names) <= 2
    assert replay.pick_gestures(0 * x_0[:3], x_0[:3])[1] == []


# ----------------------------------------------------------------------------------------
# REPLAY — in a browser
# ----------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium, spoken to by the DevTools protocol through a pipe."""

    def __init__(self, profile):
        to_browser, self.write = os.pipe()
        self.read, from_browser = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "about:blank"]
        # Chromium reads descriptor 3 and writes descriptor 4
        code = f'exec 3<&{to_browser} 4>&{from_browser}; exec "$@"'
        self.process = subprocess.Popen(
            ["bash", "-c", code, "chromium", CHROMIUM, *flags],
            pass_fds=(to_browser, from_browser), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self.ids, self.buffer, self.events, self.session = count(1), b"", [], {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.buffer:
            data = os.read(self.read, 1 << 20)
            assert data, "chromium has gone"
            self.buffer += data
        text, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(text)

    def send(self, method, **params):
        i = next(self.ids)
        text = json.dumps({"id": i, "method": method, "params": params, **self.session})
        os.write(self.write, text.encode() + b"\0")
        while (answer := self.message()).get("id") != i:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url):
        self.events.clear()
        self.send("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self.message())

    def run(self, script):
        """Evaluate a script, or the promise that it returns."""
        result = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def click(self, selector):
        """Click the middle of an element, as a hand would."""
        place = self.run(
            f"(e => {{ e.scrollIntoView({{block: 'center'}}); const r = e.getBoundingClientRect();"
            f"return [r.x + r.width / 2, r.y + r.height / 2] }})"
            f"(document.querySelector({selector!r}))"
        )
        mouse = {"x": place[0], "y": place[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **mouse)

    def key(self, key, code, text=""):
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                windowsVirtualKeyCode=code, text=text if kind == "keyDown" else "",
            )  # fmt: skip

    def faults(self):
        """What went wrong since `open`: exceptions, console errors, requests beyond the file."""
        found = []
        for event in self.events:
            params = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"]["text"])
            if event.get("method") == "Runtime.consoleAPICalled" and params["type"] == "error":
                found.append(params["args"])
            if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
            if event.get("method") == "Network.requestWillBeSent":
                url = params["request"]["url"]
                found += [] if url.startswith(("file:", "data:")) else [url]
        return found

    def close(self):
        self.process.terminate()
        self.process.wait(timeout=20)
        os.close(self.read)
        os.close(self.write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no browser: apt-get install chromium, and this test runs")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, folder):
    """The browser with the page open; what it complained of fails the test."""
    browser.open((folder / "report.html").as_uri())
    yield browser
    browser.run("new Promise(done => setTimeout(done, 50))")
    assert browser.faults() == []


PHONES = ("original", "noisy", "recreated")


def drawn(browser):
    """The pictures of the three canvases."""
    return [browser.run(f"document.getElementById('{name}').toDataURL()") for name in PHONES]


def value(browser, name):
    return int(browser.run(f"document.getElementById('{name}').value"))


def wait_until(browser, condition):
    browser.run(
        "new Promise((done, fail) => { const start = performance.now(); (function look() {"
        f"if ({condition}) done(); else if (performance.now() - start > 8000) fail('in vain');"
        "else setTimeout(look, 20) })() })"
    )


def test_canvases_are_drawn(opened):
    for name in PHONES:
        colors = opened.run(
            f"(c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width,"
            f"c.height).data.buffer)).size)(document.getElementById('{name}'))"
        )
        assert colors > 10, name
    original, noisy, recreated = drawn(opened)
    assert len({original, noisy, recreated}) == 3


def test_frame_scrubber_moves_all_three(opened):
    before = drawn(opened)
    opened.run("document.getElementById('frame').focus()")
    opened.key("Home", 36)
    assert value(opened, "frame") == 0
    opened.key("ArrowRight", 39)
    assert value(opened, "frame") == 1
    assert all(a != b for a, b in zip(before, drawn(opened), strict=True))
    assert opened.run("document.getElementById('frame-text').textContent") == "2 of 500 ms"


def test_step_scrubber_changes_what_is_denoised_alone(opened):
    before = drawn(opened)
    assert value(opened, "step") == STEPS  # it begins with the answer
    opened.run("document.getElementById('step').focus()")
    opened.key("Home", 36)
    after = drawn(opened)
    assert value(opened, "step") == 1
    assert before[0] == after[0] and before[1] != after[1] and before[2] != after[2]
    assert opened.run("document.getElementById('step-text').textContent") == f"step 1 of {STEPS}"


def test_play_and_pause_by_mouse_and_keyboard(opened):
    opened.run("document.getElementById('speed').value = 1")
    start, before = value(opened, "frame"), drawn(opened)
    opened.click("#play-frame")
    wait_until(opened, f"document.getElementById('frame').value != {start}")
    opened.key(" ", 32, " ")  # the button has the focus
    assert "Play" in opened.run("document.getElementById('play-frame').textContent")
    paused = value(opened, "frame")
    opened.run("new Promise(done => setTimeout(done, 150))")
    assert value(opened, "frame") == paused and drawn(opened) != before


def test_playing_the_denoising_ends_at_the_answer(opened):
    answer = drawn(opened)
    opened.click("#play-step")
    wait_until(opened, "document.getElementById('step').value == 1")
    wait_until(opened, "document.getElementById('play-step').textContent.includes('Play')")
    assert value(opened, "step") == STEPS and drawn(opened) == answer


def test_other_gestures_and_tasks_are_shown(opened, html):
    data = json.loads(re.search(r'id="replay-data">(.*?)</script>', html, re.DOTALL).group(1))
    seen = set()
    for i in range(len(data["names"])):
        opened.run(
            f"(s => {{ s.value = {i}; s.dispatchEvent(new Event('change')) }})"
            "(document.getElementById('gesture'))"
        )
        seen.add(drawn(opened)[0])
        noted = opened.run("document.getElementById('note-recreated').textContent")
        assert noted == f"RMS error {data['tasks'][0]['rms'][i][-1]:g}"
    assert len(seen) == len(data["names"])
    before = drawn(opened)
    opened.run(
        "(s => { s.value = 1; s.dispatchEvent(new Event('change')) })"
        "(document.getElementById('task'))"
    )
    after = drawn(opened)
    assert before[0] != after[0] and before[2] != after[2]  # no known frames are marked now


@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_phone_and_desk_in_both_color_schemes(opened, width):
    opened.send(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
    )  # fmt: skip
    wait_until(opened, f"innerWidth == {width}")
    assert opened.run("document.documentElement.scrollWidth") <= width
    colors = set()
    for scheme in ("light", "dark"):
        feature = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.send("Emulation.setEmulatedMedia", features=feature)
        colors.add(opened.run("getComputedStyle(document.body).backgroundColor"))
    assert len(colors) == 2
    opened.send("Emulation.setEmulatedMedia", features=[])


def test_without_javascript_all_but_the_replay_is_there(browser, folder):
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open((folder / "report.html").as_uri())
    browser.send("Emulation.setScriptExecutionDisabled", value=False)
    text = browser.run("document.body.innerText")
    assert "Every criterion of the plan" in text and "needs JavaScript" in text
    assert browser.run("document.getElementById('stage').hidden")
