"""The page of a comparison in a real browser: it draws, reads out, switches, and fits a phone."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clex.evaluation.page import render_page, write_page

NATIVE = 256
LENGTHS = (64, 128, 256, 512, 1024, 2048)
# Name, label, and loss in nats by doublings past the native window.
METHODS = (
    ("base", "the model as it is", 1.0),
    ("plain", "plain fine-tuning", 0.7),
    ("yarn", "YaRN(t), chunk skips", 0.04),
    ("clex", "CLEX </script><b>", 0.03),
)


def make_summary() -> dict[str, Any]:
    """A comparison as `clex.comparison.summary` gives it, with something in every part."""
    cells = [cell for name, _, slope in METHODS for cell in _cells(name, slope)]
    return {
        "title": 'Four ways & "more" <here>',
        "written": "2026-01-02T03:04:05+00:00",
        "model": {"name": "tiny", "native_length": NATIVE, "max_scale": 8.0},
        "text": {
            "data": "train",
            "eval_data": "test",
            "documents": 9,
            "windows": 9,
            "target": 63,
        },
        "budget": {
            "tokens": 81_920,
            "steps": 40,
            "settings": {"depth": "full", "steps": 40, "rate": 1e-4},
        },
        "seeds": [0, 1],
        "reference": "yarn",
        "methods": [_method(name, label) for name, label, _ in METHODS],
        "perplexity": cells,
        "differences": [
            {
                **{key: cell[key] for key in ("method", "protocol", "length")},
                **{"percent": -1.5, "low": -2.0, "high": -0.5},
            }
            for cell in cells
            if cell["method"] != "yarn"
        ],
        "verdicts": [
            {"protocol": p, "length": n, "best": "clex", "ppl": 30.0, "ties": ["yarn"]}
            for p in ("target", "window")
            for n in LENGTHS
        ],
        "sentences": ["At 2,048 tokens CLEX is ahead.", "One seed."],
        "level_rule": "Level: the interval includes 0.",
        "positions": [
            {"method": name, "start": 256 * k, "stop": 256 * (k + 1), "ppl": 30.0 + k}
            for name, _, _ in METHODS
            for k in range(8)
        ],
        "retention": [
            {"method": name, "length": n, "ppl": 36.0, "percent": 0.5, "low": 0.1, "high": 0.9}
            for name, _, _ in METHODS
            for n in LENGTHS[:3]
        ],
        "frequencies": [_frequencies(name) for name, _, _ in METHODS[1:]],
        "maps": [_map(name, score) for score in ("exact", "gain") for name, _, _ in METHODS],
        "retrieval": [
            {
                **{"task": "needle", "score": score, "method": name, "length": n},
                **{"mean": 0.5, "low": 0.3, "high": 0.7, "trials": 10, "above_chance": True},
            }
            for score in ("exact", "gain")
            for name, _, _ in METHODS
            for n in LENGTHS[2:]
        ],
        "tasks": [
            {
                **{"task": "hellaswag", "metric": "acc_norm", "method": name, "value": 0.31},
                **{"low": 0.29, "high": 0.33, "items": 200, "cut": 0},
            }
            for name, _, _ in METHODS
        ],
        "rows": [],
        "failures": [
            {
                **{"method": "plain", "seed": 1, "what": "training"},
                **{"error": "the loss is not a number", "log": "runs/plain/seed-1/error.log"},
            }
        ],
        "commands": [{"command": "clex compare quick.toml --out quick", "started": "2026"}],
        "versions": {"clex": "0", "torch": "2"},
        "recipe": 'model = "tiny"  # a comment',
    }


def _cells(name: str, slope: float) -> Iterator[dict[str, Any]]:
    for protocol in ("target", "window"):
        for length in LENGTHS:
            past = max(0.0, math.log2(length / NATIVE))
            value = 36 * math.exp(slope * past) * (1.5 if length < NATIVE else 1.0)
            yield {
                **{"method": name, "protocol": protocol, "length": length, "scale": 1.0},
                **{"ppl": value, "low": value * 0.95, "high": value * 1.05},
                **{"seeds": [value * 0.99, value * 1.01], "min": value * 0.99},
                **{"max": value * 1.01, "accuracy": 0.4, "bits_per_byte": 1.5, "documents": 9},
                **{"tokens": 1000, "rank": "best" if name == "clex" else None},
            }


def _method(name: str, label: str) -> dict[str, Any]:
    return {
        **{"name": name, "label": label, "how": "trained: full", "trained": name != "base"},
        **{"weights": None, "deviates": "twice the steps" if name == "plain" else None},
        **{"tokens": 81_920, "train_seconds": 40.0, "measure_seconds": 6.5, "state": "done"},
        **{"runs": [], "clex": {"method": name}, "training": None},
    }


def _frequencies(name: str) -> dict[str, Any]:
    def ratio(t: float) -> list[float]:
        return [t ** (-i / 15) for i in range(16)]

    return {
        **{"method": name, "seed": 0, "layer_type": "all"},
        "inv_freq": [500 ** (-i / 16) for i in range(16)],
        "scales": [
            {"scale": t, "ratio": ratio(t), "attention_factor": 1.1} for t in (2.0, 4.0, 8.0)
        ],
    }


def _map(name: str, score: str) -> dict[str, Any]:
    return {
        **{"task": "needle", "title": "Needle in real text", "score": score, "method": name},
        **{"chance": 0.1, "lengths": list(LENGTHS[2:]), "depths": [0.0, 0.5, 1.0]},
        "values": [[0.9, 0.5, 0.0, None], [1.0, 0.2, 0.1, 0.0], [1.0, 1.0, 0.8, 0.7]],
    }


def test_the_page_needs_nothing_but_itself() -> None:
    page = render_page(make_summary())
    # Nothing that a browser would fetch: the SVG namespace is a name, not an address.
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|script|img|iframe)[^>]+(src|href)=(?!\"data:)", page)
    assert "@import" not in page and "url(#" in page


def test_data_cannot_end_its_script() -> None:
    page = render_page(make_summary())
    assert page.count("</script>") == 2
    assert "<title>Four ways &amp; &quot;more&quot; &lt;here&gt;</title>" in page


def test_numbers_that_are_none() -> None:
    summary = make_summary()
    summary["perplexity"][0]["ppl"] = math.inf
    page = render_page(summary)
    assert "Infinity" not in page.split('id="data">')[1].split("</script>")[0]


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright package")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
                *("--no-first-run", "--disable-background-networking"),
                *("--disable-component-update", "--disable-sync"),
            ],
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(make_summary(), path)
    return path


class Opened:
    """The report in a window of some width, with all that it said and asked for."""

    def __init__(self, browser: Any, report: Path, width: int, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())
        self.page.wait_for_selector("#frequencies path[data-method]")


@pytest.fixture(params=[1200, 360], ids=["desk", "phone"])
def opened(browser: Any, report: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    one = Opened(browser, report, request.param)
    yield one
    one.context.close()


def test_it_draws_without_a_word_and_without_the_network(opened: Opened, report: Path) -> None:
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [report.as_uri()]
    page = opened.page
    headings = page.locator("h2").all_inner_texts()
    assert len(headings) == 9 and "Who is ahead" in headings
    # Two protocols, positions, two differences, frequencies.
    assert page.locator("figure .plot svg").count() == 6
    assert page.locator("#failures").inner_text().count("the loss is not a number") == 1
    assert page.locator(".heat").count() == len(METHODS)
    assert "CLEX </script><b>" in page.locator("#tables").inner_text()


def test_nothing_is_wider_than_the_window(opened: Opened) -> None:
    wide = opened.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
    # Charts are drawn at the width they have, so that their letters stay readable.
    plots = opened.page.locator("figure .plot svg")
    for i in range(plots.count()):
        box = plots.nth(i).bounding_box()
        assert 280 <= box["width"] <= opened.page.viewport_size["width"]
        assert float(plots.nth(i).get_attribute("width")) == pytest.approx(box["width"], abs=1)


def test_hover_reads_the_values(opened: Opened) -> None:
    page = opened.page
    chart = page.locator("figure", has_text="Same target tokens").first
    assert not chart.locator(".tip").is_visible()
    plot = chart.locator(".plot")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 30, box["y"] + 100)
    tip = chart.locator(".tip").inner_text()
    expected = 36 * math.exp(3 * 0.03)
    assert "2,048" in tip and f"{expected:.2f}" in tip
    assert f"{expected * 0.95:.2f} to {expected * 1.05:.2f}" in tip
    assert tip.index("CLEX") < tip.index("YaRN") < tip.index("the model as it is")
    inside = page.evaluate(
        "t => t.getBoundingClientRect().right <= innerWidth",
        chart.locator(".tip").element_handle(),
    )
    assert inside
    assert chart.locator(".tip svg").first.bounding_box()["width"] == 22  # a mark, not a picture
    page.mouse.move(0, 0)
    assert not chart.locator(".tip").is_visible()


def test_arrow_keys_read_the_values(opened: Opened) -> None:
    chart = opened.page.locator("figure", has_text="Same target tokens").first
    chart.focus()
    opened.page.keyboard.press("ArrowRight")
    assert "256" in chart.locator(".tip").inner_text()
    opened.page.keyboard.press("ArrowRight")
    assert "512" in chart.locator(".tip").inner_text()
    assert "512" in chart.locator("[aria-live]").inner_text()
    opened.page.keyboard.press("Escape")
    assert not chart.locator(".tip").is_visible()


def test_the_legend_switches_a_curve_off_and_on(opened: Opened) -> None:
    page = opened.page
    chart = page.locator("figure", has_text="Same target tokens").first
    top_before = chart.locator("svg text").all_inner_texts()
    curves = page.locator('figure path.line[data-method="base"]')
    drawn = curves.count()
    assert drawn > 0
    button = page.locator('[data-toggle="base"]')
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert curves.count() == 0
    assert page.locator('figure path.line[data-method="clex"]').count() > 0
    page.locator('[data-toggle="plain"]').click()
    assert chart.locator("svg text").all_inner_texts() != top_before  # the axis fits what is left
    button.click()
    page.locator('[data-toggle="plain"]').click()
    assert curves.count() == drawn
    assert chart.locator("svg text").all_inner_texts() == top_before


def test_scales_and_scores_are_chosen(opened: Opened) -> None:
    page = opened.page
    frequencies = page.locator("#frequencies")
    assert "t = 8" in frequencies.locator("figcaption").inner_text()
    before = frequencies.locator('path.line[data-method="clex"]').get_attribute("d")
    frequencies.get_by_role("button", name="t = 2").click()
    assert "t = 2" in frequencies.locator("figcaption").inner_text()
    assert frequencies.locator('path.line[data-method="clex"]').get_attribute("d") != before
    page.locator("#retrieval").get_by_role("button", name="gained most").click()
    assert "Chance: 0.10" in page.locator("#retrieval").inner_text()


def test_dark_where_the_reader_wants_it(browser: Any, report: Path) -> None:
    def paper(scheme: str) -> str:
        one = Opened(browser, report, 800, color_scheme=scheme)
        colour: str = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
        one.context.close()
        return colour

    assert paper("light") == "rgb(255, 255, 255)"
    assert sum(map(int, re.findall(r"\d+", paper("dark")))) < 120


def test_an_empty_comparison_is_a_page_too(browser: Any, tmp_path: Path) -> None:
    summary = make_summary()
    for name in ("perplexity", "differences", "verdicts", "positions", "retention", "frequencies"):
        summary[name] = []
    for name in ("maps", "retrieval", "tasks", "sentences"):
        summary[name] = []
    path = tmp_path / "report.html"
    write_page(summary, path)
    context = browser.new_context()
    page = context.new_page()
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(path.as_uri())
    assert said == []
    assert "failed" in page.locator("#failures").inner_text()
    context.close()
