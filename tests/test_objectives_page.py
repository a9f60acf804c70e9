"""The reference of the objectives: the page is that of the docstrings, its pictures are those of the formulas."""

from __future__ import annotations

import re
import struct
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxpref.objectives import TABLE
from mlxpref.report import objectives as drawings
from mlxpref.report.objectives import Bend, Row, draw_objectives, objectives_alt_text

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import build_objectives  # noqa: E402 - found once scripts/ is on the path
import objective_pictures  # noqa: E402 - found once scripts/ is on the path
from objective_pictures import SHOWN, Line, gradient, total_loss  # noqa: E402 - found once scripts/ is on the path

MAKE = "run: python scripts/build_objectives.py"

MACROS = {
    *("Delta", "alpha", "beta", "delta", "ell", "eta", "gamma", "lambda", "mu", "nu", "pi", "psi", "sigma", "tau"),
    *("theta", "varepsilon", "bar", "overline", "big", "bigl", "bigr", "Bigl", "Bigr", "left", "right", "frac"),
    *("tfrac", "sqrt", "sum", "prod", "exp", "log", "max", "min", "ge", "le", "in", "pm", "mp", "infty", "leftarrow"),
    *("mathop", "mathrm", "text", "textstyle", "qquad", "quad", ",", ";", "!", "|", "{", "}"),
}
"""What GitHub is known to show. It refuses operatorname, mbox, phantom, def and newcommand."""


# --- the page ---


def test_the_page_is_that_of_the_docstrings() -> None:
    """Finds: a docstring changed, and the page not; a page changed by hand."""
    assert build_objectives.PAGE.read_text(encoding="utf-8") == build_objectives.page(), MAKE


def test_every_objective_is_on_the_page_once() -> None:
    page = build_objectives.page()
    assert Counter(re.findall(r"^### `(\w+)`$", page, re.MULTILINE)) == Counter(list(TABLE))
    index = page.partition("## Index")[2].partition("\n## ")[0]
    assert Counter(re.findall(r"^\| \[`(\w+)`\]", index, re.MULTILINE)) == Counter(list(TABLE))


def test_links_within_the_page_lead_somewhere() -> None:
    page = build_objectives.page()
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    anchors = {heading.strip("`").lower().replace(" ", "-") for heading in headings}
    assert not set(re.findall(r"\]\(#([^)]+)\)", page)) - anchors


def test_tables_have_as_many_cells_in_every_line() -> None:
    """Finds: a ``|`` of a text that ends a cell, a line break in one."""
    for block in re.findall(r"(?:^\|.*\n)+", build_objectives.page(), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1, block


def test_options_and_columns_are_all_in_the_tables() -> None:
    """Finds: an argument that the page's reader of docstrings loses."""
    for entry in TABLE.values():
        told = build_objectives.arguments(entry, build_objectives.sections(entry.doc)["Args"])
        assert {*entry.options, *entry.columns} <= set(re.findall(r"`(\w+)`", told)), entry.name
        for option in entry.options.values():
            assert build_objectives.prose(option.help) in told


def test_no_part_of_a_docstring_is_lost() -> None:
    for entry in TABLE.values():
        part = build_objectives.objective_part(entry)
        keys = re.findall(r"^(Returns|Raises|Convention|Source|Unverified|Also known as):", entry.doc, re.MULTILINE)
        for key in keys:
            assert f"- **{key.replace('Also known as', 'Other names')}:** " in part, f"{entry.name}: {key}"
        assert part.count("```math") == entry.doc.count(".. math::") >= 1


def problems_of(latex: str) -> list[str]:
    """What GitHub would not show."""
    found = []
    plain = re.sub(r"\\[{}]", "", latex)
    depth = np.cumsum([(c == "{") - (c == "}") for c in plain] or [0])
    if depth[-1] or depth.min() < 0:
        found.append("braces")
    for left, right in (("left", "right"), ("bigl", "bigr"), ("Bigl", "Bigr"), ("begin", "end")):
        if len(re.findall(rf"\\{left}(?![a-z])", latex)) != len(re.findall(rf"\\{right}(?![a-z])", latex)):
            found.append(f"{left} and {right}")
    found += sorted(set(re.findall(r"\\([A-Za-z]+|.)", latex)) - MACROS)
    if "$" in latex or "`" in latex or "\n\n" in latex or not latex.strip():
        found.append("$, `, a blank line, or nothing at all")
    return found


def test_every_formula_can_be_shown() -> None:
    """Finds: a brace that is not closed, a macro that GitHub does not know."""
    for entry in TABLE.values():
        for latex in build_objectives.formulas(entry.doc):
            shown = build_objectives.github_math(latex)
            assert not problems_of(shown), f"{entry.name}: {problems_of(shown)}: {shown}"


@pytest.mark.parametrize(
    "latex", [r"\frac{a}{b", r"a}{b", r"\bigl( a )", r"\operatorname{lo}(m)", r"\foo", "", "a $b$", "a\n\nb"]
)
def test_the_judge_of_formulas_can_refuse(latex: str) -> None:
    """Witness of the test above."""
    assert problems_of(latex)
    assert not problems_of(r"\bigl( \tfrac{a}{b} \bigr)^2 \{ x \}")


def test_operators_are_written_as_github_takes_them() -> None:
    assert build_objectives.github_math(r"\operatorname{lo}(m)") == r"\mathop{\mathrm{lo}}(m)"
    assert build_objectives.github_math(r"\operatorname*{mean}_{b}") == r"\mathop{\mathrm{mean}}_{b}"


def test_prose_is_no_markdown_by_mistake() -> None:
    prose = build_objectives.prose
    assert prose("z* < a*b, ``dpo``, ``x|*y``") == r"z\* &lt; a\*b, [`dpo`](#dpo), `x|*y`"
    assert prose("arXiv:2305.18290, Eq. 7") == "[arXiv:2305.18290](https://arxiv.org/abs/2305.18290), Eq. 7"
    assert prose("TRL's ``ipo`` averages: ``ipo_norm``") == "TRL's `ipo` averages: [`ipo_norm`](#ipo_norm)"


# --- the pictures ---


def test_every_picture_is_there_and_is_that_of_the_formulas() -> None:
    """Finds: a family without a picture; one drawn before a formula or an option changed (its description has
    the numbers)."""
    assert set(SHOWN) == {entry.family for entry in TABLE.values()}
    page = build_objectives.PAGE.read_text(encoding="utf-8")
    said_of = objective_pictures.axis()[[0, objective_pictures.N_POINTS // 2, -1]]
    for family in SHOWN:
        assert f"](objectives/{family}.png)" in page
        said = description(build_objectives.PICTURES / f"{family}.png")
        rows = objective_pictures.numbers(family, said_of)
        assert said == objectives_alt_text(rows, said_of.tolist()), f"{family}: {MAKE}"


def description(file: Path) -> str:
    """What a PNG says of itself."""
    data, at = file.read_bytes(), 8
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        text = data[at + 8 : at + 8 + size]
        if kind == b"iTXt" and text.startswith(b"Description\0"):
            return text.split(b"\0", 5)[5].decode()
        if kind == b"tEXt" and text.startswith(b"Description\0"):
            return text.partition(b"\0")[2].decode("latin-1")
        at += 12 + size
    return ""


def test_every_objective_is_in_the_picture_of_its_family() -> None:
    for family, picture in SHOWN.items():
        drawn = {line.name for rows in picture.rows for line in rows.lines}
        assert drawn - {"dpo"} == {n for n, entry in TABLE.items() if entry.family == family} - {"dpo"}
        assert all(len(rows.lines) <= 9 for rows in picture.rows)


def test_options_that_are_not_the_defaults_are_said() -> None:
    """Finds: a curve under a name that another setting has."""
    for picture in SHOWN.values():
        for line in (line for rows in picture.rows for line in rows.lines):
            told = f"{line.label} {picture.caption}"
            for value in line.options.values():
                for one in value if isinstance(value, tuple) else (value,):
                    assert re.search(rf"\b{one if isinstance(one, str) else format(one, 'g')}\b", told), line
            assert (f"÷ {1 / line.scale:g}" in line.label) == (line.scale != 1), line


def test_slopes_hold_constant_what_the_formula_does() -> None:
    """α-DPO's M* is a constant: without holding it the slope would be another one."""
    picture = SHOWN["batchwise"]
    line = next(line for rows in picture.rows for line in rows.lines if line.name == "alpha_dpo")
    at = np.array([2.0, -2.0, 2.0])

    def total(by: np.ndarray) -> float:
        return total_loss(line, picture.columns(by))

    found = gradient(total, at)
    freely = [(total(at + step) - total(at - step)) / 2e-4 for step in 1e-4 * np.eye(3)]
    assert abs(found[0] - freely[0]) > 0.1 * abs(found[0])
    assert found[0] == pytest.approx(-found[1] * 30 / 24)  # per token, of 24 and 30


def test_the_curve_of_dpo_is_the_one_of_the_paper() -> None:
    """Finds: a pair that moves by twice Δ, slopes towards the wrong response, a sign turned round."""
    picture = SHOWN["margin"]
    found = objective_pictures.bend(Line("dpo", "dpo"), picture, np.array([-10.0, 5.0]))
    expected = [np.log1p(np.exp(-0.1 * x)) - np.log(2) for x in (-10, 5)]
    np.testing.assert_allclose(found.losses, expected, atol=1e-12)
    slopes = [-0.1 / (1 + np.exp(0.1 * x)) for x in (-10, 5)]
    np.testing.assert_allclose(found.chosen, slopes, atol=1e-9)
    np.testing.assert_allclose(found.rejected, np.negative(slopes), atol=1e-9)
    assert not found.text


XS = [-2.0, -1.0, 1.0, 2.0]
BENDS = (
    Bend("first", [2.0, 1.0, 0.0, -0.5], [-1.0] * 4, [1.0] * 4, [0.5] * 4),
    Bend("leaves the panel", [0.0, 0.5, 1.0, 9.0], [0.0] * 4, [0.0] * 4),
    Bend("the same end as first", [1.0, 1.0, 0.0, -0.5], [-1.0] * 4, [1.0] * 4, faint=True),
)


def drawn(monkeypatch: pytest.MonkeyPatch, n_rows: int = 1) -> Any:
    kept: list[Any] = []
    monkeypatch.setattr(drawings, "save", lambda figure, *_, **__: kept.append(figure))
    row = Row(BENDS, (-1.0, 2.0), (-1.5, 1.5))
    draw_objectives([row] * n_rows, XS, "x.png", title="A title", caption="Words " * 60, x_label="x")
    return kept[0]


def test_lines_stand_in_their_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds: losses and slopes exchanged, a response's slopes or the text's left out, limits not kept."""
    losses, slopes = drawn(monkeypatch).axes
    assert [list(line.get_ydata()) for line in losses.lines if len(line.get_xdata()) == 4] == [b.losses for b in BENDS]
    found = [list(line.get_ydata()) for line in slopes.lines if len(line.get_xdata()) == 4]
    assert found == [y for b in BENDS for y in (b.chosen, b.rejected, b.text) if len(y)]
    assert losses.get_ylim() == (-1.0, 2.0) and slopes.get_ylim() == (-1.5, 1.5)


def test_names_neither_overlap_nor_leave_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = drawn(monkeypatch, n_rows=2)
    renderer = figure.canvas.get_renderer()
    names = [text for text in figure.texts if text.get_text() in {bend.name for bend in BENDS}]
    assert len(names) == 2 * 2 * len(BENDS)
    boxes = [text.get_window_extent(renderer) for text in names]
    assert not [1 for i, one in enumerate(boxes) for other in boxes[:i] if one.overlaps(other)]
    panels = [axes.get_window_extent(renderer) for axes in figure.axes]
    assert not [1 for one in boxes for panel in panels if one.overlaps(panel)]
    whole = figure.bbox
    for box in [*boxes, *(axes.get_tightbbox(renderer) for axes in figure.axes)]:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and whole.y0 <= box.y0 and box.y1 <= whole.y1


@pytest.mark.parametrize("family", SHOWN)
def test_names_of_the_real_pictures_stay_inside(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(drawings, "save", lambda figure, *_, **__: kept.append(figure))
    monkeypatch.setattr(objective_pictures, "N_POINTS", 4)
    build_objectives.draw(family, Path("x.png"))
    (figure,) = kept
    figure.canvas.draw()  # which puts titles and labels where they belong
    renderer, width = figure.canvas.get_renderer(), figure.bbox.x1
    texts = [*figure.texts, *(text for axes in figure.axes for text in (axes._left_title, axes.xaxis.label))]
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert all(box.x0 >= 0 and box.x1 <= width for box in boxes)
    touching = [(texts[i], texts[k]) for i in range(len(boxes)) for k in range(i) if boxes[i].overlaps(boxes[k])]
    assert not touching


def test_the_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    row = Row(BENDS, (-1.0, 2.0), (-1.5, 1.5))
    for name in ("one.png", "two.png"):
        draw_objectives([row], XS, tmp_path / name, title="A title", caption="Words", x_label="x")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert description(tmp_path / "one.png") == objectives_alt_text([row], XS)
