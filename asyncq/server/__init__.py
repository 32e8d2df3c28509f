"""Runs tasks: loops around what is in flight, started and stopped in order by the server."""
