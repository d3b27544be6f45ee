"""The work of each command, which is imported when the command runs; ``cli`` has their arguments."""
