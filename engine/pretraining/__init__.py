"""Pretraining of the small model that every lab opens with: text in, a folder that transformers opens out.

    python -m engine.pretraining --text stories.txt.xz --out storyteller

`engine.pretraining.recipe` says what is trained and how, `mixture` what it reads, `run` does it, `card` writes it down.
"""
