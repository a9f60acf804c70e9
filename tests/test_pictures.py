"""Pictures: what is drawn stands where the numbers say, names are readable, files are whole and repeatable."""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxpref.errors import RunError, UsageError
from mlxpref.report import Curve, Line, Point, control_alt_text, draw_control_curve, pictures
from mlxpref.report.canvas import apart, drawing

OURS = Curve(
    "ours", tuple(Point(x, 0.8 * x + 1, (0.8 * x + 0.7, 0.8 * x + 1.4), (0.5 * x, x + 2)) for x in range(1, 10))
)
OTHER = Curve("another", (Point(2, 5), Point(8, 5.5)))
BASE = Line("base model", 4.25)
TITLE = "Asked for more, it gives more"


def drawn(monkeypatch: pytest.MonkeyPatch, *curves: Curve, lines: Any = (), title: str = TITLE, **options: Any) -> Any:
    """The figure that would be written, and its axes."""
    kept: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "save", lambda figure, *_, **__: kept.append(figure))
        draw_control_curve(curves, "x.png", title=title, lines=lines, **options)
    return kept[0], kept[0].axes[0]


# --- what stands where ---


def test_numbers_stand_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds: asked and achieved exchanged, interval and spread exchanged, a point or the diagonal left out."""
    _, axes = drawn(monkeypatch, OURS, lines=[BASE])
    found = {tuple(map(tuple, line.get_xydata())) for line in axes.lines}
    assert tuple((p.asked, p.mean) for p in OURS.points) in found
    assert ((1, 1), (10, 10)) in found
    assert all(((p.asked, p.interval[0]), (p.asked, p.interval[1])) in found for p in OURS.points if p.interval)
    assert any(set(line.get_ydata()) == {4.25} and set(line.get_xdata()) == {0, 1} for line in axes.lines)
    (band,) = [c for c in axes.collections if c.get_alpha()]
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
    assert {(p.asked, end) for p in OURS.points for end in p.spread or ()} <= corners


def test_everything_is_inside_the_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finds: a score off the scale cut away; a scale that is forced on scores of other units."""
    high = Curve("high", (Point(3, 14, (13, 15), (-2, 16)),))
    _, axes = drawn(monkeypatch, OURS, high, lines=[Line("low", -7.0)])
    assert axes.get_ylim()[0] < -7 and axes.get_ylim()[1] > 16
    small = Curve("small", (Point(1, 0.1), Point(10, 0.2)))
    _, axes = drawn(monkeypatch, small, as_asked=False)
    assert axes.get_ylim()[1] < 0.3 and len(axes.lines) == 1 and axes.get_xlim()[1] > 10


def test_several_curves_stand_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Error bars of equal goals would hide each other; they move less than a fifth of a goal."""
    _, axes = drawn(monkeypatch, OURS, replace(OURS, name="twin"), as_asked=False)
    starts = sorted(line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == len(OURS.points))
    assert 0.8 < starts[0] < 1 < starts[1] < 1.2


def test_each_line_has_a_colour_and_dash_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [Line(f"model {i}", i / 2) for i in range(14)]
    _, axes = drawn(monkeypatch, OURS, OTHER, lines=lines, as_asked=False)
    level = [line for line in axes.lines if list(line.get_xdata()) == [0, 1]]
    assert len({(line.get_color(), str(line._dash_pattern)) for line in level}) == 14
    for few in (level[:6], level[6:12]):
        assert len({line.get_color() for line in few}) == len({str(line._dash_pattern) for line in few}) == 6
    assert {line.get_color() for line in level}.isdisjoint({colour for colour, _ in pictures.CURVES})


@pytest.mark.parametrize("colour", [*(colour for colour, _ in pictures.CURVES), *pictures.LINES, pictures.FAINT])
def test_names_can_be_read_on_white(colour: str) -> None:
    """WCAG AA: contrast of at least 4.5 to 1, by its formula."""

    def linear(part: str) -> float:
        value = int(part, 16) / 255
        return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(colour[i : i + 2]) for i in (1, 3, 5))
    assert 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= 4.5


def tick_labels(axes: Any) -> list[Any]:
    """Those that are drawn: Matplotlib keeps one more on either side."""
    return [
        label
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))
        for at, label in zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=True)
        if low <= at <= high
    ]


CROWDS = {
    "none": [],
    "one": [BASE],
    "crowded": [Line(name, 8 + i / 50) for i, name in enumerate(("base", "DPO", "IPO", "a rather long name"))],
    "equal": [Line(f"model {i}", 5.0) for i in range(9)],
    "top": [Line(f"model {i}", 10 - i / 100) for i in range(6)],
    "many": [Line(f"model {i} of many that are here", 1 + i / 10) for i in range(16)],
    "unbroken": [Line("a/name-without-any-place-to-break-" * 3, 3)],
    "signs": [Line(r"$\frac{1}{2$ _^ 100 %", 3)],
}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("title", [TITLE, "A finding that takes many words " * 6])
def test_no_text_lies_on_another_or_outside(monkeypatch: pytest.MonkeyPatch, crowd: str, title: str) -> None:
    """Finds: names over each other, over the plot or over the edge; print too small to read."""
    figure, axes = drawn(monkeypatch, OURS, OTHER, lines=CROWDS[crowd], title=title)
    renderer = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    texts = [*figure.texts, axes.xaxis.label, axes.yaxis.label, *tick_labels(axes)]
    boxes = {text: text.get_window_extent(renderer) for text in texts}
    for (a, one), (b, two) in combinations(boxes.items(), 2):
        assert not one.overlaps(two), (a.get_text(), b.get_text())
    for text, box in boxes.items():
        where = text.get_text()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, where
        assert text.get_fontsize() >= 9
        assert text not in figure.texts or not box.overlaps(axes.bbox), where
    assert axes.bbox.width > figure.bbox.width / 2
    written = " ".join("".join(text.get_text().split()) for text in figure.texts)
    assert all("".join(line.name.split()) in written for line in CROWDS[crowd])


sizes = st.lists(st.tuples(st.floats(-5, 15), st.floats(0.1, 1)), min_size=1, max_size=9)


@given(sizes)
def test_labels_pushed_apart(things: list[tuple[float, float]]) -> None:
    wanted, rooms = [w for w, _ in things], [size for _, size in things]
    found = apart(wanted, rooms, 0, 10)
    order = sorted(range(len(things)), key=lambda i: wanted[i])
    edges = [(found[i] - rooms[i] / 2, found[i] + rooms[i] / 2) for i in order]
    assert edges[0][0] >= -1e-9 and edges[-1][1] <= 10 + 1e-9
    assert all(below[1] <= above[0] + 1e-9 for below, above in pairwise(edges))


def test_labels_move_no_more_than_they_must() -> None:
    """By hand: two that want 5 share the shift; one alone stays; one at the edge only comes inside."""
    assert apart([5, 5, 9], [1, 1, 1], 0, 10) == [4.5, 5.5, 9]
    assert apart([5.2, 5, 5.1], [1, 1, 1], 0, 10) == pytest.approx([6.1, 4.1, 5.1])
    assert apart([10, 9.8], [1, 1], 0, 10) == pytest.approx([9.5, 8.5])


# --- files ---


def test_png(tmp_path: Path) -> None:
    file = tmp_path / "new" / "curve.PNG"
    draw_control_curve([OURS], file, title=TITLE, lines=[BASE])
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1056, 720)
    assert TITLE.encode() in content and control_alt_text([OURS], [BASE]).encode() in content


def test_svg_says_what_it_shows(tmp_path: Path) -> None:
    file, title = tmp_path / "curve.svg", "5 < 6 & “more”"
    draw_control_curve([OURS], file, title=title, lines=[BASE])
    tree = ElementTree.parse(file)
    names = {element.tag.split("}")[1]: element.text for element in tree.iter() if element.text}
    assert names["title"] == title or tree.find("{http://www.w3.org/2000/svg}title").text == title  # type: ignore[union-attr]  # it is there
    assert names["description"] == control_alt_text([OURS], [BASE])
    assert "date" not in names


def test_the_picture_in_words() -> None:
    words = control_alt_text([OURS, Curve("single", (Point(3, 2.5),))], [BASE])
    assert "ours: asked for 1 it achieves 1.80 on average, asked for 9 it achieves 8.20" in words
    assert "single: asked for 3 it achieves 2.50" in words and "base model, asked for nothing: 4.25" in words


DRAW = """
import sys
from pathlib import Path
from mlxpref.report import Curve, Line, Point, draw_control_curve
assert "matplotlib" not in sys.modules, "loaded before it is needed"
points = tuple(Point(x, 0.5 * x, (0.4 * x, 0.6 * x), (0.1 * x, x)) for x in range(1, 11))
for ending in ("png", "svg"):
    draw_control_curve([Curve("ours", points)], Path(sys.argv[1]) / f"a.{ending}", title="T", lines=[Line("日本", 4)])
assert "matplotlib.pyplot" not in sys.modules
import matplotlib
before = dict(matplotlib.rcParams)
draw_control_curve([Curve("ours", points)], Path(sys.argv[1]) / "b.svg", title="T", lines=[Line("日本", 4)])
assert dict(matplotlib.rcParams) == before
"""


def test_any_surroundings_give_the_same_bytes_and_no_noise(tmp_path: Path) -> None:
    """Finds: a date or random id in the file; the user's style; a word about a home that cannot be written to;
    a setting that stays changed."""
    styled = tmp_path / "styled"
    styled.mkdir()
    style = "font.size: 25\naxes.facecolor: yellow\nlines.linewidth: 9\nsvg.fonttype: none\n"
    (styled / "matplotlibrc").write_text(style)
    bare = {key: value for key, value in os.environ.items() if key not in ("HOME", "MPLCONFIGDIR", "XDG_CONFIG_HOME")}
    places = [
        (tmp_path, bare | {"HOME": "/dev/null", "MPLCONFIGDIR": "/dev/null/nowhere"}),
        (styled, bare | {"MPLCONFIGDIR": str(styled)}),
    ]
    for i, (folder, environment) in enumerate(places):
        environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
        ran = subprocess.run(
            [sys.executable, "-W", "default", "-c", DRAW, str(tmp_path / str(i))],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    for name in ("a.png", "a.svg", "b.svg"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()
    assert (tmp_path / "0" / "a.svg").read_bytes() == (tmp_path / "0" / "b.svg").read_bytes()


def test_other_data_give_another_picture(tmp_path: Path) -> None:
    """Witness of the test above: same bytes whatever is drawn would pass it."""
    for name, line in (("a", 4.0), ("b", 4.5)):
        draw_control_curve([OURS], tmp_path / f"{name}.svg", title=TITLE, lines=[Line("base", line)])
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO])
def test_noise_is_let_through_again(level: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The level is set here: left as it is found, it may be what an earlier drawing failed to put back."""
    logger = logging.getLogger("matplotlib")
    caplog.set_level(level, logger="matplotlib")
    draw_control_curve([OURS], tmp_path / "curve.svg", title=TITLE)
    assert logger.level == level
    with pytest.raises(KeyError), drawing():
        raise KeyError
    assert logger.level == level


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def half(self: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    file = tmp_path / "curve.png"
    file.write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(RunError, match="No space left"):
        draw_control_curve([OURS], file, title=TITLE)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"] and file.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("curves", "options", "words"),
    [
        ([OURS], {"file": "curve.pdf"}, r"\.png or \.svg"),
        ([OURS], {"file": "curve"}, r"\.png or \.svg"),
        ([], {}, "needs points"),
        ([OURS, Curve("empty", ())], {}, "needs points"),
        ([OURS], {"scale": (5, 5)}, "from 5 to 5"),
        ([OURS], {"lines": [Line("base", float("nan"))]}, "base: nan"),
        ([Curve("bad", (Point(1, 2, (1, float("inf"))),))], {}, "bad: inf"),
    ],
)
def test_what_cannot_be_drawn(tmp_path: Path, curves: Any, options: dict[str, Any], words: str) -> None:
    file = tmp_path / options.pop("file", "curve.png")
    with pytest.raises(UsageError, match=words):
        draw_control_curve(curves, file, title=TITLE, **options)
    assert not list(tmp_path.iterdir())
