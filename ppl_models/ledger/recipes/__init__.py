"""The runs behind the ledger."""
