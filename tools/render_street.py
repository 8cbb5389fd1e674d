"""
Renders `examples/street.jpg` and its labels `examples/street_labels.png`: a street by day, in CamVid's 11 classes.

A small ray caster in numpy: boxes, vertical cylinders and ellipsoids with procedural textures, sunlight and shadows.
The picture is not a photograph, so that it may be distributed. All numbers are fixed: every run gives the same pixels.

    python tools/render_street.py --output examples
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

CLASSES = (
    "sky", "building", "pole", "road", "sidewalk", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"
)  # fmt: skip
WIDTH, HEIGHT, SUPERSAMPLING = 960, 720, 2
CAMERA = np.array([-1.7, 1.45, 0.0])  # metres: x to the right, y up, z along the street
FOCAL_LENGTH = 1.05  # of the image's width
HORIZON = 0.47  # of the image's height, from the top
SUN = np.array([0.55, 0.78, -0.30]) / np.linalg.norm([0.55, 0.78, -0.30])
SUNLIGHT, SKYLIGHT = np.array([1.05, 0.99, 0.88]), np.array([0.44, 0.48, 0.55])
TREES = (  # x, z and height in metres: behind the fence, along the road, and at the end of the street
    (8.9, 25, 8.5), (11.5, 29, 10.5), (9.3, 34, 8.5), (12, 40, 11), (9, 44, 9), (15.5, 35, 11),
    (-6.2, 58, 6.5), (6.2, 61, 7), (-6.2, 74, 7), (6.2, 75, 7),
    (-3, 118, 12), (6, 120, 12), (0.5, 122, 9), (-9, 117, 10),
)  # fmt: skip
ROAD, KERB, FRONTS = 4.2, 0.12, 7.0  # half the road's width, height of the kerb, distance of the fronts


# --- textures --------------------------------------------------------------------------------------------------------


def lattice(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Pseudo-random value in [0, 1) of each integer point."""
    mixed = (x * 73856093) ^ (y * 19349663) ^ (z * 83492791)
    mixed = (mixed ^ (mixed >> 13)) * 1274126177
    return ((mixed ^ (mixed >> 16)) & 0xFFFF) / 65536.0


def noise(points: np.ndarray, size: float, octaves: int = 3) -> np.ndarray:
    """Value noise in [0, 1] at points of shape (n, 3); `size` is the extent of the coarsest features in metres."""
    total, weight = np.zeros(len(points)), 0.0
    for octave in range(octaves):
        scaled = points * (2**octave / size) + 17.3 * octave
        corner = np.floor(scaled).astype(np.int64)
        blend = scaled - corner
        blend = blend * blend * (3 - 2 * blend)
        value = np.zeros(len(points))
        for dx in (0, 1):
            for dy in (0, 1):
                for dz in (0, 1):
                    share = np.abs(np.array([1 - dx, 1 - dy, 1 - dz]) - blend).prod(axis=1)
                    value += share * lattice(corner[:, 0] + dx, corner[:, 1] + dy, corner[:, 2] + dz)
        total += value / 2**octave
        weight += 1 / 2**octave
    return total / weight


def mottled(colour, size: float = 0.4, strength: float = 0.3):
    """A texture of one colour, made uneven by noise."""
    colour = np.asarray(colour, dtype=float)
    return lambda points, normals: colour * (1 - strength / 2 + strength * noise(points, size)[:, None])


def asphalt(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Road surface with tyre tracks, patches, a dashed centre line and lines along the kerbs."""
    x, z = points[:, 0], points[:, 2]
    shade = 0.11 + 0.05 * noise(points, 3.0) + 0.10 * noise(points, 0.07, 2)
    shade = shade - 0.02 * np.cos(x * 2 * np.pi / 2.1)
    colour = shade[:, None] * np.array([1.0, 1.0, 1.04])
    worn = 0.55 + 0.35 * noise(points, 0.3)
    centre = (np.abs(x) < 0.07) & (z % 6 < 3.6)
    sides = np.abs(np.abs(x) - (ROAD - 0.35)) < 0.05
    marked = (centre | sides)[:, None]
    return np.where(marked, worn[:, None] * np.array([0.9, 0.9, 0.86]), colour)


def paving(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Slabs of 60 cm with joints."""
    x, z = points[:, 0], points[:, 2]
    joints = ((x % 0.6 < 0.02) | (z % 0.6 < 0.025)).astype(float)
    slab = lattice(np.floor(x / 0.6).astype(np.int64), np.zeros(len(x), np.int64), np.floor(z / 0.6).astype(np.int64))
    shade = 0.17 + 0.05 * slab + 0.16 * noise(points, 0.25) - 0.08 * joints
    return shade[:, None] * np.array([1.0, 0.97, 0.92])


def facade(wall, seed: int, floor: float = 3.1, bay: float = 2.3):
    """A wall with rows of windows; `seed` varies curtains and reflections."""
    wall = np.asarray(wall, dtype=float)

    def texture(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        along = np.where(np.abs(normals[:, 0]) > 0.5, points[:, 2], points[:, 0])
        up = points[:, 1] - KERB
        column, row = np.floor(along / bay).astype(np.int64), np.floor(up / floor).astype(np.int64)
        u, v = along / bay - column, up / floor - row
        courses = 0.93 + 0.07 * ((up % 0.15) > 0.02)
        colour = wall * ((0.45 + 0.6 * noise(points, 0.8, 5)) * courses)[:, None]
        frame = (np.abs(u - 0.5) < 0.27) & (np.abs(v - 0.52) < 0.30)
        glass = (np.abs(u - 0.5) < 0.23) & (np.abs(v - 0.52) < 0.26) & (np.abs(u - 0.5) > 0.015)
        pane = 0.03 + 0.16 * lattice(column, row, np.full(len(u), seed, np.int64)) + 0.08 * noise(points, 0.7)
        colour = np.where(frame[:, None], np.array([0.80, 0.79, 0.76]), colour)
        colour = np.where(glass[:, None], pane[:, None] * np.array([0.85, 0.95, 1.1]), colour)
        return np.where((up > floor * 2.9)[:, None] & (v > 0.93)[:, None], wall * 0.6, colour)

    return texture


def foliage(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Leaves: light and dark green, in small clumps."""
    shade = 0.015 + 0.55 * noise(points, 0.22, 4) ** 3
    return shade[:, None] * np.array([0.80, 0.92, 0.48])


def railing(points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Close boards of a wooden fence."""
    board = np.floor(points[:, 2] / 0.12).astype(np.int64)
    shade = 0.24 + 0.10 * lattice(board, board * 0, board * 0) + 0.05 * noise(points, 0.3)
    shade = np.where(points[:, 2] % 0.12 < 0.012, 0.08, shade)
    return shade[:, None] * np.array([1.1, 0.88, 0.68])


# --- shapes ----------------------------------------------------------------------------------------------------------


@dataclass
class Shape:
    """A box, a vertical cylinder or an ellipsoid, given by its bounds."""

    kind: str
    low: np.ndarray
    high: np.ndarray
    class_name: str
    texture: object
    casts_shadow: bool = True
    shine: float = 0.0

    def intersect(self, origins: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distance along each ray, infinite where it misses, and the normals there; both inputs of shape (n, 3)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            if self.kind == "box":
                return self._intersect_box(origins, rays)
            centre, radii = (self.low + self.high) / 2, (self.high - self.low) / 2
            weights = 1 / radii**2
            if self.kind == "cylinder":
                weights = weights * np.array([1, 0, 1])
            offset = origins - centre
            a = (rays * rays * weights).sum(axis=1)
            b = (offset * rays * weights).sum(axis=1)
            c = (offset * offset * weights).sum(axis=1) - 1
            root = b * b - a * c
            distance = (-b - np.sqrt(np.maximum(root, 0))) / a
            points = origins + distance[:, None] * rays
            inside = (root > 0) & (distance > 1e-4)
            if self.kind == "cylinder":
                inside &= (points[:, 1] > self.low[1]) & (points[:, 1] < self.high[1])
            normals = (points - centre) * weights
            normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
            return np.where(inside, distance, np.inf), normals

    def _intersect_box(self, origins: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second = (self.low - origins) / rays, (self.high - origins) / rays
        near, far = np.minimum(first, second), np.maximum(first, second)
        axis = near.argmax(axis=1)
        distance = near.max(axis=1)
        hit = (distance < far.min(axis=1)) & (distance > 1e-4)
        normals = np.zeros_like(rays)
        rows = np.arange(len(rays))
        normals[rows, axis] = -np.sign(rays[rows, axis])
        return np.where(hit, distance, np.inf), normals


def box(x, y, z, class_name, texture, **kwargs) -> Shape:
    return Shape("box", *np.array([x, y, z], dtype=float).T, class_name, texture, **kwargs)


def cylinder(x, z, radius, bottom, top, class_name, texture, **kwargs) -> Shape:
    bounds = np.array([[x - radius, x + radius], [bottom, top], [z - radius, z + radius]], dtype=float)
    return Shape("cylinder", *bounds.T, class_name, texture, **kwargs)


def ellipsoid(centre, radii, class_name, texture, **kwargs) -> Shape:
    centre, radii = np.asarray(centre, dtype=float), np.asarray(radii, dtype=float)
    return Shape("ellipsoid", centre - radii, centre + radii, class_name, texture, **kwargs)


# --- objects of the street -------------------------------------------------------------------------------------------


def car(x: float, z: float, colour, towards: int) -> list[Shape]:
    """A car of 4.2 m; `towards` is -1 if it faces the camera and 1 if it drives away."""
    paint, dark = mottled(colour, 1.5, 0.1), mottled([0.05, 0.05, 0.06], 0.5)
    glass = mottled([0.16, 0.19, 0.22], 0.6, 0.5)
    back, front = (z, z + 4.2) if towards > 0 else (z + 4.2, z)
    cabin = sorted((back + towards * 0.5, front - towards * 1.3))
    lamps = [0.7, 0.08, 0.06] if towards > 0 else [0.95, 0.93, 0.85]
    parts = [
        box((x - 0.86, x + 0.86), (0.30, 0.92), (z, z + 4.2), "car", paint, shine=0.25),
        box((x - 0.80, x + 0.80), (0.92, 1.00), (z + 0.1, z + 4.1), "car", paint, shine=0.25),
        box((x - 0.70, x + 0.70), (1.00, 1.40), cabin, "car", glass, shine=0.4),
        box((x - 0.66, x + 0.66), (1.40, 1.47), (cabin[0] + 0.2, cabin[1] - 0.2), "car", paint, shine=0.3),
        box((x - 0.80, x + 0.80), (0.18, 0.34), (z + 0.05, z + 4.15), "car", dark),
        box((x - 0.25, x + 0.25), (0.48, 0.60), (z - 0.02, z), "car", mottled([0.8, 0.8, 0.6])),
    ]
    for side in (-1, 1):
        parts.append(box((x + side * 0.72 - 0.13, x + side * 0.72 + 0.13), (0.62, 0.78), (z - 0.02, z), "car",
                         mottled(lamps, 0.2, 0.1)))  # fmt: skip
        wheels = (z + 0.75, z + 3.4)
        parts += [ellipsoid((x + side * 0.80, 0.31, wheel), (0.10, 0.31, 0.31), "car", dark) for wheel in wheels]
    return parts


def pedestrian(x: float, z: float, coat, trousers, height: float = 1.72) -> list[Shape]:
    """A walking person."""
    scale, skin = height / 1.72, mottled([0.62, 0.45, 0.36], 0.2)
    cloth, legs = mottled(coat, 0.2, 0.9), mottled(trousers, 0.2, 0.9)
    return [
        ellipsoid((x, KERB + 1.60 * scale, z), (0.11, 0.14, 0.12), "pedestrian", skin),
        ellipsoid(
            (x, KERB + 1.66 * scale, z + 0.02), (0.12, 0.10, 0.13), "pedestrian", mottled([0.12, 0.09, 0.07], 0.1)
        ),
        ellipsoid((x, KERB + 1.15 * scale, z), (0.21, 0.36, 0.15), "pedestrian", cloth),
        ellipsoid((x - 0.25, KERB + 1.08 * scale, z), (0.07, 0.33, 0.09), "pedestrian", cloth),
        ellipsoid((x + 0.25, KERB + 1.08 * scale, z), (0.07, 0.33, 0.09), "pedestrian", cloth),
        ellipsoid((x - 0.10, KERB + 0.44 * scale, z - 0.10), (0.10, 0.46, 0.11), "pedestrian", legs),
        ellipsoid((x + 0.10, KERB + 0.44 * scale, z + 0.12), (0.10, 0.46, 0.11), "pedestrian", legs),
    ]


def tree(x: float, z: float, height: float, rng: np.random.Generator) -> list[Shape]:
    """A trunk below a crown of small clumps of leaves."""
    radius = height * 0.27
    centre = np.array([x, height - radius * 0.95, z])
    bark = mottled([0.10, 0.085, 0.07], 0.2, 0.5)
    parts = [cylinder(x, z, 0.16, 0, height * 0.6, "tree", bark)]
    for _ in range(25):  # branches
        tip = centre + rng.normal(size=3) * radius * 0.5
        parts += [ellipsoid(start, (0.05, 0.3, 0.05), "tree", bark, casts_shadow=False)
                  for start in np.linspace([x, height * 0.5, z], tip, 8)]  # fmt: skip
    parts.append(ellipsoid(centre, (radius * 0.5, radius * 0.5, radius * 0.5), "tree", foliage))
    for _ in range(900):
        direction = rng.normal(size=3)
        place = centre + direction / np.linalg.norm(direction) * radius * rng.uniform(0.4, 1.2) * [1, 0.95, 1]
        parts.append(ellipsoid(place, rng.uniform(0.05, 0.20, 3), "tree", foliage, casts_shadow=False))
    return parts


def lamp_post(x: float, z: float, towards: int) -> list[Shape]:
    """A lamp post of 7 m with an arm over the road."""
    steel = mottled([0.12, 0.13, 0.13], 0.5, 0.2)
    arm = sorted((x, x + towards * 1.3))
    return [
        cylinder(x, z, 0.11, 0, 1.4, "pole", steel),
        cylinder(x, z, 0.075, 1.4, 7.0, "pole", steel),
        box(arm, (6.93, 7.02), (z - 0.05, z + 0.05), "pole", steel),
        box((x + towards * 1.3 - 0.3, x + towards * 1.3 + 0.3), (6.86, 6.98), (z - 0.1, z + 0.1), "pole", steel),
    ]


def sign(x: float, z: float, colour, round_plate: bool) -> list[Shape]:
    """A traffic sign on a post."""
    plate, white = mottled(colour, 0.3, 0.15), mottled([0.88, 0.88, 0.86], 0.3, 0.1)
    parts = [cylinder(x, z + 0.06, 0.045, 0, 2.9, "pole", mottled([0.20, 0.21, 0.21], 0.3, 0.2))]
    if round_plate:
        parts += [
            ellipsoid((x, 2.65, z), (0.36, 0.36, 0.03), "sign", plate),
            ellipsoid((x, 2.65, z - 0.03), (0.26, 0.26, 0.03), "sign", white),
        ]
    else:
        parts += [
            box((x - 0.45, x + 0.45), (2.2, 3.0), (z - 0.02, z + 0.02), "sign", plate),
            box((x - 0.33, x + 0.33), (2.5, 2.62), (z - 0.03, z - 0.02), "sign", white),
        ]
    return parts


def street() -> list[Shape]:
    """All shapes but the ground."""
    rng = np.random.default_rng(7)
    shapes = []
    walls = ([0.52, 0.33, 0.26], [0.62, 0.54, 0.42], [0.47, 0.30, 0.25], [0.66, 0.62, 0.55], [0.55, 0.38, 0.30])
    for side, houses in ((-1, 11), (1, 7)):
        z = 3.0 if side < 0 else 48.0
        for index in range(houses):
            depth, height = rng.uniform(8, 12), rng.uniform(7.2, 10.5)
            near = FRONTS + rng.uniform(0, 0.4)
            x = sorted((side * near, side * (near + 10)))
            texture = facade(walls[(index + side) % len(walls)], index)
            shapes.append(box(x, (0, height), (z, z + depth - 0.05), "building", texture))
            roof = sorted((side * (near - 0.25), side * (near + 10)))
            shapes.append(
                box(roof, (height, height + 0.35), (z, z + depth - 0.05), "building", mottled([0.3, 0.28, 0.27]))
            )
            chimney = sorted((side * (near + 2.0), side * (near + 2.8)))
            shapes.append(
                box(chimney, (height, height + 1.6), (z + 2, z + 3.2), "building", mottled([0.42, 0.26, 0.2]))
            )
            z += depth
    shapes.append(box((-30, 40), (0, 9.5), (128, 138), "building", facade([0.55, 0.47, 0.4], 50)))
    shapes.append(box((FRONTS - 0.05, FRONTS + 0.05), (KERB, 1.75), (3.0, 47.5), "fence", railing))
    for x, z, height in TREES:
        shapes += tree(x, z, height, rng)
    for z in (12.5, 40, 68, 96):
        shapes += lamp_post(-4.75, z, 1)
    for z in (26, 54, 82):
        shapes += lamp_post(4.75, z, -1)
    shapes += sign(4.7, 14.5, [0.78, 0.10, 0.10], True) + sign(-4.8, 21, [0.08, 0.22, 0.62], False)
    shapes += sign(4.7, 33, [0.08, 0.22, 0.62], False)
    shapes += car(-3.1, 13.5, [0.55, 0.57, 0.60], 1) + car(-3.1, 20.0, [0.10, 0.16, 0.36], 1)
    shapes += car(-3.1, 30.0, [0.45, 0.06, 0.06], 1) + car(-3.1, 36.5, [0.80, 0.80, 0.78], 1)
    shapes += car(1.9, 17.0, [0.72, 0.73, 0.74], -1) + car(3.2, 42, [0.12, 0.12, 0.13], -1)
    shapes += car(-1.5, 46, [0.16, 0.24, 0.20], 1) + car(3.2, 49, [0.5, 0.5, 0.5], -1)
    shapes += pedestrian(-5.6, 10.0, [0.05, 0.05, 0.07], [0.04, 0.05, 0.09])
    shapes += pedestrian(-6.1, 17.0, [0.30, 0.06, 0.06], [0.04, 0.04, 0.05], 1.66)
    shapes += pedestrian(5.5, 12.0, [0.10, 0.09, 0.08], [0.04, 0.05, 0.08], 1.78)
    shapes += pedestrian(5.9, 22.0, [0.05, 0.09, 0.08], [0.05, 0.05, 0.06])
    return shapes


# --- rendering -------------------------------------------------------------------------------------------------------


def camera_rays(width: int, height: int) -> np.ndarray:
    """Directions of unit length, of shape (height, width, 3)."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    focal = FOCAL_LENGTH * width
    rays = np.stack([(x - width / 2) / focal, (height * HORIZON - y) / focal, np.ones_like(x)], axis=-1)
    return rays / np.linalg.norm(rays, axis=-1, keepdims=True)


def screen_window(shape: Shape, width: int, height: int) -> tuple[slice, slice]:
    """The rows and columns that can show a shape."""
    corners = np.array(np.meshgrid(*zip(shape.low, shape.high, strict=True), indexing="ij")).reshape(3, -1).T - CAMERA
    if corners[:, 2].max() <= 0.1:
        return slice(0, 0), slice(0, 0)
    depth = np.maximum(corners[:, 2], 0.1)
    focal = FOCAL_LENGTH * width
    x, y = width / 2 + focal * corners[:, 0] / depth, height * HORIZON - focal * corners[:, 1] / depth
    left, right = np.clip([x.min() - 1, x.max() + 2], 0, width).astype(int)
    top, bottom = np.clip([y.min() - 1, y.max() + 2], 0, height).astype(int)
    return slice(top, bottom), slice(left, right)


def sky(rays: np.ndarray) -> np.ndarray:
    """A pale sky with thin clouds."""
    up = np.clip(rays[:, 1], 0, 1)
    clouds = noise(rays / np.maximum(up, 0.05)[:, None] * [1, 0, 1], 1.4, 5)
    blue = (
        np.array([0.62, 0.75, 0.92]) * (1 - 0.35 * up[:, None]) + np.array([0.25, 0.17, 0.08]) * (1 - up[:, None]) ** 6
    )
    return blue + (1.05 - blue) * np.clip((clouds - 0.28) * 2.6, 0, 0.95)[:, None]


def render(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Renders the street.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Linear RGB of shape `(height, width, 3)`, and class ids of shape
        `(height, width)`.
    """
    shapes, rays = street(), camera_rays(width, height)
    depth = np.full((height, width), np.inf)
    normals, owner = np.zeros((height, width, 3)), np.full((height, width), -1)
    labels = np.full((height, width), CLASSES.index("sky"), np.uint8)

    # Ground: the road and, one kerb higher, the pavements. The kerb's face counts as pavement.
    ground = [
        box((-60, 60), (-1, 0), (-5, 400), "road", asphalt),
        box((-60, -ROAD), (-1, KERB), (-5, 400), "sidewalk", paving),
        box((ROAD, 60), (-1, KERB), (-5, 400), "sidewalk", paving),
    ]
    everything = ground + shapes
    for index, shape in enumerate(everything):
        rows, columns = screen_window(shape, width, height) if index >= len(ground) else (slice(None), slice(None))
        directions = rays[rows, columns].reshape(-1, 3)
        if not len(directions):
            continue
        distance, normal = shape.intersect(np.broadcast_to(CAMERA, directions.shape), directions)
        seen = depth[rows, columns]
        nearer = distance.reshape(seen.shape) < seen
        seen[nearer] = distance.reshape(seen.shape)[nearer]
        normals[rows, columns][nearer] = normal.reshape(*seen.shape, 3)[nearer]
        owner[rows, columns][nearer] = index
        labels[rows, columns][nearer] = CLASSES.index(shape.class_name)

    hit = owner >= 0
    points = CAMERA + rays[hit] * depth[hit][:, None]
    hit_normals, owners = normals[hit], owner[hit]
    colours, shine = np.zeros_like(points), np.zeros(len(points))
    order = np.argsort(owners, kind="stable")
    for part in np.split(order, np.flatnonzero(np.diff(owners[order])) + 1):
        shape = everything[owners[part[0]]]
        colours[part], shine[part] = shape.texture(points[part], hit_normals[part]), shape.shine

    lit = np.clip(hit_normals @ SUN, 0, None)
    lit[shadowed(points + 2e-3 * hit_normals, [shape for shape in shapes if shape.casts_shadow])] = 0
    ambient = 0.62 + 0.38 * np.clip(hit_normals[:, 1], 0, 1)
    ambient *= 0.72 + 0.28 * np.clip((points[:, 1] + 0.1) / 1.2, 0, 1)  # less skylight near the ground
    radiance = colours * (lit[:, None] * SUNLIGHT + ambient[:, None] * SKYLIGHT)
    mirrored = rays[hit] - 2 * (rays[hit] * hit_normals).sum(axis=1, keepdims=True) * hit_normals
    radiance += shine[:, None] * np.clip(mirrored[:, 1:2] + 0.15, 0, 1) * SKYLIGHT * 1.6
    haze = 1 - np.exp(-depth[hit] / 420)
    radiance += haze[:, None] * (np.array([0.74, 0.80, 0.88]) - radiance)

    image = np.empty((height, width, 3))
    image[hit], image[~hit] = radiance, sky(rays[~hit])
    return image, labels


def shadowed(points: np.ndarray, casters: list[Shape]) -> np.ndarray:
    """Which points are in shadow."""
    dark = np.zeros(len(points), bool)
    for caster in casters:
        # Only points in the caster's shadow volume: their ray passes the bounds' heights within its sides.
        reach = np.maximum(caster.high[1] - points[:, 1], 0) / SUN[1]
        near_x = (points[:, 0] + np.minimum(reach * SUN[0], 0) < caster.high[0]) & (
            points[:, 0] + np.maximum(reach * SUN[0], 0) > caster.low[0]
        )
        near_z = (points[:, 2] + np.minimum(reach * SUN[2], 0) < caster.high[2]) & (
            points[:, 2] + np.maximum(reach * SUN[2], 0) > caster.low[2]
        )
        candidates = np.flatnonzero(near_x & near_z & ~dark & (reach > 0))
        if len(candidates):
            distance, _ = caster.intersect(points[candidates], np.broadcast_to(SUN, (len(candidates), 3)))
            dark[candidates[np.isfinite(distance)]] = True
    return dark


def photograph(linear: np.ndarray) -> Image.Image:
    """Simulates a camera on linear RGB: gamma, vignette, slight blur, sensor noise."""
    height, width = linear.shape[:2]
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    exposed = np.clip(linear * (1 - 0.10 * (x**2 + y**2))[..., None], 0, 1) ** (1 / 1.8)
    exposed += np.random.default_rng(11).normal(0, 0.012, exposed.shape)
    pixels = (np.clip(exposed, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("examples"), help="folder of both files")
    output = parser.parse_args().output
    linear, labels = render(WIDTH * SUPERSAMPLING, HEIGHT * SUPERSAMPLING)
    averaged = linear.reshape(HEIGHT, SUPERSAMPLING, WIDTH, SUPERSAMPLING, 3).mean(axis=(1, 3))
    photograph(averaged).save(output / "street.jpg", quality=92)
    Image.fromarray(labels[::SUPERSAMPLING, ::SUPERSAMPLING]).save(output / "street_labels.png")


if __name__ == "__main__":
    main()
