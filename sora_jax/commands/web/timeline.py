"""Reading and computing of a streamed run as a picture: one lane for each, one bar for each layer.

Invariant: the picture is a text of SVG without script or address; layers' names are escaped.
"""

import html
from collections.abc import Sequence

from sora_jax.streaming.profile import Interval

_WIDTH, _ROW = 1000, 26
_LANES = {"load": "#4c8bf5", "wait": "#d93025", "copy": "#f9ab00", "compute": "#188038"}
_MAX_BARS = 4000


def svg(intervals: Sequence[Interval]) -> str:
    """Returns the picture of the first intervals of a run; empty where there are none."""
    shown = list(intervals[:_MAX_BARS])
    if not shown:
        return ""
    begin, end = min(one.start_s for one in shown), max(one.end_s for one in shown)
    scale = _WIDTH / max(end - begin, 1e-9)
    bars, labels = [], []
    for row, (lane, colour) in enumerate(_LANES.items()):
        top = row * _ROW
        total = sum(one.end_s - one.start_s for one in shown if one.lane == lane)
        labels.append(f'<text x="4" y="{top + 17}" font-size="13">{lane} {total:.2f} s</text>')
        for one in shown:
            if one.lane == lane:
                x, width = (one.start_s - begin) * scale + 110, max((one.end_s - one.start_s) * scale, 0.5)
                title = f"<title>{html.escape(one.layer)}: {1e3 * (one.end_s - one.start_s):.1f} ms</title>"
                bars.append(
                    f'<rect x="{x:.1f}" y="{top + 4}" width="{width:.1f}" height="{_ROW - 8}" fill="{colour}">{title}</rect>'
                )
    height = len(_LANES) * _ROW + 24
    axis = f'<text x="110" y="{height - 6}" font-size="12">0 s to {end - begin:.2f} s</text>'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH + 120} {height}" style="width:100%">'
    return f"{opening}{''.join(labels)}{''.join(bars)}{axis}</svg>"
