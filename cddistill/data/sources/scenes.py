"""Procedural scenes: one to three solids on a chequered floor, with exact depth and instance masks, a caption and an
instructed edit."""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from cddistill.data.contracts import Source
from cddistill.data.splits import SPLITS

COLOURS = {
    "red": (0.85, 0.12, 0.10), "green": (0.15, 0.65, 0.20), "blue": (0.12, 0.25, 0.85), "yellow": (0.95, 0.80, 0.10),
    "purple": (0.55, 0.20, 0.70), "cyan": (0.10, 0.75, 0.80), "white": (0.92, 0.92, 0.92), "orange": (0.95, 0.50, 0.10),
}  # fmt: skip
SHAPES = ("ball", "cube", "cylinder")
SIZES = {"small": 0.40, "big": 0.62}  # radius or half edge length, metres
HELD_OUT = {("red", "cylinder"), ("blue", "ball"), ("yellow", "cube")}  # in no training image: a compositional test
COUNTS = {"train": 10_000, "validation": 1_000, "test": 1_000}
EYE = np.array([0.0, 2.1, -4.6])  # metres; x right, y up, z into the scene
FAR = 25.0  # metres: distance where the floor ends, and the depth of the sky
SUPERSAMPLING = 2  # rays per pixel and axis


class Solid(NamedTuple):
    """A solid standing on the floor."""

    shape: str
    size: str
    colour: str
    tint: np.ndarray  # added to the colour
    yaw: float  # radians, about the vertical axis
    x: float
    z: float

    def __str__(self):
        return f"{self.size} {self.colour} {self.shape}"


class World(NamedTuple):
    """Everything but the solids."""

    light: np.ndarray  # unit vector towards the light
    tiles: float  # floor tiles per metre
    floor: tuple[np.ndarray, np.ndarray]  # the two tile colours
    sky: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scenes(Source):
    """The procedural scenes. No options."""

    def open(self, config, split):
        return SceneImages(config, split)


class SceneImages:
    """Scenes generated from (split, i) only. The label, 0 .. 23, is the shape and colour of the nearest solid.

    Training scenes have none of the pairs of colour and shape in HELD_OUT.
    """

    num_labels = len(SHAPES) * len(COLOURS)

    def __init__(self, config, split):
        self.split, self.size = split, config.size

    def __len__(self):
        return COUNTS[self.split]

    def element(self, i, rng):
        """Scene i."""
        return dict(scene((SPLITS.index(self.split), i), self.size, self.split == "train"))


@functools.lru_cache(maxsize=sum(COUNTS.values()))
def scene(seed, size, training=False):
    """image and edited uint8 [size,size,3], depth float32 [size,size] in metres, mask uint8 [size,size], caption,
    instruction and label.

    The mask is 0 for the background and k for the k-th solid of the caption. With `training`, no image shows a pair of
    HELD_OUT.
    """
    excluded = HELD_OUT if training else set()
    rng = np.random.default_rng(seed)
    world, solids = random_world(rng), random_solids(rng, excluded)
    instruction, changed = random_edit(rng, solids, excluded)
    (image, depth, mask), (edited, _, _) = render(world, solids, size), render(world, changed, size)
    nearest = min(solids, key=lambda s: s.z)
    ordered = sorted(solids, key=lambda s: s.x)
    mask = np.uint8([0, *(1 + next(k for k, t in enumerate(ordered) if t is s) for s in solids)])[mask]
    for array in (image, depth, edited, mask):
        array.flags.writeable = False  # cached
    return {
        "image": image,
        "depth": depth,
        "edited": edited,
        "mask": mask,
        "caption": " and ".join(f"a {s}" for s in ordered),
        "instruction": instruction,
        "label": SHAPES.index(nearest.shape) * len(COLOURS) + list(COLOURS).index(nearest.colour),
    }


def random_world(rng):
    """Random light, floor and sky."""
    light = np.array([rng.uniform(-0.8, 0.8), 1.1, rng.uniform(-0.9, -0.2)])
    floor = (rng.uniform(0.35, 0.75, 3), rng.uniform(0.35, 0.75, 3))
    return World(light / np.linalg.norm(light), rng.choice([0.8, 1.2, 2.0]), floor, rng.uniform(0.45, 0.85, 3))


def random_solids(rng, excluded=frozenset()):
    """One to three solids with different colours and places, none with a (colour, shape) that is excluded."""
    solids = random_arrangement(rng)
    while any((s.colour, s.shape) in excluded for s in solids):
        solids = random_arrangement(rng)
    return solids


def random_arrangement(rng):
    """One to three solids with different colours and places."""
    n = rng.integers(1, 4)
    places = rng.permutation([-1.3, 0.0, 1.3])[:n]
    colours = rng.choice(list(COLOURS), n, replace=False)
    return [
        Solid(
            shape=str(rng.choice(SHAPES)),
            size=str(rng.choice(list(SIZES))),
            colour=str(colour),
            tint=rng.normal(0, 0.03, 3),
            yaw=rng.uniform(0, np.pi / 2),
            x=place + rng.uniform(-0.25, 0.25),
            z=rng.uniform(-0.8, 1.4),
        )
        for place, colour in zip(places, colours, strict=True)
    ]


def random_edit(rng, solids, excluded=frozenset()):
    """An instruction about the first solid, identified by its colour, and the solids after the edit, none of which has
    a (colour, shape) that is excluded."""
    first, *others = solids
    kind = rng.choice(["colour", "shape", "remove"] if others else ["colour", "shape"])
    if kind == "colour":
        used = [s.colour for s in solids]
        new = str(rng.choice([c for c in COLOURS if c not in used and (c, first.shape) not in excluded]))
        return f"make the {first.colour} {first.shape} {new}", [first._replace(colour=new), *others]
    if kind == "shape":
        new = str(rng.choice([s for s in SHAPES if s != first.shape and (first.colour, s) not in excluded]))
        return f"turn the {first.colour} {first.shape} into a {new}", [first._replace(shape=new), *others]
    return f"remove the {first}", others


def render(world, solids, size):
    """Ray-traced image uint8 [size,size,3], depth float32 [size,size] in metres along the ray, and int [size,size] with
    k where most rays hit solids[k - 1], 0 where they hit none."""
    rays, t, points = floor(size * SUPERSAMPLING)
    t, surface, n = t.copy(), t < FAR, size * SUPERSAMPLING
    tile = np.floor(points[:, 0] * world.tiles) + np.floor(points[:, 2] * world.tiles)
    albedo = np.stack(world.floor)[np.where(tile % 2, 0, 1)]
    albedo[~surface] = world.sky + 0.25 * rays[~surface, 1:2]
    normal, owner = np.tile([0.0, 1.0, 0.0], (len(rays), 1)), np.zeros(len(rays), int)
    for k, solid in enumerate(solids, 1):
        met, hit, hit_normal = intersect(solid, EYE, rays)
        nearer = hit < t[met]
        at = met[nearer]
        t[at], normal[at], owner[at], surface[at] = hit[nearer], hit_normal[nearer], k, True
        albedo[at] = np.clip(COLOURS[solid.colour] + solid.tint, 0, 1)
    t = np.minimum(t, FAR)
    points = EYE + t[surface, None] * rays[surface]
    albedo[surface] = shade(world, solids, rays[surface], points, normal[surface], albedo[surface], owner[surface] > 0)
    image = pool(albedo.reshape(n, n, 3))
    owned = pool(np.eye(len(solids) + 1)[owner].reshape(n, n, -1))
    depth = pool(t.reshape(n, n)).astype(np.float32)
    return (np.clip(image, 0, 1) ** 0.85 * 255 + 0.5).astype(np.uint8), depth, owned.argmax(-1)


def shade(world, solids, rays, points, normal, albedo, shiny):
    """Blinn-Phong shading [n,3] with hard shadows of n points; only shiny points have a highlight."""
    start = points + 1e-2 * normal  # above the surface, which would otherwise shadow itself
    bright = np.ones(len(points), bool)
    for solid in solids:
        met, hit, _ = intersect(solid, start, world.light)
        bright[met[np.isfinite(hit)]] = False
    colour = albedo * (0.32 + 0.72 * (np.clip(normal @ world.light, 0, 1) * bright)[:, None])
    glossy = np.flatnonzero(bright & shiny)
    half = world.light - rays[glossy]
    half = half / np.linalg.norm(half, axis=-1, keepdims=True)
    colour[glossy] += 0.35 * np.clip((normal[glossy] * half).sum(-1, keepdims=True), 0, 1) ** 40
    return colour


@functools.cache
def floor(size):
    """Unit directions [size^2,3] of the rays through the pixel centres, their distances to the floor, inf above the
    horizon, and the points where they meet it, EYE where they do not."""
    v, u = 1 - (np.mgrid[:size, :size].reshape(2, -1) + 0.5) / size * 2
    forward, right = np.array([0, -0.34, 1.0]) / np.hypot(0.34, 1.0), np.array([1.0, 0, 0])
    up = np.cross(forward, right)
    rays = forward - 0.45 * u[:, None] * right + 0.45 * v[:, None] * up
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    down = rays[:, 1] < -1e-3
    t = np.where(down, EYE[1] / -np.where(down, rays[:, 1], -1.0), np.inf)
    return rays, t, EYE + np.where(t < FAR, t, 0)[:, None] * rays


def intersect(solid, origin, rays):
    """(numbers of the rays that meet a solid's bounding sphere, distances along them to the solid, inf where they miss
    it, and outward normals there).

    Rays are unit vectors [n,3] from one point or one per ray, or one direction from n points.
    """
    radius = SIZES[solid.size]
    origin = origin - np.array([solid.x, radius, solid.z])
    along = np.einsum("...i,...i", origin, rays)
    near = np.flatnonzero(np.einsum("...i,...i", origin, origin) - along**2 < 3.001 * radius**2)  # a cube's corners
    shape = {"ball": ball, "cube": cube, "cylinder": cylinder}[solid.shape]
    origin, rays = (np.broadcast_to(x, (len(along), 3))[near] for x in (origin, rays))
    return near, *shape(origin, rays, radius, solid.yaw)


def ball(origin, rays, radius, yaw):
    """A sphere at 0: |origin + t ray| = radius."""
    b = (origin * rays).sum(-1)
    t = first_root(1.0, b, (origin * origin).sum(-1) - radius**2)
    return t, (origin + finite(t)[..., None] * rays) / radius


def cube(origin, rays, radius, yaw):
    """A cube at 0, rotated by yaw: the ray is inside where it is between all three pairs of planes."""
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    origin, rays = origin @ turn, rays @ turn
    with np.errstate(divide="ignore", invalid="ignore"):
        planes = np.stack([(-radius - origin) / rays, (radius - origin) / rays])
    enter, leave = planes.min(0), planes.max(0)
    t = enter.max(-1)
    t = np.where((t < leave.min(-1)) & (t > 1e-3), t, np.inf)
    face = np.eye(3)[enter.argmax(-1)]
    return t, -np.sign(rays) * face @ turn.T


def cylinder(origin, rays, radius, yaw):
    """An upright cylinder at 0, as high as wide: its side, or its top if that is nearer."""
    (ox, oy, oz), (dx, dy, dz) = np.moveaxis(origin, -1, 0), np.moveaxis(rays, -1, 0)
    side = first_root(dx**2 + dz**2, ox * dx + oz * dz, ox**2 + oz**2 - radius**2)
    side = np.where(np.abs(oy + finite(side) * dy) <= radius, side, np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        lid = (radius - oy) / dy
    at = origin + finite(lid)[..., None] * rays
    lid = np.where((np.hypot(at[..., 0], at[..., 2]) <= radius) & (lid > 1e-3), lid, np.inf)
    outward = (origin + finite(side)[..., None] * rays) * [1, 0, 1] / radius
    return np.minimum(side, lid), np.where((lid < side)[..., None], [0.0, 1.0, 0.0], outward)


def first_root(a, b, c):
    """The smaller root of a t^2 + 2 b t + c if it is real and positive, else inf."""
    discriminant = b * b - a * c
    t = (-b - np.sqrt(np.maximum(discriminant, 0))) / np.maximum(a, 1e-9)
    return np.where((discriminant > 0) & (t > 1e-3), t, np.inf)


def finite(t):
    """Distances with inf replaced by 0."""
    return np.where(np.isfinite(t), t, 0)


def pool(image):
    """Mean over the rays of each pixel."""
    k = range(SUPERSAMPLING)
    return sum(image[i::SUPERSAMPLING, j::SUPERSAMPLING] for i in k for j in k) / SUPERSAMPLING**2
