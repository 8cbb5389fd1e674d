"""Parts that an ablation removes have no parameters and no effect; the published model is unchanged."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import run_ablation
import torch
import yaml
from colour_scorer import pixels_and_labels, write_dataset
from tiny_models import save_tiny_encoders, tiny_batch, tiny_config, tiny_model

from mfuser import MFuserConfig, MFuserForSemanticSegmentation
from mfuser.data.tables import CAMVID

VARIANTS = {
    "no fusion": dict(use_fusion=False),
    "no MTEnhancer": dict(use_enhancer=False),
    "one encoder": dict(use_fusion=False, use_vfm=False, fusion_layer_pairs=None),
}
REMOVED = {
    "no fusion": ("mvfuser", "vfm_in_proj", "vfm_out_proj"),
    "no MTEnhancer": ("enhancer",),
    "one encoder": ("mfuser.vfm", "fusion_layers", "merge_proj"),
}


def names(model) -> set[str]:
    return {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "pair", ["dinov2+clip", "dinov2_with_registers+eva02_clip", "dinov3+siglip2", "deeper dinov2+clip"]
)
def test_a_removed_part_has_no_parameters_and_the_rest_trains(pair, variant):
    full, model = tiny_model(pair), tiny_model(pair, **VARIANTS[variant], freeze_encoders=False)
    gone = names(full) - names(model)
    parts = REMOVED[variant]
    in_enhancer = {name for name in names(full) if "enhancer" in name and variant != "no MTEnhancer"}
    assert gone == {name for name in names(full) if any(part in name for part in parts)} - in_enhancer
    assert names(model) < names(full)
    model.train()
    model(**tiny_batch()).loss.backward()
    assert [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None] == []


def test_without_fusion_the_encoders_exchange_nothing():
    pixels = tiny_batch()["pixel_values"]
    for fused in (True, False):
        model = tiny_model(use_fusion=fused).mfuser
        before = model(pixels, output_hidden_states=True)
        with torch.no_grad():
            model.vfm.vision.embeddings.cls_token += 1
        after = model(pixels, output_hidden_states=True)
        same = torch.equal(before.last_hidden_state, after.last_hidden_state)
        assert same is not fused  # the tokens of the vision-language model
        assert not torch.equal(before.vfm_hidden_states[-1], after.vfm_hidden_states[-1])


def test_without_the_enhancer_class_embeddings_do_not_depend_on_the_image():
    first, second = tiny_batch()["pixel_values"].split(1)
    for enhanced in (True, False):
        model = tiny_model(use_enhancer=enhanced).mfuser
        texts = [model(pixels).text_embeddings for pixels in (first, second)]
        assert torch.equal(*texts) is not enhanced
        if not enhanced:
            torch.testing.assert_close(texts[0][0], model.class_embeddings(), rtol=0, atol=0)


def test_one_encoder_alone_is_the_vision_language_model():
    pixels = tiny_batch()["pixel_values"]
    model = tiny_model(**VARIANTS["one encoder"]).mfuser
    outputs = model(pixels)
    states, inputs = model.vlm(pixels)
    states = model.vlm.run_layers(range(4), inputs, [0.0] * 4, states)
    torch.testing.assert_close(outputs.last_hidden_state, states)
    grid = outputs.fused_maps[-1]
    torch.testing.assert_close(grid.flatten(2).transpose(1, 2), states[:, 1:])
    merged = model.vlm.visual_projection(model.vlm.vision.post_layernorm(states))
    torch.testing.assert_close(outputs.global_embedding, merged[:, :1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_saved_loaded_and_segment_images_of_any_size(variant, tmp_path):
    model = tiny_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded = MFuserForSemanticSegmentation.from_pretrained(tmp_path)
    pixels = tiny_batch((80, 100), batch=1)["pixel_values"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=1e-5)
    assert {name: getattr(loaded.config, name) for name in VARIANTS[variant]} == VARIANTS[variant]


def test_settings_that_leave_nothing_to_fuse_are_refused(tmp_path):
    with pytest.raises(ValueError, match="a single encoder has nothing to fuse: it needs use_fusion=False"):
        tiny_config(use_vfm=False)
    with pytest.raises(ValueError, match="nothing to fuse"):
        tiny_config("deeper dinov2+clip", use_vfm=False, use_fusion=False)
    with pytest.raises(Exception, match="use_fusion"):
        tiny_config(use_fusion="no")
    with pytest.raises(ValueError, match="needs use_vfm=True"):
        MFuserForSemanticSegmentation.from_vfm_vlm_pretrained(
            **save_tiny_encoders(tmp_path), class_names=["road"], use_vfm=False, use_fusion=False
        )
    model = tiny_model(**VARIANTS["one encoder"])
    with pytest.raises(ValueError, match="trainable_only is for models with both encoders"):
        model.save_pretrained(tmp_path / "model", trainable_only=True)


def test_one_encoder_has_the_parameters_of_both():
    recipe = yaml.safe_load((run_ablation.RECIPES / "tiny.yaml").read_text())["model_config"]
    counts = {}
    for variant, changes in run_ablation.read_variants().items():
        config = json.loads(json.dumps(recipe))
        for name, value in changes.items():
            place = config
            *parents, last = name.split(".")[1:]
            for parent in parents:
                place = place[parent]
            place[last] = value
        with torch.device("meta"):
            counts[variant] = MFuserForSemanticSegmentation(MFuserConfig(num_labels=11, **config)).num_parameters()
    assert counts["one_encoder"] == pytest.approx(counts["mvfuser"], rel=0.01)
    assert counts["no_fusion"] < counts["mvfuser"] > counts["no_enhancer"]


# the script


def result(day: float, dusk: float) -> dict:
    return {"domains": {"camvid:validation": {"mean_iou": day}, "camvid:dusk": {"mean_iou": dusk}}}


def test_the_table_holds_mean_and_deviation_over_seeds_and_differences_of_equal_seeds():
    results = {
        "mvfuser": {0: result(0.5, 0.3), 1: result(0.6, 0.4)},
        "no_fusion": {0: result(0.4, 0.3), 1: result(0.52, 0.4)},
    }
    rows = run_ablation.summary(results, {"mvfuser": 1_900_000, "no_fusion": 1_500_000})
    day = rows["no_fusion"]["day"]
    assert day["mean"] == pytest.approx(0.46) and day["standard_deviation"] == pytest.approx(
        np.std([0.4, 0.52], ddof=1)
    )
    assert day["difference"]["mean"] == pytest.approx(-0.09)
    assert run_ablation.table(rows).splitlines()[2:] == [
        "| mvfuser | 1.90 M | 55.0 ± 7.1 | 35.0 ± 7.1 | +0.0 ± 0.0 | +0.0 ± 0.0 |",
        "| no_fusion | 1.50 M | 46.0 ± 8.5 | 35.0 ± 7.1 | -9.0 ± 1.4 | +0.0 ± 0.0 |",
    ]


@pytest.mark.parametrize(("jobs", "threads"), [(1, 4), (2, 2), (8, 1)])
def test_runs_share_the_cores_and_each_has_its_seed_and_settings(jobs, threads, tmp_path, monkeypatch):
    """Commands that are not executed: a result holds the seed of its run."""
    seen = []

    def execute(command, env, **_):
        seen.append((command, env["OMP_NUM_THREADS"]))
        folder = command[command.index("--output_dir") + 1] if "--output_dir" in command else None
        if folder is not None:
            tiny_model().save_pretrained(folder)
        return subprocess.CompletedProcess(command, 0)

    def read(output):
        variant, seed = output.stem.split("-")
        score = int(seed) / 10 + (variant == "no_fusion") / 100
        return result(score, score / 2)

    monkeypatch.setattr(run_ablation.subprocess, "run", execute)
    monkeypatch.setattr(run_ablation, "read_result", read)
    monkeypatch.setattr(run_ablation, "protocol_differences", lambda _: [])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    arguments = ["--data", "data", "--output", str(tmp_path), "--seeds", "3", "1", "--jobs", str(jobs)]
    run_ablation.main([*arguments, "--variants", "mvfuser", "no_fusion", "--", "max_steps=5"])
    assert {number for _, number in seen} == {str(threads)} and len(seen) == 8
    trained = {command[command.index("--output_dir") + 1]: command for command, _ in seen if "--output_dir" in command}
    assert len(trained) == 4
    for folder, command in trained.items():
        variant, seed = Path(folder).name.split("-")
        assert f"seed={seed}" in command and "max_steps=5" in command
        assert ("model_config.use_fusion=false" in command) is (variant == "no_fusion")
    rows = json.loads((tmp_path / "ablation.json").read_text())
    assert rows["mvfuser"]["day"]["mean_iou"] == pytest.approx([0.3, 0.1])
    assert rows["no_fusion"]["dusk"]["difference"]["mean"] == pytest.approx(0.005)


def test_runs_of_another_recipe_are_not_taken_for_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(run_ablation, "run", lambda *_, **__: None)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "tiny.yaml").write_text("max_steps: 2100\n")
    monkeypatch.setattr(run_ablation, "RECIPES", recipes)
    run_ablation.train(tmp_path / "mvfuser-0", Path("data"), ["seed=0"], threads=1)
    (tmp_path / "mvfuser-0/config.json").touch()
    run_ablation.train(tmp_path / "mvfuser-0", Path("data"), ["seed=0"], threads=1)
    (recipes / "tiny.yaml").write_text("max_steps: 1050\n")
    with pytest.raises(SystemExit, match="give another --output"):
        run_ablation.train(tmp_path / "mvfuser-0", Path("data"), ["seed=0"], threads=1)


def test_a_failed_run_ends_the_ablation_with_how_to_continue(tmp_path, monkeypatch):
    monkeypatch.setattr(run_ablation.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    with pytest.raises(SystemExit, match="train failed; the same command continues from here"):
        run_ablation.main(["--data", "data", "--output", str(tmp_path), "--jobs", "2"])


@pytest.mark.parametrize("jobs", ["0", "-1", "two"])
def test_a_number_of_jobs_that_runs_nothing_is_refused(jobs, capsys):
    with pytest.raises(SystemExit):
        run_ablation.parse_arguments(["--data", "data", "--jobs", jobs])
    assert "--jobs" in capsys.readouterr().err


@pytest.mark.slow
def test_the_ablation_runs_from_data_to_table_and_repeats_nothing(tmp_path, datasets_cache, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    for split in ("train", "validation", "dusk"):
        write_dataset(data / f"{split}.parquet", pixels_and_labels(4, classes=11, sizes=((64, 80),)))
    (data / "id2label.json").write_text(json.dumps(CAMVID.id2label))
    arguments = ["--data", str(data), "--output", str(tmp_path / "runs"), "--seeds", "0"]
    arguments += ["--variants", "mvfuser", "one_encoder", "--jobs", "2"]
    short = ["--", "max_steps=2", "save_steps=1", "warmup_steps=0", "per_device_train_batch_size=1"]
    short += ["augmentation.crop_size=64", "rare_class_min_pixels=1", "dataloader_num_workers=0", "use_cpu=true"]
    run_ablation.main([*arguments, *short])
    rows = json.loads((tmp_path / "runs/ablation.json").read_text())
    scores = json.loads((tmp_path / "runs/one_encoder-0.json").read_text())["domains"]
    assert rows["one_encoder"]["dusk"]["mean_iou"] == [scores["camvid:dusk"]["mean_iou"]]
    assert (tmp_path / "runs/ablation.md").read_text() == run_ablation.table(rows) + "\n"
    monkeypatch.setattr(run_ablation.subprocess, "run", lambda *_, **__: pytest.fail("a finished run is repeated"))
    run_ablation.main([*arguments, *short])
    with pytest.raises(SystemExit, match="was trained with .*'seed=0', 'max_steps=2'.*; give another --output"):
        run_ablation.main([*arguments, "--", "max_steps=3"])


def test_results_of_other_data_are_not_returned(tmp_path):
    run_ablation.write_text(
        tmp_path / run_ablation.SETTINGS, json.dumps({"data": "/elsewhere", "settings": ["seed=0"]})
    )
    with pytest.raises(SystemExit, match="was trained with .*/elsewhere.*give another --output"):
        run_ablation.train(tmp_path, Path("data"), ["seed=0"], 1)
