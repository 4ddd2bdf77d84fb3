"""Exchange rates: what one unit of a currency is worth in another, fixed or from day to day."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

DAY = 86_400_000_000
LATEST = np.iinfo(np.int64).max // 2
Days = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Rates:
    """The known days (since 1970, ascending) and rates of each currency. A fixed rate is one that holds from the first day on."""

    days: Mapping[str, tuple[Days, Values]]

    @staticmethod
    def fixed(rates: Mapping[str, float], to: str) -> Rates:
        """Rates that never change; ``to`` itself is worth one."""
        begin = np.array([-LATEST], np.int64)
        return Rates({code: (begin, np.array([rate])) for code, rate in {**rates, to: 1.0}.items()})

    @staticmethod
    def daily(table: pa.Table, to: str) -> Rates:
        """From columns currency, timestamp (a day, UTC) and rate; the last row of a day counts."""
        found: dict[str, tuple[Days, Values]] = dict(Rates.fixed({}, to).days)
        code = table["currency"].combine_chunks()
        day, rate = np.asarray(table["timestamp"].cast(pa.int64())) // DAY, np.asarray(table["rate"])
        for name in pc.unique(code).to_pylist():
            rows = np.flatnonzero(np.asarray(pc.equal(code, name).to_numpy(zero_copy_only=False)))
            rows = rows[np.argsort(day[rows], kind="stable")]
            rows = rows[np.append(np.diff(day[rows]) != 0, True)]
            if name != to:
                found[name] = (day[rows], rate[rows])
        return Rates(found)

    def of(self, codes: pa.Array, times: pa.Array | None) -> pa.Array:
        """The rate of each row's currency at its time, the last one known by then; null where there is none. float64[N].

        Rows without a time (``times`` is None) take the latest rate.
        """
        coded = codes.dictionary_encode()
        place = np.asarray(coded.indices.fill_null(-1))
        out = np.full(len(codes), np.nan)
        day = np.full(len(codes), LATEST) if times is None else np.asarray(times.cast(pa.int64()).fill_null(-LATEST)) // DAY
        for number, name in enumerate(coded.dictionary.to_pylist()):
            if name in self.days:
                days, rates = self.days[name]
                rows = np.flatnonzero(place == number)
                last = np.searchsorted(days, day[rows], side="right") - 1
                out[rows] = np.where(last >= 0, rates[np.maximum(last, 0)], np.nan)
        return pa.array(out, from_pandas=True)
