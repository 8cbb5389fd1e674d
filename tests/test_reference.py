"""Equality with the reference implementation, tensor by tensor, with weights converted like a user's checkpoint."""

from pathlib import Path

import check_golden
import pytest

GOLDENS = Path(__file__).parent / "fixtures" / "goldens"


@pytest.mark.parametrize("variant", ["clip", "eva02_clip", "siglip"])
def test_every_output_score_loss_and_gradient_equals_the_reference(variant):
    table = check_golden.errors(GOLDENS / variant)
    beyond = {name: error for name, (error, tolerance) in table.items() if error > tolerance}
    assert not beyond
    assert len(table) > 250
    assert {"slide_scores", "flip_scores", "loss_total", "score_map", "gradient of contexts"} <= set(table)


def test_the_command_exits_1_beyond_the_tolerance(monkeypatch, capsys):
    monkeypatch.setattr(check_golden, "OUTPUT_TOLERANCE", 1e-9)
    assert check_golden.main([str(GOLDENS / "clip")]) == 1
    assert "beyond tolerance" in capsys.readouterr().out
