"""The architecture step: Adam on alphas and betas, first or second order (DARTS, section 2.3)."""

import warnings
from contextlib import contextmanager

import torch
from torch import nn

import distributed


class Gradients:
    """Gradients of criterion(model(input), target) for some tensors, and no others.

    On a GPU the forward and backward pass of each kind of batch is captured in a CUDA graph after
    WARM_UP calls, and replayed from then on: one launch instead of thousands. A batch of another
    size, such as the last of an epoch, runs as it would without. amp: bfloat16 where autocast has
    it. Without a criterion the loss is model._loss(input, target), and stands for the logits too.
    """

    WARM_UP = 3

    def __init__(self, model, criterion=None, amp=False, graphs=True):
        self.model, self.criterion, self.amp, self.graphs = model, criterion, amp, graphs
        self.calls, self.captured, self.stream = {}, {}, None

    def __call__(self, wanted, input, target):
        """(loss, logits, gradients): gradients of the tensors `wanted`, a list, in its order.

        With many processes the gradients are those of the mean over the images of all of them.
        """
        share = distributed.share(len(target), input.device)
        loss, logits, gradients = self._local(wanted, input, target, share)
        return loss, logits, distributed.average(gradients)

    def _local(self, wanted, input, target, share):
        """Of this process; the gradients are those of share * loss."""
        if not self.graphed(input):
            return self._compute(wanted, input, target, share)
        key = (tuple(map(id, wanted)), input.shape, self.model.training)
        calls = self.calls[key] = self.calls.get(key, 0) + 1
        if calls <= self.WARM_UP:
            return self._aside(wanted, input, target, share)
        if key not in self.captured:
            try:
                self.captured[key] = self._capture(wanted, input, target)
            except RuntimeError as error:
                self.graphs = False
                warnings.warn(f"no CUDA graph ({error}): going on without", stacklevel=2)
                return self._compute(wanted, input, target, share)
        graph, own_input, own_target, results = self.captured[key]
        own_input.copy_(input)
        own_target.copy_(target)
        graph.replay()
        loss, logits, gradients = results  # which the next replay overwrites
        return loss.clone(), logits.clone(), [gradient * share for gradient in gradients]

    def graphed(self, input):
        synchronized = getattr(self.model, "sync_bn", False)  # messages within the pass
        return self.graphs and input.device.type == "cuda" and not synchronized

    def _compute(self, wanted, input, target, share=1.0):
        kept = {id(tensor) for tensor in wanted}
        everything = [*self.model.parameters(), *self.model.arch_parameters()]
        with frozen([tensor for tensor in everything if id(tensor) not in kept]):
            with torch.autocast(input.device.type, torch.bfloat16, enabled=self.amp):
                if self.criterion is None:
                    loss = logits = self.model._loss(input, target)
                else:
                    logits = self.model(input)
                    loss = self.criterion(logits, target)
            gradients = torch.autograd.grad(loss * share, wanted, materialize_grads=True)
        return loss.detach(), logits.detach(), list(gradients)

    def _aside(self, *batch):
        """On a stream of its own, as a capture needs it of the calls before."""
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            results = self._compute(*batch)
        torch.cuda.current_stream().wait_stream(self.stream)
        return results

    def _capture(self, wanted, input, target):
        own = input.clone(), target.clone()
        graph = torch.cuda.CUDAGraph()
        pool = next((entry[0].pool() for entry in self.captured.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            results = self._compute(wanted, *own)
        return graph, *own, results


@contextmanager
def frozen(tensors):
    """Within it these leaf tensors require no gradient, so that none is computed for them."""
    learning = [tensor for tensor in tensors if tensor.requires_grad]
    try:
        for tensor in learning:
            tensor.requires_grad_(False)
        yield
    finally:
        for tensor in learning:
            tensor.requires_grad_()


class Architect:
    """Updates the alphas and betas of `model` on validation batches.

    model: has arch_parameters(), parameters() and _loss(input, target).
    args: momentum and weight_decay of the weights' SGD, arch_learning_rate, arch_weight_decay;
    amp, no_cuda_graph and arch_grad_clip (norm of the gradient in a step), if they are there.
    """

    STEP = 0.01  # of the central difference in a second-order step, in the norm of all weights

    def __init__(self, model, args):
        self.model = model
        self.momentum, self.weight_decay = args.momentum, args.weight_decay
        self.grad_clip = getattr(args, "arch_grad_clip", None)
        self.optimizer = torch.optim.Adam(
            model.arch_parameters(),
            lr=args.arch_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=args.arch_weight_decay,
        )
        amp, graphs = getattr(args, "amp", False), not getattr(args, "no_cuda_graph", False)
        self.gradients = Gradients(model, amp=amp, graphs=graphs)

    def step(
        self, input_train, target_train, input_valid, target_valid, eta, network_optimizer, unrolled
    ):
        """One Adam step on alphas and betas; the arguments are those of `backward`."""
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
            batches = (input_train, target_train), (input_valid, target_valid)
            gradient = self._unrolled_gradient(*batches, eta, network_optimizer)
        else:
            gradient = self._gradient(self.model.arch_parameters(), input_valid, target_valid)
        for parameter, value in zip(self.model.arch_parameters(), gradient, strict=True):
            parameter.grad = value

    def _gradient(self, wanted, input, target):
        return self.gradients(wanted, input, target)[2]

    def _unrolled_gradient(self, train, valid, eta, network_optimizer):
        """The gradient of L_val(w', alpha) in alpha, w' being w after one SGD step (eq. 7).

        Its second term is a Hessian-vector product, taken by a central difference (eq. 8).
        """
        arch = self.model.arch_parameters()
        weights = self._weights()
        w = [weight.detach().clone() for weight in weights]
        gradient = self._gradient(weights, *train)
        ahead = []  # w'
        for weight, value, g in zip(weights, w, gradient, strict=True):
            buffer = network_optimizer.state[weight].get("momentum_buffer")
            moment = 0 if buffer is None else self.momentum * buffer
            ahead.append(value - eta * (moment + g + self.weight_decay * value))

        with self._moved(weights, ahead, w), self._buffers_kept():
            gradient = self._gradient([*arch, *weights], *valid)
        at_ahead, v = gradient[: len(arch)], gradient[len(arch) :]

        R = self.STEP / torch.stack([g.norm() for g in v]).norm()
        sides = []
        for sign in (1, -1):
            there = [value + sign * R * g for value, g in zip(w, v, strict=True)]
            with self._moved(weights, there, w):
                sides.append(self._gradient(arch, *train))
        return [
            g - eta * (plus - minus) / (2 * R)
            for g, plus, minus in zip(at_ahead, *sides, strict=True)
        ]

    def _weights(self):
        arch = {id(parameter) for parameter in self.model.arch_parameters()}
        return [weight for weight in self.model.parameters() if id(weight) not in arch]

    @contextmanager
    def _moved(self, weights, there, back):
        """The model with its weights at `there`, then at `back`, bit for bit: difference 6."""
        try:
            _copy(there, weights)
            yield
        finally:
            _copy(back, weights)

    @contextmanager
    def _buffers_kept(self):
        """Running statistics that a pass through the unrolled weights does not touch."""
        arch = {id(parameter) for parameter in self.model.arch_parameters()}
        buffers = [buffer for buffer in self.model.buffers() if id(buffer) not in arch]
        kept = [buffer.clone() for buffer in buffers]
        try:
            yield
        finally:
            _copy(kept, buffers)


def dominant_eigenvalue(model, input, target, iterations=20, step=0.1):
    """The eigenvalue of largest size of the Hessian of the loss in alpha, by power iteration.

    Its growth announces that a search collapses (Zela et al., ICLR 2020, section 4). The product of
    the Hessian with a unit vector v is the difference of two gradients, at alpha +- step * v. A
    step below 0.03 sees little but the kinks of ReLU and max pooling: measured on the digits, 0.1
    and 0.3 agree within 6 % in a trained supernet, within 20 % before. With the statistics of the
    batch; alphas, running statistics and random numbers stay as they are.
    """
    alphas = [tensor for tensor in model.arch_parameters() if tensor.dim() == 2]
    gradients, training = Gradients(model, graphs=False), model.training
    architect_like = [buffer for buffer in model.buffers() if not buffer.requires_grad]
    kept = [tensor.detach().clone() for tensor in [*alphas, *architect_like]]
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(a.shape, generator=generator, dtype=torch.float64).to(a) for a in alphas]
    model.train()
    try:
        for _ in range(iterations):
            norm = torch.stack([part.norm() for part in v]).norm()
            if not norm > 0:
                return 0.0
            v = [part / norm for part in v]
            sides = []
            for sign in (1, -1):
                there = [a + sign * step * part for a, part in zip(kept, v)]  # noqa: B905
                _copy(there, alphas)
                sides.append(gradients(alphas, input, target)[2])
            product = [(plus - minus) / (2 * step) for plus, minus in zip(*sides, strict=True)]
            value = sum((p * part).sum() for p, part in zip(product, v, strict=True))
            v = product
        return float(value)  # the Rayleigh quotient
    finally:
        _copy(kept, [*alphas, *architect_like])
        model.train(training)


@torch.no_grad()
def _copy(values, tensors):
    for value, tensor in zip(values, tensors, strict=True):
        tensor.copy_(value)
