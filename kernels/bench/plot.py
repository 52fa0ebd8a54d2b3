"""Draws a results CSV as an SVG: one bar a shape and number of tokens, its length our speed over the peer's.

python kernels/bench/plot.py kernels/bench/results/h100.csv kernels/bench/results/h100.svg
"""

import csv
import sys
from pathlib import Path
from xml.sax.saxutils import escape

ROW, LEFT, SCALE, TOP = 16, 330, 190, 44
FONT = 'font-family="sans-serif" font-size="11"'
COLOURS = ("#1b6ca8", "#c2571a", "#3b7d3b", "#7a4fa3", "#a33b52", "#5b6770")


def bars(rows: list[dict[str, str]]) -> list[tuple[str, str, float, str]]:
    """Return (series, label, ratio, note) of the rows that have a peer."""
    found = []
    for r in rows:
        if r["peer"]:
            label = f"{r['op']} {r['shape']}, {r['m']} token{'s' if r['m'] != '1' else ''}"
            found.append(
                (
                    f"{r['op']} over {r['peer']}",
                    label,
                    float(r["ratio"]),
                    f"{float(r['us']):.1f} us, {r['gbps']} GB/s",
                )
            )
    return found


def svg(device: str, found: list[tuple[str, str, float, str]]) -> str:
    """Return the drawing."""
    series = list(dict.fromkeys(name for name, *_ in found))
    longest = max(ratio for _, _, ratio, _ in found)
    width, height = LEFT + int(SCALE * longest) + 190, TOP + ROW * (len(found) + len(series)) + 30
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {FONT}>',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{escape(device)}: speed over the peer, same run (1 = as fast)</text>',
    ]
    y = TOP
    for name in series:
        colour = COLOURS[series.index(name) % len(COLOURS)]
        out.append(
            f'<text x="10" y="{y + 12}" font-weight="bold" fill="{colour}">{escape(name)}</text>'
        )
        y += ROW
        for _, label, ratio, note in (bar for bar in found if bar[0] == name):
            end = LEFT + SCALE * ratio
            out.append(
                f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(label)}</text>'
            )
            out.append(
                f'<rect x="{LEFT}" y="{y + 2}" width="{SCALE * ratio:.1f}" height="{ROW - 4}" fill="{colour}"/>'
            )
            out.append(
                f'<text x="{end + 5:.1f}" y="{y + 11}">{ratio:.2f} <tspan fill="#666">({escape(note)})</tspan></text>'
            )
            y += ROW
    one = LEFT + SCALE
    out.append(
        f'<line x1="{one}" y1="{TOP}" x2="{one}" y2="{y}" stroke="#222" stroke-dasharray="3 3"/>'
    )
    return "\n".join([*out, "</svg>", ""])


def main() -> None:
    """Read the CSV named first, write the SVG named second."""
    with Path(sys.argv[1]).open() as file:
        rows = list(csv.DictReader(file))
    Path(sys.argv[2]).write_text(svg(rows[0]["device"], bars(rows)))


if __name__ == "__main__":
    main()
