"""What the keys of other trainers' configurations are here."""
