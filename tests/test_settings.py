"""Settings of `mfuser train`: an invalid one ends with exit code 2 and one line that names it and what is accepted."""

import string

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_utils import IntervalStrategy

from mfuser.scripts import train, train_arguments
from mfuser.scripts.settings import BOOLEANS, parse_yaml, read_settings, typed
from mfuser.scripts.train_arguments import parse_arguments

VALID = ("output_dir=runs/x", "train_data=data/x", "use_cpu=true", "report_to=none")

# (settings, the end of the message)
REFUSED = [
    # types
    ("max_steps=many", "max_steps is 'many'; it must be an integer"),
    ("max_steps=1.5", "max_steps is 1.5; it must be an integer"),
    ("max_steps=true", "max_steps is True; it must be an integer"),
    ("learning_rate=fast", "learning_rate is 'fast'; it must be a number"),
    ("learning_rate=nan", "learning_rate is 'nan'; it must be a number"),
    ("learning_rate=1e999", "learning_rate is inf; it must be a number"),
    ("push_to_hub=maybe", "push_to_hub is 'maybe'; it must be true or false"),
    ("push_to_hub=0", "push_to_hub is 0; it must be true or false"),
    ("eval_strategy=never", "eval_strategy is 'never'; it must be one of no, steps, epoch"),
    ("eval_strategy=0", "eval_strategy is 0; it must be one of no, steps, epoch"),
    ("eval_strategy=false", "eval_strategy is False; it must be one of no, steps, epoch"),
    ("lr_scheduler_type=poly", "lr_scheduler_type is 'poly'; it must be one of linear, cosine,"),
    ("output_dir=[a]", "output_dir is ['a']; it must be a string or null"),
    ("output_dir=1.10", "output_dir is 1.1; it must be a string or null"),
    ("train_weights=[1,a]", "train_weights is [1, 'a']; it must be a list (each a number) or null"),
    ("model_config=3", "model_config is 3; it must be a dictionary"),
    ("model_config.crop_size=a", "model_config.crop_size is 'a'; it must be an integer"),
    ("model_config.freeze_encoders=1", "model_config.freeze_encoders is 1; it must be true or false"),
    ("model_config.vfm_config=dinov2", "model_config.vfm_config is 'dinov2'; it must be a dictionary of fields"),
    ("model_config.vfm_config.hidden_size=big", "model_config.vfm_config.hidden_size is 'big'; it must be an integer"),
    (
        "model_config.semantic_loss_ignore_index=0",
        "model_config.semantic_loss_ignore_index is 0; it must be 255, the label of ignored pixels in the data",
    ),
    ("augmentation.scale_range=2", "augmentation.scale_range is 2; it must be a list of 2 (each a number)"),
    ("augmentation.crop_size=a", "augmentation.crop_size is 'a'; it must be an integer"),
    ("monitor_data=data/acdc", "monitor_data is 'data/acdc'; it must be a dictionary (each value a string)"),
    ("augmentation.image_std=[0,1,1]", "`image_std` is (0.0, 1.0, 1.0); it must be finite and positive"),
    # names
    ("learning_rat=1", "unknown setting 'learning_rat'; did you mean 'learning_rate'?"),
    ("crop_size=256", "unknown setting 'crop_size'; did you mean 'model_config.crop_size'?"),
    ("model_config.crop_sise=64", "model_config has no setting 'crop_sise'; did you mean 'crop_size'?"),
    (
        "model_config.vfm_config.hiden_size=64",
        "model_config.vfm_config has no setting 'hiden_size'; did you mean 'hidden_size'?",
    ),
    ("model_config.vlm_config.model_type=vit", "model_type of an encoder is 'vit'; it must be one of dinov2,"),
    ("augmentation.scale=2", "augmentation has no setting 'scale'"),
    ("augmentation.flip_probabilty=1", "augmentation has no setting 'flip_probabilty'; did you mean 'flip_prob"),
    ("validation_size.heights=4", "validation_size has no setting 'heights'; did you mean 'height'?"),
    ("learning_rate=1 learning_rate.x=1", "learning_rate.x cannot be set: learning_rate is 1, which has no fields"),
    ("resume_from_checkpoint=x", "resume_from_checkpoint has no effect in mfuser train; use resume"),
    ("accelerator_config.nope=1", "Trainer has a field that does not exist: AcceleratorConfig.__init__() got an"),
    ("label_names=[mask]", "label_names has no effect in mfuser train; use label_column"),
    ("lr_scheduler_kwargs.num_cycles=1", "lr_scheduler_kwargs is {'num_cycles': 1}, which has no effect with"),
    (
        "lr_scheduler_type=constant lr_scheduler_kwargs.num_cycles=1",
        "lr_scheduler_kwargs is {'num_cycles': 1}, which has no effect with lr_scheduler_type constant",
    ),
    (
        "lr_scheduler_type=cosine lr_scheduler_kwargs.cycles=1",
        "lr_scheduler_kwargs is {'cycles': 1}, which does not fit lr_scheduler_type cosine: get_cosine_schedule",
    ),
    (
        "lr_scheduler_type=cosine lr_scheduler_kwargs.num_cycles=a",
        "lr_scheduler_kwargs is {'num_cycles': 'a'}, which does not fit lr_scheduler_type cosine: ",
    ),
    (
        "eval_strategy=steps lr_scheduler_type=reduce_lr_on_plateau lr_scheduler_kwargs.factor=2",
        "which does not fit lr_scheduler_type reduce_lr_on_plateau: Factor should be < 1.0",
    ),
    ("neftune_noise_alpha=5", "neftune_noise_alpha is 5; it is for language models and must be None"),
    ("use_liger_kernel=true", "use_liger_kernel is True; it is for language models and must be False"),
    (
        "include_num_input_tokens_seen=all",
        "include_num_input_tokens_seen is 'all'; it is for language models and must",
    ),
    ("label_smoothing_factor=0.1", "label_smoothing_factor is 0.1; it must be 0, since the mask loss does not"),
    ("optim_args=beta=1", "optim_args is 'beta=1', which has no effect with optim adamw_torch"),
    # settings without an effect because of others
    ("bf16_full_eval=true", "bf16_full_eval has no effect in mfuser train; use bf16"),
    ("prediction_loss_only=true", "prediction_loss_only has no effect in mfuser train, whose evaluation keeps only"),
    ("eval_accumulation_steps=2", "eval_accumulation_steps has no effect in mfuser train, whose evaluation keeps"),
    ("per_device_eval_batch_size=4", "per_device_eval_batch_size has no effect: images are evaluated one by one"),
    (
        "lr_scheduler_type=cosine --min_learning_rate 1e-7",
        "min_learning_rate has no effect: lr_scheduler_type is cosine, and only polynomial uses it",
    ),
    (
        "lr_scheduler_type=constant warmup_steps=9",
        "warmup_steps has no effect: lr_scheduler_type is constant; constant_with_warmup uses it",
    ),
    ("rare_class_sampling=no rare_class_min_pixels=9", "rare_class_min_pixels has no effect: rare_class_sampling is"),
    ("rare_class_scope=joint", "rare_class_scope has no effect: it is for several train_data, of which there is one"),
    ("mask_unlabelled_classes=no", "mask_unlabelled_classes has no effect: it is for several train_data, of which"),
    ("monitor_images=9", "monitor_images has no effect: there is no monitor_data"),
    # ranges
    ("max_steps=0", "max_steps is 0; it must be at least 1, or -1 for num_train_epochs"),
    ("per_device_train_batch_size=0", "per_device_train_batch_size is 0; it must be at least 1"),
    ("per_device_eval_batch_size=0", "per_device_eval_batch_size is 0; it must be at least 1"),
    ("gradient_accumulation_steps=-1", "gradient_accumulation_steps is -1; it must be at least 1"),
    ("learning_rate=-1e-4", "learning_rate is -0.0001; it must be positive"),
    ("min_learning_rate=1", "min_learning_rate is 1; it must be at most learning_rate (5e-05)"),
    ("schedule_power=0", "schedule_power is 0; it must be positive"),
    ("warmup_start=2", "warmup_start is 2; it must be between 0 and 1"),
    ("save_steps=0", "save_steps is 0; it must be positive"),
    ("eval_steps=0", "eval_steps is 0; it must be positive"),
    ("save_total_limit=0", "save_total_limit is 0; it must be at least 1, or null to keep all checkpoints"),
    ("seed=-1", "seed is -1; it must be between 0 and 4294967295"),
    ("monitor_images=0", "monitor_images is 0; it must be at least 1, or null for all images"),
    ("rare_class_scope=both", "rare_class_scope is 'both'; it must be one of source, joint"),
    ("rare_class_min_pixels=-1", "rare_class_min_pixels is -1; it must not be negative"),
    ("rare_class_temperature=0", "rare_class_temperature is 0; it must be positive"),
    # the command line itself
    ("--max_steps", "--max_steps has no value; write settings as --name value or name=value"),
    ("--push_to_hub --output_dir x", "--push_to_hub has no value; write settings as"),
    ("max_steps=[1", "the value of max_steps is not valid YAML: line 1, column 3"),
    ("=3", "'' is not the name of a setting"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_a_wrong_setting_ends_with_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*VALID, *arguments.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mfuser train: ")]
    assert message in line
    assert list(tmp_path.iterdir()) == []  # nothing is written


RECIPES = {
    "a tab": ("a:\n\t- 1\n", "recipe.yaml is not valid YAML: line 2, column 1: found character '\\t'"),
    "its own base": ("base: recipe.yaml\n", "is its own base (recipe.yaml -> recipe.yaml); base must name another"),
    "a missing base": ("base: other.yaml\n", "other.yaml does not exist; the published recipes are in"),
    "a base that is a number": ("base: 3\n", "is 3; it must be the file name of a recipe"),
    "a list": ("- a\n- b\n", "holds ['a', 'b']; a recipe must hold settings such as `learning_rate: 1e-4`"),
    "nothing": ("", "holds None; a recipe must hold settings"),
    "a setting given twice": ("max_steps: 1\nmax_steps: 2\n", "not valid YAML: line 1, column 1: max_steps is given"),
    "a tag": ("a: !!python/name:os.system\n", "could not determine a constructor for the tag"),
    "bytes": (b"\xff\xfe\x00", "recipe.yaml is not a recipe: it is not UTF-8 text"),
    "a value that contains itself": ("a: &a [*a]\n", "recipe.yaml is not valid YAML: Circular reference detected"),
}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_recipe_that_cannot_be_read_ends_with_one_line_and_exit_code_2(kind, tmp_path, capsys):
    text, message = RECIPES[kind]
    (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert train.main([str(tmp_path / "recipe.yaml")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mfuser train: ")]
    assert message in line


def test_recipes_that_are_each_others_base_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ValueError, match=r"is its own base \(a.yaml -> b.yaml -> a.yaml\)"):
        read_settings([str(tmp_path / "a.yaml")])


def test_with_debug_the_traceback_is_shown_as_well(capsys):
    assert train.main(["max_steps=many", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("mfuser train: max_steps is 'many'; it must be an integer\n")


def test_a_setting_of_a_base_that_another_makes_ineffective_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "base.yaml").write_text("schedule_power: 0.9\nrare_class_temperature: 100\nmonitor_images: 5\n")
    (tmp_path / "recipe.yaml").write_text("base: base.yaml\nlr_scheduler_type: cosine\n")
    warnings = []
    monkeypatch.setattr(train_arguments.logger, "warning", warnings.append)
    parse_arguments([str(tmp_path / "recipe.yaml"), *VALID, "rare_class_sampling=no", "per_device_eval_batch_size=1"])
    names = [warning.split()[0] for warning in warnings]
    assert names == ["schedule_power", "rare_class_temperature", "monitor_images"]
    parse_arguments([*VALID, "lr_scheduler_type=cosine", "rare_class_sampling=no"])  # defaults are no settings
    assert len(warnings) == 3


@pytest.mark.parametrize("written", ["no", "No", "off", "false", "False"])
def test_every_spelling_of_no_means_false_on_the_command_line_and_in_recipes(written, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"push_to_hub: {written}\nrare_class_sampling: {written}\n")
    for arguments in ([str(tmp_path / "recipe.yaml")], [f"push_to_hub={written}", f"rare_class_sampling={written}"]):
        _, data, training = parse_arguments([*arguments, *VALID])
        assert training.push_to_hub is False and data.rare_class_sampling is False


def test_no_remains_a_string_where_a_strategy_is_declared():
    assert parse_arguments(["eval_strategy=no", *VALID])[2].eval_strategy == IntervalStrategy.NO


def test_lossless_conversions_are_made():
    _, data, training = parse_arguments(
        ["max_steps=2e4", "output_dir=2024", "train_weights=[1,2]", "train_data=[1,2]"]
    )
    assert (training.max_steps, training.output_dir, data.train_data) == (20000, "2024", ["1", "2"])


# --- properties ------------------------------------------------------------------------------------------------------

TYPES = [
    bool,
    int,
    float,
    str,
    int | None,
    bool | None,
    list[str] | None,
    list[float],
    dict[str, int],
    float | int | None,
]
TYPES += [tuple[float, float], str | bool, IntervalStrategy | str, dict | str | None]
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    plain,
    lambda each: st.lists(each, max_size=3) | st.dictionaries(st.text(max_size=3), each, max_size=3),
    max_leaves=6,
)


def refusal(function, *arguments):
    """The message of the ValueError that a function raises; `None` if it returns."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return None


@settings(max_examples=300, deadline=None)
@given(values, st.sampled_from(TYPES))
def test_a_value_is_converted_idempotently_or_refused_by_name(value, annotation):
    message = refusal(typed, value, annotation, "the_setting")
    if message is not None:
        assert message.startswith("the_setting is ") and "; it must be " in message
        return
    converted = typed(value, annotation, "the_setting")
    assert typed(converted, annotation, "x") == converted
    if annotation is bool:
        assert converted is value or converted is BOOLEANS[value.lower()]
    if annotation in (int, float):
        assert converted == value and not isinstance(value, bool)


@settings(max_examples=200, deadline=None)
@given(st.integers() | st.booleans() | st.none() | st.text(string.ascii_letters, min_size=1, max_size=8))
def test_values_that_yaml_writes_are_read_back_unchanged(value):
    text = yaml.safe_dump(value).removesuffix("...\n").strip()
    assert parse_yaml(text, "x") == value


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_yaml_or_refused_in_one_line(text):
    message = refusal(parse_yaml, text, "recipe.yaml")
    assert message is None or (message.startswith("recipe.yaml is not valid YAML: ") and "\n" not in message)
