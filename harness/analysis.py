"""What a search is watched by: softmaxes, entropies, the Hessian in alpha."""

import torch

from fused import Gradients
from harness import distributed
from model_search import KINDS
from utils import copy_into


@torch.no_grad()
def softmaxes(network):
    """{"alphas_normal": softmax(alpha) (E, ops), ..., "betas_normal": softmax(beta) (E,), ...}.

    By target, as the alphas; on the CPU. Without edge normalization there are no betas.
    """
    alphas = {f"alphas_{k}": network.op_weights(k) for k in KINDS}
    betas = {f"betas_{k}": network.edge_weights(k) for k in KINDS if network.edge_norm}
    return {name: p.cpu() for name, p in (alphas | betas).items()}


def entropies(network):
    """Of softmax(alpha), mean over edges, and of softmax(beta), mean over nodes, in nats."""
    means = {}
    for name, p in softmaxes(network).items():
        which, kind = name.split("_")
        n = len(p) if which == "alphas" else network._steps
        means[f"{which[:-1]}_entropy_{kind}"] = float(torch.special.entr(p).sum() / n)
    return means


def dominant_eigenvalue(model, input, target, iterations=20, step=0.1):
    """The eigenvalue of largest size of the Hessian of the loss in alpha, by power iteration.

    Its growth announces that a search collapses (Zela et al., ICLR 2020, section 4). The product of
    the Hessian with a unit vector v is the difference of two gradients, at alpha +- step * v. A
    step below 0.03 sees little but the kinks of ReLU and max pooling: measured on the digits, 0.1
    and 0.3 agree within 6 % in a trained supernet, within 20 % before. With the statistics of the
    batch; alphas, running statistics and random numbers stay as they are.
    """
    alphas = [tensor for tensor in model.arch_parameters() if tensor.dim() == 2]
    gradients = distributed.averaged(Gradients(model, graphs=False))  # the same in all processes
    training = model.training
    statistics = [buffer for buffer in model.buffers() if not buffer.requires_grad]
    kept = [tensor.detach().clone() for tensor in alphas]
    kept_statistics = [tensor.clone() for tensor in statistics]
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
                there = [a + sign * step * part for a, part in zip(kept, v, strict=True)]
                copy_into(there, alphas)
                sides.append(gradients(alphas, input, target)[2])
            product = [(plus - minus) / (2 * step) for plus, minus in zip(*sides, strict=True)]
            value = sum((p * part).sum() for p, part in zip(product, v, strict=True))
            v = product
        return float(value)  # the Rayleigh quotient
    finally:
        copy_into([*kept, *kept_statistics], [*alphas, *statistics])
        model.train(training)
