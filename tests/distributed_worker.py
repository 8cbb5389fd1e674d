"""One training step and one evaluation of a tiny model, as every process of a run does them; started by torchrun.

torchrun --nproc_per_node 2 tests/distributed_worker.py OUTPUT.pt
"""

import sys
import tempfile

import torch
from tiny_models import tiny_batch, tiny_model
from torch.utils.data import Dataset
from transformers import TrainerCallback

from mfuser.training.augmentation import ShuffledSampler
from mfuser.training.trainer import MFuserTrainer, MFuserTrainingArguments

BATCH = 4  # of all processes together


class Samples(Dataset):
    """Six samples that each hold every class; a sampler's draws or plain numbers index it."""

    def __init__(self):
        self.batch = tiny_batch(batch=6)
        self.seen = []

    def __len__(self):
        return 6

    def __getitem__(self, draw):
        index = getattr(draw, "index", draw)
        self.seen.append(index)
        return {name: value[index] for name, value in self.batch.items()}


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.of = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def fixed_points(model):
    """Mask losses at a grid of points, BatchNorm on running statistics: nothing depends on chance or on the batch."""
    axis = (torch.arange(8) + 0.5) / 8
    points = torch.cartesian_prod(axis, axis)
    model.criterion.draw_points = lambda logits: points.expand(len(logits), -1, -1)
    norm = model.mfuser.pyramid.stride4[1]
    norm.train = lambda mode=True: norm
    norm.eval()
    return model


def step_and_evaluate(world_size: int) -> dict:
    model = fixed_points(tiny_model(fusion_dropout=0.0, vlm_drop_path_rate=0.0))
    callback, samples = Gradients(), Samples()
    with tempfile.TemporaryDirectory() as folder:
        arguments = MFuserTrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=BATCH // world_size, report_to="none", use_cpu=True,
            logging_steps=1, save_strategy="no", max_grad_norm=0.0, learning_rate=0.1, min_learning_rate=0.0,
        )  # fmt: skip
        trainer = MFuserTrainer(
            model, arguments, samples, ShuffledSampler(len(samples)), eval_dataset=Samples(), callbacks=[callback]
        )
        trainer.train()
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        trained_on = samples.seen[: BATCH // world_size]
        evaluation = trainer.evaluate()
    return {"gradients": callback.of, "log": log, "seen": trained_on, "evaluation": evaluation}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    world_size = torch.distributed.get_world_size()
    result = step_and_evaluate(world_size)
    everyone = [None] * world_size
    torch.distributed.all_gather_object(everyone, result["seen"])
    if torch.distributed.get_rank() == 0:
        torch.save(result | {"seen": everyone}, sys.argv[1])
    torch.distributed.destroy_process_group()
