"""Country outlines from Natural Earth: the table `maps`."""

import itertools

from countries import UN_MEMBERS, labels, names
from sources import Sources, write_table

Ring = list[tuple[float, float]]
SMALLEST_EXTENT = 1.5
"""Degrees; smaller countries are drawn as neighbours but not asked for."""


def build(sources: Sources) -> None:
    """One row a country: names, and rings as flat lists of longitude, latitude in degrees."""
    table = names(sources)
    numeric = {number: two for two, _, number, *_ in sources.json("i18n-iso-countries-7.14.0", "codes.json")}
    atlas = sources.json("world-atlas-2.0.2", "countries-110m.json")
    arcs = _arcs(atlas)
    rows = []
    for shape in atlas["objects"]["countries"]["geometries"]:
        code = numeric.get(shape.get("id"), "")
        polygons = shape["arcs"] if shape["type"] == "MultiPolygon" else [shape["arcs"]]
        # Antarctica's ring runs along the pole and cannot be drawn on these maps.
        rings = [_unwrap(_ring(polygon[0], arcs)) for polygon in polygons] if code != "AQ" else []
        if not rings:
            continue
        member = code in UN_MEMBERS
        asked = member and _extent(max(rings, key=_extent)) >= SMALLEST_EXTENT
        named = labels(code if member else "FR", sources, table)
        rows.append(
            {
                "code": code,
                "is_asked": asked,
                **(named if asked else dict.fromkeys(named, "")),
                "rings": [[round(number, 2) for point in ring for number in point] for ring in rings],
            }
        )
    write_table("maps", rows)


def _arcs(atlas: dict) -> list[Ring]:
    """TopoJSON arcs are quantised steps from a start point."""
    (scale_x, scale_y), (shift_x, shift_y) = atlas["transform"]["scale"], atlas["transform"]["translate"]
    decoded = []
    for steps in atlas["arcs"]:
        x = y = 0
        points = []
        for step_x, step_y in steps:
            x, y = x + step_x, y + step_y
            points.append((x * scale_x + shift_x, y * scale_y + shift_y))
        decoded.append(points)
    return decoded


def _ring(indices: list[int], arcs: list[Ring]) -> Ring:
    points: Ring = []
    for index in indices:
        arc = arcs[index] if index >= 0 else arcs[~index][::-1]
        points += arc[1:] if points else arc
    return points


def _unwrap(ring: Ring) -> Ring:
    """The ring with longitudes that run on beyond 180 degrees instead of jumping to the other edge of the map."""
    turned, turn = [ring[0]], 0
    for (before, _), (longitude, latitude) in itertools.pairwise(ring):
        turn += 360 * ((before - longitude > 180) - (longitude - before > 180))
        turned.append((longitude + turn, latitude))
    return turned


def _extent(ring: Ring) -> float:
    longitudes, latitudes = zip(*ring, strict=True)
    return max(max(longitudes) - min(longitudes), max(latitudes) - min(latitudes))
