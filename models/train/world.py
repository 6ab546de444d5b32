"""The world the demo model draws: nine things, six places, three times of day, eleven colours.

A `Scene` says what is in a picture; `draw` paints it at 128x128, `caption` puts it into words and `sample` makes a random pair of both.
One combination in seven (thing, colour, place and time together) is held out: `sample` never draws it, `evaluate.py` asks for nothing else.
"""
import hashlib
import itertools
from dataclasses import dataclass
from PIL import Image, ImageDraw

SIZE = 128
SUPERSAMPLING = 4

COLOURS = {
    "red": (214, 48, 49), "orange": (243, 140, 40), "yellow": (250, 210, 60), "green": (46, 160, 80), "blue": (45, 105, 215), "purple": (135, 70, 180),
    "pink": (245, 130, 175), "white": (245, 245, 245), "black": (35, 35, 40), "brown": (125, 80, 45), "gray": (130, 130, 135),
}
GROUNDS = {
    "on a green hill": (96, 170, 84), "by the sea": (58, 128, 190), "in the desert": (226, 190, 120),
    "in the snow": (236, 240, 246), "on mars": (190, 92, 56), "in a city": (120, 120, 126),
}
SKIES = {  # at the top, at the horizon
    "in daylight": ((120, 185, 240), (205, 230, 250)), "at night": ((12, 16, 48), (40, 48, 96)), "at sunset": ((90, 60, 130), (250, 150, 70)),
}
MARS_DAY = ((200, 140, 110), (235, 190, 150))
LIGHT = {"in daylight": 1.0, "at night": 0.45, "at sunset": 0.8}  # how bright a surface is

INK, VISOR, PAPER = (25, 25, 28), (40, 60, 90), (240, 240, 245)


def shade(colour, factor):
    return tuple(max(0, min(255, int(v * factor))) for v in colour)


def blend(a, b, t):
    return tuple(int(x + (y - x) * t) for x, y in zip(a, b))


def sky(place, time):
    """Colours of the sky at the top and at the horizon."""
    return MARS_DAY if (place, time) == ("on mars", "in daylight") else SKIES[time]


def ground(place, time):
    return shade(GROUNDS[place], LIGHT[time])


class Canvas:
    """A picture with coordinates from 0 to 1, painted large and shrunk at the end."""

    def __init__(self):
        self.n = SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (self.n, self.n))
        self.pen = ImageDraw.Draw(self.image)

    def scaled(self, *xy):
        return [v * self.n for v in xy]

    def polygon(self, points, fill):
        self.pen.polygon([(x * self.n, y * self.n) for x, y in points], fill=fill)

    def box(self, x0, y0, x1, y1, fill, radius=0):
        if radius:
            self.pen.rounded_rectangle(self.scaled(x0, y0, x1, y1), radius=radius * self.n, fill=fill)
        else:
            self.pen.rectangle(self.scaled(x0, y0, x1, y1), fill=fill)

    def oval(self, x0, y0, x1, y1, fill):
        self.pen.ellipse(self.scaled(x0, y0, x1, y1), fill=fill)

    def circle(self, x, y, r, fill):
        self.oval(x - r, y - r, x + r, y + r, fill)

    def line(self, x0, y0, x1, y1, fill, width):
        self.pen.line(self.scaled(x0, y0, x1, y1), fill=fill, width=max(1, int(width * self.n)))

    def picture(self):
        return self.image.resize((SIZE, SIZE), Image.LANCZOS)


class Brush:
    """Paints on a canvas around the foot of a thing: x to the right, y upwards, in units of the thing's size."""

    def __init__(self, canvas, x, y, size, light):
        self.canvas, self.x, self.y, self.size, self.light = canvas, x, y, size, light

    def at(self, x, y):
        return self.x + x * self.size, self.y - y * self.size

    def polygon(self, points, fill):
        self.canvas.polygon([self.at(x, y) for x, y in points], fill)

    def box(self, x0, y0, x1, y1, fill, radius=0):
        self.canvas.box(*self.at(x0, y1), *self.at(x1, y0), fill, radius * self.size)

    def oval(self, x0, y0, x1, y1, fill):
        self.canvas.oval(*self.at(x0, y1), *self.at(x1, y0), fill)

    def circle(self, x, y, r, fill):
        self.oval(x - r, y - r, x + r, y + r, fill)

    def line(self, x0, y0, x1, y1, fill, width):
        self.canvas.line(*self.at(x0, y0), *self.at(x1, y1), fill, width * self.size)

    def lit(self, colour, least=0.0):
        """A colour in this light; `least` is for what shines or is bright in the dark as well."""
        return shade(colour, max(self.light, least))


# ---- places


def paint_background(c, place, time, rng):
    top, horizon = sky(place, time)
    for y in range(c.n):
        c.pen.line([(0, y), (c.n, y)], fill=blend(top, horizon, min(1, y / (c.n * 0.7))))
    if time == "at night":
        for _ in range(rng.randint(8, 16)):
            c.circle(rng.random(), rng.random() * 0.5, 0.006, (255, 255, 235))
        c.circle(rng.choice([0.2, 0.8]) + rng.uniform(-0.05, 0.05), rng.uniform(0.12, 0.2), 0.075, (245, 240, 205))
    elif time == "in daylight" and place != "on mars":
        c.circle(rng.choice([0.18, 0.82]) + rng.uniform(-0.05, 0.05), rng.uniform(0.12, 0.2), 0.085, (255, 225, 90))
    else:
        c.circle(0.5 + rng.uniform(-0.25, 0.25), 0.55, 0.12, (255, 205, 110))
    PAINT_GROUND[place](c, ground(place, time), time, rng)


def paint_hill(c, colour, time, rng):
    c.oval(-0.5, 0.62, 1.5, 1.9, colour)


def paint_sea(c, colour, time, rng):
    c.box(0, 0.62, 1, 1, colour)
    for i in range(5):
        x, y = rng.random(), 0.7 + i * 0.06
        c.line(x - 0.12, y, x + 0.12, y, shade(colour, 1.25), 0.008)


def paint_desert(c, colour, time, rng):
    c.oval(-0.6, 0.6, 0.8, 1.6, shade(colour, 0.93))
    c.oval(0.1, 0.66, 1.7, 1.7, colour)


def paint_snow(c, colour, time, rng):
    c.box(0, 0.65, 1, 1, colour)


def paint_mars(c, colour, time, rng):
    c.box(0, 0.66, 1, 1, colour)
    for _ in range(4):
        x, y = rng.random(), rng.uniform(0.74, 0.96)
        c.oval(x - 0.07, y - 0.018, x + 0.07, y + 0.018, shade(colour, 0.8))


def paint_city(c, colour, time, rng):
    x = -0.02
    while x < 1:
        width, top = rng.uniform(0.09, 0.15), rng.uniform(0.32, 0.56)
        wall = shade((95, 100, 120), LIGHT[time] * rng.uniform(0.8, 1.1))
        pane = shade(wall, 1.35) if time == "in daylight" else (255, 230, 140)
        c.box(x, top, x + width - 0.01, 0.7, wall)
        for i, j in itertools.product(range(2), range(3)):
            c.box(x + 0.02 + i * 0.045, top + 0.04 + j * 0.07, x + 0.045 + i * 0.045, top + 0.07 + j * 0.07, pane)
        x += width
    c.box(0, 0.68, 1, 1, colour)


PAINT_GROUND = {
    "on a green hill": paint_hill, "by the sea": paint_sea, "in the desert": paint_desert,
    "in the snow": paint_snow, "on mars": paint_mars, "in a city": paint_city,
}

# ---- things


def paint_house(b, colour):
    wall, glass = b.lit(colour), (190, 225, 245) if b.light > 0.9 else (255, 235, 150)
    b.box(-0.16, 0, 0.16, 0.24, wall)
    b.polygon([(-0.21, 0.24), (0.21, 0.24), (0, 0.43)], b.lit((70, 45, 35) if colour == COLOURS["brown"] else (120, 60, 45)))
    b.box(-0.04, 0, 0.04, 0.13, b.lit((80, 50, 35)))
    b.box(-0.13, 0.12, -0.07, 0.19, glass)
    b.box(0.07, 0.12, 0.13, 0.19, glass)


def paint_tree(b, colour):
    b.box(-0.03, 0, 0.03, 0.17, b.lit((110, 72, 40)))
    for x, y, r in ((0, 0.31, 0.14), (-0.1, 0.23, 0.1), (0.1, 0.23, 0.1)):
        b.circle(x, y, r, b.lit(colour))


def paint_car(b, colour):
    b.polygon([(-0.13, 0.13), (-0.08, 0.23), (0.08, 0.23), (0.14, 0.13)], b.lit(colour))
    b.polygon([(-0.09, 0.135), (-0.06, 0.21), (0.06, 0.21), (0.1, 0.135)], b.lit((190, 225, 245), 0.7))
    b.box(-0.24, 0.04, 0.24, 0.14, b.lit(colour))
    for x in (-0.14, 0.14):
        b.circle(x, 0.04, 0.055, INK)
        b.circle(x, 0.04, 0.025, (170, 170, 175))


def paint_boat(b, colour):
    b.polygon([(-0.22, 0.09), (0.22, 0.09), (0.14, -0.02), (-0.14, -0.02)], b.lit(colour))
    b.box(-0.012, 0.09, 0.012, 0.42, b.lit((90, 60, 40)))
    b.polygon([(0.025, 0.41), (0.025, 0.13), (0.19, 0.13)], b.lit((245, 245, 240), 0.75))


def paint_balloon(b, colour):
    b.y -= 0.28
    silk = b.lit(colour, 0.75)
    b.oval(-0.15, -0.13, 0.15, 0.2, silk)
    b.oval(-0.06, -0.13, 0.06, 0.2, shade(silk, 1.18))
    for x in (-1, 1):
        b.line(x * 0.07, -0.1, x * 0.04, -0.22, (70, 55, 45), 0.005)
    b.box(-0.05, -0.28, 0.05, -0.2, b.lit((150, 100, 55)))


def paint_robot(b, colour):
    body, limb = b.lit(colour), b.lit((60, 62, 70))
    for x0, y0, x1, y1 in ((-0.1, 0, -0.03, 0.06), (0.03, 0, 0.1, 0.06), (-0.19, 0.1, -0.14, 0.24), (0.14, 0.1, 0.19, 0.24)):
        b.box(x0, y0, x1, y1, limb)
    b.box(-0.13, 0.06, 0.13, 0.26, body)
    b.box(-0.1, 0.28, 0.1, 0.43, body)
    for x in (-0.045, 0.045):
        b.circle(x, 0.36, 0.026, (250, 250, 200))
    b.line(0, 0.43, 0, 0.49, limb, 0.008)
    b.circle(0, 0.5, 0.02, (230, 70, 60))


def paint_horse(b, colour):
    coat = b.lit(colour)
    b.oval(-0.2, 0.11, 0.16, 0.27, coat)
    for x in (-0.15, -0.1, 0.06, 0.11):
        b.box(x - 0.017, 0, x + 0.017, 0.16, coat)
    b.polygon([(0.06, 0.22), (0.16, 0.17), (0.25, 0.36), (0.16, 0.4)], coat)
    b.polygon([(0.15, 0.42), (0.31, 0.33), (0.28, 0.28), (0.17, 0.33)], coat)
    b.polygon([(-0.19, 0.22), (-0.27, 0.06), (-0.22, 0.06), (-0.16, 0.17)], shade(coat, 0.7))


def paint_astronaut(b, colour):
    suit = b.lit(colour, 0.7)
    b.box(-0.08, 0, -0.02, 0.12, suit)
    b.box(0.02, 0, 0.08, 0.12, suit)
    b.box(-0.1, 0.1, 0.1, 0.3, suit, radius=0.03)
    for x in (-1, 1):
        b.line(x * 0.1, 0.26, x * 0.17, 0.14, suit, 0.05)
    b.circle(0, 0.38, 0.1, suit)
    b.oval(-0.06, 0.34, 0.075, 0.43, VISOR)


def paint_rider(b, colour):
    paint_horse(b, colour)
    suit = b.lit(PAPER, 0.75)
    b.line(-0.03, 0.22, 0.03, 0.08, suit, 0.05)
    b.box(-0.1, 0.19, 0.04, 0.39, suit, radius=0.02)
    b.line(0, 0.34, 0.12, 0.26, suit, 0.04)
    b.circle(-0.03, 0.46, 0.085, suit)
    b.oval(-0.05, 0.42, 0.05, 0.5, VISOR)


RIDER = "astronaut riding a horse"
THINGS = {  # how to paint it, its colour when the caption names none
    "house": (paint_house, "white"), "tree": (paint_tree, "green"), "car": (paint_car, "red"), "boat": (paint_boat, "brown"),
    "balloon": (paint_balloon, "red"), "robot": (paint_robot, "gray"), "horse": (paint_horse, "brown"), "astronaut": (paint_astronaut, "white"),
    RIDER: (paint_rider, "brown"),
}
PAIRS = ("tree", "house", "balloon")  # things that also come in twos

# ---- scenes


@dataclass(frozen=True)
class Scene:
    thing: str
    colour: str
    place: str
    time: str
    count: int = 1
    named: bool = True  # whether the caption names the colour

    @property
    def held_out(self):
        words = f"{self.thing}, {self.colour}, {self.place}, {self.time}"
        return hashlib.sha256(words.encode()).digest()[0] % 7 == 0


def all_scenes():
    """Every combination of one thing, colour, place and time."""
    for thing, place, time in itertools.product(THINGS, GROUNDS, SKIES):
        for colour in COLOURS if thing != RIDER else ("brown",):
            yield Scene(thing, colour, place, time, named=thing != RIDER)


def draw(scene, rng):
    canvas = Canvas()
    paint_background(canvas, scene.place, scene.time, rng)
    paint, _ = THINGS[scene.thing]
    centres, size = ((0.5,), 1.25) if scene.count == 1 else ((0.28, 0.72), 0.95)
    for x in centres:
        x += rng.uniform(-0.15, 0.15) if scene.count == 1 else rng.uniform(-0.04, 0.04)
        brush = Brush(canvas, x, 0.84 + rng.uniform(-0.03, 0.05), size * rng.uniform(0.92, 1.08), LIGHT[scene.time])
        paint(brush, COLOURS[scene.colour])
    return canvas.picture()


def caption(scene, place=True, time=True, style=""):
    """The scene in words; `place` and `time` say whether they are mentioned."""
    what = f"{scene.colour} {scene.thing}" if scene.named else scene.thing
    if scene.count == 2:
        what = f"two {what}s"
    else:
        what = ("an " if what[0] in "aeiou" else "a ") + what
    return " ".join([style + what] + [scene.place] * place + [scene.time] * time)


def sample_scene(rng):
    while True:
        thing = rng.choice(list(THINGS))
        named = thing != RIDER and rng.random() < 0.75
        scene = Scene(thing, rng.choice(list(COLOURS)) if named else THINGS[thing][1], rng.choice(list(GROUNDS)), rng.choice(list(SKIES)),
                      count=2 if thing in PAIRS and rng.random() < 0.15 else 1, named=named)
        if not scene.held_out:
            return scene


def sample(rng):
    """A picture and its caption, as people would write it: place or time are sometimes left out."""
    scene = sample_scene(rng)
    style = rng.choices(("a photo of ", "a picture of ", "a painting of ", ""), (25, 15, 10, 50))[0]
    return draw(scene, rng), caption(scene, place=rng.random() < 0.92, time=rng.random() < 0.88, style=style)
