"""How long, how many bytes and how much energy one operator takes on one device."""
