"""What a run would need, on devices that need not be here."""
