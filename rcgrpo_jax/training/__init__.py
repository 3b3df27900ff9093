"""The names that configuration files of before import: those of users, and the scripts in their reports."""
