"""`mfuser export`: writes a model as a file that runs without MFuser, with torch.export, ONNX or AOTInductor."""

import argparse
import importlib.util
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch._higher_order_ops.while_loop import while_loop
from torch.export import Dim

from mfuser.errors import CommandError
from mfuser.files import atomic_folder, check_new_folder, write_text
from mfuser.image_processing_mfuser import MFuserImageProcessor
from mfuser.loading import load_for_inference
from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.quantization import quantize
from mfuser.scripts import cli, palettes, run_artefact
from mfuser.scripts.arguments import add_quantize_argument

DESCRIPTION = """Exports a model for one window of any height and width, in batches of any size. The folder DIR then
holds
  model.pt2 or model.onnx   the graph and the weights; large ONNX weights are in model.onnx.data
  artefact.json             classes, colours, normalisation, crop size and stride
  run.py                    segments an image by sliding windows; it needs numpy, pillow and torch or onnxruntime
With --whole-image the sliding windows are part of the graph, which then takes images of at least one crop.
Before anything is written, the scores of the exported model are compared with those of the model.
Exit code: 0 if the artefact was written, 2 if it could not be exported or its scores differ."""

FILES = {"torch-export": "model.pt2", "onnx": "model.onnx", "aoti": "model.pt2"}
MINIMUM_PATCHES = 4  # of a side: the coarsest level of the pyramid then has at least two
OPSET = 20
# Largest difference of scores, which are in [0, number of classes]. ONNX Runtime computes exponentials and the error
# function by itself: the scores of the demonstration differ by 1.1e-5 from torch's on a CPU with AVX2.
TOLERANCE = 5e-5
CHECKED_PATCHES, CHECKED_BATCHES = (6, 9), (1, 3)  # sides of windows in patches, besides the crop, and batch sizes


class Window(nn.Module):
    """The part of a model that is exported: pixels of windows (B, 3, H, W) -> scores (B, K, H, W), or labels."""

    def __init__(self, model: MFuserForSemanticSegmentation, argmax: bool):
        super().__init__()
        model.mfuser.store_class_embeddings()
        self.model, self.argmax = model.requires_grad_(False).eval(), argmax
        self.minimum_side = MINIMUM_PATCHES * model.config.patch_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        scores = self.window_scores(pixel_values)
        return scores.argmax(dim=1) if self.argmax else scores

    def window_scores(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.model.mfuser(pixel_values, output_feature_maps=False, return_dict=True)
        return self.model.decode(features, pixel_values.shape[-2:]).logits

    def expected(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The output that the artefact must reproduce."""
        return self(pixel_values)

    def checked_sizes(self) -> list[tuple[int, int]]:
        """Heights and widths at which the artefact is compared with the model."""
        patch, crop = self.model.config.patch_size, self.model.config.crop_size
        return [(crop, crop), (CHECKED_PATCHES[0] * patch, CHECKED_PATCHES[1] * patch)]


class WholeImage(Window):
    """
    A [`Window`] for images of at least one crop, whose sliding windows are a loop in the graph.

    All windows have the size of a crop, so that every shape in the body of the loop is known at export.
    """

    def __init__(self, model: MFuserForSemanticSegmentation, argmax: bool):
        super().__init__(model, argmax)
        self.minimum_side = model.config.crop_size

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        batch, _, height, width = pixel_values.shape
        crop, stride, device = self.model.config.crop_size, self.model.config.crop_stride, pixel_values.device
        down, across = ((side - crop + stride - 1) // stride + 1 for side in (height, width))
        positions = torch.arange(crop, device=device)

        def windows_remain(index, scores, counts):
            return index < down * across

        def add_window(index, scores, counts):
            rows = (index // across * stride).clamp(max=height - crop) + positions
            columns = (index % across * stride).clamp(max=width - crop) + positions
            window_scores = self.window_scores(pixel_values.index_select(2, rows).index_select(3, columns))
            place = (rows[:, None], columns)
            scores = torch.ops.aten.index_put(scores, (None, None, *place), window_scores, accumulate=True)
            counts = torch.ops.aten.index_put(counts, place, counts.new_ones(()), accumulate=True)
            return index + 1, scores, counts

        start = (
            torch.zeros((), dtype=torch.int64, device=device),
            pixel_values.new_zeros(batch, self.model.config.num_labels, height, width),
            pixel_values.new_zeros(height, width),
        )
        _, scores, counts = while_loop(windows_remain, add_window, start)
        return scores.argmax(dim=1) if self.argmax else scores / counts

    def expected(self, pixel_values: torch.Tensor) -> torch.Tensor:
        scores = self.model(pixel_values).logits
        return scores.argmax(dim=1) if self.argmax else scores

    def checked_sizes(self) -> list[tuple[int, int]]:
        crop, stride = self.model.config.crop_size, self.model.config.crop_stride
        return [(crop, crop), (crop + stride // 2 + 1, crop + stride + 1)]  # 1 window, and 2 x 3


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mfuser export", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of an MFuser model")
    parser.add_argument(
        "--format",
        required=True,
        choices=FILES,
        help="torch-export: a program that torch loads; onnx: for ONNX Runtime and others; aoti: compiled for the "
        "processor of this machine, which needs a C++ compiler",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new folder for the artefact")
    parser.add_argument(
        "--argmax",
        action="store_true",
        help="export labels instead of scores; without --whole-image, run.py then takes one window per image",
    )
    parser.add_argument(
        "--whole-image",
        action="store_true",
        help="export the sliding windows as well, with --format torch-export",
    )
    add_quantize_argument(parser)
    parsed = parser.parse_args(arguments)
    if parsed.whole_image and parsed.format != "torch-export":
        parser.error(
            f"--whole-image needs --format torch-export; an artefact of --format {parsed.format} is one window, "
            "and its run.py segments whole images"
        )
    if parsed.quantize == "int8-dynamic":
        parser.error(
            "--quantize int8-dynamic uses kernels of PyTorch that an artefact cannot hold; export with "
            "int8-weight-only, or quantise model.onnx with onnxruntime.quantization.quantize_dynamic"
        )
    return parsed


def check_requirements(kind: str):
    """Raises `CommandError` if something that a format needs is not installed."""
    packages = ("onnx", "onnxscript", "onnxruntime") if kind == "onnx" else ()
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"--format {kind} needs packages that are not installed: pip install {' '.join(missing)}")
    if kind == "aoti" and cpp_compiler() is None:
        raise CommandError(
            "--format aoti needs a C++ compiler, and there is none: install g++ or clang++, or name one in the "
            "environment variable CXX"
        )


def cpp_compiler() -> str | None:
    """Path of the C++ compiler of this machine."""
    names = [os.environ.get("CXX"), "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def capture(window: Window) -> torch.export.ExportedProgram:
    """The graph of `window`, for any batch size, height and width."""
    patch = window.model.config.patch_size
    # Neither side is that of the position embeddings, and they differ: equal sizes would be taken for one size.
    example = torch.zeros(2, 3, *((window.model.config.crop_size // patch + extra) * patch + 2 for extra in (2, 5)))
    side = Dim.DYNAMIC(min=window.minimum_side)
    with torch.no_grad():
        return torch.export.export(
            window, (example,), dynamic_shapes=({0: Dim.DYNAMIC, 2: side, 3: side},), strict=False
        )


def write_torch_export(program: torch.export.ExportedProgram, path: Path):
    torch.export.save(program, path)


def write_onnx(program: torch.export.ExportedProgram, path: Path):
    from onnxscript import optimizer

    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=[run_artefact.INPUT],
        output_names=[run_artefact.OUTPUT],
        optimize=False,  # its rewriting rules take minutes and make the model no faster in ONNX Runtime
        verbose=False,
    )
    assert exported is not None  # which it is only if a path is given
    optimizer.fold_constants(exported.model)
    optimizer.remove_unused_nodes(exported.model)
    exported.save(path)


def write_aoti(program: torch.export.ExportedProgram, path: Path):
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


WRITERS: dict[str, Callable] = {"torch-export": write_torch_export, "onnx": write_onnx, "aoti": write_aoti}


def description(window: Window, processor: MFuserImageProcessor, kind: str):
    """The content of artefact.json."""
    config = window.model.config
    names = [config.id2label[index] for index in range(config.num_labels)]
    return {
        "format": kind,
        "file": FILES[kind],
        "output": "labels" if window.argmax else "scores",
        "whole_image": isinstance(window, WholeImage),
        "classes": names,
        "colours": palettes.class_colours(names).tolist(),
        "scale": processor.rescale_factor,
        "mean": np.broadcast_to(processor.image_mean if processor.do_normalize else 0.0, 3).tolist(),
        "std": np.broadcast_to(processor.image_std if processor.do_normalize else 1.0, 3).tolist(),
        "size": _limits(processor),
        "resample": int(processor.resample),
        "crop_size": config.crop_size,
        "crop_stride": config.crop_stride,
        "minimum_side": window.minimum_side,
    }


def check_processor(processor: MFuserImageProcessor):
    """Raises `CommandError` if the settings of an image processor do not fit 8-bit images, which run.py reads."""
    try:
        processor(Image.new("RGB", (64, 64), "white"))
    except ValueError as error:
        raise CommandError(f"the model's image processor refuses 8-bit images: {error}") from error


def _limits(processor: MFuserImageProcessor) -> dict[str, int] | None:
    """The size to which the processor resizes images, `None` if it does not."""
    return (
        {name: side for name, side in dict(processor.size).items() if side is not None}
        if processor.do_resize
        else None
    )


def largest_difference(window: Window, folder: Path) -> float:
    """
    The largest difference between the scores of a model and of its artefact, over batch sizes and sizes.

    With labels instead of scores, the share of the pixels whose labels differ.
    """
    run = run_artefact.load(folder)
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for size in window.checked_sizes():
        for batch in CHECKED_BATCHES:
            pixel_values = torch.randn(batch, 3, *size, generator=generator)
            with torch.no_grad():
                expected = window.expected(pixel_values).numpy()
            found = run(pixel_values.numpy())
            if found.shape != expected.shape:
                raise CommandError(
                    f"the artefact returns shape {found.shape} where the model returns {expected.shape}"
                )
            difference = (found != expected).mean() if window.argmax else np.abs(found - expected).max()
            largest = max(largest, float(difference))
    return largest


def export(
    name_or_path: str,
    kind: str,
    output: Path,
    argmax: bool = False,
    whole_image: bool = False,
    quantization: str | None = None,
) -> float:
    """
    Writes an artefact, after it was compared with the model.

    Args:
        name_or_path (`str`):
            Folder or Hub id of an MFuser model.
        kind (`str`):
            `"torch-export"`, `"onnx"` or `"aoti"`.
        output (`Path`):
            Folder to write, which must be new or empty. It appears when it is complete.
        argmax (`bool`, *optional*, defaults to `False`):
            Whether the artefact returns labels instead of scores.
        whole_image (`bool`, *optional*, defaults to `False`):
            Whether the sliding windows are part of the artefact, of kind `"torch-export"`.
        quantization (`str`, *optional*):
            `"int8-weight-only"`, see [`quantize`].

    Returns:
        `float`: The largest difference of scores, or the share of different labels.

    Raises:
        CommandError: If the format needs something that is not installed, if the image processor does not accept 8-bit
            images, or if the artefact differs from the model.
        ValueError: If `output` holds anything.
    """
    check_requirements(kind)
    check_new_folder(output)
    # In float32, in which the artefact is compared with the model.
    model, processor = load_for_inference(name_or_path, torch.device("cpu"), "float32")
    check_processor(processor)
    window = (WholeImage if whole_image else Window)(quantize(model, quantization), argmax)
    with atomic_folder(output) as folder:
        try:
            WRITERS[kind](capture(window), folder / FILES[kind])
        except RuntimeError as error:  # of the exporters and of the compiler
            raise CommandError(f"the model cannot be exported to {kind}: {error}") from error
        shutil.copyfile(run_artefact.__file__, folder / "run.py")
        write_text(
            folder / run_artefact.DESCRIPTION_FILE,
            json.dumps(description(window, processor, kind), indent=2) + "\n",
        )
        difference = largest_difference(window, folder)
        if not difference <= TOLERANCE:  # also if it is not a number
            raise CommandError(
                f"the artefact differs from the model by {difference:.1e}; at most {TOLERANCE:.0e} is accepted"
            )
    return difference


@cli.reports_errors("export")
def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about their own code
        difference = export(
            parsed.model, parsed.format, parsed.output, parsed.argmax, parsed.whole_image, parsed.quantize
        )
    measure = "share of labels that differ" if parsed.argmax else "largest difference of scores"
    print(f"checked against the model, batch sizes 1 and 3, two sizes: {measure} {difference:.1e}")
    for path in sorted(parsed.output.iterdir()):
        print(f"{path}  {path.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
