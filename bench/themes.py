"""How figures look on light and on dark pages. Backgrounds are transparent; text, grid and lines suit the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Theme:
    """series: colours by what a line stands for, on Okabe and Ito's palette, which the colour-blind can tell apart."""

    text: str
    muted: str
    grid: str
    series: dict[str, str]

    @property
    def style(self) -> dict[str, Any]:
        """matplotlib's rc parameters."""
        return {
            "axes.edgecolor": self.muted,
            "axes.facecolor": "none",
            "axes.grid": True,
            "axes.labelcolor": self.text,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "axes.titlecolor": self.text,
            "axes.titlesize": 9,
            "figure.facecolor": "none",
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
            "font.size": 9,
            "grid.color": self.grid,
            "grid.linewidth": 0.6,
            "legend.labelcolor": self.text,
            "lines.linewidth": 1.6,
            "lines.markersize": 4.5,
            "savefig.facecolor": "none",
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "compiled_fa",  # the same records give the same file
            "text.color": self.text,
            "xtick.bottom": False,  # the grid says where
            "xtick.labelcolor": self.text,
            "xtick.major.pad": 5,
            "ytick.labelcolor": self.text,
            "ytick.left": False,
            "ytick.major.pad": 5,
        }


def _series(**colours: str) -> dict[str, str]:
    """orange, blue, green, pink, yellow, sky, grey -> a colour for each dtype, peer and kind of call."""
    c = colours
    return {
        "ours": c["orange"],
        "naive": c["grey"],
        "SDPA": c["blue"],
        "SDPA loop": c["blue"],
        "SDPA padded": c["pink"],
        "flex": c["green"],
        "flash_attn": c["pink"],
        "xformers": c["yellow"],
        "turing": c["sky"],
        "float32": c["blue"],
        "bfloat16": c["orange"],
        "float16": c["green"],
        "float64": c["grey"],
        "first": c["blue"],
        "second": c["orange"],
        "third": c["green"],
        "fourth": c["pink"],
    }


THEMES = {
    "light": Theme(
        text="#1f2328",
        muted="#6e7781",
        grid="#d8dee4",
        series=_series(
            orange="#D55E00",
            blue="#0072B2",
            green="#009E73",
            pink="#B8548F",
            yellow="#B97F00",
            sky="#3B9BD0",
            grey="#8C959F",
        ),
    ),
    "dark": Theme(
        text="#e6edf3",
        muted="#8b949e",
        grid="#30363d",
        series=_series(
            orange="#FF8C42",
            blue="#58A6FF",
            green="#2DC799",
            pink="#E18CBF",
            yellow="#E6B450",
            sky="#9CD3F5",
            grey="#9DA5AE",
        ),
    ),
}
