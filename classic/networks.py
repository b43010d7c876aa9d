"""The networks of a control policy: two multilayer perceptrons that run as one, a CNN for images, a recurrent core."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = 2048  # elements up to which torch.tanh's one call beats the three of `_tanh_`, on a CPU


def _tanh_(z: Tensor) -> Tensor:
    """tanh(z) = 2σ(2z) − 1 in place: torch's σ is ten times as quick as its tanh on CPUs. Error below 2e-7."""
    if z.numel() <= SMALL or z.is_cuda or z.dtype != torch.float32:
        return z.tanh_()
    return z.add_(z).sigmoid_().mul_(2).sub_(1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": F.relu, "elu": F.elu, "silu": F.silu}


class TwinMLP(nn.Module):
    """Two multilayer perceptrons with the same hidden layers, the policy's and the value function's, run as one.

    Both read the same x (B, D); each layer of both is one batched product. On small networks calls are what costs, and
    this halves them. Orthogonal weights, gain √2 in hidden layers and 1 in the value's head, biases 0 (Huang et al.,
    2022, detail 2).
    """

    rates: Tensor  # (2, 1, 1) 1 for the policy, value_rate for the value function

    def __init__(
        self,
        num_inputs: int,
        hidden_sizes: tuple[int, ...],
        num_outputs: int,
        *,
        activation: str = "tanh",
        orthogonal: bool = True,
        policy_head_gain: float = 0.01,
        value_rate: float = 1.0,
    ) -> None:
        """value_rate: how many times as fast the value function learns. Its parameters are stored divided by this, and
        Adam's steps, which do not depend on a parameter's scale, move the product so many times as far.
        """
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.value_rate = value_rate
        self.register_buffer("rates", torch.tensor([1.0, value_rate]).view(2, 1, 1), persistent=False)
        self.hidden = nn.ParameterDict()
        for index, (inputs, outputs) in enumerate(itertools.pairwise((num_inputs, *hidden_sizes))):
            layers = [initialized(nn.Linear(inputs, outputs), math.sqrt(2), orthogonal) for _ in range(2)]
            weight = torch.stack([layer.weight.detach().T for layer in layers]) / self.rates  # (2, H, H')
            bias = torch.stack([layer.bias.detach()[None] for layer in layers]) / self.rates  # (2, 1, H')
            self.hidden[f"weight_{index}"] = nn.Parameter(weight.contiguous())
            self.hidden[f"bias_{index}"] = nn.Parameter(bias)
        self.num_features = (num_inputs, *hidden_sizes)[-1]
        self.policy_head = initialized(nn.Linear(self.num_features, num_outputs), policy_head_gain, orthogonal)
        self.value_head = initialized(nn.Linear(self.num_features, 1), 1.0, orthogonal)
        with torch.no_grad():
            for parameter in self.value_head.parameters():
                parameter /= value_rate

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, D) → the policy's output (B, num_outputs), the value (B,), the policy's last features (B, H)."""
        hidden, heads = self._layers(), self._heads()
        quick = self.activation is torch.tanh and hidden and not torch.compiler.is_compiling()
        if quick and torch.is_grad_enabled():
            output, value, features = _TwinTanh.apply(x, *hidden, *heads)
        else:
            output, value, features = _twin(x, hidden, heads, _tanh_ if quick else self.activation)
        return output, value.squeeze(-1), features

    def policy_alone(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The policy's output and features: all that acting needs."""
        layers = list(self.hidden.values())
        for weight, bias in zip(layers[::2], layers[1::2], strict=True):
            x = self.activation(torch.addmm(bias[0], x, weight[0]))
        return self.policy_head(x), x

    def _layers(self) -> list[Tensor]:
        layers = list(self.hidden.values())
        return layers if self.value_rate == 1 else [layer * self.rates for layer in layers]

    def _heads(self) -> list[Tensor]:
        value = [self.value_head.weight, self.value_head.bias]
        if self.value_rate != 1:
            value = [parameter * self.value_rate for parameter in value]
        return [self.policy_head.weight, self.policy_head.bias, *value]


def _twin(
    x: Tensor, hidden: Sequence[Tensor], heads: Sequence[Tensor], activation: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The twin networks, hidden = weight, bias, weight, bias, … ; → output (B, A), value (B, 1), features (B, H)."""
    pair = x.expand(2, *x.shape)
    for weight, bias in zip(hidden[::2], hidden[1::2], strict=True):
        pair = activation(torch.baddbmm(bias, pair, weight))  # (2, B, H')
    policy, value = pair.unbind(0)
    return F.linear(policy, *heads[:2]), F.linear(value, *heads[2:]), policy


class _TwinTanh(torch.autograd.Function):
    """`_twin` with tanh, and its gradient written out: a third of the calls that autograd makes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *hidden, policy_weight, policy_bias, value_weight, value_bias = parameters
        pairs = [x.expand(2, *x.shape)]
        for weight, bias in zip(hidden[::2], hidden[1::2], strict=True):
            pairs.append(_tanh_(torch.baddbmm(bias, pairs[-1], weight)))
        ctx.save_for_backward(x, *parameters)
        ctx.pairs = pairs
        policy, value = pairs[-1].unbind(0)
        ctx.mark_non_differentiable(policy)
        return F.linear(policy, policy_weight, policy_bias), F.linear(value, value_weight, value_bias), policy

    @staticmethod
    def backward(ctx: Any, output: Tensor, value: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        if (
            torch.is_grad_enabled()
        ):  # asked for a gradient of the gradient, as a trust region does: leave it to autograd
            inputs = [x, *parameters] if ctx.needs_input_grad[0] else parameters
            with torch.enable_grad():
                results = _twin(x, parameters[:-4], parameters[-4:], torch.tanh)[:2]
            found = torch.autograd.grad(results, inputs, (output, value), create_graph=True)
            return found if ctx.needs_input_grad[0] else (None, *found)
        hidden, (policy_weight, _, value_weight, _) = parameters[:-4], parameters[-4:]
        pairs = ctx.pairs
        last = pairs[-1]
        gradients = [output.T @ last[0], output.sum(0), value.T @ last[1], value.sum(0)]
        flow = torch.empty_like(last)
        torch.mm(output, policy_weight, out=flow[0])
        torch.mm(value, value_weight, out=flow[1])
        for index in reversed(range(len(pairs) - 1)):
            flow = torch.ops.aten.tanh_backward(flow, pairs[index + 1])  # flow · (1 − y²)
            gradients = [torch.bmm(pairs[index].mT, flow), flow.sum(1, keepdim=True), *gradients]
            if index or ctx.needs_input_grad[0]:
                flow = torch.bmm(flow, hidden[2 * index].mT)
        return (flow.sum(0) if ctx.needs_input_grad[0] else None, *gradients)


class NatureCNN(nn.Module):
    """The convolutions of Mnih et al. (2015): (B, C, H, W) bytes → (B, 512). Any image of at least 36 × 36."""

    num_features = 512

    def __init__(self, shape: tuple[int, int, int], *, orthogonal: bool) -> None:
        super().__init__()
        gain = math.sqrt(2)
        self.convolutions = nn.Sequential(
            initialized(nn.Conv2d(shape[0], 32, 8, stride=4), gain, orthogonal),
            nn.ReLU(),
            initialized(nn.Conv2d(32, 64, 4, stride=2), gain, orthogonal),
            nn.ReLU(),
            initialized(nn.Conv2d(64, 64, 3, stride=1), gain, orthogonal),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, *shape)).shape[1]
        self.linear = initialized(nn.Linear(flat, self.num_features), gain, orthogonal)

    def forward(self, images: Tensor) -> Tensor:
        """The images' features; bytes are scaled to [0, 1]."""
        return F.relu(self.linear(self.convolutions(images.float() / 255)))


class ImageEncoder(nn.Module):
    """Images through a CNN each, joined with the vector where there is one: named observations → (B, D)."""

    def __init__(self, vector: int, images: Mapping[str, tuple[int, int, int]], *, orthogonal: bool) -> None:
        super().__init__()
        self.cnns = nn.ModuleDict({name: NatureCNN(shape, orthogonal=orthogonal) for name, shape in images.items()})
        self.num_features = vector + NatureCNN.num_features * len(images)

    def forward(self, observations: Mapping[str, Tensor]) -> Tensor:
        """The features of each image, after the vector."""
        parts = [observations["vector"]] if "vector" in observations else []
        return torch.cat([*parts, *(cnn(observations[name]) for name, cnn in self.cnns.items())], dim=-1)


class RecurrentCore(nn.Module):
    """An LSTM or GRU over the decisions of an environment, which forgets where an episode starts."""

    def __init__(self, num_inputs: int, size: int, kind: Literal["lstm", "gru"], *, orthogonal: bool) -> None:
        """Orthogonal weights with gain 1, biases 0 (Huang et al., 2022, LSTM detail 1)."""
        super().__init__()
        self.cell = nn.LSTMCell(num_inputs, size) if kind == "lstm" else nn.GRUCell(num_inputs, size)
        self.num_features = size
        self.state_size = 2 * size if kind == "lstm" else size
        if orthogonal:
            for name, parameter in self.cell.named_parameters():
                nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter)

    def forward(self, x: Tensor, starts: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, T, D), starts (B, T) bool, state (B, S) before the first → features (B, T, H), state after the last."""
        features = []
        for t in range(x.shape[1]):
            state = torch.where(starts[:, t, None], 0, state)
            if isinstance(self.cell, nn.LSTMCell):
                state = torch.cat(self.cell(x[:, t], state.chunk(2, dim=-1)), dim=-1)
            else:
                state = self.cell(x[:, t], state)
            features.append(state[:, : self.num_features])
        return torch.stack(features, dim=1), state


def initialized(layer: Any, gain: float, orthogonal: bool) -> Any:
    """The layer with orthogonal weights of that gain and bias 0, or as torch makes it."""
    if orthogonal:
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return layer
