# SPDX-License-Identifier: Apache-2.0
"""Names of the rows and columns of a picture that is a grid of tiles, for the pictures of the documentation."""

from collections.abc import Sequence

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont


def labelled(
    grid: PIL.Image.Image, columns: Sequence[str] = (), rows: Sequence[str] = (), scale: int = 1, left: int = 0
) -> PIL.Image.Image:
    """
    Enlarge a grid of equal tiles without smoothing, and write names above its columns and beside its rows.

    Args:
        grid (`PIL.Image.Image`): The picture.
        columns, rows (`Sequence[str]`): A name for each column and row; none are written if there are none.
        scale (`int`): Factor of the enlargement.
        left (`int`): Pixels of the grid at its left that are no tiles.
    """
    grid = grid.convert("RGB").resize((grid.width * scale, grid.height * scale), PIL.Image.Resampling.NEAREST)
    font = PIL.ImageFont.load_default(13)
    margin = 10 + int(max((font.getlength(name) for name in rows), default=-10))
    top = 22 if columns else 0
    sheet = PIL.Image.new("RGB", (margin + grid.width, top + grid.height), "white")
    sheet.paste(grid, (margin, top))
    pen = PIL.ImageDraw.Draw(sheet)
    left = margin + left * scale
    for i, name in enumerate(columns):
        x = left + (i + 0.5) * (sheet.width - left) / len(columns)
        pen.text((x, top / 2), name, fill="black", font=font, anchor="mm")
    for i, name in enumerate(rows):
        pen.text((margin - 6, top + (i + 0.5) * grid.height / len(rows)), name, fill="black", font=font, anchor="rm")
    return sheet
