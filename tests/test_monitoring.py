"""Monitored domains are scored and logged, but do not affect training or selection; validation sets can be named."""

import json
import math

import datasets
import numpy as np
import pytest
import torch
from distributed_worker import Samples
from PIL import Image
from tiny_models import CLASSES, tiny_batch, tiny_model
from torch.utils.data import Dataset

from mfuser import MFuserImageProcessor
from mfuser.data.draws import ShuffledSampler
from mfuser.data.validation import ValidationDataset, evenly_spaced
from mfuser.scripts import train
from mfuser.training import trainer as trainer_module
from mfuser.training.monitoring import check_validation_source, open_monitored_domains
from mfuser.training.trainer import MFuserTrainer, MFuserTrainingArguments

CLASS_NAMES = dict(enumerate(CLASSES))
REASON = "selecting on a target domain invalidates a domain-generalisation result"


class OtherSamples(Dataset):
    """Four samples that differ from the training samples; reading them uses every global random generator."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.rand(1), np.random.rand()  # noqa: NPY002
        return {name: value[index] for name, value in tiny_batch(batch=4, seed=1).items()}


def trainer_in(folder, monitored=None, eval_dataset=None, **fields):
    defaults = dict(
        max_steps=4, per_device_train_batch_size=2, save_strategy="no", logging_steps=2, report_to="none",
        use_cpu=True, learning_rate=1e-2, warmup_steps=2, monitor_steps=1,
    )  # fmt: skip
    return MFuserTrainer(
        tiny_model(freeze_encoders=False), MFuserTrainingArguments(str(folder), **(defaults | fields)), Samples(),
        ShuffledSampler(6), eval_dataset, monitored=monitored, processing_class=MFuserImageProcessor(),
    )  # fmt: skip


def write_split(file, seed, number=5, classes=CLASSES):
    generator = np.random.default_rng(seed)
    labels = [generator.integers(0, len(CLASSES), (64, 64)).astype(np.uint8) for _ in range(number)]
    rows = {
        "image": [Image.fromarray(np.stack([label * 60] * 3, axis=-1)) for label in labels],
        "label": [Image.fromarray(label) for label in labels],
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    file.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    (file.parent / "id2label.json").write_text(json.dumps(dict(enumerate(classes))))


@pytest.fixture
def data(tmp_path):
    for seed, split in enumerate(("train", "validation", "dusk")):
        write_split(tmp_path / "source" / f"{split}.parquet", seed)
    for seed, split in enumerate(("train", "validation"), start=3):
        write_split(tmp_path / "target" / f"{split}.parquet", seed)
    return tmp_path


def validation_of(file):
    return ValidationDataset(datasets.Dataset.from_parquet(str(file)), MFuserImageProcessor())


# --- no effect on training -------------------------------------------------------------------------------------------


def test_training_with_and_without_monitoring_is_bit_identical(tmp_path):
    with_it, without = trainer_in(tmp_path, {"night": OtherSamples()}), trainer_in(tmp_path)
    states = []
    for trainer in (without, with_it):
        torch.manual_seed(0)
        trainer.train()
        states.append((trainer.model.state_dict(), trainer.optimizer.state_dict()["state"], torch.get_rng_state()))
    assert "mfuser.pyramid.stride4.1.running_mean" in states[0][0]
    assert [name for name, value in states[0][0].items() if not torch.equal(value, states[1][0][name])] == []
    for index, state in states[0][1].items():
        assert all(torch.equal(value, states[1][1][index][name]) for name, value in state.items())
    assert torch.equal(states[0][2], states[1][2])
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (without, with_it)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_modes_and_random_states_are_restored(tmp_path):
    trainer = trainer_in(tmp_path, {"night": OtherSamples()})
    trainer.model.train()
    trainer.model.mfuser.pyramid.eval()
    modes = [module.training for module in trainer.model.modules()]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    trainer.monitor()
    assert [module.training for module in trainer.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_monitored_scores_are_logged_at_their_interval_and_equal_an_evaluation(tmp_path):
    night = OtherSamples()
    fields = dict(eval_strategy="steps", eval_steps=4, monitor_steps=2)
    trainer = trainer_in(tmp_path, {"night": night, "fog": Samples()}, Samples(), **fields)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "monitor_night_mean_iou" in log]
    assert [log["step"] for log in logs] == [2, 4] and all("monitor_fog_mean_iou" in log for log in logs)
    assert [log["step"] for log in trainer.state.log_history if "eval_mean_iou" in log] == [4]
    assert logs[-1]["monitor_night_mean_iou"] == trainer.evaluate(night)["eval_mean_iou"]
    assert not any("night" in name for name in trainer.evaluate())


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"num_train_epochs": 1, "max_steps": -1}])
def test_the_last_step_is_monitored_whatever_the_interval(tmp_path, length):
    trainer = trainer_in(tmp_path, {"night": OtherSamples()}, monitor_steps=500, **length)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "monitor_night_mean_iou" in log]
    assert [log["step"] for log in logs] == [3]


def test_each_domain_has_a_curve_in_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trainer_in(tmp_path, {"night": OtherSamples()}, report_to=["tensorboard"], max_steps=2)
    trainer.train()
    events = next(tmp_path.rglob("events.out.tfevents*"))
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("train/monitor_night_mean_iou")] == [1, 2]


# --- images without a score ------------------------------------------------------------------------------------------

WITHOUT_A_SCORE = {
    "smaller than a patch": ({"pixel_values": torch.zeros(3, 8, 8)}, "must be at least one patch"),
    "with scores of NaN": ({"pixel_values": torch.full((3, 64, 64), math.nan)}, "hold NaN or infinite values"),
    "with a label that is no class": ({"labels": torch.full((64, 64), 9)}, "label holds [9], which are neither class"),
}


@pytest.mark.parametrize("kind", WITHOUT_A_SCORE)
def test_an_image_without_a_score_is_named_and_left_out(kind, tmp_path, monkeypatch):
    change, message = WITHOUT_A_SCORE[kind]
    good = [OtherSamples()[index] for index in range(2)]
    with_bad = [good[0], good[0] | change, good[1]]
    trainer, warnings = trainer_in(tmp_path, {"night": with_bad, "fog": good}), []
    monkeypatch.setattr(trainer_module.logger, "warning", warnings.append)
    logs = trainer.monitor()
    assert logs["monitor_night_unreadable"] == 1 and logs["monitor_night_mean_iou"] == logs["monitor_fog_mean_iou"]
    (warning,) = warnings
    assert warning.startswith("Row 1 of the evaluated images: ") and message in warning
    with pytest.raises(ValueError, match="^Row 1 of the evaluated images: "):
        trainer.evaluate(with_bad)


def test_without_a_labelled_pixel_monitoring_goes_on_and_validation_is_an_error(tmp_path, monkeypatch):
    unlabelled = [OtherSamples()[0] | {"labels": torch.full((64, 64), 255)}]
    damaged = [{"error": "row 0: damaged"}]
    trainer, warnings = trainer_in(tmp_path, {"night": unlabelled, "fog": damaged}), []
    monkeypatch.setattr(trainer_module.logger, "warning", warnings.append)
    assert trainer.monitor() == {"monitor_fog_unreadable": 1}
    assert "The monitored domain 'night' has no score: no labelled pixel was counted." in warnings
    with pytest.raises(ValueError, match="no labelled pixel was counted in the validation images"):
        trainer.evaluate(unlabelled)
    with pytest.raises(ValueError, match="none of the validation images can be read"):
        trainer.evaluate(damaged)


# --- no selection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["monitor_night_mean_iou", "eval_night_mean_iou", "night_iou_sky", "night"])
def test_a_score_of_a_monitored_domain_cannot_select_a_checkpoint(tmp_path, metric):
    with pytest.raises(ValueError, match=f"metric_for_best_model is {metric}, .*{REASON}"):
        trainer_in(tmp_path, {"night": OtherSamples()}, Samples(), metric_for_best_model=metric)


def test_a_domain_whose_name_is_the_prefix_of_a_metric_does_not_exclude_it(tmp_path):
    trainer_in(tmp_path, {"mean": OtherSamples(), "iou": OtherSamples()}, Samples(), metric_for_best_model="mean_iou")


def test_a_monitored_domain_cannot_be_validation_data(tmp_path, data):
    night = OtherSamples()
    for validation in (night, {"source": Samples(), "other": night}, {"night": Samples()}):
        with pytest.raises(ValueError, match=f"'night' is also given as validation data: {REASON}"):
            trainer_in(tmp_path, {"night": night}, validation)
    target = {"night": f"{data / 'target'}"}
    monitored = open_monitored_domains(target, CLASS_NAMES, MFuserImageProcessor(), images=2)
    loaded = monitored["night"].dataset
    with pytest.raises(ValueError, match=REASON):  # the same files, opened as another object
        trainer_in(tmp_path, monitored, ValidationDataset(loaded, MFuserImageProcessor()))
    trainer_in(tmp_path, monitored, validation_of(data / "source" / "validation.parquet"))


def test_other_splits_of_a_target_domain_cannot_be_validation_data(data):
    source, target = str(data / "source"), str(data / "target")
    processor = MFuserImageProcessor()
    night = open_monitored_domains({"night": target}, CLASS_NAMES, processor)
    for validation in (target, f"{target}/train.parquet"):
        with pytest.raises(ValueError, match=f"belongs to the monitored domain 'night': {REASON}"):
            check_validation_source(validation, source, night)
    check_validation_source(source, source, night)
    # Splits of the source's folder may be target domains.
    check_validation_source(
        source, [source], open_monitored_domains({"dusk": f"{source}:dusk"}, CLASS_NAMES, processor)
    )


# --- opening ---------------------------------------------------------------------------------------------------------


def test_monitored_images_are_evenly_spaced_and_complete():
    assert evenly_spaced(3, 9) == [1, 4, 7] and evenly_spaced(50, 3) == evenly_spaced(None, 3) == [0, 1, 2]
    assert len(set(evenly_spaced(50, 500))) == 50
    with pytest.raises(ValueError, match="number of images is 0; it must be at least 1"):
        evenly_spaced(0, 3)


def test_a_monitored_domain_holds_the_samples_of_its_split(data):
    monitored = open_monitored_domains(
        {"dusk": f"{data / 'source'}:dusk"}, CLASS_NAMES, MFuserImageProcessor(), images=2
    )
    expected = validation_of(data / "source" / "dusk.parquet")
    assert len(monitored["dusk"]) == 2
    for sample, row in zip((monitored["dusk"][0], monitored["dusk"][1]), evenly_spaced(2, 5), strict=True):
        assert all(torch.equal(sample[name], value) for name, value in expected[row].items())


def test_other_classes_are_an_early_error(data):
    write_split(data / "other" / "validation.parquet", 0, classes=["road", "sky", "car", "tree"])
    with pytest.raises(ValueError, match="only the model has person; only night has tree"):
        open_monitored_domains({"night": str(data / "other")}, CLASS_NAMES, MFuserImageProcessor())


def test_the_interval_is_at_least_one_step(tmp_path):
    with pytest.raises(ValueError, match="monitor_steps is 0; it must be at least 1"):
        MFuserTrainingArguments(str(tmp_path), monitor_steps=0)


# --- several validation sets -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_validation_sets_are_scored_by_name_and_one_selects(tmp_path):
    sets = {"day": Samples(), "rain": OtherSamples()}
    fields = dict(eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, max_steps=2)
    fields |= dict(load_best_model_at_end=True, greater_is_better=True)
    trainer = trainer_in(tmp_path, None, sets, metric_for_best_model="day_mean_iou", **fields)
    trainer.train()
    metrics = trainer.evaluate()
    for name, dataset in sets.items():
        assert metrics[f"eval_{name}_mean_iou"] == trainer.evaluate(dataset)["eval_mean_iou"]
        assert metrics[f"eval_{name}_mean_iou"] == trainer.evaluate(name)["eval_mean_iou"]
        assert math.isfinite(metrics[f"eval_{name}_iou_sky"])
    assert trainer.state.best_metric == metrics["eval_day_mean_iou"]
    loop = trainer.evaluation_loop(trainer.get_eval_dataloader("rain"), "Evaluation")
    assert loop.num_samples == 4  # not the number of validation sets
    with pytest.raises(ValueError, match=r"eval_dataset is 'fog'; the named validation sets are \['day', 'rain'\]"):
        trainer.get_eval_dataloader("fog")
    with pytest.raises(ValueError, match=r"name one of \['day', 'rain'\]"):
        trainer.get_eval_dataloader()
    with pytest.raises(ValueError, match="it must name one of them, such as day_mean_iou"):
        trainer_in(tmp_path, None, sets, metric_for_best_model="mean_iou")


@pytest.mark.slow
def test_the_settings_of_mfuser_train_open_the_domains_and_refuse_selection(tmp_path, data):
    model = tiny_model(freeze_encoders=False)
    model.save_pretrained(tmp_path / "model")
    arguments = [
        f"model={tmp_path / 'model'}", f"train_data={data / 'source'}", f"validation_data={data / 'source'}",
        f"output_dir={tmp_path / 'run'}", f"monitor_data.night={data / 'target'}",
        f"monitor_data.dusk={data / 'source'}:dusk", "monitor_images=2", "monitor_steps=3", "use_cpu=true",
        "rare_class_sampling=false", "report_to=none",
    ]  # fmt: skip
    trainer = train.build_trainer(*train.parse_arguments(arguments))
    assert {name: len(dataset) for name, dataset in trainer.monitored.items()} == {"night": 2, "dusk": 2}
    assert trainer.args.monitor_steps == 3
    for refused in (
        [f"validation_data={data / 'target'}", "validation_split=train"],
        ["validation_split=dusk"],
        ["metric_for_best_model=monitor_dusk_mean_iou"],
    ):
        with pytest.raises(ValueError, match=REASON):
            train.build_trainer(*train.parse_arguments(arguments + refused))
    for unknown in ("mean_iuo", "loss", "eval_iou_tree"):
        with pytest.raises(ValueError, match=f"metric_for_best_model is {unknown}; it must be one of mean_iou,"):
            train.build_trainer(*train.parse_arguments([*arguments, f"metric_for_best_model={unknown}"]))
