"""
Compares training with the reference implementation.

    python tests/check_training.py FOLDER [FOLDER ...]

A folder has the format of the goldens (see check_golden.py) and a `trajectory/`. Its weights are converted by `mfuser
convert`; optimizer, parameter groups and schedule are those of `MFuserTrainer`. It checks

- 12 steps of the published recipe and of one with amplified rates: the loss of every step (relative, within 5 times
  the recorded drift plus 1e-6), learning rates, parameter groups name by name, every trained tensor (absolute, within
  10 times its `drift_max` plus 2e-6; amplified: 5 times plus 1e-5) and the final scores (absolute, 5 times plus 1e-6);
- if there is an `initial_statistics.json`, the initial distributions of new tensors, over 5 seeds: mean, variance and
  a Kolmogorov-Smirnov test, at a false-positive rate of 1e-6 for all tensors together;
- if there is a `dropout_statistics.safetensors`, mean and standard deviation of the embeddings under each kind of
  noise (every mean within 7 standard errors; root mean square of the standard deviations within 10 %).

Prints the largest errors; exits with 1 if an error exceeds the tolerance.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from check_golden import converted_model, original_state_dict, use_golden_points
from safetensors.torch import load_file
from scipy import stats
from transformers import AutoModelForSemanticSegmentation

from mfuser.modeling_mfuser import MFuserForSemanticSegmentation
from mfuser.scripts.checkpoint_names import convert_tensor, detect_variant, dropped_reason
from mfuser.training.trainer import MFuserTrainer, MFuserTrainingArguments

STEPS = 12
RUNS = {
    "published": ("log.json", "final_state.safetensors"),
    "amplified": ("log_amplified.json", "final_state_amplified.safetensors"),
}
STATE_TOLERANCE = {"published": (10, 2e-6), "amplified": (5, 1e-5)}  # multiple of the drift, absolute
LOSS_TOLERANCE = (5, 1e-6)  # multiple of the drift, relative
SCORE_TOLERANCE = (5, 1e-6)  # multiple of the drift, absolute
FALSE_ALARM_RATE = 1e-6
SEEDS = 5
STANDARD_ERRORS = 7
SPREAD_TOLERANCE = 0.1
NO_NOISE = {"fusion_dropout": 0.0, "enhancer_dropout": 0.0, "vlm_drop_path_rate": 0.0}

Table = dict[str, tuple[float, float]]  # name -> (error, tolerance)


class Golden:
    """A folder of the goldens, its weights converted to a model folder below `workspace`."""

    def __init__(self, folder: Path, workspace: Path):
        self.folder = folder
        self.config = json.loads((folder / "config.json").read_text())
        self.inputs = load_file(folder / "inputs.safetensors")
        self.variant = detect_variant(original_state_dict(folder, self.config))
        converted_model(folder, self.config, self.inputs, workspace)
        self.model_folder = workspace / "converted"

    def model(self, **fields) -> MFuserForSemanticSegmentation:
        return AutoModelForSemanticSegmentation.from_pretrained(self.model_folder, trust_remote_code=True, **fields)

    def converted(self, tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Reference name -> our names and tensors, without the tensors that the converter drops."""
        kept = {key: tensor for key, tensor in tensors.items() if dropped_reason(key, self.variant) is None}
        return {key: convert_tensor(key, tensor, self.variant) for key, tensor in kept.items()}


def trainer_of(model, recipe: dict, output_dir: Path) -> MFuserTrainer:
    """The project's trainer with the recipe of a golden's log."""
    arguments = MFuserTrainingArguments(
        output_dir=str(output_dir),
        learning_rate=recipe["lr"],
        weight_decay=recipe["weight_decay"],
        adam_beta1=recipe["betas"][0],
        adam_beta2=recipe["betas"][1],
        adam_epsilon=recipe["eps"],
        max_steps=recipe["max_iters"],
        warmup_steps=recipe["warmup_iters"],
        warmup_start=recipe["warmup_ratio"],
        schedule_power=recipe["power"],
        min_learning_rate=recipe["min_lr"],
        decay_embeddings="level_embed" not in recipe["custom_keys"],
        report_to=[],
        use_cpu=True,
    )
    trainer = MFuserTrainer(model, arguments)
    trainer.create_optimizer_and_scheduler(recipe["max_iters"])
    return trainer


def group_errors(golden: Golden, trainer: MFuserTrainer, expected: dict[str, dict[str, float]]) -> Table:
    """Learning rate and weight decay of every trained tensor: 0 where both are the reference's, else 1."""
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    groups = trainer.optimizer.param_groups
    ours = {names[parameter]: group for group in groups for parameter in group["params"]}
    shapes = load_file(golden.folder / "trajectory" / "final_state.safetensors")
    table, seen = {}, set()
    for key, parts in golden.converted({key: shapes[key] for key in expected if key in shapes}).items():
        for name in parts:
            seen.add(name)
            found = (ours[name]["initial_lr"], ours[name]["weight_decay"]) if name in ours else None
            right = found == (expected[key]["lr"], expected[key]["weight_decay"])
            table[f"group of {key} ({name})"] = (0.0 if right else 1.0, 0.5)
    for name in ours.keys() - seen:
        table[f"group of {name}, which the reference does not train"] = (1.0, 0.5)
    return table


def trajectory_errors(golden: Golden, run: str, workspace: Path) -> Table:
    """Trains for 12 steps and compares losses, rates, groups, final tensors and final scores."""
    folder = golden.folder / "trajectory"
    log_file, state_file = RUNS[run]
    log = json.loads((folder / log_file).read_text())
    inputs = load_file(folder / "inputs.safetensors")
    model = golden.model(**NO_NOISE).train()
    trainer = trainer_of(model, log["recipe"], workspace)
    table = group_errors(golden, trainer, json.loads((folder / "parameter_groups.json").read_text())[run])
    perturbed = np.array(log["perturbed_loss_total"])  # (runs, steps)
    for step, expected in enumerate(log["steps"]):
        labels = inputs[f"labels.{step}"].long()
        points = {
            key.replace(f".{step}.", ".", 1): value
            for key, value in inputs.items()
            if key.startswith(f"point_coords.{step}.")
        }
        use_golden_points(model, points | {"labels": labels})
        rate = trainer.optimizer.param_groups[0]["lr"]
        loss = model(inputs[f"pixel_values.{step}"], labels=labels).loss
        loss.backward()
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        total = expected["loss_total"]
        drift = np.abs(perturbed[:, step] / total - 1).max()
        multiple, floor = LOSS_TOLERANCE
        table[f"{run}: loss of step {step}"] = (abs(loss.item() / total - 1), multiple * drift + floor)
        table[f"{run}: learning rate of step {step}"] = (abs(rate / expected["lr"] - 1), 1e-6)
    conditioning = json.loads((folder / "conditioning.json").read_text())[run]
    state = model.state_dict()
    multiple, floor = STATE_TOLERANCE[run]
    for key, parts in golden.converted(load_file(folder / state_file)).items():
        error = max((state[name].double() - part.double()).abs().max().item() for name, part in parts.items())
        table[f"{run}: final {key}"] = (error, multiple * conditioning.get(key, {"drift_max": 0})["drift_max"] + floor)
    if run == "published":
        reference = load_file(folder / "final_outputs.safetensors")["segmentation_scores"]
        with torch.no_grad():
            scores = model.eval()(golden.inputs["pixel_values"]).logits
        multiple, floor = SCORE_TOLERANCE
        drift = conditioning["segmentation_scores"]["drift_max"]
        table["published: final scores"] = ((scores - reference).abs().max().item(), multiple * drift + floor)
    return table


def standardised(values: np.ndarray, tensor: dict) -> tuple[np.ndarray, stats.rv_continuous | None]:
    """Values and the distribution that they should follow; `None` for values that are not random."""
    parameters, name = tensor["parameters"], tensor["distribution"]
    if name.startswith("inverse softplus"):
        steps = np.log1p(np.exp(values))
        return np.log(steps), stats.uniform(math.log(1e-3), math.log(1e-1) - math.log(1e-3))
    if "bound" in parameters:
        return values, stats.uniform(-parameters["bound"], 2 * parameters["bound"])
    if name.startswith("trunc_normal std 1 "):
        return values, stats.truncnorm(-2, 2)
    if "std" in parameters:
        return values, stats.norm(0, parameters["std"])
    return values, None


def fixed_values(tensor: dict, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The initial values of a tensor that is not randomly initialised."""
    name = tensor["distribution"]
    if "value" in tensor["parameters"]:
        return [torch.full_like(part, tensor["parameters"]["value"]) for part in parts]
    if name.startswith("log(1..16)"):
        return [torch.arange(1, part.shape[1] + 1).log().expand_as(part) for part in parts]
    if name.startswith("directions of the heads"):
        (bias,) = parts
        return [head_directions(bias, heads) for heads in (2, 4, 8) if bias.numel() % (heads * 6) == 0]
    raise ValueError(f"no rule for the distribution {name!r}")


def head_directions(bias: torch.Tensor, heads: int, levels: int = 3) -> torch.Tensor:
    angles = torch.arange(heads) * (2 * math.pi / heads)
    directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
    directions = directions / directions.abs().amax(dim=-1, keepdim=True)
    points = bias.numel() // (heads * levels * 2)
    return (directions[:, None, None] * torch.arange(1, points + 1)[:, None]).expand(-1, levels, -1, -1).flatten()


def initial_value_errors(golden: Golden) -> Table:
    """Tests initial distributions at a false-positive rate of 1e-6 for all tensors: error is -log10 of the p-value."""
    tensors = json.loads((golden.folder / "initial_statistics.json").read_text())["small"]
    config = golden.model().config
    models = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        models.append(MFuserForSemanticSegmentation(type(config)(**config.to_dict())).state_dict())
    limit = -math.log10(FALSE_ALARM_RATE / (3 * len(tensors)))
    table = {}
    shapes = {key: torch.empty(tensor["shape"]) for key, tensor in tensors.items()}
    for key, names in golden.converted(shapes).items():
        tensor = tensors[key]
        values = torch.cat([state[name].flatten() for state in models for name in names]).double().numpy()
        values, distribution = standardised(values, tensor)
        if distribution is None:
            parts = [models[0][name] for name in names]
            expected = fixed_values(tensor, parts)
            error = min((part - value).abs().max().item() for part in parts for value in expected)
            table[f"start value of {key}"] = (error, 1e-6)
            continue
        mean, variance, kurtosis = (float(moment) for moment in distribution.stats(moments="mvk"))
        count = len(values)
        z_mean = (values.mean() - mean) / math.sqrt(variance / count)
        z_variance = (((values - mean) ** 2).mean() / variance - 1) / math.sqrt((kurtosis + 2) / count)
        p_values = {
            "mean": 2 * stats.norm.sf(abs(z_mean)),
            "variance": 2 * stats.norm.sf(abs(z_variance)),
            "distribution": stats.kstest(values, distribution.cdf).pvalue,
        }
        for name, p_value in p_values.items():
            table[f"start {name} of {key}"] = (-math.log10(max(p_value, 1e-300)), limit)
    return table


def noisy_embeddings(golden: Golden, kind: str, draws: int) -> dict[str, torch.Tensor]:
    """Embeddings (draws, ...) of the golden's image under one kind of noise."""
    pixel_values = golden.inputs["pixel_values"]
    if kind == "drop_path":
        model = golden.model(**NO_NOISE | {"vlm_drop_path_rate": 0.1}).mfuser.train()
        # The dropped positions are the same for the whole batch: one forward pass per draw.
        outputs = [model(pixel_values, output_feature_maps=False) for _ in range(draws)]
        return {
            name: torch.stack([output[f"{source}_embedding"] for output in outputs])
            for name, source in EMBEDDINGS.items()
        }
    repeated = pixel_values.repeat(draws, 1, 1, 1)
    if kind == "mvfuser_dropout":
        model = golden.model(**NO_NOISE | {"fusion_dropout": 0.1}).mfuser.train()
        output = model(repeated, output_feature_maps=False)
        return {name: output[f"{source}_embedding"].unflatten(0, (draws, -1)) for name, source in EMBEDDINGS.items()}
    model = golden.model(**NO_NOISE | {"fusion_dropout": 0.1, "enhancer_dropout": 0.1}).mfuser.train()
    for layer in model.fusion_layers:
        layer.mvfuser.dropout.p = 0.0
    output = model(repeated, output_feature_maps=False)
    return {"text_embedding": output.text_embeddings.unflatten(0, (draws, -1))}


EMBEDDINGS = {"global_embedding": "global", "visual_embedding": "dense"}
REFERENCE_DRAWS = {"drop_path": 600, "mvfuser_dropout": 600, "mtenhancer_dropout": 2000}


@torch.no_grad()
def dropout_errors(golden: Golden, draws: int = 600) -> Table:
    """Means, in standard errors, and spread of the embeddings under each kind of noise."""
    reference = load_file(golden.folder / "dropout_statistics.safetensors")
    table = {}
    torch.manual_seed(0)
    for kind, reference_draws in REFERENCE_DRAWS.items():
        if not any(key.startswith(kind) for key in reference):
            continue
        for name, values in noisy_embeddings(golden, kind, draws).items():
            mean, std = reference[f"{kind}.{name}.mean"], reference[f"{kind}.{name}.std"]
            error = std.clamp(min=1e-6) * math.sqrt(1 / draws + 1 / reference_draws)
            table[f"{kind}: mean of {name}"] = (((values.mean(0) - mean).abs() / error).max().item(), STANDARD_ERRORS)
            ratio = (values.std(0).square().mean() / std.square().mean()).sqrt().item()
            table[f"{kind}: spread of {name}"] = (abs(ratio - 1), SPREAD_TOLERANCE)
    return table


def errors(folder: Path, draws: int = 600) -> Table:
    """(error, tolerance) of everything that is compared."""
    with tempfile.TemporaryDirectory() as workspace:
        golden = Golden(folder, Path(workspace))
        table = {}
        for run in RUNS:
            table |= trajectory_errors(golden, run, Path(workspace, run))
        if (folder / "initial_statistics.json").is_file():
            table |= initial_value_errors(golden)
        if (folder / "dropout_statistics.safetensors").is_file():
            table |= dropout_errors(golden, draws)
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--worst", type=int, default=10, help="how many rows to print (default %(default)s)")
    options = parser.parse_args(arguments)
    failed = False
    for folder in options.folders:
        table = errors(folder)
        beyond = [name for name, (error, tolerance) in table.items() if not error <= tolerance]
        failed |= bool(beyond)
        print(f"{folder}: {len(table)} values, {len(beyond)} beyond tolerance")
        ranked = sorted(table.items(), key=lambda item: item[1][0] / item[1][1], reverse=True)
        for name, (error, tolerance) in ranked[: max(options.worst, len(beyond))]:
            print(f"  {error:.1e} (tolerance {tolerance:.1e})  {name}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
