"""Augmentation of whole batches: shifts, flips, crops, rotations, and what a camera does."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

CUTOUT_REACH = 3 / 16  # of the size, to each side of the centre
CUTOUT_GREY = 128
LEAST_AREA = 0.35  # of an image, that a crop takes
MOST_ASPECT = 4 / 3  # of a crop, wide or high
MOST_ROTATION = 15  # degrees
MOST_BLUR = 1.2  # standard deviation, in pixels
LEAST_BLUR = 0.1  # which changes nothing
MOST_COLOUR_CHANGE = 0.4
MOST_NOISE = 12  # standard deviation, in grey levels
NOISE_ROWS = 4096  # of the table of noise
NOISE_COLUMNS = 256
LUMA = (0.299, 0.587, 0.114)  # Pillow's grey


def gather(
    images: torch.Tensor,
    index: torch.Tensor,
    augment: list[str],
    flips: torch.Tensor,
    generator: torch.Generator,
    share: slice = slice(None),
) -> torch.Tensor:
    """A share of one batch, augmented: uint8 [share, H, W, C].

    The batch is `images` [N, H, W, C] by `index` [batch]. translate shifts by up to 1/16 of the
    size, mirroring at the edge; flip mirrors left to right where `flips` [N] is true; crop, rotate:
    see `warp`; blur, color, noise: see CAMERA; cutout (DeVries and Taylor 2017) greys a square of
    3/8 of the size. Every process draws for the whole batch, and uses its share.

    Resumed runs must draw the same numbers again: the order of draws is never changed.
    """
    batch_size = len(index)
    device = images.device
    index = index[share]
    flips = flips[index].to(device)
    index = index.to(device)
    if not augment:
        return images[index]

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(batch_size, *size, generator=generator)[share]

    height, width = images.shape[1:3]
    rows = torch.arange(height, device=device).expand(len(index), -1)  # [share, H]
    columns = torch.arange(width, device=device).expand(len(index), -1)  # [share, W]

    if "cutout" in augment:
        holes = holes_around(rows, columns, draw(2).to(device))
    if "translate" in augment:
        down = draw_shifts(height, batch_size, generator)[share].to(device)
        right = draw_shifts(width, batch_size, generator)[share].to(device)
        rows = mirror(rows + down, height)
        columns = mirror(columns + right, width)
    if "flip" in augment:
        columns = torch.where(flips[:, None], width - 1 - columns, columns)

    # All that moves whole pixels is done by reading them from elsewhere.
    batch = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]

    if "crop" in augment or "rotate" in augment:
        batch = warp(batch, draw(5).to(device), "crop" in augment, "rotate" in augment)
    for name, change in CAMERA.items():
        if name in augment:
            batch = change_part(batch, change, draw(1 + change.numbers))
    if "cutout" in augment:
        batch = torch.where(holes, CUTOUT_GREY, batch)
    return batch


# ----------------------------------------------------------------------------------- moving pixels
def draw_shifts(size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Shifts by up to 1/16 of a size, at least by one pixel: int64 [count, 1]."""
    most = max(1, size // 16)
    return torch.randint(-most, most + 1, (count, 1), generator=generator)


def mirror(position: torch.Tensor, size: int) -> torch.Tensor:
    """Positions outside 0..size-1 reflected back inside, the edge itself not repeated."""
    last = size - 1
    reflected = last - (last - position.abs()).abs()
    return reflected.clamp(0, last)


def holes_around(
    rows: torch.Tensor,
    columns: torch.Tensor,
    random: torch.Tensor,
) -> torch.Tensor:
    """Where cutout greys: bool [n, H, W, 1].

    rows: [n, H]. columns: [n, W]. random: uniform in 0..1, [n, 2]: the centres of the holes.
    """
    height = rows.shape[1]
    width = columns.shape[1]
    centres = (random * torch.tensor([height, width], device=random.device)).int()

    near_rows = (rows - centres[:, :1]).abs() < int(height * CUTOUT_REACH)
    near_columns = (columns - centres[:, 1:]).abs() < int(width * CUTOUT_REACH)
    return (near_rows[:, :, None] & near_columns[:, None, :])[..., None]


def warp(images: torch.Tensor, random: torch.Tensor, crop: bool, rotate: bool) -> torch.Tensor:
    """Crop and rotate uint8 [n, H, W, C] in one bilinear resampling, mirrored at the edge.

    crop takes 35 to 100 % of the area at a ratio of 3:4 to 4:3, rotate turns by up to 15 degrees.
    random: uniform in 0..1, [n, 5]: area, ratio, two offsets, angle.
    """
    area, ratio, x, y, angle = random.unbind(1)  # each [n]

    # The sides of the crop as parts of the image's.
    width = torch.ones_like(area)
    height = width
    if crop:
        area = LEAST_AREA + (1 - LEAST_AREA) * area
        ratio = torch.exp((2 * ratio - 1) * math.log(MOST_ASPECT))
        width = (area * ratio).sqrt().clamp(max=1)
        height = (area / ratio).sqrt().clamp(max=1)
    shift_x = (2 * x - 1) * (1 - width)
    shift_y = (2 * y - 1) * (1 - height)

    angle = torch.deg2rad((2 * angle - 1) * MOST_ROTATION)
    if not rotate:
        angle = torch.zeros_like(angle)
    cos = angle.cos()
    sin = angle.sin()
    aspect = images.shape[1] / images.shape[2]  # so that a rotation is one in pixels, too

    # Where the pixels come from, in coordinates from -1 to 1: [n, 2, 3], the row of x first.
    x_row = [width * cos, -height * sin * aspect, shift_x]
    y_row = [width * sin / aspect, height * cos, shift_y]
    theta = torch.stack(x_row + y_row, dim=1).view(-1, 2, 3)

    planes = images.permute(0, 3, 1, 2).float()  # [n, C, H, W]
    grid = F.affine_grid(theta, planes.shape, align_corners=False)
    planes = F.grid_sample(planes, grid, padding_mode="reflection", align_corners=False)
    return planes.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------ what a camera does
@dataclass(frozen=True)
class CameraChange:
    """A change that a camera makes, applied to some of the images of a batch."""

    part: float  # of the images, that is changed
    numbers: int  # how many random numbers an image takes
    apply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # uint8 images, random [n, numbers]


def change_part(images: torch.Tensor, change: CameraChange, random: torch.Tensor) -> torch.Tensor:
    """Apply a change to its part of uint8 [n, H, W, C].

    random: uniform in 0..1, [n, 1 + change.numbers], on the CPU, where choosing does not wait for a
    GPU; the first number decides whether an image is changed.
    """
    chosen = (random[:, 0] < change.part).nonzero()[:, 0]
    if len(chosen) == 0:
        return images

    device = images.device
    random = random[chosen, 1:].to(device)
    chosen = chosen.to(device)
    return images.index_copy(0, chosen, change.apply(images[chosen], random))


def blur(images: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Blur uint8 [n, H, W, C] by Gaussians of up to 1.2 pixels, unlike in both directions.

    So does motion. random: uniform in 0..1, [n, 2]: how much down and across.
    """
    sigma = (MOST_BLUR * random).clamp_(min=LEAST_BLUR)
    height, width = images.shape[1:3]
    down = gaussians(height, sigma[:, 0])  # [n, H, H]
    across = gaussians(width, sigma[:, 1])  # [n, W, W]

    planes = images.permute(0, 3, 1, 2).float()  # [n, C, H, W]
    planes = down[:, None] @ planes @ across[:, None].mT
    return planes.round_().byte().permute(0, 2, 3, 1)


def gaussians(size: int, sigma: torch.Tensor) -> torch.Tensor:
    """The matrices [n, size, size] that blur a line of pixels by sigma [n]; a row adds up to 1."""
    position = torch.arange(size, device=sigma.device)
    distance = (position[:, None] - position) / sigma[:, None, None]
    return (-0.5 * distance.square_()).softmax(2)


def change_colours(
    images: torch.Tensor, random: torch.Tensor, most: float = MOST_COLOUR_CHANGE
) -> torch.Tensor:
    """Change brightness, contrast and saturation of uint8 [n, H, W, C], as ColorJitter does.

    Each by up to `most`, with Pillow's grey. random: uniform in 0..1, [n, 3]. Grey images have no
    saturation.
    """
    factors = 1 + (2 * random - 1) * most
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)

    is_colour = images.shape[3] == 3
    luma = torch.tensor(LUMA if is_colour else (1.0,), device=images.device)  # [C]

    pixels = images.float().mul_(brightness).clamp_(0, 255)
    mean = (pixels.mean((1, 2)) @ luma)[:, None, None, None]  # [n, 1, 1, 1]
    pixels = torch.lerp(mean, pixels, contrast).clamp_(0, 255)

    if is_colour:
        grey = (pixels @ luma)[..., None]  # [n, H, W, 1]
        pixels = torch.lerp(grey, pixels, saturation)
    return pixels.round_().clamp_(0, 255).byte()


def add_noise(images: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Add normal noise to uint8 [n, H, W, C]; in half of the images it grows with the light.

    So does shot noise. random: uniform in 0..1, [n, 3]: strength, which of both kinds, and where in
    the table of noise to begin.
    """
    strength = (MOST_NOISE * random[:, 0])[:, None, None, None]
    kind = random[:, 1, None, None, None]

    # Enough rows of the table for an image, from a random one on: [n, H, W, C].
    table = noise_table(images.device)
    size = images[0].numel()
    needed = -(-size // NOISE_COLUMNS)  # rounded up
    first = (random[:, 2] * NOISE_ROWS).long()[:, None]
    rows = first + torch.arange(needed, device=images.device)
    noise = table[rows % NOISE_ROWS].flatten(1)[:, :size].view(images.shape)

    pixels = images.float()
    growth = (pixels / 128).sqrt_()
    noise = noise * torch.where(kind < 0.5, 1, growth)
    return noise.mul_(strength).add_(pixels).round_().clamp_(0, 255).byte()


@functools.lru_cache
def noise_table(device: torch.device) -> torch.Tensor:
    """Normal numbers, float32 [NOISE_ROWS, NOISE_COLUMNS].

    Drawing new ones for each image would take ten times as long.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NOISE_ROWS, NOISE_COLUMNS, generator=generator).to(device)


# In the order in which a camera makes them.
CAMERA = {
    "blur": CameraChange(part=0.25, numbers=2, apply=blur),
    "color": CameraChange(part=0.3, numbers=3, apply=change_colours),
    "noise": CameraChange(part=0.5, numbers=3, apply=add_noise),
}
