"""methods/gptq.py against the optimum by trying all codes, and a twin that inverts step by step."""
import itertools

import pytest
import torch

from methods.gptq import (Rounded, act_order, gptq, inverse_factor, nearest_codes, output_error,
                          round_to_nearest, scales_of_group)


def problem(rows, columns, seed, tokens=None):
    """(W, H) of a layer with correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(columns) + 0.3 * torch.randn(columns, columns, generator=draw)
    x = torch.randn(tokens or 4 * columns, columns, generator=draw) @ mix
    return torch.randn(rows, columns, generator=draw), x.T @ x


def error_of(weight, rounded, hessian):
    """The sum of squared errors of the outputs."""
    return output_error(weight - rounded.dequantize(), hessian)


def best_error(weight, hessian, bits):
    """The least error of a matrix with one group, by trying all codes of each row."""
    scales = scales_of_group(weight, bits)
    grid = torch.arange(2**bits) - 2 ** (bits - 1)
    values = torch.tensor(list(itertools.product(grid.tolist(), repeat=weight.shape[1])))
    total = 0.0
    for row, scale in zip(weight, scales):
        difference = row - values * scale                           # (all, in)
        total += float(((difference @ hessian) * difference).sum(1).min())
    return total


def test_between_the_optimum_and_rounding_to_the_nearest():
    """Three bits, four columns: 4,096 matrices for each row."""
    sums = torch.zeros(3)
    for seed in range(20):
        weight, hessian = problem(8, 4, seed)
        ours = gptq(weight, inverse_factor(hessian, 1e-6), 3, 4)
        plain = round_to_nearest(weight, 3, 4)
        errors = [best_error(weight, hessian, 3), error_of(weight, ours, hessian),
                  error_of(weight, plain, hessian)]
        # a reader's values are rounded to float16
        assert errors[0] <= errors[1] * 1.01
        sums += torch.tensor(errors) / errors[0]
    best, ours, nearest = (sums / 20).tolist()
    assert ours < 1.3 and nearest > 1.8


def step_by_step(weight, hessian, bits, group_size):
    """The codes by the paper's equation 2: after each column, the inverse is made anew. float64"""
    rest, codes = weight.double().clone(), []
    for j in range(weight.shape[1]):
        if j % group_size == 0:
            scales = scales_of_group(rest[:, j:j + group_size].float(), bits).double()
        code = nearest_codes(rest[:, j], scales, bits)
        change = (code - 2 ** (bits - 1)) * scales - rest[:, j]
        inverse = hessian[j:, j:].inverse()
        rest[:, j:] += change[:, None] * (inverse[0] / inverse[0, 0])
        codes.append(code)
    return torch.stack(codes, 1)


@pytest.mark.parametrize("bits, group_size", [(4, 16), (3, 12), (8, 40), (2, 128)])
def test_codes_equal_those_of_the_step_by_step_twin(bits, group_size):
    weight, hessian = problem(24, 40, 3)
    ours = gptq(weight, inverse_factor(hessian), bits, group_size)
    damped = hessian.double() + 0.1 * hessian.diagonal().mean() * torch.eye(40)
    twin = step_by_step(weight, damped, bits, group_size)
    same = (ours.codes == twin).float().mean()
    assert same == 1 if bits < 8 else same > 0.99       # 8 bits: a tie in float32 may break apart
    assert ours.scales.shape == (24, -(-40 // group_size)) and ours.scales.dtype == torch.float16


def test_act_order_is_gptq_of_the_columns_in_another_order():
    weight, hessian = problem(24, 40, 3)
    order = act_order(hessian)
    assert (hessian.diagonal()[order].diff() <= 0).all()
    ordered = hessian[order][:, order]
    ours = gptq(weight, inverse_factor(ordered), 4, 16, order)
    plain = gptq(weight[:, order], inverse_factor(ordered), 4, 16)
    assert torch.equal(ours.dequantize()[:, order], plain.dequantize())
    assert sorted(ours.columns.tolist()) == plain.columns.tolist() != ours.columns.tolist()
    assert error_of(weight, ours, hessian) < error_of(
        weight, round_to_nearest(weight, 4, 16), hessian)


def test_inputs_without_correlation_leave_nothing_to_make_up_for():
    weight, _ = problem(6, 20, 0)
    ours = gptq(weight, inverse_factor(torch.diag(torch.arange(1.0, 21))), 4, 8)
    plain = round_to_nearest(weight, 4, 8)
    assert torch.equal(ours.codes, plain.codes) and torch.equal(ours.scales, plain.scales)


def test_inputs_that_are_always_zero_and_fewer_tokens_than_columns():
    weight, hessian = problem(6, 20, 1, tokens=5)           # rank 5 of 20
    hessian[3] = hessian[:, 3] = 0
    ours = gptq(weight, inverse_factor(hessian), 4, 20)
    assert torch.equal(ours.codes[:, 3], round_to_nearest(weight, 4, 20).codes[:, 3])
    assert error_of(weight, ours, hessian) < error_of(
        weight, round_to_nearest(weight, 4, 20), hessian)
    nothing = gptq(weight, inverse_factor(torch.zeros(20, 20)), 4, 8)
    assert torch.equal(nothing.codes, round_to_nearest(weight, 4, 8).codes)
    hessian[0, 0] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        inverse_factor(hessian)


def test_a_matrix_that_is_singular_for_float32_is_damped_more():
    x = torch.ones(100, 1) @ torch.rand(1, 30)
    factor = inverse_factor(x.T @ x, damping=1e-12)
    assert factor.isfinite().all()


def test_the_grid():
    weight = torch.tensor([[1.5, -0.75, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0], [1e-9, 0.0, 0.0, 0.0]])
    rounded = round_to_nearest(weight, 4, 4)
    assert isinstance(rounded, Rounded) and rounded.zero == 8
    assert rounded.scales[0] == torch.tensor(0.2).half()        # 2 * 1.5 / 15
    assert rounded.codes[0].tolist() == [15, 4, 10, 8]          # 7.5 to 8, and 8 + 8 is beyond
    assert torch.equal(rounded.dequantize()[1:], torch.zeros(2, 4))
