"""Words in three scripts, rendered: the table `words`. Fonts are drawn with, not shipped."""

import random
import tempfile
from pathlib import Path

from icons import spoken_names
from pictures import pack_grey
from PIL import Image, ImageDraw, ImageFont
from sources import LANGUAGES, Sources, write_table

WIDTH, HEIGHT = 128, 32
TRAIN_WORDS, TEST_WORDS = 400, 100
LONGEST = {"en": 10, "ja": 7, "sw": 10, "ur": 9}
"""Characters."""


def build(sources: Sources) -> None:
    """Dark words on light ground; a word is in one split only, and each split has fonts of its own."""
    names = spoken_names(sources)
    with tempfile.TemporaryDirectory() as folder:
        fonts = _fonts(sources, Path(folder))
        rows: list[dict] = []
        for language in LANGUAGES:
            # A word that two languages spell alike ("koala") must not be in train for one and in test for the other.
            words = set(names[language].values()) - {row["word"] for row in rows}
            rows += _language(language, words, fonts[language])
    write_table("words", rows)


def _language(language: str, words: set[str], fonts: dict[str, list[ImageFont.FreeTypeFont]]) -> list[dict]:
    short = sorted(word for word in words if 2 <= len(word) <= LONGEST[language] and _is_word(word))
    rng = random.Random(language)
    rng.shuffle(short)
    rows = []
    for split, count in (("test", TEST_WORDS), ("train", TRAIN_WORDS)):
        chosen = [word for word in short if _has_glyphs(fonts[split][0], word)][:count]
        short = [word for word in short if word not in chosen]
        for word in chosen:
            image = _draw(word, rng.choice(fonts[split]), rng)
            rows.append({"split": split, "language": language, "word": word, "image": pack_grey(image)})
    return rows


def _is_word(word: str) -> bool:
    """Letters and at most one space."""
    return all(letter.isalpha() or letter in " ー" for letter in word) and word.count(" ") <= 1


def _has_glyphs(font: ImageFont.FreeTypeFont, word: str) -> bool:
    """Whether no letter is drawn as the box for missing ones (DejaVu lacks two letters of Urdu)."""
    missing = bytes(font.getmask("\U0010ffff"))
    return all(bytes(font.getmask(letter)) != missing for letter in word if letter != " ")


def _draw(word: str, font: ImageFont.FreeTypeFont, rng: random.Random) -> Image.Image:
    """The word, made as large as fits and placed at random."""
    left, top, right, bottom = font.getbbox(word)
    image = Image.new("L", (WIDTH, HEIGHT), rng.randint(190, 255))
    if right - left > WIDTH - 4:
        font = font.font_variant(size=int(font.size * (WIDTH - 4) / (right - left)))
        left, top, right, bottom = font.getbbox(word)
    x = rng.randint(2, max(2, WIDTH - 2 - int(right - left))) - left
    y = (HEIGHT - (bottom - top)) / 2 - top
    ImageDraw.Draw(image).text((x, y), word, font=font, fill=rng.randint(0, 80))
    return image


def _fonts(sources: Sources, folder: Path) -> dict[str, dict[str, list[ImageFont.FreeTypeFont]]]:
    dejavu = sources.deb("fonts-dejavu-core") / "usr/share/fonts/truetype/dejavu"
    mincho = sources.deb("fonts-ipaexfont-mincho") / "usr/share/fonts/opentype/ipaexfont-mincho/ipaexm.ttf"
    gothic = sources.wheel("matplotlib_fontja").extract("matplotlib_fontja/fonts/ipaexg.ttf", folder)
    arabic = sources.wheel("fontpkg_noto_sans_arabic").extract("fontpkg_noto_sans_arabic/files/NotoSansArabic[wdth,wght].ttf", folder)
    sizes = (17, 20, 22)
    latin = {
        "train": [_font(dejavu / f"DejaVu{kind}.ttf", size) for kind in ("Sans", "Sans-Bold", "Serif") for size in sizes],
        "test": [_font(dejavu / "DejaVuSansMono-Bold.ttf", size) for size in (16, 19)],
    }
    return {
        "en": latin,
        "sw": latin,
        "ja": {"train": [_font(gothic, size) for size in sizes], "test": [_font(mincho, size) for size in (18, 21)]},
        "ur": {
            "train": [_font(arabic, size, style) for style in ("Regular", "Bold") for size in sizes],
            "test": [_font(dejavu / "DejaVuSans.ttf", size) for size in (18, 21)],
        },
    }


def _font(path: Path | str, size: int, style: str = "") -> ImageFont.FreeTypeFont:
    font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.RAQM)
    if style:
        font.set_variation_by_name(style)
    return font
