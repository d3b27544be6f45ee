"""Published figures and those obtained here."""

from ppl_models.ledger.entries import RECIPES, latest, records, table
from ppl_models.ledger.record import GRADES, RECORDS, Recipe, check, reproduce

__all__ = ["GRADES", "RECIPES", "RECORDS", "Recipe", "check", "latest", "records", "reproduce", "table"]
