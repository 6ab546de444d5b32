"""Writes rules.json: held-out prompts, and for each what share of the pixels in which box must have which colours.

The colours come from the world's own tables, the shares from its own drawings of the scene. `--validate` reports how many fresh drawings of the right scene pass and
how many of a wrong one (another time, place, colour or thing) fail.

    python rules.py --validate
"""
import argparse
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
import numpy as np
from evaluate import judge, share
from world import COLOURS, GROUNDS, INK, LIGHT, MARS_DAY, PAPER, RIDER, SKIES, THINGS, VISOR, Scene, all_scenes, blend, caption, draw, ground, shade, sky

DRAWINGS = 60  # of each scene, to measure the shares on
SEED = 1000
STYLES = ("", "a photo of ", "", "a picture of ", "", "a painting of ")
BANDS = [(0.08, round(y, 2), 0.92, round(y + 0.14, 2)) for y in (0.2, 0.34, 0.48, 0.62, 0.76)]
SKY_BOXES = [(0, 0, 1, 0.06), (0, 0, 0.35, 0.3), (0.35, 0, 0.65, 0.3), (0.65, 0, 1, 0.3)]
ACCENTS = {  # a part that tells the thing from the others: colour, least light, box
    "house": ((120, 60, 45), 0, (0.2, 0.2, 0.8, 0.62)), "tree": ((110, 72, 40), 0, (0.25, 0.6, 0.75, 0.9)), "car": (INK, 1, (0.05, 0.68, 0.95, 0.92)),
    "boat": ((245, 245, 240), 0.75, (0.3, 0.25, 0.95, 0.75)), "balloon": ((150, 100, 55), 0, (0.25, 0.72, 0.75, 0.98)), "robot": ((60, 62, 70), 0, (0.05, 0.45, 0.95, 0.9)),
    "astronaut": (VISOR, 1, (0.25, 0.2, 0.75, 0.6)), RIDER: (PAPER, 0.75, (0.2, 0.08, 0.8, 0.62)),
}
LEAST_LIGHT = {"balloon": 0.75, "astronaut": 0.7}


def body(scene, colour):
    return shade(COLOURS[colour], max(LIGHT[scene.time], LEAST_LIGHT.get(scene.thing, 0)))


def tolerance(colour, others):
    """Half the way to the nearest colour it could be taken for, within limits."""
    return int(np.clip(min(np.linalg.norm(np.subtract(colour, o)) for o in others) / 2, 22, 48))


def checks_to_measure(scene):
    top, horizon = sky(scene.place, scene.time)
    earth = ground(scene.place, scene.time)
    grounds = [earth] + {"in the desert": [shade(earth, 0.93)], "on mars": [shade(earth, 0.8)], "by the sea": [shade(earth, 1.25)]}.get(scene.place, [])
    heights = [blend(top, horizon, t) for t in (0, 0.15, 0.3, 0.45)]
    for box in SKY_BOXES:
        yield "sky", box, heights[:2] if box[3] < 0.1 else heights, 40, 0.7, None
    yield "ground", (0, 0.9, 1, 1), grounds, 26, 0.7, None
    silk = body(scene, scene.colour)
    others = [body(scene, c) for c in COLOURS if c != scene.colour] + heights + [horizon] + grounds
    near = tolerance(silk, [o for o in others if np.linalg.norm(np.subtract(o, silk)) > 20])
    for box in BANDS:
        yield "object", box, [silk], near, 0.5, 1.4
    if scene.thing in ACCENTS:
        colour, least, box = ACCENTS[scene.thing]
        if scene.thing == "house" and scene.colour == "brown":
            colour = (70, 45, 35)
        yield "object", box, [shade(colour, max(LIGHT[scene.time], least))], 40, 0.4, None


def rules(scene, rng):
    """The checks of a scene, with shares that its drawings reach and room to spare."""
    pictures = [np.asarray(draw(scene, rng)) for _ in range(DRAWINGS)]
    for what, box, colours, near, low, high in checks_to_measure(scene):
        check = {"what": what, "box": list(box), "colours": [list(c) for c in colours], "tolerance": near}
        shares = [share(p, check) for p in pictures]
        check["min_share"] = round(low * min(shares), 3) if min(shares) > 0.04 else 0
        if high and (most := max(shares) * high + 0.04) < 0.9:
            check["max_share"] = round(most, 3)
        if check["min_share"] or check.get("max_share", 1) < 0.5:
            yield check


def cases():
    scenes = [s for s in all_scenes() if s.held_out]
    random.Random(SEED).shuffle(scenes)
    for i, scene in enumerate(scenes):
        yield scene, {"prompt": caption(scene, style=STYLES[i % len(STYLES)]), "seed": i, "ci": i % 14 == 0, "checks": list(rules(scene, random.Random(SEED + i)))}


def wrong(scene, rng):
    """The scene with one thing changed, by what was changed."""
    def other(options, now):
        return rng.choice([o for o in options if o != now])
    yield "time", replace(scene, time=other(SKIES, scene.time))
    yield "place", replace(scene, place=other(GROUNDS, scene.place))
    if scene.thing != RIDER:
        yield "colour", replace(scene, colour=other(COLOURS, scene.colour))
    thing = other(THINGS, scene.thing)
    yield "thing", replace(scene, thing=thing, colour=THINGS[RIDER][1] if thing == RIDER else scene.colour)


def validate(pairs):
    right, failed, asked = Counter(), Counter(), Counter()
    for i, (scene, case) in enumerate(pairs):
        rng = random.Random(-i - 1)
        right[judge(np.asarray(draw(scene, rng)), case)[0]] += 1
        for kind, scene in wrong(scene, rng):
            asked[kind] += 1
            failed[kind] += not judge(np.asarray(draw(scene, rng)), case)[0]
    print(f"right drawings that pass: {right[True]} of {right.total()}")
    for kind in asked:
        print(f"drawings with another {kind} that fail: {failed[kind]} of {asked[kind]}")


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("--out", type=Path, default=Path(__file__).with_name("rules.json"))
    arg.add_argument("--validate", action="store_true")
    args = arg.parse_args()
    pairs = list(cases())
    args.out.write_text("[\n" + ",\n".join(json.dumps(case) for _, case in pairs) + "\n]\n")
    print(f"{len(pairs)} cases, {sum(len(c['checks']) for _, c in pairs)} checks")
    if args.validate:
        validate(pairs)


if __name__ == "__main__":
    main()
