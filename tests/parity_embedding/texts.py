"""What the fixtures embed: padded alike and not, with what a vocabulary does not know, longer than any window."""

TEXTS = (
    "the fox said: that is the other thing, héllo 世界 and 42 dogs jump over it",
    "she sells the sea, and then?",
    "No",
    "she sells sea shells on the sea shore; the shells that she sells are sea shells, I am sure of that",
)
