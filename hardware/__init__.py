"""What machines exist and how they are wired."""

from hardware.device import CommGroup, Device, Source
from hardware.errors import InputError

__all__ = ["CommGroup", "Device", "InputError", "Source"]
