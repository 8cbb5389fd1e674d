#!/usr/bin/env bash
# Measures everything that needs a GPU within 8 minutes, and writes one JSON file and one Markdown file:
#
#     scripts/gpu_report.sh [FOLDER]
#
# Runs the tests of the kernels on the card, and `mfuser benchmark` with --device cuda. Without a GPU it prints what it
# would do.
set -u
folder=${1:-gpu_report}
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

# seconds, name, command
steps=(
    "90|kernel tests|$python -m pytest -q tests/test_selective_scan.py tests/test_selective_scan_export.py"
    "60|scan|$python -m mfuser.scripts.benchmark scan --device cuda --rounds 20"
    "60|one crop|$python -m mfuser.scripts.benchmark forward memory --device cuda --rounds 10"
    "150|image, compiled|$python -m mfuser.scripts.benchmark image windows --device cuda --compile --rounds 3"
    "90|training step|$python -m mfuser.scripts.benchmark train loading --device cuda --rounds 5"
    "30|post-processing|$python -m mfuser.scripts.benchmark postprocessing --device cuda --rounds 10"
)

if ! $python -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2> /dev/null; then
    echo "$python finds no PyTorch with a GPU. With one, this script would run, and write to $folder:"
    for step in "${steps[@]}"; do
        IFS='|' read -r limit name command <<< "$step"
        echo "  $name (at most $limit s): $command"
    done
    exit 0
fi

mkdir -p "$folder" || exit 2
failed=0
{
    echo "# GPU report"
    echo
    echo "$($python -c "import torch; print(torch.cuda.get_device_name(), 'torch', torch.__version__)")"
} > "$folder/report.md"
for step in "${steps[@]}"; do
    IFS='|' read -r limit name command <<< "$step"
    file=${name//[^a-z]/_}
    [[ $command == *benchmark* ]] && command+=" --json $folder/$file.json"
    echo "$name ..."
    timeout "$limit" $command > "$folder/$file.log" 2>&1
    code=$?
    {
        echo
        echo "## $name"
        echo
        if [ $code -ne 0 ]; then
            failed=1
            echo "Ended with exit code $code (124: after $limit s):"
            echo
        fi
        # the tables of a benchmark; for other commands and failures, the last lines
        if [ $code -eq 0 ] && grep -q '^|' "$folder/$file.log"; then
            grep -E '^(\||$)' "$folder/$file.log"
        else
            tail -n 5 "$folder/$file.log" | sed 's/^/    /'
        fi
    } >> "$folder/report.md"
done
$python - "$folder" <<'END'
import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
parts = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json")) if file.stem != "report"}
(folder / "report.json").write_text(json.dumps(parts, indent=2) + "\n")
END
echo "written to $folder/report.md and $folder/report.json"
exit $failed
