"""The picture of what scale.py has measured, drawn by gnuplot: a line for each operation, labelled at its end."""

from __future__ import annotations

import math
import statistics
import subprocess
from pathlib import Path
from typing import NamedTuple, Optional

COLOURS = {
    "snapshot": "#0969da",
    "remade sets": "#8250df",
    "restore": "#1a7f37",
    "mode switch": "#bc4c00",
    "no-op apply": "#cf222e",
    "nothing": "#57606a",
}
#: The picture's size and the height of a line of text in it, in pixels.
WIDTH, HEIGHT, LINE = 920, 400, 18
FONT = "Helvetica, Arial, sans-serif,14"
#: Between two lines at one number of elements, so that their bars are not on top of each other.
ASIDE = 0.03
#: Where panels begin and end, as parts of the picture's height.
BOTTOM, TOP = 0.13, 0.86
#: The login hook waits no longer: see login_hook.py.
HOOK = """
set arrow from graph 0,first 0.25 to graph 1,first 0.25 nohead dashtype 2 linecolor rgb "#1f2328"
set label "here the login hook goes on without an answer" at graph 0.02,first 0.32 font ",12"
"""

#: Operation -> number of elements -> values.
Lines = dict[str, dict[int, list[Optional[float]]]]


class Panel(NamedTuple):
    """One of the picture's diagrams: what it is about, the range of its axis, and its place from left to right."""

    title: str
    lines: Lines
    lowest: float
    highest: float
    tics: str
    left: float
    right: float
    more: str = ""


def spread(heights: dict[str, float], gap: float) -> dict[str, float]:
    """Return heights of labels, moved upwards until none is closer to another one than the gap."""
    found: dict[str, float] = {}
    below = -math.inf
    for name, height in sorted(heights.items(), key=lambda one: one[1]):
        below = found[name] = max(height, below + gap)
    return found


def points(
    of_count: dict[int, list[Optional[float]]], counts: list[int], aside: float
) -> list[tuple[float, float, float, float]]:
    """Return a line's points: place on the axis, median, lowest and highest value. 0 has no logarithm, but a place."""
    found = []
    for place, count in enumerate(counts):
        known = [value for value in of_count.get(count, []) if value is not None]
        if known:
            found.append((place + aside, statistics.median(known), min(known), max(known)))
    return found


def labels(panel: Panel, ends: dict[str, float], place: float) -> list[str]:
    """Return what puts the lines' names at their ends."""
    decades = math.log10(panel.highest / panel.lowest)
    heights = spread({name: math.log10(end) for name, end in ends.items()}, LINE * decades / ((TOP - BOTTOM) * HEIGHT))
    return [
        f'set label "{name}" at {place},{10**height:.5g} textcolor rgb "{COLOURS[name]}"'
        for name, height in heights.items()
    ]


def script(panel: Panel) -> str:
    """Return what gnuplot is to do for a panel."""
    counts = sorted({count for of_count in panel.lines.values() for count in of_count})
    names = [name for name in COLOURS if name in panel.lines]
    drawn = {
        name: points(panel.lines[name], counts, ASIDE * (number - len(names) / 2)) for number, name in enumerate(names)
    }
    data = [
        f"$line{number} << END\n" + "\n".join(" ".join(f"{value:.5g}" for value in point) for point in line) + "\nEND"
        for number, line in enumerate(drawn.values())
    ]
    styles = [
        f'$line{number} with yerrorlines linecolor rgb "{COLOURS[name]}" linewidth 2 pointtype 7 pointsize 0.5 notitle'
        for number, name in enumerate(drawn)
    ]
    return "\n".join(
        [
            *data,
            "unset label; unset arrow",
            f"set lmargin at screen {panel.left}; set rmargin at screen {panel.right}",
            f"set yrange [{panel.lowest}:{panel.highest}]; set ytics ({panel.tics})",
            f"set xrange [-0.15:{len(counts) + 0.2}]",
            "set xtics (" + ", ".join(f'"{count:,}" {place}' for place, count in enumerate(counts)) + ")",
            f'set label "{panel.title}" at graph 0,1.09 font ",15"',
            panel.more,
            *labels(panel, {name: line[-1][1] for name, line in drawn.items()}, len(counts) - 0.85),
            "plot " + ", ".join(styles),
        ]
    )


def draw(path: Path, found: dict[str, Lines]) -> None:
    """Draw the picture."""
    short, long = '"1 ms" 0.001, "10 ms" 0.01, "0.1 s" 0.1, "1 s" 1', '"20 ms" 0.02, "0.1 s" 0.1, "1 s" 1, "10 s" 10'
    panels = (
        Panel("Processor time of one operation", found["processor"], 0.02, 10, long, 0.06, 0.485),
        Panel("Longest wait of a login meanwhile", found["longest_login"], 0.001, 1, short, 0.565, 0.99, HOOK),
    )
    commands = [
        f'set terminal svg size {WIDTH},{HEIGHT} dynamic font "{FONT}" background "#ffffff" noenhanced name "mailfw"',
        f'set output "{path}"',
        f"set multiplot; set tmargin at screen {TOP}; set bmargin at screen {BOTTOM}",
        'set logscale y; set grid ytics linecolor rgb "#d0d7de"; set border 3; set tics nomirror; set bars small',
        'set xlabel "trusted elements" offset 0,0.4',
        *map(script, panels),
    ]
    subprocess.run(["gnuplot", "-"], input="\n".join(commands), text=True, check=True)
