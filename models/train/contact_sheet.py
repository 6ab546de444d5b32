"""Draws the contact sheet of a model: sixteen prompts, or those given.

    python contact_sheet.py models/demo --out models/demo/contact-sheet.png
"""
import argparse
from PIL import Image
from evaluate import drawn
from world import SIZE

PROMPTS = (
    "a photo of an astronaut riding a horse on mars", "a red house by the sea at night", "a yellow boat by the sea at sunset", "a blue car in the desert in daylight",
    "a green tree in the snow", "a pink balloon in a city at night", "a purple robot on mars", "two white houses on a green hill",
    "an astronaut riding a horse in the snow at night", "a house by the sea", "a brown horse on a green hill in daylight", "a photo of an orange balloon in the desert at sunset",
    "a white astronaut on mars at night", "a painting of a red car in a city in daylight", "two red trees in the desert at sunset", "a black horse in the snow in daylight")
COLUMNS, GAP = 8, 2


def main():
    arg = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arg.add_argument("model", help="model directory")
    arg.add_argument("--out", required=True)
    arg.add_argument("--prompts", nargs="+", default=PROMPTS)
    arg.add_argument("--steps", type=int, default=20)
    arg.add_argument("--guidance", type=float, default=7.5)
    arg.add_argument("--seed", type=int, default=7)
    args = arg.parse_args()
    step = SIZE + GAP
    sheet = Image.new("RGB", (COLUMNS * step - GAP, -(-len(args.prompts) // COLUMNS) * step - GAP), "white")
    cases = [{"prompt": p, "seed": args.seed} for p in args.prompts]
    for i, picture in enumerate(drawn(args.model, cases, args.steps, args.guidance)):
        sheet.paste(picture, (i % COLUMNS * step, i // COLUMNS * step))
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
