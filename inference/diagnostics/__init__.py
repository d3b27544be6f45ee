"""Judgement of chains, guides and generated rows."""
