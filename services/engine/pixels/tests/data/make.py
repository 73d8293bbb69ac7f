"""Writes the pictures of this folder and, beside each, what Pillow decodes from it (`*.rgb`: width * height * 3 bytes).

Run with Pillow 13.0.0: `python3 make.py`. The files are committed; tests never run this.
"""
import io, struct, zlib
from pathlib import Path
from PIL import Image

here = Path(__file__).parent
W, H = 29, 23


def pixel(x, y):
    return (x * 8 % 256, y * 11 % 256, (x * 5 + y * 7) % 256)


rgb = Image.new("RGB", (W, H))
rgb.putdata([pixel(x, y) for y in range(H) for x in range(W)])
alpha = Image.new("L", (W, H))
alpha.putdata([(x * 13 + y * 3) % 256 for y in range(H) for x in range(W)])
rgba = rgb.copy()
rgba.putalpha(alpha)


def keep(name, data, expected=None):
    (here / name).write_bytes(data)
    if expected is None:
        image = Image.open(io.BytesIO(data))
        expected = (image if image.mode != "RGBA" else Image.merge("RGB", image.split()[:3])).convert("RGB").tobytes()
    (here / (name + ".rgb")).write_bytes(expected)


def saved(image, format, **options):
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png(color, depth, rows, interlace=0):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", W, H, depth, color, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows))) + chunk(b"IEND", b"")


# PNG: the upper byte of a 16-bit channel counts, whatever the lower one is.
wide = [b"".join(bytes([c, (c * 7 + 3) % 256]) for x in range(W) for c in pixel(x, y)) for y in range(H)]
keep("rgb16.png", png(2, 16, wide), rgb.tobytes())
gray = [bytes(v for x in range(W) for v in (pixel(x, y)[2], 255 - x)) for y in range(H)]
keep("gray16.png", png(0, 16, gray), bytes(v for y in range(H) for x in range(W) for v in [pixel(x, y)[2]] * 3))
both = [bytes(v for x in range(W) for v in (pixel(x, y)[2], 1, x, 2)) for y in range(H)]
keep("gray_alpha16.png", png(4, 16, both), bytes(v for y in range(H) for x in range(W) for v in [pixel(x, y)[2]] * 3))
keep("rgba.png", saved(rgba, "PNG"), rgb.tobytes())
palette = rgb.quantize(16)
keep("palette_transparent.png", saved(palette, "PNG", transparency=3, bits=4), palette.convert("RGB").tobytes())
keep("one_bit.png", saved(rgb.convert("1"), "PNG"))
passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]  # x0, y0, dx, dy
interlaced = [b"".join(bytes(pixel(x, y)) for x in range(x0, W, dx)) for x0, y0, dx, dy in passes for y in range(y0, H, dy)]
keep("interlaced.png", png(2, 8, interlaced, 1), rgb.tobytes())
interlaced = [b"".join(bytes([c, 9]) for x in range(x0, W, dx) for c in (*pixel(x, y), x)) for x0, y0, dx, dy in passes for y in range(y0, H, dy)]
keep("interlaced_rgba16.png", png(6, 16, interlaced, 1), rgb.tobytes())
animated = saved(rgb, "PNG", save_all=True, append_images=[Image.new("RGB", (W, H), "red")])
keep("animated.png", animated, rgb.tobytes())

# JPEG.
keep("rgb.jpg", saved(rgb, "JPEG", quality=95, subsampling=0))
keep("subsampled.jpg", saved(rgb, "JPEG", quality=90, subsampling=2))
keep("progressive.jpg", saved(rgb, "JPEG", quality=95, subsampling=0, progressive=True))
keep("gray.jpg", saved(rgb.convert("L"), "JPEG", quality=95))
cmyk = saved(rgb.convert("CMYK"), "JPEG", quality=95)
keep("cmyk.jpg", cmyk)
at = cmyk.index(b"Adobe") + 11
keep("ycck.jpg", cmyk[:at] + b"\x02" + cmyk[at + 1 :])
exif = Image.Exif()
exif[0x0112] = 6  # turned by 90 degrees, which the reference preprocessing does not undo
keep("turned.jpg", saved(rgb, "JPEG", quality=95, subsampling=0, exif=exif))
keep("restarts.jpg", saved(rgb, "JPEG", quality=95, subsampling=0, restart_marker_blocks=2))

# WebP.
keep("lossless.webp", saved(rgb, "WEBP", lossless=True))
keep("lossy.webp", saved(rgb, "WEBP", quality=90))
keep("alpha.webp", saved(rgba, "WEBP", lossless=True, exact=True), rgb.tobytes())
keep("animated.webp", saved(rgb, "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (W, H), "red")]), rgb.tobytes())
