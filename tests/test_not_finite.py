"""Non-finite loss and gradients are skipped, or an error after many steps; non-finite weights are never saved."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_training import trainer_in, weights_of

from mfuser.training.finite import NotFiniteError, check_finite


def spoil(trainer, steps, kind):
    """Makes the loss or the gradients of these steps (from 0) NaN or infinite."""
    training_step = trainer.training_step

    def spoiled(model, *args, **kwargs):
        loss = training_step(model, *args, **kwargs)
        if trainer.state.global_step in steps:
            weight = next(weight for weight in model.parameters() if weight.grad is not None)
            if kind == "loss":
                trainer.loss_is_finite = False
                return loss * math.nan
            weight.grad.view(-1)[0] = {"nan": math.nan, "inf": math.inf}[kind]
        return loss

    trainer.training_step = spoiled


@pytest.mark.parametrize(("kind", "max_grad_norm"), [("loss", 0), ("nan", 1.0), ("inf", 0), ("inf", 1.0)])
def test_a_nonfinite_step_changes_no_weight_and_training_continues(tmp_path, kind, max_grad_norm):
    trainer = trainer_in(tmp_path, max_steps=3, save_strategy="no", max_grad_norm=max_grad_norm)
    spoil(trainer, {1}, kind)
    before = {}
    step_begin = trainer.nonfinite.on_step_begin

    def remember(args, state, control, **kwargs):
        before[state.global_step] = weights_of(trainer.model)
        step_begin(args, state, control, **kwargs)

    trainer.nonfinite.on_step_begin = remember
    trainer.train()
    moved = [name for name, value in before[1].items() if not torch.equal(value, before[2][name])]
    assert moved == []
    assert trainer.state.global_step == 3 and trainer.nonfinite.total == 1
    assert all(
        torch.isfinite(value).all() for value in weights_of(trainer.model).values() if value.is_floating_point()
    )
    assert [entry["nonfinite_steps"] for entry in trainer.state.log_history if "nonfinite_steps" in entry] == [1, 1]


@pytest.mark.slow
def test_many_consecutive_nonfinite_steps_stop_the_training_and_the_last_checkpoint_is_complete(tmp_path):
    trainer = trainer_in(tmp_path, max_steps=9, save_steps=2, max_nonfinite_steps=3)
    spoil(trainer, {2, 4, 5, 6}, "nan")  # the first alone, then three in a row
    with pytest.raises(NotFiniteError, match="3 steps in a row, up to step 7, are not finite, and training stops"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-6",
    ]
    resumed = trainer_in(tmp_path, max_steps=9, save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 9


def test_nonfinite_weights_are_not_saved_and_the_earlier_result_is_kept(tmp_path):
    trainer = trainer_in(tmp_path, save_strategy="no")
    trainer.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.decoder.query_position_embedding[0, 0] = math.nan
    with pytest.raises(
        NotFiniteError, match="1 of the model's tensors, such as decoder.query_position_embedding, are"
    ):
        trainer.save_model()
    with pytest.raises(NotFiniteError, match="not finite"):
        trainer._save_checkpoint(trainer.model, None)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / "_unfinished").exists()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_every_value_of_the_weights_is_checked(values, dtype):
    if dtype == torch.int64:
        check_finite({"counter": torch.arange(3)}, 0)
        return
    tensor = torch.tensor(values).to(dtype)
    if torch.isfinite(tensor).all():
        check_finite({"weight": tensor, "counter": torch.arange(3)}, 0)
    else:
        with pytest.raises(NotFiniteError, match="such as weight"):
            check_finite({"weight": tensor}, 0)
