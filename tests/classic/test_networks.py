"""The networks: the twin perceptrons against two plain ones and their gradient by hand against autograd's, and more."""

from __future__ import annotations

import copy
import itertools
import math

import control_cases as cases
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from classic.networks import SMALL, ImageEncoder, NatureCNN, RecurrentCore, TwinMLP, _twin, _TwinTanh

SHAPES = pytest.mark.parametrize("hidden_sizes", [(5,), (5, 4), (6, 5, 4)], ids=str)
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "elu": nn.ELU, "silu": nn.SiLU}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=cases.generator(seed), dtype=dtype)


def twin_of(hidden_sizes=(5, 4), *, num_inputs=3, num_outputs=2, **settings):
    """In float64, and no bias at 0."""
    network = TwinMLP(num_inputs, hidden_sizes, num_outputs, **settings).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.7, generator=cases.generator(parameter.numel()))
    return network


def plain_of(network, hidden_sizes, num_inputs=3):
    """(policy, value) as two nn.Sequential with the same weights, None for activations that are another's."""
    activation = next(kind for name, kind in ACTIVATIONS.items() if network.activation.__name__ == name)
    weights, biases = network.layers()
    found = []
    for which in range(2):
        layers, size = [], num_inputs
        for index, width in enumerate(hidden_sizes):
            layers += [linear(weights[index][which].T, biases[index][which, 0]), activation()]
            size = width
        found.append(nn.Sequential(*layers, linear(weights[which - 2], biases[which - 2])))
        assert found[-1][-1].in_features == size
    return found


def linear(weight, bias):
    """nn.Linear with copies of these."""
    layer = nn.Linear(*reversed(weight.shape)).double()
    layer.weight.data, layer.bias.data = weight.detach().clone(), bias.detach().clone()
    return layer


def gradients_of(network):
    """The parameters' gradients in the shapes of `layers`."""
    return network.cut(network.weights.grad, network.biases.grad)


@SHAPES
@pytest.mark.parametrize("of_the_input", [True, False])
def test_the_gradient_by_hand_is_autograd_s(hidden_sizes, of_the_input):
    network = twin_of(hidden_sizes)
    x = randn(7, 3).requires_grad_(of_the_input)
    arguments = (x, network.weights, network.biases)

    def by_hand(*arguments):
        return _TwinTanh.apply(*arguments, network)[:2]  # the features' variances send no gradient into them

    assert gradcheck(by_hand, arguments)
    assert gradgradcheck(by_hand, arguments)
    expected = _twin(x, *network.layers(), torch.tanh)
    for ours, theirs in zip(_TwinTanh.apply(*arguments, network), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    weights = [randn(7, 2, seed=1), randn(7, 1, seed=2)]
    wanted = [tensor for tensor in arguments if tensor.requires_grad]
    ours = torch.autograd.grad(by_hand(*arguments), wanted, weights)
    theirs = torch.autograd.grad(expected[:2], wanted, weights)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@SHAPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_twin_networks_are_two_plain_ones(hidden_sizes, activation):
    network = twin_of(hidden_sizes, activation=activation)
    policy, value = plain_of(network, hidden_sizes)
    x = randn(7, 3)
    output, values, features = network(x)
    torch.testing.assert_close(output, policy(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(values, value(x).squeeze(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(features, policy[:-1](x), rtol=1e-12, atol=1e-12)
    # One step of the sum of both losses: each network feels its own.
    (output.square().sum() + values.sin().sum()).backward()
    (policy(x).square().sum() + value(x).sin().sum()).backward()
    weights, biases = gradients_of(network)
    for which, plain in enumerate((policy, value)):
        *hidden, head = [layer for layer in plain if isinstance(layer, nn.Linear)]
        for index, layer in enumerate(hidden):
            torch.testing.assert_close(weights[index][which].T, layer.weight.grad, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(biases[index][which, 0], layer.bias.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(weights[which - 2], head.weight.grad, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(biases[which - 2], head.bias.grad, rtol=1e-10, atol=1e-10)


def test_large_batches_are_evaluated_as_small_ones_are():
    network = TwinMLP(3, (32, 32), 2, policy_head_gain=1.0)
    x = 3 * randn(400, 3, dtype=torch.float32)
    assert x.shape[0] * 32 > SMALL  # where another formula of tanh takes over
    together = network(x)
    for start in range(0, 400, 10):
        for ours, few in zip(together, network(x[start : start + 10]), strict=True):
            torch.testing.assert_close(ours[start : start + 10], few, rtol=0, atol=2e-6)


def test_a_network_without_hidden_layers_is_linear():
    network = twin_of(())
    x = randn(7, 3)
    output, values, features = network(x)
    policy, value = plain_of(network, ())
    torch.testing.assert_close(output, policy(x))
    torch.testing.assert_close(values, value(x).squeeze(-1))
    assert torch.equal(features, x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_policy_alone_is_the_policy_half(activation):
    network = twin_of(activation=activation)
    output, _, features = network(randn(7, 3))
    alone, its_features = network.policy_alone(randn(7, 3))
    torch.testing.assert_close(alone, output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(its_features, features, rtol=1e-12, atol=1e-12)


def assert_orthogonal(weight, gain):
    """W Wᵀ = gain² I, or WᵀW where W is taller than wide."""
    square = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    torch.testing.assert_close(square, gain**2 * torch.eye(len(square)), rtol=1e-4, atol=1e-5)


def test_weights_begin_orthogonal_and_biases_at_zero():
    network = TwinMLP(6, (8, 5), 3, policy_head_gain=0.01)
    weights, biases = network.layers()
    for twins in weights[:2]:
        for weight in twins.detach():
            assert_orthogonal(weight, math.sqrt(2))
        assert not torch.equal(*twins)  # two networks, not one twice
    assert_orthogonal(weights[-2].detach(), 0.01)
    assert_orthogonal(weights[-1].detach(), 1.0)
    assert not any(bias.any() for bias in biases)


def test_without_orthogonal_weights_layers_begin_as_torch_makes_them():
    network = TwinMLP(6, (8,), 3, orthogonal=False)
    weights, biases = network.layers()
    assert biases[0].any()
    assert weights[0].abs().max() <= 1 / math.sqrt(6)


# --- recurrent -------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["lstm", "gru"])
def core(request):
    core = RecurrentCore(3, 4, request.param, orthogonal=True).double()
    for name, parameter in core.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter, generator=cases.generator(1))
    return core


def test_a_recurrent_core_is_torch_s_own_where_no_episode_starts(core):
    kind = nn.LSTM if isinstance(core.cell, nn.LSTMCell) else nn.GRU
    reference = kind(3, 4, batch_first=True).double()
    reference.load_state_dict({f"{name}_l0": parameter for name, parameter in core.cell.state_dict().items()})
    x, state = randn(2, 5, 3), randn(2, core.state_size, seed=1)
    features, last = core(x, torch.zeros(2, 5, dtype=torch.bool), state)
    before = tuple(part[None].contiguous() for part in state.chunk(core.state_size // 4, dim=-1))
    expected, after = reference(x, before if len(before) == 2 else before[0])
    torch.testing.assert_close(features, expected, rtol=1e-12, atol=1e-12)
    after = torch.cat(after, dim=-1)[0] if isinstance(after, tuple) else after[0]
    torch.testing.assert_close(last, after, rtol=1e-12, atol=1e-12)


def test_a_recurrent_core_forgets_where_an_episode_starts(core):
    x, starts = randn(2, 6, 3), torch.zeros(2, 6, dtype=torch.bool)
    starts[0, 3] = True
    nothing = torch.zeros(2, core.state_size, dtype=torch.float64)
    features, last = core(x, starts, randn(2, core.state_size, seed=1))
    afresh, end = core(x[:, 3:], starts[:, 3:], nothing)
    torch.testing.assert_close(features[0, 3:], afresh[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last[0], end[0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(features[1, 3:], afresh[1])


def test_no_gradient_passes_the_start_of_an_episode(core):
    x, starts = randn(1, 4, 3).requires_grad_(), torch.tensor([[False, False, True, False]])
    features, _ = core(x, starts, torch.zeros(1, core.state_size, dtype=torch.float64))
    features[:, 2:].sum().backward()
    assert not x.grad[:, :2].any()
    assert x.grad[:, 2:].any()


def test_a_recurrent_core_goes_through_time_as_it_goes_step_by_step(core):
    x, starts, state = randn(3, 6, 3), torch.rand(3, 6, generator=cases.generator()) < 0.3, randn(3, core.state_size)
    together, last = core(x, starts, state)
    for t in range(6):
        features, state = core(x[:, t : t + 1], starts[:, t : t + 1], state)
        torch.testing.assert_close(features[:, 0], together[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-12, atol=1e-12)


def test_recurrent_weights_begin_orthogonal_and_biases_at_zero():
    core = RecurrentCore(3, 4, "lstm", orthogonal=True)
    assert_orthogonal(core.cell.weight_hh.detach(), 1.0)
    assert not core.cell.bias_ih.any()


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 36, 36), (4, 84, 84), (3, 64, 40)], ids=str)
def test_images_of_any_size_give_512_features(shape):
    images = torch.randint(256, (2, *shape), dtype=torch.uint8, generator=cases.generator())
    cnn = NatureCNN(shape, orthogonal=True)
    features = cnn(images)
    assert features.shape == (2, 512)
    scaled = nn.Sequential(*cnn.convolutions, cnn.linear, nn.ReLU())(images.float() / 255)
    torch.testing.assert_close(features, scaled)


def test_the_convolutions_are_those_of_the_nature_paper():
    kinds = [layer for layer in NatureCNN((4, 84, 84), orthogonal=True).modules() if isinstance(layer, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0]) for c in kinds] == [(32, 8, 4), (64, 4, 2), (64, 3, 1)]


def test_the_features_of_images_come_after_the_vector():
    encoder = ImageEncoder(2, {"image_a": (1, 36, 36), "image_b": (3, 40, 40)}, orthogonal=True)
    images = {
        name: torch.zeros(5, *shape, dtype=torch.uint8)
        for name, shape in [("image_b", (3, 40, 40)), ("image_a", (1, 36, 36))]
    }
    features = encoder({**images, "vector": torch.ones(5, 2)})
    assert features.shape == (5, encoder.num_features) == (5, 2 + 2 * 512)
    assert (features[:, :2] == 1).all()


def test_a_value_rate_changes_nothing_but_how_far_adam_moves_the_value_function():
    """After Adam's first step every weight has moved by the learning rate, the value function's c times as far."""
    moved = {}
    for rate in (1.0, 10.0):
        torch.manual_seed(0)
        networks = TwinMLP(3, (5, 4), 2, value_rate=rate).double()
        x = torch.randn(7, 3, dtype=torch.float64)
        optimizer = torch.optim.Adam(networks.parameters(), lr=1e-3, eps=0.0)
        before = [each.detach().clone() for each in itertools.chain(*networks.layers())]
        output, value, _ = networks(x)
        moved[rate, "outputs"] = torch.cat([output, value[:, None]], dim=1).detach()
        (output.square().sum() + value.square().sum()).backward()
        optimizer.step()
        after = itertools.chain(*networks.layers())
        moved[rate] = [(new.detach() - old).abs() for new, old in zip(after, before, strict=True)]
    torch.testing.assert_close(moved[10.0, "outputs"], moved[1.0, "outputs"])
    for start in (0, 4):  # weights, then biases: two twin layers, the policy's head, the value's
        pairs = list(zip(moved[1.0][start : start + 4], moved[10.0][start : start + 4], strict=True))
        for slow, fast in pairs[:2]:
            torch.testing.assert_close(fast[0], slow[0])
            torch.testing.assert_close(fast[1], 10 * slow[1])
        for (slow, fast), factor in zip(pairs[2:], (1, 10), strict=True):
            torch.testing.assert_close(fast, factor * slow)


@pytest.mark.parametrize("value_rate", [1.0, 10.0])
def test_acting_follows_the_parameters_wherever_they_are_moved(value_rate):
    """Views that are kept for acting must not outlive an optimizer's step, a load, a copy or a change of dtype."""
    network = TwinMLP(3, (5, 4), 2, policy_head_gain=1.0, value_rate=value_rate)
    x = randn(7, 3, dtype=torch.float32)

    def assert_alike(network, x):
        with_gradient = network(x)[:2]
        with torch.no_grad():
            without = network(x)[:2]
        for one, other in zip(with_gradient, without, strict=True):
            torch.testing.assert_close(one, other)
        return without[0]

    first = assert_alike(network, x)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        network.weights.mul_(2)
    assert not torch.allclose(assert_alike(network, x), first)
    torch.testing.assert_close(assert_alike(twin, x), first)
    twin.load_state_dict(network.state_dict())
    torch.testing.assert_close(assert_alike(twin, x), assert_alike(network, x))
    torch.testing.assert_close(assert_alike(network.double(), x.double()).float(), assert_alike(twin, x))
