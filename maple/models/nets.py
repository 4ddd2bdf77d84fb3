"""The torch modules of Maple's feed-forward models. Their numpy twins, which serve, are beside each model and in ``nn``.

Letters: N rows, K input width, E embedding width, T tasks, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU and dropout between them; the last ReLU is optional. Numpy twin: ``nn.mlp``."""

    def __init__(self, width: int, widths: Sequence[int], *, dropout: float = 0.0, last_relu: bool = True) -> None:
        super().__init__()
        sizes = [width, *widths]
        self.layers = nn.ModuleList(nn.Linear(sizes[i], sizes[i + 1]) for i in range(len(widths)))
        self.dropout, self.last_relu = nn.Dropout(dropout), last_relu

    def forward(self, x: Tensor) -> Tensor:
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if self.last_relu or place < len(self.layers) - 1:
                x = self.dropout(torch.relu(x))
        return x


class CrossLayer(nn.Module):
    """``x0 * (W x + b) + x`` (Wang et al. 2021, eq. 1), or with W = U V of rank R (eq. 2)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False) if 0 < rank < width else None
        self.up = nn.Linear(rank if self.down is not None else width, width)

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        out: Tensor = x0 * self.up(x if self.down is None else self.down(x)) + x
        return out


class DCN(nn.Module):
    """Cross layers and a deep tower over numbers and code embeddings, plus a linear part; logits [N, T]. Numpy twin: ``ctr.forward``."""

    def __init__(
        self, *, num_numbers: int, num_codes: int, table_rows: int, embedding: int, cross_layers: int, rank: int,
        deep: Sequence[int], stacked: bool, wide: bool, tasks: int, dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        width = num_numbers + num_codes * embedding
        self.stacked = stacked
        self.table = nn.Embedding(table_rows, embedding) if num_codes else None
        if self.table is not None:
            nn.init.normal_(self.table.weight, std=0.2)
        self.cross = nn.ModuleList(CrossLayer(width, rank) for _ in range(cross_layers))
        self.deep = MLP(width, deep, dropout=dropout) if deep else None
        deep_width = deep[-1] if deep else 0
        self.head = nn.Linear(deep_width if stacked and deep else width + deep_width, tasks)
        self.wide = nn.Linear(width, tasks, bias=False) if wide else None
        if self.wide is not None:
            nn.init.zeros_(self.wide.weight)

    def forward(self, numbers_NK: Tensor, codes_NC: Tensor) -> Tensor:
        parts = [numbers_NK] if self.table is None else [numbers_NK, self.table(codes_NC).flatten(1)]
        x0 = torch.cat(parts, dim=1)
        x = x0
        for layer in self.cross:
            x = layer(x0, x)
        if self.deep is not None:
            x = self.deep(x) if self.stacked else torch.cat([x, self.deep(x0)], dim=1)
        out: Tensor = self.head(x)
        return out if self.wide is None else out + self.wide(x0)


class TwoTowerNet(nn.Module):
    """The towers: an item is the sum of its id, field and number embeddings; a user is the pooled history plus an MLP of it.

    Row ``num_items`` of the id table is the id of items that were never seen.
    """

    fields_IF: Tensor
    numbers_IP: Tensor

    def __init__(
        self, *, num_items: int, fields_IF: Tensor, numbers_IP: Tensor, width: int, pools: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.ids = nn.Embedding(num_items + 1, width)
        nn.init.normal_(self.ids.weight, std=width**-0.5)
        with torch.no_grad():
            self.ids.weight[num_items] = 0
        self.bias = nn.Embedding(num_items + 1, 1)
        nn.init.zeros_(self.bias.weight)
        num_fields, num_numbers = fields_IF.shape[1], numbers_IP.shape[1]
        self.fields = nn.Embedding(int(fields_IF.max()) + 1, width) if num_fields else None
        if self.fields is not None:
            nn.init.normal_(self.fields.weight, std=0.3 * width**-0.5)
        self.numbers = nn.Linear(num_numbers, width, bias=False) if num_numbers else None
        if self.numbers is not None:
            nn.init.normal_(self.numbers.weight, std=0.1 * width**-0.5)
        self.register_buffer("fields_IF", fields_IF, persistent=False)
        self.register_buffer("numbers_IP", numbers_IP, persistent=False)
        self.user = MLP(width * pools, (hidden, width), dropout=dropout, last_relu=False) if hidden else None
        if self.user is not None:
            for parameter in self.user.layers[-1].parameters():
                nn.init.zeros_(parameter)  # at first a user is the pooled history

    def items(self, item_N: Tensor, row_N: Tensor) -> Tensor:
        """Item vectors [N, D] before scaling; ``row_N`` is the id row of each item."""
        out: Tensor = self.ids(row_N)
        if self.fields is not None:
            out = out + self.fields(self.fields_IF[item_N]).sum(1)
        if self.numbers is not None:
            out = out + self.numbers(self.numbers_IP[item_N])
        return out

    def users(self, pooled: Sequence[Tensor]) -> Tensor:
        """User vectors [B, D] before scaling, from the pools [B, D] of the history."""
        return pooled[0] if self.user is None else pooled[0] + self.user(torch.cat(list(pooled), dim=1))
