"""Things you run: `python -m train ...` trains, evaluates and samples a small language model. Nothing imports from here."""
