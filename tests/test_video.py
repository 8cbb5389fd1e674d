"""`mfuser segment` on videos: frames keep their timestamps and the audio; damage is reported, memory is bounded."""

import json
import os
import re
import signal
import sys
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import fault_injection
import numpy as np
import pytest
import torch
from peak_memory import segment_peak_mebibytes
from PIL import Image
from test_segment import ThresholdModel, files, run, write_image
from tiny_models import tiny_model

from mfuser import MFuserImageProcessor
from mfuser.confidence_mfuser import confidence_map
from mfuser.overlap import model_threads
from mfuser.scripts import segment, segment_video, video
from mfuser.scripts.segment_results import settings_of
from mfuser.scripts.segmentation import class_scores, frames_at_once, labels_of_scores, weights_hash

pytest.importorskip("av")
from videos import moving_bar, picture, read_video, rotate_clockwise, write_video

NTSC = Fraction(30_000, 1_001)


@pytest.fixture
def model(monkeypatch):
    model = ThresholdModel()
    monkeypatch.setattr(segment, "load_for_inference", lambda *_: (model, MFuserImageProcessor()))
    return model


def bars(number: int = 12, **size) -> list[np.ndarray]:
    return [picture(moving_bar(index, **size)) for index in range(number)]


def labels_in(path: Path) -> tuple[list[np.ndarray], list[float]]:
    """The label maps of a video, and their times, as docs/video.md reads them."""
    labels, times = [], []
    with np.load(path) as archive:
        for name in archive.files:
            if name.startswith("labels_"):
                labels += list(archive[name])
                times += archive[name.replace("labels_", "times_")].tolist()
    return labels, times


def record_in(path: Path) -> dict:
    return json.loads(path.read_text())


# --- guarantee: all frames, timestamps and audio ---------------------------------------------------------------------


def test_a_video_gives_its_overlay_with_the_same_times_and_audio(model, tmp_path, capsys):
    write_video(tmp_path / "drive.mp4", bars(), NTSC, sound="aac")
    output = tmp_path / "out"
    assert run(tmp_path / "drive.mp4", "--output", output) == 0
    names = ["drive_labels.npz", "drive_overlay.mp4", "drive_video.json", "legend.json", "legend.png"]
    assert files(output) == names
    pictures, times, sound = read_video(tmp_path / "drive.mp4")
    overlays, overlay_times, overlay_sound = read_video(output / "drive_overlay.mp4")
    assert overlay_times == times and len(times) == 12 and times[1] == 1 / NTSC
    assert overlay_sound == sound and len(sound) > 10
    labels, label_times = labels_in(output / "drive_labels.npz")
    assert label_times == pytest.approx([float(time) for time in times])
    legend = json.loads((output / "legend.json").read_text())
    colours = np.array([legend[str(index)]["colour"] for index in range(3)])
    for index, (classes, overlay) in enumerate(zip(labels, overlays, strict=True)):
        assert np.array_equal(classes, moving_bar(index))
        expected = (pictures[index].astype(int) + colours[classes]) / 2
        assert abs(overlay - expected).mean() < 6  # H.264 keeps half of the resolution of colours
    record = record_in(output / "drive_video.json")
    assert record["complete"] and record["frames"] == 12 and record["problem"] == ""
    assert record["shares"]["unicorn"] == pytest.approx(np.mean([moving_bar(i) == 2 for i in range(12)]), abs=1e-5)
    printed = capsys.readouterr().out
    assert "drive.mp4: 12 frames" in printed and "segmented: 1, skipped: 0" in printed


def test_variable_frame_rates_are_kept(model, tmp_path):
    times = [0, 40, 45, 60, 200, 1000, 1001, 1500]
    for suffix in ("mkv", "mp4"):
        path = tmp_path / f"phone.{suffix}"
        write_video(path, bars(len(times)), Fraction(10), times, time_base=Fraction(1, 1000))
        assert run(path, "--output", tmp_path / suffix) == 0
        assert read_video(tmp_path / suffix / "phone_overlay.mp4")[1] == [Fraction(time, 1000) for time in times]
        assert labels_in(tmp_path / suffix / "phone_labels.npz")[1] == [time / 1000 for time in times]


def test_a_video_that_starts_late_starts_at_zero(model, tmp_path):
    write_video(tmp_path / "tv.ts", bars(), times=list(range(250, 262)))
    assert run(tmp_path / "tv.ts", "--output", tmp_path / "out") == 0
    assert read_video(tmp_path / "tv.ts")[1][0] >= 10
    assert read_video(tmp_path / "out" / "tv_overlay.mp4")[1] == [Fraction(index, 25) for index in range(12)]


def test_audio_that_mp4_cannot_hold_is_kept_in_matroska(model, tmp_path):
    write_video(tmp_path / "camera.avi", bars(), sound="pcm_s16le", codec="mpeg4")
    assert run(tmp_path / "camera.avi", "--output", tmp_path / "out") == 0
    assert "camera_overlay.mkv" in files(tmp_path / "out")
    assert b"".join(read_video(tmp_path / "out" / "camera_overlay.mkv")[2]) == b"".join(
        read_video(tmp_path / "camera.avi")[2]
    )


def test_a_phone_video_is_rotated_upright(model, tmp_path):
    write_video(tmp_path / "phone.mp4", bars())
    rotate_clockwise(tmp_path / "phone.mp4")
    assert run(tmp_path / "phone.mp4", "--output", tmp_path / "out") == 0
    labels, _ = labels_in(tmp_path / "out" / "phone_labels.npz")
    assert all(np.array_equal(found, np.rot90(moving_bar(index), -1)) for index, found in enumerate(labels))
    assert read_video(tmp_path / "out" / "phone_overlay.mp4")[0][0].shape == (64, 48, 3)


@pytest.mark.parametrize(
    ("size", "codec", "pix_fmt", "number"),
    [((33, 47), "ffv1", "bgr0", 5), ((48, 64), "ffv1", "gray", 5), ((48, 64), "libx264", "yuv420p", 1)],
    ids=["odd sides", "grey", "one frame"],
)
def test_unusual_videos_are_segmented(model, tmp_path, size, codec, pix_fmt, number):
    frames = bars(number, height=size[0], width=size[1])
    write_video(tmp_path / "a.mkv", frames, codec=codec, pix_fmt=pix_fmt)
    assert run(tmp_path / "a.mkv", "--output", tmp_path / "out") == 0
    labels, _ = labels_in(tmp_path / "out" / "a_labels.npz")
    assert len(labels) == number
    assert all(np.array_equal(found, moving_bar(index, *size)) for index, found in enumerate(labels))
    overlays, _, _ = read_video(tmp_path / "out" / "a_overlay.mp4")
    assert len(overlays) == number and overlays[0].shape[:2] == tuple(side + side % 2 for side in size)


def test_videos_are_found_in_folders_and_by_their_content(model, tmp_path):
    folder = tmp_path / "recordings"
    write_image(folder / "a.png")
    (folder / "deep").mkdir()
    write_video(folder / "deep" / "b.MP4", bars(3))
    write_video(tmp_path / "c.mkv", bars(3))
    (tmp_path / "c.mkv").rename(tmp_path / "c.download")
    assert run(folder, tmp_path / "c.download", "--output", tmp_path / "out") == 0
    assert {"a_labels.png", "deep/b_labels.npz", "c_labels.npz"} <= set(files(tmp_path / "out"))


def test_numbered_frames_are_one_video(model, tmp_path, capsys):
    frames = tmp_path / "frames"
    frames.mkdir()
    for index in range(12):
        Image.fromarray(picture(moving_bar(index))).save(frames / f"{10 * index:04}.png")
    (frames / "0030.png").write_bytes(b"damaged")
    (frames / "123.png").write_bytes(b"not of the pattern: three digits")
    assert run(f"{frames}/%04d.png", "--output", tmp_path / "out", "--frame-rate", "30000/1001") == 1
    assert "0030.png: cannot identify image file" in capsys.readouterr().err
    labels, times = labels_in(tmp_path / "out" / "frames_labels.npz")
    kept = [index for index in range(12) if index != 3]
    assert all(np.array_equal(found, moving_bar(index)) for index, found in zip(kept, labels, strict=True))
    assert times == pytest.approx([index / float(NTSC) for index in kept])
    assert read_video(tmp_path / "out" / "frames_overlay.mp4")[1] == [index / NTSC for index in kept]
    assert run(f"{frames}/%06d.png", "--output", tmp_path / "out") == 1
    assert "no file has such a name" in capsys.readouterr().err


def test_a_camera_is_read_until_it_ends(model, tmp_path, capsys, monkeypatch):
    pictures = [picture(moving_bar(index)) for index in range(4)]
    pictures = [np.stack([image[..., 0], image[..., 1], 255 - image[..., 2]], axis=-1) for image in pictures]
    pending = iter(pictures)

    class Capture:
        def __init__(self, index):
            assert index == 7

        isOpened = staticmethod(lambda: True)
        get = staticmethod(lambda _: 30.0)
        release = staticmethod(lambda: None)

        def read(self):
            pixels = next(pending, None)
            return pixels is not None, None if pixels is None else pixels[..., ::-1]  # blue first

    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(VideoCapture=Capture, CAP_PROP_FPS=5))
    assert run("7", "--output", tmp_path / "out") == 1
    assert "incomplete camera 7: the camera gives no more frames" in capsys.readouterr().err
    labels, times = labels_in(tmp_path / "out" / "camera-7_labels.npz")
    assert all(np.array_equal(found, moving_bar(index)) for index, found in enumerate(labels))
    assert len(times) == 4 and times == sorted(times)


# --- scores: batches, smoothing, unknown -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (70, 90)])
def test_frames_in_one_forward_have_the_labels_of_single_frames(size):
    model, processor = tiny_model(), MFuserImageProcessor()
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (3, *size), dtype=np.uint8) for _ in range(frames_at_once(size, model, processor))]
    assert len(frames) > 1
    together = class_scores(frames, model, processor)
    for frame, scores in zip(frames, together, strict=True):
        alone = class_scores([frame], model, processor)[0]
        torch.testing.assert_close(scores, alone, rtol=1e-4, atol=1e-5)
        best, second = alone.topk(2, dim=0).values
        clear = (best - second > 1e-4).numpy()
        assert clear.mean() > 0.9
        one, other = (labels_of_scores(each, size, None, None) for each in (scores, alone))
        assert np.array_equal(one[clear], other[clear])


def test_frames_in_one_forward_stay_within_the_windows_that_a_model_allows():
    processor = MFuserImageProcessor()
    assert frames_at_once((64, 64), tiny_model(windows_per_batch=3), processor) == 3
    assert frames_at_once((64, 128), tiny_model(windows_per_batch=3), processor) == 1  # three windows each
    assert frames_at_once((64, 128), tiny_model(windows_per_batch=7), processor) == 2
    assert frames_at_once((4000, 6000), tiny_model(windows_per_batch=10**6), processor) == 1  # their scores are large


def test_a_small_model_segments_images_in_parallel_and_a_large_one_does_not(monkeypatch):
    threads, model = torch.get_num_threads(), tiny_model()
    torch.set_num_threads(3)
    try:
        with model_threads(model) as number:
            assert number == 3 and torch.get_num_threads() == 1
            assert model.config.windows_per_batch == 144  # of 16 tokens
        assert torch.get_num_threads() == 3 and model.config.windows_per_batch is None
        chosen = tiny_model(windows_per_batch=2)
        with model_threads(chosen):
            assert chosen.config.windows_per_batch == 2
        monkeypatch.setattr("mfuser.overlap.SMALL_MODEL", 1000)
        with model_threads(model) as number:
            assert number == 1 and torch.get_num_threads() == 3 and model.config.windows_per_batch is None
    finally:
        torch.set_num_threads(threads)


def test_scores_are_smoothed_over_time_and_smoothing_restarts_at_another_size(model, tmp_path):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (8, 6, 8), dtype=np.uint8)
    for index, values in enumerate(coarse):
        grey = np.kron(values, np.ones((8, 8), dtype=np.uint8))
        grey = grey if index < 5 else grey[:40, :56]
        Image.fromarray(grey).save(tmp_path / f"{index}.png")
    assert run(f"{tmp_path}/%d.png", "--output", tmp_path / "out", "--smoothing", "0.6") == 0
    labels, _ = labels_in(next((tmp_path / "out").glob("*_labels.npz")))
    plain, smoothed = [], None
    for index, found in enumerate(labels):
        grey = np.asarray(Image.open(tmp_path / f"{index}.png")) / 255
        scores = np.stack([-abs(grey - centre) for centre in (0.0, 0.5, 1.0)])
        plain.append(scores.argmax(0))
        smoothed = scores if index in (0, 5) else 0.6 * smoothed + 0.4 * scores
        assert np.array_equal(found, smoothed.argmax(0))
    assert any((one != other).any() for one, other in zip(plain, labels, strict=True))


def test_pixels_of_low_confidence_are_unknown_in_a_video(model, tmp_path):
    write_video(tmp_path / "a.mkv", bars(3), codec="ffv1", pix_fmt="bgr0")
    assert run(tmp_path / "a.mkv", "--output", tmp_path / "out", "--unknown-threshold", "1") == 0
    labels, _ = labels_in(tmp_path / "out" / "a_labels.npz")
    assert len(labels) == 3 and (np.stack(labels) == 255).any()


def test_unknown_pixels_of_a_video_are_those_of_the_calibrated_confidence(tmp_path, monkeypatch):
    model, processor = tiny_model(confidence_temperature=0.3), MFuserImageProcessor()
    monkeypatch.setattr(segment, "load_for_inference", lambda *_: (model, processor))
    frames = list(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    write_video(tmp_path / "a.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    scores = class_scores([frame.transpose(2, 0, 1) for frame in frames], model, processor)
    confidence = confidence_map(scores, 0.3)
    threshold = confidence.median().item()
    assert run(tmp_path / "a.mkv", "--output", tmp_path / "out", f"--unknown-threshold={threshold}") == 0
    labels, _ = labels_in(tmp_path / "out" / "a_labels.npz")
    clear = ((confidence - threshold).abs() > 1e-6).numpy()
    assert clear.mean() > 0.9
    assert np.array_equal((np.stack(labels) == 255)[clear], (confidence < threshold).numpy()[clear])


# --- damaged videos --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_truncated_video_is_named_and_its_frames_are_kept(model, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (60, 96, 128, 3), dtype=np.uint8)
    for name, options in (("a.mp4", {"movflags": "faststart"}), ("b.mkv", {}), ("c.avi", {})):
        codec = "mpeg4" if name == "c.avi" else "libx264"
        write_video(tmp_path / name, list(noise), codec=codec, **options)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        assert run(tmp_path / name, "--output", tmp_path / "out") == 1
        printed = capsys.readouterr()
        assert re.search(rf"incomplete \S*{name}: .*(truncated|reading fails|damaged).*; the frames", printed.err), (
            name
        )
        assert "segmented: 1 (incomplete: 1), skipped: 0" in printed.out
        results = tmp_path / "out" / Path(name).stem
        labels, _ = labels_in(Path(f"{results}_labels.npz"))
        assert 20 < len(labels) < 50
        assert len(read_video(Path(f"{results}_overlay.mp4"))[0]) == len(labels)
        record = record_in(Path(f"{results}_video.json"))
        assert not record["complete"] and record["problem"] and record["frames"] == len(labels)


def test_a_damaged_part_is_named_and_the_rest_is_kept(model, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (60, 96, 128, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mkv", list(noise))
    content = bytearray((tmp_path / "a.mkv").read_bytes())
    third = len(content) // 3
    content[third : third + 20_000] = bytes(20_000)
    (tmp_path / "a.mkv").write_bytes(content)
    assert run(tmp_path / "a.mkv", "--output", tmp_path / "out") == 1
    assert "incomplete" in capsys.readouterr().err
    assert len(labels_in(tmp_path / "out" / "a_labels.npz")[0]) > 20


def sound_alone(path: Path) -> None:
    import av
    from videos import add_tone

    with av.open(str(path), "w") as container:
        add_tone(container, "aac", seconds=0.5)


def without_index(path: Path) -> None:
    write_video(path, bars())
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"moov")])


def without_frames(path: Path) -> None:
    write_video(path, bars(), movflags="faststart")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"mdat") + 4])


NO_VIDEOS = {
    "sound.mp4": (sound_alone, "it contains no video, only audio"),
    "index.mp4": (without_index, "it is not a video that can be read"),
    "frames.mp4": (without_frames, "it contains no frame that can be decoded|it is not a video that can be read"),
    "text.mp4": (lambda path: path.write_text("no video"), "it is not a video that can be read"),
    "noise.mkv": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "it is not a video"),
    "empty.avi": (lambda path: path.write_bytes(b""), "it is not a video that can be read"),
}


def test_a_file_that_is_not_a_video_is_named_and_the_rest_is_segmented(model, tmp_path, capsys):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name, (write, _) in NO_VIDEOS.items():
        write(videos / name)
    write_video(videos / "good.mp4", bars(3))
    assert run(videos, "--output", tmp_path / "out") == 1
    printed = capsys.readouterr()
    for name, (_, reason) in NO_VIDEOS.items():
        assert re.search(rf"skipped \S*{name}: ({reason})", printed.err), (name, printed.err)
    assert "segmented: 1, skipped: 6" in printed.out
    expected = ["good_labels.npz", "good_overlay.mp4", "good_video.json", "legend.json", "legend.png"]
    assert files(tmp_path / "out") == expected


def test_nonfinite_scores_keep_the_results_of_an_earlier_run(model, tmp_path, capsys, monkeypatch):
    write_video(tmp_path / "a.mp4", bars())
    assert run(tmp_path / "a.mp4", "--output", tmp_path / "out") == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")}
    called = ThresholdModel.__call__

    def fail(self, pixel_values):
        outputs = called(self, pixel_values)
        if len(self.sizes) == 17:
            outputs.logits[0, 0, 0, 0] = float("nan")
        return outputs

    monkeypatch.setattr(ThresholdModel, "__call__", fail)
    assert run(tmp_path / "a.mp4", "--output", tmp_path / "out") == 1
    assert "a.mp4: The scores of an image hold NaN or infinite values" in capsys.readouterr().err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out")} == before


@pytest.mark.parametrize("address", ["rtsp://me:secret@127.0.0.1:1/live", "http://me:secret@127.0.0.1:1/a.m3u8"])
def test_a_url_that_cannot_be_opened_is_named_without_its_password(model, tmp_path, capsys, address):
    assert run(address, "--output", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert re.search("skipped (rtsp|http)://127.0.0.1:1/.*: .+", printed.err)
    assert "secret" not in printed.err + printed.out


def test_a_missing_package_is_named_with_its_extra(model, tmp_path, capsys, monkeypatch):
    write_video(tmp_path / "a.mp4", bars(3))
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(tmp_path / "a.mp4", "--output", tmp_path / "out") == 2
    assert 'videos need the package av: pip install "mfuser[video]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.mp4", "--confidence"], "--confidence applies to images, but the inputs are videos"),
        (["a.mp4", "--panel"], "--panel applies to images, but the inputs are videos"),
        (["a.png", "--smoothing", "0.5"], "--smoothing applies to videos, but the inputs are images"),
        (["a.mp4", "--frame-rate", "25"], "--frame-rate applies to numbered frames; give them as a pattern"),
        (["a.png", "--frame-rate", "25"], "--frame-rate applies to numbered frames; give them as a pattern"),
    ],
)
def test_an_option_without_an_effect_is_refused(model, tmp_path, capsys, arguments, message):
    write_video(tmp_path / "a.mp4", bars(1))
    write_image(tmp_path / "a.png")
    assert run(tmp_path / arguments[0], *arguments[1:], "--output", tmp_path / "out") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--smoothing", "1"], "must be less than 1"),
        (["--smoothing", "-0.1"], "between 0 and 1"),
        (["--frame-rate", "0"], "above 0"),
        (["--frame-rate", "1/0"], "above 0"),
    ],
)
def test_wrong_values_are_explained(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run("a.mp4", *arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


# --- ends: signals, kills, full disks --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("live", [False, True])
def test_a_signal_finishes_the_files_of_a_video(model, tmp_path, capsys, monkeypatch, number, live):
    path = tmp_path / "drive.mkv"
    write_video(path, bars(200), sound="aac")
    called = ThresholdModel.__call__

    def signalled(self, pixel_values):
        if len(self.sizes) == 20:
            os.kill(os.getpid(), number)
        return called(self, pixel_values)

    monkeypatch.setattr(ThresholdModel, "__call__", signalled)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    given = f"file://{path}" if live else path
    later = tmp_path / "later.mkv"
    write_video(later, bars(3))
    assert run(given, later, "--output", tmp_path / "out") == (0 if live else 130)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    printed = capsys.readouterr()
    assert "finishing the files" in printed.err and re.search(r"drive.mkv: \d+ frames, stopped", printed.out)
    labels, _ = labels_in(tmp_path / "out" / "drive_labels.npz")
    assert 20 <= len(labels) < 60
    overlays, _, sound = read_video(tmp_path / "out" / "drive_overlay.mp4")
    assert len(overlays) == len(labels) and sound
    assert not record_in(tmp_path / "out" / "drive_video.json")["complete"]
    assert not [name for name in files(tmp_path / "out") if name.endswith(".tmp")]
    # A signal is the end of a live source, after which the next one follows; of a video, it ends the command.
    assert [name for name in files(tmp_path / "out") if name.startswith("later")] == (
        ["later_labels.npz", "later_overlay.mp4", "later_video.json"] if live else []
    )


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault_injection.kill, fault_injection.fill_disk])
def test_the_results_of_a_video_are_complete_whenever_a_run_ends(model, tmp_path, fault):
    path, output = tmp_path / "a.mp4", tmp_path / "out"

    def segmented() -> int:
        return run(path, "--output", output)

    write_video(path, bars(6))
    assert segmented() == 0
    before = {name: (output / name).read_bytes() for name in files(output)}
    write_video(path, bars(9))
    _, operations = fault_injection.run(segmented, output)
    assert operations >= 8
    for at in range(operations):
        for name, content in before.items():
            (output / name).write_bytes(content)
        code, _ = fault_injection.run(segmented, output, fault, at)
        assert code in ((-signal.SIGKILL,) if fault is fault_injection.kill else (0, 1, 2))
        numbers = {len(labels_in(output / "a_labels.npz")[0]), len(read_video(output / "a_overlay.mp4")[0])}
        record = record_in(output / "a_video.json")
        assert numbers <= {6, 9}
        if record["complete"]:
            assert numbers == {record["frames"]}, "the record does not fit the files"
        if fault is fault_injection.fill_disk:
            assert not [name for name in files(output) if name.endswith(".tmp")]


# --- existing results ------------------------------------------------------------------------------------------------


def test_finished_videos_are_skipped_and_others_are_not(model, tmp_path, capsys, monkeypatch):
    write_video(tmp_path / "a.mp4", bars(3))

    def done(*arguments) -> bool:
        frames = len(model.sizes)
        assert run(tmp_path / "a.mp4", "--output", tmp_path / "out", "--skip-existing", *arguments) == 0
        assert (len(model.sizes) == frames) == ("already done: 1" in capsys.readouterr().out)
        return len(model.sizes) == frames

    assert not done()
    assert done() and done()
    assert not done("--smoothing", "0.5") and done("--smoothing", "0.5")
    assert not done() and not done("--alpha", "0.3")
    assert not done()
    monkeypatch.setattr(model.config, "to_dict", lambda: {"another": "model"})
    assert not done() and done()
    write_video(tmp_path / "a.mp4", bars(4))
    assert not done() and done()
    record = record_in(tmp_path / "out" / "a_video.json")
    (tmp_path / "out" / "a_video.json").write_text(json.dumps(record | {"complete": False}))
    assert not done()
    (tmp_path / "out" / "a_overlay.mp4").unlink()
    assert not done()


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [30, 300])
def test_the_number_of_frames_in_memory_does_not_grow_with_the_video(model, tmp_path, monkeypatch, number):
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    class Counted(video.Frame):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

        def __init__(self, pixels, time):
            nonlocal most
            super().__init__(pixels, time)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(video, "Frame", Counted)
    write_video(tmp_path / "a.mkv", bars(number))
    torch.set_num_threads(2)
    try:
        assert run(tmp_path / "a.mkv", "--output", tmp_path / "out", "--smoothing", "0.5") == 0
    finally:
        torch.set_num_threads(1)
    assert 0 < most <= segment_video.FRAMES_AHEAD + 2 * (2 + 1) + 6
    assert len(labels_in(tmp_path / "out" / "a_labels.npz")[0]) == number


@pytest.mark.slow
def test_a_video_four_times_as_long_takes_no_more_memory(tmp_path, saved_model):
    peaks = {}
    for number in (100, 400):
        write_video(tmp_path / f"{number}.mp4", bars(number, height=240, width=320), sound="aac")
        video, output = tmp_path / f"{number}.mp4", tmp_path / "out"
        peaks[number] = segment_peak_mebibytes(video, "--model", saved_model, "--output", output, "--size", "128x96")
    assert peaks[400] < peaks[100] + 40, peaks


def test_results_depend_on_every_weight_and_not_on_where_or_by_which_version_the_model_was_saved(monkeypatch):
    model, other = tiny_model(), tiny_model()
    other.load_state_dict(model.state_dict())
    other.config._name_or_path = "elsewhere"
    other.config.auto_map = {"AutoModel": "modeling_mfuser.MFuserModel"}  # as after `save_pretrained`
    other.config.architectures = ["MFuserForSemanticSegmentation"]
    processor = MFuserImageProcessor()
    with monkeypatch.context() as later:
        later.setattr("transformers.configuration_utils.__version__", "99.0")
        assert other.config.to_dict()["transformers_version"] == "99.0"
        settings = settings_of(other, processor, {})
    assert settings_of(model, processor, {}) == settings
    for name, tensor in list(other.state_dict().items())[:: len(other.state_dict()) // 20]:
        before = tensor.clone()
        tensor.view(-1)[-1:] += 1
        assert settings_of(model, processor, {}) != settings_of(other, processor, {}), name
        tensor.copy_(before)


def test_the_hash_of_weights_that_torchao_quantised_depends_on_them():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    hashes = set()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(32, 32, bias=False))
        quantize_(model, Int8WeightOnlyConfig())
        hashes.add(weights_hash(model))
    assert len(hashes) == 2


def test_a_video_that_is_stopped_before_its_first_frame_is_named(model, tmp_path, capsys, monkeypatch):
    write_video(tmp_path / "a.mp4", bars(3), sound="aac")
    monkeypatch.setattr(segment_video, "_batches", lambda *_: iter(()))
    assert run(tmp_path / "a.mp4", "--output", tmp_path / "out") == 1
    assert "a.mp4: it was stopped before its first frame" in capsys.readouterr().err


def test_a_signal_ends_the_command_also_if_the_video_fails(model, tmp_path, capsys, monkeypatch):
    def failing(source, job, stop, *_):
        stop.set()
        raise OSError("disk full")

    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, bars(3))
    monkeypatch.setattr(segment, "segment_video", failing)
    assert run(tmp_path / "a.mp4", tmp_path / "b.mp4", "--output", tmp_path / "out") == 130
    errors = capsys.readouterr().err
    assert "a.mp4: disk full" in errors and "b.mp4" not in errors


def test_a_relative_name_with_a_colon_is_a_file(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "12:30:00.mp4", bars(3))
    (tmp_path / "12:30:00.mp4").with_name("13:30:00").write_bytes((tmp_path / "12:30:00.mp4").read_bytes())
    assert run("12:30:00.mp4", "13:30:00", "--output", "out") == 0  # also where the content tells that it is a video
    assert {"12:30:00_overlay.mp4", "13:30:00_overlay.mp4"} <= set(files(tmp_path / "out"))


def test_results_of_a_video_that_another_process_wrote_in_the_meantime_are_kept(model, tmp_path, capsys, monkeypatch):
    for folder, frames in (("ours", 3), ("theirs", 5)):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "a.mp4", bars(frames))
    load = segment.load_for_inference

    def meanwhile(*arguments):
        monkeypatch.setattr(segment, "load_for_inference", load)
        assert run(tmp_path / "theirs/a.mp4", "--output", tmp_path / "out") == 0
        return load(*arguments)

    monkeypatch.setattr(segment, "load_for_inference", meanwhile)
    assert run(tmp_path / "ours/a.mp4", "--output", tmp_path / "out") == 1
    assert "holds results that another process has written" in capsys.readouterr().err
    assert len(labels_in(tmp_path / "out/a_labels.npz")[0]) == 5


def test_mp3_audio_is_kept_in_an_mp4():
    sound = SimpleNamespace(codec_context=SimpleNamespace(name="mp3float"))  # the name of FFmpeg's decoder
    assert video.container_format(SimpleNamespace(sound=[sound])) == "mp4"
