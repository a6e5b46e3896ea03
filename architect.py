"""The search's two steps in turn: Adam on alphas and betas, SGD on the weights (DARTS, section 2).

Architect is the first of them, of first or second order; search_step is both (algorithm 1).
"""

from contextlib import contextmanager

import torch
from torch import nn

from fused import Gradients
from utils import copy_into


class Architect:
    """Updates the alphas and betas of `model` on validation batches.

    model: has arch_parameters(), parameters() and _loss(input, target).
    args: momentum and weight_decay of the weights' SGD, arch_learning_rate, arch_weight_decay;
    optional: unrolled, no_cuda_graph (False: CUDA graphs, see fused.Gradients), arch_grad_clip (the
    largest norm of their gradient), amp (not used if unrolled: the central difference would be lost
    in bfloat16).
    """

    STEP = 0.01  # epsilon of eq. 8 is STEP / |v|: both sides are STEP away from w

    def __init__(self, model, args):
        self.model = model
        self.network_momentum, self.network_weight_decay = args.momentum, args.weight_decay
        self.grad_clip = getattr(args, "arch_grad_clip", None)
        self.optimizer = torch.optim.Adam(
            model.arch_parameters(),
            lr=args.arch_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=args.arch_weight_decay,
        )
        amp = getattr(args, "amp", False) and not getattr(args, "unrolled", False)
        graphs = not getattr(args, "no_cuda_graph", True)
        self.gradients = Gradients(model, amp=amp, graphs=graphs)

    def step(
        self, input_train, target_train, input_valid, target_valid, eta, network_optimizer, unrolled
    ):
        """One Adam step on alphas and betas; the arguments are those of `backward`."""
        self.optimizer.zero_grad()
        self.backward(
            input_train, target_train, input_valid, target_valid, eta, network_optimizer, unrolled
        )
        if self.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.arch_parameters(), self.grad_clip)
        self.optimizer.step()

    def backward(
        self, input_train, target_train, input_valid, target_valid, eta, network_optimizer, unrolled
    ):
        """Leaves the gradient of the validation loss in `.grad` of alphas and betas.

        input: (N, 3, H, W), target: (N,). unrolled: the second-order gradient, which looks one SGD
        step ahead: eta is that step's learning rate, network_optimizer has its momentum buffers.
        """
        if unrolled:
            self._backward_step_unrolled(
                input_train, target_train, input_valid, target_valid, eta, network_optimizer
            )
        else:
            self._backward_step(input_valid, target_valid)

    def _backward_step(self, input_valid, target_valid):
        """First order: the gradient of L_val(w, alpha) with respect to alpha."""
        arch = _learning(self.model.arch_parameters())
        _set_grad(arch, self._gradient(arch, input_valid, target_valid))

    def _backward_step_unrolled(
        self, input_train, target_train, input_valid, target_valid, eta, network_optimizer
    ):
        """The gradient of L_val(w', alpha) w.r.t. alpha, w' being w after one SGD step (eq. 7).

        Its second term is a Hessian-vector product, taken by a central difference (eq. 8).
        """
        train, valid = (input_train, target_train), (input_valid, target_valid)
        arch = _learning(self.model.arch_parameters())
        weights = _learning(self._others(self.model.parameters()))
        w = [weight.detach().clone() for weight in weights]
        # As published, the passes at w and w +- R v move the running statistics, that at w' not.
        grads = self._gradient(weights, *train)  # of L_train(w, alpha) in w
        ahead = []  # w'
        for weight, value, g in zip(weights, w, grads, strict=True):
            buffer = network_optimizer.state.get(weight, {}).get("momentum_buffer")
            moment = 0 if buffer is None else self.network_momentum * buffer
            ahead.append(value - eta * (moment + g + self.network_weight_decay * value))

        with self._moved(weights, ahead, w), self._buffers_kept():
            grads = self._gradient([*arch, *weights], *valid)  # of L_val(w', alpha)
        at_ahead, v = grads[: len(arch)], grads[len(arch) :]  # in alpha, in w'

        R = self.STEP / _concat(v).norm().clamp_min(1e-30)  # epsilon of eq. 8; v may be 0
        sides = []
        for sign in (1, -1):
            there = [value + sign * R * g for value, g in zip(w, v, strict=True)]
            with self._moved(weights, there, w):
                sides.append(self._gradient(arch, *train))
        gradient = [
            g - eta * (plus - minus) / (2 * R)
            for g, plus, minus in zip(at_ahead, *sides, strict=True)
        ]
        _set_grad(arch, gradient)

    def _gradient(self, wanted, input, target):
        """torch.autograd.grad(model._loss(input, target), wanted)."""
        return self.gradients(wanted, input, target)[2] if wanted else []

    def _others(self, tensors):
        """Those that are no alphas or betas."""
        arch = {id(parameter) for parameter in self.model.arch_parameters()}
        return [tensor for tensor in tensors if id(tensor) not in arch]

    @contextmanager
    def _moved(self, weights, there, back):
        """Within it the weights are `there`; then `back`, to the bit (docs/differences.md, 6)."""
        try:
            copy_into(there, weights)
            yield
        finally:
            copy_into(back, weights)

    @contextmanager
    def _buffers_kept(self):
        """Restores the running statistics that the pass at w' changes."""
        buffers = self._others(self.model.buffers())
        kept = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            copy_into(kept, buffers)


def search_step(train, valid, weights, gradients, architect, optimizer, args):
    """Updates alphas and betas on the batch `valid` (None: not at all), then weights on `train`.

    train, valid: (input (N, 3, H, W), target (N,)). gradients: a fused.Gradients of the training
    loss: (weights, input, target) -> (loss, logits, their gradients). optimizer: of the weights.
    args: unrolled, grad_clip. Returns loss and logits of the training batch, and the norm of its
    gradient before it is clipped.
    """
    if valid is not None:  # not frozen
        eta = optimizer.param_groups[0]["lr"]
        architect.step(*train, *valid, eta, optimizer, unrolled=args.unrolled)
    weights = _learning(weights)
    loss, logits, grads = gradients(weights, *train)  # none for alphas and betas
    _set_grad(weights, grads)
    norm = nn.utils.clip_grad_norm_(weights, args.grad_clip)
    optimizer.step()
    return loss, logits, norm


def _learning(tensors):
    """Those that are not frozen."""
    return [tensor for tensor in tensors if tensor.requires_grad]


def _set_grad(tensors, gradients):
    """Stores the gradients in .grad of the tensors."""
    for tensor, gradient in zip(tensors, gradients, strict=True):
        tensor.grad = gradient


def _concat(xs):
    """The tensors as one flat vector."""
    return torch.cat([x.reshape(-1) for x in xs])
