"""What machines exist and how they are wired."""

from hardware.catalog import Catalog, Link, NodeType, catalog_rows, load_catalog
from hardware.device import CommGroup, Device, Source
from hardware.errors import InputError
from hardware.topology import Cluster, Pool, build_cluster

__all__ = [
    "Catalog",
    "Cluster",
    "CommGroup",
    "Device",
    "InputError",
    "Link",
    "NodeType",
    "Pool",
    "Source",
    "build_cluster",
    "catalog_rows",
    "load_catalog",
]
