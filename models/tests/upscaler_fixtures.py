"""Upscalers of the ESRGAN family with small random weights, what PyTorch computes with them, and
what AUTOMATIC1111's arithmetic of tiles and sizes makes of pictures, with Pillow. For
tests/parity/upscalers.rs and src/pipeline/enlarge.rs. A part of make_fixtures.py.
"""

import math

import diffusers
import numpy
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from make_fixtures import HERE, V1_4, generator, save, scheduler_of, tiny

TARGET = HERE / "upscalers"


def leaky(x):
    return F.leaky_relu(x, 0.2)


class Dense(nn.Module):
    """A residual dense block."""

    def __init__(self, features, growth, plus):
        super().__init__()
        widths = [features + i * growth for i in range(5)]
        outputs = [growth] * 4 + [features]
        self.convs = nn.ModuleList(
            nn.Conv2d(n, m, 3, 1, 1) for n, m in zip(widths, outputs))
        self.plus = nn.Conv2d(features, growth, 1, bias=False) if plus else None

    def forward(self, x):
        seen = [x]
        for i, conv in enumerate(self.convs[:4]):
            y = leaky(conv(torch.cat(seen, 1)))
            if self.plus and i == 1:
                y = y + self.plus(x)
            if self.plus and i == 3:
                y = y + seen[2]
            seen.append(y)
        return self.convs[4](torch.cat(seen, 1)) * 0.2 + x


class RRDBNet(nn.Module):
    """ESRGAN's generator; with `fold` the pixels of squares are channels."""

    def __init__(self, features=8, growth=4, blocks=1, doublings=2, fold=1, plus=False):
        super().__init__()
        same = lambda n, m: nn.Conv2d(n, m, 3, 1, 1)
        self.fold, self.scale = fold, 2**doublings // fold
        self.first = same(3 * fold**2, features)
        self.blocks = nn.ModuleList(
            nn.ModuleList(Dense(features, growth, plus) for _ in range(3)) for _ in range(blocks))
        self.trunk = same(features, features)
        self.up = nn.ModuleList(same(features, features) for _ in range(doublings))
        self.hr, self.last = same(features, features), same(features, 3)

    def forward(self, x):
        h, w = x.shape[2:]
        if self.fold > 1:
            x = F.pad(x, (0, -w % self.fold, 0, -h % self.fold), "reflect")
            x = F.pixel_unshuffle(x, self.fold)
        first = y = self.first(x)
        for block in self.blocks:
            inner = y
            for dense in block:
                inner = dense(inner)
            y = inner * 0.2 + y
        y = first + self.trunk(y)
        for up in self.up:
            y = leaky(up(F.interpolate(y, scale_factor=2, mode="nearest")))
        y = self.last(leaky(self.hr(y)))
        return y[:, :, :h * self.scale, :w * self.scale]

    def named(self, kind):
        """The weights under the names of a kind of files."""
        first, blocks, trunk, up, hr, last = {
            "new": ("conv_first", "body.{}.rdb{}.conv{}", "conv_body", "conv_up{}", "conv_hr",
                    "conv_last"),
            "trunk": ("conv_first", "RRDB_trunk.{}.RDB{}.conv{}", "trunk_conv", "upconv{}",
                      "HRconv", "conv_last"),
            "old": ("model.0", "model.1.sub.{}.RDB{}.conv{}.0", f"model.1.sub.{len(self.blocks)}",
                    None, f"model.{3 * len(self.up) + 2}", f"model.{3 * len(self.up) + 4}"),
        }[kind]
        layers = {first: self.first, trunk: self.trunk, hr: self.hr, last: self.last}
        for i, block in enumerate(self.blocks):
            for k, dense in enumerate(block, 1):
                for c, conv in enumerate(dense.convs, 1):
                    layers[blocks.format(i, k, c)] = conv
                if dense.plus:
                    layers[f"model.1.sub.{i}.RDB{k}.conv1x1"] = dense.plus
        for i, conv in enumerate(self.up, 1):
            layers[up.format(i) if up else f"model.{3 * i}"] = conv
        return {f"{name}.{part}": p.detach() for name, layer in layers.items()
                for part, p in layer.named_parameters()}


class Compact(nn.Module):
    """Real-ESRGAN's SRVGGNetCompact."""

    def __init__(self, features=8, convs=2, scale=4):
        super().__init__()
        self.scale = scale
        layers = [nn.Conv2d(3, features, 3, 1, 1), nn.PReLU(features)]
        for _ in range(convs):
            layers += [nn.Conv2d(features, features, 3, 1, 1), nn.PReLU(features)]
        self.body = nn.Sequential(*layers, nn.Conv2d(features, 3 * scale**2, 3, 1, 1))

    def forward(self, x):
        enlarged = F.interpolate(x, scale_factor=self.scale, mode="nearest")
        return F.pixel_shuffle(self.body(x), self.scale) + enlarged


def drawn(network, seed):
    """The network with weights that make pictures within bounds of every input."""
    stream = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        fan = p[0].numel() if p.ndim > 1 else 1
        p.data = torch.randn(p.shape, generator=stream) * (0.9 / fan**0.5 if fan > 1 else 0.1)
    if isinstance(network, RRDBNet):
        network.last.bias.data += 0.4
    return network.eval()


NETWORKS = {
    # name: network, names, key of training, ending
    "old-4x": (RRDBNet(), "old", None, "pth"),
    "old-8x": (RRDBNet(doublings=3), "old", None, "safetensors"),
    "old-1x": (RRDBNet(doublings=0, blocks=2), "old", None, "safetensors"),
    "plus-4x": (RRDBNet(plus=True), "old", "state_dict", "pth"),
    "trunk-4x": (RRDBNet(blocks=2), "trunk", None, "safetensors"),
    "new-4x-6b": (RRDBNet(features=4, growth=2, blocks=6), "new", "params_ema", "pth"),
    "new-2x": (RRDBNet(fold=2), "new", "params_ema", "pth"),
    "new-1x": (RRDBNet(fold=4), "new", "params", "pth"),
    "compact-4x": (Compact(), None, "params", "pth"),
    "compact-3x": (Compact(scale=3), None, None, "safetensors"),
}


# Pictures ------------------------------------------------------------------------------------


def picture(width, height, seed):
    """Waves of each colour, with some noise."""
    random = numpy.random.default_rng(seed)
    y, x = numpy.mgrid[:height, :width]
    planes = [127 + 90 * numpy.sin(x / a + c) * numpy.cos(y / b)
              for a, b, c in [(5, 7, 0), (9, 4, 1), (3, 11, 2)]]
    noise = random.normal(0, 12, (height, width, 3))
    return Image.fromarray((numpy.stack(planes, 2) + noise).clip(0, 255).astype(numpy.uint8))


@torch.no_grad()
def whole(network, image):
    x = torch.from_numpy(numpy.array(image).astype(numpy.float32) / 255).permute(2, 0, 1)
    y = network(x[None])[0].clamp(0, 1).permute(1, 2, 0).numpy()
    return Image.fromarray((255.0 * y).round().astype(numpy.uint8))


def tiled(network, image, tile, overlap):
    """AUTOMATIC1111's tiles, each blended into those at its left and above; a picture that fits
    into one tile is taken as it is."""
    def starts(side):
        count = math.ceil((side - overlap) / (tile - overlap))
        step = (side - tile) / (count - 1) if count > 1 else 0
        return [min(int(i * step), side - tile) for i in range(count)]

    size = image.size
    lines = [starts(side) if side > tile else [0] for side in size]
    boxes = [min(tile, side) for side in size]
    s, seam = network.scale, overlap * network.scale
    ramp = (numpy.arange(seam, dtype=numpy.float32) * 255 / seam).astype(numpy.uint8)
    result = Image.new("RGB", (size[0] * s, size[1] * s))
    for y in lines[1]:
        row = Image.new("RGB", (size[0] * s, boxes[1] * s))
        for x in lines[0]:
            part = whole(network, image.crop((x, y, x + boxes[0], y + boxes[1])))
            if x == 0:
                row.paste(part, (0, 0))
                continue
            mask = Image.fromarray(numpy.tile(ramp, (part.height, 1)))
            row.paste(part.crop((0, 0, seam, part.height)), (x * s, 0), mask=mask)
            row.paste(part.crop((seam, 0, *part.size)), (x * s + seam, 0))
        if y == 0:
            result.paste(row, (0, 0))
            continue
        mask = Image.fromarray(numpy.tile(ramp[:, None], (1, row.width)))
        result.paste(row.crop((0, 0, row.width, seam)), (0, y * s), mask=mask)
        result.paste(row.crop((0, seam, *row.size)), (0, y * s + seam))
    return result


def upscaled(step, image, scale):
    """AUTOMATIC1111's `Upscaler.upscale`, where `step` is the upscaler itself."""
    width, height = (int(side * scale // 8 * 8) for side in image.size)
    for i in range(3):
        if image.width >= width and image.height >= height and (i > 0 or scale != 1):
            break
        size = image.size
        image = step(image)
        if image.size == size:
            break
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    return image


def resized(image, scale, how):
    return image.resize((int(image.width * scale), int(image.height * scale)), how)


def fitted(image, width, height):
    """The middle of a picture, on black."""
    canvas = Image.new("RGB", (width, height))
    canvas.paste(image, (width // 2 - image.width // 2, height // 2 - image.height // 2))
    return canvas


def bytes_of(image):
    return torch.from_numpy(numpy.array(image))


@torch.no_grad()
def hires_runs(networks):
    """The latents of runs that go on from an upscaled picture, as AUTOMATIC1111's hires fix, whose
    encoder's noise has no seed: here it is none."""
    kinds = [diffusers.StableDiffusionPipeline, diffusers.StableDiffusionImg2ImgPipeline]
    first, second = (tiny(kind, HERE / "v1/unet", scheduler_of("euler", V1_4)) for kind in kinds)
    first.set_progress_bar_config(disable=True)
    second.set_progress_bar_config(disable=True)
    common = dict(guidance_scale=3.0, output_type="latent")
    small = first("a red house", num_inference_steps=6, width=64, height=64,
                  generator=generator(11), **common).images
    vae, tensors = first.vae, {}
    x = (vae.decode(small / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    base = Image.fromarray((255 * x[0].permute(1, 2, 0).numpy()).round().astype(numpy.uint8))
    for name in ["None", "Lanczos", "Nearest", *networks]:
        side, image = 104, base
        scale = side / base.width
        if name in networks:
            image = upscaled(lambda image: tiled(networks[name], image, 192, 8), base, scale)
        elif name != "None":
            how = getattr(Image.Resampling, name.upper())
            image = upscaled(lambda image: resized(image, scale, how), base, scale)
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        x = torch.from_numpy(numpy.array(image)).float().permute(2, 0, 1)[None] / 255 * 2 - 1
        large = vae.encode(x).latent_dist.mode() * vae.config.scaling_factor
        tensors[f"run.{name}"] = second(
            "a red house", image=large, num_inference_steps=10, strength=0.5,
            generator=generator(11), **common).images
    save(tensors, TARGET / "hires.safetensors")


def upscalers():
    TARGET.mkdir(exist_ok=True)
    tensors = {}
    for seed, (name, (network, kind, key, ending)) in enumerate(NETWORKS.items()):
        drawn(network, seed)
        weights = network.named(kind) if kind else network.state_dict()
        path = TARGET / f"{name}.{ending}"
        if ending == "pth":
            weights = {k: v.clone() for k, v in weights.items()}
            torch.save({key: weights} if key else weights, path)
        else:
            save(weights, path)
        x = torch.from_numpy(numpy.array(picture(11, 9, seed))).float().permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            y = network(x)
        assert y.shape == (1, 3, 9 * network.scale, 11 * network.scale), (name, y.shape)
        tensors[f"{name}.input"] = x.permute(0, 2, 3, 1)
        tensors[f"{name}.output"] = y.permute(0, 2, 3, 1)
    save(tensors, TARGET / "expected.safetensors")
    four, two, one = (NETWORKS[name][0] for name in ["old-4x", "new-2x", "old-1x"])
    small, wide = picture(50, 41, 50), picture(200, 60, 51)
    pictures = {
        "small": small,
        "wide": wide,
        "tiled.old-4x.24.4": tiled(four, small, 24, 4),
        "tiled.new-2x.192.8": tiled(two, wide, 192, 8),
    }
    for name, network in [("old-4x", four), ("new-2x", two), ("old-1x", one)]:
        step = lambda image: tiled(network, image, 192, 8)
        for scale in [1, 1.5, 3.3, 0.5]:
            pictures[f"upscaled.{name}.{scale}"] = upscaled(step, small, scale)
    for name, how in [("Lanczos", Image.Resampling.LANCZOS), ("Nearest", Image.Resampling.NEAREST)]:
        for scale in [1, 1.5, 2.77, 0.5]:
            step = lambda image: resized(image, scale, how)
            pictures[f"upscaled.{name}.{scale}"] = upscaled(step, small, scale)
    lanczos = pictures["upscaled.Lanczos.1.5"]
    for width, height in [(61, 40), (90, 33), (99, 77)]:
        pictures[f"fitted.{width}x{height}"] = fitted(lanczos, width, height)
    other = pictures["upscaled.old-4x.1.5"]
    for share in [0.0, 0.3, 0.5, 0.999, 1.0]:
        pictures[f"blended.{share}"] = Image.blend(lanczos, other, share)
    save({name: bytes_of(image) for name, image in pictures.items()},
         TARGET / "pictures.safetensors")
    hires_runs({"old-4x": four, "new-2x": two})
