"""The page of a run: whole in itself, true to the figures, readable without sight, and safe against what runs hold."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import fake_runs
import numpy as np
import pytest
from click.testing import CliRunner

from mlxpref.data.recipe import Recipe
from mlxpref.diagnosis import read_record
from mlxpref.report.charts import POINTS, Bars, Chart, Line, as_svg, draw, thinned
from mlxpref.report.page import names_of, page
from mlxpref.report.run_charts import compared
from mlxpref.report.serve import LIVE, server

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

NASTY = "<script>alert('x')</script> & \"so\""


def run(*arguments: Any) -> Any:
    from mlxpref.cli import main

    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


def achieved(goal: float | None, mean: float) -> dict[str, Any]:
    return {
        "goal": goal, "n": 2, "prompts": 2, "mean": mean, "interval": [mean - 1, mean + 1], "spread": [1, 9],
        "words": 20.0, "distinct": 1.0, "top_share": None, "deviation": 1.0,
    }  # fmt: skip


def with_everything(folder: Path, **options: Any) -> Path:
    """A run with control curve and evaluation beside it."""
    fake_runs.write_run(folder, **options)
    sample = {"index": 0, "text": f"{NASTY}\nand more", "score": 8.0}
    control = {
        "per_goal": [achieved(1, 2.0), achieved(10, 8.0)], "spearman": 0.8, "recipe": Recipe().as_dict(),
        "base": {"per_goal": [achieved(None, 5.0)], "samples": [{**sample, "goal": None}]},
        "samples": [{**sample, "goal": 10}], "prompts": [[{"role": "user", "content": NASTY}]],
        "options": {"scorer": "a:b", "attribute": None},
        "checkpoints": [
            {"step": step, "mean": mean, "interval": None, "nats": nats, "less_end": None}
            for step, mean, nats in ((10, 6.0, 2.5), (20, 8.5, 7.5), (30, 7.0, 5.0))
        ],
    }  # fmt: skip
    (folder / "control.json").write_text(json.dumps(control))
    change = {"responses": 5, "sum": 1.0, "per_token": 0.1}
    gaps = [{"above": 0, "to": 2, "pairs": 0, "accuracy": None}, {"above": 2, "to": None, "pairs": 7, "accuracy": 0.75}]
    view = {
        "by_gap": gaps, "change": {name: change for name in ("chosen", "rejected", "high_score_rejected")},
        "by_score": [{"score": 1, "responses": 5, "sum": -1, "per_token": -0.1}, {"score": 9, **change}],
    }  # fmt: skip
    found = {"views": {"top": view, "unconditioned": view}, "goal_sensitivity": {"mean": 4, "error": 1, "examples": 9},
             "high_score": 8}  # fmt: skip
    (folder / "evaluation.json").write_text(json.dumps(found))
    return folder


class Seen(HTMLParser):
    """What a page holds: tags that fit each other, addresses, and what each picture is called."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.unnamed = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "action", "srcset")]
        self.unnamed += tag == "svg" and not given.get("aria-label")
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    """Finds a font, style or script from elsewhere; a picture without words or a table; text that becomes markup."""
    folder = with_everything(tmp_path / "run", data={"contradicting": 500})
    assert run("report", folder).exit_code == 0
    text = (folder / "report.html").read_text(encoding="utf-8")
    seen = Seen(text)
    outside = [one for one in seen.addresses if not one.startswith(("#", "data:"))]
    assert outside == [] and "script" not in seen.tags and "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert seen.unnamed == 0 and seen.tags.count("svg") >= 12
    assert seen.tags.count("table") >= seen.tags.count("svg")
    assert "&lt;script&gt;alert" in text and "Wrong: Rows contradict each other" in text
    assert "base, without a goal · score 8" in text and "asked for 10 · score 8" in text
    assert "<td>0.75</td>" in text and "<td></td>" in text
    styles = re.findall("<style.*?</style>", text, flags=re.DOTALL)
    assert len(styles) == 1 and not re.search("#[0-9a-fA-F]{6}", text.replace(styles[0], ""))  # colours by name


def test_several_runs_are_compared(tmp_path: Path) -> None:
    """Finds a run that is left out, or shown under another's name."""
    one, other = fake_runs.write_run(tmp_path / "a" / "run"), fake_runs.write_run(tmp_path / "b" / "run", done=20)
    ran = run("report", one, other, "--out", tmp_path / "both.html", "--figures", tmp_path / "figures")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    Seen(text)
    assert ran.exit_code == 0 and "Runs side by side" in text
    assert "a/run" in text and "b/run" in text and "20 of 40 steps made" in text
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert {"loss.png", "loss.svg", "goal-chosen.svg", "a-run-loss.png", "b-run-loss.svg"} <= names
    assert list(names_of([read_record(one)])) == ["run"]
    assert run("report", one, one / ".." / "run", "--out", tmp_path / "one.html").exit_code == 0
    assert "Runs side by side" not in (tmp_path / "one.html").read_text(encoding="utf-8")


def test_a_run_without_validation_is_not_shown_as_validated(tmp_path: Path) -> None:
    """Finds training's accuracy beside another run's on validation rows, under one name."""
    long = "a-name-that-somebody-gave-to-a-run-with-all-its-settings-in-it-" * 2
    runs = fake_runs.write_run(tmp_path / "valid"), fake_runs.write_run(tmp_path / long, every=0)
    charts = {chart.name: chart for chart in compared(names_of([read_record(one) for one in runs]))}
    assert [line.name for line in charts["loss"].lines] == ["valid", f"{long} (training)"]
    assert charts["goal-chosen"].lines[0].name == "valid"
    draw(charts["loss"], tmp_path / "loss.png")  # finds a name that leaves no room for the axes


def test_figures_of_one_run(tmp_path: Path) -> None:
    folder = with_everything(tmp_path / "run")
    ran = run("report", folder, "--figures", tmp_path / "figures")
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert "checkpoints of steps 10, 30, 20." in page([read_record(folder)]) and "course.png" in names  # by distance
    assert ran.exit_code == 0 and {"control.svg", "calibration.png", "accuracy-by-gap.svg", "scores.png"} <= names


def test_ten_thousand_steps_are_a_page_of_one_size(tmp_path: Path) -> None:
    """Finds a point drawn for every step."""
    short, long = (page([read_record(fake_runs.write_run(tmp_path / str(n), n_steps=n))]) for n in (400, 10_000))
    assert len(long.encode()) < 1.3 * len(short.encode()) < 3e6


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    folder = fake_runs.write_run(tmp_path / "run")
    assert run("report", folder, "--port", "8123").exit_code == 2
    assert run("report", folder, "--open", "--out", "x.html").exit_code == 2
    assert run("report", tmp_path / "nowhere").exit_code == 1


# --- charts ---


def test_thinning_keeps_the_mean() -> None:
    x, y = np.arange(10_001.0), np.random.default_rng(0).normal(3, 1, 10_001)
    fewer, means = thinned(x, y)
    assert len(fewer) == len(means) == POINTS and abs(means.mean() - y.mean()) < 0.01
    assert thinned(x[:50], y[:50])[1] is not None and np.array_equal(thinned(x[:50], y[:50])[1], y[:50])


def test_a_table_says_what_is_drawn() -> None:
    x = np.arange(1.0, 101)
    chart = Chart("n", "T", "step", "y", (Line("train", x, x * 2), Line("valid", x[9::10], x[9::10] * 3, marked=True)))
    head, rows = chart.table()
    assert head == ["step", "train", "valid"] and rows[0] == ["10", "17", "30"] and rows[-1] == ["100", "197", "300"]
    assert "valid: 30 at 10, 300 at 100" in chart.in_words()
    bars = Chart("n", "T", "score", "y", bars=(Bars("a", (1.0, float("nan"))),), bins=("low", "high"))
    assert bars.table() == (["score", "a"], [["low", "1"], ["high", ""]])
    assert "nan" not in as_svg(bars).lower().replace("nance", "")


def test_scores_of_before_their_values_were_written_down(tmp_path: Path) -> None:
    """Finds a page that cannot be made of an older run."""
    folder = fake_runs.write_run(tmp_path / "run")
    facts = json.loads((folder / "run.json").read_text())
    facts["data"]["train"]["scores"] = {"edges": [0, 1], "chosen": [1], "rejected": [1]}
    (folder / "run.json").write_text(json.dumps(facts))
    assert "Scores of the training examples" not in page([read_record(folder)])
    facts["data"]["train"]["scores"]["values"] = [0.5]
    (folder / "run.json").write_text(json.dumps(facts))
    assert "Scores of the training examples" in page([read_record(folder)])


# --- a page that is served ---


@pytest.fixture
def served(tmp_path: Path) -> Any:
    folder = fake_runs.write_run(tmp_path / "run", done=20)
    made: list[int] = []

    def make() -> str:
        made.append(1)
        return page([read_record(folder)], head="<!-- live -->")

    with server(make, [folder / "metrics.jsonl"]) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{serving.server_address[1]}", made
        serving.shutdown()


def test_a_page_follows_its_run(served: Any) -> None:
    """Finds a page that is made for every look, one that stays as it was, and one that other names can reach."""
    folder, address, made = served

    def get(path: str, **headers: str) -> str:
        asked = urllib.request.Request(address + path, headers=headers)
        with urllib.request.urlopen(asked, timeout=20) as answer:
            return str(answer.read().decode())

    before = get("/state")
    assert f'<meta name="state" content="{before}">' in get("/")
    assert "20 of 40 steps made" in get("/") and "<!-- live -->" in get("/") and made == [1]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, **fake_runs.healthy(21, 40)}) + "\n")
    assert get("/state") != before and "21 of 40 steps made" in get("/") and made == [1, 1]
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "model": 3}))  # a TypeError, whatever reads it
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 22, "loss": 1.0}) + "\n")
    for path, headers, code in (("/etc", {}, 404), ("/", {"Host": "elsewhere.example"}, 403), ("/", {}, 503)):
        with pytest.raises(urllib.error.HTTPError) as error:
            get(path, **headers)
        error.value.close()
        assert error.value.code == code


# --- in a browser ---


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian, Ubuntu: apt install chromium)")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_browser_shows_it(tmp_path: Path, width: int) -> None:
    """Finds what a real browser complains of, asks for, or has to scroll sideways for."""
    folder = with_everything(tmp_path / "run", data={"contradicting": 500})
    run("report", folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    # What the page finds out about itself it writes into its title, which --dump-dom prints.
    probe = """<script>addEventListener("load", () => { document.title = JSON.stringify({
      wide: document.documentElement.scrollWidth, room: innerWidth,
      asked: performance.getEntriesByType("resource").map(one => one.name),
      empty: [...document.querySelectorAll("svg")].filter(one => one.getBoundingClientRect().width < 100).length }) });
      </script>"""
    (folder / "probed.html").write_text(text.replace("</body>", f"{probe}</body>"), encoding="utf-8")
    ran = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--hide-scrollbars",
         f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000",
         "--dump-dom", (folder / "probed.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r"<title>(\{.*?\})</title>", ran.stdout)
    assert found is not None, ran.stdout[:500]
    seen = json.loads(found[1].replace("&amp;", "&"))
    assert seen["asked"] == [] and seen["empty"] == 0 and seen["wide"] <= seen["room"]
    assert "CONSOLE" not in ran.stderr


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian, Ubuntu: apt install chromium)")
def test_a_browser_follows_a_run_that_moved_on_while_it_drew(tmp_path: Path) -> None:
    """Finds a page that takes the first state it hears of for the one it shows."""
    folder = fake_runs.write_run(tmp_path / "run", done=20)
    made: list[int] = []

    def make() -> str:
        text = page([read_record(folder)], head=LIVE)
        if not made:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": 21, **fake_runs.healthy(21, 40)}) + "\n")
        made.append(1)
        return text

    with server(make, [folder / "metrics.jsonl"]) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        ran = subprocess.run(
            [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
             "--virtual-time-budget=20000", "--dump-dom", f"http://127.0.0.1:{serving.server_address[1]}/"],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        serving.shutdown()
    assert "21 of 40 steps made" in ran.stdout and len(made) == 2
