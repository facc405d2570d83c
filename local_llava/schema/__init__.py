"""Answers that follow a JSON schema: from a schema to the tokens that may come next.

`compiler` checks a schema and brings it into one form (`places`, `cases`, `regex`, `numbers`, ...), `rules` and
`grammar` make a grammar of it, and `constraint` masks the tokens that the grammar forbids, with a `parser` that knows
how far the end of the answer is. Knows no model.
"""
