"""The checkpoint format: an `.idx` that says what is in a `.bin`, and the converter to it."""
