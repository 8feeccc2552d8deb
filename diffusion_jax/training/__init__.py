"""The loop that all families share. It knows the Family protocol, never a family."""
