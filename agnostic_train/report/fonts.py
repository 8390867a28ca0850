"""Fonts that can draw a text in any script."""

import re

from matplotlib import font_manager
from transformers.utils import logging

logger = logging.get_logger(__name__)

_FIRST_FONT = "DejaVu Sans"  # comes with matplotlib


def font_families(text: str) -> list[str]:
    """The font families that can draw a text: matplotlib's own, and installed ones for the characters that it lacks."""
    families = [_FIRST_FONT]
    missing = {ord(character) for character in text if not character.isspace()}
    missing -= font_manager.get_font(font_manager.findfont(_FIRST_FONT)).get_charmap().keys()
    if not missing:
        return families
    # The system is asked, because matplotlib's cached list may lack newer fonts. Upright faces come first.
    paths = font_manager.findSystemFonts()
    for path in sorted(
        paths, key=lambda path: (not re.search("sans.*regular", path.lower()), "regular" not in path.lower(), path)
    ):
        try:
            font = font_manager.get_font(path)
        except RuntimeError:  # a format that FreeType can't read
            continue
        if covered := missing & font.get_charmap().keys():
            font_manager.fontManager.addfont(path)
            families.append(font.family_name)
            missing -= covered
        if not missing:
            return families
    characters = "".join(map(chr, sorted(missing)))
    logger.warning(f"no installed font has {characters}: PNG figures show boxes, report.html uses the browser's fonts")
    return families
