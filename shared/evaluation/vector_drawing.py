"""Detections drawn by matplotlib, as a PDF whose lines and letters stay sharp."""

from __future__ import annotations

import warnings
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from PIL import Image

from shared.evaluation.colors import color_of, on_color
from shared.evaluation.drawing import Objects, letter_size, line_width, with_masks
from shared.evaluation.lettering import runs_of


def write_pdf(path: Path, image: Image.Image, objects: Objects, scale: float = 1.0) -> None:
    """A page of the image's pixels at 72 an inch, `scale` times as large; its masks are pixels."""
    pixels = with_masks(image, objects, scale)
    figure = Figure(figsize=(pixels.width / 72, pixels.height / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(pixels, extent=(0, image.width, image.height, 0), aspect="auto", interpolation="none")
    axes.set(xlim=(0, image.width), ylim=(image.height, 0))
    axes.set_axis_off()
    line, letters = line_width(pixels.size), letter_size(pixels.size)
    for i, (x1, y1, x2, y2) in enumerate(objects.boxes.tolist()):
        color = tuple(level / 255 for level in color_of(objects.labels[i]))
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=line))
        if objects.keypoints is not None:
            for ends in objects.limbs(i):
                axes.plot(*ends.T, color=color, linewidth=line)
            axes.scatter(*objects.joints(i).T, s=(2 * line) ** 2, color="white", edgecolors=[color], zorder=3)
        text = objects.names[i] + objects.endings[i]
        axes.text(
            min(max(x1, 0), image.width),
            max(y1, 0),
            text.replace("$", r"\$"),
            color=tuple(level / 255 for level in on_color(color_of(objects.labels[i]))),
            font=FontProperties(fname=runs_of(text)[0][0], size=0.8 * letters),
            verticalalignment="bottom" if y1 * scale > 1.5 * letters else "top",
            bbox={"facecolor": color, "edgecolor": "none", "pad": 1},
            clip_on=True,
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # said already, see `runs_of`
        figure.savefig(path, format="pdf")
