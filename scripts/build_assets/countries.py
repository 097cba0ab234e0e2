"""Countries of the United Nations: the tables `flags`, `maps` and `capital`, and the codes that `charts` uses."""

import random

import numpy
from pictures import fit, pack_sprite, render_svg
from PIL import Image
from sources import LANGUAGES, Sources, write_table

UN_MEMBERS = """AF AL DZ AD AO AG AR AM AU AT AZ BS BH BD BB BY BE BZ BJ BT BO BA BW BR BN BG BF BI CV KH CM CA CF TD CL
CN CO KM CG CD CR CI HR CU CY CZ DK DJ DM DO EC EG SV GQ ER EE SZ ET FJ FI FR GA GM GE DE GH GR GD GT GN GW GY HT HN HU
IS IN ID IR IQ IE IL IT JM JP JO KZ KE KI KP KR KW KG LA LV LB LS LR LY LI LT LU MG MW MY MV ML MT MH MR MU MX FM MD MC
MN ME MA MZ MM NA NR NP NL NZ NI NE NG MK NO OM PK PW PA PG PY PE PH PL PT QA RO RU RW KN LC VC WS SM ST SA SN RS SC SL
SG SK SI SB SO ZA SS ES LK SD SR SE CH SY TJ TZ TH TL TG TO TT TN TR TM TV UG UA AE GB US UY UZ VU VE VN YE ZM
ZW""".split()
CONTINENTS = {"AF": "002", "EU": "150", "AS": "142", "OC": "009", "NA": "003", "SA": "005"}
# Lists disagree on the continent of these, or they lie on two: they are not asked for it.
TWO_CONTINENTS = {"RU", "TR", "CY", "KZ", "TL", "AM", "GE", "AZ", "EG"}
# Several capitals, or lists disagree.
UNCLEAR_CAPITALS = {"BO", "CI", "IL", "LK", "NR", "SZ", "ZA", "BJ"}


def names(sources: Sources) -> dict[str, dict[str, str]]:
    """Territory code -> language -> CLDR name."""
    tables = {}
    for language in LANGUAGES:
        content = sources.json("cldr-localenames-full-48.2.0", f"main/{language}/territories.json")
        tables[language] = content["main"][language]["localeDisplayNames"]["territories"]
    codes = (*UN_MEMBERS, *CONTINENTS.values())
    found = {code: {language: tables[language][code] for language in LANGUAGES} for code in codes}
    for code, by_language in found.items():
        for language, text in by_language.items():
            by_language[language] = text.split("(")[0].strip() if code == "MM" else text.replace("’", "'")
    found["CG"]["ja"], found["CD"]["ja"] = "コンゴ共和国", "コンゴ民主共和国"
    return found


def _continent(code: str, sources: Sources) -> str:
    """The CLDR code of the continent, or "" where it is not asked."""
    listed = sources.json("countries-list-3.4.1", "countries.min.json")[code]["continent"]
    return "" if code in TWO_CONTINENTS else CONTINENTS[listed]


def labels(code: str, sources: Sources, table: dict[str, dict[str, str]]) -> dict[str, str]:
    """The columns ``<language>`` (the country) and ``continent_<language>``."""
    continent = _continent(code, sources)
    asked = {f"continent_{language}": table[continent][language] if continent else "" for language in LANGUAGES}
    return {**{language: table[code][language] for language in LANGUAGES}, **asked}


def alpha3(sources: Sources) -> dict[str, str]:
    """English name -> three-letter code, for UN members."""
    table = names(sources)
    codes = {two: three for two, three, *_ in sources.json("i18n-iso-countries-7.14.0", "codes.json")}
    return {table[code]["en"]: codes[code] for code in UN_MEMBERS}


def build_flags(sources: Sources) -> None:
    """Four drawings of every flag that no other UN member's flag looks like."""
    table = names(sources)
    circles = sources.json("iconify-json-circle-flags-1.2.11", "icons.json")["icons"]
    drawings = {code: _drawings(code, sources, circles) for code in UN_MEMBERS}
    alike = _alike({code: styles["public_domain"] for code, styles in drawings.items()})
    print("flags left out, each looks like another:", " ".join(sorted(alike)))
    rows = []
    for code in sorted(set(UN_MEMBERS) - alike):
        for style, image in drawings[code].items():
            split = "test" if style == "public_domain" else "train"
            packed = pack_sprite(image)
            rows.append({"code": code, "split": split, "style": style, **labels(code, sources, table), "image": packed})
    write_table("flags", rows)


def _drawings(code: str, sources: Sources, circles: dict) -> dict[str, Image.Image]:
    low = code.lower()
    icons, plain = sources.npm("flag-icons-7.5.0"), sources.npm("svg-country-flags-1.2.10")
    circle = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 512 512">{circles[low]["body"]}</svg>'
    return {
        "wide": render_svg((icons / "flags" / "4x3" / f"{low}.svg").read_text(encoding="utf-8"), width=72),
        "square": render_svg((icons / "flags" / "1x1" / f"{low}.svg").read_text(encoding="utf-8"), width=64),
        "circle": render_svg(circle, width=64),
        "public_domain": fit(Image.open(plain / "png100px" / f"{low}.png").convert("RGBA"), side=80),
    }


def _alike(flags: dict[str, Image.Image], *, tolerance: float = 10.0) -> set[str]:
    """Codes of flags whose mean colour difference (0-255) to another, at 24x16 pixels, is below the tolerance."""
    small = {code: numpy.asarray(image.convert("RGB").resize((24, 16), Image.Resampling.BOX), dtype=float) for code, image in flags.items()}
    codes = sorted(small)
    pairs = [(a, b) for i, a in enumerate(codes) for b in codes[i + 1 :] if abs(small[a] - small[b]).mean() < tolerance]
    return {code for pair in pairs for code in pair}


def build_capital(sources: Sources) -> None:
    """Country, capital and three capitals of other countries; capitals that contain the country's name are left out."""
    table = names(sources)
    listed = sources.json("countries-list-3.4.1", "countries.min.json")
    rng = random.Random(0)
    pairs = []
    for code in UN_MEMBERS:
        country, capital = table[code]["en"], listed[code]["capital"].replace("Washington D.C.", "Washington, D.C.")
        if code not in UNCLEAR_CAPITALS and capital[:5] not in country and country[:5] not in capital:
            pairs.append((country, capital))
    rows = []
    for country, capital in sorted(pairs):
        others = [other for _, other in pairs if other != capital]
        rows.append({"country": country, "capital": capital, "distractors": rng.sample(others, 3)})
    write_table("capital", rows)
