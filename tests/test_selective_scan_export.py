"""The exported selective scan: plain operators, correct for any length, in other processes and in ONNX Runtime."""

import subprocess
import sys

import pytest
import torch
from test_selective_scan import Scan, make_inputs, recurrence, relative_error, without

from mfuser.selective_scan_export import exported_scan


def export_scan(requires_grad=False):
    """A scan exported for any batch size and length, and the inputs that it was captured with."""
    inputs = make_inputs(2, 3, 4, 10, requires_grad=requires_grad)
    tokens = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    shapes = tuple(tokens if x.dim() == 3 else None for x in inputs.values())
    return torch.export.export(Scan(), tuple(inputs.values()), dynamic_shapes=(shapes,)), inputs


@pytest.fixture(scope="module")
def captured():
    return export_scan()


def other_inputs(inputs, batch, length, **options):
    """Tokens of another batch size and length, with the parameters of `inputs`."""
    others = make_inputs(batch, 3, 4, length, seed=1, **options)
    return others | {name: x for name, x in inputs.items() if x.dim() < 3}


@pytest.mark.slow
def test_exported_graph_is_plain_operators_for_any_batch_and_length(captured):
    program, inputs = captured
    operators = {node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    assert len(operators) > 5
    assert {operator.namespace for operator in operators} == {"aten"}
    for batch, length in ((3, 2), (3, 25), (2, 31), (2, 32), (2, 33), (1, 500)):
        others = other_inputs(inputs, batch, length, requires_grad=False)
        if batch == 1:  # like any exported graph, it has been specialised to more than one
            others = {name: x.expand(2, -1, -1) if x.dim() == 3 else x for name, x in others.items()}
        y = program.module()(*others.values())
        assert relative_error(y, recurrence(**others, delta_softplus=True)[0]) < 2e-6, length


@pytest.mark.slow
def test_exported_graph_can_be_trained():
    program, inputs = export_scan(requires_grad=True)
    others = other_inputs(inputs, 2, 25)
    grads = torch.autograd.grad(program.module()(*others.values()).sum(), others.values())
    expected = torch.autograd.grad(Scan()(*others.values()).sum(), others.values())
    for name, grad, expected_grad in zip(others, grads, expected, strict=True):
        assert relative_error(grad, expected_grad) < 5e-6, name


@pytest.mark.slow
def test_exported_graph_is_loaded_where_the_code_is_not(captured, tmp_path):
    program, inputs = captured
    others = tuple(other_inputs(inputs, 3, 40, requires_grad=False).values())
    torch.export.save(program, tmp_path / "scan.pt2")
    torch.save((others, Scan()(*others)), tmp_path / "values.pt")
    code = "import sys; sys.modules['mfuser'] = None; import torch; program = torch.export.load('scan.pt2').module(); "
    code += "inputs, y = torch.load('values.pt'); torch.testing.assert_close(program(*inputs), y)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_exported_graph_becomes_onnx(captured):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    program, inputs = captured
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for length in (5, 70):
        others = other_inputs(inputs, 3, length, requires_grad=False)
        fed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), others.values(), strict=True)}
        y = torch.from_numpy(session.run(None, fed)[0])
        assert relative_error(y, recurrence(**others, delta_softplus=True)[0]) < 2e-6, length


def test_decays_near_one_stay_exact_in_an_exported_graph():
    inputs = make_inputs(1, 3, 2, 1500, scale=1e-3, requires_grad=False)
    inputs["u"].abs_()
    y, last_state = exported_scan(*without(inputs, "z").values(), True, torch.float32)
    expected, expected_state = recurrence(**without(inputs, "z"), delta_softplus=True)
    assert relative_error(y, expected) < 5e-6
    assert relative_error(last_state, expected_state) < 5e-6


def test_exported_graph_refuses_more_tokens_than_it_computes():
    with pytest.raises(RuntimeError, match="at most 65535 tokens"):
        exported_scan(*without(make_inputs(1, 1, 1, 65536), "z").values(), True, torch.float32)
