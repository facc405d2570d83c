"""From whatever names a picture to an upright picture in RGB: `local_llava.images` puts these parts together.

`sources`, `fetch` and `clipboard` give bytes, `decode` makes a picture of them (`isolated` in a process of its own,
where that may hang or crash), `pixels` brings any mode and any array into one form, and `anyres` cuts LLaVA-NeXT's
tiles.
"""
