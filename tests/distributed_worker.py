"""
One process of a distributed run on a tiny model.

`torchrun --nproc_per_node 2 tests/distributed_worker.py OUTPUT.pt LAYERS_TO_SHARD` starts two of them.
"""

import sys
import tempfile

import numpy as np
import torch
from accelerate import Accelerator
from tiny_models import tiny_batch, tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from transformers import TrainerCallback

from mfuser.data.draws import ShuffledSampler
from mfuser.evaluation.metrics import MeanIoU
from mfuser.training.checkpoints import without_scalars
from mfuser.training.trainer import MFuserTrainer, MFuserTrainingArguments

BATCH = 4  # over all processes
NO_DROPOUT = {"fusion_dropout": 0.0, "enhancer_dropout": 0.0}


class Samples(Dataset):
    """Six samples that each hold every class, indexed by draws or integers."""

    def __init__(self):
        self.batch = tiny_batch(batch=6)
        self.seen = []

    def __len__(self):
        return 6

    def __getitem__(self, draw):
        index = getattr(draw, "row", draw)
        self.seen.append(index)
        return {name: value[index] for name, value in self.batch.items()}


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.of = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def fixed_points(model):
    """Samples mask losses on a grid and freezes BatchNorm's statistics, to exclude chance and effects of the batch."""
    axis = (torch.arange(8) + 0.5) / 8
    points = torch.cartesian_prod(axis, axis)
    model.criterion.draw_points = lambda logits: points.expand(len(logits), -1, -1)
    norm = model.mfuser.pyramid.stride4[1]
    norm.train = lambda mode=True: norm
    norm.eval()
    return model


def step_and_evaluate(world_size: int) -> dict:
    model = fixed_points(tiny_model(**NO_DROPOUT, vlm_drop_path_rate=0.0))
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


def sharded_step(layers: list[str]) -> dict[bool, tuple[float, float]]:
    """Loss and gradient norm of this process's sample, without and with `layers` sharded by FSDP."""
    sample = {name: value[torch.distributed.get_rank()][None] for name, value in Samples().batch.items()}
    results = {}
    for shard in (False, True):
        model = fixed_points(tiny_model(**NO_DROPOUT, vlm_drop_path_rate=0.5)).train()
        if shard:
            without_scalars(model)
            mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
            for module in [*(part for part in model.modules() if type(part).__name__ in layers), model]:
                fully_shard(module, mesh=mesh)
        torch.manual_seed(0)
        loss = model(**sample).loss
        loss.backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if not shard:
            for gradient in gradients:
                torch.distributed.all_reduce(gradient)
                gradient /= torch.distributed.get_world_size()
        norm = torch.stack([(g.full_tensor() if shard else g).square().sum() for g in gradients]).sum().sqrt()
        results[shard] = (loss.item(), norm.item())
    return results


def random_maps() -> np.ndarray:
    """A batch of random predictions and one of random labels of 19 classes."""
    return np.random.default_rng(0).integers(0, 19, (2, 7, 33, 35)).astype(np.uint8)


def reduced_counts() -> list[list[list[int]]]:
    """The confusion matrix over all processes, reduced twice; each process counts every second image."""
    accelerator = Accelerator(cpu=True)
    prediction, label = random_maps()
    part = MeanIoU(19)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    part.update(prediction[share], label[share])
    return [part.reduce(accelerator).matrix.tolist() for _ in range(2)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    world_size = torch.distributed.get_world_size()
    result = step_and_evaluate(world_size)
    sharded = sharded_step(sys.argv[2].split(","))
    everyone = [None] * world_size
    torch.distributed.all_gather_object(everyone, (result["seen"], reduced_counts()))
    if torch.distributed.get_rank() == 0:
        seen, reduced = zip(*everyone, strict=True)
        reduced = [matrix for part in reduced for matrix in part]
        torch.save(result | {"seen": list(seen), "sharded": sharded, "reduced": reduced}, sys.argv[1])
    torch.distributed.destroy_process_group()
