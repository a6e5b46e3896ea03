"""The part-aware module, the candidate operation that Auto-ReID adds to the space.

Quan et al., Auto-ReID: Searching for a Part-Aware ConvNet for Person Re-Identification, ICCV 2019,
section 3.3. A person stands upright, so a map is cut into four bands of rows; every band gives one
vector, the vectors attend to each other, and what comes out is laid beside the map again.
"""

import torch
import torch.nn.functional as F
from torch import nn

PARTS = 4  # M


class PartAware(nn.Module):
    """Part-aware module: (N, C_in, H, W) to (N, C_out, H / stride, W / stride), stride 1 or 2.

    Its norms are affine in the search too. An odd side is rounded up where it is halved, as by a
    padded 3x3 convolution. Raises ValueError where C_in is below 3, the stride is neither 1 nor 2,
    C_out is odd with stride 2, and where H of an input is below 4.
    """

    def __init__(self, C_in, C_out, stride):
        super().__init__()
        if C_in < 3:
            raise ValueError(f"part_aware makes C_in // 3 channels a part: C_in={C_in}, give 3 up")
        if stride not in (1, 2):
            raise ValueError(f"part_aware has stride 1 or 2, not {stride}")
        h = C_in // 3
        self.local_conv_list = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(C_in, h, 1), nn.BatchNorm2d(h)) for _ in range(PARTS)
        )
        self.W_K = nn.Linear(h, h)
        self.W_Q = nn.Linear(h, h)
        self.last = ConvBN(C_in + h, C_out) if stride == 1 else Halve(C_in + h, C_out)

    def forward(self, x):
        heights = part_heights(x.shape[2])
        bands = x.mean(3, keepdim=True).split(heights, dim=2)  # M of (N, C_in, height, 1)
        means = (band.mean(2, keepdim=True) for band in bands)  # the mean first, then the ReLU
        parts = [local(mean) for local, mean in zip(self.local_conv_list, means, strict=True)]
        P = torch.cat(parts, dim=2).squeeze(3).transpose(1, 2)  # (N, M, h)
        A = (self.W_K(P) @ self.W_Q(P).transpose(1, 2)).softmax(2)  # (N, M, M), not scaled
        parts = (A @ P).transpose(1, 2).split(1, dim=2)  # M of (N, h, 1)
        rows = [part.expand(-1, -1, n) for part, n in zip(parts, heights, strict=True)]
        rows = torch.cat(rows, dim=2).unsqueeze(3)  # (N, h, H, 1)
        return self.last(torch.cat([x, rows.expand(-1, -1, -1, x.shape[3])], dim=1))


def part_heights(H):
    """How many rows each part has: part i those from floor(i H / M) to floor((i + 1) H / M)."""
    if H < PARTS:
        raise ValueError(f"part_aware cuts a map into {PARTS} bands: {H} rows are too few")
    return [(i + 1) * H // PARTS - i * H // PARTS for i in range(PARTS)]


class ConvBN(nn.Module):
    """1x1 convolution and batch norm."""

    def __init__(self, C_in, C_out):
        super().__init__()
        self.conv = nn.Conv2d(C_in, C_out, 1, bias=False)
        self.bn = nn.BatchNorm2d(C_out)

    def forward(self, x):
        return self.bn(self.conv(x))


class Halve(nn.Module):
    """operations.FactorizedReduce, with this module's names and for odd sides too."""

    def __init__(self, C_in, C_out):
        super().__init__()
        if C_out % 2:
            raise ValueError(f"part_aware makes two halves at stride 2: C_out={C_out} must be even")
        self.convs = nn.ModuleList(nn.Conv2d(C_in, C_out // 2, 1, bias=False) for _ in range(2))
        self.bn = nn.BatchNorm2d(C_out)

    def forward(self, x):
        x = F.pad(x.relu(), (0, 1, 0, 1))  # zero beyond the edge
        # Strided before the convolutions, as in operations.FactorizedReduce.
        halves = [self.convs[0](x[:, :, :-1:2, :-1:2]), self.convs[1](x[:, :, 1::2, 1::2])]
        return self.bn(torch.cat(halves, dim=1))
