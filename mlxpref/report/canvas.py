"""A figure to draw on, and the way from it to a file: no pyplot, no user's style, the same bytes every time.

Matplotlib takes half a second to load, so every function here loads it when it is called.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlxpref.errors import UsageError
from mlxpref.files import written_aside

FORMATS = (".png", ".svg")
DPI = 160
INK, FAINT = "#222222", "#666666"


def picture_format(file: Path) -> str:
    """``png`` or ``svg``, by the file's ending. UsageError for any other."""
    if file.suffix.lower() not in FORMATS:
        raise UsageError(f"{file}: pictures are written as {' or '.join(FORMATS)}; choose one by the file's ending")
    return file.suffix.lower()[1:]


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib's own defaults inside, whatever the user's configuration says, and no noise.

    Without a writable home Matplotlib logs where it keeps its fonts instead; and a letter that its font
    lacks, drawn as a box, is a warning. Neither helps who waits for a picture. Afterwards all is as before.
    """
    logger = logging.getLogger("matplotlib")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import matplotlib

        with matplotlib.rc_context(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            matplotlib.rcdefaults()
            matplotlib.rcParams["svg.hashsalt"] = "mlxpref"
            yield
    finally:
        logger.setLevel(before)


def new_figure(width: float, height: float) -> Any:
    """A white figure, in inches, with a canvas of its own."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, file: Path, *, title: str, description: str) -> None:
    """Write the figure under its name, whole or not at all; title and description go into the file.

    Raises:
        UsageError: the ending is of no format we write.
        RunError: the file system refuses.
    """
    kind = picture_format(file)
    ours = {"Creator": "mlxpref", "Date": None} if kind == "svg" else {"Software": "mlxpref"}
    with written_aside(file) as aside:
        figure.savefig(aside, format=kind, metadata={"Title": title, "Description": description, **ours})


def size_of(figure: Any, text: str, **style: Any) -> tuple[float, float]:
    """(width, height) of a text as it would be drawn, inches."""
    drawn = figure.text(0, 0, text, parse_math=False, **style)
    box = drawn.get_window_extent(figure.canvas.get_renderer())
    drawn.remove()
    return box.width / figure.dpi, box.height / figure.dpi


def wrapped(figure: Any, text: str, width: float, **style: Any) -> str:
    """The text with line breaks, so that it is at most so many inches wide; a longer word is cut."""
    lines: list[str] = []
    for word in (piece for whole in text.split() for piece in _pieces(figure, whole, width, **style)):
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and size_of(figure, longer, **style)[0] <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


def _pieces(figure: Any, word: str, width: float, **style: Any) -> Iterator[str]:
    while len(word) > 1 and size_of(figure, word, **style)[0] > width:
        fitting = (n for n in range(len(word) - 1, 1, -1) if size_of(figure, word[:n], **style)[0] <= width)
        cut = next(fitting, 1)
        yield word[:cut]
        word = word[cut:]
    yield word


def balanced(figure: Any, text: str, width: float, **style: Any) -> str:
    """The text in as few lines as ``width`` allows, these as equally long as can be."""
    broken = wrapped(figure, text, width, **style)
    longest_word = max((size_of(figure, word, **style)[0] for word in text.split()), default=width)
    while width > longest_word + 0.1:
        width -= 0.1
        narrower = wrapped(figure, text, width, **style)
        if narrower.count("\n") > broken.count("\n"):
            break
        broken = narrower
    return broken


def apart(wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> list[float]:
    """Centres as near to the wanted ones as can be, no two things overlapping, all inside the bounds.

    Args:
        wanted: where each would like its centre.
        sizes: how much room each takes.
        low, high: the bounds; where they are too narrow for all, the last ones reach over ``high``.

    Returns:
        Centres in the order given. Order along the axis is that of ``wanted``.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[int]] = []
    for i in order:
        blocks.append([i])
        while len(blocks) > 1 and _start(blocks[-1], wanted, sizes, low, high) < _end(
            blocks[-2], wanted, sizes, low, high
        ):
            last = blocks.pop()
            blocks[-1] += last
    centres = [0.0] * len(wanted)
    for block in blocks:
        at = _start(block, wanted, sizes, low, high)
        for i in block:
            centres[i] = at + sizes[i] / 2
            at += sizes[i]
    return centres


def _start(block: Sequence[int], wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> float:
    """Where a block of touching things begins: its members miss their places by nothing on average."""
    starts, before = [], 0.0
    for i in block:
        starts.append(wanted[i] - sizes[i] / 2 - before)
        before += sizes[i]
    return max(low, min(sum(starts) / len(starts), high - before))


def _end(block: Sequence[int], wanted: Sequence[float], sizes: Sequence[float], low: float, high: float) -> float:
    return _start(block, wanted, sizes, low, high) + sum(sizes[i] for i in block)
