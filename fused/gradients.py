"""The gradients of a step, and their CUDA graphs."""

import warnings
from contextlib import contextmanager

import torch


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

    def __call__(self, wanted, input, target, scale=1.0):
        """(loss, logits, gradients): those of scale * loss in the tensors `wanted`, a list."""
        if not self.graphed(input):
            return self._compute(wanted, input, target, scale)
        key = (tuple(map(id, wanted)), input.shape, self.model.training)
        calls = self.calls[key] = self.calls.get(key, 0) + 1
        if calls <= self.WARM_UP:
            return self._aside(wanted, input, target, scale)
        if key not in self.captured:
            try:
                self.captured[key] = self._capture(wanted, input, target)
            except RuntimeError as error:
                self.graphs = False
                warnings.warn(f"no CUDA graph ({error}): going on without", stacklevel=2)
                return self._compute(wanted, input, target, scale)
        graph, own_input, own_target, results = self.captured[key]
        own_input.copy_(input)
        own_target.copy_(target)
        graph.replay()
        loss, logits, gradients = results  # which the next replay overwrites
        return loss.clone(), logits.clone(), [gradient * scale for gradient in gradients]

    def graphed(self, input):
        synchronized = getattr(self.model, "sync_bn", False)  # messages within the pass
        return self.graphs and input.device.type == "cuda" and not synchronized

    def _compute(self, wanted, input, target, scale=1.0):
        kept = {id(tensor) for tensor in wanted}
        everything = [*self.model.parameters(), *self.model.arch_parameters()]
        with frozen([tensor for tensor in everything if id(tensor) not in kept]):
            with torch.autocast(input.device.type, torch.bfloat16, enabled=self.amp):
                if self.criterion is None:
                    loss = logits = self.model._loss(input, target)
                else:
                    logits = self.model(input)
                    loss = self.criterion(logits, target)
            gradients = torch.autograd.grad(loss * scale, wanted, materialize_grads=True)
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
