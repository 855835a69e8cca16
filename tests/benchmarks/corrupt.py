"""Change images as Hendrycks and Dietterich (2019) do: 15 common corruptions at 5 severities.

    python tests/benchmarks/corrupt.py images.npz corrupted/

Needs the package imagecorruptions 1.1.2 (pip install imagecorruptions numpy), best in an
environment of its own. It was written for older libraries; what it misses of them is given to it
here. Reads the array `images`, uint8 [n, H, W, 3] of 32 pixels or more, and writes
corrupted/<name>-<severity>.npy of the same shape. Files that exist are kept.
"""

import argparse
import os
import sys
import types
from pathlib import Path

import numpy as np

SEVERITIES = (1, 2, 3, 4, 5)


def load_package():
    """The package imagecorruptions, with the names that it expects of older libraries."""
    import importlib.util

    import scipy.ndimage
    import skimage.filters

    np.float_ = np.float64
    sys.modules.setdefault("scipy.ndimage.interpolation", scipy.ndimage)

    gaussian = skimage.filters.gaussian

    def gaussian_of_channels(image, sigma, multichannel=False, **options):
        return gaussian(image, sigma, channel_axis=-1 if multichannel else None, **options)

    skimage.filters.gaussian = gaussian_of_channels

    def resource_filename(name, path):
        return os.path.join(os.path.dirname(importlib.util.find_spec(name).origin), path)

    resources = types.ModuleType("pkg_resources")
    resources.resource_filename = resource_filename
    sys.modules["pkg_resources"] = resources

    import imagecorruptions

    return imagecorruptions


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", help="an .npz file with the array `images`")
    parser.add_argument("out", type=Path, help="directory for the changed images")
    parser.add_argument("--severities", type=int, nargs="+", default=SEVERITIES, metavar="N")
    args = parser.parse_args()

    package = load_package()
    images = np.load(args.images)["images"]
    args.out.mkdir(parents=True, exist_ok=True)
    for severity in args.severities:
        for name in package.get_corruption_names("common"):
            path = args.out / f"{name}-{severity}.npy"
            if path.exists():
                continue
            np.random.seed(severity)  # which the package draws from
            changed = [
                package.corrupt(image, severity=severity, corruption_name=name) for image in images
            ]
            np.save(path, np.stack(changed))
            print(path, flush=True)


if __name__ == "__main__":
    main()
