"""Makes the image files with texts in `texts/`, and what AUTOMATIC1111 reads from each in `expected.json`.

    pip install pillow==13.0.0 piexif==1.1.3
    python make_texts.py
"""

import io
import json
from pathlib import Path

import piexif
import piexif.helper
from PIL import Image, PngImagePlugin

FOLDER = Path(__file__).parent / "texts"
LAST = "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 8x8"
TEXT = f"a cat\nNegative prompt: dogs\n{LAST}"
# Its first letter has two bytes that are not zero.
UNICODE = f"猫, café\nNegative prompt: 犬\n{LAST}"
NOVELAI = {"steps": 28, "sampler": "k_dpmpp_2m", "scale": 5.0, "seed": 7, "uc": "dogs", "prompt": "a cat"}


def png(name, *texts, **options):
    """A PNG with (keyword, text, kind) of each text chunk."""
    info = PngImagePlugin.PngInfo()
    for keyword, text, kind in texts:
        add = info.add_itxt if kind == "iTXt" else info.add_text
        add(keyword, text, zip=kind == "zTXt")
    save(name, pnginfo=info, **options)


def save(name, **options):
    Image.new("RGB", (8, 8), (90, 120, 30)).save(FOLDER / name, **options)


def comment(text, encoding="unicode"):
    """EXIF with a UserComment as AUTOMATIC1111 writes it."""
    comment = piexif.helper.UserComment.dump(text, encoding=encoding)
    return piexif.dump({"Exif": {piexif.ExifIFD.UserComment: comment}})


def of_pillow(place, value):
    """EXIF with a UserComment by Pillow, in its own directory or among the main tags."""
    exif = Image.Exif()
    tags = exif.get_ifd(0x8769) if place == "own" else exif
    tags[0x9286] = value
    return exif.tobytes()


def little_endian(comment):
    """The smallest EXIF of a writer whose order is the other."""
    word = lambda value: value.to_bytes(2, "little")
    long = lambda value: value.to_bytes(4, "little")
    main = b"II*\0" + long(8) + word(1) + word(0x8769) + word(4) + long(1) + long(26) + long(0)
    own = word(1) + word(0x9286) + word(7) + long(len(comment)) + long(44) + long(0)
    return b"Exif\0\0" + main + own + comment


def read(image):
    """What AUTOMATIC1111 1.10 reads: the text of the parameters, and the other texts."""
    items = dict(image.info)
    text = items.pop("parameters", None)
    if "comment" in items:
        items["comment"] = items["comment"].decode("utf8", errors="ignore")
    if "exif" in items:
        try:
            exif = piexif.load(items["exif"])
        except Exception:
            exif = {}
        found = exif.get("Exif", {}).get(piexif.ExifIFD.UserComment, b"")
        try:
            found = piexif.helper.UserComment.load(found)
        except ValueError:
            found = found.decode("utf8", errors="ignore")
        text = found or text
    elif "comment" in items:
        text = items["comment"]
    if items.get("Software") == "NovelAI":
        try:
            of = json.loads(items["Comment"])
            sampler = {"k_dpmpp_2m": "DPM++ 2M"}.get(of["sampler"], "Euler a")
            text = (
                f"{items['Description']}\nNegative prompt: {of['uc']}\nSteps: {of['steps']}, Sampler: {sampler}, "
                f"CFG scale: {of['scale']}, Seed: {of['seed']}, Size: {image.width}x{image.height}, Clip skip: 2, ENSD: 31337"
            )
        except Exception:
            pass
    return {"info": text, "items": {name: item for name, item in items.items() if isinstance(item, str)}}


def main():
    FOLDER.mkdir(exist_ok=True)
    for kind in ["tEXt", "zTXt", "iTXt"]:
        png(f"{kind}.png", ("Title", "a picture", kind), ("parameters", TEXT, kind), ("prompt", "{}", kind))
    png("unicode.png", ("parameters", UNICODE, "iTXt"))
    png("comfyui.png", ("prompt", '{"3": {}}', "tEXt"), ("workflow", '{"nodes": []}', "zTXt"))
    png("exif.png", exif=comment(UNICODE))
    png("both.png", ("parameters", "an older text", "tEXt"), exif=comment(TEXT))
    for name, settings in [
        ("novelai.png", NOVELAI),
        ("novelai-sampler.png", NOVELAI | {"sampler": "nai_smea", "scale": 11}),
        ("novelai-without-seed.png", {"steps": 28}),
    ]:
        png(
            name, ("Title", "AI generated image", "tEXt"), ("Description", "a cat", "tEXt"), ("Software", "NovelAI", "tEXt"),
            ("Comment", json.dumps(settings), "tEXt"),
        )
    save("unicode.jpg", exif=comment(UNICODE))
    save("unicode.webp", exif=comment(UNICODE))
    save("ascii.jpg", exif=comment(TEXT, "ascii"))
    save("jis.jpg", exif=comment("猫", "jis"))
    save("undefined.jpg", exif=piexif.dump({"Exif": {piexif.ExifIFD.UserComment: UNICODE.encode()}}))
    save("comment.jpg", comment=UNICODE.encode())
    save("comment-and-exif.jpg", comment=b"a camera", exif=comment(TEXT))
    save("camera.jpg", comment=b"a camera", exif=piexif.dump({"0th": {piexif.ImageIFD.Make: b"of glass"}}))
    save("comment.gif", comment=TEXT)
    save("nothing.bmp")
    expected = {}
    for path in FOLDER.iterdir():
        if path.suffix != ".json":
            expected[path.name] = read(Image.open(io.BytesIO(path.read_bytes())))
    # What others write, which piexif does not read.
    beyond = {
        "pillow-own.jpg": (of_pillow("own", TEXT), TEXT),
        "pillow-main.jpg": (of_pillow("main", TEXT), TEXT),
        "pillow-bytes.webp": (of_pillow("main", b"UNICODE\0" + UNICODE.encode("utf-16-be")), UNICODE),
        "little-endian.jpg": (little_endian(b"UNICODE\0" + UNICODE.encode("utf-16-le")), UNICODE),
        "little-endian-bom.jpg": (little_endian(b"UNICODE\0" + UNICODE.encode("utf-16")), UNICODE),
        "little-endian-of-big.jpg": (little_endian(b"UNICODE\0" + UNICODE.encode("utf-16-be")), UNICODE),
        "utf-8.jpg": (little_endian(b"UNICODE\0" + UNICODE.encode()), UNICODE),
        "zeros.jpg": (little_endian(bytes(8) + UNICODE.encode() + b"\0"), UNICODE),
    }
    for name, (exif, text) in beyond.items():
        save(name, exif=exif)
        expected[name] = {"info": text, "items": {}}
    text = json.dumps(expected, ensure_ascii=False, indent=1, sort_keys=True)
    (FOLDER / "expected.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
