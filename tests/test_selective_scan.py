"""The selective scan: correct results in every implementation, bounded memory, one node in a captured graph."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mfuser import selective_scan as scan_module
from mfuser.selective_scan import selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
GPU = torch.cuda.is_available()
# Triton's interpreter has to be chosen before anything imports triton.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PATHS = ["one by one", "in pairs"] + (["triton"] if GPU or INTERPRETED else [])


def recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The definition, one token at a time, in float64."""
    u, delta, A, B, C, D, z, delta_bias = (
        None if x is None else x.double() for x in (u, delta, A, B, C, D, z, delta_bias)
    )
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    h, outputs = torch.zeros_like(A), []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(2), delta.unbind(2), B.unbind(2), C.unbind(2), strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]
        outputs.append((h * C_t[:, None]).sum(-1))
    y = torch.stack(outputs, 2)
    if D is not None:
        y = y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), h


def make_inputs(batch, dim, state, length, seed=0, scale=1.0, requires_grad=True, device="cpu"):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "u": normal(batch, dim, length),
        "delta": normal(batch, dim, length) * scale,
        "A": -(normal(dim, state).abs() + 0.1) * scale,
        "B": normal(batch, state, length),
        "C": normal(batch, state, length),
        "D": normal(dim),
        "z": normal(batch, dim, length),
        "delta_bias": normal(dim) - 1,
    }
    return {name: x.to(device).requires_grad_(requires_grad) for name, x in inputs.items()}


def without(inputs, *names):
    return {name: x for name, x in inputs.items() if name not in names}


def relative_error(result, expected):
    return ((result.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def assert_equals_recurrence(inputs, delta_softplus=True, tolerance=2e-6):
    """Output, last state and the gradient of every input."""
    y, last_state = selective_scan(**inputs, delta_softplus=delta_softplus, return_last_state=True)
    expected, expected_state = recurrence(**inputs, delta_softplus=delta_softplus)
    assert relative_error(y, expected) < tolerance
    assert relative_error(last_state, expected_state) < tolerance
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, list(inputs.values()), grad_y)
    expected_grads = torch.autograd.grad(expected, list(inputs.values()), grad_y.double())
    for (name, x), grad, expected_grad in zip(inputs.items(), grads, expected_grads, strict=True):
        assert grad.dtype == x.dtype
        assert relative_error(grad, expected_grad) < tolerance, name


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """Each implementation in turn; where it can be set, chunks of few tokens: short sequences then have several."""
    monkeypatch.setattr(scan_module, "_CPU_CHUNK_BYTES", 0)  # a chunk then has `state` tokens
    if request.param == "in pairs":

        class InPairs(scan_module._StateBuffer):
            def __init__(self, *args):
                super().__init__(*args)
                self.each = None

        monkeypatch.setattr(scan_module, "_StateBuffer", InPairs)
    elif request.param == "triton":
        kernels = pytest.importorskip("mfuser.selective_scan_triton")
        monkeypatch.setattr(kernels, "TRITON_CHUNK_TOKENS", 4)
        triton, other = (kernels.triton_scan, kernels.triton_scan_backward, 4), scan_module._implementation
        monkeypatch.setattr(
            scan_module, "_implementation", lambda u, dtype: triton if dtype == torch.float32 else other(u, dtype)
        )
        real = kernels._Launcher.launch

        def launch(self, kernel, chunks, *tensors, **options):
            named = {*self.sizes, *options} - {"num_warps"}  # the interpreter accepts superfluous names
            assert kernel.arg_names[: len(tensors)] == [name for name in kernel.arg_names if name not in named]
            real(self, kernel, chunks, *tensors, **options)

        monkeypatch.setattr(kernels._Launcher, "launch", launch)
    return request.param


def load_copy(name, package):
    """The module once more, as Transformers loads a model's own code: from its file, under another name."""
    file = Path(scan_module.__file__).with_name(f"{name}.py")
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = [str(file.parent)]
    spec = importlib.util.spec_from_file_location(f"{package}.{name}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------ correct results
@pytest.mark.parametrize(
    "shape",
    [(1, 3, 1, 1), (2, 18, 5, 11), (1, 2, 8, 8), (1, 4, 3, 14), (2, 70, 3, 75)],
    ids=["one token", "two blocks of channels", "one full chunk", "ragged chunks", "many channels and chunks"],
)
def test_output_state_and_gradients_equal_the_recurrence(path, shape):
    assert_equals_recurrence(make_inputs(*shape))


@pytest.mark.parametrize("absent", [("D", "z", "delta_bias"), ("D",), ("z",), ("delta_bias",)], ids=str)
@pytest.mark.parametrize("delta_softplus", [True, False])
def test_every_option_can_be_left_out(path, absent, delta_softplus):
    inputs = make_inputs(2, 3, 4, 9, scale=0.3)
    assert_equals_recurrence(without(inputs, *absent), delta_softplus)


def test_large_steps_and_fast_decays_stay_finite(path):
    assert_equals_recurrence(make_inputs(1, 4, 4, 12, scale=30.0), tolerance=1e-5)


def test_long_sequence_over_many_chunks_equals_the_recurrence(monkeypatch):
    monkeypatch.setattr(scan_module, "_CPU_CHUNK_BYTES", 4 * 2 * 6 * 4 * 20)  # 20 tokens a chunk
    assert_equals_recurrence(make_inputs(2, 6, 4, 307, scale=0.3))


@pytest.mark.parametrize("path", ["one by one", "in pairs"], indirect=True)
def test_gradients_agree_with_finite_differences(path):
    inputs = {name: x.detach().double().requires_grad_() for name, x in make_inputs(2, 3, 2, 5).items()}
    assert selective_scan(**inputs).dtype == torch.float64
    assert torch.autograd.gradcheck(
        lambda *x: selective_scan(**dict(zip(NAMES, x, strict=True))), tuple(inputs.values())
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out_with_float32_inside(path, dtype):
    inputs = make_inputs(1, 4, 4, 9)
    low = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    y = selective_scan(**low, delta_softplus=True)
    expected, _ = recurrence(**low, delta_softplus=True)
    assert y.dtype == dtype
    # Nothing but the result is rounded, so the error is half a unit in the last place.
    assert ((y.double() - expected).abs() <= 0.51 * torch.finfo(dtype).eps * expected.abs() + 1e-6).all()
    grads = torch.autograd.grad(y.sum(), low.values())
    expected_grads = torch.autograd.grad(expected.sum(), low.values())
    for grad, expected_grad, x in zip(grads, expected_grads, low.values(), strict=True):
        assert grad.dtype == x.dtype == dtype
        assert relative_error(grad, expected_grad) < 2 * torch.finfo(dtype).eps


def test_parameters_may_stay_in_float32_beside_half_precision_tokens(path):
    inputs = make_inputs(1, 4, 4, 9)
    low = {name: x.bfloat16() if name in ("u", "B", "C") else x for name, x in inputs.items()}
    y = selective_scan(**low, delta_softplus=True)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, recurrence(**low, delta_softplus=True)[0]) < 0.005


def test_autocast_changes_nothing():
    inputs = make_inputs(1, 8, 4, 20)
    y = selective_scan(**inputs, delta_softplus=True)
    grads = torch.autograd.grad(y.sum(), inputs.values())
    with torch.autocast("cpu", torch.bfloat16):
        y_autocast = selective_scan(**inputs, delta_softplus=True)
        grads_autocast = torch.autograd.grad(y_autocast.sum(), inputs.values())
    assert torch.equal(y, y_autocast)
    assert all(map(torch.equal, grads, grads_autocast))


def test_any_strides_give_the_same_numbers(path):
    inputs = make_inputs(2, 4, 4, 9, requires_grad=False)
    expected = selective_scan(**inputs, delta_softplus=True)
    strided = {}
    for name, x in inputs.items():
        roomy = x.new_zeros(*(2 * size for size in x.shape)).transpose(0, -1)
        strided[name] = roomy[tuple(slice(0, 2 * size, 2) for size in x.shape[::-1])].transpose(0, -1).copy_(x)
        assert x.numel() == 1 or not strided[name].is_contiguous()
    torch.testing.assert_close(selective_scan(**strided, delta_softplus=True), expected)
    shared = {**inputs, "B": inputs["B"][:1].expand(2, -1, -1)}
    torch.testing.assert_close(selective_scan(**shared, delta_softplus=True)[0], expected[0])


def test_channels_of_output_and_gradients_are_adjacent_in_memory(path):
    inputs = make_inputs(2, 4, 4, 9)
    y = selective_scan(**inputs)
    assert y.transpose(1, 2).is_contiguous()
    grads = torch.autograd.grad(y.sum(), [inputs["u"], inputs["B"]])
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)


def test_last_state_is_where_a_following_scan_would_begin(path):
    inputs = make_inputs(1, 3, 4, 10)
    y, last_state = selective_scan(**without(inputs, "z"), return_last_state=True)
    assert last_state.shape == (1, 3, 4) and last_state.dtype == torch.float32
    assert y.requires_grad and not last_state.requires_grad
    # One more token with step 0 and no skip reads that state.
    more = {
        name: F.pad(x, (0, 1)) if x.dim() == 3 else x for name, x in without(inputs, "z", "D", "delta_bias").items()
    }
    more["C"] = torch.cat([inputs["C"], torch.ones(1, 4, 1)], 2)
    plain_state = selective_scan(**without(inputs, "z", "D", "delta_bias"), return_last_state=True)[1]
    torch.testing.assert_close(selective_scan(**more)[..., -1], plain_state.sum(-1))


@pytest.mark.skipif(GPU or INTERPRETED, reason="the tests above run the Triton kernels")
@pytest.mark.slow
def test_triton_kernels_are_correct_in_the_interpreter():
    """All tests above that take `path`, with the Triton kernels, in a separate process."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "triton"]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ------------------------------------------------------------------------------------------------ memory
class Allocations(TorchDispatchMode):
    """Bytes of all storages that operators create, and of the largest."""

    def __init__(self):
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(values):
            tensors = [x for x in values if isinstance(x, torch.Tensor)]
            return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}

        result = func(*args, **(kwargs or {}))
        known = storages([*args, *(kwargs or {}).values()])
        for pointer, size in storages(result if isinstance(result, (tuple, list)) else [result]).items():
            if pointer not in known:
                self.total += size
                self.largest = max(self.largest, size)
        return result


@pytest.mark.parametrize("path", ["one by one"], indirect=True)
def test_memory_is_that_of_the_inputs_not_of_the_states(path):
    batch, dim, state, length = 2, 32, 16, 600
    arguments = [make_inputs(batch, dim, state, length, requires_grad=False)[name] for name in NAMES if name != "z"]
    size_of_u = 4 * batch * dim * length
    with Allocations() as forward:
        *_, states = scan_module._torch_scan(*arguments, True, True)
    with Allocations() as backward:
        scan_module._torch_scan_backward(torch.ones(batch, dim, length), *arguments, True, states)
    assert forward.largest <= 1.1 * size_of_u and forward.total <= 5 * size_of_u
    assert backward.largest <= 1.1 * size_of_u and backward.total <= 8 * size_of_u


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_states_are_kept_only_where_a_gradient_may_follow(mode, monkeypatch):
    kept = []
    real = scan_module._torch_scan
    monkeypatch.setattr(scan_module, "_torch_scan", lambda *args: kept.append(args[-1]) or real(*args))
    inputs = make_inputs(1, 3, 4, 10)
    with mode():
        y = selective_scan(**inputs)
    assert torch.equal(y, selective_scan(**inputs))
    selective_scan(**{name: x.detach() for name, x in inputs.items()})
    assert kept == [False, True, False]


# ------------------------------------------------------------------------------------------------ graphs
class Scan(torch.nn.Module):
    def forward(self, *inputs):
        return selective_scan(*inputs, delta_softplus=True)


def scans_in(graph):
    return [node for node in graph.nodes if "selective_scan" in str(node.target)]


@pytest.mark.parametrize("path", ["one by one"], indirect=True)
@pytest.mark.parametrize("keep_states", [True, False])
def test_operator_meets_the_contract_of_custom_operators(keep_states, path):
    inputs = make_inputs(2, 3, 4, 10)
    arguments = [inputs[name] for name in NAMES if name != "z"]
    torch.library.opcheck(scan_module._scan, (*arguments, True, keep_states))


def test_compiled_graph_is_whole_and_gives_the_same_gradients():
    graphs = []

    def count_scans(graph_module, _):
        graphs.append(scans_in(graph_module.graph))
        return graph_module

    inputs = make_inputs(2, 3, 4, 10)
    y = torch.compile(Scan(), fullgraph=True, backend=count_scans)(*inputs.values())
    assert [len(nodes) for nodes in graphs] == [1]
    expected = Scan()(*inputs.values())
    assert torch.equal(y, expected)

    y = torch.compile(Scan(), fullgraph=True, backend="aot_eager")(*inputs.values())
    assert torch.equal(y, expected)
    grads = torch.autograd.grad(y.sum(), inputs.values())
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.sum(), inputs.values())))


def test_graph_captured_without_gradients_can_still_be_trained():
    inputs = make_inputs(1, 3, 4, 10)
    arguments = [inputs[name] for name in NAMES if name != "z"]
    y = scan_module._scan(*arguments, True, False)[0]
    expected = selective_scan(**without(inputs, "z"), delta_softplus=True)
    grads = torch.autograd.grad(y.sum(), arguments)
    assert all(map(torch.equal, grads, torch.autograd.grad(expected.sum(), arguments)))


def test_meta_tensors_give_shapes():
    inputs = make_inputs(2, 3, 4, 10, device="meta")
    y, last_state = selective_scan(**inputs, return_last_state=True)
    assert y.is_meta and y.shape == (2, 3, 10) and last_state.shape == (2, 3, 4)
    y.sum().backward()
    assert all(x.grad.shape == x.shape for x in inputs.values())


def test_second_derivative_is_refused():
    inputs = make_inputs(1, 3, 4, 10)
    (grad,) = torch.autograd.grad(selective_scan(**inputs).sum(), inputs["A"], create_graph=True)
    with pytest.raises(RuntimeError, match="selective_scan_backward"):
        grad.sum().backward()


def test_two_copies_of_the_code_share_one_operator():
    copy = load_copy("selective_scan", "transformers_modules.a_model.0f3")
    assert copy._scan is scan_module._scan and copy._scan_backward is scan_module._scan_backward
    assert "0f3" not in str(copy._scan)
    inputs = make_inputs(1, 3, 4, 10)
    y = copy.selective_scan(**inputs)
    assert torch.equal(selective_scan(**inputs), y)
    y.sum().backward()


def test_copies_of_another_version_have_their_own_operator(tmp_path):
    text = Path(scan_module.__file__).read_text().replace("_VERSION = 1", "_VERSION = 0")
    (tmp_path / "old_scan.py").write_text(text.replace("from .", "from mfuser."))
    spec = importlib.util.spec_from_file_location("old_scan", tmp_path / "old_scan.py")
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy._scan is not scan_module._scan
    inputs = make_inputs(1, 3, 4, 10)
    assert torch.equal(copy.selective_scan(**inputs), selective_scan(**inputs))


def test_decays_near_one_stay_exact_over_many_tokens():
    """A relative error of 1e-7 per decay would accumulate to 1e-4 in a state that depends on a thousand tokens."""
    inputs = make_inputs(1, 3, 2, 1500, scale=1e-3)
    assert_equals_recurrence({**inputs, "u": inputs["u"].detach().abs().requires_grad_()}, tolerance=5e-6)


@pytest.mark.parametrize("name", NAMES)
def test_not_a_number_is_passed_on(name, path):
    inputs = make_inputs(1, 3, 4, 9, requires_grad=False)
    inputs[name].flatten()[0] = float("nan")
    assert selective_scan(**inputs, delta_softplus=True)[0, 0].isnan().any()


# ------------------------------------------------------------------------------------------------ mamba_ssm
def test_mamba_ssm_gets_what_its_kernel_accepts(monkeypatch):
    """Its kernel requires one dtype for u, delta, B, C and z, and float32 for A, D and delta_bias."""
    received = {}

    def kernel(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        received.update(zip(NAMES, (u, delta, A, B, C, D, z, delta_bias), strict=True))
        y, last_state = recurrence(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return y.to(u.dtype), last_state.float()

    monkeypatch.setattr(scan_module, "mamba_ssm_scan", kernel)
    monkeypatch.setattr(scan_module, "_uses_mamba_ssm", lambda *args: True)
    inputs = make_inputs(1, 4, 4, 9)
    for dtypes in (dict.fromkeys(NAMES, torch.bfloat16), dict.fromkeys(["u", "delta", "A"], torch.bfloat16)):
        mixed = {name: x.to(dtypes.get(name, torch.float32)) for name, x in inputs.items()}
        y, last_state = selective_scan(**mixed, delta_softplus=True, return_last_state=True)
        tokens = {received[name].dtype for name in ("u", "delta", "B", "C", "z")}
        assert tokens == ({torch.bfloat16} if "z" in dtypes else {torch.float32})
        assert {received[name].dtype for name in ("A", "D", "delta_bias")} == {torch.float32}
        assert y.dtype == torch.bfloat16 and y.requires_grad and not last_state.requires_grad
        assert relative_error(y, recurrence(**mixed, delta_softplus=True)[0]) < 0.005


def test_mamba_ssm_without_its_extension_is_not_used(monkeypatch):
    interface = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = recurrence
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)  # importing it raises ImportError
    assert load_copy("selective_scan", "without_extension").mamba_ssm_scan is None


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("triton", [True, False])
def test_scan_on_a_gpu_equals_the_recurrence(triton, monkeypatch):
    monkeypatch.setattr(scan_module, "mamba_ssm_scan", None)
    if not triton:
        monkeypatch.setattr(scan_module, "triton_scan", None)
    assert_equals_recurrence(make_inputs(2, 40, 16, 300, device="cuda"))


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("name", "bad", "error", "message"),
    [
        ("u", torch.zeros(3, 10), ValueError, r"u of shape \(batch, dim, length\)"),
        ("u", torch.zeros(2, 3, 0), ValueError, "nothing to scan"),
        ("delta", torch.zeros(2, 3, 9), ValueError, r"delta of shape \(2, 3, 10\).*got \(2, 3, 9\)"),
        ("A", torch.zeros(4), ValueError, r"A of shape \(dim, state\)"),
        ("A", torch.zeros(4, 4), ValueError, r"A of shape \(3, 4\)"),
        ("B", torch.zeros(2, 1, 4, 10), ValueError, r"B of shape \(2, 4, 10\)"),
        ("C", torch.zeros(2, 10, 4), ValueError, r"C of shape \(2, 4, 10\)"),
        ("D", torch.zeros(1), ValueError, r"D of shape \(3,\)"),
        ("z", torch.zeros(2, 10, 3), ValueError, r"z of shape \(2, 3, 10\)"),
        ("delta_bias", torch.zeros(2, 3), ValueError, r"delta_bias of shape \(3,\)"),
        ("u", torch.zeros(2, 3, 10, dtype=torch.int64), TypeError, "u in torch.int64"),
        ("A", torch.zeros(3, 4, dtype=torch.complex64), TypeError, "A in torch.complex64"),
        ("B", torch.zeros(2, 4, 10, device="meta"), ValueError, "u is on cpu, B on meta"),
    ],
)
def test_invalid_input_is_named_with_what_is_accepted(name, bad, error, message):
    with pytest.raises(error, match=message):
        selective_scan(**{**make_inputs(2, 3, 4, 10), name: bad})


def test_the_hub_kernel_is_asked_for_by_name_and_then_used(monkeypatch):
    asked = []
    kernel = types.SimpleNamespace(selective_scan_fn=object())
    monkeypatch.setattr(scan_module, "get_kernel", lambda *args, **kwargs: asked.append((args, kwargs)) or kernel)
    monkeypatch.setattr(scan_module, "mamba_ssm_scan", None)
    scan_module.use_hub_kernel()
    assert asked == [(("kernels-community/mamba-ssm",), {"version": 4})]  # as in Transformers' own table
    assert scan_module.mamba_ssm_scan is kernel.selective_scan_fn
