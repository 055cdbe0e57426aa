"""What a run folder tells: the parts of the story, how far they are, and one page about all of it."""
