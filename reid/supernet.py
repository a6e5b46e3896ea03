"""The supernet of Auto-ReID: the macro structure of a ResNet, a head with an embedding."""

from genotypes import PRIMITIVES_REID
from model_search import Network

from .model import Head, reductions


class Supernet(Network):
    """model_search.Network over the space with part_aware; its output is that of a ReIDNetwork.

    layers: cells of each stage. k=1 is the paper's; with k > 1 it has betas, as PC-DARTS. The
    criterion takes (embeddings, logits) and ids. Raises ValueError as Network does.
    """

    def __init__(self, C, num_classes, layers, criterion, k=1, embedding=512, fused=True):
        if k >= 1 and C // k < 3:  # said here, before the forms of the cell are compared
            raise ValueError(f"{C} channels and k={k}: part_aware takes 3 channels or more of the "
                             "C / k: raise --init_channels, or lower --k")  # fmt: skip
        super().__init__(
            C, num_classes, sum(layers), criterion, stem_multiplier=1, k=k, edge_norm=k > 1,
            stem="resnet", primitives=PRIMITIVES_REID, reductions=reductions(layers), fused=fused,
        )  # fmt: skip
        self.classifier = Head(self.classifier.in_features, num_classes, embedding)
        self._own = C, num_classes, layers, criterion, k, embedding, fused

    def forward(self, x):
        """(embeddings (N, embedding), logits (N, num_classes)) of x (N, 3, H, W)."""
        return self.classifier(self.features(x)[:, :, None, None])

    def new(self):
        """As Network's."""
        network = Supernet(*self._own).to(self.alphas_normal.device, self.alphas_normal.dtype)
        for mine, its in zip(self.arch_parameters(), network.arch_parameters(), strict=True):
            its.data.copy_(mine.data)
        return network
