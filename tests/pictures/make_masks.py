"""Writes masks/: what Pillow and OpenCV make of a mask, for src/image/inpaint.rs.

    python make_masks.py

Made with Pillow 12 and opencv-python-headless 4. The steps are those of AUTOMATIC1111's
`processing.py` and `masking.py` (1.10), in our words.
"""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

OUT = Path(__file__).parent / "masks"
WIDTH, HEIGHT = 64, 48


def picture(seed):
    """Soft colours with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def blurred(mask, sigma):
    size = 2 * int(2.5 * sigma + 0.5) + 1
    pixels = cv2.GaussianBlur(np.array(mask), (size, 1), sigma)
    return Image.fromarray(cv2.GaussianBlur(pixels, (1, size), sigma))


def unmasked(image, mask):
    """The image where the mask is black, premultiplied."""
    part = Image.new("RGBa", image.size)
    part.paste(image.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    return part


def filled(image, mask):
    result, part = Image.new("RGBA", image.size), unmasked(image, mask)
    for radius, repeats in [(256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1)]:
        layer = part.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(repeats):
            result.alpha_composite(layer)
    return result.convert("RGB")


def area(mask, padding):
    """The masked area with padding, in the proportions of the whole size."""
    left, top, right, bottom = mask.getbbox()
    left, top = max(left - padding, 0), max(top - padding, 0)
    right, bottom = min(right + padding, WIDTH), min(bottom + padding, HEIGHT)
    width, height = right - left, bottom - top
    if width / height > WIDTH / HEIGHT:
        more = int(width / (WIDTH / HEIGHT) - height)
        top, bottom = moved(top - more // 2, bottom + more - more // 2, HEIGHT)
    else:
        more = int(height * (WIDTH / HEIGHT) - width)
        left, right = moved(left - more // 2, right + more - more // 2, WIDTH)
    return left, top, right - left, bottom - top


def moved(begin, end, side):
    if end >= side:
        begin, end = begin - (end - side), side
    if begin < 0:
        begin, end = 0, end - begin
    return begin, min(end, side)


def main():
    OUT.mkdir(exist_ok=True)
    image, generated = picture(1), picture(2)
    mask = Image.new("L", image.size)
    ImageDraw.Draw(mask).ellipse((30, 14, 52, 40), fill=255)
    image.save(OUT / "image.png")
    generated.save(OUT / "generated.png")
    mask.save(OUT / "mask.png")
    for sigma in (1.5, 4, 20):
        blurred(mask, sigma).save(OUT / f"blurred-{sigma}.png")
    soft = blurred(mask, 4)
    filled(image, soft).save(OUT / "filled.png")
    twice = Image.fromarray(np.clip(np.array(soft).astype(np.float32) * 2, 0, 255).astype(np.uint8))
    over = generated.convert("RGBA")
    over.alpha_composite(unmasked(image, twice).convert("RGBA"))
    over.convert("RGB").save(OUT / "over.png")
    latents = soft.convert("RGB").resize((WIDTH // 8, HEIGHT // 8))
    latents = np.around(np.array(latents)[:, :, 0].astype(np.float32) / 255).astype(np.uint8) * 255
    Image.fromarray(latents.repeat(8, 0).repeat(8, 1)).save(OUT / "latents.png")
    (OUT / "area.txt").write_text(" ".join(map(str, area(soft, 3))) + "\n")


if __name__ == "__main__":
    main()
