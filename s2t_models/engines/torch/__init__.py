"""The torch engine: exact, many calls at once, on one device."""
