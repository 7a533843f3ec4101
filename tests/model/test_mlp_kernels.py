"""The MLP's kernels: the sign in the activation's last bit, and Hopper's against the plain ones.

On a GPU, or else in Triton's interpreter; Hopper's on a Hopper GPU alone.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from fairway.model.fused import mlp, mlp_hopper
from fairway.model.fused.mlp import activate, activate_backward, mlp_down_backward, mlp_up

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOPE = 0.3
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
DTYPES = pytest.mark.parametrize("dtype", INTEGERS, ids=str)

on_hopper = pytest.mark.skipif(
    DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)
# Rows, width and MLP width: the reference submission's, in training and of evaluation's last
# positions, and others.
SIZES = pytest.mark.parametrize(
    ("rows", "width", "mlp_width"),
    [
        (98304, 512, 1536),
        (98304, 512, 2048),
        (8192, 512, 1536),
        (640, 512, 256),
        (64, 64, 128),
        (1000, 200, 328),
    ],
)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact(x: torch.Tensor) -> torch.Tensor:
    return F.leaky_relu(x.float(), SLOPE).square()


def is_negative(activation: torch.Tensor) -> torch.Tensor:
    return (activation.view(INTEGERS[activation.dtype]) & 1) == 1


def slope(activation: torch.Tensor) -> torch.Tensor:
    root = activation.float().sqrt()
    return torch.where(is_negative(activation), -2 * SLOPE * root, 2 * root)


def inputs(dtype: torch.dtype) -> torch.Tensor:
    """Many magnitudes of both signs, powers of two, and zeros."""
    x = random(3000, seed=0) * torch.exp(4 * random(3000, seed=1))
    powers = 2.0 ** torch.arange(-20, 20, device=DEVICE)
    return torch.cat((x, powers, -powers, torch.tensor([0.0, -0.0], device=DEVICE))).to(dtype)


@DTYPES
def test_last_bit_is_the_sign_and_costs_at_most_half_of_the_doubled_spacing(dtype):
    x = inputs(dtype)
    activation = activate(x.clone(), SLOPE)
    assert torch.equal(is_negative(activation), x < 0)
    expected = exact(x)
    spacing = torch.finfo(dtype).eps * 2 ** torch.frexp(expected)[1].float() / 2
    assert ((activation.float() - expected).abs() <= spacing).all()


@DTYPES
def test_slope_is_recovered(dtype):
    x = inputs(dtype)
    activation, gradient = activate(x.clone(), SLOPE), torch.ones_like(x)
    activate_backward(gradient, activation, SLOPE)
    expected = torch.where(x > 0, 2 * x, 2 * SLOPE**2 * x)
    # Half the activation's relative error, and the roundings of three products; the sign is exact.
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(gradient, expected, rtol=2.5 * epsilon, atol=0)


@DTYPES
def test_what_is_not_a_number_stays_so(dtype):
    for bits in (0x7FFF0000, 0x7FFFFFFF, -0x10000):
        x = torch.tensor([bits], dtype=torch.int32, device=DEVICE).view(torch.float32).to(dtype)
        assert activate(x, SLOPE).isnan().all()


def test_products_in_float32_against_float64():
    x, up, down = random(130, 36, seed=0), random(72, 36, seed=1), random(36, 72, seed=2)
    activation = mlp_up(x, up, SLOPE)
    product = x.double() @ up.double().T
    torch.testing.assert_close(activation.double(), exact(product).double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(is_negative(activation), product < 0)
    unsigned = mlp_up(x, up, SLOPE, signed=False)
    torch.testing.assert_close(unsigned.double(), exact(product).double(), rtol=1e-4, atol=1e-4)
    assert not torch.equal(unsigned, activation)
    found = mlp_down_backward(x, down, activation, SLOPE)
    expected = x.double() @ down.double() * slope(activation)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def half_precision(rows, width, mlp_width) -> list[torch.Tensor]:
    """Rows, and the weights of the product to the MLP's width and of that from it."""
    shapes = (rows, width), (mlp_width, width), (width, mlp_width)
    x, up, down = (random(*shape, seed=i, dtype=torch.bfloat16) for i, shape in enumerate(shapes))
    return [x, up * width**-0.5, down * width**-0.5]


def plain(monkeypatch, function, *arguments) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "_is_for_hopper", lambda x: False)
        return function(*arguments)


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=torch.bfloat16, device=DEVICE)


@on_hopper
@SIZES
def test_hoppers_product_and_activation(rows, width, mlp_width, monkeypatch):
    x, weight, _ = half_precision(rows, width, mlp_width)
    out = poisoned(rows, mlp_width)
    mlp_hopper.up(x, weight, out, SLOPE, True)
    assert torch.equal(mlp_up(x, weight, SLOPE), out)
    product = x.float() @ weight.float().T
    unsigned = mlp_up(x, weight, SLOPE, signed=False)
    torch.testing.assert_close(unsigned.float(), exact(product), rtol=2**-8 + 1e-4, atol=1e-5)
    torch.testing.assert_close(out.float(), exact(product), rtol=2**-7 + 1e-4, atol=1e-5)
    certain = product.abs() > 1e-3
    assert torch.equal(is_negative(out)[certain], (product < 0)[certain])
    torch.testing.assert_close(
        out, plain(monkeypatch, mlp_up, x, weight, SLOPE), rtol=2**-5, atol=1e-5
    )


@on_hopper
@SIZES
def test_hoppers_gradient(rows, width, mlp_width, monkeypatch):
    x, up, down = half_precision(rows, width, mlp_width)
    activation, out = mlp_up(x, up, SLOPE), poisoned(rows, mlp_width)
    gradient = random(rows, width, seed=3, dtype=torch.bfloat16)
    mlp_hopper.down_backward(gradient, down, activation, out, SLOPE)
    arguments = gradient, down, activation, SLOPE
    assert torch.equal(mlp_down_backward(*arguments), out)
    expected = (gradient.float() @ down.float()).mul_(slope(activation))
    torch.testing.assert_close(out.float(), expected, rtol=2**-8 + 1e-3, atol=1e-3)
    found = plain(monkeypatch, mlp_down_backward, *arguments)
    torch.testing.assert_close(out, found, rtol=2**-6, atol=1e-3)


@on_hopper
def test_hoppers_kernels_in_a_graph_read_what_is_there_at_each_replay():
    x, up, down = half_precision(1000, 512, 1536)
    mlp_down_backward(x, down, mlp_up(x, up, SLOPE), SLOPE)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        activation = mlp_up(x, up, SLOPE)
        found = mlp_down_backward(x, down, activation, SLOPE)
    for factor in (1.0, -2.0):
        x.mul_(factor)
        found.fill_(float("nan"))
        graph.replay()
        assert torch.equal(activation, mlp_up(x, up, SLOPE))
        assert torch.equal(found, mlp_down_backward(x, down, activation, SLOPE))


@on_hopper
def test_hoppers_kernels_are_chosen_for_what_they_can_do():
    def chosen(width: int, dtype: torch.dtype) -> bool:
        return mlp._is_for_hopper(torch.empty(1, width, dtype=dtype, device=DEVICE))

    assert chosen(512, torch.bfloat16)
    assert not chosen(520, torch.bfloat16) and not chosen(512, torch.float32)
