"""The same numbers in less time: without this room only the time changes."""
