"""`mfuser train`: recipes, settings, and runs from the command line to a saved model."""

import json
import re
import shlex
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import CLASSES, DINOV2, VISION, tiny_tokenizer
from tiny_recipe import write_data, write_recipe
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, pipeline

from mfuser import MFuserForSemanticSegmentation, MFuserImageProcessor
from mfuser.data.augmentation import TrainingAugmentation
from mfuser.loading import load_model, saved_encoders
from mfuser.scripts import cli, train
from mfuser.scripts.settings import SettingsLoader, read_settings
from mfuser.scripts.train_arguments import parse_arguments

RECIPES = Path(__file__).parents[1] / "recipes"
PUBLISHED = ["gta5_clip", "gta5_eva02", "gta5_siglip", "cityscapes_clip", "cityscapes_eva02", "cityscapes_siglip"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Parquet files of eight images in horizontal strips of four classes, and the class names."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of a small DINOv2 and a small CLIP with tokenizer."""
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    fields = {name: value for name, value in DINOV2.items() if name != "model_type"}
    Dinov2Model(Dinov2Config(**fields)).save_pretrained(folder / "vfm")
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(max_position_embeddings=16, bos_token_id=49406, eos_token_id=49407)
    CLIPModel(CLIPConfig(vision_config=VISION, text_config=text, projection_dim=24)).save_pretrained(folder / "vlm")
    tiny_tokenizer().save_pretrained(folder / "vlm")
    return folder


@pytest.fixture
def recipe(tmp_path, data):
    return write_recipe(tmp_path, data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data):
    """Output folder of a finished run of the recipe. Tests must not change it."""
    folder = tmp_path_factory.mktemp("finished")
    assert train.main([str(write_recipe(folder, data))]) == 0
    return folder / "run"


def small_parts(recipe):
    """The fields of the recipe's model that are not its encoders."""
    fields = yaml.safe_load(recipe.read_text())["model_config"]
    return {name: value for name, value in fields.items() if "config" not in name and "encoder" not in name}


# --- settings --------------------------------------------------------------------------------------------------------


def test_the_command_line_overrides_the_recipe(recipe):
    arguments = ["--learning_rate", "1e-4", "max_steps=7", "model_config.crop_size=96", "--resume", "true"]
    settings = read_settings([str(recipe), *arguments, "eval_strategy=no"])
    assert settings["learning_rate"] == 1e-4 and settings["max_steps"] == 7
    assert settings["resume"] is True and settings["eval_strategy"] == "no"
    assert settings["model_config"]["crop_size"] == 96 and settings["model_config"]["crop_stride"] == 42


@pytest.mark.parametrize("name", [*PUBLISHED, "synthia_eva02"])
def test_the_published_recipes_hold_the_published_numbers(name):
    settings = read_settings([str(RECIPES / f"{name}.yaml")])
    parse_arguments([str(RECIPES / f"{name}.yaml")])  # refuses unknown settings
    clip = name.endswith("clip")
    wanted = {
        "learning_rate": 1e-4, "weight_decay": 1e-4 if clip else 1e-5, "decay_embeddings": clip, "max_steps": 20_000,
        "warmup_steps": 1_500, "warmup_start": 1e-6, "schedule_power": 0.9, "min_learning_rate": 1e-6, "seed": 2023,
        "per_device_train_batch_size": 2, "rare_class_sampling": True, "rare_class_temperature": 100,
        "rare_class_min_pixels": 3000, "max_grad_norm": 0, "train_data": f"data/{name.split('_')[0]}",
    }  # fmt: skip
    assert {key: settings[key] for key in wanted} == wanted
    assert settings["model_config"] == {"crop_size": 512, "crop_stride": 341}
    assert TrainingAugmentation(crop_size=512).scale_range == (0.5, 2.0) and "augmentation" not in settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no.yaml"], "the recipe no.yaml does not exist; the published recipes are in"),
        (["--learning_rat", "1"], "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
        (["--learning_rate"], "--learning_rate has no value"),
        (["max_steps=1", "output_dir=x"], "train_data is missing"),
    ],
)
def test_wrong_arguments_are_explained(arguments, message, capsys):
    assert train.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_model_given_in_two_ways_is_refused(recipe, capsys):
    assert train.main([str(recipe), "model=a", "vfm=b", "vlm=c"]) == 2
    assert "model=a, vfm=b, vlm=c; give either `model`" in capsys.readouterr().err


def test_saving_only_trainable_weights_needs_known_encoders(recipe, capsys):
    assert train.main([str(recipe), "save_trainable_only=true", "model_config.freeze_encoders=true"]) == 2
    assert "pass encoders=" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model_config.num_labels=7", "num_labels is 7; the training data has 4 classes (road, sky, car, person)"),
        ("model_config.id2label={0: a}", "id2label is {0: 'a'}; the training data has the classes road, sky, car"),
        ("model_config.label2id={road: 1}", "label2id is {'road': 1}; the training data has the classes road, sky"),
        ("model_config.patch_size=16", "model_config.patch_size cannot be set without `vfm` and `vlm`"),
        ("model_config.crop_stride=65", "crop_stride is 65; it must be between 1 and crop_size (64)"),
    ],
)
def test_a_model_config_that_contradicts_the_data_is_refused(setting, message, recipe, tmp_path, capsys):
    assert train.main([str(recipe), setting]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_whose_weights_are_incomplete_or_damaged_is_not_trained_further(finished, recipe, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(finished, broken, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(finished / "model.safetensors")
    name = "decoder.query_position_embedding"
    further = [str(recipe), f"model={broken}", "model_config={}", f"output_dir={tmp_path / 'further'}"]
    for tensors, message in (
        (
            {key: value for key, value in weights.items() if key != name},
            f"lacks 1 of the model's weights, such as {name}",
        ),
        (weights | {name: weights[name][:2].clone()}, "do not fit"),
    ):
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
        assert train.main(further) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mfuser train: ")]
        assert message in line
    (broken / "model.safetensors").write_bytes((finished / "model.safetensors").read_bytes()[:5000])
    assert train.main(further) == 2
    assert not (tmp_path / "further").exists()


def test_one_source_or_several_are_given_with_a_split_for_all_or_for_each():
    def data(*settings):
        return parse_arguments(["output_dir=x", *settings])[1]

    assert (data("train_data=a").train_data, data("train_data=a").train_split) == (["a"], ["train"])
    assert data("train_data=[a,b]", "train_split=day").train_split == ["day", "day"]
    assert data("train_data=[a,b]", "train_split=[day,night]").train_split == ["day", "night"]
    assert data("train_data=[a,b]", "train_weights=[1,0.5]").train_weights == [1, 0.5]
    with pytest.raises(ValueError, match="give one split for all of them, or one for each"):
        data("train_data=[a,b,c]", "train_split=[day,night]")
    with pytest.raises(ValueError, match="weights require a list of several train_data"):
        data("train_data=a", "train_weights=[1]")


@pytest.mark.parametrize("name", ["gta5_synthia", "gta5_synthia_urbansyn"])
@pytest.mark.parametrize("crop", [512, 1024])
def test_the_recipes_of_several_sources_differ_from_the_published_ones_in_data_and_crop_alone(name, crop):
    settings = read_settings([str(RECIPES / f"{name}_eva02_{crop}.yaml")])
    assert settings["train_data"] == [f"data/{source}" for source in name.split("_")]
    assert settings["model_config"] == {"crop_size": crop, "crop_stride": {512: 341, 1024: 683}[crop]}
    published = read_settings([str(RECIPES / "gta5_eva02.yaml")])
    own = {"train_data", "output_dir", "model_config"}
    assert {key: settings[key] for key in set(settings) - own} == {key: published[key] for key in set(published) - own}
    parse_arguments([str(RECIPES / f"{name}_eva02_{crop}.yaml")])


# --- runs ------------------------------------------------------------------------------------------------------------


def weights_in(folder):
    return MFuserForSemanticSegmentation.from_pretrained(folder).state_dict()


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_a_finished_run_has_a_card_and_a_model_for_the_stock_pipeline(finished):
    card = (finished / "README.md").read_text()
    assert "2 steps of 2 crops of 64 pixels" in card and "Mean IoU on the split validation" in card
    config = json.loads((finished / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForSemanticSegmentation"}
    parts = pipeline("image-segmentation", model=str(finished), trust_remote_code=True)(Image.new("RGB", (96, 72)))
    assert {part["label"] for part in parts} <= set(CLASSES)


@pytest.fixture
def steps(monkeypatch):
    """The training steps that are computed, one item for each."""
    computed = []
    training_step = train.MFuserTrainer.training_step

    def counting(trainer, *args, **kwargs):
        computed.append(trainer.state.global_step)
        return training_step(trainer, *args, **kwargs)

    monkeypatch.setattr(train.MFuserTrainer, "training_step", counting)
    return computed


def test_an_interrupted_run_is_resumed_from_its_last_checkpoint_and_ends_with_the_same_weights(
    finished, recipe, tmp_path, steps
):
    (tmp_path / "run").mkdir()
    shutil.copytree(finished / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    assert train.main([str(recipe), "--resume", "true"]) == 0
    assert steps == [1]  # the first step is not repeated
    assert_same_weights(weights_in(tmp_path / "run"), weights_in(finished))


def write_second_source(folder):
    """Parquet files of four images, labelled with two of the four classes under other ids."""
    rows = {"image": [], "label": []}
    for seed in range(4):
        label = np.random.default_rng(seed).integers(0, 2, size=(72, 96), dtype=np.uint8)
        rows["image"].append(Image.fromarray(np.stack([label * 90] * 3, axis=-1)))
        rows["label"].append(Image.fromarray(label))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    folder.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "train.parquet")
    (folder / "id2label.json").write_text(json.dumps({0: CLASSES[3], 1: CLASSES[0]}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["source", "joint"])
def test_a_run_on_two_sources_is_resumed_with_the_same_weights(recipe, data, tmp_path, steps, scope):
    second = write_second_source(tmp_path / "second")
    settings = [str(recipe), f"train_data=[{data}, {second}]", "train_weights=[1, 2]", f"rare_class_scope={scope}"]
    settings.append("eval_strategy=no")
    assert train.main([*settings, f"output_dir={tmp_path / 'whole'}"]) == 0
    (tmp_path / "run").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-1", tmp_path / "run" / "checkpoint-1")
    assert train.main([*settings, "--resume", "true"]) == 0
    assert steps == [0, 1, 1]
    assert_same_weights(weights_in(tmp_path / "run"), weights_in(tmp_path / "whole"))
    assert json.loads((tmp_path / "run/config.json").read_text())["id2label"]["3"] == CLASSES[3]
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"{data.name}, split train and second, split train: 2 steps" in card


def test_validation_data_must_have_the_classes_of_all_sources_together(recipe, data, tmp_path, capsys):
    second = write_second_source(tmp_path / "second")
    assert train.main([str(recipe), f"train_data=[{second}, {data}]"]) == 2
    assert "together have the classes person, road, sky, car; " in capsys.readouterr().err


def test_a_named_checkpoint_is_resumed(finished, recipe, tmp_path, steps):
    assert train.main([str(recipe), "--resume", str(finished / "checkpoint-1")]) == 0
    assert steps == [1]


def test_resuming_a_finished_run_changes_no_weight(finished, recipe, tmp_path, steps):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert train.main([str(recipe), "--resume", "true"]) == 0
    assert steps == []
    assert_same_weights(weights_in(tmp_path / "run"), weights_in(finished))


@pytest.mark.slow
def test_a_run_killed_between_its_last_checkpoint_and_its_result_ends_with_the_best_weights(
    recipe, tmp_path, steps, monkeypatch
):
    def score(trainer, *unused, **more_unused):
        return {"mean_iou": 1 / trainer.state.global_step}  # the first checkpoint is the best

    monkeypatch.setattr(train.MFuserTrainer, "_score", score)
    best = ["load_best_model_at_end=true", "eval_strategy=steps", "eval_steps=1", "metric_for_best_model=mean_iou"]
    run = tmp_path / "run"
    assert train.main([str(recipe), *best]) == 0
    whole = weights_in(run)
    for name in ("model.safetensors", "config.json", "README.md"):  # what is saved after the training
        (run / name).unlink()
    assert train.main([str(recipe), *best, "resume=true"]) == 0
    assert steps == [0, 1]
    assert_same_weights(weights_in(run), whole)
    assert_same_weights(weights_in(run), weights_in(run / "checkpoint-1"))


def test_a_trained_model_is_trained_further(finished, recipe, tmp_path):
    arguments = [f"model={finished}", "model_config={}", f"output_dir={tmp_path / 'further'}", "max_steps=1"]
    trainer = train.build_trainer(*parse_arguments([str(recipe), *arguments]))
    assert_same_weights(trainer.model.state_dict(), weights_in(finished))
    assert train.main([str(recipe), *arguments]) == 0
    assert (tmp_path / "further" / "model.safetensors").is_file()


def test_a_model_that_ignores_another_label_than_the_data_is_refused_until_it_is_set(finished, recipe, tmp_path):
    model = shutil.copytree(finished, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((model / "config.json").read_text()) | {"semantic_loss_ignore_index": 254}
    (model / "config.json").write_text(json.dumps(config))
    arguments = [str(recipe), f"model={model}", "model_config={}"]
    with pytest.raises(ValueError, match="254; .* set model_config.semantic_loss_ignore_index=255"):
        train.build_trainer(*parse_arguments(arguments))
    trainer = train.build_trainer(*parse_arguments([*arguments, "model_config.semantic_loss_ignore_index=255"]))
    assert trainer.model.config.semantic_loss_ignore_index == 255


def test_training_normalises_as_the_image_processor_that_is_saved(finished, recipe, tmp_path):
    def prepared(*settings):
        trainer = train.build_trainer(*parse_arguments([str(recipe), *settings]))
        augmentation, processor = trainer.train_dataset.augmentation, trainer.processing_class
        assert processor is trainer.eval_dataset.image_processor
        assert list(augmentation.image_mean) == list(processor.image_mean)
        assert list(augmentation.image_std) == list(processor.image_std)
        return processor

    assert list(prepared().image_mean) == list(MFuserImageProcessor.image_mean)
    given = prepared("augmentation.image_mean=[0,0.5,1]", "augmentation.image_std=[1,1,1]")
    assert (list(given.image_mean), list(given.image_std)) == ([0, 0.5, 1], [1, 1, 1])
    model = shutil.copytree(finished, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    size = {"height": 48, "width": 64}
    MFuserImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=0.5, size=size).save_pretrained(model)
    further = (f"model={model}", "model_config={}")
    own = prepared(*further)
    assert (own.image_mean, own.image_std) == ([0.1, 0.2, 0.3], [0.5] * 3)
    assert own.do_resize and dict(own.size) == size
    assert prepared(*further, "augmentation.image_mean=[0,0,0]").image_std == [0.5] * 3
    assert dict(prepared(*further, "validation_size.shortest_edge=32").size) == {"shortest_edge": 32}
    MFuserImageProcessor(do_rescale=False).save_pretrained(model)
    with pytest.raises(ValueError, match="model has do_rescale False; it must be True, as in training"):
        prepared(*further)
    (model / "preprocessor_config.json").unlink()
    assert list(prepared(*further).image_mean) == list(MFuserImageProcessor.image_mean)


@pytest.mark.parametrize("temperature", [0.05, 100.0])
def test_the_recipes_sampling_settings_reach_the_sampler(recipe, data, temperature):
    arguments = [str(recipe), f"rare_class_temperature={temperature}", "rare_class_min_pixels=150", "seed=7"]
    sampler = train.build_trainer(*parse_arguments(arguments)).train_sampler
    rows = datasets.Dataset.from_parquet(str(data / "train.parquet"))
    counts = np.array(
        [np.bincount(np.asarray(label).ravel(), minlength=256)[: len(CLASSES)] for label in rows["label"]]
    )
    weights = np.exp((1 - counts.sum(axis=0) / counts.sum()) / temperature)
    np.testing.assert_allclose(sampler.probabilities, weights / weights.sum(), rtol=1e-9)
    assert [held.tolist() for held in sampler.rows] == [np.flatnonzero(held > 150).tolist() for held in counts.T]
    assert sampler.seed == 7


@pytest.mark.parametrize("several", [False, True])
def test_the_seed_of_a_recipe_is_that_of_the_draws_and_of_the_augmentation(recipe, data, several, tmp_path):
    settings = [str(recipe), "seed=7"]
    if several:
        settings += [f"train_data=[{data}, {write_second_source(tmp_path / 'second')}]", "eval_strategy=no"]
    trainer = train.build_trainer(*parse_arguments(settings))
    samplers = getattr(trainer.train_sampler, "samplers", None) or []
    assert {each.seed for each in (trainer.train_dataset, trainer.train_sampler, *samplers)} == {7}


def test_without_rare_class_sampling_every_row_is_drawn_once_per_epoch(recipe):
    trainer = train.build_trainer(*parse_arguments([str(recipe), "rare_class_sampling=false"]))
    assert sorted(draw.row for draw in trainer.train_sampler) == list(range(6))


@pytest.mark.slow
def test_a_model_saved_without_its_pretrained_encoders_works_in_every_command(recipe, tmp_path, encoders, data):
    settings = yaml.safe_load(recipe.read_text()) | {"model_config": small_parts(recipe), "save_steps": 2}
    settings |= {"vfm": str(encoders / "vfm"), "vlm": str(encoders / "vlm")}
    recipe.write_text(yaml.safe_dump(settings | {"save_trainable_only": True}))
    assert train.main([str(recipe)]) == 0
    run = tmp_path / "run"
    assert saved_encoders(run) == {key: settings[key] for key in ("vfm", "vlm")}
    model = load_model(run)
    pretrained = Dinov2Model.from_pretrained(encoders / "vfm").state_dict()
    for name, value in model.mfuser.vfm.vision.encoder.state_dict().items():
        assert torch.equal(value, pretrained[f"encoder.{name}"]), name
    assert_same_weights(load_model(run / "checkpoint-2").state_dict(), model.state_dict())
    assert not any(weight.requires_grad for weight in model.mfuser.vfm.parameters())

    # Such a folder works wherever a whole model does, with the same scores.
    model.save_pretrained(tmp_path / "whole")
    shutil.copy(run / "preprocessor_config.json", tmp_path / "whole")
    scores = []
    for folder in (run, tmp_path / "whole"):
        report = tmp_path / "report.json"
        arguments = ["--model", str(folder), "--domains", f"street:validation={data}", "--output", str(report)]
        assert cli.main(["evaluate", *arguments, "--device", "cpu", "--workers", "0"]) == 0
        scores.append(json.loads(report.read_text())["domains"])
    for domains in scores:
        del domains["street:validation"]["seconds"]
    assert scores[0] == scores[1]
    Image.new("RGB", (96, 72), (90, 120, 30)).save(tmp_path / "image.png")
    assert (
        cli.main(["segment", str(tmp_path / "image.png"), "--model", str(run), "--output", str(tmp_path / "out")]) == 0
    )
    further = [str(recipe), "vfm=null", "vlm=null", f"model={run}", "model_config={}", f"output_dir={tmp_path / 'b'}"]
    assert train.main([*further, "max_steps=1"]) == 0  # on top of the same encoders, and again without them
    assert (tmp_path / "b" / "encoders.json").read_text() == (run / "encoders.json").read_text()


@pytest.mark.slow
def test_data_with_other_classes_than_the_models_is_trained_on(finished, recipe, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "data")
    (other / "id2label.json").write_text(json.dumps(dict(enumerate(["a", "b", "sky", "d"]))))
    arguments = [str(recipe), f"model={finished}", "model_config={}", "max_steps=1"]
    arguments += [f"train_data={other}", f"validation_data={other}"]
    assert train.main([*arguments, f"output_dir={tmp_path / 'other'}"]) == 0
    model, before = load_model(tmp_path / "other"), load_model(finished)
    assert list(model.config.id2label.values()) == ["a", "b", "sky", "d"]
    # A step of AdamW changes no value by more than the learning rate.
    moved = model.decoder.query_position_embedding - before.decoder.query_position_embedding[1]
    assert moved[2].abs().max() < 2e-3 and moved[[0, 1, 3]].abs().max() > 0.1


# --- docs/fine_tuning.md ---------------------------------------------------------------------------------------------


def steps_of(document: Path) -> dict[str, str]:
    """The code blocks that follow `<!-- step: NAME -->`, by name."""
    return dict(re.findall(r"<!-- step: (\w+) -->\n```\w+\n(.*?)```", document.read_text(), flags=re.DOTALL))


@pytest.mark.slow
def test_the_steps_of_the_fine_tuning_guide_work(recipe, encoders, tmp_path, monkeypatch):
    steps = steps_of(Path(__file__).parents[1] / "docs" / "fine_tuning.md")
    assert list(steps) == ["pack", "recipe", "train", "evaluate", "segment"]
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    for split, number in (("train", 4), ("validation", 2)):
        for kind in ("images", "labels"):
            Path("street", split, kind).mkdir(parents=True)
        for index in range(number):
            label = np.sort(generator.integers(0, len(CLASSES), size=(72, 96)), axis=0).astype(np.uint8)
            Image.fromarray(label).save(Path("street", split, "labels", f"{index:04}.png"))
            Image.fromarray(np.stack([label * 60] * 3, axis=-1)).save(
                Path("street", split, "images", f"{index:04}.jpg")
            )
    exec(steps["pack"], {})

    settings = yaml.load(steps["recipe"], SettingsLoader)
    settings |= {"vfm": str(encoders / "vfm"), "vlm": str(encoders / "vlm"), "model_config": small_parts(recipe)}
    settings |= {"max_steps": 2, "warmup_steps": 1, "eval_steps": 1, "save_steps": 1, "rare_class_min_pixels": 100}
    settings |= {"use_cpu": True, "report_to": "none"}
    Path("street.yaml").write_text(yaml.safe_dump(settings))
    for step in ("train", "evaluate", "segment"):
        program, *arguments = shlex.split(steps[step])
        assert program == "mfuser" and cli.main(arguments) == 0, step
    assert "street:validation" in Path("street.json").read_text()
    assert len(list(Path("segmented").rglob("*.png"))) >= 2


# --- checkpoints/ ----------------------------------------------------------------------------------------------------


def test_the_demonstration_checkpoint_is_small_and_complete():
    folder = Path(__file__).parents[1] / "checkpoints" / "mfuser-tiny-camvid"
    assert (folder / "model.safetensors").stat().st_size <= 12e6
    _, report = MFuserForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
