"""A training run: its settings, session, step, optimizer, folder and screen."""
