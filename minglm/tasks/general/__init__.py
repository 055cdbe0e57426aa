"""General ability: instruction following, translation, long documents, safety, and style."""

FAMILIES = ()
