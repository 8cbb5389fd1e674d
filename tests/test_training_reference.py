"""Training equals the reference implementation: trajectories, initial values, dropout."""

from pathlib import Path

import check_training
import pytest
import torch

GOLDENS = Path(__file__).parent / "fixtures" / "goldens"


@pytest.fixture(scope="module", params=["clip", "eva02_clip", "siglip"])
def golden(request, tmp_path_factory):
    return check_training.Golden(GOLDENS / request.param, tmp_path_factory.mktemp(request.param))


def beyond(table: check_training.Table) -> dict[str, tuple[float, float]]:
    assert table
    return {name: row for name, row in table.items() if not row[0] <= row[1]}


@pytest.mark.parametrize("run", check_training.RUNS)
def test_twelve_steps_are_those_of_the_reference(golden, run, tmp_path):
    table = check_training.trajectory_errors(golden, run, tmp_path)
    assert not beyond(table)
    assert sum("loss of step" in name for name in table) == check_training.STEPS


def test_new_tensors_start_from_the_distributions_of_the_reference(golden):
    assert not beyond(check_training.initial_value_errors(golden))


@pytest.mark.slow
def test_a_wrong_initial_distribution_is_rejected(golden, monkeypatch):
    def torch_default(layer, **initial_values):
        return layer

    monkeypatch.setattr("mfuser.decoder_mfuser.initialised", torch_default)
    rejected = beyond(check_training.initial_value_errors(golden))
    assert any("pixel_decoder.input_convs.0.conv.weight" in name for name in rejected)


@pytest.mark.slow
def test_dropout_and_stochastic_depth_have_the_statistics_of_the_reference(golden):
    assert not beyond(check_training.dropout_errors(golden, draws=200))


def test_stochastic_depth_drops_the_same_token_positions_for_the_whole_batch(golden):
    if golden.variant != "clip":
        return
    fields = check_training.NO_NOISE | {"vlm_drop_path_rate": 0.5}
    image = golden.inputs["pixel_values"][:1].repeat(2, 1, 1, 1)
    torch.manual_seed(0)
    with torch.no_grad():
        first, second = golden.model(**fields).mfuser.train()(image).dense_embedding
        by_sample = golden.model(**fields, vlm_drop_path_axis="sample").mfuser.train()(image).dense_embedding
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert (by_sample[0] - by_sample[1]).abs().max() > 0.1
