"""The k-core of a data set: users and items that have enough of each other, as published protocols filter them."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from maple.config import Section
from maple.data.dataset import Dataset
from maple.errors import DataError


class KCore(Section):
    """How many distinct items a user, and how many distinct users an item must have to be learned from. 1 and 1: all."""

    min_user: int = Field(default=1, ge=1)
    min_item: int = Field(default=1, ge=1)

    def of(self, data: Dataset) -> Dataset:
        """The data set, or its core where one is asked for."""
        return data if (self.min_user, self.min_item) == (1, 1) else k_core(data, self.min_user, self.min_item)


def k_core(data: Dataset, min_user: int, min_item: int) -> Dataset:
    """The largest part of the log in which every user has ``min_user`` distinct items and every item ``min_item`` distinct users.

    An interaction is an event of positive interest (``signals``); other events stay where their user and item do. Codes and tables stay as
    they are, so an item outside the core is one that nothing is known of. Rounds over distinct pairs until none goes: the result does not
    depend on their order. ``DataError`` where nothing is left.
    """
    log, users, items = data.log, len(data.users), len(data.items)
    counts = data.signals[log.event] > 0
    pairs = np.unique(log.user[counts].astype(np.int64) * items + log.item[counts])
    user, item = pairs // max(items, 1), pairs % max(items, 1)
    while True:
        of_user, of_item = np.bincount(user, minlength=users), np.bincount(item, minlength=items)
        keep = (of_user[user] >= min_user) & (of_item[item] >= min_item)
        if keep.all():
            break
        user, item = user[keep], item[keep]
    if len(user) == 0:
        raise DataError(
            f"no user has {min_user} items that {min_item} users have: the k-core is empty. Lower `k_core:` in the settings of the run."
        )
    return data.where((of_user > 0)[log.user] & (of_item > 0)[log.item])
