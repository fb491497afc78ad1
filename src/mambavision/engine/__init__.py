"""Training and evaluation on one device."""
