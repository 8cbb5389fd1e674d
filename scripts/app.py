"""`mfuser app`: a local web app that segments images; it needs no connection to other machines."""

import argparse
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from pathlib import Path

import gradio as gr
import numpy as np
from gradio.data_classes import ImageData
from PIL import UnidentifiedImageError

from mfuser.errors import is_expected, one_line
from mfuser.loading import load_for_inference
from mfuser.scripts import cli
from mfuser.scripts.app_model import Segmenter, check_number_of_pixels
from mfuser.scripts.app_view import (
    CLASSES,
    CONFIDENCE,
    SegmentedImage,
    View,
    draw_preview,
    legend_html,
    write_results,
)
from mfuser.scripts.arguments import DEFAULT_MODEL, add_device_argument
from mfuser.scripts.segment_images import read_image

# Part of the repository, not of an installed package.
EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "street.jpg"
MAX_FILE_SIZE = "64mb"
# Limits of what is kept: results in memory (at most 32 MiB each), files that the page shows.
MAX_SESSIONS, RESULT_SECONDS = 16, 3600
FILE_CHECK_SECONDS, FILE_SECONDS = 60, 600

# Served by Gradio. Its file of weight 600, the default theme's, holds no letters.
FONTS = (gr.themes.utils.fonts.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif")
CSS = """
#legend table { width: 100%; border: 0; border-collapse: collapse; }
#legend caption { text-align: left; padding-bottom: 4px; }
#legend tr, #legend th, #legend td { border: 0; border-bottom: 1px solid var(--border-color-primary); padding: 3px 0; }
#legend th { text-align: left; font-weight: normal; }
#legend thead th { font-weight: bold; }
#legend td, #legend thead th:last-child { text-align: right; font-variant-numeric: tabular-nums; }
#legend .swatch { display: inline-block; width: 22px; height: 13px; border: 1px solid #0006; }
#legend .swatch { margin-right: 8px; vertical-align: -2px; }
#legend .hidden { opacity: 0.5; }
#legend .scale { display: flex; align-items: center; gap: 8px; margin-top: 8px; }
#legend .scale span { flex: 1; height: 13px; border: 1px solid #0006; }
#status .error { color: #b91c1c; font-weight: 600; }
.dark #status .error { color: #fca5a5; }
"""


def _message(text: str) -> str:
    return f'<p role="status">{escape(text)}</p>'


def _error(text: str) -> str:
    return f'<p role="alert" class="error">{escape(text)}</p>'


START = _message("Upload an image, take one with the camera, or use the example.")
NO_RESULT = _error("There is no result, or it has expired: upload an image.")
# Files are removed when the settings change, so that they never differ from what the page shows.
NO_FILES = gr.update(value=None, visible=False)


def _all_of(class_names: list[str]) -> dict:
    return gr.update(choices=class_names, value=class_names)


class Page:
    """
    The functions that the page calls. Results belong to a visitor; the model is shared.

    Args:
        segmenter ([`Segmenter`]):
            The model.
    """

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter

    def open_image(self, path: str | None, class_names: list[str], kind: str, opacity: float, threshold: float):
        """Segments an image file, and shows the result."""
        if path is None:
            return self._nothing(class_names, START)
        try:
            check_number_of_pixels(Path(path))
            image = read_image(Path(path), self.segmenter.processor)
        except UnidentifiedImageError:
            return self._nothing(class_names, _error(f"{Path(path).name} is not an image of a known format."))
        except Exception as error:
            if not is_expected(error):
                raise
            return self._nothing(class_names, _error(f"{Path(path).name} cannot be read: {one_line(error)}"))
        return self._segmented(Path(path).stem, image, class_names, View(kind, opacity, threshold))

    def rename(self, result: SegmentedImage | None, text: str, kind: str, opacity: float, threshold: float):
        """Segments the image of `result` again, with the class names in `text`."""
        try:
            class_names = self.segmenter.parse_names(text)
            self.segmenter.model_with(class_names)
        except ValueError as error:
            return *[gr.skip()] * 6, _error(str(error))
        if result is None:
            return self._nothing(class_names, START)
        image = result.pixels.transpose(2, 0, 1)
        return self._segmented(result.name, image, class_names, View(kind, opacity, threshold))

    def _segmented(self, name: str, image: np.ndarray, class_names: list[str], view: View):
        start = time.perf_counter()
        try:
            result = self.segmenter.segment(name, image, class_names)
        except Exception as error:
            if not is_expected(error):
                raise
            return self._nothing(class_names, _error(f"{name} cannot be segmented: {one_line(error)}"))
        height, width = result.labels.shape
        text = f"{name}: {width} x {height} pixels, segmented in {time.perf_counter() - start:.1f} s."
        if result.labels.shape != image.shape[1:]:
            text += f" It was reduced from {image.shape[2]} x {image.shape[1]} pixels to limit the memory."
        drawn = draw_preview(result, view), legend_html(result, view)
        return result, class_names, *drawn, _all_of(class_names), NO_FILES, _message(text)

    def _nothing(self, class_names: list[str], status: str):
        return None, class_names, None, "", _all_of(class_names), NO_FILES, status

    def redraw(self, result: SegmentedImage | None, kind: str, opacity: float, threshold: float, shown: list[str]):
        """Draws a result with other settings. The model does not run."""
        if result is None:
            return None, "", NO_FILES, NO_RESULT
        view = View(kind, opacity, threshold, shown)
        return draw_preview(result, view), legend_html(result, view), NO_FILES, gr.skip()

    def save(self, result: SegmentedImage | None, kind: str, opacity: float, threshold: float, shown: list[str]):
        """Writes the files to download."""
        if result is None:
            return NO_FILES, NO_RESULT
        paths = write_results(result, View(kind, opacity, threshold, shown))
        return gr.update(value=paths, visible=True), gr.skip()


def _uploaded_path(payload: ImageData | None) -> str | None:
    """Replaces `gr.Image.preprocess`, which opens the file where [`Page.open_image`] cannot handle its errors."""
    return None if payload is None else payload.path


def build(segmenter: Segmenter, title: str) -> gr.Blocks:
    """
    Builds the page.

    Args:
        segmenter ([`Segmenter`]):
            The model.
        title (`str`):
            Name of the model.

    Returns:
        `gr.Blocks`: The page, to be started by [`launch`].
    """
    page, names = Page(segmenter), segmenter.class_names
    fixed = bool(segmenter.names_are_fixed_because)
    with gr.Blocks(
        title="MFuser", analytics_enabled=False, delete_cache=(FILE_CHECK_SECONDS, FILE_SECONDS), fill_width=True
    ) as blocks:
        gr.Markdown(f"# MFuser\nSemantic segmentation with `{title}`.")
        result = gr.State(time_to_live=RESULT_SECONDS)
        class_names = gr.State(names)
        with gr.Row():
            with gr.Column():
                image = gr.Image(
                    label="Image",
                    sources=["upload", "webcam", "clipboard"],
                    webcam_options=gr.WebcamOptions(mirror=False),
                    type="filepath",
                    image_mode=None,
                    buttons=[],
                    height=440,  # with the row of sources
                    elem_id="image",
                    alt_text="The image to segment",
                )
                image.preprocess = _uploaded_path  # type: ignore[method-assign]
                example = gr.Button("Use the example image", visible=EXAMPLE.is_file(), elem_id="example")
            with gr.Column():
                overlay = gr.Image(
                    label="Result",
                    format="jpeg",
                    buttons=["fullscreen"],
                    height=400,
                    elem_id="overlay",
                    alt_text="The image, overlaid with the colours of its classes",
                    interactive=False,
                )
                status = gr.HTML(START, elem_id="status")
        with gr.Row():
            with gr.Column():
                kind = gr.Radio([CLASSES, CONFIDENCE], value=CLASSES, label="Colours show", elem_id="kind")
                opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity of the colours", elem_id="opacity")
                threshold = gr.Slider(
                    0,
                    1,
                    0,
                    step=0.01,
                    label="Confidence below which a pixel is unknown",
                    info="At 0, every pixel has a class. Unknown pixels are black, and 255 in the label image.",
                    elem_id="threshold",
                )
                shown = gr.CheckboxGroup(names, value=names, label="Classes shown", elem_id="shown")
                with gr.Row():
                    show_all = gr.Button("Show all classes", size="sm", elem_id="show-all")
                    hide_all = gr.Button("Hide all classes", size="sm", elem_id="hide-all")
                with gr.Accordion("Class names", open=False, elem_id="naming"):
                    text = gr.Textbox(
                        "\n".join(names),
                        lines=6,
                        max_lines=12,
                        label="Class names, one per line",
                        info=segmenter.names_are_fixed_because
                        or "The model searches for the classes that you name, without training.",
                        interactive=not fixed,
                        elem_id="names",
                    )
                    with gr.Row():
                        apply = gr.Button("Apply names", interactive=not fixed, elem_id="apply")
                        reset = gr.Button("Restore the model's names", interactive=not fixed, elem_id="reset")
            with gr.Column():
                legend = gr.HTML(label="Legend", elem_id="legend")
                save = gr.Button("Prepare files to download", elem_id="save")
                files = gr.File(
                    label="Overlay, labels and legend",
                    file_count="multiple",
                    interactive=False,
                    visible=False,
                    elem_id="files",
                )

        settings = [kind, opacity, threshold]

        def run_model(event: Callable, fn: Callable, inputs: list):
            event(
                fn,
                inputs,
                [result, class_names, overlay, legend, shown, files, status],
                concurrency_id="model",
                concurrency_limit=1,
                show_progress_on=overlay,
                api_visibility="private",
            )

        run_model(image.change, page.open_image, [image, class_names, *settings])
        run_model(apply.click, page.rename, [result, text, *settings])
        restored = reset.click(lambda: "\n".join(names), None, text, api_visibility="private")
        run_model(restored.then, page.rename, [result, text, *settings])

        def redraw(event: Callable, **options):
            event(
                page.redraw,
                [result, *settings, shown],
                [overlay, legend, files, status],
                show_progress="hidden",
                concurrency_limit=2,
                concurrency_id="redraw",
                api_visibility="private",
                **options,
            )

        # Not `shown.change`, which new class names cause as well.
        changes = [kind.change, opacity.change, threshold.change, shown.input]
        redraw(partial(gr.on, changes), trigger_mode="always_last")
        redraw(show_all.click(list, class_names, shown, api_visibility="private").then)
        redraw(hide_all.click(list, None, shown, api_visibility="private").then)
        example.click(lambda: str(EXAMPLE), None, image, api_visibility="private")
        save.click(page.save, [result, *settings, shown], [files, status], api_visibility="private")
    return blocks


def launch(blocks: gr.Blocks, host: str, port: int) -> str:
    """
    Serves the page in the background.

    Args:
        blocks (`gr.Blocks`):
            The page.
        host (`str`):
            Address to listen on.
        port (`int`):
            Port to listen on.

    Returns:
        `str`: The address of the page.
    """
    blocks.queue(max_size=64)
    _, url, _ = blocks.launch(
        server_name=host,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=True,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        allowed_paths=[str(EXAMPLE)],
        max_file_size=MAX_FILE_SIZE,
        state_session_capacity=MAX_SESSIONS,
        theme=gr.themes.Default(primary_hue="blue", font=FONTS),
        css=CSS,
    )
    return url


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 to {2**16 - 1}")
    return int(text)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="mfuser app",
        description="Serves a web app that segments images. It loads nothing from other machines.",
    )
    parser.add_argument(
        "--model",
        default=str(DEFAULT_MODEL),
        help="folder or Hub id of an MFuser model (default: the demonstration checkpoint of the repository)",
    )
    parser.add_argument(
        "--tokenizer",
        help="folder or Hub id of the tokenizer of the model's text encoder, with which class names can be edited "
        "(default: that in the model's folder, if any)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=_port, default=7860, help="port to listen on (default: %(default)s)")
    add_device_argument(parser)
    parsed = parser.parse_args(arguments)
    try:
        family = socket.getaddrinfo(parsed.host, parsed.port)[0][0]
        socket.create_server((parsed.host, parsed.port), family=family).close()
    except OSError as error:
        parser.error(f"cannot listen on --host {parsed.host} --port {parsed.port}: {error.strerror}")
    return parsed


@contextmanager
def temporary_folder() -> Iterator[None]:
    """
    Puts the temporary files of this process, uploads among them, into a folder that is deleted at the end.

    Gradio deletes its files when the server stops, but not while a visitor is connected.
    """
    with tempfile.TemporaryDirectory(prefix="mfuser-app-", ignore_cleanup_errors=True) as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = None


@cli.reports_errors("app")
def main(arguments: list[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # deletes uploads and results as Ctrl-C does
    segmenter = Segmenter(*load_for_inference(parsed.model, parsed.device), parsed.tokenizer)
    with temporary_folder():
        blocks = build(segmenter, Path(parsed.model).name)
        url = launch(blocks, parsed.host, parsed.port)
        print(f"The page is at {url} (stop it with Ctrl-C)", flush=True)
        blocks.block_thread()
    return 0
