"""The plot of a comparison: the size of each model, and its KL divergence from the reference.

Knows matplotlib, which is an extra, and draws without a screen. Each importance matrix has a colour; models of the same
type lie above each other, joined by a line, and share a label.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from local_llava.comparison_pairs import Matrix
from local_llava.errors import OutputError, UsageError

if TYPE_CHECKING:
    from local_llava.comparison import Comparison

SUFFIXES = (".png", ".svg")

# Okabe and Ito's, which people with any colour vision tell apart; with markers, for prints in black.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X")
_SIZE, _DPI = (8.0, 6.0), 150
_LONGEST = 48
"""Characters of a label."""

_RADII = (9, 16, 24, 34, 46, 60, 80, 100)
_LEADER = 16
"""Distances of a label from its point that are tried, in points; from the second on a line joins them."""
_MARGIN = 2.0
"""Pixels around a label that stay free."""

Box = tuple[float, float, float, float]
"""Left, lower, right and upper edge, pixels."""


def check(path: Path, force: bool) -> None:
    """See that a plot can be made, before hours go into what it is to show.

    Raises:
        UsageError: The name has another ending than SUFFIXES, or matplotlib is not installed.
        OutputError: The file is there already, or its directory is not.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path}: a plot is a .png or a .svg file")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("a plot needs an extra: pip install 'local-llava[plot]'")
    if path.exists() and not (force and path.is_file()):
        raise OutputError(f"{path} exists already" + ("; --force replaces it" if path.is_file() else ""))
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent}: no such directory for the plot")


def draw(results: Sequence[Comparison], path: Path) -> None:
    """Draw models beside their reference, and write the file in one go.

    Args:
        results: As `compare` gives them, the reference first.
        path: Checked by `check`.

    Raises:
        OutputError: It cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = path.suffix.lower().removeprefix(".")
    # Fonts that lack a character of a name draw a box for it. The same results give the same bytes.
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.hashsalt": "local-llava", "font.size": 9}):
        warnings.simplefilter("ignore")
        figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        _fill(figure, results)
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(drawn.getvalue())
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {e.strerror}") from e


def _fill(figure: Any, results: Sequence[Comparison]) -> None:
    reference, *models = results
    axes = figure.add_subplot()
    together = len({result.mmproj_bytes for result in models}) > 1
    sizes = [(result.model_bytes + result.mmproj_bytes * together) / 1e6 for result in models]
    unit, scale = ("GB", 1e3) if max(sizes, default=0.0) >= 1e3 else ("MB", 1.0)
    xs = [size / scale for size in sizes]
    if xs and max(xs) > 2 * min(xs):
        _spread(axes, xs)
    ys = _heights(axes, [result.kl_mean for result in models])
    what = "language model and mmproj" if together else "language model"
    axes.set_xlabel(f"size of the {what}, {unit}")
    axes.set_ylabel("KL divergence from the reference, mean, nats")
    name = _short(f"{reference.quant}, mmproj {reference.mmproj_quant}" if reference.quant else reference.model)
    axes.set_title(_plain(f"along {reference.positions} tokens of answers of the reference: {name}"))
    axes.grid(alpha=0.25, which="major")
    labels = _labels(models)
    _join(axes, labels, xs, ys)
    matrices: list[Matrix | None] = list(dict.fromkeys(result.matrix for result in models))
    matrices.sort(key=lambda matrix: matrix is not None)
    styles = itertools.cycle(zip(_COLORS, _MARKERS, strict=True))
    for matrix, (color, marker) in zip(matrices, styles, strict=False):
        mine = [i for i, result in enumerate(models) if result.matrix == matrix]
        points = [xs[i] for i in mine], [ys[i] for i in mine]
        axes.scatter(*points, color=color, marker=marker, label=_named(matrix, matrices), zorder=3)
    axes.margins(0.12, 0.12)
    if any(matrices):
        figure.legend(loc="outside lower center", ncols=2)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # from now on places in pixels hold
    _write_labels(axes, labels, xs, ys)


def _spread(axes: Any, sizes: Sequence[float]) -> None:
    """A logarithmic axis of sizes: most types have few bits, and crowd at one end of a linear one."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    low, high = min(sizes), max(sizes)
    ticks = [n * 10**e for e in range(-4, 8) for n in (1, 1.5, 2, 3, 4, 5, 6, 8)]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if 0.8 * low <= tick <= 1.25 * high]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _heights(axes: Any, divergences: Sequence[float]) -> list[float]:
    """Where the points are: on a logarithmic axis, with those that are zero at its lower end."""
    positive = [value for value in divergences if value > 0]
    if not positive:
        return list(divergences)
    axes.set_yscale("log")
    return [value or min(positive) / 10 for value in divergences]


def _labels(models: Sequence[Comparison]) -> list[str]:
    """Types where these tell models with the same matrix apart, else what differs in their names."""
    with_mmproj = len({result.mmproj_quant for result in models}) > 1
    types = [_label(result, with_mmproj) for result in models]
    shown = {(label, result.matrix) for label, result in zip(types, models, strict=True)}
    if all(types) and len(shown) == len(models):
        return types
    names = [result.model.removesuffix(".gguf") for result in models]
    # Directories that all have in common tell nothing.
    common = max((i + 1 for i, end in enumerate(_common_start(names)) if end in "/\\-"), default=0)
    return [_short(name[common:]) for name in names]


def _common_start(names: Sequence[str]) -> str:
    ends = (len(set(characters)) == 1 for characters in zip(*names, strict=False))
    n = sum(1 for _ in itertools.takewhile(bool, ends))
    return names[0][:n] if len(set(names)) > 1 else ""


def _label(result: Comparison, with_mmproj: bool) -> str:
    both = (result.quant, result.mmproj_quant) if with_mmproj else (result.quant,)
    return " + ".join(both) if all(both) else ""


def _named(matrix: Matrix | None, matrices: Sequence[Matrix | None]) -> str:
    """In the legend."""
    if matrix is None:
        return "no importance matrix"
    datasets = [other.dataset for other in matrices if other is not None]
    distinct = matrix.dataset if datasets.count(matrix.dataset) == 1 else matrix.file
    return _plain(f"matrix: {_short(distinct or matrix.file or '?')}")


def _short(text: str) -> str:
    """Its end, which tells names apart."""
    return text if len(text) <= _LONGEST else "..." + text[3 - _LONGEST :]


def _plain(text: str) -> str:
    """For matplotlib, which reads formulas between dollars."""
    return text.replace("$", r"\$")


def _join(axes: Any, labels: Sequence[str], xs: Sequence[float], ys: Sequence[float]) -> None:
    for label in dict.fromkeys(labels):
        mine = sorted((ys[i], xs[i]) for i, other in enumerate(labels) if other == label)
        if len(mine) > 1:
            axes.plot([x for _, x in mine], [y for y, _ in mine], color="0.75", linewidth=1, zorder=1)


# --- where labels go ---


def _write_labels(axes: Any, labels: Sequence[str], xs: Sequence[float], ys: Sequence[float]) -> None:
    """One for each text, beside the lowest of its points, where it hides nothing."""
    pixels = axes.transData.transform(list(zip(xs, ys, strict=True))) if xs else []
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for x, y in pixels]
    frame = tuple(axes.get_window_extent().extents)
    lowest = {label: min((i for i, b in enumerate(labels) if b == label), key=lambda i: ys[i]) for label in labels}
    for label, i in sorted(lowest.items(), key=lambda item: (pixels[item[1]][0], pixels[item[1]][1])):
        text = axes.annotate(
            _plain(label),
            (xs[i], ys[i]),
            textcoords="offset points",
            fontsize=8,
            ha="center",
            va="center",
            zorder=4,
        )
        box = text.get_window_extent()
        dx, dy, distance = _place(tuple(pixels[i]), box.width, box.height, taken, frame)
        text.set_position((dx * 72 / _DPI, dy * 72 / _DPI))
        x, y = pixels[i][0] + dx, pixels[i][1] + dy
        taken.append((x - box.width / 2, y - box.height / 2, x + box.width / 2, y + box.height / 2))
        if distance >= _LEADER:
            left, lower, right, upper = taken[-1]
            nearest = min(max(pixels[i][0], left), right), min(max(pixels[i][1], lower), upper)
            (end,) = axes.transData.inverted().transform([nearest])
            line = [xs[i], end[0]], [ys[i], end[1]]
            axes.plot(*line, color="0.6", linewidth=0.6, zorder=1, scalex=False, scaley=False)


def _place(
    point: tuple[float, float], width: float, height: float, taken: Sequence[Box], frame: Box
) -> tuple[float, float, float]:
    """Where the middle of a label goes, pixels from its point, and how far from it, in points: the nearest free place,
    or that which covers least."""
    best, least = (0.0, 0.0, 0.0), math.inf
    for radius in _RADII:
        for angle in (0, 180, 90, 270, 45, 135, 225, 315, 22, 158, 202, 338):
            cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            reach = radius * _DPI / 72
            dx, dy = cos * (reach + width / 2), sin * (reach + height / 2)
            x, y = point[0] + dx, point[1] + dy
            box = (x - width / 2 - _MARGIN, y - height / 2 - _MARGIN, x + width / 2 + _MARGIN, y + height / 2 + _MARGIN)
            inside = box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
            covered = sum(_overlap(box, other) for other in taken)
            if inside and covered < least:
                best, least = (dx, dy, radius), covered
        if least == 0:
            break
    return best


def _overlap(a: Box, b: Box) -> float:
    """Area that both cover."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0
