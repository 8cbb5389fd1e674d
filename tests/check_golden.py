"""
Compares the model with the reference implementation: every output, score, loss and gradient.

    python tests/check_golden.py FOLDER [FOLDER ...]

A folder holds config.json, original_state_dict, inputs, outputs and gradients (safetensors). Its weights are loaded as
those of a user's checkpoint: from a .pth file, through `mfuser convert`, by `from_pretrained`. A tensor's error is
max |difference| / max |reference|. Prints the largest errors; exits with 1 if an error exceeds the tolerance.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from mfuser.scripts.checkpoint_names import convert_tensor, detect_variant
from mfuser.scripts.convert_checkpoint import main as convert

OUTPUT_TOLERANCE = 1e-4
GRADIENT_TOLERANCE = 5e-4


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    if ours.shape != reference.shape and not ours.numel() == reference.numel() == 1:
        raise ValueError(f"the shape is {tuple(ours.shape)}; it must be {tuple(reference.shape)}")
    difference = (ours.double() - reference.double()).abs().max()
    error = (difference / reference.double().abs().max().clamp(min=1e-30)).item()
    return float("inf") if error != error else error


def known_fields(golden: dict, token_ids: list[list[int]]) -> dict:
    """Returns the fields of MFuserConfig that can't be inferred from a golden's shapes."""
    fields = {
        "vfm_config": {"num_attention_heads": golden["vfm_heads"]},
        "vlm_config": {"num_attention_heads": golden["vlm_heads"]},
        "text_config": {"num_attention_heads": golden["text_heads"]},
        "id2label": dict(enumerate(golden["class_names"])),
        "class_token_ids": token_ids,
        "fusion_out_layers": [index + 1 for index in golden["out_indices"]],
        "enhancer_num_heads": golden["mtenhancer"]["heads"],
        "decoder_num_heads": golden["decoder"]["heads"],
        "decoder_num_points": golden["decoder"]["points"],
        "loss_num_points": golden["train_num_points"],
        "loss_temperature": golden["tau"],
        "crop_size": golden["slide"]["crop"],
        "crop_stride": golden["slide"]["stride"],
    }
    if golden["logit_scale"] is not None:
        fields |= {"loss_logit_scale": golden["logit_scale"], "loss_logit_bias": golden["logit_bias"]}
    if golden["rope_pretrained_grid"] is not None:
        fields["vlm_config"]["rope_pretrained_grid"] = golden["rope_pretrained_grid"]
    return fields


def original_state_dict(folder: Path, golden: dict) -> dict[str, torch.Tensor]:
    state_dict = load_file(folder / "original_state_dict.safetensors")
    table = golden["token_embedding"]  # only the rows that are used are stored
    stored = state_dict[table["key"]]
    state_dict[table["key"]] = torch.zeros(table["full_shape"]).index_copy(
        0, torch.tensor(table["stored_rows"]), stored
    )
    return state_dict


def converted_model(folder: Path, golden: dict, inputs: dict[str, torch.Tensor], workspace: Path):
    """Loads the golden's weights as a user would: .pth file, `mfuser convert`, AutoModel."""
    checkpoint, fields, output = workspace / "golden.pth", workspace / "fields.json", workspace / "converted"
    torch.save({"state_dict": original_state_dict(folder, golden), "meta": {}}, checkpoint)
    fields.write_text(json.dumps(known_fields(golden, inputs["text_input_ids"].tolist())))
    if convert([str(checkpoint), "--output", str(output), "--config", str(fields)]):
        raise RuntimeError(f"mfuser convert failed for {folder}")
    return AutoModelForSemanticSegmentation.from_pretrained(output, trust_remote_code=True)


class Recorder:
    """Records outputs of inner modules under the names of the goldens."""

    def __init__(self, model):
        self.found = {}
        self.predictions = 0
        for index, layer in enumerate(model.mfuser.fusion_layers):
            layer.mvfuser.register_forward_hook(self.mvfuser_hook(index))
        model.mfuser.register_forward_hook(self.features)
        model.pixel_decoder.register_forward_hook(self.pixels)
        model.decoder.predictor.register_forward_hook(self.prediction)

    def mvfuser_hook(self, index):
        def hook(module, args, output):
            self.found[f"mvfuser.{index}"] = output
            if index == 0:
                self.found["mvfuser_input.0"] = args[0]

        return hook

    def features(self, module, args, output):
        features = [level.feature_map() for level in module.pyramid(output.fused_maps)]
        self.found |= {f"feature.{index}": feature for index, feature in enumerate(features)}
        self.found["global_embedding"] = output.global_embedding
        self.found["visual_embedding"] = output.dense_embedding
        self.found["text_embedding"] = output.text_embeddings
        self.found["text_embedding_plain"] = module.class_embeddings()

    def pixels(self, module, args, output):
        self.found["mask_features"] = output[0]

    def prediction(self, module, args, output):
        names = f"class_logits.{self.predictions}", f"mask_logits.{self.predictions}"
        self.found |= dict(zip(names, output, strict=True))
        self.predictions += 1


def use_golden_points(model, inputs: dict[str, torch.Tensor]):
    """Replaces the random points of the mask losses by those of the golden, ordered by image and class id."""
    labels, num_classes = inputs["labels"], model.config.num_labels
    present = torch.stack([(labels == index).flatten(1).any(1) for index in range(num_classes)], dim=1).flatten()
    stacked = []
    for index in range(sum(key.startswith("point_coords.") for key in inputs)):
        points = torch.zeros(len(present), *inputs[f"point_coords.{index}"].shape[1:])
        points[present] = inputs[f"point_coords.{index}"]
        stacked.append(points)
    model.criterion.draw_points = lambda mask_logits: torch.cat(stacked)


def loss_name(component: str, last: int) -> str:
    """Returns the golden's name of a loss component; the last prediction has no number."""
    if component == "score_map":
        return "loss.scr_map.loss_seg"
    kind, index = component.rsplit("_", 1)
    kind = {"class": "cls"}.get(kind, kind)
    return f"loss.decode.loss_{kind}" if int(index) == last else f"loss.decode.d{index}.loss_{kind}"


def errors(folder: Path) -> dict[str, tuple[float, float]]:
    """Returns (error, tolerance) of every tensor in the golden."""
    golden = json.loads((folder / "config.json").read_text())
    inputs, outputs, gradients = (
        load_file(folder / f"{name}.safetensors") for name in ("inputs", "outputs", "gradients")
    )
    with tempfile.TemporaryDirectory() as workspace:
        model = converted_model(folder, golden, inputs, Path(workspace))
    model.eval()
    recorder = Recorder(model)
    use_golden_points(model, inputs)

    result = model(inputs["pixel_values"], labels=inputs["labels"])
    result.loss.backward()
    found = dict(recorder.found)
    found |= {"score_map": result.score_map, "segmentation_scores": result.logits, "loss_total": result.loss}
    last = recorder.predictions - 1
    found |= {loss_name(name, last): value for name, value in result.loss_components.items()}
    with torch.no_grad():
        found["slide_scores"] = model(inputs["large_pixel_values"]).logits
        found["slide_prediction"] = found["slide_scores"].argmax(1)
        found["flip_scores"] = model.augmented_scores(inputs["large_pixel_values"])
        if "small_pixel_values" in inputs:
            model.config.crop_size = max(inputs["small_pixel_values"].shape)  # so that it is one crop
            found["small_scores"] = model(inputs["small_pixel_values"]).logits
    table = {name: (relative_error(found[name].detach(), outputs[name]), OUTPUT_TOLERANCE) for name in outputs}

    variant = detect_variant(original_state_dict(folder, golden))
    parameters = dict(model.named_parameters())
    for key, reference in gradients.items():
        # packed tensors are compared as a whole, because the gradient of a key's bias is only rounding error
        converted = convert_tensor(key, reference, variant)
        ours = torch.cat([parameters[name].grad.flatten() for name in converted])
        table[f"gradient of {key}"] = (
            relative_error(ours, torch.cat([part.flatten() for part in converted.values()])),
            GRADIENT_TOLERANCE,
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--worst", type=int, default=5, help="how many tensors to print (default %(default)s)")
    options = parser.parse_args(arguments)
    failed = False
    for folder in options.folders:
        table = errors(folder)
        beyond = [name for name, (error, tolerance) in table.items() if error > tolerance]
        failed |= bool(beyond)
        print(f"{folder}: {len(table)} tensors, {len(beyond)} beyond tolerance")
        ranked = sorted(table.items(), key=lambda item: item[1][0] / item[1][1], reverse=True)
        for name, (error, tolerance) in ranked[: max(options.worst, len(beyond))]:
            print(f"  {error:.1e} (tolerance {tolerance:.0e})  {name}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
