"""The screenshots of the README: small, and taken of pages that were drawn to their end."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from aiokeyless import sandbox

EXAMPLES = Path(__file__).parents[2] / "examples"

#: Where the colours of each page are, and the least share of the picture that each colour has.
PAGES = {
    "phone.png": (Path(sandbox.__file__).parent / "phone.css", {"accent": 0.01, "text": 0.003}),
    "checkout.png": (EXAMPLES / "checkout" / "shop.html", {"accent": 0.002, "text": 0.005}),
}


@pytest.mark.parametrize("name", PAGES)
def test_screenshot_shows_the_full_colours_of_its_page(name: str) -> None:
    """While a page fades in, what is on it has neither its accent nor the contrast of its text."""
    source, shares = PAGES[name]
    with Image.open(EXAMPLES / "screenshots" / name) as picture:
        data = picture.convert("RGB").tobytes()
    counts = Counter(data[start : start + 3] for start in range(0, len(data), 3))
    for colour, share in shares.items():
        [value] = re.findall(rf"--{colour}: #(\w{{6}});", source.read_text())[:1]
        wanted = bytes.fromhex(value)
        found = sum(
            count for rgb, count in counts.items() if all(abs(a - b) <= 6 for a, b in zip(rgb, wanted, strict=True))
        )
        assert found / counts.total() >= share, colour


@pytest.mark.parametrize("name", PAGES)
def test_screenshot_is_small(name: str) -> None:
    assert (EXAMPLES / "screenshots" / name).stat().st_size < 150_000
