"""What every other package stands on: pairs bound to data, handlers, checks and the contracts."""
