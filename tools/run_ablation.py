"""
Trains every variant of the ablation with every seed, evaluates it by day and at dusk, and writes the table.

    python tools/run_ablation.py --data data/camvid
    python tools/run_ablation.py --data data/camvid --seeds 0 --output runs/short -- max_steps=20 save_steps=10

`--jobs` runs are executed at a time, with an equal share of the CPU cores each; one run per core is fastest. Finished
runs are not repeated, and an interrupted run continues from its last checkpoint, so the same command can be repeated
until all runs are finished. Settings after `--` are passed on to `mfuser train` for all variants. docs/ablation.md
describes the variants.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from mfuser import MFuserForSemanticSegmentation
from mfuser.evaluation.comparison import protocol_differences, read_result
from mfuser.files import read_json, sha256, write_text
from mfuser.overlap import in_order
from mfuser.scripts.evaluate import weight_hashes

RECIPES = Path(__file__).resolve().parent.parent / "recipes" / "ablation"
DOMAINS = {"camvid:validation": "day", "camvid:dusk": "dusk"}
SETTINGS = "_settings.json"  # `mfuser train` ignores names that begin with an underscore


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    own, passed = arguments, []
    if "--" in arguments:
        own, passed = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    variants = list(read_variants())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with CamVid's train, validation and dusk")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), help="default: runs/ablation")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants, help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs that are executed at a time (default: 1)")
    parsed = parser.parse_args(own)
    if parsed.jobs < 1:
        parser.error(f"--jobs is {parsed.jobs}; it must be at least 1")
    parsed.settings = passed
    return parsed


def read_variants() -> dict[str, dict[str, Any]]:
    """The settings that each variant changes."""
    return yaml.safe_load((RECIPES / "variants.yaml").read_text(encoding="utf-8"))


def run(module: str, *arguments: object, threads: int) -> None:
    """Runs a command of the package. An error of it ends this script."""
    command = [sys.executable, "-m", f"mfuser.scripts.{module}", *map(str, arguments)]
    print("$", " ".join(command[3:]), flush=True)
    if subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode:
        sys.exit(f"run_ablation: {module} failed; the same command continues from here")


def train(folder: Path, data: Path, settings: list[str], threads: int) -> None:
    """Trains a run, or continues it, unless it is finished."""
    recipe = RECIPES / "tiny.yaml"
    stamp, wanted = folder / SETTINGS, {"data": str(data.resolve()), "recipe": sha256(recipe), "settings": settings}
    if stamp.exists() and read_json(stamp) != wanted:
        sys.exit(
            f"run_ablation: {folder} was trained with {read_json(stamp)}, not with {wanted}; give another --output"
        )
    if (folder / "config.json").exists():  # the last file that a training writes
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(stamp, json.dumps(wanted))
    data_settings = ("--train_data", data, "--validation_data", data)
    own = ("--output_dir", folder, "--resume", "true", *settings)
    run("train", recipe, *data_settings, *own, threads=threads)


def evaluate(folder: Path, data: Path, threads: int) -> dict[str, Any]:
    """The result of a run by day and at dusk, which is measured unless that is done."""
    output = folder.with_name(f"{folder.name}.json")
    if output.exists():
        result = read_result(output)
        if result["complete"] and result["model"]["sha256"] == weight_hashes(folder):
            return result
    domains = (f"{name}={data}" for name in DOMAINS)
    run("evaluate", "--model", folder, "--domains", *domains, "--output", output, threads=threads)
    return read_result(output)


def summary(results: dict[str, dict[int, dict[str, Any]]], parameters: dict[str, int]) -> dict[str, Any]:
    """
    Mean and sample standard deviation over seeds: of each variant, and of its difference from the first by seed.

    Args:
        results (`dict`):
            Results of `mfuser evaluate` by variant and seed.
        parameters (`dict[str, int]`):
            Number of parameters of each variant.
    """
    reference = next(iter(results.values()))
    rows: dict[str, Any] = {}
    for variant, by_seed in results.items():
        rows[variant] = {"parameters": parameters[variant], "seeds": list(by_seed)}
        for domain, title in DOMAINS.items():
            scores = {seed: result["domains"][domain]["mean_iou"] for seed, result in by_seed.items()}
            paired = [scores[seed] - reference[seed]["domains"][domain]["mean_iou"] for seed in scores]
            rows[variant][title] = {
                "mean_iou": list(scores.values()),
                **_mean_and_deviation(list(scores.values())),
                "difference": _mean_and_deviation(paired),
            }
    return rows


def _mean_and_deviation(values: list[float]) -> dict[str, float | None]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation}


def table(rows: dict[str, Any]) -> str:
    """The summary as Markdown, in percent."""
    titles = list(DOMAINS.values())
    header = ["variant", "parameters", *titles, *(f"{title}, difference" for title in titles)]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for variant, row in rows.items():
        cells = [variant, f"{row['parameters'] / 1e6:.2f} M"]
        cells += [_percent(row[title]) for title in titles]
        cells += [_percent(row[title]["difference"], "+") for title in titles]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _percent(figures: dict[str, Any], sign: str = "") -> str:
    deviation = figures["standard_deviation"]
    mean = f"{100 * figures['mean']:{sign}.1f}"
    return mean if deviation is None else f"{mean} ± {100 * deviation:.1f}"


def main(arguments: list[str] | None = None) -> None:
    parsed = parse_arguments(arguments)
    variants = read_variants()
    threads = max(1, torch.get_num_threads() // parsed.jobs)

    def result_of(seed_and_variant: tuple[int, str]) -> dict[str, Any]:
        seed, variant = seed_and_variant
        folder = parsed.output / f"{variant}-{seed}"
        changes = [f"{name}={json.dumps(value)}" for name, value in variants[variant].items()]
        train(folder, parsed.data, [f"seed={seed}", *changes, *parsed.settings], threads)
        return evaluate(folder, parsed.data, threads)

    # Seed by seed, so that an interrupted ablation has the same seeds for all variants.
    runs = list(product(parsed.seeds, parsed.variants))
    results: dict[str, dict[int, dict[str, Any]]] = {variant: {} for variant in parsed.variants}
    ordered = in_order(result_of, runs, threads=parsed.jobs, ahead=len(runs))
    for (seed, variant), result in zip(runs, ordered, strict=True):
        results[variant][seed] = result
    parameters = {
        variant: MFuserForSemanticSegmentation.from_pretrained(
            parsed.output / f"{variant}-{parsed.seeds[0]}"
        ).num_parameters()
        for variant in parsed.variants
    }
    flat = {f"{variant}-{seed}": each for variant, by_seed in results.items() for seed, each in by_seed.items()}
    differences = protocol_differences(flat)
    if differences:
        sys.exit(f"run_ablation: the results have different protocols: {'; '.join(differences)}")
    rows = summary(results, parameters)
    write_text(parsed.output / "ablation.json", json.dumps(rows, indent=2) + "\n")
    write_text(parsed.output / "ablation.md", table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
