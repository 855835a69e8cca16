"""Augmentation of whole batches: shifts and flips, then crops and rotations, then blur, colours and noise."""

import functools
import math

import torch
import torch.nn.functional as F

MOST_BLUR = 1.2  # standard deviation, in pixels
MOST_NOISE = 12  # standard deviation, in grey levels


def gather(images, index, augment: list[str], flips, generator, share: slice = slice(None)) -> torch.Tensor:
    """A share of one batch, augmented: uint8 [share, H, W, C] from `images` [N, H, W, C] by `index` [batch].

    translate shifts by up to 1/16 of the size, mirroring at the edge; flip mirrors left to right where
    `flips` [N] is true; crop, rotate: see `warp`; blur, color, noise: see CAMERA; cutout (DeVries and Taylor
    2017) greys a square of 3/8 of the size. Every process draws for the whole batch, and uses its share.
    """
    n, device = len(index), images.device
    index = index[share]
    flips, index = flips[index].to(device), index.to(device)
    if not augment:
        return images[index]

    def draw(*size):
        return torch.rand(n, *size, generator=generator)[share]

    _, height, width, _ = images.shape
    rows = torch.arange(height, device=device).expand(len(index), -1)
    columns = torch.arange(width, device=device).expand(len(index), -1)
    holes = holes_around(rows, columns, draw(2).to(device)) if "cutout" in augment else None
    if "translate" in augment:
        most = [max(1, size // 16) for size in (height, width)]
        dy, dx = (torch.randint(-m, m + 1, (n, 1), generator=generator)[share].to(device) for m in most)
        rows, columns = mirror(rows + dy, height), mirror(columns + dx, width)
    if "flip" in augment:
        columns = torch.where(flips[:, None], width - 1 - columns, columns)
    batch = images[index[:, None, None], rows[:, :, None], columns[:, None, :]]
    if "crop" in augment or "rotate" in augment:
        batch = warp(batch, draw(5).to(device), "crop" in augment, "rotate" in augment)
    for name, (part, numbers, change) in CAMERA.items():
        if name in augment:
            random = draw(1 + numbers)  # on the CPU, where choosing does not wait for a GPU
            chosen = (random[:, 0] < part).nonzero()[:, 0]
            if len(chosen):
                random, chosen = random[chosen, 1:].to(device), chosen.to(device)
                batch = batch.index_copy(0, chosen, change(batch[chosen], random))
    return batch if holes is None else torch.where(holes, 128, batch)


def holes_around(rows: torch.Tensor, columns: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Where cutout greys: bool [n, H, W, 1] from rows [n, H], columns [n, W], centres in 0..1, [n, 2]."""
    height, width = rows.shape[1], columns.shape[1]
    centres = (random * torch.tensor([height, width], device=random.device)).int()
    near_rows = (rows - centres[:, :1]).abs() < height * 3 // 16
    near_columns = (columns - centres[:, 1:]).abs() < width * 3 // 16
    return (near_rows[:, :, None] & near_columns[:, None, :])[..., None]


def mirror(position: torch.Tensor, size: int) -> torch.Tensor:
    """Positions outside 0..size-1 reflected back inside, the edge itself not repeated."""
    return (size - 1 - (size - 1 - position.abs()).abs()).clamp(0, size - 1)


def warp(images: torch.Tensor, random: torch.Tensor, crop: bool, rotate: bool) -> torch.Tensor:
    """Crop and rotate uint8 [n, H, W, C] in one bilinear resampling, mirrored at the edge.

    crop takes 35 to 100 % of the area at a ratio of 3:4 to 4:3, rotate turns by up to 15 degrees.
    random: uniform in 0..1, [n, 5]: area, ratio, two offsets, angle.
    """
    area, ratio, x, y, angle = random.unbind(1)
    wide = high = torch.ones_like(area)
    if crop:
        area = 0.35 + (1 - 0.35) * area
        ratio = torch.exp((2 * ratio - 1) * math.log(4 / 3))
        wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    angle = torch.deg2rad((2 * angle - 1) * 15) if rotate else torch.zeros_like(angle)
    cos, sin = angle.cos(), angle.sin()
    aspect = images.shape[1] / images.shape[2]  # so that a rotation is one in pixels, too
    shift_x, shift_y = (2 * x - 1) * (1 - wide), (2 * y - 1) * (1 - high)
    rows = [wide * cos, -high * sin * aspect, shift_x, wide * sin / aspect, high * cos, shift_y]
    theta = torch.stack(rows, 1).view(-1, 2, 3)
    planes = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(theta, planes.shape, align_corners=False)
    planes = F.grid_sample(planes, grid, padding_mode="reflection", align_corners=False)
    return planes.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def blur(images: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Blur uint8 [n, H, W, C] by Gaussians of up to 1.2 pixels, unlike in both directions, as motion does.

    random: uniform in 0..1, [n, 2]: how much down and across.
    """
    sigma = (MOST_BLUR * random).clamp_(min=0.1)
    down, across = (gaussians(side, sigma[:, k]) for k, side in enumerate(images.shape[1:3]))
    planes = images.permute(0, 3, 1, 2).float()  # [n, C, H, W]
    planes = down[:, None] @ planes @ across[:, None].mT
    return planes.round_().byte().permute(0, 2, 3, 1)


def gaussians(size: int, sigma: torch.Tensor) -> torch.Tensor:
    """The matrices [n, size, size] that blur a line of pixels by sigma [n]; each row adds up to 1."""
    position = torch.arange(size, device=sigma.device)
    distance = (position[:, None] - position) / sigma[:, None, None]
    return (-0.5 * distance.square_()).softmax(2)


def change_colours(images: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Change brightness, contrast and saturation of uint8 [n, H, W, C], as torchvision's ColorJitter does.

    Each by up to 40 %, grey as in Pillow. random: uniform in 0..1, [n, 3]. Grey images have no saturation.
    """
    factors = 1 + (2 * random - 1) * 0.4
    brightness, contrast, saturation = factors[:, :, None, None, None].unbind(1)
    luma = torch.tensor((0.299, 0.587, 0.114) if images.shape[3] == 3 else (1.0,), device=images.device)
    pixels = images.float().mul_(brightness).clamp_(0, 255)
    mean = (pixels.mean((1, 2)) @ luma)[:, None, None, None]
    pixels = torch.lerp(mean, pixels, contrast).clamp_(0, 255)
    if images.shape[3] == 3:
        grey = (pixels @ luma)[..., None]
        pixels = torch.lerp(grey, pixels, saturation)
    return pixels.round_().clamp_(0, 255).byte()


def add_noise(images: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    """Add normal noise to uint8 [n, H, W, C]; in half of the images it grows with the light, as shot noise.

    random: uniform in 0..1, [n, 3]: strength, which of both kinds, and where in the table of noise to begin.
    """
    strength, kind = (MOST_NOISE * random[:, 0])[:, None, None, None], random[:, 1, None, None, None]
    size, table = images[0].numel(), noise_table(images.device)
    rows = (random[:, 2] * len(table)).long()[:, None] + torch.arange(-(-size // 256), device=images.device)
    noise = table[rows % len(table)].flatten(1)[:, :size].view(images.shape)
    pixels = images.float()
    noise = noise * torch.where(kind < 0.5, 1, (pixels / 128).sqrt_())
    return noise.mul_(strength).add_(pixels).round_().clamp_(0, 255).byte()


@functools.lru_cache
def noise_table(device: torch.device) -> torch.Tensor:
    """Normal numbers, float32 [4096, 256]: drawing new ones for each image would take ten times as long."""
    return torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)).to(device)


# What a camera does, in its order: which part of the images it changes, and how many random numbers it takes.
CAMERA = {"blur": (0.25, 2, blur), "color": (0.3, 3, change_colours), "noise": (0.5, 3, add_noise)}
