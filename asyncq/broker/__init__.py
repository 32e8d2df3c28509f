"""The only room that speaks to Redis: connections, keys, scripts and the moves of a task."""
