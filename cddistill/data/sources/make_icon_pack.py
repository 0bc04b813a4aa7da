"""Make the embedded icon pack from the five icon sets of @iconify-json; users need not.

python -m cddistill.data.sources.make_icon_pack FOLDER    with FOLDER/noto/icons.json, FOLDER/twemoji/icons.json ...

It needs `pip install resvg-py`. Names that mean the same drawing in different sets (aliases, the same code points
without skin tones) become one concept, by which the data is split.
"""

import collections
import concurrent.futures
import csv
import io
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from cddistill import checksums
from cddistill.data.sheets import sheet
from cddistill.data.sources.emoji import ASSETS, TONES
from cddistill.data.sources.icons import SIZE, STYLES

QUALITY = 84  # of WebP, 0 to 100
COLUMNS = 60
RENDER = 128  # px
GROUPS = {  # emojione's categories, for drawings that no other set has
    "Food": "Food & Drink", "Nature": "Animals & Nature", "People": "People & Body", "Travel": "Travel & Places",
    "Modifiers": "Symbols",
}  # fmt: skip
TONE = re.compile("-(" + "|".join(sorted(TONES, key=len, reverse=True)) + ")-skin-tone")


def read_sets(folder):
    """{style: {file: content}} of icons.json, metadata.json and chars.json of every set."""
    files = ("icons", "metadata", "chars")
    return {
        style: {name: json.loads((folder / source / f"{name}.json").read_text("utf-8")) for name in files}
        for style, source in STYLES.items()
    }


def parse(name, names):
    """(name without skin tones, its skin tones) of a drawing; sets write tones as -dark-skin-tone, -tone5 or -dark."""
    name = re.sub(r"-tone([1-5])$", lambda m: f"-{TONES[int(m[1]) - 1]}-skin-tone", name)
    plain, tones = TONE.sub("", name), TONE.findall(name)
    stem = max((plain.removesuffix(f"-{tone}") for tone in TONES), key=lambda s: (s != plain, -len(s)))
    if stem != plain and all(f"{stem}-{tone}" in names for tone in TONES):
        plain, tones = stem, [plain[len(stem) + 1 :]]
    return re.sub("^flag-for-(flag-)?", "flag-", plain), tones


def concepts(sets):
    """{name without tones: concept}: names of the same drawing, by aliases and code points, have the same concept."""
    same = collections.defaultdict(set)
    for style, files in sets.items():
        names = files["icons"]["icons"].keys()
        for name in names:
            same[style, name].add(parse(name, names)[0])
        for alias, other in files["icons"].get("aliases", {}).items():
            if other.keys() == {"parent"}:  # else it is mirrored or rotated, which is another drawing
                same["alias", other["parent"]] |= {parse(alias, names)[0], parse(other["parent"], names)[0]}
        for code, name in files["chars"].items():
            points = tuple(p for p in code.split("-") if p not in ("fe0f", "200d") and not re.match("1f3f[b-f]", p))
            if points and name in names:
                same["code", points].add(parse(name, names)[0])
    parent = {}
    for group in same.values():
        roots = {root(parent, name) for name in group}
        parent |= dict.fromkeys(roots, min(roots))
    return {name: root(parent, name) for name in set().union(*same.values())}


def root(parent, name):
    """The representative of a name in a union-find forest."""
    while parent.get(name, name) != name:
        name = parent[name]
    return name


def groups(sets, concept_of):
    """{concept: group}, the most frequent over the sets."""
    votes = collections.defaultdict(collections.Counter)
    for files in sets.values():
        names = files["icons"]["icons"].keys()
        for category, members in files["metadata"].get("categories", {}).items():
            known = GROUPS.get(category, category)
            for name in names & set(members):
                votes[concept_of[parse(name, names)[0]]][known] += 1 if category in GROUPS else 10
    return {concept: max(sorted(count), key=count.get) for concept, count in votes.items()}


def render(args):
    """An icon, uint8 [64, 64, 3], on white: rendered at 128 px in the middle of a square, then halved."""
    import resvg_py

    icon, defaults = args
    left, top, width, height = (
        icon.get(k, defaults.get(k, d)) for k, d in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    box = f"{left - (side - width) / 2} {top - (side - height) / 2} {side} {side}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
    svg += f'width="{RENDER}" height="{RENDER}">{icon["body"]}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB").reduce(RENDER // SIZE))


def make(folder, out):
    """Write icons.csv and icons_<style>.webp, whose tiles are in the order of the rows."""
    sets = read_sets(folder)
    concept_of = concepts(sets)
    group_of = groups(sets, concept_of)
    table = [["style", "name", "tone", "concept", "group"]]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for style, files in sets.items():
            icons = files["icons"]["icons"]
            rows = sorted((*parse(name, icons.keys()), name) for name in icons)
            pictures = pool.map(render, ((icons[name], files["icons"]) for *_, name in rows), chunksize=64)
            pixels = np.stack([*pictures])
            sheet(pixels, COLUMNS).save(out / f"icons_{style}.webp", format="WEBP", quality=QUALITY, method=6)
            for name, tones, _ in rows:
                concept = concept_of[name]
                table.append([style, name, "+".join(tones), concept, group_of.get(concept, "Symbols")])
    with (out / "icons.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
    checksums.write_shipped(out)
    print(*(f"{style} {len([*rows])}" for style, rows in itertools.groupby(table[1:], lambda row: row[0])), sep=", ")


if __name__ == "__main__":
    make(Path(sys.argv[1]), ASSETS)
