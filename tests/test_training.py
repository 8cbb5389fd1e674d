"""Optimizer, schedule, losses, evaluation, checkpoints and distributed training."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from distributed_worker import Samples, random_maps, step_and_evaluate
from sklearn.metrics import confusion_matrix
from tiny_models import CLASSES, FUSION, save_tiny_encoders, tiny_batch, tiny_model
from torch import nn
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.trainer_utils import EvalLoopOutput
from transformers.training_args import ParallelMode

from mfuser import MFuserConfig, MFuserForSemanticSegmentation, MFuserImageProcessor
from mfuser.data.draws import ShuffledSampler
from mfuser.evaluation.metrics import MeanIoU
from mfuser.loading import restore_weights
from mfuser.scripts.checkpoint_names import convert_state_dict, convert_tensor, dropped_reason
from mfuser.scripts.convert_checkpoint import config_from_state_dict
from mfuser.training.checkpoints import without_scalars
from mfuser.training.optimization import PolynomialSchedule, parameter_groups
from mfuser.training.trainer import MFuserTrainer, MFuserTrainingArguments

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return MFuserForSemanticSegmentation(MFuserConfig())


def names_of(model, weights):
    wanted = {id(weight) for weight in weights}
    return {name for name, weight in model.named_parameters() if id(weight) in wanted}


# --- optimizer and schedule ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["clip", "eva02_clip", "siglip"])
def test_the_optimizer_trains_exactly_what_the_reference_trains(variant):
    reference = json.loads((FIXTURES / f"full_size_keys_{variant}.json").read_text())
    tensors = {key: torch.empty(shape, device="meta") for key, (shape, _, _) in reference.items()}
    siglip = {"class_token_ids": [[1] * 5] * 19, "loss_logit_scale": 1.0, "loss_logit_bias": 0.0}
    converted = convert_state_dict(tensors, variant)
    with torch.device("meta"):
        config = config_from_state_dict(converted, variant, siglip if variant == "siglip" else None)
        model = MFuserForSemanticSegmentation(config)
    expected = set()
    for key, (_, _, trainable) in reference.items():
        if trainable and dropped_reason(key, variant) is None:
            expected |= set(convert_tensor(key, tensors[key], variant))
    groups = parameter_groups(model, weight_decay=1e-4)
    assert names_of(model, [weight for group in groups for weight in group["params"]]) == expected
    assert sum(len(group["params"]) for group in groups) == len(expected)  # each once


@pytest.mark.parametrize("decay_embeddings", [True, False])
@pytest.mark.parametrize("decay_norms", [True, False])
def test_weight_decay_spares_the_norms_and_embeddings_that_the_settings_name(full_size, decay_embeddings, decay_norms):
    decayed, spared = parameter_groups(full_size, 1e-4, decay_embeddings, decay_norms)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1e-4, 0.0)
    spared = names_of(full_size, spared["params"])
    embeddings = {"decoder.level_embedding", "decoder.query_position_embedding"}
    assert spared & embeddings == (set() if decay_embeddings else embeddings)
    norms = {name for name, weight in full_size.named_parameters() if weight.requires_grad and "norm" in name}
    norms |= {f"mfuser.pyramid.stride4.1.{name}" for name in ("weight", "bias")}
    # BatchNorm, five GroupNorms and four LayerNorms have names without "norm" in the published code.
    unnamed = {name for name in norms if "stride4" in name or "_conv" in name}
    unnamed |= {name for name in norms if name.split(".")[-2] in ("visual_in_norm", "visual_out_norm", "text_norm")}
    unnamed |= {name for name in norms if "enhancer.out_norm" in name}
    assert len(unnamed) == 2 * (1 + 5 + 4)
    assert spared - embeddings == (norms - unnamed if decay_norms else norms)


def test_the_schedule_is_mmcvs_poly_with_linear_warm_up():
    schedule = PolynomialSchedule(1e-4, 1e-6, 20_000, 1_500)
    # (1e-4 - 1e-6) * (1 - step / 20000) ** 0.9 + 1e-6, in warm-up times 1 - (1 - step / 1500) * (1 - 1e-6)
    expected = {0: 1e-10, 1: 6.67636255e-8, 750: 4.8326247e-5, 1499: 9.32340155e-5, 1500: 9.3291723e-5}
    expected |= {10_000: 5.40527864e-5, 19_999: 1.01332626e-6, 20_000: 1e-6, 20_100: 1e-6}
    for step, rate in expected.items():
        assert schedule(step) * 1e-4 == pytest.approx(rate, rel=1e-6)


def test_a_rising_schedule_is_refused():
    with pytest.raises(ValueError, match="learning rate is 1e-07 and its minimum 1e-06; the minimum must be between"):
        PolynomialSchedule(1e-7, 1e-6, 10)


# --- a run -----------------------------------------------------------------------------------------------------------


def trainer_in(folder, model=None, encoders=None, **fields):
    defaults = dict(
        max_steps=4, per_device_train_batch_size=2, save_steps=2, logging_steps=1, report_to="none", use_cpu=True,
        learning_rate=1e-2, warmup_steps=2,
    )  # fmt: skip
    arguments = MFuserTrainingArguments(str(folder), **(defaults | fields))
    model = tiny_model(freeze_encoders=False) if model is None else model
    samples = Samples()
    return MFuserTrainer(
        model, arguments, samples, ShuffledSampler(len(samples)), Samples(), encoders,
        processing_class=MFuserImageProcessor(),
    )  # fmt: skip


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_losses_are_logged_in_parts_that_sum_to_the_loss(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=2, logging_steps=2, save_strategy="no")
    trainer.train()
    log = next(entry for entry in trainer.state.log_history if "loss" in entry)
    parts = [log[f"loss_{kind}"] for kind in ("class", "mask", "dice", "score_map")]
    assert sum(parts) == pytest.approx(log["loss"], rel=1e-4)


def test_gradient_checkpointing_changes_neither_loss_nor_gradients(tmp_path):
    logs = []
    for checkpointing in (False, True):
        fields = dict(max_steps=1, save_strategy="no", gradient_checkpointing=checkpointing)
        trainer = trainer_in(tmp_path, tiny_model(fusion_dropout=0.0, vlm_drop_path_rate=0.0), **fields)
        trainer.train()
        logs.append(next(entry for entry in trainer.state.log_history if "loss" in entry))
        assert trainer.model.mfuser.fusion_layers[0].gradient_checkpointing == checkpointing
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-6)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-5)


def test_an_existing_model_card_is_kept_when_the_model_is_uploaded(tmp_path):
    trainer = trainer_in(tmp_path, save_strategy="no")
    (tmp_path / "README.md").write_text("ours")
    trainer.create_model_card(model_name="a")
    assert (tmp_path / "README.md").read_text() == "ours"


def test_ignored_pixels_do_not_scale_the_loss(tmp_path):
    trainer = trainer_in(tmp_path, save_strategy="no")
    batch = tiny_batch()
    batch["labels"][:, 16:] = 255
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    _, number = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    torch.manual_seed(0)
    by_trainer = trainer.training_step(trainer.model, dict(batch), number)
    torch.manual_seed(0)
    assert torch.equal(by_trainer, trainer.model(**batch).loss.detach())


def iou_per_class(labels, predicted):
    known = labels != 255
    matrix = confusion_matrix(labels[known], predicted[known], labels=range(len(CLASSES)))
    return matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())


def test_evaluation_equals_an_independent_mean_iou_and_keeps_no_logits(tmp_path):
    trainer = trainer_in(tmp_path, save_strategy="no")
    metrics = trainer.evaluate()
    batch = Samples().batch
    with torch.no_grad():
        # One by one, as images of several sizes are: a batch is rounded differently on some processors.
        scores = torch.cat([trainer.model.eval()(image[None]).logits for image in batch["pixel_values"]])
    iou = iou_per_class(batch["labels"], scores.argmax(dim=1))
    assert metrics["eval_mean_iou"] == pytest.approx(iou.mean())
    assert metrics["eval_iou_sky"] == pytest.approx(iou[1])
    assert trainer.predict(trainer.eval_dataset).predictions is None


class ColourModel(nn.Module):
    """Replaces a model: the score of each class is a colour channel, or minus their sum."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, pixel_values):
        logits = torch.cat([pixel_values, -pixel_values.sum(dim=1, keepdim=True)], dim=1)
        return SemanticSegmenterOutput(logits=logits)


def test_validation_scores_are_resized_to_the_labels_as_post_processing_resizes_them(tmp_path):
    trainer = trainer_in(tmp_path, save_strategy="no")
    trainer.model = ColourModel(trainer.model.config)
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(6, 3, 16, 16, generator=generator)
    labels = torch.randint(0, len(CLASSES), (6, 40, 36), generator=generator)
    samples = [{"pixel_values": pixels, "labels": label} for pixels, label in zip(pixel_values, labels, strict=True)]
    predicted = MFuserImageProcessor().post_process_semantic_segmentation(
        trainer.model(pixel_values), target_sizes=[(40, 36)] * 6
    )
    iou = iou_per_class(labels, torch.stack(predicted))
    metrics = trainer.evaluate(samples)
    assert [metrics[f"eval_iou_{name}"] for name in CLASSES] == pytest.approx(iou.tolist(), rel=1e-9)


def test_the_samplers_epoch_is_set_when_a_run_is_resumed_within_an_epoch(tmp_path):
    trainer = trainer_in(tmp_path, save_strategy="no")
    trainer.state.epoch = 1.5  # in the middle of the second epoch
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert trainer.train_sampler.epoch == 1


# --- checkpoints -----------------------------------------------------------------------------------------------------


def killed_while_saving(folder, step):
    """Exit code of a run that is killed between writing the model and the optimizer of that step."""

    def run():
        trainer = trainer_in(folder)
        save = trainer._save_optimizer_and_scheduler

        def save_or_die(output_dir):
            if trainer.state.global_step == step:
                assert any(Path(output_dir).glob("*.safetensors"))
                os.kill(os.getpid(), signal.SIGKILL)
            save(output_dir)

        trainer._save_optimizer_and_scheduler = save_or_die
        trainer.train()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.slow
def test_a_run_killed_while_saving_resumes_bit_identically_from_its_last_complete_checkpoint(tmp_path):
    whole = trainer_in(tmp_path / "whole")
    whole.train()
    assert killed_while_saving(tmp_path / "killed", step=4) == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = trainer_in(tmp_path / "killed", model=tiny_model(seed=1, freeze_encoders=False))
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(weights_of(resumed.model), weights_of(whole.model))
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.slow
def test_every_tensor_of_the_best_model_is_restored(tmp_path):
    trainer = trainer_in(
        tmp_path, eval_strategy="steps", eval_steps=2, save_total_limit=1,
        load_best_model_at_end=True, metric_for_best_model="mean_iou", greater_is_better=True,
    )  # fmt: skip
    scores = iter([0.9, 0.1])
    at_best = {}

    def evaluation_loop(*args, **kwargs):
        at_best.setdefault("weights", weights_of(trainer.model))
        return EvalLoopOutput(None, None, {"eval_mean_iou": next(scores)}, 6)

    trainer.evaluation_loop = evaluation_loop
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-2"
    assert_same_weights(weights_of(trainer.model), at_best["weights"])
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == tmp_path / "checkpoint-2"


def test_a_checkpoint_loads_by_itself_and_holds_its_image_processor(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    model = MFuserForSemanticSegmentation.from_pretrained(checkpoint)
    assert_same_weights(weights_of(model), weights_of(trainer.model))
    assert MFuserImageProcessor.from_pretrained(checkpoint).image_mean == MFuserImageProcessor().image_mean
    assert (checkpoint / "modeling_mfuser.py").is_file()


@pytest.mark.slow
def test_checkpoints_without_frozen_weights_are_restored_on_top_of_the_encoders(tmp_path):
    encoders = save_tiny_encoders(tmp_path)

    def model():
        torch.manual_seed(0)
        fields = dict(class_names=list(CLASSES), crop_size=64, **FUSION)
        return MFuserForSemanticSegmentation.from_vfm_vlm_pretrained(**encoders, **fields)

    trainer = trainer_in(tmp_path / "part", model(), max_steps=2, save_trainable_only=True)
    trainer.train()
    full = trainer_in(tmp_path / "full", model(), max_steps=2)
    full.train()
    sizes = [(tmp_path / kind / "checkpoint-2" / "model.safetensors").stat().st_size for kind in ("part", "full")]
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    assert 4 * trained < sizes[0] < 4 * trained * 1.1 < sizes[1]
    fresh = model()
    restore_weights(fresh, tmp_path / "part" / "checkpoint-2")
    assert_same_weights(weights_of(fresh), weights_of(full.model))
    loaded = MFuserForSemanticSegmentation.from_pretrained(tmp_path / "part" / "checkpoint-2")
    assert_same_weights(weights_of(loaded), weights_of(full.model))


def test_a_checkpoint_is_uploaded_from_its_final_folder_and_holds_the_given_arguments(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=2)
    uploaded = {}

    def record(folder):
        uploaded[folder] = sorted(path.name for path in Path(folder).iterdir())

    trainer._push_from_checkpoint = record
    trainer.args.push_to_hub = True
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert uploaded == {str(checkpoint): sorted(path.name for path in checkpoint.iterdir())}
    arguments = torch.load(checkpoint / "training_args.bin", weights_only=False)
    assert arguments.output_dir == str(tmp_path) and arguments.push_to_hub


def test_scalars_that_fsdp_cannot_shard_are_scalars_again_in_saved_models(tmp_path):
    trainer = trainer_in(tmp_path, save_strategy="no")
    before = weights_of(trainer.model)
    trainer._scalars = without_scalars(trainer.model)
    assert trainer._scalars and all(weight.dim() for weight in trainer.model.parameters())
    trainer.save_model()
    assert_same_weights(weights_of(MFuserForSemanticSegmentation.from_pretrained(tmp_path)), before)


def test_a_batch_larger_than_an_epoch_is_refused(tmp_path):
    fields = {"per_device_train_batch_size": len(Samples()) + 1, "dataloader_drop_last": True}
    with pytest.raises(ValueError, match="so dataloader_drop_last drops them all; set it to false"):
        trainer_in(tmp_path, **fields)
    trainer_in(tmp_path, **fields | {"dataloader_drop_last": False})


@pytest.mark.slow
def test_weights_that_do_not_fit_are_named(tmp_path):
    tiny_model(decoder_num_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unexpected: decoder\.layers\.2\."):
        restore_weights(tiny_model(), tmp_path)
    tiny_model(decoder_num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing: decoder\.layers\.1\."):
        restore_weights(tiny_model(), tmp_path)
    damaged = tiny_model()
    with torch.no_grad():
        damaged.mfuser.prompts[0, 0, 0] = float("nan")
    damaged.save_pretrained(tmp_path / "damaged")
    with pytest.raises(ValueError, match=f"{tmp_path / 'damaged'}: 1 tensors hold NaN or infinite"):
        restore_weights(tiny_model(), tmp_path / "damaged")
    trainer = trainer_in(tmp_path / "run", save_strategy="no")
    with pytest.raises(ValueError, match=r"weights in the checkpoint do not fit .* missing: decoder\.layers\.1\."):
        trainer.train(resume_from_checkpoint=str(tmp_path))


# --- devices ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The results of two processes that trained and evaluated together."""
    worker, output = Path(__file__).with_name("distributed_worker.py"), tmp_path_factory.mktemp("both") / "result.pt"
    fsdp = yaml.safe_load((Path(__file__).parents[1] / "recipes" / "fsdp.yaml").read_text())["fsdp_config"]
    command = [sys.executable, worker, output, fsdp["fsdp_transformer_layer_cls_to_wrap"]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            command, env=os.environ | world | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()
    return torch.load(output)


@pytest.mark.slow
def test_two_processes_give_the_loss_and_gradients_of_one(both):
    alone = step_and_evaluate(world_size=1)
    assert sorted(both["seen"][0] + both["seen"][1]) == sorted(alone["seen"])
    for part in ("loss", "loss_class", "loss_mask", "loss_dice", "loss_score_map"):
        assert both["log"][part] == pytest.approx(alone["log"][part], rel=1e-5)
    assert both["gradients"].keys() == alone["gradients"].keys()
    for name, gradient in alone["gradients"].items():
        torch.testing.assert_close(both["gradients"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    assert both["evaluation"]["eval_mean_iou"] == pytest.approx(alone["evaluation"]["eval_mean_iou"], abs=1e-3)


@pytest.mark.slow
def test_two_processes_reduce_to_exactly_the_pixel_counts_of_one(both):
    prediction, label = random_maps()
    whole = MeanIoU(19)
    whole.update(prediction, label)
    assert both["reduced"] == [whole.matrix.tolist()] * 4  # on both processes, and again when reduced again


@pytest.mark.slow
def test_layers_sharded_as_the_fsdp_recipe_says_give_the_same_loss_and_gradients(both):
    assert both["sharded"][True] == pytest.approx(both["sharded"][False], rel=1e-5)


@pytest.mark.parametrize(("device", "kind"), [("meta", nn.SyncBatchNorm), ("cpu", nn.BatchNorm2d)])
def test_batch_norm_is_synchronised_between_accelerators_only(tmp_path, monkeypatch, device, kind):
    arguments = MFuserTrainingArguments(str(tmp_path), save_strategy="no", report_to="none", use_cpu=True)
    assert arguments.device.type == "cpu"
    monkeypatch.setattr(MFuserTrainingArguments, "parallel_mode", ParallelMode.DISTRIBUTED)
    monkeypatch.setattr(MFuserTrainingArguments, "device", torch.device(device))  # meta stands in for an accelerator
    model = tiny_model()
    names = list(model.state_dict())
    trainer = MFuserTrainer(model, arguments)
    norms = [module for module in trainer.model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert [type(norm) for norm in norms] == [kind]
    assert list(trainer.model.state_dict()) == names
