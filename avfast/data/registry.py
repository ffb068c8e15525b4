"""Every data set that the harness knows, by the name that `--dataset` uses. A new data set is one line here."""

from __future__ import annotations

from avfast.data.base import DataSettings
from avfast.data.mmnist import MMNISTConfig
from avfast.data.prepared import ClipsConfig

DATASETS: dict[str, type[DataSettings]] = {
    settings.name: settings
    for settings in (
        MMNISTConfig,
        ClipsConfig,
    )
}
