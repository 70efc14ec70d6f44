"""The generated contract. Regenerate with `make proto`; never edit by hand."""
