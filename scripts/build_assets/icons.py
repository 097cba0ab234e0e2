"""Emoji of four vendors with CLDR names in four languages: the table `emoji`."""

from pictures import fit, pack_sprite, render_svg
from sources import LANGUAGES, Sources, write_table

# Concepts that look distinct at 64 pixels, whose CLDR short name is one or two words in every language and names the
# drawn thing (no "bear face"). The English plural is given where the scenes task draws the concept.
CONCEPTS = {
    "🐈": "cats", "🐕": "dogs", "🐘": "elephants", "🐎": "", "🐍": "", "🐇": "", "🐌": "snails", "🐟": "fish", "🐙": "",
    "🦀": "crabs", "🐧": "penguins", "🦋": "butterflies", "🦉": "", "🐊": "", "🐋": "", "🕷": "", "🌵": "",
    "🍄": "mushrooms", "🍅": "", "🍇": "", "🍉": "", "🍋": "lemons", "🍌": "bananas", "🍍": "", "🍓": "strawberries",
    "🥕": "carrots", "🥚": "eggs", "🍞": "", "🍕": "", "🍔": "", "🥑": "", "✂": "", "🎸": "guitars", "🎺": "",
    "👑": "crowns", "👓": "", "👕": "", "📷": "", "📺": "", "🔑": "keys", "🔔": "bells", "🔨": "", "🕯": "", "🚪": "",
    "🛏": "", "🥁": "drums", "✏": "", "☂": "umbrellas", "☀": "", "☁": "clouds", "🎈": "balloons", "☎": "", "🏆": "",
    "🚌": "buses", "🚲": "bicycles", "🚀": "rockets", "✈": "airplanes", "🚁": "", "⛵": "sailboats", "🚜": "", "⛺": "",
    "⚓": "",
}  # fmt: skip
TRAIN_SETS = ("twemoji-1.2.5", "noto-v1-1.2.5", "fluent-emoji-flat-1.2.6")
TEST_SETS = ("noto-1.2.9",)


def build(sources: Sources) -> None:
    """Writes one row a concept and vendor."""
    spoken = spoken_names(sources)
    rows = []
    for vendor in (*TRAIN_SETS, *TEST_SETS):
        icons = sources.json(f"iconify-json-{vendor}", "icons.json")
        by_character = _icon_names(sources, vendor)
        for character, plural in CONCEPTS.items():
            image = fit(render_svg(_svg(icons, by_character[character]), width=64), side=64)
            rows.append(
                {
                    "concept": character,
                    "split": "test" if vendor in TEST_SETS else "train",
                    "vendor": vendor.rsplit("-", 1)[0],
                    **{language: spoken[language][character] for language in LANGUAGES},
                    "plural": plural,
                    "image": pack_sprite(image),
                }
            )
    write_table("emoji", rows)


def spoken_names(sources: Sources) -> dict[str, dict[str, str]]:
    """Language -> character -> CLDR short name, as read out."""
    names = {}
    for language in LANGUAGES:
        path = f"annotations/{language}/annotations.json"
        entries = sources.json("cldr-annotations-full-48.2.0", path)["annotations"]["annotations"]
        short = {_bare(key): value["tts"][0] for key, value in entries.items() if value.get("tts")}
        # A typewriter apostrophe: the curly one of "ng’ombe" costs byte tokens and is no difference in spelling.
        names[language] = {key: text.replace("’", "'") for key, text in short.items()}
    return names


def _icon_names(sources: Sources, vendor: str) -> dict[str, str]:
    """Character -> icon name. The set noto-v1 lists no characters but uses the icon names of twemoji."""
    listed = vendor if not vendor.startswith("noto-v1") else TRAIN_SETS[0]
    characters = sources.json(f"iconify-json-{listed}", "chars.json")
    points = {key: icon for key, icon in characters.items() if set(key) <= set("0123456789abcdef-")}
    return {_bare("".join(chr(int(point, 16)) for point in key.split("-"))): icon for key, icon in points.items()}


def _svg(icons: dict, name: str) -> str:
    icon = icons["icons"][name]
    width, height = (icon.get(edge, icons.get(edge, 16)) for edge in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'


def _bare(text: str) -> str:
    return text.replace("\ufe0f", "")
