"""A small model that is taught to name the token from hidden states, on texts that it is given.

Legend: N tokens, V vocabulary, D width of an embedding, W what it sees of a token.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from coordinator.lab.privacy.nearest import ROWS, parts
from coordinator.lab.privacy.score import ranks_of
from coordinator.lab.privacy.states import Array
from coordinator.lab.privacy.texts import Numbers, Shares

HIDDEN = 256
EPOCHS, BATCH, RATE = 8, 128, 2e-3
# Of a larger vocabulary, the tokens of the known texts and random ones beside them are told apart
# while it learns; it guesses among all.
MOST_CLASSES = 8192
# Temperature of the first guesses: directions of embeddings differ by cosines of tenths.
SHARPNESS = 16.0


class Inverter(nn.Module):
    """Maps states to the embeddings of their tokens: a linear part and two layers beside it."""

    embeddings_VD: torch.Tensor
    middle_W: torch.Tensor
    spread_W: torch.Tensor

    def __init__(self, width: int, embeddings_VD: Array, shares_V: Shares) -> None:
        """Begin with guesses by frequency.

        Args:
            width: W.
            embeddings_VD: What enters the first block for each token.
            shares_V: How often tokens occur in the texts that are known.
        """
        super().__init__()
        centred_VD = embeddings_VD - embeddings_VD.mean(0)
        self.register_buffer("embeddings_VD", F.normalize(torch.from_numpy(centred_VD), dim=1))
        size = embeddings_VD.shape[1]
        self.plain = nn.Linear(width, size)
        self.bent = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, size))
        prior_V = np.log(shares_V + 1e-2 / len(shares_V)).astype(np.float32)
        self.prior_V = nn.Parameter(torch.from_numpy(prior_V))
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))
        self.register_buffer("middle_W", torch.zeros(width))
        self.register_buffer("spread_W", torch.ones(width))

    def forward(self, seen_NW: torch.Tensor, among: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (N, V), or those of the tokens *among* which to choose."""
        even_NW = (seen_NW - self.middle_W) / self.spread_W
        guess_ND = self.plain(even_NW) + self.bent(even_NW)
        table_VD = self.embeddings_VD
        prior_V: torch.Tensor = self.prior_V
        if among is not None:
            table_VD, prior_V = table_VD[among], prior_V[among]
        logits: torch.Tensor = guess_ND @ table_VD.T * self.sharpness + prior_V
        return logits


def train_inverter(
    seen_NW: Array, ids_N: Numbers, embeddings_VD: Array, shares_V: Shares, seed: int
) -> Inverter:
    """Return an inverter that has learned from known texts; the same for the same arguments."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Inverter(seen_NW.shape[1], embeddings_VD, shares_V)
    inputs = torch.from_numpy(seen_NW)
    among, labels = _classes(ids_N, len(embeddings_VD), seed)
    model.middle_W = inputs.mean(0)
    model.spread_W = inputs.std(0).clamp_min(1e-6)
    steps = EPOCHS * -(-len(labels) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        order_N = torch.randperm(len(labels), generator=order)
        for part in (order_N[rows] for rows in parts(len(labels), BATCH)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[part], among), labels[part])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return model.eval()


def _classes(ids_N: Numbers, size: int, seed: int) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the tokens to tell apart, None for all, and the place of each label among them."""
    if size <= MOST_CLASSES:
        return None, torch.from_numpy(ids_N)
    known = np.unique(ids_N)
    others = np.setdiff1d(np.arange(size), known)
    drawn = np.random.default_rng(seed).permutation(others)[: max(0, MOST_CLASSES - len(known))]
    among = np.union1d(known, drawn)
    return torch.from_numpy(among), torch.from_numpy(np.searchsorted(among, ids_N))


def guesses(model: Inverter, seen_NW: Array, most: int) -> Numbers:
    """Return the *most* likeliest tokens of each state, the likeliest first."""
    found = []
    with torch.no_grad():
        for rows in parts(len(seen_NW), ROWS):
            logits_NV = model(torch.from_numpy(seen_NW[rows]))
            found.append(logits_NV.topk(min(most, logits_NV.shape[1])).indices.numpy())
    return np.concatenate(found)


def inverter_ranks(model: Inverter, seen_NW: Array, ids_N: Numbers) -> Numbers:
    """Return how many tokens the inverter holds for as likely as the true one, or likelier."""
    found = []
    with torch.no_grad():
        for rows in parts(len(seen_NW), ROWS):
            logits_NV = model(torch.from_numpy(seen_NW[rows]))
            found.append(ranks_of(logits_NV.numpy(), ids_N[rows]))
    return np.concatenate(found)
