"""Schedules of a lowered program: what may change places, candidates, and a judge."""
