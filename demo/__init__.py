"""The demo: a small synthetic corpus of spoken English with German references, and what is trained on it."""
