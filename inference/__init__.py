"""What runs an exported file, and goes to the device with it: no torch, no training code.

    from inference import Model, predict

    model = Model("model.onnx")
    predict("image.png", model)["label"]

Needs numpy and Pillow, and the runtime of the file: onnxruntime for .onnx, torch for .pt and .pt2.
On a device, put step3_infer.pyz on sys.path and import this package from the archive.
"""

from inference.errors import Problem
from inference.images import decode_image
from inference.predict import Model, predict

__all__ = ["Model", "Problem", "decode_image", "predict"]
