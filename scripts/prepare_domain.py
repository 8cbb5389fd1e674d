"""
`mfuser prepare`: from a dataset's official download to a folder that `datasets` loads, with labels as train ids.

    mfuser prepare cityscapes ~/downloads/cityscapes data/cityscapes
    mfuser prepare mapillary ~/downloads/vistas data/mapillary --split validation --mapillary-map B
    mfuser prepare custom someone/their-dataset data/theirs --label-column mask --id2label classes.json

A run that was stopped continues when it is started again. `mfuser.data.preparation` describes the result.
"""

import argparse
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import filelock
from huggingface_hub import HfApi

from mfuser.data.loading import PREPARATION_FILE
from mfuser.data.preparation import CUSTOM, prepare
from mfuser.data.tables import DOMAINS, MAPILLARY
from mfuser.scripts import cli

try:
    import datasets
except ImportError:
    datasets = None


def push_to_hub(output: str | Path, repo_id: str) -> None:
    """
    Uploads a prepared folder and its record to a private dataset repository.

    The repository is private because the licences of most of these datasets forbid redistribution.

    Args:
        output (`str` or `Path`):
            The prepared folder.
        repo_id (`str`):
            The repository.
    """
    datasets.load_from_disk(str(output)).push_to_hub(repo_id, private=True)
    HfApi().upload_file(
        path_or_fileobj=str(Path(output) / PREPARATION_FILE),
        path_in_repo=PREPARATION_FILE,
        repo_id=repo_id,
        repo_type="dataset",
    )


def parser() -> argparse.ArgumentParser:
    description = "Convert the official download of a dataset to one that `datasets` loads, with labels as train ids."
    parser = argparse.ArgumentParser(prog="mfuser prepare", description=description)
    parser.add_argument("domain", choices=[*DOMAINS, CUSTOM], help="the dataset; custom: any other")
    parser.add_argument(
        "root", help="folder of the unpacked archives; for other datasets a folder, parquet file or Hub id"
    )
    parser.add_argument("output", type=Path, help="folder to write; an interrupted run is continued")
    parser.add_argument(
        "--split", nargs="+", help="splits to prepare (default: every split found that has public labels)"
    )
    parser.add_argument(
        "--mapillary-map",
        choices=tuple(MAPILLARY.label_maps),
        help="map of the 66 classes to 19 (default: A, as in RobustNet and HRDA)",
    )
    parser.add_argument(
        "--workers", type=int, default=min(8, os.cpu_count() or 1), help="number of processes (default: %(default)s)"
    )
    parser.add_argument("--shard-size", type=int, default=100, help="pairs per file (default: %(default)s)")
    parser.add_argument(
        "--image-column", help="image column of a dataset that is not an official download (default: image)"
    )
    parser.add_argument(
        "--label-column", help="label column of a dataset that is not an official download (default: label)"
    )
    parser.add_argument("--id2label", help="class names of a custom dataset: a JSON file, or the name of a domain")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result to this private dataset repository")
    return parser


@cli.reports_errors("prepare")
def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.mapillary_map and options.domain != "mapillary":
        raise ValueError(f"--mapillary-map applies to mapillary, not to {options.domain}")
    try:
        prepare(
            options.domain,
            options.root,
            options.output,
            splits=options.split,
            label_map=options.mapillary_map,
            image_column=options.image_column,
            label_column=options.label_column,
            id2label=options.id2label,
            workers=options.workers,
            shard_size=options.shard_size,
        )
    except filelock.Timeout as error:
        raise cli.CommandError(f"another run is writing to {options.output}") from error
    except BrokenProcessPool as error:
        raise cli.CommandError(
            "a worker process was killed, possibly for lack of memory; run again with fewer --workers to continue"
        ) from error
    except KeyboardInterrupt:
        print("mfuser prepare: stopped; run again to continue", file=sys.stderr)
        return cli.INTERRUPTED
    if options.push_to_hub:
        push_to_hub(options.output, options.push_to_hub)
    return 0


if __name__ == "__main__":
    sys.exit(main())
