"""The network, the loss and the start of the released code of 2019, written anew and slowly from a table of its facts.

Weights have the names of its state dict, so that what converts those converts these.
"""

import math

import torch
from torch import nn


def tower(width, hidden, out):
    """Linear, batch norm, PReLU, dropout, linear, batch norm, PReLU."""
    first, second = nn.Linear(width, hidden), nn.Linear(hidden, out)
    for layer in (first, second):
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(
        first, nn.BatchNorm1d(hidden), nn.PReLU(), nn.Dropout(), second, nn.BatchNorm1d(out), nn.PReLU()
    )


def branch(inputs, outputs):
    return nn.Sequential(zero(nn.Conv1d(inputs, outputs, 1, bias=False)), nn.BatchNorm1d(outputs))


def zero(layer):
    nn.init.zeros_(layer.weight)
    return layer


class ChannelAttention(nn.Module):
    def __init__(self, frames=40):
        super().__init__()
        half = frames // 2
        self.W_g = nn.Conv1d(frames, half, 1, bias=False)
        self.W_theta, self.W_phi, self.W_z = branch(frames, half), branch(frames, half), branch(half, frames)

    def map(self, x):
        return torch.stack([torch.softmax(t @ p.T, dim=1) for t, p in zip(self.W_theta(x), self.W_phi(x))])

    def forward(self, x):
        return x + self.W_z(torch.stack([a @ g for a, g in zip(self.map(x), self.W_g(x))]))


class Pool(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(1, 1, dim))

    def forward(self, x):
        return torch.stack([torch.softmax(clip @ self.q.flatten(), dim=0) @ clip for clip in x])


def cosines(feature, weight):
    rows = [[(f @ w) / (f.norm() * w.norm()) for w in weight] for f in feature]
    return torch.stack([torch.stack(row) for row in rows])


class FaceAndScene(nn.Module):
    def __init__(self, face=482, scene=1920, classes=7):
        super().__init__()
        both = face + scene // 16
        self.mma_layer, self.nan_layer = ChannelAttention(), Pool(face)
        self.scene_fc, self.final_fc = tower(scene, scene // 4, scene // 16), tower(both, 2 * face, both)
        self.weight = nn.Parameter(torch.empty(classes, both))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, frames, scene):
        x = torch.cat([self.nan_layer(self.mma_layer(frames)), self.scene_fc(scene)], dim=1)
        return cosines(x + self.final_fc(x), self.weight)


class SceneAlone(nn.Module):
    def __init__(self, scene=1984, classes=7):
        super().__init__()
        self.fc = tower(scene, 2 * scene, scene)
        self.weight = nn.Parameter(torch.empty(classes, scene))
        nn.init.xavier_uniform_(self.weight)

    def forward(self, scene):
        return cosines(scene + self.fc(scene), self.weight)


def loss(cosine, label, margin=0.5, scale=30.0, gamma=2.0):
    """Margin at the label, linear beyond pi - m; cross-entropy averaged over the batch; focal on that average."""
    entropies = []
    for row, true in zip(cosine, label.tolist()):
        value = row[true]
        if value > math.cos(math.pi - margin):
            moved = math.cos(margin) * value - math.sin(margin) * torch.sqrt(1 - value**2)
        else:
            moved = value - margin * math.sin(margin)
        logits = [scale * (moved if column == true else entry) for column, entry in enumerate(row)]
        entropies.append(torch.logsumexp(torch.stack(logits), 0) - logits[true])
    entropy = sum(entropies) / len(entropies)
    return (1 - torch.exp(-entropy)) ** gamma * entropy
